"""Analyses that run once: a result is kept until what it was computed from changes."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import weightdiff as wd
from analyses.run import Run
from weightdiff.artefact import output_dir, write_json

KEY = "key.json"


def ensure(run: Run, name: str, make: Callable[[Run, Path], None]) -> Path:
    """Return the directory of an analysis's results, computing them when they are not there.

    ``make`` writes into a temporary directory that takes its name ``analysis/<name>`` at the end.
    Results of other checkpoints, prompts or versions of weightdiff are replaced.
    """
    final = run.analysis(name)
    key = fingerprint(run)
    if _key(final) == key:
        return final
    partial = final.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    output_dir(partial)
    wall, cpu = time.perf_counter(), time.process_time()
    make(run, partial)
    cost = {
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }
    write_json(partial / KEY, {"key": key, **cost})
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def cost(directory: Path) -> dict[str, float]:
    """Read what an analysis cost: wall_seconds, cpu_seconds."""
    record = json.loads((directory / KEY).read_text(encoding="utf-8"))
    return {key: record[key] for key in ("wall_seconds", "cpu_seconds")}


def fingerprint(run: Run) -> str:
    """Hash everything that an analysis reads: the policies, the prompts, this package's version."""
    parts = {
        "version": wd.__version__,
        "models": {name: run.provenance(name)["model_sha256"] for name in run.checkpoints},
        "data": run.manifest,
        "matched": run.matched,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _key(directory: Path) -> str | None:
    path = directory / KEY
    return json.loads(path.read_text(encoding="utf-8"))["key"] if path.is_file() else None
