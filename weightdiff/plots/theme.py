"""One look for every figure: colours, template, sizes.

Categorical colours are Okabe & Ito's (2008), told apart with any of the common colour-vision
deficiencies; sequential and diverging scales are perceptually even.
"""

from collections.abc import Sequence

import plotly.graph_objects as go

INK, MUTED, GRID = "#1f2933", "#5b6770", "#e4e7eb"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#8a939b"

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY, YELLOW)
COMPONENT_COLOURS = {
    "attn": BLUE,
    "mlp": VERMILION,
    "embed": GREEN,
    "unembed": SKY,
    "norm": ORANGE,
    "other": GREY,
}
CHECKPOINT_COLOURS = {"base": GREY, "sft": SKY, "rm": GREEN, "ppo": BLUE, "dpo": VERMILION}
SEQUENTIAL = "Cividis"
DIVERGING = [[0.0, BLUE], [0.5, "#f7f7f7"], [1.0, VERMILION]]

FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

_AXIS = {
    "gridcolor": GRID,
    "zerolinecolor": "#b8c0c8",
    "linecolor": "#b8c0c8",
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": "#b8c0c8",
    "title": {"standoff": 10},
    "automargin": True,
}
_LAYOUT = {
    "font": {"family": FONT, "size": 13, "color": INK},
    # The title hangs from the top edge, so that a legend fits between it and the axes.
    "title": {
        "x": 0.0,
        "xref": "paper",
        "xanchor": "left",
        "y": 1.0,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": 14},
        "font": {"size": 15},
    },
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "colorway": list(COLOURS),
    "margin": {"l": 64, "r": 24, "t": 76, "b": 56},
    "legend": {"orientation": "h", "x": 0.0, "y": 1.02, "yanchor": "bottom", "title": {"text": ""}},
    "xaxis": _AXIS,
    "yaxis": _AXIS,
    "bargap": 0.25,
    "hoverlabel": {"font": {"family": FONT}},
}
_TEMPLATE = go.layout.Template(layout=_LAYOUT)


def figure(title: str = "", height: int = 400, data: Sequence[object] = ()) -> go.Figure:
    """Return an empty figure with the common template; ``height`` in pixels."""
    made = go.Figure(data=list(data))
    made.update_layout(template=_TEMPLATE, height=height)
    if title:
        made.update_layout(title_text=title)
    return made


def with_alpha(colour: str, alpha: float) -> str:
    """Turn ``#rrggbb`` into ``rgba(...)`` with opacity ``alpha`` in [0, 1]."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"
