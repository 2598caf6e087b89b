"""Directions that should do nothing: what any direction of this size would have done."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor


def random_directions(
    d_model: int, norm: float, n: int, seed: int = 0
) -> Float64[Tensor, "n d_model"]:
    """Draw ``n`` isotropic directions of length ``norm``."""
    drawn = np.random.default_rng([seed, 1]).standard_normal((n, d_model))
    return _scale(torch.from_numpy(drawn), norm)


def covariance_directions(
    rows: Float[Tensor, "row d_model"], norm: float, n: int, seed: int = 0
) -> Float64[Tensor, "n d_model"]:
    """Draw ``n`` directions from N(0, Σ), Σ the covariance of ``rows``, scaled to ``norm``.

    As a random combination of the centred rows, which needs no d_model² matrix.
    """
    centred = rows.double() - rows.double().mean(0)
    weights = np.random.default_rng([seed, 2]).standard_normal((n, len(rows)))
    return _scale(torch.from_numpy(weights) @ centred, norm)


def permuted_directions(
    rows: Float[Tensor, "row d_model"],
    harmful: Bool[Tensor, " row"] | Sequence[bool],
    norm: float,
    n: int,
    seed: int = 0,
) -> Float64[Tensor, "n d_model"]:
    """Return ``n`` differences in means of permuted labels, scaled to ``norm``."""
    labels = np.asarray(harmful, dtype=bool)
    rng = np.random.default_rng([seed, 3])
    drawn = [torch.from_numpy(rng.permutation(labels)) for _ in range(n)]
    rows = rows.double()
    return _scale(torch.stack([rows[y].mean(0) - rows[~y].mean(0) for y in drawn]), norm)


def _scale(vectors: Float[Tensor, "n d_model"], norm: float) -> Float64[Tensor, "n d_model"]:
    lengths = vectors.norm(dim=1, keepdim=True).clamp(min=1e-300)
    scaled: Tensor = vectors.double() / lengths * norm
    return scaled
