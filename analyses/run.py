"""A trained run directory, as the analyses read it."""

import json
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any

from weightdiff.errors import WeightdiffError

CHECKPOINTS = ("base", "sft", "ppo", "dpo")
"""The policies, in the order in which they are trained."""


class Run:
    """Finds a run's checkpoints, prompts and measurements; reads, never writes, training's files.

    Raises:
        WeightdiffError: ``path`` is no run directory, or no policy in it is finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.toml").is_file():
            raise WeightdiffError(
                f"{self.path} is not a run directory (no config.toml in it); "
                "make one with: weightdiff pipeline"
            )
        if not self.checkpoints:
            raise WeightdiffError(
                f"{self.path} holds no finished checkpoint; go on with: "
                f"weightdiff train --out {self.path}"
            )

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config, as nested dictionaries."""
        return tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8"))

    @property
    def checkpoints(self) -> list[str]:
        """Names of the policies that are finished."""
        return [name for name in CHECKPOINTS if self.has(name)]

    def has(self, stage: str) -> bool:
        """Tell whether a stage is finished."""
        return (self.path / stage / "provenance.json").is_file()

    def dir(self, stage: str) -> Path:
        """Locate a finished stage."""
        return self.path / stage

    def provenance(self, stage: str) -> dict[str, Any]:
        """Read where a stage came from and what it cost."""
        return self._json(self.path / stage / "provenance.json")

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """Read a stage's metrics, one dictionary a logged step."""
        return _jsonl(self.path / stage / "metrics.jsonl")

    def ledgers(self, stage: str) -> list[dict[str, Any]]:
        """Read the ledgers of a stage's snapshots, in the order of steps."""
        return [
            self._json(path) for path in sorted((self.path / stage).glob("steps/*/ledger.json"))
        ]

    @cached_property
    def matched(self) -> dict[str, Any]:
        """The pair of snapshots of PPO and DPO at nearest KL, or nothing when one is missing."""
        path = self.path / "matched.json"
        return self._json(path) if path.is_file() else {}

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The data files with their hashes."""
        return self._json(self.path / "data" / "manifest.json")

    @cached_property
    def cells(self) -> list[str]:
        """Names of the evaluation cells."""
        return sorted(path.stem for path in (self.path / "data" / "eval").glob("*.jsonl"))

    def cell(self, name: str) -> list[dict[str, Any]]:
        """Read the prompts of one evaluation cell."""
        return self.rows(f"eval/{name}")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Read one data file by its name below data/, without suffix."""
        return _jsonl(self.path / "data" / f"{name}.jsonl")

    def analysis(self, name: str) -> Path:
        """Locate the results of an analysis."""
        return self.path / "analysis" / name

    @property
    def lexicon(self) -> Path:
        """The phrases by which answers of this run's world are judged."""
        return self.path / "data" / "lexicon.json"

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightdiffError(f"{path} cannot be read: {error}") from error
        return value


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise WeightdiffError(f"{path} cannot be read: {error}") from error
