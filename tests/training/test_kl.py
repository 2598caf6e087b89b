"""The KL meter against the enumeration of every response of a small model."""

import itertools
import math

import pytest
import torch

from training.config import ModelConfig
from training.kl import KLMeter, sequence_divergence, sequence_kl
from training.model import build_model, build_tokenizer, encode_prompts
from training.rollout import Rollout

LIMIT = 3
ROWS = [{"id": f"row {i}", "prompt": prompt} for i, prompt in enumerate(["a", "b", "a b", "b a a"])]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["a", "b"], 32)


@pytest.fixture(scope="module")
def pair(tokenizer):
    """Two random models of 9 tokens: far enough apart for the two directions to differ."""
    config = ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_mlp=16, init_std=0.35)
    return tuple(build_model(config, tokenizer, seed).eval() for seed in (0, 1))


def every_response(vocab, eos):
    """List all responses: those that end, and those cut at the limit."""
    for length in range(1, LIMIT + 1):
        for tokens in itertools.product(range(vocab), repeat=length):
            if eos in tokens[:-1] or (length < LIMIT and tokens[-1] != eos):
                continue
            yield list(tokens)


@torch.inference_mode()
def sequence_log_probability(model, prompt, responses):
    """Give log p(response | prompt), one unpadded row at a time of each length, in fp64."""
    out = []
    for length, group in itertools.groupby(responses, key=len):
        rows = torch.tensor([prompt + r for r in group])
        logps = model(rows).logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
        out.append(logps.gather(-1, rows[:, -length:, None]).squeeze(-1).sum(1))
    return torch.cat(out)


def enumerated_kl(p, q, prompt, eos, vocab):
    responses = list(every_response(vocab, eos))
    log_p = sequence_log_probability(p, prompt, responses)
    log_q = sequence_log_probability(q, prompt, responses)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    return (log_p.exp() * (log_p - log_q)).sum().item(), log_p.exp(), responses


def test_chain_rule_over_every_response(pair, tokenizer):
    """Σ_y p(y) Σ_t KL_t, with the meter's own per-response sums, is the enumerated KL exactly."""
    p, q = pair
    for prompt in encode_prompts(tokenizer, ["a", "b a"]):
        exact, weights, responses = enumerated_kl(p, q, prompt, tokenizer.eos_token_id, 9)
        width = len(prompt) + LIMIT
        ids = torch.full((len(responses), width), tokenizer.pad_token_id)
        mask = torch.zeros(len(responses), width, dtype=torch.bool)
        for row, response in enumerate(responses):
            ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            mask[row, : len(prompt) + len(response)] = True
        rollout = Rollout(ids, mask, mask[:, len(prompt) :], mask[:, -1])
        with torch.inference_mode():
            divergence, entropies = sequence_divergence(p, q, rollout)
        assert (weights * divergence).sum().item() == pytest.approx(exact, rel=1e-5)
        surprise = -(weights * weights.log()).sum().item()
        assert (weights * entropies).sum().item() == pytest.approx(surprise, rel=1e-5)


def test_the_meter_estimates_the_enumerated_kl_in_both_directions(pair, tokenizer):
    p, q = pair
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in ROWS])
    eos = tokenizer.eos_token_id
    forward = sum(enumerated_kl(p, q, prompt, eos, 9)[0] for prompt in prompts) / len(prompts)
    reverse = sum(enumerated_kl(q, p, prompt, eos, 9)[0] for prompt in prompts) / len(prompts)
    assert abs(forward - reverse) > 0.1
    # Rows of one prompt with ids of their own are independent draws, which is what se assumes.
    rows = [{"id": str(i), "prompt": row["prompt"]} for i in range(300) for row in ROWS]
    kl = sequence_kl(p, q, tokenizer, rows, seed=1, max_new_tokens=LIMIT, batch_size=500)
    # Between-prompt spread is part of se, so it is an upper bound of the error here.
    assert abs(kl.mean - forward) < 3 * kl.se < 0.1 * forward
    assert abs(kl.reverse_mean - reverse) < 3 * kl.reverse_se < 0.1 * reverse
    assert 1 <= kl.length <= LIMIT and 0 < kl.ended < 1
    assert 0 < kl.entropy < math.log(9)


def test_a_policy_is_at_zero_from_itself(pair, tokenizer):
    kl = sequence_kl(pair[0], pair[0], tokenizer, ROWS, max_new_tokens=LIMIT, samples=2)
    assert kl.mean == kl.reverse_mean == kl.se == 0


def test_measurements_repeat_and_do_not_depend_on_the_batch(pair, tokenizer):
    p, q = pair
    meter = KLMeter(q, tokenizer, ROWS, seed=3, max_new_tokens=LIMIT, samples=2)
    first, again = meter.measure(p), meter.measure(p)
    assert first.mean == again.mean and first.responses == again.responses
    small = sequence_kl(
        p, q, tokenizer, ROWS, seed=3, max_new_tokens=LIMIT, samples=2, batch_size=3
    )
    assert small.responses == first.responses and len(first.responses) == len(ROWS)
    assert small.mean == pytest.approx(first.mean, rel=1e-5)
    assert small.reverse_se == pytest.approx(first.reverse_se, rel=1e-5)


def test_samples_of_one_prompt_are_one_cluster(pair, tokenizer):
    p, q = pair
    meter = KLMeter(q, tokenizer, ROWS, seed=0, max_new_tokens=LIMIT, samples=3)
    kl = meter.measure(p)
    with torch.inference_mode():
        sums = torch.stack([sequence_divergence(p, q, r)[0].double() for r in kl.rollouts])
    by_prompt = sums.mean(0).numpy()
    assert kl.mean == pytest.approx(by_prompt.mean())
    assert kl.se == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(len(ROWS)))
