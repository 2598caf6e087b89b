"""The losses of every stage, as pure functions over tensors: no model, no I/O, no device.

Unless said otherwise ``logits[:, t]`` are the scores that predict ``ids[:, t]`` (the caller has
shifted), and a mask is True where a token counts: the response through its end token.
"""

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scalar = Float[Tensor, ""]


def masked_mean(x: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Scalar:
    """Average over the True places of the mask, all rows together; 0 when there is none."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def token_logps(
    logits: Float[Tensor, "batch pos vocab"],
    ids: Int[Tensor, "batch pos"],
    temperature: float = 1.0,
) -> Float[Tensor, "batch pos"]:
    """Give log p(ids[t] | before t) in nats under softmax(logits / temperature), in fp32."""
    logits = logits.float() / temperature
    # log softmax(z)_y = z_y − log Σ_v exp z_v: one [batch, pos, vocab] temporary fewer
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def sequence_logps(
    logps: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Sum the token log-probabilities of each response: log π(y | x), nats."""
    return reduce(logps.masked_fill(~mask, 0.0), "batch pos -> batch", "sum")


def sft_loss(
    logits: Float[Tensor, "batch pos vocab"],
    labels: Int[Tensor, "batch pos"],
    n_tokens: int | None = None,
) -> Scalar:
    """Give the cross-entropy per label, nats, of unshifted logits and labels (−100: no label).

    ``labels`` stand in the places of the inputs, as in transformers: logits at t predict
    labels[t + 1]. ``n_tokens`` is the number of labels of the whole accumulation window when the
    batch is only a part of it; summed over the parts the loss is that of the window.
    """
    targets = labels[:, 1:]
    # L = −(1/N) Σ_t log π(y_t | y_<t)  (Ouyang et al. 2022, sec. 3.5)
    total = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / ((targets != -100).sum().clamp(min=1) if n_tokens is None else n_tokens)


def nll(logps: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]) -> Scalar:
    """Give the mean negative log-likelihood per response token, nats.

    The term that Pang et al. 2024 (Iterative RPO, eq. 2) add to DPO on the chosen answer, here
    averaged over the batch's tokens as in SFT instead of within each answer first.
    """
    return -masked_mean(logps, mask)


def bradley_terry_loss(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Give the loss of each pair, nats, of a reward model's two scores."""
    # L = −log σ(r(x, y_w) − r(x, y_l))  (Ouyang et al. 2022, eq. 1, at K = 2)
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(
    policy_chosen: Float[Tensor, " batch"],
    policy_rejected: Float[Tensor, " batch"],
    ref_chosen: Float[Tensor, " batch"],
    ref_rejected: Float[Tensor, " batch"],
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Give (loss, chosen reward, rejected reward) of each pair from summed log-probabilities.

    ``label_smoothing`` is the probability that a label is flipped: 0 is DPO, above it cDPO. The
    rewards are the implicit ones and carry no gradient.
    """
    # r̂(x, y) = β log(π(y|x) / π_ref(y|x))  (Rafailov et al. 2023, eq. 5 without its constant)
    chosen_rewards = beta * (policy_chosen - ref_chosen)
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    margin = chosen_rewards - rejected_rewards
    # L = −(1 − ε) log σ(r̂_w − r̂_l) − ε log σ(r̂_l − r̂_w)
    # (Rafailov et al. 2023, eq. 7; ε > 0: Mitchell 2023, "A note on DPO with noisy preferences")
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def kl_k1(
    logps: Float[Tensor, "batch pos"], ref_logps: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Estimate KL(π‖π_ref) at each sampled token: unbiased, of either sign."""
    # k1 = log(π / π_ref), y ~ π  (Schulman 2020, "Approximating KL divergence")
    return logps - ref_logps


def kl_k3(
    logps: Float[Tensor, "batch pos"], ref_logps: Float[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Estimate KL(π‖π_ref) at each sampled token: unbiased, never negative."""
    # k3 = r − 1 − log r, r = π_ref / π, y ~ π  (Schulman 2020)
    log_ratio = ref_logps - logps
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(
    logits_p: Float[Tensor, "batch pos vocab"], logits_q: Float[Tensor, "batch pos vocab"]
) -> Float[Tensor, "batch pos"]:
    """Give KL(p‖q) in nats over the whole vocabulary at each position."""
    log_p, log_q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    # KL(p‖q) = Σ_v p(v) (log p(v) − log q(v)); a token that p excludes adds 0
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -torch.inf, 0.0).sum(-1)


def entropy(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
    """Give the entropy of softmax(logits), nats, at each position."""
    log_p = logits.float().log_softmax(-1)
    # H = −Σ_v p(v) log p(v)
    return -(log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0.0).sum(-1)


def gae(
    rewards: Float[Tensor, "batch pos"],
    values: Float[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Give (advantages, returns) of responses that begin at position 0; both 0 off the mask.

    Values and rewards off the mask are not read: the episode ends with its last True place.
    """
    rewards, values = rewards * mask, values * mask
    next_values = F.pad(values[:, 1:], (0, 1))
    # δ_t = r_t + γ V_{t+1} − V_t  (Schulman et al. 2016, eq. 10)
    deltas = (rewards + gamma * next_values - values) * mask
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        # Â_t = δ_t + γλ Â_{t+1}  (Schulman et al. 2016, eq. 16)
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    # R_t = Â_t + V_t, the target of TD(λ)  (Huang et al. 2024, N+ implementation details)
    return advantages, advantages + values


def whiten(
    x: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], shift_mean: bool = True
) -> Float[Tensor, "batch pos"]:
    """Scale to variance 1 (and mean 0 when ``shift_mean``) over the mask; 0 off the mask.

    The variance is the unbiased one, with 1e-8 under the root, as in InstructGPT's ancestors
    (Huang et al. 2024); of fewer than two places it is taken as 0.
    """
    mean = masked_mean(x, mask)
    variance = ((x - mean) ** 2 * mask).sum() / (mask.sum() - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def ppo_policy_loss(
    logps: Float[Tensor, "batch pos"],
    old_logps: Float[Tensor, "batch pos"],
    advantages: Float[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    clip_range: float,
) -> tuple[Scalar, Scalar]:
    """Give (loss, fraction of tokens where the clip binds), averaged over response tokens."""
    ratio = ((logps - old_logps) * mask).exp()
    # L = −E[min(ρ Â, clip(ρ, 1 − ε, 1 + ε) Â)], ρ = π / π_old  (Schulman et al. 2017, eq. 7)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask).detach()


def ppo_value_loss(
    values: Float[Tensor, "batch pos"],
    old_values: Float[Tensor, "batch pos"],
    returns: Float[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    clip_range: float,
) -> tuple[Scalar, Scalar]:
    """Give (loss, fraction of tokens where the clip binds), averaged over response tokens."""
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    # L = ½ E[max((V − R)², (clip(V, V_old ± ε) − R)²)]  (Huang et al. 2022, detail 9)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask).detach()


def explained_variance(
    values: Float[Tensor, "batch pos"],
    returns: Float[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
) -> Scalar:
    """Give 1 − Var(R − V)/Var(R) over the mask; 0 when the returns do not vary."""
    target, error = returns[mask], (returns - values)[mask]
    spread = target.var(correction=0) if target.numel() else target.sum()
    return 1 - error.var(correction=0) / spread if spread > 0 else torch.zeros_like(spread)
