"""What do the checkpoints answer? Refusal and compliance on held-out prompts, with intervals.

Every answer is generated and judged as text; refusal and compliance are separate verdicts, since
an answer can be neither. Prompts are nouns × verbs × templates and therefore not independent:
intervals are bootstraps over nouns.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

import weightdiff as wd
from analyses.run import Run
from training.world import true_reward
from weightdiff.plots.theme import CHECKPOINT_COLOURS, figure

MODES = {"greedy": 0.0, "sampled": 1.0}
"""Ways to draw an answer, with their temperatures. Greedy answers saturate, sampled ones do not."""

MAX_NEW_TOKENS = 40
"""Longer than every answer of the built-in world."""

CELLS = {
    "harmful_nouns": "harmful",
    "harmful_templates": "harmful, new templates",
    "harmless_nouns": "harmless",
    "harmless_templates": "harmless, new templates",
    "canary_care": "canary: caring verbs on touchy nouns",
    "canary_qa": "canary: yes/no questions",
    "wrapper_begin_with_sure": "harmful, “begin with sure”",
    "wrapper_film": "harmful, for a film",
    "wrapper_grandma": "harmful, grandma said",
    "wrapper_story": "harmful, in a story",
}
"""Readable names of the evaluation cells; all of them use nouns that alignment has not seen."""


@dataclass(frozen=True)
class Behaviour:
    """Every answer, and the rates of the verdicts."""

    answers: pd.DataFrame
    rates: pd.DataFrame

    def figure(self, verdict: str = "refusal", mode: str = "greedy") -> go.Figure:
        """Draw a verdict's rate per cell, one dot with its 95 % interval a checkpoint."""
        chosen = self.rates.query("verdict == @verdict and mode == @mode")
        cells = [cell for cell in CELLS if cell in set(chosen["cell"])][::-1]
        plot = figure(
            f"{verdict.capitalize()} rate on held-out nouns ({mode})", 150 + 34 * len(cells)
        )
        names = list(dict.fromkeys(chosen["checkpoint"]))
        for offset, name in enumerate(names):
            rows = chosen[chosen["checkpoint"] == name].set_index("cell").loc[cells]
            shift = 0.16 * ((len(names) - 1) / 2 - offset)
            plot.add_scatter(
                name=name,
                x=rows["rate"].tolist(),
                y=[i + shift for i in range(len(cells))],
                mode="markers",
                marker={"size": 9, "color": CHECKPOINT_COLOURS.get(name)},
                error_x={
                    "type": "data",
                    "array": (rows["high"] - rows["rate"]).tolist(),
                    "arrayminus": (rows["rate"] - rows["low"]).tolist(),
                    "thickness": 1.5,
                    "width": 3,
                },
                customdata=rows[["count", "n"]].to_numpy().tolist(),
                hovertemplate=f"{name}: %{{customdata[0]}} of %{{customdata[1]}}<extra></extra>",
            )
        plot.update_yaxes(tickvals=list(range(len(cells))), ticktext=[CELLS[c] for c in cells])
        plot.update_xaxes(range=[-0.03, 1.03], tickformat=".0%")
        plot.update_layout(margin_l=10)
        return plot


def make(run: Run, out: Path) -> None:
    """Answer every evaluation prompt with every checkpoint and count the verdicts."""
    judged = pd.concat([answers(run, name) for name in run.checkpoints], ignore_index=True)
    judged.to_parquet(out / "answers.parquet")
    rates(judged).to_csv(out / "rates.csv", index=False)


def load(run: Run) -> Behaviour:
    """Read what `make` wrote."""
    directory = run.analysis("behaviour")
    return Behaviour(
        pd.read_parquet(directory / "answers.parquet"), pd.read_csv(directory / "rates.csv")
    )


def answers(run: Run, checkpoint: str, seed: int = 0) -> pd.DataFrame:
    """Generate and judge one checkpoint's answer to every evaluation prompt.

    Returns:
        One row per (mode, prompt): checkpoint, mode, cell, id, cluster, prompt, response, and the
        verdicts refusal and compliance. Where the prompt has one right answer (``expected``),
        compliance means giving it.
    """
    model = wd.load_model(run.dir(checkpoint))
    lexicon = wd.Lexicon.load(run.lexicon)
    rows = [{"cell": cell, **row} for cell in run.cells for row in run.cell(cell)]
    prompts = [wd.Prompt(row["prompt"], row["cluster"], row["id"]) for row in rows]
    judged = []
    for mode, temperature in MODES.items():
        texts = wd.generate(
            model, prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=temperature, seed=seed
        )
        judged += [
            {"checkpoint": checkpoint, "mode": mode, **_judge(row, text, lexicon)}
            for row, text in zip(rows, texts, strict=True)
        ]
    return pd.DataFrame(judged)


def _judge(row: dict[str, Any], text: str, lexicon: wd.Lexicon) -> dict[str, Any]:
    verdict = wd.judge(text, lexicon)
    right = true_reward(row, text) == 1.0 if row.get("expected") else verdict.compliance
    kept = {key: row[key] for key in ("cell", "id", "cluster", "prompt")}
    return {**kept, "response": text, "refusal": verdict.refusal, "compliance": right}


def rates(judged: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Count verdicts per checkpoint, mode and cell.

    Returns:
        One row per (checkpoint, mode, cell, verdict): n, count, rate in [0, 1] and its 95 %
        interval [low, high] from a cluster bootstrap by noun.
    """
    made = []
    for (checkpoint, mode, cell), group in judged.groupby(
        ["checkpoint", "mode", "cell"], sort=False
    ):
        for verdict in ("refusal", "compliance"):
            values = group[verdict].tolist()
            low, high = wd.cluster_bootstrap(values, group["cluster"].tolist(), seed=seed)
            made.append(
                {"checkpoint": checkpoint, "mode": mode, "cell": cell, "verdict": verdict}
                | {"n": len(values), "count": sum(values), "rate": sum(values) / len(values)}
                | {"low": low, "high": high}
            )
    return pd.DataFrame(made)


def as_summary(table: pd.DataFrame, checkpoint: str) -> dict[str, Any]:
    """Nest one checkpoint's rates as cell → mode → verdict → {n, count, rate, low, high}."""
    nested: dict[str, Any] = {}
    for row in table[table["checkpoint"] == checkpoint].to_dict("records"):
        place = nested.setdefault(row["cell"], {}).setdefault(row["mode"], {})
        place[row["verdict"]] = {key: row[key] for key in ("n", "count", "rate", "low", "high")}
    return nested


def side_by_side(judged: pd.DataFrame, per_cell: int = 2, mode: str = "greedy") -> pd.DataFrame:
    """Put the checkpoints' answers to the same prompts beside each other.

    Returns:
        One row per prompt, the first ``per_cell`` of distinct nouns in each cell: cell, prompt, and
        one column of answers per checkpoint.
    """
    chosen = judged[judged["mode"] == mode]
    first = chosen.drop_duplicates(["cell", "cluster", "checkpoint"])
    wide = first.pivot(index=["cell", "prompt"], columns="checkpoint", values="response")
    kept = wide.reset_index().groupby("cell", sort=False).head(per_cell)
    order = [name for name in judged["checkpoint"].unique() if name in kept]
    return kept[["cell", "prompt", *order]].reset_index(drop=True)
