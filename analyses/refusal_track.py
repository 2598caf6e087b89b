"""Where does refusal live, what does it cause, and how does alignment move it?

Every checkpoint's refusal direction is found on training nouns. For the aligned ones it is tested
causally on held-out nouns; all of them are then compared at one place, the aligned model's pick, so
that growth and rotation of the direction can be read from base to SFT to PPO and DPO.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from sklearn.metrics import roc_auc_score

import weightdiff as wd
from analyses.behaviour import CELLS, MAX_NEW_TOKENS
from analyses.run import Run
from weightdiff.plots import refusal as plots
from weightdiff.plots.theme import CHECKPOINT_COLOURS, figure

ALIGNED = ("ppo", "dpo")
"""Checkpoints whose direction is tested causally; base and SFT have next to no refusal to move."""

TEST = {"harmful": "harmful_nouns", "harmless": "harmless_nouns"}
"""Evaluation cells for the causal test: nouns that neither training nor the direction has seen."""


@dataclass(frozen=True)
class Track:
    """The directions of a run's checkpoints."""

    directions: dict[str, wd.Direction]
    effects: pd.DataFrame
    """One row per (checkpoint, rule, intervention, control, draw, prompts)."""
    table: pd.DataFrame
    """One row per checkpoint at the common place; see `track`."""
    projections: pd.DataFrame
    """One row per (checkpoint, cell): mean projection on the checkpoint's own direction."""

    def candidates(self, checkpoint: str) -> go.Figure:
        """Draw the scores of every candidate of one checkpoint."""
        direction = self.directions[checkpoint]
        return plots.candidates(direction.candidates, direction.info)

    def causal(self, checkpoint: str) -> go.Figure:
        """Draw what the affine pick of one checkpoint causes, random directions beside it."""
        return plots.effects(self._chosen(checkpoint))

    def causal_table(self, checkpoint: str) -> pd.DataFrame:
        """Tabulate the same: one row per (intervention, prompts), the mean of random directions."""
        return wd.Effects(self._chosen(checkpoint), pd.DataFrame()).summary()

    def _chosen(self, checkpoint: str) -> pd.DataFrame:
        return self.effects.query("checkpoint == @checkpoint and rule == 'affine'")

    def figure(self) -> go.Figure:
        """Draw the mean projection of each kind of prompt, per checkpoint."""
        shown = [cell for cell in CELLS if cell in set(self.projections["cell"])][::-1]
        plot = figure("Mean projection on the checkpoint's own direction", 150 + 30 * len(shown))
        for name, rows in self.projections.groupby("checkpoint", sort=False):
            ordered = rows.set_index("cell").loc[shown]
            plot.add_scatter(
                name=name,
                x=ordered["projection"].tolist(),
                y=[CELLS[cell] for cell in shown],
                mode="markers",
                marker={"size": 10, "color": CHECKPOINT_COLOURS[name]},
                hovertemplate=f"{name}: %{{x:.2f}}<extra></extra>",
            )
        plot.update_xaxes(title="r̂ᵀ(x − harmless mean), units of the residual stream")
        return plot


def make(run: Run, out: Path) -> None:
    """Find every checkpoint's direction, test the aligned ones, compare them at one place."""
    models = {name: wd.load_model(run.dir(name)) for name in run.checkpoints}
    directions, effects = {}, []
    for name, model in models.items():
        if name in ALIGNED:
            found = _refusal(run, model)
            directions[name] = found.direction
            found.save(out / name)
            effects.append(found.effects.table.assign(checkpoint=name))
        else:
            directions[name] = _direction(run, model)
            directions[name].save(out / name)
    table = pd.concat(effects) if effects else pd.DataFrame({"checkpoint": [], "rule": []})
    table.to_csv(out / "effects.csv", index=False)
    place = _place(directions)
    projections = pd.concat(
        [_projections(run, models[n], d.at(*place), n) for n, d in directions.items()]
    )
    means = projections.groupby(["checkpoint", "cell"], sort=False)["projection"].mean()
    means.reset_index().to_csv(out / "projections.csv", index=False)
    track(directions, projections, place).to_csv(out / "track.csv", index=False)


def load(run: Run) -> Track:
    """Read what `make` wrote."""
    directory = run.analysis("refusal")
    frames = [pd.read_csv(directory / f"{n}.csv") for n in ("effects", "track", "projections")]
    # An empty cell is no control, not a missing number.
    effects = frames[0].fillna({"control": ""})
    directions = {name: wd.load_direction(directory / name) for name in frames[1]["checkpoint"]}
    return Track(directions, effects, frames[1], frames[2])


def _prompts(run: Run, name: str) -> list[wd.Prompt]:
    return wd.load_prompts(run.path / "data" / f"{name}.jsonl")


def _train_val(run: Run) -> dict[str, Any]:
    return {
        "harmful": _prompts(run, "direction/harmful_train"),
        "harmless": _prompts(run, "direction/harmless_train"),
        "harmful_val": _prompts(run, "direction/harmful_val"),
        "harmless_val": _prompts(run, "direction/harmless_val"),
        "lexicon": wd.Lexicon.load(run.lexicon),
        "max_new_tokens": MAX_NEW_TOKENS,
    }


def _refusal(run: Run, model: Any) -> Any:
    tests = {kind: _prompts(run, f"eval/{cell}") for kind, cell in TEST.items()}
    return wd.refusal(
        model,
        **_train_val(run),
        harmful_test=tests["harmful"],
        harmless_test=tests["harmless"],
    )


def _direction(run: Run, model: Any) -> wd.Direction:
    return wd.refusal_direction(model, **_train_val(run))


def _place(directions: dict[str, wd.Direction]) -> tuple[int, int]:
    """Return the (pos, layer) at which checkpoints are compared: the first aligned one's pick."""
    chosen = next((directions[name] for name in ALIGNED if name in directions), None)
    chosen = chosen or list(directions.values())[-1]
    return chosen.pos, chosen.layer


def _projections(run: Run, model: Any, direction: wd.Direction, checkpoint: str) -> pd.DataFrame:
    """Project every request cell on ``direction``, from its harmless training mean."""
    zero = direction.harmless_mean[direction.positions.index(direction.pos), direction.layer]
    origin = float(zero @ direction.unit)
    parts = []
    for cell in run.cells:
        if cell == "canary_qa":
            continue
        rows = wd.project(model, _prompts(run, f"eval/{cell}"), direction)
        here = rows[(rows["pos"] == direction.pos) & (rows["layer"] == direction.layer)]
        parts.append(
            here[["projection"]].assign(
                checkpoint=checkpoint, cell=cell, projection=here["projection"] - origin
            )
        )
    return pd.concat(parts, ignore_index=True)


def track(
    directions: dict[str, wd.Direction], projections: pd.DataFrame, place: tuple[int, int]
) -> pd.DataFrame:
    """Compare the mean differences of all checkpoints at one (pos, layer).

    Returns:
        One row per checkpoint: checkpoint, pos, layer, norm of the mean difference, cos_<other> to
        every checkpoint's, auroc of held-out harmful against harmless prompts along it, harmful
        and harmless (mean projections from the harmless training mean).
    """
    rows = []
    vectors = {name: direction.at(*place).vector for name, direction in directions.items()}
    for name, vector in vectors.items():
        own = projections[projections["checkpoint"] == name]
        sides = {kind: own[own["cell"] == cell]["projection"] for kind, cell in TEST.items()}
        labels = [1] * len(sides["harmful"]) + [0] * len(sides["harmless"])
        cosines = {
            f"cos_{other}": float(torch.cosine_similarity(vector, against, dim=0))
            for other, against in vectors.items()
        }
        rows.append(
            {"checkpoint": name, "pos": place[0], "layer": place[1], "norm": float(vector.norm())}
            | cosines
            | {"auroc": float(roc_auc_score(labels, pd.concat(list(sides.values()))))}
            | {kind: float(values.mean()) for kind, values in sides.items()}
        )
    return pd.DataFrame(rows)


def as_summary(found: Track, checkpoint: str) -> dict[str, Any]:
    """Return one checkpoint's picks, its place in the track, and its causal rates."""
    direction = found.directions[checkpoint]
    picks = {rule: direction.by(rule) for rule in ("affine", "arditi")}
    place = found.table[found.table["checkpoint"] == checkpoint].to_dict("records")[0]
    own = found.effects[found.effects["checkpoint"] == checkpoint]
    return {
        "picks": {
            rule: {"pos": pick.pos, "layer": pick.layer, "passed": pick.passed}
            for rule, pick in picks.items()
        },
        "track": {key: value for key, value in place.items() if key != "checkpoint"},
        "causal": own.drop(columns="checkpoint").to_dict("records") if len(own) else None,
    }
