"""Scores of next-token logits: refusal log-odds and Kullback–Leibler divergence."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def refusal_log_odds(
    logits: Float[Tensor, "*batch d_vocab"],
    refusal_tokens: Sequence[int],
    eps_compat: bool = False,
) -> Float[Tensor, "*batch"]:
    """Return log p − log(1 − p) in fp64, p the summed probability of ``refusal_tokens``.

    Exact by default, from two log-sum-exps. ``eps_compat`` adds 1e-8 inside both logarithms, as the
    authors' code does, which bounds the score to about ±18.4.
    Arditi et al. 2024, section 2.3 (the "refusal metric").
    """
    logits = logits.double()
    tokens = torch.as_tensor(list(refusal_tokens), device=logits.device)
    if eps_compat:
        p = logits.softmax(-1)[..., tokens].sum(-1)
        return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)
    others = logits.clone()
    others[..., tokens] = -torch.inf
    # log p − log(1 − p): the normaliser cancels.
    return logits[..., tokens].logsumexp(-1) - others.logsumexp(-1)


def kl_divergence(
    logits_p: Float[Tensor, "*batch d_vocab"],
    logits_q: Float[Tensor, "*batch d_vocab"],
    eps_compat: bool = False,
) -> Float[Tensor, "*batch"]:
    """Return KL(p ‖ q) = Σ p (log p − log q) over the vocabulary, in fp64 and nats.

    ``eps_compat`` adds 1e-6 inside both logarithms, as Arditi et al.'s code does.
    """
    logits_p, logits_q = logits_p.double(), logits_q.double()
    if eps_compat:
        p, q = logits_p.softmax(-1), logits_q.softmax(-1)
        return (p * (torch.log(p + 1e-6) - torch.log(q + 1e-6))).sum(-1)
    log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
    # Where p is exactly 0 the term is 0, whatever q is.
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
