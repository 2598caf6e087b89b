"""Build, save and load models and tokenizers as plain Hugging Face directories, and encode text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from training.config import ModelConfig
from training.errors import TrainingError
from training.loop import derived_seed

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<end>", "<assistant>")

ATTENTION = "eager"
"""On CPU and at the width of the built-in model a quarter faster than sdpa."""

# Two tokens follow the instruction (<end> <assistant>), as in real chat templates.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} <end>"
    "{% else %}<assistant> {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(words: Sequence[str], max_positions: int) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer with a chat template: a token per whitespace-separated word.

    Raises:
        ValueError: a word is given twice or is a special token.
    """
    vocabulary = [*SPECIAL_TOKENS, *words]
    if len(set(vocabulary)) != len(vocabulary):
        raise ValueError("the words of a vocabulary must be distinct and not special tokens")
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<end>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> LlamaForCausalLM:
    """Make a Llama with fresh fp32 weights that depend on `seed` alone."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.d_mlp,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
        initializer_range=config.init_std,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation=ATTENTION,
        dtype="float32",
    )
    # Initialisation in transformers draws from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "init"))
        return LlamaForCausalLM(llama)


def load_model(path: Path) -> PreTrainedModel:
    """Load a causal language model in fp32 from a directory.

    Raises:
        TrainingError: the directory holds no model.
    """
    _require_weights(path)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=ATTENTION, local_files_only=True
    )


def load_reward_model(path: Path) -> PreTrainedModel:
    """Load a model with one score, read at the last token that is not padding, in fp32.

    A causal model's directory gives a new, untrained score head.

    Raises:
        TrainingError: the directory holds no model.
    """
    _require_weights(path)
    return AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        dtype=torch.float32,
        attn_implementation=ATTENTION,
        local_files_only=True,
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a model's directory and check what training relies on.

    Raises:
        TrainingError: the directory holds no tokenizer, or it has no pad token, no end token, or
            one token for both.
    """
    if not (path / "tokenizer_config.json").is_file():
        raise TrainingError(
            f"{path} holds no tokenizer_config.json; it must be a model's directory."
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None or pad == eos:
        raise TrainingError(
            f"The tokenizer in {path} needs a pad token apart from its end token "
            f"(pad {pad}, end {eos}); otherwise the end of an answer would be masked."
        )
    return tokenizer


def save_model(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str
) -> None:
    """Write a Hugging Face directory: safetensors, configs, tokenizer, and `card` as README.md."""
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text(card, encoding="utf-8")


def model_sha256(path: Path) -> str:
    """Hash a model's weight files, in the order of their names."""
    _require_weights(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Turn instructions into token ids through the chat template, ready for an answer."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    encoded: list[list[int]] = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return encoded


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """Turn an answer into token ids that end with the end token."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: str = "right"
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Fill rows of ids up to the longest; the mask is true on real tokens.

    Raises:
        ValueError: `side` is neither left nor right.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be left or right, got {side}")
    width = max(map(len, rows))
    padding = [[pad_id] * (width - len(row)) for row in rows]
    real = [[True] * len(row) for row in rows]
    if side == "left":
        ids = [[*p, *row] for p, row in zip(padding, rows, strict=True)]
        mask = [[False] * len(p) + r for p, r in zip(padding, real, strict=True)]
    else:
        ids = [[*row, *p] for p, row in zip(padding, rows, strict=True)]
        mask = [r + [False] * len(p) for p, r in zip(padding, real, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def positions(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Number the real tokens of each row from 0; padding on the left gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _require_weights(path: Path) -> None:
    if not any(path.glob("*.safetensors")):
        raise TrainingError(f"{path} holds no *.safetensors; it must be a model's directory.")
