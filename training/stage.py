"""One stage while it trains: a partial directory that gets its name when the stage ends well."""

import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.errors import TrainingError
from training.model import model_sha256, save_model


class Stage:
    """One stage while it trains: its partial directory, its metrics and its counters."""

    def __init__(self, name: str, directory: Path, parent: str | None) -> None:
        self.name, self.dir, self.parent = name, directory, parent
        self.tokens_seen = 0
        self.tokens_generated = 0
        self.model_copies_held = 1
        self.steps = 0
        self.started, self.started_cpu = time.perf_counter(), time.process_time()
        self.metrics = (directory / "metrics.jsonl").open("w", encoding="utf-8")

    def progress(self, total: int, desc: str | None = None) -> Any:
        """Show a bar with the time left on stderr (none where stderr is not a terminal)."""
        return tqdm(total=total, desc=desc or self.name, file=sys.stderr, disable=None)

    def log(self, step: int, **values: float) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            TrainingError: a value is NaN or infinite.
        """
        for key, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"Stage {self.name}, step {step}: {key} is {value}. "
                    f"Lower {self.name}.lr or {self.name}.max_grad_norm and run again."
                )
        seconds = round(time.perf_counter() - self.started, 3)
        self.metrics.write(json.dumps({"step": step, "seconds": seconds, **values}) + "\n")

    def snapshot(self, step: int, model: Any, tokenizer: Any, **ledger: Any) -> Path:
        """Keep an intermediate checkpoint with its ledger under steps/."""
        directory = self.dir / "steps" / f"{step:06d}"
        save_model(directory, model, tokenizer, self._card({"step": step}))
        write_json(directory / "ledger.json", {"step": step, **ledger})
        return directory

    def save(self, model: Any, tokenizer: Any, **card: Any) -> None:
        """Write the trained model; `card` holds facts worth a line in its README."""
        save_model(self.dir, model, tokenizer, self._card(card))

    def _card(self, facts: dict[str, Any]) -> str:
        origin = f"Starts from `../{self.parent}`." if self.parent else "Trained from scratch."
        lines = [f"- {name}: {value}" for name, value in facts.items()]
        head = ["---", "library_name: transformers", "tags: [weightdiff]", "---"]
        body = [f"# {self.name}", "", f"{origin} Details: `provenance.json`.", "", *lines]
        return "\n".join([*head, *body]) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document; NaN and infinities are refused."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def outcome(stage: Stage) -> dict[str, Any]:
    """Record what a stage made and what it cost."""
    return {
        "model_sha256": model_sha256(stage.dir),
        "code_commit": _code_commit(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "wall_seconds": round(time.perf_counter() - stage.started, 3),
        "cpu_seconds": round(time.process_time() - stage.started_cpu, 3),
        "tokens_seen": stage.tokens_seen,
        "tokens_generated": stage.tokens_generated,
        # Of the process so far. Linux counts in KiB, macOS in bytes.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "model_copies_held": stage.model_copies_held,
        "steps": stage.steps,
    }


def _code_commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed wheel may lie inside somebody else's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def sync_tree(directory: Path) -> None:
    """Force a directory and what is in it onto the disk."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
