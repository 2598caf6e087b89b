"""What does each step of alignment change in the weights, by layer and by component?

The steps are base → SFT, SFT → PPO and SFT → DPO; PPO and DPO are also compared with each other, at
the end of training and at the pair of snapshots whose KL to SFT is nearest. The end of training
says little about the algorithms: with Adam it is mostly learning rate times number of steps.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

import weightdiff as wd
from analyses.run import Run
from weightdiff.artefact import write_json
from weightdiff.plots.theme import COMPONENT_COLOURS, figure

STEPS = (("base", "sft"), ("sft", "ppo"), ("sft", "dpo"), ("ppo", "dpo"))
"""Pairs of checkpoints, from → to."""


@dataclass(frozen=True)
class Pair:
    """Two checkpoints to compare."""

    label: str
    """``sft → ppo``; ``sft → ppo @ KL`` for the snapshots of nearest KL."""
    a: Path
    b: Path

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return self.label.replace(" → ", "-").replace(" @ ", "-at-").lower()


def pairs(run: Run) -> list[Pair]:
    """List the pairs that the finished stages allow, the matched snapshots last."""
    found = [Pair(f"{a} → {b}", run.dir(a), run.dir(b)) for a, b in STEPS if has(run, a, b)]
    if run.matched:
        ppo, dpo = (run.path / run.matched["snapshots"][name]["path"] for name in ("ppo", "dpo"))
        found += [
            Pair("sft → ppo @ KL", run.dir("sft"), ppo),
            Pair("sft → dpo @ KL", run.dir("sft"), dpo),
            Pair("ppo → dpo @ KL", ppo, dpo),
        ]
    return found


def has(run: Run, *stages: str) -> bool:
    """Tell whether all of the stages are finished."""
    return all(run.has(stage) for stage in stages)


@dataclass(frozen=True)
class Changes:
    """The comparisons of one run, by label."""

    comparisons: dict[str, wd.Comparison]

    def by(self, *keys: str) -> pd.DataFrame:
        """Re-aggregate every comparison by ``keys``; the column ``step`` tells them apart."""
        return pd.concat(
            [made.by(*keys).assign(step=label) for label, made in self.comparisons.items()],
            ignore_index=True,
        )

    def figure(self, metric: str = "rel") -> go.Figure:
        """Draw ``metric`` per component, one group of bars a step."""
        frame = self.by("component")
        plot = figure(f"{TITLES[metric]} by component", 380)
        for component, colour in COMPONENT_COLOURS.items():
            rows = frame[frame["component"] == component]
            if len(rows):
                plot.add_bar(
                    name=component,
                    x=rows["step"].tolist(),
                    y=rows[metric].tolist(),
                    marker_color=colour,
                    hovertemplate=f"{component}, %{{x}}: %{{y:.3g}}<extra></extra>",
                )
        plot.update_layout(barmode="group", yaxis_title=TITLES[metric])
        if metric == "enrichment":
            plot.add_hline(y=1.0, line_dash="dot", line_color="#5b6770")
        return plot


TITLES = {
    "rel": "Relative change ‖Δ‖ / ‖W‖",
    "enrichment": "Enrichment: share of ‖Δ‖² / share of parameters",
}


def make(run: Run, out: Path) -> None:
    """Compare every pair and save each comparison under its name."""
    index = {}
    for pair in pairs(run):
        wd.compare(pair.a, pair.b).save(out / pair.slug)
        index[pair.label] = pair.slug
    write_json(out / "pairs.json", index)
    load_from(out).by("component").to_csv(out / "components.csv", index=False)


def load(run: Run) -> Changes:
    """Read what `make` wrote."""
    return load_from(run.analysis("what_changes"))


def load_from(directory: Path) -> Changes:
    """Read the comparisons saved in a directory."""
    index = json.loads((directory / "pairs.json").read_text(encoding="utf-8"))
    return Changes({label: wd.load_comparison(directory / slug) for label, slug in index.items()})


def components(comparison: wd.Comparison) -> dict[str, dict[str, float]]:
    """Nest a comparison as component → {rel, share_sq, share_numel, enrichment}."""
    kept = ["rel", "share_sq", "share_numel", "enrichment"]
    rows = comparison.by("component").set_index("component")[kept]
    nested: dict[str, dict[str, float]] = rows.to_dict("index")
    return nested


def as_summary(changes: Changes) -> dict[str, Any]:
    """Nest every comparison as label → component → metrics."""
    return {label: components(made) for label, made in changes.comparisons.items()}
