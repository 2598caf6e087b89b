"""Direct preference optimisation (Rafailov et al. 2023), with cDPO's smoothing and an NLL term.

One forward pass over chosen and rejected together; the reference's log-probabilities are computed
once, before training. The two answers' log-probabilities are logged apart: both may fall while
their difference grows (likelihood displacement, Razin et al. 2024), which the NLL term counters.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from training import losses
from training.config import DPOConfig
from training.ledger import Ledger, frozen, snapshot_steps
from training.loop import adamw, batches, clip_gradients, n_batches, warmup_constant
from training.model import encode_completion, encode_prompts, load_model, load_tokenizer, pad
from training.rollout import end_ids, require_distinct_pad, response_logits
from training.run import Run

Triple = tuple[list[int], list[int], list[int]]
"""Token ids of a prompt, of its chosen and of its rejected answer."""


class Answers(NamedTuple):
    """Prompts padded on the left, answers on the right; chosen rows first, then rejected ones."""

    ids: Int[Tensor, "twice pos"]
    mask: Bool[Tensor, "twice pos"]
    response_mask: Bool[Tensor, "twice new"]


def encode_triples(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[Triple]:
    """Tokenize rows of ``prompt``, ``chosen`` and ``rejected``; answers end with the end token."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    return [
        (
            prompt,
            encode_completion(tokenizer, row["chosen"]),
            encode_completion(tokenizer, row["rejected"]),
        )
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def collate(triples: Sequence[Triple], pad_id: int) -> Answers:
    """Stack the chosen and the rejected answers of a batch under their prompts."""
    prompts, prompt_mask = pad([p for p, _, _ in triples] * 2, pad_id, "left")
    answers = [c for _, c, _ in triples] + [r for _, _, r in triples]
    responses, response_mask = pad(answers, pad_id, "right")
    return Answers(
        torch.cat([prompts, responses], 1),
        torch.cat([prompt_mask, response_mask], 1),
        response_mask,
    )


def answer_logps(model: PreTrainedModel, answers: Answers) -> Float[Tensor, "twice new"]:
    """Give the log-probability of every answer token, nats, in one forward pass."""
    n_new = answers.response_mask.shape[1]
    device = model.device
    logits = response_logits(model, answers.ids.to(device), answers.mask.to(device), n_new)
    return losses.token_logps(logits, answers.ids[:, -n_new:].to(device))


@torch.inference_mode()
def reference_logps(
    ref: PreTrainedModel, triples: Sequence[Triple], pad_id: int, batch_size: int
) -> Float[Tensor, "pairs 2"]:
    """Sum the reference's log-probabilities of every (chosen, rejected), in the pairs' order."""
    parts = []
    for start in range(0, len(triples), batch_size):
        answers = collate(triples[start : start + batch_size], pad_id)
        logps = answer_logps(ref, answers).cpu()
        sums = losses.sequence_logps(logps, answers.response_mask)
        parts.append(torch.stack(sums.chunk(2), 1))
    return torch.cat(parts)


def batch_loss(
    policy: PreTrainedModel,
    answers: Answers,
    ref_logps: Float[Tensor, "pairs 2"],
    config: DPOConfig,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Give a batch's loss, and what to log of it."""
    logps = answer_logps(policy, answers)
    mask = answers.response_mask.to(logps.device)
    chosen, rejected = losses.sequence_logps(logps, mask).chunk(2)
    ref_chosen, ref_rejected = ref_logps.to(logps.device).unbind(1)
    dpo, chosen_rewards, rejected_rewards = losses.dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing
    )
    half = len(logps) // 2
    nll = losses.nll(logps[:half], mask[:half])
    # L = L_DPO + α L_NLL(y_w)  (Pang et al. 2024, eq. 2; α = 0: Rafailov et al. 2023)
    loss = dpo.mean() + config.nll_coef * nll
    return loss, {
        "loss": loss.detach(),
        "dpo_loss": dpo.detach().mean(),
        "nll": nll.detach(),
        "chosen_logps": chosen.detach().mean(),
        "rejected_logps": rejected.detach().mean(),
        "chosen_reward": chosen_rewards.mean(),
        "rejected_reward": rejected_rewards.mean(),
        "accuracy": (chosen_rewards > rejected_rewards).float().mean(),
    }


def train_dpo(run: Run) -> None:
    """Train the stage ``dpo`` on the preference pairs, in the arms' common order."""
    config = run.config.dpo
    with run.stage("dpo", parent="sft", data=["pairs_train"]) as stage:
        tokenizer, rows = load_tokenizer(run.dir("sft")), run.rows("pairs_train")
        policy = load_model(run.dir("sft"))
        ref, pad_id = frozen(policy), tokenizer.pad_token_id
        require_distinct_pad(pad_id, end_ids(policy, tokenizer))
        triples = encode_triples(tokenizer, rows)
        cached = reference_logps(ref, triples, pad_id, 2 * config.batch_size)
        ledger = Ledger(run, stage, policy, ref, tokenizer, rows, config.kl_prompts)
        # Policy and reference.
        stage.model_copies_held = 2
        optimizer = adamw(policy, config.lr)
        schedule = warmup_constant(optimizer, config.warmup)
        total = n_batches(len(rows), config.batch_size, config.epochs)
        kept = snapshot_steps(total, config.snapshots)
        policy.train()
        with stage.progress(total) as bar:
            for order in batches(len(rows), config.batch_size, config.epochs, run.config.arm_seed):
                answers = collate([triples[i] for i in order], pad_id)
                loss, logged = batch_loss(policy, answers, cached[order], config)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                norm = clip_gradients(list(policy.parameters()), config.max_grad_norm)
                optimizer.step()
                schedule.step()
                stage.steps += 1
                ledger.moved()
                ledger.prompts += len(order)
                ledger.labels += len(order)
                ledger.tokens_trained += int(answers.mask.sum())
                values = torch.stack([*logged.values(), norm]).tolist()
                stage.log(stage.steps, **dict(zip([*logged, "grad_norm"], values, strict=True)))
                bar.update()
                if stage.steps in kept:
                    ledger.snapshot(stage.steps)
        stage.tokens_seen = ledger.tokens_trained
        stage.save(policy, tokenizer, pairs=len(rows), beta=config.beta, nll_coef=config.nll_coef)
