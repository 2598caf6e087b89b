"""Heads inside stored tensors: plant a change in one head, and only that head may move.

The models are built by transformers; where a head lies is worked out here from the model's own
forward pass, never from the table under test.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightdiff.compare import compare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
GATED = SMALL | {"intermediate_size": 48}
GQA = GATED | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 40, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16}

MODELS: dict[str, dict[str, Any]] = {
    "Llama": GQA,
    "Mistral": GQA,
    "Qwen2": GQA,
    "Qwen3": GQA | {"head_dim": 12},
    "Gemma": GQA | {"head_dim": 12},
    "Gemma2": GQA | {"head_dim": 12},
    "Gemma3": GQA | {"head_dim": 12},
    "GPT2": GPT2,
    "GPTNeoX": GATED,
}
CONFIG = {"Gemma3": "Gemma3TextConfig"}


def build(name: str) -> Any:
    config = getattr(transformers, CONFIG.get(name, f"{name}Config"))(
        **MODELS[name], bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    torch.manual_seed(0)
    made = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, made)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: no zeros, no ones
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


def rows(start: int, stop: int) -> Callable[[Any], Any]:
    return lambda weight: weight[start:stop]


def cols(start: int, stop: int) -> Callable[[Any], Any]:
    return lambda weight: weight[:, start:stop]


def place(name: str, matrix: str, head: int) -> tuple[str, Callable[[Any], Any]]:
    """The parameter of layer 1 that holds a head, and the slice of it that is the head."""
    if name == "GPT2":  # Conv1D, (in, out): q | k | v columns; c_proj reads heads by row
        if matrix == "W_O":
            return "transformer.h.1.attn.c_proj.weight", rows(8 * head, 8 * head + 8)
        start = 32 * "QKV".index(matrix[2]) + 8 * head
        return "transformer.h.1.attn.c_attn.weight", cols(start, start + 8)
    if name == "GPTNeoX":  # per head: q, k, v
        if matrix == "W_O":
            return "gpt_neox.layers.1.attention.dense.weight", cols(8 * head, 8 * head + 8)
        start = 24 * head + 8 * "QKV".index(matrix[2])
        return "gpt_neox.layers.1.attention.query_key_value.weight", rows(start, start + 8)
    d_head = MODELS[name].get("head_dim", 8)
    letter, cut = matrix[2].lower(), cols if matrix == "W_O" else rows
    return (
        f"model.layers.1.self_attn.{letter}_proj.weight",
        cut(d_head * head, d_head * (head + 1)),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[Any, Path]]:
    made: dict[str, tuple[Any, Path]] = {}

    def save(name: str) -> tuple[Any, Path]:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            model = build(name)
            model.save_pretrained(path)
            made[name] = (model, path)
        return made[name]

    return save


@pytest.mark.parametrize("matrix", ["W_Q", "W_K", "W_V", "W_O"])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_planted_head_moves(name: str, matrix: str, saved, tmp_path: Path) -> None:
    model, path = saved(name)
    shared = MODELS[name].get("num_key_value_heads", 4)
    head = 1 if matrix in ("W_K", "W_V") and shared == 2 else 2
    parameter, cut = place(name, matrix, head)
    weight = model.get_parameter(parameter)
    before = weight.detach().clone()
    with torch.no_grad():
        cut(weight).add_(0.01)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        weight.copy_(before)
    made = compare(path, tmp_path)
    moved = made.units[made.units["sumsq_delta"] > 0]
    assert moved[["layer", "matrix", "unit"]].values.tolist() == [[1, matrix, head]]
    assert moved["unit_kind"].item() == (
        "kv_head" if matrix in ("W_K", "W_V") and shared == 2 else "head"
    )
    assert moved["numel"].item() == moved["n_changed_bits"].item() == cut(before).numel()
    assert moved["sumsq_delta"].item() == pytest.approx(cut(before).numel() * 1e-4, rel=1e-3)
    rows_moved = made.tensors[made.tensors["sumsq_delta"] > 0]
    assert rows_moved[["layer", "matrix"]].values.tolist() == [[1, matrix]]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_known_and_counted_once(name: str, saved) -> None:
    model, path = saved(name)
    made = compare(path, path)
    distinct = {p.data_ptr(): p.numel() for p in model.parameters()}
    assert made.tensors["numel"].sum() == sum(distinct.values())
    assert "other" not in set(made.tensors["component"])
    assert made.meta["added"] == made.meta["removed"] == made.meta["reshaped"] == []
    assert (made.tensors["rel"] == 0).all()
    heads = made.units.groupby(["layer", "matrix"])["numel"].sum()
    whole = made.tensors.set_index(["layer", "matrix"])["numel"]
    assert (heads == whole.loc[heads.index]).all()
    # Query and output heads of a layer: as many as the config says.
    queries = made.units.query("matrix == 'W_Q' and layer == 0")
    assert queries["unit"].tolist() == list(range(4))
