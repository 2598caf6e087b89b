"""Every loss against fp64 numpy written as loops, and the values that theory fixes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import losses

BATCH, POS, VOCAB = 3, 5, 7


@pytest.fixture
def draw():
    generator = np.random.default_rng(0)
    return lambda *shape: torch.tensor(generator.normal(size=shape), dtype=torch.float32)


@pytest.fixture
def mask():
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def masked_loop(values: np.ndarray, mask: torch.Tensor) -> float:
    kept = [values[b, t] for b in range(BATCH) for t in range(POS) if mask[b, t]]
    return math.fsum(kept) / len(kept)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_and_sequence_logps(draw, mask, temperature):
    logits = draw(BATCH, POS, VOCAB) * 4
    ids = torch.arange(BATCH * POS).reshape(BATCH, POS) % VOCAB
    reference = log_softmax(logits.numpy().astype(np.float64) / temperature)
    expected = np.array([[reference[b, t, ids[b, t]] for t in range(POS)] for b in range(BATCH)])
    logps = losses.token_logps(logits, ids, temperature)
    np.testing.assert_allclose(logps, expected, atol=2e-6)
    sums = [math.fsum(expected[b, t] for t in range(POS) if mask[b, t]) for b in range(BATCH)]
    np.testing.assert_allclose(losses.sequence_logps(logps, mask), sums, atol=1e-5)


def test_sft_loss_counts_labels_of_the_whole_window(draw):
    logits = draw(4, POS, VOCAB)
    labels = torch.tensor([[-100, -100, 3, 4, 2], [-100, 1, 2, -100, -100]] * 2)
    labels[2:] = -100
    labels[3, 4] = 6
    reference = log_softmax(logits.numpy())
    terms = [
        -reference[b, t - 1, labels[b, t]]
        for b in range(4)
        for t in range(1, POS)
        if labels[b, t] != -100
    ]
    expected = math.fsum(terms) / len(terms)
    assert losses.sft_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)
    # Two halves of unequal label counts (5 and 1) add up to the loss of the window.
    halves = [losses.sft_loss(logits[h], labels[h], len(terms)) for h in (slice(2), slice(2, 4))]
    assert sum(halves).item() == pytest.approx(expected, abs=1e-6)


def test_sft_loss_without_labels_is_zero(draw):
    assert losses.sft_loss(draw(1, POS, VOCAB), torch.full((1, POS), -100)).item() == 0


def test_nll_is_the_sft_loss_of_the_same_tokens(draw, mask):
    logits, ids = draw(BATCH, POS + 1, VOCAB), torch.ones(BATCH, POS, dtype=torch.long)
    labels = torch.full((BATCH, POS + 1), -100)
    labels[:, 1:] = ids.masked_fill(~mask, -100)
    ours = losses.nll(losses.token_logps(logits[:, :-1], ids), mask)
    torch.testing.assert_close(ours, losses.sft_loss(logits, labels))


def test_bradley_terry(draw):
    chosen, rejected = draw(BATCH), draw(BATCH)
    expected = [
        math.log1p(math.exp(-(w - r)))
        for w, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    ]
    np.testing.assert_allclose(losses.bradley_terry_loss(chosen, rejected), expected, rtol=1e-5)
    assert losses.bradley_terry_loss(chosen, chosen)[0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_dpo_against_its_equation(draw, beta, smoothing):
    pw, pl, rw, rl = (draw(BATCH) * 5 for _ in range(4))
    loss, chosen, rejected = losses.dpo_loss(pw, pl, rw, rl, beta, smoothing)
    for b in range(BATCH):
        margin = beta * ((pw[b] - rw[b]).item() - (pl[b] - rl[b]).item())
        p = 1 / (1 + math.exp(-margin))
        expected = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
        assert loss[b].item() == pytest.approx(expected, rel=1e-5)
        assert (chosen - rejected)[b].item() == pytest.approx(margin, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_at_the_reference_is_log_two(draw, smoothing):
    w, r = draw(BATCH), draw(BATCH)
    loss, chosen, rejected = losses.dpo_loss(w, r, w, r, 0.5, smoothing)
    torch.testing.assert_close(loss, torch.full((BATCH,), math.log(2)))
    assert not chosen.any() and not rejected.any()


def test_dpo_gradient_is_that_of_eq_7():
    w, r = torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    losses.dpo_loss(w, r, torch.tensor([-3.0]), torch.tensor([-1.0]), 0.5)[0].sum().backward()
    # ∇ = −β σ(r̂_l − r̂_w) (∇ log π_w − ∇ log π_l), here r̂_w − r̂_l = 0.5·2 + 0.5·1
    weight = 0.5 / (1 + math.exp(1.5))
    assert w.grad.item() == pytest.approx(-weight) and r.grad.item() == pytest.approx(weight)


def test_kl_estimators_are_unbiased_over_the_vocabulary(draw):
    p, q = draw(1, 1, VOCAB), draw(1, 1, VOCAB)
    log_p, log_q = log_softmax(p.numpy())[0, 0], log_softmax(q.numpy())[0, 0]
    exact = math.fsum(np.exp(log_p) * (log_p - log_q))
    every = torch.arange(VOCAB)[None]
    logps = losses.token_logps(p.expand(1, VOCAB, VOCAB), every)
    ref_logps = losses.token_logps(q.expand(1, VOCAB, VOCAB), every)
    assert losses.exact_kl(p, q).item() == pytest.approx(exact, abs=1e-6)
    for estimator in (losses.kl_k1, losses.kl_k3):
        expectation = (logps.exp() * estimator(logps, ref_logps)).sum().item()
        assert expectation == pytest.approx(exact, abs=1e-6)
    assert (losses.kl_k3(logps, ref_logps) >= 0).all()


def test_entropy_and_kl_with_excluded_tokens():
    flat = torch.zeros(1, 1, VOCAB)
    assert losses.entropy(flat).item() == pytest.approx(math.log(VOCAB))
    sure = torch.full((1, 1, VOCAB), -torch.inf)
    sure[..., 2] = 0.0
    assert losses.entropy(sure).item() == 0
    assert losses.exact_kl(sure, flat).item() == pytest.approx(math.log(VOCAB))
    assert losses.exact_kl(flat, sure).item() == math.inf


def gae_double_loop(rewards, values, length, gamma, lam):
    """Write Â_t = Σ_l (γλ)^l δ_{t+l} out for one response."""
    delta = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0.0) - values[t]
        for t in range(length)
    ]
    return [
        math.fsum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
        for t in range(length)
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_a_double_loop(draw, mask, gamma, lam):
    rewards, values = draw(BATCH, POS), draw(BATCH, POS)
    advantages, returns = losses.gae(rewards, values, mask, gamma, lam)
    for b in range(BATCH):
        n = int(mask[b].sum())
        expected = gae_double_loop(rewards[b].tolist(), values[b].tolist(), n, gamma, lam)
        np.testing.assert_allclose(advantages[b, :n], expected, atol=1e-5)
        np.testing.assert_allclose(
            returns[b, :n], np.array(expected) + values[b, :n].numpy(), atol=1e-5
        )
    assert not advantages[~mask].any() and not returns[~mask].any()


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
@settings(max_examples=25, deadline=None)
def test_gae_reads_nothing_past_the_end(reward, value):
    mask = torch.tensor([[True, True, False]])
    rewards, values = torch.tensor([[0.1, 0.7, reward]]), torch.tensor([[0.3, -0.2, value]])
    clean = losses.gae(rewards * mask, values * mask, mask)
    for ours, expected in zip(losses.gae(rewards, values, mask), clean, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_whiten(draw, mask):
    x = draw(BATCH, POS) * 3 + 2
    kept = x[mask].double().numpy()
    white = losses.whiten(x, mask)
    np.testing.assert_allclose(white[mask], (kept - kept.mean()) / kept.std(ddof=1), atol=1e-5)
    np.testing.assert_allclose(
        losses.whiten(x, mask, shift_mean=False)[mask],
        (kept - kept.mean()) / kept.std(ddof=1) + kept.mean(),
        atol=1e-5,
    )
    assert not white[~mask].any()


def test_ppo_policy_loss_against_a_loop(draw, mask):
    advantages, logps, old = draw(BATCH, POS), draw(BATCH, POS) * 0.5, draw(BATCH, POS) * 0.5
    terms, clips = np.zeros((BATCH, POS)), np.zeros((BATCH, POS))
    for b in range(BATCH):
        for t in range(POS):
            ratio, a = math.exp((logps - old)[b, t].item()), advantages[b, t].item()
            bounded = min(max(ratio, 0.8), 1.2)
            terms[b, t], clips[b, t] = -min(ratio * a, bounded * a), bounded * a < ratio * a
    loss, clipped = losses.ppo_policy_loss(logps, old, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(masked_loop(terms, mask), abs=1e-6)
    assert clipped.item() == pytest.approx(masked_loop(clips, mask), abs=1e-6)
    assert 0 < clipped.item() < 1


def test_ppo_policy_gradient_at_the_old_policy_is_reinforce(mask):
    logps = torch.zeros(BATCH, POS, requires_grad=True)
    advantages = torch.linspace(-1, 1, BATCH * POS).reshape(BATCH, POS)
    losses.ppo_policy_loss(logps, logps.detach(), advantages, mask, 0.2)[0].backward()
    torch.testing.assert_close(logps.grad, -advantages * mask / mask.sum())


def test_ppo_value_loss_against_a_loop(draw, mask):
    values, old, returns = draw(BATCH, POS), draw(BATCH, POS), draw(BATCH, POS)
    terms = np.zeros((BATCH, POS))
    for b in range(BATCH):
        for t in range(POS):
            v, o, r = (x[b, t].item() for x in (values, old, returns))
            bounded = min(max(v, o - 0.2), o + 0.2)
            terms[b, t] = 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
    loss, clipped = losses.ppo_value_loss(values, old, returns, mask, 0.2)
    assert loss.item() == pytest.approx(masked_loop(terms, mask), abs=1e-6)
    assert 0 < clipped.item() < 1


def test_explained_variance(draw, mask):
    values, returns = draw(BATCH, POS), draw(BATCH, POS)
    v, r = values[mask].double().numpy(), returns[mask].double().numpy()
    expected = 1 - (r - v).var() / r.var()
    ours = losses.explained_variance(values, returns, mask)
    assert ours.item() == pytest.approx(expected, abs=1e-5)
    assert losses.explained_variance(values, torch.ones(BATCH, POS), mask).item() == 0


def test_garbage_off_the_mask_changes_nothing(mask):
    x = torch.ones(BATCH, POS).masked_fill(~mask, torch.nan)
    assert losses.masked_mean(x, mask).item() == 1
    torch.testing.assert_close(losses.sequence_logps(x, mask), mask.sum(1).float())
