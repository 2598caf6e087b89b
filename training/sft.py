"""Next-token training: the base model on packed text, then SFT on prompts with answers."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from training.config import BaseConfig, SFTConfig
from training.loop import (
    adamw,
    batches,
    bucketed,
    clip_gradients,
    n_batches,
    seeded,
    trapezoid,
)
from training.losses import sft_loss
from training.model import (
    build_model,
    build_tokenizer,
    encode_completion,
    encode_prompts,
    load_model,
    load_tokenizer,
    pad,
)
from training.run import Run
from training.stage import Stage

IGNORED = -100
"""Label of a token that no loss is taken on, as in transformers."""

Encoded = tuple[list[int], list[int]]
"""A row as trainers see it: token ids, and how they are labelled."""

Batch = tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None, Int[Tensor, "batch pos"]]
"""Token ids, mask of real tokens (absent: all are real), labels in the places of the ids."""


def train_base(run: Run) -> None:
    """Train a new model on the corpus, packed into windows of equal length."""
    config = run.config.base
    with run.stage("base", parent=None, data=["corpus"]) as stage:
        words = json.loads((run.path / "data" / "vocabulary.json").read_text(encoding="utf-8"))
        tokenizer = build_tokenizer(words, run.config.model.max_positions)
        model = build_model(run.config.model, tokenizer, run.config.seed)
        texts = [row["text"] for row in run.rows("corpus")]
        stream = torch.tensor([i for ids, _ in encode_texts(tokenizer, texts) for i in ids])
        windows = draw_windows(stream, config, run.config.seed)
        ones = ((ids, None, ids) for ids in windows)
        fit(stage, model, ones, config, config.steps)
        stage.save(model, tokenizer, steps=stage.steps, tokens=stage.tokens_seen)


def train_sft(run: Run) -> None:
    """Continue the base model on prompts with answers, with some of the corpus replayed."""
    config, seed = run.config.sft, run.config.seed
    with run.stage("sft", parent="base", data=["sft", "corpus"]) as stage:
        tokenizer, model = load_tokenizer(run.dir("base")), load_model(run.dir("base"))
        answers = encode_answers(tokenizer, run.rows("sft"))
        n_replay = round(len(answers) * config.replay / (1 - config.replay))
        corpus = run.rows("corpus")
        picked = seeded(seed, "sft", "replay").permutation(len(corpus))[:n_replay]
        rows = answers + encode_texts(tokenizer, [corpus[i]["text"] for i in picked])
        orders = bucketed(
            batches(len(rows), config.batch_size, config.epochs, seed),
            [len(ids) for ids, _ in rows],
            config.bucket,
        )
        padded = (collate([rows[i] for i in order], tokenizer.pad_token_id) for order in orders)
        fit(stage, model, padded, config, n_batches(len(rows), config.batch_size, config.epochs))
        stage.save(model, tokenizer, steps=stage.steps, tokens=stage.tokens_seen)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """Encode plain texts, each between begin and end token, with a label on every token."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [([bos, *ids, eos], [IGNORED, *ids, eos]) for ids in encoded]


def encode_answers(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
    """Encode prompts with responses, labels on the response (its end token too) only."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    answers = [encode_completion(tokenizer, row["response"]) for row in rows]
    return [(p + a, [IGNORED] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]


def draw_windows(
    stream: Int[Tensor, " tokens"], config: BaseConfig, seed: int
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Yield batches of windows that start anywhere in the stream."""
    rng = seeded(seed, "base", "windows")
    offsets = torch.arange(config.context)
    for _ in range(config.steps):
        starts = torch.from_numpy(
            rng.integers(len(stream) - config.context, size=config.batch_size)
        )
        yield stream[starts[:, None] + offsets]


def collate(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad rows on the right; padding carries no label."""
    ids, mask = pad([row for row, _ in rows], pad_id, "right")
    labels, _ = pad([labels for _, labels in rows], IGNORED, "right")
    return ids, mask, labels


def fit(
    stage: Stage, model: Any, data: Iterable[Batch], config: BaseConfig | SFTConfig, steps: int
) -> None:
    """Take one AdamW step on each batch: mean cross-entropy over its labels."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, config.lr, config.weight_decay)
    schedule = trapezoid(optimizer, config.warmup, steps, config.cooldown)
    model.train()
    with stage.progress(steps) as bar:
        for step, (ids, mask, labels) in enumerate(data, start=1):
            # Padding stands on the right and attention is causal, so the mask changes no real
            # token's logits and default positions are right.
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = sft_loss(logits, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = clip_gradients(params, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            stage.steps, stage.tokens_seen = step, stage.tokens_seen + ids.numel()
            if step % 10 == 0 or step == steps:
                stage.log(step, loss=loss.item(), grad_norm=norm.item())
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
