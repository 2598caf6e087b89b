"""The reward model: a scalar head on the SFT model, fitted to preference pairs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from training.errors import TrainingError
from training.loop import adamw, batches, clip_gradients, derived_seed, n_batches, warmup_constant
from training.losses import bradley_terry_loss
from training.model import (
    encode_completion,
    encode_prompts,
    load_reward_model,
    load_tokenizer,
    pad,
)
from training.rollout import forward_inputs
from training.run import Run, Stage

Pair = tuple[list[int], list[int]]
"""Token ids of prompt + chosen and of prompt + rejected."""


def score_head(model: PreTrainedModel) -> nn.Linear:
    """Find the layer that turns a hidden state into a score.

    Raises:
        TrainingError: the architecture has no linear layer named ``score``.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise TrainingError(
            f"{type(model).__name__} has no linear head named score, which the reward and value "
            "models need; start from a decoder such as Llama, GPT-2, GPT-NeoX, Qwen or Mistral."
        )
    return head


def new_reward_model(path: Path, seed: int, pad_id: int) -> PreTrainedModel:
    """Put a new score head, with offset 0, on a causal model's weights."""
    verbosity = transformers_logging.get_verbosity()
    try:
        # It would report at length that the head is new, as it should be.
        transformers_logging.set_verbosity_error()
        model = load_reward_model(path)
    finally:
        transformers_logging.set_verbosity(verbosity)
    head = score_head(model)
    generator = torch.Generator().manual_seed(derived_seed(seed, "score head"))
    # w ~ N(0, 1/√(d + 1))  (Stiennon et al. 2020; Huang et al. 2024, reward model details)
    std = 1 / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
    model.config.pad_token_id = pad_id
    model.config.reward_offset = 0.0
    return model


def offset(model: PreTrainedModel) -> float:
    """Read what is subtracted from the raw scores of a reward model (0 where none is stored).

    The classifiers of transformers have no bias, so the shift is a field of ``config.json``:
    AutoModelForSequenceClassification gives the raw score, and every difference of two scores is
    the same with and without it.
    """
    return float(getattr(model.config, "reward_offset", 0.0))


def hidden_scores(
    model: PreTrainedModel, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """Apply the score head at every position, and the offset."""
    hidden = model.base_model(**forward_inputs(model.base_model, ids, mask)).last_hidden_state
    raw: Tensor = score_head(model)(hidden)
    return raw.squeeze(-1).float() - offset(model)


def scores(
    model: PreTrainedModel, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Score whole responses: the head at each row's last token that is not padding."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return hidden_scores(model, ids, mask).gather(1, last[:, None]).squeeze(1)


def encode_pairs(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Tokenize rows of ``prompt``, ``chosen`` and ``rejected``; answers end with the end token."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    return [
        (
            prompt + encode_completion(tokenizer, row["chosen"]),
            prompt + encode_completion(tokenizer, row["rejected"]),
        )
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def pair_scores(
    model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Score the chosen and the rejected answers in one forward pass."""
    ids, mask = pad([c for c, _ in pairs] + [r for _, r in pairs], pad_id, "right")
    chosen, rejected = scores(model, ids.to(model.device), mask.to(model.device)).chunk(2)
    return chosen, rejected


@torch.inference_mode()
def score_all(
    model: PreTrainedModel, pairs: Sequence[Pair], pad_id: int, batch_size: int = 128
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """Score many pairs, batch by batch, on the CPU."""
    parts = [
        pair_scores(model, pairs[i : i + batch_size], pad_id)
        for i in range(0, len(pairs), batch_size)
    ]
    return torch.cat([c for c, _ in parts]).cpu(), torch.cat([r for _, r in parts]).cpu()


def calibration_error(margins: Float[Tensor, " pairs"], bins: int = 10) -> float:
    """Give the expected calibration error of σ(r_w − r_l) as the probability of the label.

    ECE = Σ_b (n_b/N) |accuracy_b − confidence_b| over equal bins of confidence in [½, 1]
    (Guo et al. 2017, eq. 3); in [0, ½].
    """
    p = margins.double().sigmoid()
    confidence, correct = torch.maximum(p, 1 - p), (p > 0.5).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, correct - confidence)
    return float(gap.abs().sum() / len(p))


def evaluate(
    model: PreTrainedModel, pairs: Sequence[Pair], prompt_lengths: Sequence[int], pad_id: int
) -> dict[str, float]:
    """Report accuracy, calibration, margin and the correlation of score with answer length."""
    chosen, rejected = score_all(model, pairs, pad_id)
    lengths = [len(c) - n for (c, _), n in zip(pairs, prompt_lengths, strict=True)]
    lengths += [len(r) - n for (_, r), n in zip(pairs, prompt_lengths, strict=True)]
    both = torch.stack([torch.cat([chosen, rejected]), torch.tensor(lengths).float()])
    # Answers of one length correlate with nothing: 0/0 is 0.
    return {
        "accuracy": float((chosen > rejected).double().mean()),
        "ece": calibration_error(chosen - rejected),
        "margin": float((chosen - rejected).double().mean()),
        "length_correlation": float(both.double().corrcoef()[0, 1].nan_to_num(nan=0.0)),
    }


def train_reward(run: Run) -> None:
    """Train the stage ``rm`` on the preference pairs, shift its scores and test it."""
    with run.stage("rm", parent="sft", data=["pairs_train", "pairs_test"]) as stage:
        tokenizer = load_tokenizer(run.dir("sft"))
        model = new_reward_model(run.dir("sft"), run.config.arm_seed, tokenizer.pad_token_id)
        pairs = encode_pairs(tokenizer, run.rows("pairs_train"))
        _fit(run, stage, model, pairs, tokenizer)
        model.eval()
        # The mean score of the reference completions, here the chosen ones, becomes 0
        # (Ouyang et al. 2022, sec. 3.5, where they are the labelers' demonstrations)
        chosen, _ = score_all(model, pairs, tokenizer.pad_token_id)
        model.config.reward_offset = float(chosen.double().mean())
        tests = run.rows("pairs_test")
        report = evaluate(
            model,
            encode_pairs(tokenizer, tests),
            [len(p) for p in encode_prompts(tokenizer, [row["prompt"] for row in tests])],
            tokenizer.pad_token_id,
        )
        report["offset"] = offset(model)
        stage.log(stage.steps, **{f"test_{name}": value for name, value in report.items()})
        stage.save(model, tokenizer, **{name: f"{value:.4g}" for name, value in report.items()})


def _fit(
    run: Run,
    stage: Stage,
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Minimise the Bradley–Terry loss over the pairs in the arms' common order."""
    config, seed = run.config.rm, run.config.arm_seed
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, config.lr, config.weight_decay)
    schedule = warmup_constant(optimizer, config.warmup)
    model.train()
    total = n_batches(len(pairs), config.batch_size, config.epochs)
    with stage.progress(total) as bar:
        for rows in batches(len(pairs), config.batch_size, config.epochs, seed):
            batch = [pairs[row] for row in rows]
            chosen, rejected = pair_scores(model, batch, tokenizer.pad_token_id)
            loss = bradley_terry_loss(chosen, rejected).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = clip_gradients(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            stage.steps += 1
            stage.tokens_seen += sum(len(c) + len(r) for c, r in batch)
            accuracy = (chosen > rejected).float().mean()
            values = torch.stack([loss.detach(), accuracy, norm.detach()]).tolist()
            stage.log(stage.steps, loss=values[0], accuracy=values[1], grad_norm=values[2])
            bar.update()
