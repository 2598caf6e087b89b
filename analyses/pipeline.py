"""From a config to a report: train, analyse, write."""

import sys
from collections.abc import Callable
from pathlib import Path

from analyses import behaviour, divergence, refusal_track, what_changes
from analyses.report import write_report
from analyses.run import Run
from analyses.step import ensure
from analyses.summary import write_summary
from training.config import Config
from training.run import train_all

ANALYSES: dict[str, Callable[[Run, Path], None]] = {
    "behaviour": behaviour.make,
    "divergence": divergence.make,
    "what_changes": what_changes.make,
    "refusal": refusal_track.make,
}
"""Every analysis of the pipeline, by the name of its directory under ``analysis/``."""


def run_pipeline(config: Config, out: Path) -> Path:
    """Train what is not trained yet, then analyse; return the path of the report."""
    train_all(config, out)
    return analyse(out)


def analyse(path: Path) -> Path:
    """Run every analysis whose result is missing or stale; return the path of the report."""
    run = Run(path)
    for name, make in ANALYSES.items():
        print(f"analysing: {name.replace('_', ' ')}", file=sys.stderr)
        ensure(run, name, make)
    summary = write_summary(run)
    return write_report(run, summary)
