"""Figures: each function takes frames and returns a plotly figure; nothing is shown or written."""
