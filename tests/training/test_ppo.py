"""One round of PPO against a second implementation that pads nothing and loops over tokens."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from training import ppo, reward
from training.loop import adamw, batches
from training.model import load_model, load_reward_model, load_tokenizer
from training.run import Run


@pytest.fixture(scope="module")
def judge(tmp_path_factory, untrained_sft):
    """Train a reward model that prefers something, so that advantages are not all noise."""
    path = tmp_path_factory.mktemp("judge") / "run"
    shutil.copytree(untrained_sft.path, path)
    run = Run(path, untrained_sft.config)
    reward.train_reward(run)
    return run.dir("rm")


@pytest.fixture
def ppo_run(arm_run, judge):
    """Make runs as `arm_run` does, with the reward model in its place."""

    def make(*overrides, name="run"):
        run = arm_run(*overrides, name=name)
        shutil.copytree(judge, run.dir("rm"))
        return run

    return make


def make_ppo(run):
    tokenizer = load_tokenizer(run.dir("sft"))
    judge = load_reward_model(run.dir("rm"))
    return ppo.PPO(run.config.ppo, load_model(run.dir("sft")), judge, tokenizer, seed=0)


def metrics(run):
    text = (run.dir("ppo") / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("score_at", ["last", "after_eos"])
def test_place_rewards_against_a_loop(score_at):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    score, penalty = torch.tensor([5.0, -2.0, 3.0]), torch.full((3, 3), -0.1)
    extra = int(score_at == "after_eos")
    expected, states = np.zeros((3, 3 + extra)), np.zeros((3, 3 + extra), dtype=bool)
    for row, length in enumerate((3, 1, 2)):
        expected[row, :length] = -0.1
        expected[row, length - 1 + extra] += score[row].item()
        states[row, : length + extra] = True
    rewards, places = ppo.place_rewards(score, penalty, mask, score_at)
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert np.array_equal(places, states)


def test_kl_coef_is_steered_towards_its_target():
    assert ppo.adapt_kl_coef(0.3, 1.0, 1.0, 0.1) == 0.3
    assert ppo.adapt_kl_coef(0.3, 1.1, 1.0, 0.1) == pytest.approx(0.3 * 1.01)
    # Clipped at a fifth on either side.
    assert ppo.adapt_kl_coef(0.3, 9.0, 1.0, 0.1) == pytest.approx(0.3 * 1.02)
    assert ppo.adapt_kl_coef(0.3, 0.0, 1.0, 0.1) == pytest.approx(0.3 * 0.98)


class ByHand:
    """PPO's round on plain rows of tokens: one unpadded forward a row, fp64 numpy for the rest."""

    def __init__(self, learner, rollout):
        self.config = learner.config
        self.rows = []
        for ids, mask, response in zip(
            rollout.ids, rollout.mask, rollout.response_mask, strict=True
        ):
            tokens = ids[mask].tolist()
            self.rows.append((tokens, len(tokens) - int(response.sum())))
        self.ended = rollout.ended.tolist()

    def logps(self, model, row):
        tokens, n_prompt = self.rows[row]
        logits = model(torch.tensor([tokens])).logits[0, n_prompt - 1 : -1]
        log_p = (logits / self.config.temperature).log_softmax(-1)
        return log_p[torch.arange(len(log_p)), tokens[n_prompt:]]

    def values(self, model, row):
        tokens, n_prompt = self.rows[row]
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        every = model.score(hidden)[:, 0] - model.config.reward_offset
        return (
            every[n_prompt - 1 :]
            if self.config.score_at == "after_eos"
            else every[n_prompt - 1 : -1]
        )

    @torch.no_grad()
    def experience(self, learner):
        """Give old log-probabilities, old values, advantages and returns, a list a row."""
        old, values, advantages, returns = [], [], [], []
        for row, (tokens, _) in enumerate(self.rows):
            logps = self.logps(learner.policy, row).double().numpy()
            ref = self.logps(learner.ref, row).double().numpy()
            v = self.values(learner.value, row).double().numpy()
            judge = learner.reward
            score = judge(torch.tensor([tokens])).logits.item() - judge.config.reward_offset
            r = np.zeros(len(v))
            r[: len(logps)] = -learner.kl_coef * (logps - ref)
            r[-1] += score if self.ended[row] else self.config.missing_eos_penalty
            follow = [*v[1:], 0.0]
            delta = [r[t] + self.config.gamma * follow[t] - v[t] for t in range(len(v))]
            decay = self.config.gamma * self.config.gae_lambda
            a = [sum(decay**k * delta[t + k] for k in range(len(v) - t)) for t in range(len(v))]
            old.append(logps)
            values.append(v)
            advantages.append(np.array(a))
            returns.append(np.array(a) + v)
        on_tokens = [a[: len(o)] for a, o in zip(advantages, old, strict=True)]
        pool = np.concatenate(on_tokens)
        white = [(a - pool.mean()) / pool.std(ddof=1) for a in on_tokens]
        return old, values, white, returns

    def step(self, learner, optimizers, rows, experience):
        """Descend both losses once on some rows, token by token."""
        old, values, advantages, returns = experience
        eps, eps_value = self.config.clip_range, self.config.value_clip_range
        surrogate, errors = [], []
        for row in rows:
            for t, logp in enumerate(self.logps(learner.policy, row)):
                ratio, a = (logp - old[row][t]).exp(), advantages[row][t]
                surrogate.append(-torch.minimum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a))
            for t, v in enumerate(self.values(learner.value, row)):
                near = v.clamp(values[row][t] - eps_value, values[row][t] + eps_value)
                target = returns[row][t]
                errors.append(0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2))
        models = (learner.policy, learner.value)
        for model, terms, optimizer in zip(models, (surrogate, errors), optimizers, strict=True):
            optimizer.zero_grad()
            torch.stack(terms).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
            optimizer.step()


def relative_miss(ours, theirs, start):
    """Give ‖Δ_ours − Δ_theirs‖ / ‖Δ_theirs‖ over all weights."""
    pairs = [
        ((a - s).double(), (b - s).double())
        for a, b, s in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True)
    ]
    miss = sum((a - b).square().sum() for a, b in pairs).sqrt()
    return (miss / sum(b.square().sum() for _, b in pairs).sqrt()).item()


@pytest.mark.parametrize("score_at", ["last", "after_eos"])
def test_a_round_equals_one_by_hand(ppo_run, score_at):
    run = ppo_run(f"ppo.score_at={score_at}", "ppo.temperature=0.9", "ppo.warmup=0", "ppo.lr=1e-3")
    learner, other = make_ppo(run), make_ppo(run)
    with torch.no_grad():
        # A policy that has already left its reference, or every KL penalty would be 0.
        for model in (learner.policy, other.policy):
            for parameter in model.parameters():
                torch.manual_seed(parameter.numel())
                parameter.add_(0.02 * torch.randn_like(parameter))
    start = make_ppo(run)
    start.policy.load_state_dict(learner.policy.state_dict())
    rows = run.rows("pairs_train")[:16]
    rollout = learner.rollout(rows, 0)
    assert 0 < rollout.ended.sum() < len(rows)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 2

    measured = learner.measure(rollout)
    data = learner.experience(rollout, measured)
    hand = ByHand(other, rollout)
    expected = hand.experience(other)
    for row, (old, values, advantages, returns) in enumerate(zip(*expected, strict=True)):
        n, states = len(old), len(values)
        np.testing.assert_allclose(data.logps[row, :n], old, atol=2e-5)
        np.testing.assert_allclose(data.values[row, :states], values, atol=2e-5)
        np.testing.assert_allclose(data.advantages[row, :n], advantages, atol=2e-4)
        np.testing.assert_allclose(data.returns[row, :states], returns, atol=5e-5)
        assert data.value_mask[row].sum() == states

    config = run.config.ppo
    optimizers = [adamw(other.policy, config.lr), adamw(other.value, config.critic_lr)]
    for optimizer in (*optimizers, *learner.optimizers):
        for group in optimizer.param_groups:
            # At Adam's 1e-8 a gradient entry that cancels to rounding noise takes a full step.
            group["eps"] = 1e-6
    for batch in learner.minibatches(len(rows), 1):
        learner.update(data, batch)
        hand.step(other, optimizers, batch.tolist(), expected)
    assert relative_miss(learner.policy, other.policy, start.policy) < 5e-5
    assert relative_miss(learner.value, other.value, start.value) < 5e-5


def test_minibatches_cover_a_round_once_an_epoch_in_new_orders(ppo_run):
    learner = make_ppo(ppo_run("ppo.epochs=2", "ppo.minibatch_size=6"))
    order = [batch.tolist() for batch in learner.minibatches(16, 1)]
    assert [len(batch) for batch in order] == [6, 6, 4] * 2
    epochs = [sum(order[:3], []), sum(order[3:], [])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16)) and epochs[0] != epochs[1]
    assert [batch.tolist() for batch in learner.minibatches(16, 2)] != order


def test_prompts_come_in_the_order_of_the_pairs_and_samples_never_repeat(ppo_run):
    run = ppo_run("ppo.iterations=6", "ppo.prompts_per_iteration=24", "arm_seed=3")
    rows = run.rows("pairs_train")
    rounds = list(ppo._rounds(rows, run))
    # DPO's order at the same batch size, in its second pass as well.
    orders = list(batches(len(rows), 24, 2, 3))
    assert [[row["id"] for row in prompts] for _, prompts in rounds] == [
        [rows[i]["id"] for i in order] for order in orders
    ]
    drawn = [(sample_id, row["id"]) for sample_id, prompts in rounds for row in prompts]
    assert len(set(drawn)) == len(drawn) == 128


def test_the_stage_logs_kl_three_ways_and_keeps_snapshots(ppo_run):
    run = ppo_run("ppo.lr=1e-3")
    ppo.train_ppo(run)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(lines[2][name] > 0 for name in ("kl", "kl_k3", "entropy", "approx_kl", "length"))
    steps = sorted(path.name for path in (run.dir("ppo") / "steps").iterdir())
    assert steps == ["000008", "000012"]
    ledgers = [
        json.loads((run.dir("ppo") / "steps" / step / "ledger.json").read_text()) for step in steps
    ]
    assert [entry["prompts"] for entry in ledgers] == [32, 48] and ledgers[1]["labels"] == 64
    for entry in ledgers:
        assert entry["kl"] > 0 and entry["reverse_kl"] > 0 and entry["kl_se"] > 0
        assert 0 < entry["displacement"] <= entry["path_length"]
        assert 0 <= entry["true_reward"] <= 1 and math.isfinite(entry["proxy_reward"])
    last = load_model(run.dir("ppo") / "steps" / "000012").state_dict()
    final = load_model(run.dir("ppo")).state_dict()
    assert all(torch.equal(last[name], final[name]) for name in final)
    record = run.provenance("ppo")
    assert record["uses"]["rm"] == run.provenance("rm")["model_sha256"]
    assert record["model_copies_held"] == 4 and record["steps"] == 12


def test_the_bits_depend_on_the_seeds_alone(ppo_run):
    hashes = []
    for name, extra in (("a", []), ("b", []), ("c", ["arm_seed=1"])):
        run = ppo_run(*extra, "ppo.iterations=2", "ppo.snapshots=0", name=name)
        torch.manual_seed(len(hashes))
        ppo.train_ppo(run)
        hashes.append(run.provenance("ppo")["model_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_score_rises(ppo_run):
    run = ppo_run(
        "ppo.iterations=12",
        "ppo.prompts_per_iteration=64",
        "ppo.minibatch_size=32",
        "ppo.lr=3e-3",
        "ppo.kl_coef=0.01",
        "ppo.snapshots=0",
    )
    ppo.train_ppo(run)
    gains = [line["score"] for line in metrics(run)]
    assert np.mean(gains[-3:]) > np.mean(gains[:3]) + 0.1


def test_an_adaptive_coefficient_is_logged_and_moves(ppo_run):
    run = ppo_run("ppo.kl_target=0.5", "ppo.kl_gain=1.0", "ppo.snapshots=0")
    ppo.train_ppo(run)
    coefficients = [line["kl_coef"] for line in metrics(run)]
    # The first round is at KL 0: the error is clipped at −0.2.
    assert coefficients[:2] == pytest.approx([0.3, 0.24])
