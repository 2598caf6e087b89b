"""How far is each checkpoint from SFT, and what did the distance buy?

The exact sequence KL on held-out prompts, both directions, and along training the true reward
against the KL, where PPO and DPO can be compared at equal distance.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.behaviour import MAX_NEW_TOKENS
from analyses.run import Run
from training.kl import KLMeter
from training.model import load_model, load_tokenizer
from weightdiff.plots.theme import CHECKPOINT_COLOURS, figure

CELLS = ("harmful_nouns", "harmless_nouns")
"""Prompts with nouns that no alignment stage has seen."""


def make(run: Run, out: Path) -> None:
    """Measure every checkpoint other than SFT."""
    if run.has("sft"):
        divergence(run).to_csv(out / "divergence.csv", index=False)


def load(run: Run) -> pd.DataFrame:
    """Read what `make` wrote; empty without an SFT checkpoint."""
    path = run.analysis("divergence") / "divergence.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame({"checkpoint": []})


def divergence(run: Run, n_prompts: int = 200, seed: int = 0) -> pd.DataFrame:
    """Measure E_{y∼π} Σ_t KL(π_t ‖ SFT_t) at temperature 1, through the end token.

    Returns:
        One row per checkpoint other than SFT: checkpoint, n (prompts), kl and kl_se, reverse_kl and
        reverse_kl_se (nats a response), entropy (nats a token), length (tokens a response).
    """
    rows = [row for cell in CELLS for row in run.cell(cell)[: n_prompts // len(CELLS)]]
    meter = KLMeter(
        load_model(run.dir("sft")),
        load_tokenizer(run.dir("sft")),
        rows,
        seed=seed,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    others = [name for name in run.checkpoints if name != "sft"]
    measured = {name: meter.measure(load_model(run.dir(name))) for name in others}
    return pd.DataFrame(
        {
            "checkpoint": name,
            "n": len(rows),
            "kl": kl.mean,
            "kl_se": kl.se,
            "reverse_kl": kl.reverse_mean,
            "reverse_kl_se": kl.reverse_se,
            "entropy": kl.entropy,
            "length": kl.length,
        }
        for name, kl in measured.items()
    )


def as_summary(table: pd.DataFrame, checkpoint: str) -> dict[str, Any] | None:
    """Return one checkpoint's measurements, or None for SFT itself."""
    rows = table[table["checkpoint"] == checkpoint].to_dict("records")
    return {key: value for key, value in rows[0].items() if key != "checkpoint"} if rows else None


def ledgers(run: Run) -> pd.DataFrame:
    """List the snapshots of PPO and DPO with what their ledgers say, one row each."""
    rows = [
        {"checkpoint": arm, **ledger}
        for arm in ("ppo", "dpo")
        if run.has(arm)
        for ledger in run.ledgers(arm)
    ]
    return pd.DataFrame(rows)


def frontier(run: Run) -> go.Figure:
    """Draw the true reward of each snapshot against its KL to SFT; the matched pair is ringed."""
    table = ledgers(run)
    plot = figure("True reward against distance from SFT, along training", 380)
    for arm, rows in table.groupby("checkpoint", sort=False):
        matched = run.matched.get("snapshots", {}).get(arm, {}).get("step")
        ring = [3 if step == matched else 0 for step in rows["step"]]
        plot.add_scatter(
            name=arm,
            x=rows["kl"].tolist(),
            y=rows["true_reward"].tolist(),
            error_x={"type": "data", "array": (1.96 * rows["kl_se"]).tolist(), "thickness": 1},
            mode="lines+markers",
            line_color=CHECKPOINT_COLOURS[arm],
            marker={"size": 10, "line": {"width": ring, "color": "#1f2933"}},
            customdata=rows["step"].tolist(),
            hovertemplate=f"{arm} step %{{customdata}}: %{{x:.2f}} nats, %{{y:.0%}}<extra></extra>",
        )
    plot.update_xaxes(title="sequence KL(π‖SFT), nats", rangemode="tozero")
    plot.update_yaxes(title="right answers, sampled", tickformat=".0%", range=[0, 1.03])
    return plot
