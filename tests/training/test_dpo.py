"""DPO's stage against a second implementation that pads nothing."""

import json
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from training import dpo
from training.loop import batches
from training.model import load_model, load_tokenizer


def metrics(run):
    text = (run.dir("dpo") / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def answer_logp(model, prompt, answer):
    """Sum one answer's log-probabilities from one unpadded row."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()


def test_collated_answers_have_the_log_probabilities_of_each_row_alone(arm_run):
    run = arm_run()
    tokenizer, model = load_tokenizer(run.dir("sft")), load_model(run.dir("sft")).eval()
    triples = dpo.encode_triples(tokenizer, run.rows("pairs_train")[:20])
    cached = dpo.reference_logps(model, triples, tokenizer.pad_token_id, batch_size=7)
    with torch.no_grad():
        alone = [[answer_logp(model, p, a) for a in (c, r)] for p, c, r in triples]
    torch.testing.assert_close(cached, torch.tensor(alone), atol=1e-4, rtol=1e-5)
    assert all(answer[-1] == tokenizer.eos_token_id for _, c, r in triples for answer in (c, r))


@pytest.mark.parametrize(("smoothing", "nll_coef"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1.0)])
def test_the_stage_equals_a_loop_over_unpadded_rows(arm_run, coarse_adamw, smoothing, nll_coef):
    run = arm_run(
        f"dpo.label_smoothing={smoothing}",
        f"dpo.nll_coef={nll_coef}",
        "dpo.warmup=0",
        "dpo.batch_size=24",
        "dpo.snapshots=0",
    )
    dpo.train_dpo(run)
    config, start = run.config.dpo, load_model(run.dir("sft")).eval()
    model = load_model(run.dir("sft"))
    triples = dpo.encode_triples(load_tokenizer(run.dir("sft")), run.rows("pairs_train"))
    optimizer = coarse_adamw(model, config.lr)
    for order in batches(len(triples), 24, 1, run.config.arm_seed):
        terms, likelihoods, n_tokens = [], [], 0
        for prompt, chosen, rejected in (triples[i] for i in order):
            with torch.no_grad():
                ref = answer_logp(start, prompt, chosen) - answer_logp(start, prompt, rejected)
            likelihoods.append(answer_logp(model, prompt, chosen))
            margin = config.beta * (likelihoods[-1] - answer_logp(model, prompt, rejected) - ref)
            terms.append(-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin))
            n_tokens += len(chosen)
        loss = torch.stack(terms).mean() - nll_coef * torch.stack(likelihoods).sum() / n_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    ours = load_model(run.dir("dpo"))
    pairs = [
        ((a - s).double(), (b - s).double())
        for a, b, s in zip(ours.parameters(), model.parameters(), start.parameters(), strict=True)
    ]
    miss = sum((a - b).square().sum() for a, b in pairs).sqrt()
    assert (miss / sum(b.square().sum() for _, b in pairs).sqrt()).item() < 5e-5


def test_the_first_step_stands_at_the_reference(arm_run):
    run = arm_run("dpo.nll_coef=0.5")
    dpo.train_dpo(run)
    first, *_, last = metrics(run)
    assert first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["loss"] == pytest.approx(first["dpo_loss"] + 0.5 * first["nll"], rel=1e-5)
    assert first["chosen_reward"] == pytest.approx(0, abs=1e-4)
    assert first.keys() >= {"chosen_logps", "rejected_logps", "rejected_reward", "grad_norm"}
    assert last["step"] == 4


def test_the_margin_grows_and_the_nll_term_holds_the_chosen_up(arm_run):
    ends = []
    for nll_coef in (0.0, 3.0):
        run = arm_run(
            "dpo.epochs=8",
            "dpo.lr=2e-3",
            f"dpo.nll_coef={nll_coef}",
            "dpo.snapshots=0",
            name=f"nll {nll_coef}",
        )
        dpo.train_dpo(run)
        lines = metrics(run)
        assert lines[-1]["chosen_reward"] - lines[-1]["rejected_reward"] > 0.5
        ends.append(lines[-1]["chosen_logps"] - lines[0]["chosen_logps"])
    assert ends[1] > ends[0] + 1


def test_snapshots_carry_the_ledger(arm_run):
    run = arm_run()
    dpo.train_dpo(run)
    steps = run.dir("dpo") / "steps"
    ledgers = [json.loads((steps / s / "ledger.json").read_text()) for s in ("000002", "000004")]
    assert [entry["labels"] for entry in ledgers] == [32, 64]
    assert ledgers[0]["proxy_reward"] is None and ledgers[0]["tokens_generated"] == 0
    assert 0 < ledgers[0]["kl"] < ledgers[1]["kl"]
    record = run.provenance("dpo")
    assert record["steps"] == 4 and record["model_copies_held"] == 2
    assert record["tokens_seen"] == ledgers[1]["tokens_trained"]


def test_same_config_same_bits_and_another_arm_seed_differs(arm_run):
    hashes = []
    for name, extra in (("a", []), ("b", []), ("c", ["arm_seed=1"])):
        run = arm_run(*extra, "dpo.snapshots=0", name=name)
        torch.manual_seed(len(hashes))
        dpo.train_dpo(run)
        hashes.append(run.provenance("dpo")["model_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]
