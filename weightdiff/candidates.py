"""Scoring every (pos, layer) candidate on validation prompts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    decode,
    intervened,
    last_logits,
)
from weightdiff.judge import Lexicon, judge
from weightdiff.model import Model
from weightdiff.prompts import Batch, batches
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
    for batch, chunk in _crossed(model, rows, len(vectors)):
        with intervened(model, [intervention(vectors[chunk.repeats])]) as places:
            places.at_prompt(model.chat.places(batch.mask))
            logits = model.forward(batch.ids, batch.mask).logits[:, -1]
        scores = score(logits, batch.index).view(len(chunk.indices), -1).sum(1)
        totals[chunk.indices] += scores.cpu()
    return (totals / len(rows)).tolist()


@dataclass(frozen=True)
class _Chunk:
    """Some of the candidates, and which of them each row of a batch belongs to."""

    indices: list[int]
    repeats: list[int]


def _crossed(
    model: Model, rows: Sequence[Sequence[int]], n_candidates: int
) -> Iterator[tuple[Batch, _Chunk]]:
    """Yield batches that hold every prompt once for each of some candidates."""
    for batch in batches(rows, model.pad_id, ROWS_PER_PASS):
        n = len(batch.index)
        size = max(1, ROWS_PER_PASS // n)
        for start in range(0, n_candidates, size):
            indices = list(range(start, min(start + size, n_candidates)))
            ids = batch.ids.repeat(len(indices), 1).to(model.device)
            mask = batch.mask.repeat(len(indices), 1).to(model.device)
            repeats = [index for index in indices for _ in range(n)]
            yield Batch(batch.index * len(indices), ids, mask), _Chunk(indices, repeats)


def judge_candidates(
    model: Model,
    mean_diff: Float64[Tensor, "pos layer d_model"],
    harmful: Sequence[Sequence[int]],
    harmless: Sequence[Sequence[int]],
    means: Mapping[str, Float64[Tensor, "place d_model"]],
    lexicon: Lexicon,
    max_new_tokens: int,
) -> pd.DataFrame:
    """Judge whole answers under affine ablation and addition of each candidate.

    First-token scores miss a model that is made to begin with "sure" and refuses all the same.

    Returns:
        One row per (pos, layer), rates in [0, 1]: ``affine_refusal`` and ``affine_compliance`` of
        harmful prompts, ``affine_harmless``, the compliance of harmless ones, and
        ``addition_refusal`` of harmless ones with the raw mean difference added at the last token.
    """
    n_pos, n_layers, _ = mean_diff.shape
    vectors = mean_diff.flatten(0, 1).float().to(model.device)
    units = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)

    def affine(unit: Tensor) -> Intervention:
        return AffineAblation(unit, means)

    ablated = [
        _verdict_rates(model, rows, units, affine, lexicon, max_new_tokens)
        for rows in (harmful, harmless)
    ]
    table = pd.DataFrame(
        {
            "affine_refusal": ablated[0][:, 0].tolist(),
            "affine_compliance": ablated[0][:, 1].tolist(),
            "affine_harmless": ablated[1][:, 1].tolist(),
            "addition_refusal": math.nan,
        }
    )
    for layer in range(n_layers):
        at_layer = [pos * n_layers + layer for pos in range(n_pos)]

        def add(vector: Tensor, layer: int = layer) -> Intervention:
            return Addition(vector, layer, positions="last")

        rates = _verdict_rates(model, harmless, vectors[at_layer], add, lexicon, max_new_tokens)
        table.loc[at_layer, "addition_refusal"] = rates[:, 0].tolist()
    return table


def _verdict_rates(
    model: Model,
    rows: Sequence[Sequence[int]],
    vectors: Float[Tensor, "candidate d_model"],
    intervention: Callable[[Tensor], Intervention],
    lexicon: Lexicon,
    max_new_tokens: int,
) -> Float64[Tensor, "candidate verdict"]:
    """Return the rates of refusal and compliance under each vector's intervention."""
    counts = torch.zeros(len(vectors), 2, dtype=torch.float64)
    for batch, chunk in _crossed(model, rows, len(vectors)):
        with intervened(model, [intervention(vectors[chunk.repeats])]) as places:
            answers = decode(model, batch.ids, batch.mask, places, max_new_tokens)
        for index, answer in zip(chunk.repeats, answers, strict=True):
            verdict = judge(model.tokenizer.decode(answer, skip_special_tokens=True), lexicon)
            counts[index] += torch.tensor([verdict.refusal, verdict.compliance])
    return counts / len(rows)
