"""A batched sampler with a KV cache whose random numbers belong to the prompt, not to the batch."""

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from training.errors import TrainingError
from training.model import positions


class Rollout(NamedTuple):
    """Left-padded prompts followed by right-padded responses."""

    ids: Int[Tensor, "batch pos"]
    """Prompt and response tokens; PAD before the one and after the other."""
    mask: Bool[Tensor, "batch pos"]
    """True on the tokens of the prompt and of the response, its end token included."""
    response_mask: Bool[Tensor, "batch new"]
    """True on the response's tokens; its places are the last ``new`` ones of ``ids``."""
    ended: Bool[Tensor, " batch"]
    """Whether an end token came before the limit."""

    @property
    def response_ids(self) -> Int[Tensor, "batch new"]:
        """The response's part of ``ids``, PAD after the end."""
        return self.ids[:, self.ids.shape[1] - self.response_mask.shape[1] :]


def uniforms(
    seed: int, prompt_ids: Sequence[str], sample_id: int, n: int
) -> Float[Tensor, "batch new"]:
    """Draw n numbers in [0, 1) a prompt, a function of (seed, prompt id, sample id) alone.

    Counter-based (Philox 4x64, Salmon et al. 2011) and keyed by a hash, so that a row depends
    neither on its neighbours, nor on the order, nor on what was drawn before; the first n numbers
    are the same for every larger n. fp64.
    """
    rows = np.empty((len(prompt_ids), n))
    for row, prompt_id in zip(rows, prompt_ids, strict=True):
        name = f"{seed}\x1f{prompt_id}\x1f{sample_id}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        np.random.Generator(np.random.Philox(key=key)).random(out=row)
    return torch.from_numpy(rows)


def inverse_cdf(
    logits: Float[Tensor, "batch vocab"], temperature: float, u: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """Pick the token in whose slice of softmax(logits / temperature) each u ∈ [0, 1) falls.

    Temperature 0 is the argmax. The cumulative sum is in fp64: in fp32 it ends short of 1 by more
    than the probability of rare tokens of a large vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # the first token with cdf > u: a token of probability 0 is never taken
    picked = torch.searchsorted(cdf, (u.to(cdf) * cdf[:, -1])[:, None], right=True)
    return picked.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def forward_inputs(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch seen"],
    cache: DynamicCache | None = None,
) -> dict[str, Any]:
    """Name the arguments of a forward pass over the last ``pos`` of ``seen`` places.

    The mask covers what the cache holds too, and padding may stand anywhere in it.
    """
    inputs = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    # Models without position embeddings (ALiBi) take none.
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    return inputs


def response_logits(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    n_new: int,
) -> Float[Tensor, "batch new vocab"]:
    """Score the last ``n_new`` tokens of each row: entry t holds the logits that predict token t.

    Only those places go through the unembedding, the costliest matrix of a small model.
    """
    logits: Tensor = model(**forward_inputs(model, ids, mask), **_keep(model, n_new + 1)).logits
    return logits[:, -n_new - 1 : -1]


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch prompt"],
    mask: Bool[Tensor, "batch prompt"],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float,
    uniforms: Float[Tensor, "batch new"] | None = None,
) -> Rollout:
    """Continue left-padded prompts until an end token or ``max_new_tokens`` tokens.

    ``uniforms`` holds at least ``max_new_tokens`` numbers a row; temperature 0 needs none.

    Raises:
        TrainingError: PAD is also an end token: nobody could tell where a response ended.
    """
    require_distinct_pad(pad_id, eos_ids)
    if uniforms is None:
        if temperature:
            raise ValueError("sampling at a temperature above 0 needs uniforms")
        uniforms = torch.zeros(len(ids), max_new_tokens)
    ends = torch.tensor(sorted(set(eos_ids)), device=ids.device)
    cache, keep = DynamicCache(config=model.config), _keep(model, 1)
    seen = mask
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    step, tokens, alive = ids, [], []
    for u in uniforms[:, :max_new_tokens].to(ids.device).unbind(1):
        logits = model(**forward_inputs(model, step, seen, cache), **keep).logits[:, -1]
        token = inverse_cdf(logits, temperature, u).masked_fill(ended, pad_id)
        tokens.append(token)
        alive.append(~ended)
        ended = ended | torch.isin(token, ends)
        if bool(ended.all()):
            break
        step = token[:, None]
        seen = torch.cat([seen, alive[-1][:, None]], 1)
    response, response_mask = torch.stack(tokens, 1), torch.stack(alive, 1)
    return Rollout(
        torch.cat([ids, response], 1), torch.cat([mask, response_mask], 1), response_mask, ended
    )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end a response: the generation config's and the tokenizer's own."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})


def require_distinct_pad(pad_id: int | None, eos_ids: Sequence[int]) -> None:
    """Refuse a tokenizer whose PAD is absent or also ends responses."""
    if pad_id is None or pad_id in eos_ids:
        raise TrainingError(
            f"the tokenizer's PAD id is {pad_id} and its end tokens are {sorted(eos_ids)}: "
            "training needs a PAD of its own; add one with tokenizer.add_special_tokens"
        )


def _keep(model: PreTrainedModel, n: int) -> dict[str, int]:
    """Ask for the last n logits where the architecture can; others return all, which are cut."""
    accepted = inspect.signature(model.forward).parameters
    return {"logits_to_keep": n} if "logits_to_keep" in accepted else {}
