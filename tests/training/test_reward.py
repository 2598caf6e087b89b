"""The reward model against transformers' own forward pass, and its measures against loops."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from training import reward
from training.errors import TrainingError
from training.loop import batches
from training.model import load_model, load_reward_model, load_tokenizer, pad


@pytest.fixture(scope="module")
def fresh(untrained_sft):
    return reward.new_reward_model(untrained_sft.dir("sft"), 0, 0).eval()


@pytest.fixture(scope="module")
def pairs(untrained_sft):
    tokenizer = load_tokenizer(untrained_sft.dir("sft"))
    return reward.encode_pairs(tokenizer, untrained_sft.rows("pairs_train"))


def test_head_is_drawn_from_the_seed_with_its_standard_deviation(untrained_sft, fresh, tmp_path):
    again, other = (reward.new_reward_model(untrained_sft.dir("sft"), s, 0) for s in (0, 1))
    assert torch.equal(fresh.score.weight, again.score.weight)
    assert not torch.equal(fresh.score.weight, other.score.weight)
    weights = untrained_sft.dir("sft") / "model.safetensors"
    assert weights.is_file()
    base = load_model(untrained_sft.dir("sft")).base_model.state_dict()
    for name, tensor in fresh.base_model.state_dict().items():
        assert torch.equal(tensor, base[name])
    wide = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=4096, n_layer=0, n_head=1, n_positions=8)
    )
    wide.save_pretrained(tmp_path / "wide")
    std = reward.new_reward_model(tmp_path / "wide", 0, 0).score.weight.std().item()
    assert std == pytest.approx(1 / math.sqrt(4097), rel=0.05)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_scores_equal_those_of_transformers_and_of_each_row_alone(fresh, pairs, side):
    rows = [chosen for chosen, _ in pairs[:12]]
    ids, mask = pad(rows, 0, side)
    ours = reward.scores(fresh, ids, mask)
    alone = torch.cat([fresh(torch.tensor([row])).logits[:, 0] for row in rows])
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)
    if side == "right":
        theirs = fresh(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_pair_scores_are_in_the_order_of_the_pairs(fresh, pairs):
    chosen, rejected = reward.pair_scores(fresh, pairs[:5], 0)
    for ours, row in ((chosen[3], pairs[3][0]), (rejected[3], pairs[3][1])):
        alone = fresh(torch.tensor([row])).logits
        torch.testing.assert_close(ours, alone.squeeze(), atol=1e-5, rtol=1e-5)
    every = reward.score_all(fresh, pairs, 0, batch_size=7)
    torch.testing.assert_close(every[0][:5], chosen, atol=1e-5, rtol=1e-5)


def test_calibration_error_against_a_loop():
    margins = torch.tensor(np.random.default_rng(0).normal(1, 2, 500))
    bins = {}
    for p in (1 / (1 + np.exp(-margins.numpy()))).tolist():
        place = min(int((max(p, 1 - p) - 0.5) * 20), 9)
        bins.setdefault(place, []).append((float(p > 0.5), max(p, 1 - p)))
    gaps = [
        len(b) / 500 * abs(np.mean([c for c, _ in b]) - np.mean([q for _, q in b]))
        for b in bins.values()
    ]
    assert reward.calibration_error(margins) == pytest.approx(math.fsum(gaps), abs=1e-9)


def test_a_calibrated_scorer_has_no_calibration_error():
    rng = np.random.default_rng(1)
    margin = torch.tensor(rng.uniform(0, 3, 40_000))
    sign = torch.tensor(rng.random(40_000)) < margin.sigmoid()
    assert reward.calibration_error(torch.where(sign, margin, -margin)) < 0.01
    assert reward.calibration_error(torch.where(sign, 4 * margin, -4 * margin)) > 0.1


def test_evaluate_counts_pairs_and_correlates_with_answer_length(fresh, pairs):
    prompts = [len(c) - 3 for c, _ in pairs]
    chosen, rejected = reward.score_all(fresh, pairs, 0)
    report = reward.evaluate(fresh, pairs, prompts, 0)
    wins = sum(c > r for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True))
    assert report["accuracy"] == pytest.approx(wins / len(pairs))
    lengths = [3] * len(pairs) + [len(r) - n for (_, r), n in zip(pairs, prompts, strict=True)]
    expected = np.corrcoef(torch.cat([chosen, rejected]).numpy(), lengths)[0, 1]
    assert report["length_correlation"] == pytest.approx(expected, abs=1e-6)


def test_the_stage_learns_shifts_and_loads_without_our_code(arm_run):
    run = arm_run("rm.epochs=6", "rm.lr=3e-3")
    reward.train_reward(run)
    metrics = (run.dir("rm") / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert np.mean([line["accuracy"] for line in lines[-5:-1]]) > 0.8 > lines[0]["accuracy"]
    assert {"test_accuracy", "test_ece", "test_length_correlation"} <= lines[-1].keys()
    assert (run.dir("rm") / "README.md").read_text(encoding="utf-8").count("accuracy") == 1

    tokenizer = load_tokenizer(run.dir("rm"))
    model = load_reward_model(run.dir("rm")).eval()
    pairs = reward.encode_pairs(tokenizer, run.rows("pairs_train"))
    chosen, _ = reward.score_all(model, pairs, tokenizer.pad_token_id)
    assert chosen.double().mean().item() == pytest.approx(0, abs=1e-5)

    theirs = AutoModelForSequenceClassification.from_pretrained(run.dir("rm")).eval()
    ids, mask = pad([c for c, _ in pairs[:8]], tokenizer.pad_token_id)
    with torch.inference_mode():
        raw = theirs(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    assert theirs.config.reward_offset == pytest.approx(lines[-1]["test_offset"])
    torch.testing.assert_close(raw - theirs.config.reward_offset, chosen[:8], atol=1e-5, rtol=1e-5)


def test_the_stage_equals_a_loop_over_unpadded_rows(arm_run, coarse_adamw):
    """Three steps by transformers' own forward, one row at a time, in the shared order."""
    run = arm_run("rm.batch_size=24", "rm.warmup=0", "arm_seed=1")
    reward.train_reward(run)
    model = reward.new_reward_model(run.dir("sft"), 1, 0)
    pairs = reward.encode_pairs(load_tokenizer(run.dir("sft")), run.rows("pairs_train"))
    optimizer = coarse_adamw(model, run.config.rm.lr)
    for rows in batches(len(pairs), 24, 1, run.config.arm_seed):
        margins = [
            (model(torch.tensor([c])).logits - model(torch.tensor([r])).logits).squeeze()
            for c, r in (pairs[row] for row in rows)
        ]
        optimizer.zero_grad()
        torch.stack([torch.log1p(torch.exp(-m)) for m in margins]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.config.rm.max_grad_norm)
        optimizer.step()
    start = reward.new_reward_model(run.dir("sft"), 1, 0).state_dict()
    ours, theirs = load_reward_model(run.dir("rm")).state_dict(), model.state_dict()
    deltas = [(ours[name] - start[name], theirs[name] - start[name]) for name in start]
    miss = sum((a - b).double().square().sum() for a, b in deltas).sqrt()
    assert (miss / sum(b.double().square().sum() for _, b in deltas).sqrt()).item() <= 5e-5


def test_same_config_same_bits_and_another_arm_seed_differs(arm_run):
    runs = [arm_run(name="a"), arm_run(name="b"), arm_run("arm_seed=1", name="c")]
    for run in runs:
        reward.train_reward(run)
    hashes = [run.provenance("rm")["model_sha256"] for run in runs]
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_architecture_without_a_score_head_is_refused(untrained_sft, tmp_path):
    with pytest.raises(TrainingError, match="no linear head named score"):
        reward.score_head(load_model(untrained_sft.dir("sft")))
    shutil.copytree(untrained_sft.dir("sft"), tmp_path / "sft")
    (tmp_path / "sft" / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match="safetensors"):
        reward.new_reward_model(tmp_path / "sft", 0, 0)
