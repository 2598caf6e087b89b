"""Where matrices and heads lie inside the stored tensors.

A stored tensor is cut, along its output or input axis, into segments that each belong to one
matrix and (where the axis runs over heads) one head. The one-pass kernel sums by *cell* = (run of
rows, run of columns), so any such cut costs no second read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weightdiff.checkpoint import Checkpoint
from weightdiff.naming import (
    NO_LAYER,
    Family,
    Role,
    clean,
    family_of,
    is_buffer,
    is_tied,
    role,
    text_config,
)
from weightdiff.stored import Stored

MEASURED = ("F32", "BF16", "F16")
"""Dtypes that can be compared."""

NO_UNIT = -1
Key = tuple[int, str, int]
"""What is compared with what: layer, matrix, expert."""
W_E: Key = (NO_LAYER, "W_E", -1)
W_U: Key = (NO_LAYER, "W_U", -1)


@dataclass(frozen=True)
class Heads:
    """Attention's geometry, from config.json."""

    n_heads: int
    n_kv_heads: int
    d_head: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Heads | None":
        """Read it under any of the names in use; None when the config does not say."""
        config = text_config(config)

        def first(*names: str) -> int:
            return next((v for n in names if isinstance(v := config.get(n), int)), 0)

        n_heads = first("num_attention_heads", "n_head", "n_heads", "num_heads")
        width = first("hidden_size", "n_embd", "d_model")
        if n_heads <= 0 or width <= 0:
            return None
        shared = 1 if config.get("multi_query") is True else n_heads
        n_kv = first("num_key_value_heads", "num_kv_heads") or shared
        d_head = first("head_dim") or width // n_heads
        return cls(n_heads, n_kv, d_head) if n_heads % n_kv == 0 and d_head else None


@dataclass(frozen=True)
class Segment:
    """A run along one axis that belongs to one matrix and one unit."""

    length: int
    matrix: str
    unit: int = NO_UNIT


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of a stored tensor, with the cells they are summed by.

    The elements are seen as rows of ``row_length``; row r and the columns between
    ``col_bounds[j]`` and ``col_bounds[j + 1]`` belong to cell ``row_cell[r] * n_segments + j``,
    whose matrix and unit are ``labels[cell]``.
    """

    role: Role
    expert: int
    tensor: Stored
    shape: tuple[int, ...]
    row_length: int
    row_cell: np.ndarray[Any, np.dtype[np.int64]]
    col_bounds: np.ndarray[Any, np.dtype[np.int64]]
    labels: tuple[Segment, ...]
    tied: bool = False
    """Whether the tensor stands in for another that it is tied to."""

    @property
    def key(self) -> Key:
        """Identify what is compared with what: layer, matrix, expert."""
        return self.role.layer, self.role.matrix, self.expert

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass
class Layout:
    """A checkpoint, understood: its pieces by key, and what was left out."""

    family: str
    heads: Heads | None
    pieces: dict[Key, Piece]
    buffers: list[str] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    names: dict[Key, str] = field(default_factory=dict)
    tied: bool = False


def lay_out(checkpoint: Checkpoint, *, heads: bool = True) -> Layout:
    """Name every tensor of a checkpoint and cut it into matrices and (if asked) heads."""
    model_type, family = family_of(checkpoint.config, checkpoint.tensors)
    geometry = Heads.of(checkpoint.config) if checkpoint.config else None
    made = Layout(model_type, geometry, {})
    for name, tensor in checkpoint.tensors.items():
        cleaned = clean(name)
        if is_buffer(cleaned):
            made.buffers.append(name)
        elif tensor.dtype not in MEASURED:
            made.refused.append({"tensor": name, "reason": f"dtype {tensor.dtype}"})
        else:
            piece = _piece(tensor, role(cleaned, family), family, geometry, heads)
            if piece.key in made.pieces:
                other = made.pieces[piece.key].tensor.name
                made.refused.append({"tensor": name, "reason": f"same matrix as {other}"})
            else:
                made.pieces[piece.key] = piece
    # Without a config, a stored output embedding is taken to be one of its own.
    made.names = {key: clean(piece.tensor.name) for key, piece in made.pieces.items()}
    made.tied = is_tied(checkpoint.config, family) and (
        bool(checkpoint.config) or W_U not in made.pieces
    )
    return made


def _piece(
    tensor: Stored, what: Role, family: Family, geometry: Heads | None, heads: bool
) -> Piece:
    """Cut a tensor along the axis that its matrices and heads run over."""
    rows, cols = (math.prod(tensor.shape[:-1]), tensor.shape[-1]) if tensor.shape else (1, 1)
    into_heads = what.parts[0] in ("W_O",)  # W_O reads heads; W_Q, W_K, W_V write them
    # A bias has only the output axis, which is then the columns.
    along_columns = len(tensor.shape) < 2 or (family.transposed != into_heads)
    length = cols if along_columns else rows
    segments = _segments(what, length, geometry, heads)
    if along_columns:
        bounds = np.cumsum([0, *(s.length for s in segments)], dtype=np.int64)
        if len(segments) == 1:
            # One cell: no need to walk row by row.
            return Piece(
                what, -1, tensor, tensor.shape, max(rows * cols, 1),
                np.zeros(1, np.int64), np.array([0, max(rows * cols, 1)]), tuple(segments),
            )  # fmt: skip
        row_cell = np.zeros(rows, np.int64)
        return Piece(what, -1, tensor, tensor.shape, cols, row_cell, bounds, tuple(segments))
    run = math.gcd(*(s.length for s in segments)) or 1
    row_cell = np.repeat(np.arange(len(segments)), [s.length // run for s in segments])
    row_length = max(run * cols, 1)
    return Piece(
        what, -1, tensor, tensor.shape, row_length, row_cell,
        np.array([0, row_length]), tuple(segments),
    )  # fmt: skip


def _segments(what: Role, length: int, geometry: Heads | None, heads: bool) -> list[Segment]:
    """List the runs of the cut axis, in order; they add up to ``length``."""
    whole = [Segment(length, what.matrix)]
    names = what.parts
    attention = names[0][2:] in ("Q", "K", "V", "O") and names[0][:2] in ("W_", "b_")
    if names[0] == "b_O" or (not attention and len(names) == 1):
        return whole
    if not attention:
        return (
            [Segment(length // len(names), n) for n in names] if _divides(names, length) else whole
        )
    if geometry is None:
        fused_evenly = not what.interleaved and _divides(names, length)
        return [Segment(length // len(names), n) for n in names] if fused_evenly else whole
    order = _head_order(names, geometry, what.interleaved)
    if sum(1 for _ in order) * geometry.d_head != length:
        return whole
    if heads:
        return [Segment(geometry.d_head, name, unit) for name, unit in order]
    return _merge([Segment(geometry.d_head, name) for name, _ in order])


def _divides(names: tuple[str, ...], length: int) -> bool:
    return length % len(names) == 0


def _head_order(
    names: tuple[str, ...], geometry: Heads, interleaved: bool
) -> list[tuple[str, int]]:
    """List (matrix, head) in the order in which they lie along the axis."""
    kv, group = geometry.n_kv_heads, geometry.n_heads // geometry.n_kv_heads
    if interleaved:
        # Per KV group: its query heads, then its key, then its value (all single for plain MHA).
        q, k, v = names
        return [
            item
            for g in range(kv)
            for item in [*((q, g * group + i) for i in range(group)), (k, g), (v, g)]
        ]
    count = {"Q": geometry.n_heads, "O": geometry.n_heads, "K": kv, "V": kv}
    return [(name, unit) for name in names for unit in range(count[name[2:]])]


def _merge(segments: list[Segment]) -> list[Segment]:
    """Join neighbours of the same matrix."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].matrix == segment.matrix:
            segment = Segment(merged.pop().length + segment.length, segment.matrix)
        merged.append(segment)
    return merged
