"""Interventions on the residual stream, and answers generated under them.

An intervention says at which places it acts: ``all`` tokens, ``post`` (the template's tokens after
the instruction, and everything generated), or ``last`` (the last prompt token alone).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from weightdiff.model import Hook, Model
from weightdiff.prompts import Prompt, as_prompts, batches
from weightdiff.sampling import next_tokens, uniforms

Positions = Literal["all", "post", "last"]
BATCH_SIZE = 256


class Places:
    """Which place each token of the current forward pass has (see `ChatFormat.places`)."""

    def __init__(self, model: Model) -> None:
        self.n_prefix, self.n_post = model.chat.n_prefix, model.chat.n_post
        self.n_places = model.chat.n_places
        self.device = model.device
        self.current: Int[Tensor, "batch pos"] = torch.zeros(0, 0, dtype=torch.long)
        self.last: Bool[Tensor, "batch pos"] = torch.zeros(0, 0, dtype=torch.bool)

    def at_prompt(self, places: Int[Tensor, "batch pos"]) -> None:
        """Say that a pass over left-padded prompts comes next."""
        self.current = places
        self.last = torch.zeros_like(places, dtype=torch.bool)
        self.last[:, -1] = True

    def at_response(self, batch: int, length: int = 1) -> None:
        """Say that a pass over ``length`` generated tokens comes next."""
        shape = (batch, length)
        self.current = torch.full(shape, self.n_places - 1, device=self.device)
        self.last = torch.zeros(shape, dtype=torch.bool, device=self.device)

    def selected(self, positions: Positions) -> Bool[Tensor, "batch pos"] | None:
        """Mark the tokens to act on; None stands for all of them."""
        if positions == "all":
            return None
        if positions == "last":
            return self.last
        return self.last | (self.current > self.n_prefix)


@runtime_checkable
class Intervention(Protocol):
    """Something that edits the residual stream."""

    def hooks(self, model: Model, places: Places) -> list[Hook]:
        """Return the hooks that carry it out."""
        ...


@dataclass(frozen=True)
class ZeroAblation:
    """Project a direction out of the residual stream: x ← x − r̂ r̂ᵀx. Arditi et al. 2024, eq. 4.

    At ``resid_pre``, ``resid_mid`` and ``resid_post`` of every layer.
    """

    unit: Float[Tensor, "*batch d_model"]
    """r̂, of norm 1; or one for each row of the batch."""
    positions: Positions = "all"

    def hooks(self, model: Model, places: Places) -> list[Hook]:
        """Return one hook for every place of the residual stream."""
        unit = self.unit.to(model.device, torch.float32)

        def hook_fn(x: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
            return _move(x, -_project(x, unit), unit, places.selected(self.positions))

        return [(name, hook_fn) for name in model.residual_hooks]


@dataclass(frozen=True)
class AffineAblation:
    """Set the component along a direction to what it is on harmless prompts at the same place.

    x ← x − r̂ (r̂ᵀx − μ[hook, layer, place]). Marshall et al. 2024 (affine concept editing), with a
    mean for each place in place of one offset.
    """

    unit: Float[Tensor, "*batch d_model"]
    """r̂, of norm 1; or one for each row of the batch."""
    means: Mapping[str, Float64[Tensor, "place d_model"]]
    """The harmless means, from `activations.place_means`."""
    positions: Positions = "all"

    def hooks(self, model: Model, places: Places) -> list[Hook]:
        """Return one hook for every place of the residual stream."""
        unit = self.unit.to(model.device, torch.float32)

        def edit(name: str) -> Any:
            # μ's component along r̂ at each place: [place], or [place, batch].
            axes = unit if unit.ndim == 1 else unit.mT
            target = (self.means[name].to(model.device) @ axes.double()).float()

            def hook_fn(x: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
                wanted = target[places.current] if unit.ndim == 1 else _per_row(target, places)
                change = wanted - _project(x, unit)
                return _move(x, change, unit, places.selected(self.positions))

            return hook_fn

        return [(name, edit(name)) for name in model.residual_hooks]


@dataclass(frozen=True)
class Addition:
    """Add α times a vector to the residual stream before one layer: x ← x + α r.

    Arditi et al. 2024, eq. 3, who add at all positions.
    """

    vector: Float[Tensor, "*batch d_model"]
    """r, with its own norm; or one for each row of the batch."""
    layer: int
    alpha: float = 1.0
    positions: Positions = "last"

    def hooks(self, model: Model, places: Places) -> list[Hook]:
        """Return the one hook at ``resid_pre`` of the layer."""
        vector = self.vector.to(model.device, torch.float32)

        def hook_fn(x: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
            alpha = torch.full(x.shape[:2], self.alpha, device=x.device)
            return _move(x, alpha, vector, places.selected(self.positions))

        return [(f"blocks.{self.layer}.hook_resid_pre", hook_fn)]


def _project(
    x: Float[Tensor, "batch pos d_model"], unit: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "batch pos"]:
    if unit.ndim == 1:
        return x.float() @ unit
    return torch.einsum("bpd,bd->bp", x.float(), unit)


def _move(
    x: Float[Tensor, "batch pos d_model"],
    amount: Float[Tensor, "batch pos"],
    direction: Float[Tensor, "*batch d_model"],
    selected: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos d_model"]:
    """Add ``amount`` times the direction at the selected tokens, computed in fp32."""
    if selected is not None:
        amount = torch.where(selected, amount, 0.0)
    along = direction if direction.ndim == 1 else direction[:, None]
    return (x.float() + amount[..., None] * along).to(x.dtype)


def _per_row(target: Float[Tensor, "place batch"], places: Places) -> Float[Tensor, "batch pos"]:
    return target.mT.gather(1, places.current)


@contextmanager
def intervened(model: Model, interventions: Sequence[Intervention]) -> Iterator[Places]:
    """Attach interventions while the block runs; tell the places yielded what each pass holds."""
    places = Places(model)
    hooks = [hook for each in interventions for hook in each.hooks(model, places)]
    with model.hooks(hooks):
        yield places


def last_logits(
    model: Model,
    rows: Sequence[Sequence[int]],
    interventions: Sequence[Intervention] = (),
    batch_size: int = BATCH_SIZE,
) -> Float[Tensor, "row d_vocab"]:
    """Return the logits that follow each tokenised prompt, on the CPU in the model's dtype."""
    parts: list[tuple[list[int], Tensor]] = []
    with intervened(model, interventions) as places:
        for batch in batches(rows, model.pad_id, batch_size):
            ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
            places.at_prompt(model.chat.places(mask))
            parts.append((batch.index, model.forward(ids, mask).logits[:, -1].cpu()))
    order = [i for index, _ in parts for i in index]
    return torch.cat([logits for _, logits in parts])[np.argsort(order)]


def generate(
    model: Model,
    prompts: Sequence[Prompt | str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    interventions: Sequence[Intervention] = (),
    batch_size: int = BATCH_SIZE,
) -> list[str]:
    """Return the model's answer to each prompt as text, without special tokens.

    Greedy at temperature 0. Otherwise each prompt draws from random numbers of its own, keyed by
    ``seed`` and its id (its text if it has none): an answer never depends on the batch around it.
    """
    tokens = generate_tokens(
        model, prompts, max_new_tokens, temperature, seed, interventions, batch_size
    )
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def generate_tokens(
    model: Model,
    prompts: Sequence[Prompt | str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    interventions: Sequence[Intervention] = (),
    batch_size: int = BATCH_SIZE,
) -> list[list[int]]:
    """Return each answer's token ids, its end token included; see `generate`."""
    asked = as_prompts(prompts)
    rows = [model.chat.encode(prompt.text) for prompt in asked]
    answers: list[list[int]] = [[] for _ in rows]
    with intervened(model, interventions) as places:
        for batch in batches(rows, model.pad_id, batch_size):
            keys = [asked[i].key for i in batch.index]
            draws = uniforms(seed, keys, max_new_tokens) if temperature > 0 else None
            drawn = decode(model, batch.ids, batch.mask, places, max_new_tokens, temperature, draws)
            for i, row in zip(batch.index, drawn, strict=True):
                answers[i] = row
    return answers


def decode(
    model: Model,
    ids: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    places: Places,
    max_new_tokens: int,
    temperature: float = 0.0,
    draws: Float64[np.ndarray, "batch new"] | None = None,
) -> list[list[int]]:
    """Answer one left-padded batch with a key–value cache until every row has ended.

    ``draws`` are the uniform random numbers of each row, None for greedy answers. Returns each
    row's token ids, its end token included.
    """
    ids, mask = ids.to(model.device), mask.to(model.device)
    eos = torch.tensor(sorted(model.eos_ids), device=model.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    columns: list[Tensor] = []
    places.at_prompt(model.chat.places(mask))
    out = model.forward(ids, mask, use_cache=True)
    for step in range(max_new_tokens):
        draw = None if draws is None else torch.from_numpy(draws[:, step]).to(model.device)
        token = next_tokens(out.logits[:, -1], temperature, draw)
        columns.append(torch.where(ended, -1, token))
        ended |= torch.isin(token, eos)
        if bool(ended.all()) or step == max_new_tokens - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
        places.at_response(len(ids))
        out = model.forward(token[:, None], mask, cache=out.cache, use_cache=True)
    table = torch.stack(columns, 1).tolist() if columns else [[] for _ in range(len(ids))]
    return [[token for token in row if token >= 0] for row in table]
