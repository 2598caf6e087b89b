"""The report of a run: one page that opens offline, its figures as PNG, its tables as CSV."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

import weightdiff as wd
from analyses import behaviour, divergence, refusal_track, what_changes
from analyses.run import Run
from analyses.summary import costs
from weightdiff.artefact import atomic_path, dump_json, output_dir
from weightdiff.page import write_pngs

PERCENT = "{:.1%}"
NUMBER = "{:.3g}"


def write_report(run: Run, summary: dict[str, Any]) -> Path:
    """Write ``report.html``, ``figures/*.png`` and ``tables/*.csv`` and return the page's path."""
    shown, moved = behaviour.load(run), what_changes.load(run)
    tracked = refusal_track.load(run)
    figures = _figures(run, shown, moved, tracked)
    page = wd.Page(f"What alignment changed: {run.name}", lead(summary))
    _behaviour(page, shown, figures)
    _changes(page, moved, figures)
    _distance(page, run, figures)
    _refusal(page, tracked, figures)
    _provenance(page, run, summary)
    tables = {"rates": shown.rates, "components": moved.by("component"), "track": tracked.table}
    tables |= {"layers": moved.by("layer", "component"), "effects": tracked.effects}
    directory = output_dir(run.path / "tables")
    for name, frame in tables.items():
        with atomic_path(directory / f"{name}.csv") as partial:
            _flat(frame).to_csv(partial, index=False)
    pngs = output_dir(run.path / "figures")
    write_pngs({pngs / f"{name}.png": plot for name, plot in figures.items()})
    return page.write(run.path / "report.html")


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Drop columns that hold whole arrays, as histograms do."""
    arrays = (list, tuple, np.ndarray)
    return frame[[c for c in frame if not isinstance(next(iter(frame[c]), None), arrays)]]


def _figures(
    run: Run,
    shown: behaviour.Behaviour,
    moved: what_changes.Changes,
    tracked: refusal_track.Track,
) -> dict[str, go.Figure]:
    made = {
        "refusal_rates": shown.figure("refusal"),
        "compliance_rates": shown.figure("compliance"),
        "components_rel": moved.figure("rel"),
        "components_enrichment": moved.figure("enrichment"),
        "projections": tracked.figure(),
    }
    for label in ("sft → ppo", "sft → dpo"):
        if label in moved.comparisons:
            name = f"heatmap_{label.replace(' → ', '_')}"
            made[name] = moved.comparisons[label].plot.heatmap("rel")
    if len(divergence.ledgers(run)):
        made["frontier"] = divergence.frontier(run)
    for name in refusal_track.ALIGNED:
        if name in tracked.directions:
            made[f"candidates_{name}"] = tracked.candidates(name)
            made[f"causal_{name}"] = tracked.causal(name)
    return made


def lead(summary: dict[str, Any]) -> str:
    """Say in a few sentences what the run shows, from its numbers alone."""
    said = []
    for name, checkpoint in summary["checkpoints"].items():
        cell = checkpoint["behaviour"].get("harmful_nouns", {}).get("greedy")
        if cell and name != "base":
            said.append(f"{name.upper()} {cell['refusal']['rate']:.0%}")
    sentences = (
        [f"Refusal of harmful requests with unseen nouns: {', '.join(said)}."] if said else []
    )
    for label in ("sft → ppo", "sft → dpo"):
        parts = summary["comparisons"].get(label)
        if parts:
            ranked = sorted(parts.items(), key=lambda item: -item[1]["rel"])
            moved = ", ".join(f"{name} {values['rel']:.3f}" for name, values in ranked)
            sentences.append(f"Relative change {label}: {moved}.")
    return " ".join(sentences)


def _behaviour(page: wd.Page, shown: behaviour.Behaviour, figures: dict[str, go.Figure]) -> None:
    page.section(
        "What the checkpoints answer",
        "Refusal and compliance are two verdicts on the generated text; an answer can be neither. "
        "All prompts use nouns that no alignment stage has seen. Bars are 95 % intervals from a "
        "bootstrap over nouns. For yes/no questions, compliance is the right answer.",
    )
    for verdict in ("refusal", "compliance"):
        page.figure(
            figures[f"{verdict}_rates"],
            alt=f"{verdict} rate of every checkpoint on every kind of prompt; numbers below",
        )
    wide = shown.rates.pivot_table(
        index=["verdict", "mode", "cell"], columns="checkpoint", values="rate", sort=False
    )
    names = list(wide.columns)
    page.table(
        wide.reset_index(),
        "Rates; counts and intervals are in tables/rates.csv.",
        dict.fromkeys(names, PERCENT),
    )
    page.section("The same prompts, side by side", "Greedy answers.")
    page.table(behaviour.side_by_side(shown.answers))


def _changes(page: wd.Page, moved: what_changes.Changes, figures: dict[str, go.Figure]) -> None:
    page.section(
        "What changed in the weights",
        "Relative change is ‖Δ‖/‖W‖ with Frobenius norms. Enrichment is a component's share of "
        "‖Δ‖² divided by its share of the parameters: at 1 it is not special. “@ KL” compares the "
        "snapshots of PPO and DPO whose KL to SFT is nearest.",
    )
    for metric in ("rel", "enrichment"):
        page.figure(
            figures[f"components_{metric}"],
            alt=f"{what_changes.TITLES[metric]} of every component in every step; table below",
        )
    for name in figures:
        if name.startswith("heatmap_"):
            step = name.removeprefix("heatmap_").replace("_", " → ")
            page.figure(figures[name], alt=f"Relative change by layer, {step}", caption=step)
    kept = ["step", "component", "rel", "share_sq", "share_numel", "enrichment"]
    page.table(moved.by("component")[kept], "", dict.fromkeys(kept[2:], NUMBER))


def _distance(page: wd.Page, run: Run, figures: dict[str, go.Figure]) -> None:
    measured = divergence.load(run)
    page.section("Distance from SFT", matched_sentence(run))
    if "frontier" in figures:
        page.figure(
            figures["frontier"],
            alt="True reward of each snapshot of PPO and DPO against its KL to SFT",
            caption="Ringed: the matched pair. Bars: 95 % intervals of the KL.",
        )
    numbers = [name for name in measured if name not in ("checkpoint", "n")]
    page.table(
        measured,
        "Exact sequence KL, held-out prompts, temperature 1, nats a response; entropy per token.",
        dict.fromkeys(numbers, NUMBER),
    )


def matched_sentence(run: Run) -> str:
    """Say which snapshots of PPO and DPO are matched, and how well."""
    if not run.matched:
        return "PPO or DPO is missing, so nothing is matched."
    ppo, dpo = (run.matched["snapshots"][name] for name in ("ppo", "dpo"))
    good = "within" if run.matched["within_tolerance"] else "outside"
    return (
        f"PPO at step {ppo['step']} ({ppo['kl']:.2f} ± {ppo['kl_se']:.2f} nats) is matched with "
        f"DPO at step {dpo['step']} ({dpo['kl']:.2f} ± {dpo['kl_se']:.2f} nats): a miss of "
        f"{run.matched['miss_relative']:.0%}, {good} the tolerance of "
        f"{run.matched['tolerance']:.0%}."
    )


def _refusal(page: wd.Page, tracked: refusal_track.Track, figures: dict[str, go.Figure]) -> None:
    page.section(
        "The refusal direction",
        "Difference of mean residual-stream activations, harmful minus harmless, on training "
        "nouns, tested on held-out ones by generated text. Zero-ablation removes the direction, "
        "affine ablation sets it to its harmless mean, addition adds the mean difference "
        "once, at the last prompt token. Diamonds are random directions of equal norm.",
    )
    for name in refusal_track.ALIGNED:
        if name not in tracked.directions:
            continue
        direction = tracked.directions[name]
        picks = {rule: direction.by(rule) for rule in ("affine", "arditi")}
        page.text(
            f"{name.upper()}: "
            + "; ".join(
                f"the {rule} rule picks position {pick.pos}, layer {pick.layer}"
                + ("" if pick.passed else " (it fails a gate; nothing passes all of them)")
                for rule, pick in picks.items()
            )
            + "."
        )
        page.figure(figures[f"candidates_{name}"], alt=f"Scores of every candidate of {name}")
        page.figure(figures[f"causal_{name}"], alt=f"Causal effects in {name}; table below")
        rates = tracked.causal_table(name)
        formats = {c: PERCENT for c in rates if "refusal" in c or "compliance" in c}
        formats |= {"log_odds": NUMBER, "kl": NUMBER}
        page.table(rates, f"{name}: effects of the affine pick on held-out nouns.", formats)
    page.figure(
        figures["projections"],
        alt="Mean projection of each kind of prompt on each checkpoint's direction",
        caption="All at the same position and layer, the aligned model's pick.",
    )
    numbers = [c for c in tracked.table if c not in ("checkpoint", "pos", "layer")]
    page.table(tracked.table, "The direction at that place.", dict.fromkeys(numbers, NUMBER))


def _provenance(page: wd.Page, run: Run, summary: dict[str, Any]) -> None:
    page.section("Cost and provenance")
    table = costs(run)
    page.table(table, "", {c: "{:,.0f}" for c in table if c != "stage"})
    reward = summary["reward_model"]
    if "test_accuracy" in reward:
        page.text(
            f"Reward model: accuracy {reward['test_accuracy']:.1%} on held-out pairs with clean "
            f"labels, calibration error {reward['test_ece']:.3f}."
        )
    for name in (*run.checkpoints, "rm"):
        if run.has(name):
            page.details(f"{name}: provenance", dump_json(run.provenance(name)))
    page.details("config", dump_json(run.config))
