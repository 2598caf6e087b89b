"""PPO from human preferences (Ouyang et al. 2022), with the details of Huang et al. 2024.

Details kept ("The N+ implementation details of RLHF with PPO"): response log-probabilities at the
sampling temperature and masked past the end token; a per-token penalty −β·k1 with the score added
at the end; a value model of its own that starts from the reward model; advantages whitened over the
round after the returns are formed; policy and value losses clipped; an answer without an end token
scored by a constant; β fixed, or steered to a KL. Left out: a pretraining-gradient mix (PPO-ptx),
several answers a prompt, learning-rate decay.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import losses
from training.config import PPOConfig
from training.ledger import Ledger, frozen, snapshot_steps
from training.loop import adamw, batches, clip_gradients, n_batches, seeded, warmup_constant
from training.model import encode_prompts, load_model, load_reward_model, load_tokenizer, pad
from training.reward import hidden_scores, scores
from training.rollout import Rollout, end_ids, response_logits, sample, uniforms
from training.run import Run

Row = Mapping[str, Any]


class Experience(NamedTuple):
    """One round of samples with everything that its updates read, all frozen."""

    rollout: Rollout
    """Prompts and sampled answers."""
    logps: Float[Tensor, "batch new"]
    """Of the sampled tokens under the policy that drew them, nats."""
    values: Float[Tensor, "batch states"]
    """V before each token; one state more, after the end, when the score sits there."""
    advantages: Float[Tensor, "batch new"]
    """Whitened over the round."""
    returns: Float[Tensor, "batch states"]
    """What the value model is regressed on."""
    value_mask: Bool[Tensor, "batch states"]
    """True on the states of each answer."""


class Measured(NamedTuple):
    """What one pass over a round's samples says, before any update."""

    logps: Float[Tensor, "batch new"]
    ref_logps: Float[Tensor, "batch new"]
    kl: Float[Tensor, "batch new"]
    """KL(π‖π_ref) at each place over the whole vocabulary, nats."""
    entropy: Float[Tensor, "batch new"]
    values: Float[Tensor, "batch states"]
    scores: Float[Tensor, " batch"]


def place_rewards(
    score: Float[Tensor, " batch"],
    penalty: Float[Tensor, "batch new"],
    mask: Bool[Tensor, "batch new"],
    score_at: str,
) -> tuple[Float[Tensor, "batch states"], Bool[Tensor, "batch states"]]:
    """Spread (rewards, mask of states) over an answer: the KL penalty, and the score at its end.

    The score is added at the last token, or one state later ("after_eos", where TRL's PPO has it).
    """
    lengths = mask.sum(1, keepdim=True)
    extra = int(score_at == "after_eos")
    states = torch.arange(mask.shape[1] + extra, device=mask.device) < lengths + extra
    rewards = F.pad(penalty.masked_fill(~mask, 0.0), (0, extra))
    # r_t = −β log(π(y_t)/π_ref(y_t)) + 1[t = T] r(x, y)  (Ouyang et al. 2022, eq. 2, per token)
    return rewards.scatter_add(1, lengths - 1 + extra, score[:, None]), states


def adapt_kl_coef(kl_coef: float, kl: float, target: float, gain: float) -> float:
    """Steer β to a target KL (Ziegler et al. 2019, sec. 2.2)."""
    # e = clip((KL − KL_target)/KL_target, ±0.2); β ← β (1 + K_β e)
    error = max(-0.2, min(0.2, (kl - target) / target))
    return kl_coef * (1 + gain * error)


class PPO:
    """The four models, two optimisers and β of one run."""

    def __init__(
        self,
        config: PPOConfig,
        policy: PreTrainedModel,
        reward: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ) -> None:
        """Freeze the reference and the reward model; start the value model from the latter."""
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self.policy, self.ref = policy, frozen(policy)
        self.value, self.reward = reward, frozen(reward)
        self.ends = end_ids(policy, tokenizer)
        self.kl_coef = config.kl_coef
        self.optimizers = [adamw(policy, config.lr), adamw(self.value, config.critic_lr)]
        self.schedules = [warmup_constant(o, config.warmup) for o in self.optimizers]

    def rollout(self, rows: Sequence[Row], sample_id: int) -> Rollout:
        """Sample one answer a prompt with the random numbers of (seed, prompt id, sample id)."""
        config, pad_id = self.config, self.tokenizer.pad_token_id
        prompts = encode_prompts(self.tokenizer, [row["prompt"] for row in rows])
        ids, mask = pad(prompts, pad_id, "left")
        device = self.policy.device
        numbers = uniforms(self.seed, [row["id"] for row in rows], sample_id, config.max_new_tokens)
        return sample(
            self.policy,
            ids.to(device),
            mask.to(device),
            config.max_new_tokens,
            self.ends,
            pad_id,
            config.temperature,
            numbers,
        )

    @torch.inference_mode()
    def measure(self, rollout: Rollout) -> Measured:
        """Run the four models over a round's samples, a minibatch at a time."""
        size = self.config.minibatch_size
        parts = [
            self._measure(rollout.ids[i : i + size], rollout.mask[i : i + size], rollout)
            for i in range(0, len(rollout.ids), size)
        ]
        return Measured(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _measure(
        self, ids: Int[Tensor, "part pos"], mask: Bool[Tensor, "part pos"], rollout: Rollout
    ) -> Measured:
        n_new, temperature = rollout.response_mask.shape[1], self.config.temperature
        logits, ref_logits = (
            response_logits(model, ids, mask, n_new) / temperature
            for model in (self.policy, self.ref)
        )
        response = ids[:, -n_new:]
        return Measured(
            losses.token_logps(logits, response),
            losses.token_logps(ref_logits, response),
            losses.exact_kl(logits, ref_logits),
            losses.entropy(logits),
            self._values(ids, mask, n_new),
            scores(self.reward, ids, mask),
        )

    def _values(
        self, ids: Int[Tensor, "part pos"], mask: Bool[Tensor, "part pos"], n_new: int
    ) -> Float[Tensor, "part states"]:
        """Give V of the state before each response token, and after the end when it is needed."""
        first = ids.shape[1] - n_new - 1
        states = n_new + int(self.config.score_at == "after_eos")
        return hidden_scores(self.value, ids, mask)[:, first : first + states]

    def experience(self, rollout: Rollout, measured: Measured) -> Experience:
        """Turn a round's samples and scores into advantages and returns."""
        config, mask = self.config, rollout.response_mask
        score = measured.scores.where(rollout.ended, config.missing_eos_penalty)
        penalty = -self.kl_coef * losses.kl_k1(measured.logps, measured.ref_logps)
        rewards, states = place_rewards(score, penalty, mask, config.score_at)
        if config.whiten_rewards:
            rewards = losses.whiten(rewards, states, shift_mean=False)
        advantages, returns = losses.gae(
            rewards, measured.values, states, config.gamma, config.gae_lambda
        )
        advantages = losses.whiten(advantages[:, : mask.shape[1]], mask)
        return Experience(rollout, measured.logps, measured.values, advantages, returns, states)

    def minibatches(self, n: int, iteration: int) -> Iterator[Tensor]:
        """Yield row numbers of each minibatch, every epoch in an order of its own."""
        for epoch in range(self.config.epochs):
            rng = seeded(self.seed, "ppo", "minibatches", iteration, epoch)
            order = torch.from_numpy(rng.permutation(n))
            for start in range(0, n, self.config.minibatch_size):
                yield order[start : start + self.config.minibatch_size]

    def update(self, data: Experience, rows: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """Take one step of both optimisers on some rows of a round; give what to log."""
        ids, mask, alive = _cut(data.rollout, rows)
        n_new = alive.shape[1]
        logits = response_logits(self.policy, ids, mask, n_new) / self.config.temperature
        logps = losses.token_logps(logits, ids[:, -n_new:])
        old_logps, advantages = data.logps[rows, :n_new], data.advantages[rows, :n_new]
        policy_loss, clipped = losses.ppo_policy_loss(
            logps, old_logps, advantages, alive, self.config.clip_range
        )
        values = self._values(ids, mask, n_new)
        states = values.shape[1]
        value_loss, value_clipped = losses.ppo_value_loss(
            values,
            data.values[rows, :states],
            data.returns[rows, :states],
            data.value_mask[rows, :states],
            self.config.value_clip_range,
        )
        norms = self._step(policy_loss, value_loss)
        approx_kl = losses.masked_mean(losses.kl_k3(old_logps, logps.detach()), alive)
        return {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "clip_fraction": clipped,
            "value_clip_fraction": value_clipped,
            "approx_kl": approx_kl,
            "policy_grad_norm": norms[0],
            "value_grad_norm": norms[1],
        }

    def _step(self, policy_loss: Tensor, value_loss: Tensor) -> list[Tensor]:
        norms = []
        models = (self.policy, self.value)
        for model, loss, optimizer, schedule in zip(
            models, (policy_loss, value_loss), self.optimizers, self.schedules, strict=True
        ):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norms.append(clip_gradients(list(model.parameters()), self.config.max_grad_norm))
            optimizer.step()
            schedule.step()
        return norms

    def summary(self, data: Experience, measured: Measured) -> dict[str, float]:
        """Describe a round before its updates: KL to the reference by three ways, score, values."""
        mask, per_answer = data.rollout.response_mask, losses.sequence_logps
        k1 = losses.kl_k1(measured.logps, measured.ref_logps)
        k3 = losses.kl_k3(measured.logps, measured.ref_logps)
        values = {
            "score": measured.scores.mean(),
            "kl": per_answer(measured.kl, mask).mean(),
            "kl_k1": per_answer(k1, mask).mean(),
            "kl_k3": per_answer(k3, mask).mean(),
            "entropy": losses.masked_mean(measured.entropy, mask),
            "length": mask.sum(1).float().mean(),
            "ended": data.rollout.ended.float().mean(),
            "explained_variance": losses.explained_variance(
                data.values, data.returns, data.value_mask
            ),
        }
        numbers = torch.stack(list(values.values())).tolist()
        return {**dict(zip(values, numbers, strict=True)), "kl_coef": self.kl_coef}


def _cut(
    rollout: Rollout, rows: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Bool[Tensor, "batch new"]]:
    """Take some rows of (ids, mask, response mask) without the padding that they all share."""
    mask, alive = rollout.mask[rows], rollout.response_mask[rows]
    n_new, first = int(alive.sum(1).max()), int(mask.any(0).int().argmax())
    end = mask.shape[1] - alive.shape[1] + n_new
    return rollout.ids[rows, first:end], mask[:, first:end], alive[:, :n_new]


def train_ppo(run: Run) -> None:
    """Train the stage ``ppo`` on the prompts of the preference pairs, in DPO's order."""
    config = run.config.ppo
    with run.stage("ppo", parent="sft", data=["pairs_train"], uses=["rm"]) as stage:
        tokenizer, rows = load_tokenizer(run.dir("sft")), run.rows("pairs_train")
        reward = load_reward_model(run.dir("rm"))
        ppo = PPO(config, load_model(run.dir("sft")), reward, tokenizer, run.config.arm_seed)
        ledger = Ledger(run, stage, ppo.policy, ppo.ref, tokenizer, rows, config.kl_prompts)
        ledger.labels = len(rows)
        # Policy, reference, reward and value model; what the ledger holds is not PPO's.
        stage.model_copies_held = 4
        kept = snapshot_steps(config.iterations, config.snapshots)
        with stage.progress(config.iterations) as bar:
            for iteration, (sample_id, prompts) in enumerate(_rounds(rows, run), start=1):
                logged = _iterate(ppo, ledger, prompts, iteration, sample_id)
                stage.steps += int(logged.pop("updates"))
                stage.log(stage.steps, iteration=float(iteration), **logged)
                bar.set_postfix(score=f"{logged['score']:.2f}", kl=f"{logged['kl']:.2f}")
                bar.update()
                if iteration in kept:
                    ledger.snapshot(stage.steps)
        stage.tokens_seen, stage.tokens_generated = ledger.tokens_trained, ledger.tokens_generated
        stage.save(ppo.policy, tokenizer, iterations=config.iterations, kl_coef=ppo.kl_coef)


def _rounds(rows: Sequence[Row], run: Run) -> Iterator[tuple[int, list[Row]]]:
    """Yield (sample id, prompts) of every iteration: passes over the rows in the arms' order."""
    size, left = run.config.ppo.prompts_per_iteration, run.config.ppo.iterations
    per_epoch = n_batches(len(rows), size, 1)
    orders = batches(len(rows), size, -(-left // per_epoch), run.config.arm_seed)
    for iteration, order in zip(range(left), orders, strict=False):
        yield iteration // per_epoch, [rows[i] for i in order]


def _iterate(
    ppo: PPO, ledger: Ledger, prompts: Sequence[Row], iteration: int, sample_id: int
) -> dict[str, float]:
    """Sample a round, update on it, and give what to log of both."""
    ppo.policy.eval()
    ppo.value.eval()
    rollout = ppo.rollout(prompts, sample_id)
    measured = ppo.measure(rollout)
    data = ppo.experience(rollout, measured)
    logged = ppo.summary(data, measured)
    steps = []
    for rows in ppo.minibatches(len(prompts), iteration):
        steps.append(ppo.update(data, rows))
        ledger.moved()
    stacked = torch.stack([torch.stack(list(step.values())) for step in steps]).mean(0)
    logged |= dict(zip(steps[0], stacked.tolist(), strict=True)) | {"updates": len(steps)}
    ledger.prompts += len(prompts)
    ledger.tokens_generated += int(rollout.response_mask.sum())
    ledger.tokens_trained += ppo.config.epochs * int(rollout.mask.sum())
    if ppo.config.kl_target is not None:
        ppo.kl_coef = adapt_kl_coef(
            ppo.kl_coef, logged["kl"], ppo.config.kl_target, ppo.config.kl_gain
        )
    return logged
