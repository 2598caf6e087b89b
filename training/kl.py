"""The exact sequence KL between a policy and its reference, in both directions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.losses import entropy, exact_kl, sequence_logps
from training.model import encode_prompts, pad
from training.rollout import Rollout, end_ids, response_logits, sample, uniforms


@dataclass(frozen=True)
class KL:
    """What one policy's samples say about its distance from the reference."""

    mean: float
    """KL(π‖π_ref) of whole responses, nats."""
    se: float
    """Its standard error over prompts."""
    reverse_mean: float
    """KL(π_ref‖π), on the reference's samples."""
    reverse_se: float
    entropy: float
    """Of the policy per token, nats, on its own samples."""
    length: float
    """Tokens a response, the end token included."""
    ended: float
    """Share of responses that ended before the limit."""
    responses: tuple[str, ...]
    """The policy's samples as text, one a prompt (the first when there are several)."""
    rollouts: tuple[Rollout, ...]
    """The same samples as tokens, all of them, batch by batch."""


def sequence_divergence(
    p: PreTrainedModel, q: PreTrainedModel, rollout: Rollout
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Give Σ_t KL(p_t‖q_t) and Σ_t H(p_t) of each response, nats, exact at every token."""
    n_new = rollout.response_mask.shape[1]
    logits_p = response_logits(p, rollout.ids, rollout.mask, n_new)
    logits_q = response_logits(q, rollout.ids, rollout.mask, n_new)
    # KL(p‖q) over sequences = E_{y∼p} Σ_t KL(p(· | y_<t) ‖ q(· | y_<t)): the chain rule, whose
    # inner KL is summed over the vocabulary and not sampled
    divergence = sequence_logps(exact_kl(logits_p, logits_q), rollout.response_mask)
    return divergence, sequence_logps(entropy(logits_p), rollout.response_mask)


class KLMeter:
    """Measures policies against one reference on the same prompts and random numbers.

    The reference's samples are drawn once; a policy's are drawn with the same uniforms at every
    measurement, so that two snapshots differ by their weights alone.
    """

    def __init__(
        self,
        ref: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Mapping[str, Any]],
        *,
        seed: int,
        max_new_tokens: int,
        samples: int = 1,
        batch_size: int = 128,
    ) -> None:
        """Keep rows that have an ``id`` and a ``prompt``, and draw the reference's samples."""
        self.ref, self.tokenizer, self.rows, self.seed = ref, tokenizer, rows, seed
        self.max_new_tokens, self.samples, self.batch_size = max_new_tokens, samples, batch_size
        self.ref_rollouts = list(self._draw(ref))

    @torch.inference_mode()
    def measure(self, policy: PreTrainedModel) -> KL:
        """Give the exact KL in both directions at temperature 1, and what was sampled for it."""
        rollouts = list(self._draw(policy))
        own = [sequence_divergence(policy, self.ref, r) for r in rollouts]
        forward = torch.cat([divergence for divergence, _ in own])
        surprise = torch.cat([entropies for _, entropies in own])
        reverse = torch.cat(
            [sequence_divergence(self.ref, policy, r)[0] for r in self.ref_rollouts]
        )
        lengths = torch.cat([r.response_mask.sum(1) for r in rollouts]).double()
        ended = torch.cat([r.ended for r in rollouts]).double()
        first = torch.cat([_padded_responses(r, self) for r in rollouts])[: len(self.rows)]
        return KL(
            *_mean_se(forward, self.samples),
            *_mean_se(reverse, self.samples),
            entropy=float(surprise.double().sum() / lengths.sum()),
            length=float(lengths.mean()),
            ended=float(ended.mean()),
            responses=tuple(self.tokenizer.batch_decode(first, skip_special_tokens=True)),
            rollouts=tuple(rollouts),
        )

    def _draw(self, model: PreTrainedModel) -> Iterator[Rollout]:
        """Sample at temperature 1, all prompts once, then all again for the next sample."""
        ends = end_ids(model, self.tokenizer)
        for sample_id in range(self.samples):
            for start in range(0, len(self.rows), self.batch_size):
                rows = self.rows[start : start + self.batch_size]
                ids, mask = pad(
                    encode_prompts(self.tokenizer, [row["prompt"] for row in rows]),
                    self.tokenizer.pad_token_id,
                    "left",
                )
                numbers = uniforms(
                    self.seed, [row["id"] for row in rows], sample_id, self.max_new_tokens
                )
                yield sample(
                    model,
                    ids.to(model.device),
                    mask.to(model.device),
                    self.max_new_tokens,
                    ends,
                    self.tokenizer.pad_token_id,
                    1.0,
                    numbers,
                )


def sequence_kl(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    max_new_tokens: int = 64,
    samples: int = 1,
    batch_size: int = 128,
) -> KL:
    """Measure KL(π‖π_ref) and its reverse once, on rows that have an ``id`` and a ``prompt``."""
    meter = KLMeter(
        ref,
        tokenizer,
        prompts,
        seed=seed,
        max_new_tokens=max_new_tokens,
        samples=samples,
        batch_size=batch_size,
    )
    return meter.measure(policy)


def _mean_se(values: Float[Tensor, " responses"], samples: int) -> tuple[float, float]:
    """Average over prompts; the samples of one prompt are averaged first, being one cluster."""
    prompts = rearrange(values.double(), "(sample prompt) -> prompt sample", sample=samples).mean(1)
    n = len(prompts)
    return float(prompts.mean()), float(prompts.std() / math.sqrt(n)) if n > 1 else math.nan


def _padded_responses(rollout: Rollout, meter: KLMeter) -> Tensor:
    """Widen a batch's responses to the limit, so that batches can be stacked."""
    response = rollout.response_ids
    fill = meter.max_new_tokens - response.shape[1]
    return torch.nn.functional.pad(response, (0, fill), value=meter.tokenizer.pad_token_id)
