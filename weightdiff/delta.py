"""From sums to metrics: what is kept per row adds up, so any grouping is exact.

With Δ = W_b − W_a, all norms Frobenius. ‖Δ‖², ‖W_a‖², ‖W_b‖², ⟨W_a, Δ⟩ and the counts add over
rows, the largest |Δ| is a maximum, and every other number here is computed from those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Columns = dict[str, Array]
"""A table as equally long arrays by column name."""

SUM_COLUMNS = (
    "sumsq_delta",
    "sumsq_a",
    "sumsq_b",
    "dot_a_delta",
    "max_abs",
    "n_changed_bits",
    "n_changed_1e-5",
    "n_changed_rel_1e-3",
    "nonfinite",
)
"""What the kernel sums, in the order of its columns."""

COUNTS = ("n_changed_bits", "n_changed_1e-5", "n_changed_rel_1e-3", "nonfinite")
ADDITIVE = ("numel", *(name for name in SUM_COLUMNS if name != "max_abs"), "ulp_hist")

ROUNDING_FLOOR = {"F32": 2.5e-8, "BF16": 1.7e-3, "F16": 2.1e-4}
"""‖round(W) − W‖ / ‖W‖ of weights stored in a dtype, measured on Gaussian weights."""


def metrics(columns: Mapping[str, Array], *, total_sq: float, total_numel: int) -> Columns:
    """Compute every metric from the summed columns.

    ``rel`` is 0 where both sides are 0 and inf where only W_a is; ``one_minus_cos`` is 0 where
    Δ = 0 and NaN where exactly one side is 0; shares of nothing are 0.
    """
    dd, aa, bb = columns["sumsq_delta"], columns["sumsq_a"], columns["sumsq_b"]
    numel = columns["numel"]
    share_sq = dd / total_sq if total_sq > 0 else np.zeros_like(dd)
    share_numel = numel / max(total_numel, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "rel": np.where(dd == 0, 0.0, np.sqrt(dd / aa)),
            "rms": np.sqrt(dd / np.maximum(numel, 1)),
            "one_minus_cos": _one_minus_cos(dd, aa, bb, columns["dot_a_delta"]),
            "unchanged_bits": 1 - columns["n_changed_bits"] / np.maximum(numel, 1),
            "unchanged_1e-5": 1 - columns["n_changed_1e-5"] / np.maximum(numel, 1),
            "unchanged_rel_1e-3": 1 - columns["n_changed_rel_1e-3"] / np.maximum(numel, 1),
            "share_sq": share_sq,
            "share_numel": share_numel,
            "enrichment": np.where(numel == 0, 0.0, share_sq / share_numel),
        }


def _one_minus_cos(dd: Array, aa: Array, bb: Array, ad: Array) -> Array:
    """1 − cos(W_a, W_b) without the cancellation of 1 − ⟨a,b⟩ / ‖a‖‖b‖."""
    a, b = np.sqrt(aa), np.sqrt(bb)
    # ‖b‖ − ‖a‖ = (‖b‖² − ‖a‖²) / (‖b‖ + ‖a‖), and ‖b‖² − ‖a‖² = 2⟨a,Δ⟩ + ‖Δ‖²
    longer = (2 * ad + dd) / (a + b)
    # 1 − cos = (‖Δ‖² − (‖b‖ − ‖a‖)²) / (2 ‖a‖ ‖b‖)
    value = (dd - longer**2) / (2 * a * b)
    return np.where(dd == 0, 0.0, np.where((a == 0) | (b == 0), np.nan, np.clip(value, 0, 2)))


def group(columns: Mapping[str, Array], keys: Sequence[str], **totals: Any) -> Columns:
    """Sum the rows that agree on ``keys`` (in the order of their first row) and add the metrics.

    Raises:
        KeyError: If a key is no column.
    """
    index = _first_seen([columns[key] for key in keys], len(columns["numel"]))
    first, inverse = index
    grouped: Columns = {key: columns[key][first] for key in keys}
    for name in ADDITIVE:
        summed = np.zeros((len(first), *columns[name].shape[1:]), columns[name].dtype)
        np.add.at(summed, inverse, columns[name])
        grouped[name] = summed
    grouped["max_abs"] = np.zeros(len(first))
    np.maximum.at(grouped["max_abs"], inverse, columns["max_abs"])
    return grouped | metrics(grouped, **totals)


def _first_seen(keys: Sequence[Array], rows: int) -> tuple[Array, Array]:
    """Number the distinct key tuples by first appearance; return their rows and every number."""
    seen: dict[tuple[Any, ...], int] = {}
    first: list[int] = []
    inverse = np.zeros(rows, np.int64)
    for row, key in enumerate(zip(*(k.tolist() for k in keys), strict=True) if keys else ()):
        if key not in seen:
            seen[key] = len(first)
            first.append(row)
        inverse[row] = seen[key]
    if not keys and rows:
        first = [0]
    return np.array(first, np.int64), inverse


def rounding_floor(dtype_a: str, dtype_b: str) -> float:
    """Return the rel that storing in the coarser of two dtypes makes by itself; 0 if they agree."""
    return 0.0 if dtype_a == dtype_b else max(ROUNDING_FLOOR[dtype_a], ROUNDING_FLOOR[dtype_b])


def totals(columns: Mapping[str, Array]) -> dict[str, Any]:
    """Return Σ‖Δ‖² and the number of distinct parameters, what shares are of."""
    return {
        "total_sq": float(columns["sumsq_delta"].sum()),
        "total_numel": int(columns["numel"].sum()),
    }
