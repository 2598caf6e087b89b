"""Checkpoints written byte by byte, so that no library stands between a test and the file."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BITS = {"F32": np.uint32, "BF16": np.uint16, "F16": np.int16}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits of fp32 values in a dtype (bf16 by truncation: any bits will do)."""
    values = np.asarray(values, np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).view(BITS[dtype])


def decode(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The fp32 values that stored bits stand for, by numpy's own rules."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaNs among arbitrary bits
        return bits.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def safetensors_bytes(
    tensors: Mapping[str, np.ndarray], dtype: str | Mapping[str, str] = "F32"
) -> bytes:
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        kind = dtype if isinstance(dtype, str) else dtype[name]
        array = np.asarray(values)
        raw = encode(array, kind).tobytes() if kind in BITS else array.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a checkpoint directory: ``save("a", tensors, config, dtype="BF16")``."""

    def write(
        name: str,
        tensors: Mapping[str, np.ndarray],
        config: Mapping[str, Any] | None = None,
        dtype: str | Mapping[str, str] = "F32",
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors, dtype))
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture
def llama() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and config of a random Llama of two layers, four heads over two, tied."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
        }.items():
            shapes[f"{prefix}.{name}.weight"] = shape
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return tensors, dict(LLAMA)


@pytest.fixture
def codec() -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """Give ``encode`` and ``decode`` to tests (modules here are not importable)."""
    return encode, decode


@pytest.fixture
def to_bytes() -> Callable[..., bytes]:
    return safetensors_bytes
