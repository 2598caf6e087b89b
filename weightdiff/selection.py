"""Choosing a direction from a table of candidates' scores alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

Rule = Literal["arditi", "affine"]

_PEER_NAMES = {
    "position": "pos",
    "refusal_score": "ablation",
    "steering_score": "addition",
    "kl_div_score": "kl",
}
_COLUMNS: dict[Rule, tuple[str, str]] = {
    "arditi": ("ablation", "kl"),
    "affine": ("affine", "affine_kl"),
}

_ANSWERS = ("affine_compliance", "affine_harmless", "addition_refusal")


@dataclass(frozen=True)
class Selection:
    """A ranking of every candidate, with the reason why each discarded one was."""

    rule: Rule
    candidates: pd.DataFrame
    """The scores, ``discarded`` (empty for a candidate that passes every gate), best first."""

    @property
    def kept(self) -> pd.DataFrame:
        """Candidates that pass every gate, best first."""
        return self.candidates[self.candidates["discarded"] == ""]

    @property
    def passed(self) -> bool:
        """Whether any candidate passes every gate."""
        return len(self.kept) > 0

    @property
    def pick(self) -> tuple[int, int] | None:
        """The (pos, layer) of the best candidate that passes every gate, else None."""
        return self.best if self.passed else None

    @property
    def best(self) -> tuple[int, int]:
        """The (pos, layer) that ranks first, even if no candidate passes every gate."""
        first = self.candidates.iloc[0]
        return int(first["pos"]), int(first["layer"])

    def _repr_html_(self) -> str:
        html: str = self.candidates.to_html(float_format="{:.3g}".format, index=False)
        return html


def select_direction(
    candidates: pd.DataFrame | Iterable[Mapping[str, Any]],
    n_layers: int,
    rule: Rule = "arditi",
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
    prune: float = 0.2,
) -> Selection:
    """Rank candidates by how far ablation lowers refusal, after the gates of Arditi et al. 2024.

    Discarded are scores that are not numbers, a norm of zero, KL above ``kl_threshold``, addition
    below ``induce_threshold``, and with ``rule="arditi"`` layers from int((1 − prune)·n_layers) on.
    ``rule="affine"`` uses the scores of affine ablation, which does not need the last gate. The
    lowest score is best; discarded candidates follow, those failing the fewest gates first.

    Where whole answers were judged, ``rule="affine"`` goes by them before it goes by the score: by
    the mean of ``affine_compliance``, ``affine_harmless`` and ``addition_refusal``, in steps of
    a tenth. A direction that changes the first token alone ("sure, but I will not help") has the
    lowest score of all and mediates nothing; it is discarded when most answers do not comply.

    Args:
        candidates: One row each with ``pos, layer, ablation, addition, kl`` (or the names in the
            authors' ``direction_evaluations.json``), for the affine rule ``affine, affine_kl``,
            and optionally ``norm``.
        n_layers: Number of layers of the model.
        rule: ``arditi`` or ``affine``.
        kl_threshold: In nats.
        induce_threshold: In log-odds of refusal on harmless prompts.
        prune: Share of the last layers that is left out.

    Raises:
        ValueError: If a column is missing or there is no candidate.
    """
    table = pd.DataFrame(candidates).rename(columns=_PEER_NAMES)
    score, kl = _COLUMNS[rule]
    missing = {"pos", "layer", "addition", score, kl} - set(table.columns)
    if missing or table.empty:
        raise ValueError(f"candidates lack {', '.join(sorted(missing)) or 'rows'}")
    first_pruned = int(n_layers * (1 - prune)) if rule == "arditi" else n_layers
    reasons = [
        _reasons(row, rule, first_pruned, kl_threshold, induce_threshold)
        for row in table.to_dict("records")
    ]
    table["discarded"] = ["; ".join(each) for each in reasons]
    # A candidate that is not a number at all comes last, whatever the other gates say.
    keys = (table[score].fillna(np.inf), -_works(table, rule), [_badness(r) for r in reasons])
    order = np.lexsort(keys)
    return Selection(rule, table.iloc[order].reset_index(drop=True))


def _works(table: pd.DataFrame, rule: Rule) -> pd.Series:
    """Return to which tenth a candidate does everything that a refusal direction should do."""
    judged = [c for c in _ANSWERS if c in table] if rule == "affine" else []
    return table[judged].mean(axis=1).round(1) if judged else pd.Series(0.0, table.index)


def _badness(reasons: list[str]) -> int:
    """Count the failed gates; one that leaves no working direction outweighs all the others."""
    void = any(reason in ("not a number", "zero norm") for reason in reasons)
    return len(reasons) + 20 * void + 10 * any("answers" in reason for reason in reasons)


def _reasons(
    row: Mapping[str, Any],
    rule: Rule,
    first_pruned: int,
    kl_threshold: float,
    induce_threshold: float,
) -> list[str]:
    """Name every gate that a candidate fails."""
    score, kl = _COLUMNS[rule]
    reasons = []
    if any(np.isnan(row[column]) for column in (score, "addition", kl)):
        reasons.append("not a number")
    if row.get("norm") == 0:
        reasons.append("zero norm")
    if row["layer"] >= first_pruned:
        reasons.append(f"layer {row['layer']:.0f} is one of the last")
    if row[kl] > kl_threshold:
        reasons.append(f"KL {row[kl]:.3g} > {kl_threshold:g}")
    if rule == "affine" and row.get("affine_compliance", 1.0) < 0.5:
        reasons.append(f"only {row['affine_compliance']:.0%} of the answers comply")
    if row["addition"] < induce_threshold:
        reasons.append(f"addition {row['addition']:.3g} < {induce_threshold:g}")
    return reasons
