"""Tidy rows out of cell sums: one per matrix of a layer, one per head."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from weightdiff import delta, kernels
from weightdiff.align import Pair
from weightdiff.delta import Array, Columns
from weightdiff.layout import NO_UNIT, Heads
from weightdiff.stream import CellSums

_TEXT = ("component", "matrix", "unit_kind", "tensor_a", "tensor_b", "shape", "dtype_a", "dtype_b")


def tensor_rows(pairs: Sequence[Pair], sums: Sequence[CellSums]) -> Columns:
    """Return one row per (layer, matrix); a fused tensor gives one row per matrix in it."""
    rows = _Rows(lambda pair, cell: (pair.role.layer, pair.grid.labels[cell].matrix))
    for pair, cells in zip(pairs, sums, strict=True):
        rows.add(pair, cells, range(len(pair.grid.labels)))
    columns = rows.columns()
    return _finish(columns, delta.totals(columns), rows)


def unit_rows(
    pairs: Sequence[Pair], sums: Sequence[CellSums], heads: Heads | None, tensors: Columns
) -> Columns:
    """Return one row per (layer, matrix, head); shares are of the whole model's totals."""
    rows = _Rows(
        lambda pair, cell: (
            pair.role.layer,
            pair.grid.labels[cell].matrix,
            pair.grid.labels[cell].unit,
        )
    )
    for pair, cells in zip(pairs, sums, strict=True):
        labels = pair.grid.labels
        rows.add(pair, cells, [c for c in range(len(labels)) if labels[c].unit != NO_UNIT])
    columns = rows.columns()
    units = np.array([key[2] for key in rows.keys], np.int64)
    shared = heads is not None and heads.n_kv_heads < heads.n_heads
    kinds = ["kv_head" if shared and m[2:] in ("K", "V") else "head" for m in columns["matrix"]]
    lead = {"layer": columns.pop("layer"), "component": columns.pop("component")}
    lead["matrix"] = columns.pop("matrix")
    lead |= {"unit_kind": np.array(kinds, object), "unit": units}
    return _finish(lead | columns, delta.totals(tensors), rows)


class _Rows:
    """Collect the cells that belong to one row, in the order of their first appearance."""

    def __init__(self, key: Callable[[Pair, int], tuple[Any, ...]]) -> None:
        self._key = key
        self.keys: dict[tuple[Any, ...], list[tuple[Pair, CellSums, list[int]]]] = {}

    def add(self, pair: Pair, cells: CellSums, chosen: Sequence[int]) -> None:
        """Assign the ``chosen`` cells of a pair to their rows."""
        for cell in chosen:
            parts = self.keys.setdefault(self._key(pair, cell), [])
            if not parts or parts[-1][0] is not pair:
                parts.append((pair, cells, []))
            parts[-1][2].append(cell)

    def columns(self) -> Columns:
        """Sum every row's cells and describe where they came from."""
        sums = np.zeros((len(self.keys), kernels.N_SUMS))
        hist = np.zeros((len(self.keys), kernels.ULP_BINS), np.int64)
        for row, parts in enumerate(self.keys.values()):
            for _, cells, chosen in parts:
                largest = max(sums[row, kernels.MAX_ABS], cells.sums[chosen, kernels.MAX_ABS].max())
                sums[row] += cells.sums[chosen].sum(0)
                sums[row, kernels.MAX_ABS] = largest
                hist[row] += cells.hist[chosen].sum(0)
        made: Columns = {"layer": np.array([key[0] for key in self.keys], np.int64)}
        described = [self._describe(key[1], parts) for key, parts in self.keys.items()]
        for name in ("component", "matrix", "tensor_a", "tensor_b", "shape", "dtype_a", "dtype_b"):
            made[name] = np.array([d[name] for d in described], object)
        # Every element falls into one bin of the histogram, so its total is the element count.
        made["numel"] = hist.sum(1)
        for column, name in enumerate(delta.SUM_COLUMNS):
            counted = name in delta.COUNTS
            made[name] = sums[:, column].astype(np.int64) if counted else sums[:, column]
        made["ulp_hist"] = hist
        return made

    def flags(self) -> list[set[str]]:
        """Return what is special about each row's tensors."""
        made = []
        for parts in self.keys.values():
            flags = {"resized" for pair, _, _ in parts if pair.note}
            flags |= {"tied" for pair, _, _ in parts if pair.a.tied or pair.b.tied}
            made.append(flags)
        return made

    def _describe(self, matrix: str, parts: list[tuple[Pair, CellSums, list[int]]]) -> Any:
        pair, _, chosen = parts[0]
        a, b = pair.a.tensor, pair.b.tensor
        return {
            "component": pair.role.component,
            "matrix": matrix,
            "tensor_a": a.name,
            "tensor_b": b.name,
            "shape": "×".join(map(str, _shape(pair, chosen))) or "scalar",
            "dtype_a": a.dtype,
            "dtype_b": b.dtype,
        }


def _shape(pair: Pair, chosen: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the part of a tensor that some of its cells make up."""
    grid, shape = pair.grid, pair.a.shape
    if len(chosen) == len(grid.labels):
        return shape if pair.numel == pair.a.numel else (pair.numel // shape[1], shape[1])
    length = sum(grid.labels[cell].length for cell in chosen)
    return (*shape[:-1], length) if len(grid.col_bounds) > 2 else (length, *shape[1:])


def _finish(columns: Columns, totals: dict[str, Any], rows: _Rows) -> Columns:
    """Add metrics, rounding floor and flags, in the order of the schema."""
    columns = columns | delta.metrics(columns, **totals)
    floor: Array = np.array(
        [
            delta.rounding_floor(a, b)
            for a, b in zip(columns["dtype_a"], columns["dtype_b"], strict=True)
        ],
        np.float64,
    )
    columns["rounding_floor"] = floor
    flags = rows.flags()
    for row, flag in enumerate(flags):
        if columns["nonfinite"][row]:
            flag.add("nonfinite")
        if 0 < columns["rel"][row] <= 2 * floor[row]:
            flag.add("within-rounding")
    columns["flags"] = np.array([",".join(sorted(flag)) for flag in flags], object)
    return columns
