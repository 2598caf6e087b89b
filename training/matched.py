"""Pick the snapshots at which two arms are compared: at equal sequence KL to the reference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.errors import TrainingError
from training.run import Run, write_json

ARMS = ("ppo", "dpo")
TOLERANCE = 0.1
"""Largest |ΔKL| of a pair, relative to the mean of its two KLs, that counts as equal."""

Entry = dict[str, Any]


def ledgers(directory: Path) -> list[Entry]:
    """Read a stage's ledgers in the order of their steps.

    Raises:
        TrainingError: the stage kept no snapshot.
    """
    found = sorted((directory / "steps").glob("*/ledger.json"))
    if not found:
        raise TrainingError(
            f"{directory} has no steps/*/ledger.json; train it with snapshots above 0."
        )
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def nearest_pair(
    first: Sequence[Entry], second: Sequence[Entry], tolerance: float = TOLERANCE
) -> tuple[Entry, Entry]:
    """Choose the two snapshots whose KLs are taken as equal.

    Among all pairs with |KL₁ − KL₂| ≤ tolerance · (KL₁ + KL₂)/2 the one of the highest mean KL:
    the arms are compared where they have moved furthest, and not near zero, where every pair fits.
    When no pair is that near, the one of the smallest relative difference. Ties go to fewer steps.
    """
    pairs = [(a, b) for a in first for b in second]
    near = [pair for pair in pairs if _relative_miss(*pair) <= tolerance]
    if near:
        return max(near, key=lambda pair: pair[0]["kl"] + pair[1]["kl"])
    return min(pairs, key=lambda pair: _relative_miss(*pair))


def match_by_kl(run: Run, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Match PPO with DPO by sequence KL(π‖π_SFT) and write ``matched.json`` into the run.

    The result names one snapshot of each arm with its ledger, the miss in nats (positive: PPO is
    further), relative to the mean KL, and in standard errors of the difference (which is an upper
    bound where both arms were measured on the same prompts), and whether it is within tolerance.

    Raises:
        TrainingError: an arm has no snapshots.
    """
    a, b = nearest_pair(ledgers(run.dir(ARMS[0])), ledgers(run.dir(ARMS[1])), tolerance)
    error = (a["kl_se"] ** 2 + b["kl_se"] ** 2) ** 0.5
    miss = a["kl"] - b["kl"]
    matched = {
        "by": "kl",
        "tolerance": tolerance,
        "within_tolerance": _relative_miss(a, b) <= tolerance,
        "miss_nats": miss,
        "miss_relative": _relative_miss(a, b),
        "miss_standard_errors": abs(miss) / error if error else 0.0,
        "snapshots": {
            arm: {"path": f"{arm}/steps/{entry['step']:06d}", **entry}
            for arm, entry in zip(ARMS, (a, b), strict=True)
        },
    }
    write_json(run.path / "matched.json", matched)
    return matched


def _relative_miss(a: Entry, b: Entry) -> float:
    """Give |KL_a − KL_b| / mean; two zeros are equal."""
    mean = (abs(a["kl"]) + abs(b["kl"])) / 2
    return abs(a["kl"] - b["kl"]) / mean if mean else 0.0
