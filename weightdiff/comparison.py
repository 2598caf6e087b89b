"""The result of a comparison: two tidy tables, their sums in any grouping, figures and files."""

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightdiff import delta
from weightdiff.delta import Columns
from weightdiff.errors import WeightdiffError
from weightdiff.naming import COMPONENTS

if TYPE_CHECKING:
    import pandas as pd

    from weightdiff.plots.delta import ComparisonPlots

SCHEMA_VERSION = 1
_SUMMARY = (
    "component",
    "numel",
    "rel",
    "rms",
    "max_abs",
    "one_minus_cos",
    "share_sq",
    "share_numel",
    "enrichment",
    "unchanged_bits",
    "unchanged_1e-5",
    "unchanged_rel_1e-3",
)


class Comparison:
    """What changed from checkpoint A to checkpoint B.

    ``tensors`` has one row per matrix of a layer, ``units`` one per attention head; ``by`` sums
    them up in any other way. Made by :func:`compare` or :func:`load_comparison`.
    """

    def __init__(self, tensors: Columns, units: Columns, meta: dict[str, Any]) -> None:
        self._tensors, self._units, self.meta = tensors, units, meta

    @cached_property
    def tensors(self) -> "pd.DataFrame":
        """One row per (layer, component, matrix); layer −1 lies outside the blocks."""
        return _frame(self._tensors)

    @cached_property
    def units(self) -> "pd.DataFrame":
        """One row per (layer, matrix, head); shares are of the whole model."""
        return _frame(self._units)

    def columns(self, *keys: str, units: bool = False) -> Columns:
        """Sum the rows that agree on ``keys``, as plain arrays; without keys, everything."""
        table = self._units if units else self._tensors
        unknown = [key for key in keys if key not in table]
        if unknown:
            raise WeightdiffError(
                f"no column {unknown[0]!r} to group by; there are {', '.join(table)}"
            )
        return delta.group(table, keys, **delta.totals(self._tensors))

    def by(self, *keys: str, units: bool = False) -> "pd.DataFrame":
        """Re-aggregate exactly, e.g. ``by("layer", "component")``; metrics from summed sums."""
        return _frame(self.columns(*keys, units=units))

    def summary(self) -> "pd.DataFrame":
        """Return one row per component, in the order of the forward pass."""
        return _frame(self.summary_columns())

    def summary_columns(self) -> Columns:
        """Return :meth:`summary` as plain arrays."""
        table = self.columns("component")
        order = np.argsort([COMPONENTS.index(name) for name in table["component"]], kind="stable")
        return {name: table[name][order] for name in _SUMMARY}

    @property
    def total(self) -> dict[str, float | int]:
        """Return every metric of the whole model."""
        return {k: v[0].item() for k, v in self.columns().items() if v.ndim == 1}

    @property
    def plot(self) -> "ComparisonPlots":
        """Give the figures: ``plot.heatmap(metric)``, ``plot.components()``, ``plot.heads()``."""
        from weightdiff.plots.delta import ComparisonPlots

        return ComparisonPlots(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, with ``schema_version``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "total": self.total,
            "components": _records(self.summary_columns()),
            "tensors": _records(self._tensors),
            "units": _records(self._units),
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as strict JSON; NaN and infinities are null."""
        from weightdiff.artefact import dump_json

        return dump_json(self.to_dict())

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write tensors.parquet, units.parquet, meta.json and compare.html, each whole or not."""
        from weightdiff.artefact import atomic_path, output_dir, write_json
        from weightdiff.plots.delta import page

        out = output_dir(directory)
        for name, frame in (("tensors", self.tensors), ("units", self.units)):
            with atomic_path(out / f"{name}.parquet") as partial:
                frame.to_parquet(partial, index=False)
        write_json(out / "meta.json", self.meta)
        page(self).write(out / "compare.html")
        return out

    def __repr__(self) -> str:
        a, b, total = self.meta["a"]["path"], self.meta["b"]["path"], self.total
        return (
            f"Comparison({a} → {b}: {len(self._tensors['numel'])} matrices, "
            f"{total['numel']:,} parameters, rel {total['rel']:.3g})"
        )

    def _repr_html_(self) -> str:
        from weightdiff.plots.delta import notebook_html

        return notebook_html(self)


def load_comparison(directory: str | os.PathLike[str]) -> Comparison:
    """Read back what :meth:`Comparison.save` wrote.

    Raises:
        WeightdiffError: If a file is missing or was written by another version.
    """
    import pandas as pd

    path = Path(directory)
    missing = [
        name
        for name in ("tensors.parquet", "units.parquet", "meta.json")
        if not (path / name).is_file()
    ]
    if missing:
        raise WeightdiffError(
            f"{path} lacks {missing[0]}; write it with `weightdiff compare --out` or .save()"
        )
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise WeightdiffError(
            f"{path}/meta.json has schema version {meta.get('schema_version')}, "
            f"expected {SCHEMA_VERSION}; compare the checkpoints again"
        )
    tables = [_columns(pd.read_parquet(path / f"{name}.parquet")) for name in ("tensors", "units")]
    return Comparison(tables[0], tables[1], meta)


def _frame(columns: Mapping[str, Any]) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({k: v if v.ndim == 1 else list(v) for k, v in columns.items()})


def _columns(frame: "pd.DataFrame") -> Columns:
    made = {name: frame[name].to_numpy() for name in frame.columns}
    width = len(made["ulp_hist"][0]) if len(frame) else 0
    made["ulp_hist"] = np.array(made["ulp_hist"].tolist(), np.int64).reshape(len(frame), width)
    return made


def _records(columns: Columns) -> list[dict[str, Any]]:
    lists = {name: values.tolist() for name, values in columns.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
