"""Activations of the residual stream: streamed means in fp64, and stored rows where needed."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from weightdiff.errors import WeightdiffError
from weightdiff.model import Model
from weightdiff.prompts import Batch, batches, pad_left

BATCH_SIZE = 256


def mean_activations(
    model: Model,
    rows: Sequence[Sequence[int]],
    positions: Sequence[int],
    layers: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Float64[Tensor, "pos layer d_model"]:
    """Average ``resid_pre`` over prompts at negative ``positions`` and at ``layers`` (all if None).

    Sums are fp64; the model runs no further than the deepest layer asked for.

    Raises:
        WeightdiffError: If there is no prompt, one is too short for a position, or an activation is
            not finite.
    """
    layers = list(range(model.n_layers)) if layers is None else list(layers)
    total = torch.zeros(len(positions), len(layers), model.d_model, dtype=torch.float64)
    for _, read in _passes(model, rows, positions, layers, batch_size):
        for column, layer in enumerate(layers):
            total[:, column] += read[layer].double().sum(0).cpu()
    mean = total / len(rows)
    _check_finite(model, mean, layers)
    return mean


def activation_rows(
    model: Model,
    rows: Sequence[Sequence[int]],
    positions: Sequence[int],
    layers: Sequence[int],
    batch_size: int = BATCH_SIZE,
) -> Float64[Tensor, "row pos layer d_model"]:
    """Return ``resid_pre`` of every prompt at negative ``positions`` and at ``layers``.

    Raises:
        WeightdiffError: As `mean_activations`.
    """
    shape = (len(rows), len(positions), len(layers), model.d_model)
    stored = torch.empty(shape, dtype=torch.float64)
    for batch, read in _passes(model, rows, positions, layers, batch_size):
        for column, layer in enumerate(layers):
            stored[batch.index, :, column] = read[layer].double().cpu()
    _check_finite(model, stored.mean(0), layers)
    return stored


def _passes(
    model: Model,
    rows: Sequence[Sequence[int]],
    positions: Sequence[int],
    layers: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[Batch, dict[int, Float[Tensor, "batch pos d_model"]]]]:
    if not rows:
        raise WeightdiffError("there are no prompts to take activations from")
    shortest = min(map(len, rows))
    if min(positions) < -shortest or max(positions) >= 0:
        raise WeightdiffError(
            f"positions {list(positions)} asked for, but the shortest prompt has {shortest} tokens;"
            " positions count from the end, -1 being the last token"
        )
    read: dict[int, Tensor] = {}
    columns = list(positions)

    def keep(layer: int) -> Any:
        def hook_fn(x: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            read[layer] = x[:, columns]

        return hook_fn

    hooks = [(f"blocks.{layer}.hook_resid_pre", keep(layer)) for layer in layers]
    with model.hooks(hooks):
        for batch in batches(rows, model.pad_id, batch_size):
            read.clear()
            model.run_until(batch.ids.to(model.device), batch.mask.to(model.device), max(layers))
            yield batch, read


def _check_finite(
    model: Model, mean: Float[Tensor, "pos layer d_model"], layers: Sequence[int]
) -> None:
    for column, layer in enumerate(layers):
        if not mean[:, column].isfinite().all():
            raise WeightdiffError(
                f"{model.reference}: the residual stream before layer {layer} is not finite; "
                "load the model in float32 or bfloat16"
            )


def place_means(
    model: Model,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]] | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, Float64[Tensor, "place d_model"]]:
    """Average the residual stream at every place (see `ChatFormat.places`) and residual hook.

    ``responses`` are the token ids that followed each prompt; without them, or at a place that no
    token has, the mean is that of the last prompt token. This is the μ of affine ablation.
    """
    chat, n_places = model.chat, model.chat.n_places
    totals = {
        name: torch.zeros(n_places, model.d_model, dtype=torch.float64, device=model.device)
        for name in model.residual_hooks
    }
    counts = torch.zeros(n_places, dtype=torch.float64, device=model.device)
    places: Int[Tensor, " token"] = torch.empty(0)
    kept: Bool[Tensor, "batch pos"] = torch.empty(0)

    def add(name: str) -> Any:
        def hook_fn(x: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            totals[name].index_add_(0, places, x[kept].double())

        return hook_fn

    with model.hooks([(name, add(name)) for name in totals]):
        for ids, mask, where in _with_responses(model, prompts, responses, batch_size):
            kept = mask
            places = where[mask]
            counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float64))
            model.run_until(ids, mask, model.n_layers)
    means = {name: total / counts.clamp(min=1)[:, None] for name, total in totals.items()}
    last = n_places - 2 if chat.n_post else chat.n_prefix
    for mean in means.values():
        mean[counts == 0] = mean[last].clone()
    return means


def _with_responses(
    model: Model,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]] | None,
    batch_size: int,
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Int[Tensor, "batch pos"]]]:
    """Yield token ids, mask and places of prompts (padded left) with responses (padded right)."""
    for batch in batches(prompts, model.pad_id, batch_size):
        ids, mask, places = batch.ids, batch.mask, model.chat.places(batch.mask)
        if responses is not None and any(len(responses[i]) for i in batch.index):
            reverse, reverse_mask = pad_left(
                [list(responses[i])[::-1] for i in batch.index], model.pad_id
            )
            ids = torch.cat([ids, reverse.flip(1)], 1)
            mask = torch.cat([mask, reverse_mask.flip(1)], 1)
            response = torch.full_like(reverse, model.chat.n_places - 1)
            places = torch.cat([places, response], 1)
        yield ids.to(model.device), mask.to(model.device), places.to(model.device)
