"""Which pieces of two checkpoints are compared with each other, and which have no partner."""

from dataclasses import dataclass, replace
from typing import Any

from weightdiff.layout import W_E, W_U, Key, Layout, Piece
from weightdiff.naming import FAMILIES, NO_LAYER, Role, position

_RESIZABLE = ("W_E", "W_U", "W_pos")


@dataclass(frozen=True)
class Pair:
    """Two pieces that hold the same matrix, and how many leading elements they share."""

    a: Piece
    b: Piece
    numel: int
    note: str = ""

    @property
    def role(self) -> Role:
        """Say what is compared."""
        return self.a.role

    @property
    def grid(self) -> Piece:
        """Return the side that knows more of where the heads lie."""
        return self.b if len(self.b.labels) > len(self.a.labels) else self.a


@dataclass
class Alignment:
    """What is compared with what, and what could not be."""

    pairs: list[Pair]
    added: list[str]
    removed: list[str]
    reshaped: list[dict[str, Any]]
    ties: list[str]


def align(a: Layout, b: Layout) -> Alignment:
    """Pair the pieces of two checkpoints by what they are, not by what they are called."""
    pieces_a, pieces_b = dict(a.pieces), dict(b.pieces)
    if FAMILIES[a.family] is not FAMILIES[b.family]:
        # Two architectures: a role is no evidence that two tensors hold the same thing.
        pieces_a, pieces_b = _by_name(a), _by_name(b)
    made = Alignment([], [], [], [], _tie(a, b, pieces_a, pieces_b))
    for key, piece in pieces_a.items():
        if key not in pieces_b:
            made.removed.append(piece.tensor.name)
            continue
        pair = _pair(piece, pieces_b[key])
        if pair is None:
            made.reshaped.append(
                {"tensor": piece.tensor.name, "a": piece.shape, "b": pieces_b[key].shape}
            )
        else:
            made.pairs.append(pair)
    made.added = [piece.tensor.name for key, piece in pieces_b.items() if key not in pieces_a]
    made.pairs.sort(key=lambda pair: position(pair.role))
    return made


def _by_name(layout: Layout) -> dict[Key, Piece]:
    return {(key[0], layout.names[key], -1): piece for key, piece in layout.pieces.items()}


def _tie(a: Layout, b: Layout, pieces_a: dict[Key, Piece], pieces_b: dict[Key, Piece]) -> list[str]:
    """Count an output embedding once when both sides tie it; stand in W_E where one side does."""
    if a.tied and b.tied:
        pieces_a.pop(W_U, None)
        pieces_b.pop(W_U, None)
        return ["W_U is tied to W_E in both: counted once, as W_E"]
    for layout, mine, theirs, side in ((a, pieces_a, pieces_b, "A"), (b, pieces_b, pieces_a, "B")):
        if layout.tied and W_E in mine and W_U in theirs:
            stand_in = replace(mine[W_E], role=Role(NO_LAYER, "unembed", "W_U"), tied=True)
            mine[W_U] = replace(stand_in, labels=(replace(stand_in.labels[0], matrix="W_U"),))
            return [f"W_U is tied to W_E in {side} only: its W_E is compared with the other's W_U"]
    return []


def _pair(a: Piece, b: Piece) -> Pair | None:
    """Pair two pieces of one shape; of a vocabulary that was resized, the common rows."""
    if a.shape == b.shape:
        return Pair(a, b, a.numel)
    resizable = a.role.matrix in _RESIZABLE and len(a.shape) == len(b.shape) == 2
    if not resizable or a.shape[1] != b.shape[1]:
        return None
    rows = min(a.shape[0], b.shape[0])
    note = f"{a.role.matrix} has {a.shape[0]} rows in A, {b.shape[0]} in B: first {rows} compared"
    return Pair(a, b, rows * a.shape[1], note)
