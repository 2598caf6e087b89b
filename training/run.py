"""A run directory: stages that are finished or absent, with where everything in them came from."""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from training.config import Config, dump_config
from training.errors import TrainingError
from training.model import model_sha256
from training.stage import Stage, outcome, sync_tree, write_json

__all__ = ["PARENTS", "Run", "Stage", "train_all", "write_json"]

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
            TrainingError: the file is missing or not JSON.
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

        Args:
            name: the stage.
            parent: the stage whose weights it starts from.
            data: names of the data files it reads.
            uses: other stages it reads, as PPO the reward model.
        """
        partial = self.path / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stage = Stage(name, partial, parent)
        try:
            yield stage
        finally:
            stage.metrics.close()
        record = {**self.inputs(name, parent, data, uses), **outcome(stage)}
        write_json(partial / "provenance.json", record)
        sync_tree(partial)
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
            "model": dataclasses.asdict(self.config.model) if parent is None else None,
            "config": dataclasses.asdict(getattr(self.config, stage)),
        }

    def check(self, stage: str) -> None:
        """Check that a finished stage is the one that the config asks for.

        Raises:
            TrainingError: its config, seed, parent or data differ, naming the first that does.
        """
        found = self.provenance(stage)
        parent = found["parent"] and Path(found["parent"]).name
        remedy = f"choose another --out, or remove {stage} and the stages after it."
        for other in filter(None, (parent, *found["uses"])):
            if not self.finished(other):
                raise TrainingError(f"{self.dir(stage)} starts from {other}, now absent: {remedy}")
        data = [name.removesuffix(".jsonl") for name in found["data"]]
        for key, value in self.inputs(stage, parent, data, list(found["uses"])).items():
            if found.get(key) != value:
                difference = _difference(key, found.get(key), value)
                raise TrainingError(f"{self.dir(stage)} has another {difference}: {remedy}")


def train_all(config: Config, out: str | Path, until: str = "dpo") -> Run:
    """Train every stage up to `until` into a run directory, leaving finished ones as they are.

    Raises:
        TrainingError: a finished stage does not fit the config, another process works in the
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
        _write_config(run)
        for name in wanted:
            if not run.finished(name):
                _train(run, name)
        if until == names[-1] and config.ppo.snapshots and config.dpo.snapshots:
            import_module("training.matched").match_by_kl(run)
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


def _write_config(run: Run) -> None:
    partial = run.path / ".config.toml.partial"
    partial.write_text(dump_config(run.config), encoding="utf-8")
    os.replace(partial, run.path / "config.toml")


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


def _difference(key: str, found: Any, asked: Any) -> str:
    if isinstance(found, dict) and isinstance(asked, dict):
        inner = next(k for k in {**found, **asked} if found.get(k) != asked.get(k))
        return _difference(f"{key}.{inner}", found.get(inner), asked.get(inner))
    return f"{key} ({found}, asked for {asked})"
