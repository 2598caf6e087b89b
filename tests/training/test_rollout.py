"""The sampler against transformers' generate, a loop without a cache, and chi-square."""

import numpy as np
import pytest
import torch
from scipy import stats

from training.config import ModelConfig
from training.errors import TrainingError
from training.model import build_model, build_tokenizer, pad, positions
from training.rollout import (
    inverse_cdf,
    require_distinct_pad,
    response_logits,
    sample,
    uniforms,
)

PAD, EOS = 0, 2
PROMPTS = [[1, 5, 9], [1, 7], [1, 3, 4, 8, 11, 6], [1]]


def tiny_llama(vocab, seed):
    """Make a random Llama sharp enough for its samples to differ and to end."""
    tokenizer = build_tokenizer([str(i) for i in range(vocab - 7)], 64)
    config = ModelConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_mlp=32, init_std=0.5)
    return build_model(config, tokenizer, seed).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(vocab=16, seed=3)


def greedy_without_cache(model, prompt, limit, ends):
    """Feed the whole unpadded row again for every token."""
    row = list(prompt)
    for _ in range(limit):
        row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] in ends:
            break
    return row[len(prompt) :]


def responses(rollout):
    return [
        ids[mask].tolist()
        for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
    ]


@pytest.mark.parametrize("ends", [[EOS], [EOS, 9, 13], []])
@torch.inference_mode()
def test_greedy_equals_a_loop_without_cache_and_generate(model, ends):
    ids, mask = pad(PROMPTS, PAD, "left")
    rollout = sample(model, ids, mask, 12, ends, PAD, 0.0)
    expected = [greedy_without_cache(model, prompt, 12, ends) for prompt in PROMPTS]
    assert responses(rollout) == expected
    assert rollout.ended.tolist() == [bool(row) and row[-1] in ends for row in expected]
    theirs = model.generate(
        ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=ends or None,
        pad_token_id=PAD,
    )
    assert torch.equal(rollout.ids, theirs)


def test_rows_end_apart_and_padding_follows(model):
    ids, mask = pad(PROMPTS, PAD, "left")
    ends = [EOS, 9, 13]
    rollout = sample(model, ids, mask, 12, ends, PAD, 1.0, uniforms(0, ["a", "b", "c", "d"], 0, 12))
    lengths = rollout.response_mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, alive, length in zip(
        rollout.response_ids, rollout.response_mask, lengths, strict=True
    ):
        assert alive.tolist() == [t < length for t in range(len(row))]
        assert not set(row[: length - 1].tolist()) & set(ends)
        assert set(row[length:].tolist()) <= {PAD}
    assert torch.equal(rollout.mask, torch.cat([mask, rollout.response_mask], 1))


def test_the_limit_is_kept(model):
    ids, mask = pad(PROMPTS, PAD, "left")
    rollout = sample(model, ids, mask, 3, [], PAD, 1.0, uniforms(0, ["a", "b", "c", "d"], 0, 5))
    assert rollout.response_mask.shape == (4, 3) and rollout.response_mask.all()
    assert not rollout.ended.any()


def test_a_row_does_not_depend_on_its_batch_or_its_padding(model):
    names = ["a", "b", "c", "d"]
    ids, mask = pad(PROMPTS, PAD, "left")
    together = responses(sample(model, ids, mask, 10, [EOS], PAD, 1.0, uniforms(7, names, 1, 10)))
    wide = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(mask, (4, 0))
    padded = responses(sample(model, *wide, 10, [EOS], PAD, 1.0, uniforms(7, names, 1, 10)))
    alone = [
        responses(
            sample(model, *pad([prompt], PAD), 10, [EOS], PAD, 1.0, uniforms(7, [name], 1, 10))
        )[0]
        for name, prompt in zip(names, PROMPTS, strict=True)
    ]
    assert together == padded == alone


@torch.inference_mode()
def test_first_token_at_temperature_one_passes_chi_square(model):
    n = 4096
    ids, mask = pad([PROMPTS[0]] * n, PAD, "left")
    numbers = uniforms(0, [str(i) for i in range(n)], 0, 1)
    tokens = sample(model, ids, mask, 1, [EOS], PAD, 1.0, numbers).response_ids[:, 0]
    p = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount(tokens, minlength=16)
    assert stats.chisquare(counts, p / p.sum() * n).pvalue > 1e-3
    # The test can fail: another temperature's distribution is told apart.
    hot = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double().div(1.5).softmax(-1).numpy()
    assert stats.chisquare(counts, hot / hot.sum() * n).pvalue < 1e-6


@torch.inference_mode()
def test_joint_distribution_of_two_tokens_passes_chi_square():
    model = tiny_llama(vocab=8, seed=1)
    n = 6000
    ids, mask = pad([[1, 4, 3]] * n, PAD, "left")
    numbers = uniforms(1, [str(i) for i in range(n)], 0, 2)
    pairs = sample(model, ids, mask, 2, [], PAD, 0.8, numbers).response_ids
    counts = np.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    first = (model(torch.tensor([[1, 4, 3]])).logits[0, -1].double() / 0.8).softmax(-1)
    after = [model(torch.tensor([[1, 4, 3, a]])).logits[0, -1].double() / 0.8 for a in range(8)]
    p = (first[:, None] * torch.stack(after).softmax(-1)).flatten().numpy()
    assert stats.chisquare(counts, p / p.sum() * n).pvalue > 1e-3


def test_uniforms_belong_to_seed_prompt_and_sample():
    numbers = uniforms(5, ["x", "y"], 2, 8)
    assert numbers.dtype == torch.float64 and ((numbers >= 0) & (numbers < 1)).all()
    assert torch.equal(uniforms(5, ["y", "x"], 2, 8), numbers.flip(0))
    assert torch.equal(uniforms(5, ["x", "y"], 2, 3), numbers[:, :3])
    for other in (uniforms(6, ["x", "y"], 2, 8), uniforms(5, ["x", "y"], 3, 8)):
        assert not torch.isclose(other, numbers).any()
    many = uniforms(0, [str(i) for i in range(500)], 0, 20).flatten().numpy()
    assert stats.kstest(many, "uniform").pvalue > 1e-3


def test_inverse_cdf_takes_each_token_on_its_own_slice():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(6, 4)
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(logits, 1.0, u).tolist() == [0, 0, 2, 2, 3, 3]


@torch.inference_mode()
def test_response_logits_are_those_of_each_row_alone(model):
    ids, mask = pad(PROMPTS, PAD, "left")
    rollout = sample(model, ids, mask, 8, [EOS, 9], PAD, 0.0)
    logits = response_logits(model, rollout.ids, rollout.mask, rollout.response_mask.shape[1])
    for row, prompt in enumerate(PROMPTS):
        response = responses(rollout)[row]
        alone = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row, : len(response)], alone, atol=1e-5, rtol=1e-5)


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert positions(mask)[mask].tolist() == [0, 1, 0, 1, 2, 3, 4]


def test_a_pad_that_ends_answers_is_refused(model):
    for pad_id in (None, EOS):
        with pytest.raises(TrainingError, match="PAD"):
            require_distinct_pad(pad_id, [EOS])
    with pytest.raises(ValueError, match="uniforms"):
        sample(model, *pad(PROMPTS, PAD, "left"), 4, [EOS], PAD, 1.0)
