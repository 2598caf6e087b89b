"""A run directory: stages that are finished or absent, with where everything in them came from."""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from training.config import Config, dump_config
from training.errors import TrainingError
from training.model import model_sha256, save_model

PARENTS = {"base": None, "sft": "base", "rm": "sft", "ppo": "sft", "dpo": "sft"}
"""Every stage in the order of training, with the stage whose weights it starts from."""

# By name, because these modules import this one.
TRAINERS = {
    "base": ("training.sft", "train_base"),
    "sft": ("training.sft", "train_sft"),
    "rm": ("training.reward", "train_reward"),
    "ppo": ("training.ppo", "train_ppo"),
    "dpo": ("training.dpo", "train_dpo"),
}


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
        ------
        TrainingError
            A value is NaN or infinite.
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


class Run:
    """A run directory and the config it is made with."""

    def __init__(self, path: str | Path, config: Config) -> None:
        self.path, self.config = Path(path), config

    def dir(self, stage: str) -> Path:
        """Locate a stage's directory."""
        return self.path / stage

    def data(self, name: str) -> Path:
        """Locate a data file by its name without suffix ("pairs_train", "eval/canary_qa")."""
        return self.path / "data" / f"{name}.jsonl"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read a data file."""
        with self.data(name).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def finished(self, stage: str) -> bool:
        """Tell whether a stage has ended: only then does its directory bear its name."""
        return self.dir(stage).is_dir()

    def provenance(self, stage: str) -> dict[str, Any]:
        """Read where a finished stage came from.

        Raises:
        ------
        TrainingError
            The file is missing or not JSON.
        """
        path = self.dir(stage) / "provenance.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingError(
                f"{path} cannot be read ({error}); remove {self.dir(stage)} to train it again."
            ) from error
        return record

    @contextmanager
    def stage(
        self, name: str, parent: str | None, data: Sequence[str], uses: Sequence[str] = ()
    ) -> Iterator[Stage]:
        """Train a stage under a temporary name that becomes its own when the block ends well.

        Parameters
        ----------
        name
            The stage.
        parent
            The stage whose weights it starts from.
        data
            Names of the data files it reads.
        uses
            Other stages it reads, as PPO the reward model.
        """
        partial = self.path / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stage = Stage(name, partial, parent)
        try:
            yield stage
        finally:
            stage.metrics.close()
        record = {**self.inputs(name, parent, data, uses), **_outcome(stage)}
        write_json(partial / "provenance.json", record)
        _sync_tree(partial)
        partial.rename(self.dir(name))

    def inputs(
        self, stage: str, parent: str | None, data: Sequence[str], uses: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Describe what fixes a stage's result: parent, data, seeds and config."""
        manifest = json.loads((self.path / "data" / "manifest.json").read_text(encoding="utf-8"))
        names = [f"{name}.jsonl" for name in data]
        return {
            "stage": stage,
            "parent": f"../{parent}" if parent else None,
            "parent_sha256": model_sha256(self.dir(parent)) if parent else None,
            "uses": {name: model_sha256(self.dir(name)) for name in uses},
            "data": {name: manifest["files"][name]["sha256"] for name in names},
            "seed": self.config.seed,
            "arm_seed": self.config.arm_seed if stage not in ("base", "sft") else None,
            "config": dataclasses.asdict(getattr(self.config, stage)),
        }

    def check(self, stage: str) -> None:
        """Check that a finished stage is the one that the config asks for.

        Raises:
        ------
        TrainingError
            Its config, seed, parent or data differ, naming the first that does.
        """
        found = self.provenance(stage)
        parent = found["parent"] and Path(found["parent"]).name
        data = [name.removesuffix(".jsonl") for name in found["data"]]
        asked = json.loads(json.dumps(self.inputs(stage, parent, data, list(found["uses"]))))
        for key, value in asked.items():
            if found.get(key) != value:
                raise TrainingError(
                    f"{self.dir(stage)} was made with another {_difference(key, found[key], value)}"
                    f"; choose another --out, or remove {stage} and the stages after it."
                )


def train_all(config: Config, out: str | Path, until: str = "dpo") -> Run:
    """Train every stage up to `until` into a run directory, leaving finished ones as they are.

    Raises:
    ------
    TrainingError
        A finished stage does not fit the config, another process works in the
        directory, or Ctrl-C.
    """
    run = Run(out, config)
    torch.set_num_threads(config.threads)
    transformers_logging.disable_progress_bar()
    with _locked(run.path):
        import_module("training.data").prepare(run)
        names = list(PARENTS)
        wanted = names[: names.index(until) + 1]
        for name in wanted:
            if run.finished(name):
                run.check(name)
        (run.path / "config.toml").write_text(dump_config(config), encoding="utf-8")
        for name in wanted:
            if not run.finished(name):
                _train(run, name)
    return run


def _train(run: Run, name: str) -> None:
    module, function = TRAINERS[name]
    try:
        getattr(import_module(module), function)(run)
    except KeyboardInterrupt as error:
        raise TrainingError(
            f"Interrupted in stage {name}; run the same command again to go on from there "
            f"({run.path} keeps the finished stages)."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document; NaN and infinities are refused."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a")
    except OSError as error:
        raise TrainingError(
            f"Cannot write into {path}: {error.strerror}; choose another --out."
        ) from error
    with lock:
        # The kernel drops the lock with the process, however that ends.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"Another process is training in {path}; wait for it or choose another --out."
            ) from error
        yield


def _outcome(stage: Stage) -> dict[str, Any]:
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
        # Linux counts in KiB, macOS in bytes.
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "model_copies_held": stage.model_copies_held,
        "steps": stage.steps,
    }


def _code_commit() -> str | None:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _difference(key: str, found: Any, asked: Any) -> str:
    if isinstance(found, dict) and isinstance(asked, dict):
        inner = next(k for k in {**found, **asked} if found.get(k) != asked.get(k))
        return _difference(f"{key} ({inner})", found.get(inner), asked.get(inner))
    return f"{key}: {found}, asked for {asked}"
