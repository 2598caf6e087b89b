"""Matched SFT, PPO and DPO checkpoints from one base: configuration in, run directory out."""
