"""Scoring every (pos, layer) candidate on validation prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from weightdiff.intervene import (
    Addition,
    AffineAblation,
    Intervention,
    ZeroAblation,
    intervened,
    last_logits,
)
from weightdiff.model import Model
from weightdiff.prompts import batches
from weightdiff.score import kl_divergence, refusal_log_odds

ROWS_PER_PASS = 512
"""Candidates share a forward pass: (candidates × prompts) rows at once."""


def score_candidates(
    model: Model,
    mean_diff: Float64[Tensor, "pos layer d_model"],
    positions: Sequence[int],
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    refusal_tokens: Sequence[int],
    means: Mapping[str, Float64[Tensor, "place d_model"]],
    eps_compat: bool = False,
) -> pd.DataFrame:
    """Score every candidate on validation prompts, given as token ids.

    Returns:
        One row per (pos, layer): ``norm`` of the mean difference; ``ablation``, the mean refusal
        log-odds of harmful prompts under zero-ablation; ``addition``, that of harmless prompts with
        the raw mean difference added at its layer to all positions, and ``addition_last`` to the
        last alone; ``kl``, KL(base ‖ ablated) on harmless prompts in nats; ``affine`` and
        ``affine_kl``, the same with affine ablation. Arditi et al. 2024, section 2.3.
    """
    n_layers = mean_diff.shape[1]
    cells = [(i, layer) for i in range(len(positions)) for layer in range(n_layers)]
    vectors = torch.stack([mean_diff[i, layer] for i, layer in cells]).float().to(model.device)
    norms = vectors.norm(dim=1)
    units = vectors / norms.clamp(min=1e-30)[:, None]
    base = last_logits(model, harmless)

    def odds(logits: Float[Tensor, "row d_vocab"], index: list[int]) -> Float64[Tensor, " row"]:
        return refusal_log_odds(logits, refusal_tokens, eps_compat)

    def kl(logits: Float[Tensor, "row d_vocab"], index: list[int]) -> Float64[Tensor, " row"]:
        return kl_divergence(base[index].to(logits.device), logits, eps_compat)

    def zero(unit: Tensor) -> Intervention:
        return ZeroAblation(unit)

    def affine(unit: Tensor) -> Intervention:
        return AffineAblation(unit, means)

    table = pd.DataFrame(
        {
            "pos": [positions[i] for i, _ in cells],
            "layer": [layer for _, layer in cells],
            "norm": norms.tolist(),
            "ablation": _mean_scores(model, harmful, units, zero, odds),
            "addition": math.nan,
            "addition_last": math.nan,
            "kl": _mean_scores(model, harmless, units, zero, kl),
            "affine": _mean_scores(model, harmful, units, affine, odds),
            "affine_kl": _mean_scores(model, harmless, units, affine, kl),
        }
    )
    for layer in range(n_layers):
        at_layer = table.index[table["layer"] == layer]
        for column, where in (("addition", "all"), ("addition_last", "last")):

            def add(vector: Tensor, layer: int = layer, where: Any = where) -> Intervention:
                return Addition(vector, layer, positions=where)

            scores = _mean_scores(model, harmless, vectors[list(at_layer)], add, odds)
            table.loc[at_layer, column] = scores
    return table


def _mean_scores(
    model: Model,
    rows: Sequence[Sequence[int]],
    vectors: Float[Tensor, "candidate d_model"],
    intervention: Callable[[Tensor], Intervention],
    score: Callable[[Tensor, list[int]], Tensor],
) -> list[float]:
    """Average ``score`` over the prompts under each vector's intervention."""
    totals = torch.zeros(len(vectors), dtype=torch.float64)
    for batch in batches(rows, model.pad_id, ROWS_PER_PASS):
        n = len(batch.index)
        for start in range(0, len(vectors), max(1, ROWS_PER_PASS // n)):
            chunk = vectors[start : start + max(1, ROWS_PER_PASS // n)]
            ids = batch.ids.repeat(len(chunk), 1).to(model.device)
            mask = batch.mask.repeat(len(chunk), 1).to(model.device)
            with intervened(model, [intervention(chunk.repeat_interleave(n, 0))]) as places:
                places.at_prompt(model.chat.places(mask))
                logits = model.forward(ids, mask).logits[:, -1]
            scores = score(logits, batch.index * len(chunk))
            totals[start : start + len(chunk)] += scores.view(len(chunk), n).sum(1).cpu()
    return (totals / len(rows)).tolist()
