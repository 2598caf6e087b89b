"""The numbers of a run as one JSON document, for programs and for the report."""

from typing import Any

import pandas as pd

import weightdiff as wd
from analyses import behaviour, divergence, refusal_track, what_changes
from analyses.run import Run
from analyses.step import cost
from weightdiff.artefact import write_json

SCHEMA_VERSION = 1
STAGES = ("base", "sft", "rm", "ppo", "dpo")


def write_summary(run: Run) -> dict[str, Any]:
    """Collect the finished analyses into ``summary.json`` and return what was written."""
    summary = {
        "schema_version": SCHEMA_VERSION,
        "weightdiff": wd.__version__,
        "name": run.name,
        "seed": run.config["seed"],
        "config": run.config,
        "checkpoints": {name: _checkpoint(run, name) for name in run.checkpoints},
        "comparisons": what_changes.as_summary(what_changes.load(run)),
        "matched": run.matched,
        "reward_model": _last_metrics(run, "rm"),
        "cost": costs(run).set_index("stage").to_dict("index"),
    }
    write_json(run.path / "summary.json", summary)
    return summary


def _checkpoint(run: Run, name: str) -> dict[str, Any]:
    provenance = run.provenance(name)
    changes = what_changes.load(run).comparisons
    into = next((label for label in changes if label.endswith(f"→ {name}")), None)
    return {
        "path": name,
        "model_sha256": provenance["model_sha256"],
        "parent": provenance["parent"],
        "behaviour": behaviour.as_summary(behaviour.load(run).rates, name),
        "kl_to_sft": divergence.as_summary(divergence.load(run), name),
        "delta": {"step": into, "components": what_changes.components(changes[into])}
        if into
        else None,
        "direction": refusal_track.as_summary(refusal_track.load(run), name),
        "wall_seconds": provenance["wall_seconds"],
        "cpu_seconds": provenance["cpu_seconds"],
    }


def costs(run: Run) -> pd.DataFrame:
    """List what every stage and analysis cost.

    Returns:
        One row per stage: stage, wall_seconds, cpu_seconds, and for training also steps,
        tokens_seen, tokens_generated, peak_rss_bytes, model_copies_held.
    """
    kept = ["wall_seconds", "cpu_seconds", "steps", "tokens_seen", "tokens_generated"]
    kept += ["peak_rss_bytes", "model_copies_held"]
    trained = [
        {"stage": name, **{key: run.provenance(name)[key] for key in kept}}
        for name in STAGES
        if run.has(name)
    ]
    analysed = [
        {"stage": f"analysis/{path.parent.name}", **cost(path.parent)}
        for path in sorted((run.path / "analysis").glob("*/key.json"))
    ]
    return pd.DataFrame(trained + analysed)


def _last_metrics(run: Run, stage: str) -> dict[str, Any]:
    return run.metrics(stage)[-1] if run.has(stage) else {}
