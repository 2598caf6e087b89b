"""What an arm has used and where it stands: the ledger that every snapshot carries."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.kl import KL, KLMeter
from training.loop import derived_seed, seeded
from training.model import load_reward_model
from training.reward import scores
from training.run import Run, Stage
from training.world import true_reward

Row = Mapping[str, Any]


def snapshot_steps(total: int, snapshots: int) -> set[int]:
    """Spread snapshots evenly over steps 1 … total, the last step always among them."""
    count = min(snapshots, total)
    return {round(total * (i + 1) / count) for i in range(count)}


class Ledger:
    """Counts an arm's consumption and measures it against the reference at snapshots.

    The fixed prompts of the KL meter are drawn from ``rows`` by the run's seed, so that all arms
    are measured on the same ones with the same random numbers.
    """

    def __init__(
        self,
        run: Run,
        stage: Stage,
        policy: PreTrainedModel,
        ref: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        n_prompts: int,
    ) -> None:
        """Draw the prompts and the reference's answers; the policy still stands at ``ref``."""
        self.stage, self.policy, self.ref, self.tokenizer = stage, policy, ref, tokenizer
        seed = run.config.seed
        picked = seeded(seed, "ledger", "prompts").permutation(len(rows))[:n_prompts]
        self.rows = [rows[i] for i in picked]
        self.meter = KLMeter(
            ref,
            tokenizer,
            self.rows,
            seed=derived_seed(seed, "ledger", "rollouts"),
            max_new_tokens=run.config.ppo.max_new_tokens,
        )
        judge = run.dir("rm")
        self.reward = load_reward_model(judge).eval() if judge.is_dir() else None
        self.prompts = self.labels = self.tokens_trained = self.tokens_generated = 0
        self.path_length = 0.0
        self._previous = [p.detach().clone() for p in policy.parameters()]

    @torch.no_grad()
    def moved(self) -> None:
        """Add one optimiser step to the path: Σ_t ‖θ_t − θ_{t−1}‖."""
        squares = torch.zeros((), dtype=torch.float64)
        for now, before in zip(self.policy.parameters(), self._previous, strict=True):
            squares += before.sub_(now).double().square().sum().cpu()
            before.copy_(now)
        self.path_length += math.sqrt(squares.item())

    @torch.no_grad()
    def displacement(self) -> float:
        """Give ‖θ − θ0‖, θ0 being the reference."""
        pairs = zip(self.policy.parameters(), self.ref.parameters(), strict=True)
        return math.sqrt(sum((a - b).double().square().sum().item() for a, b in pairs))

    def snapshot(self, step: int) -> Path:
        """Keep the policy with its entry under steps/."""
        entry = self.entry()
        return self.stage.snapshot(step, self.policy, self.tokenizer, **entry)

    def entry(self) -> dict[str, Any]:
        """Measure the policy and state everything used so far."""
        training = self.policy.training
        kl = self.meter.measure(self.policy.eval())
        self.policy.train(training)
        return {
            "prompts": self.prompts,
            "labels": self.labels,
            "tokens_trained": self.tokens_trained,
            "tokens_generated": self.tokens_generated,
            "path_length": self.path_length,
            "displacement": self.displacement(),
            "kl": kl.mean,
            "kl_se": kl.se,
            "reverse_kl": kl.reverse_mean,
            "reverse_kl_se": kl.reverse_se,
            "kl_prompts": len(self.rows),
            "proxy_reward": self._proxy_reward(kl),
            "true_reward": mean_true_reward(self.rows, kl.responses),
            "entropy": kl.entropy,
            "length": kl.length,
            "ended": kl.ended,
            "wall_seconds": round(time.perf_counter() - self.stage.started, 3),
            "cpu_seconds": round(time.process_time() - self.stage.started_cpu, 3),
        }

    @torch.inference_mode()
    def _proxy_reward(self, kl: KL) -> float | None:
        if self.reward is None:
            return None
        every = [scores(self.reward, r.ids, r.mask) for r in kl.rollouts]
        return float(torch.cat(every).double().mean())


def mean_true_reward(rows: Sequence[Row], responses: Sequence[str]) -> float | None:
    """Average the world's own reward; None where the rows do not say what is right."""
    if not all("harmful" in row for row in rows):
        return None
    rewards = [true_reward(row, text) for row, text in zip(rows, responses, strict=True)]
    return sum(rewards) / len(rewards)


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model that will not be trained."""
    return copy.deepcopy(model).eval().requires_grad_(False)
