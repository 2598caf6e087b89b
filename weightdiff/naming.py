"""What a stored tensor is: its name → (layer, component, matrix), by one table of families.

Adding an architecture is one row of ``FAMILIES``: where its blocks live, and for each parameter
inside a block what it is. The right-hand side is a matrix in the notation of Elhage et al. 2021
(``W_Q``, ``W_out``, ...); ``A|B`` says that the tensor holds A, then B, along its output axis, and
``A+B+C`` that it holds A, B, C in turn for every (group of) head(s).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

COMPONENTS = ("embed", "attn", "mlp", "norm", "unembed", "other")
"""The closed set of components, in the order of the forward pass."""

MATRICES = (
    "W_E", "W_pos", "ln_embed",
    "ln1", "W_Q", "W_K", "W_V", "q_norm", "k_norm", "W_O", "ln1_post",
    "ln2", "W_router", "W_gate", "W_in", "W_out", "ln2_post",
    "ln_final", "W_U", "W_score",
)  # fmt: skip
"""Every matrix, in the order of the forward pass; a bias comes right after its matrix."""

NO_LAYER = -1
"""The ``layer`` of what lies outside the blocks."""


@dataclass(frozen=True)
class Family:
    """Names of one architecture's parameters."""

    layers: str
    """Prefix of the blocks, before ``.<layer>.``; its first part may be absent in a file."""
    block: Mapping[str, str]
    """Parameter inside a block → matrix."""
    top: Mapping[str, str]
    """Parameter outside the blocks → matrix."""
    transposed: bool = False
    """Whether weights are stored (in, out), as GPT-2's Conv1D does."""
    tied: bool = False
    """Whether embeddings are tied when the config does not say."""
    prefix: str = field(default="", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", self.layers.partition(".")[0] + ".")

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Match a parameter inside a block, with or without the model's own prefix."""
        inner = self.layers.removeprefix(self.prefix)
        return re.compile(rf"(?:{re.escape(self.prefix)})?{re.escape(inner)}\.(\d+)\.(.+)")


_GATED_MLP = {"mlp.gate_proj": "W_gate", "mlp.up_proj": "W_in", "mlp.down_proj": "W_out"}
_LLAMA_BLOCK = {
    "self_attn.q_proj": "W_Q",
    "self_attn.k_proj": "W_K",
    "self_attn.v_proj": "W_V",
    "self_attn.o_proj": "W_O",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    **_GATED_MLP,
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
}
_LLAMA_TOP = {
    "model.embed_tokens": "W_E",
    "model.norm": "ln_final",
    "lm_head": "W_U",
    "score": "W_score",
}
_SANDWICH = {  # norms before and after each sub-layer
    "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ln2_post",
}

_LLAMA = Family("model.layers", _LLAMA_BLOCK, _LLAMA_TOP)
_GEMMA = Family("model.layers", _LLAMA_BLOCK, _LLAMA_TOP, tied=True)
_GEMMA2 = Family("model.layers", _LLAMA_BLOCK | _SANDWICH, _LLAMA_TOP, tied=True)
_GPT2 = Family(
    "transformer.h",
    {
        "attn.c_attn": "W_Q|W_K|W_V",
        "attn.c_proj": "W_O",
        "mlp.c_fc": "W_in",
        "mlp.c_proj": "W_out",
        "ln_1": "ln1",
        "ln_2": "ln2",
    },
    {
        "transformer.wte": "W_E",
        "transformer.wpe": "W_pos",
        "transformer.ln_f": "ln_final",
        "lm_head": "W_U",
        "score": "W_score",
    },
    transposed=True,
    tied=True,
)
_NEOX = Family(
    "gpt_neox.layers",
    {
        "attention.query_key_value": "W_Q+W_K+W_V",
        "attention.dense": "W_O",
        "mlp.dense_h_to_4h": "W_in",
        "mlp.dense_4h_to_h": "W_out",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
    },
    {
        "gpt_neox.embed_in": "W_E",
        "gpt_neox.final_layer_norm": "ln_final",
        "embed_out": "W_U",
        "lm_head": "W_U",
        "score": "W_score",
    },
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gemma3": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
}
"""``model_type`` of config.json → how its parameters are named."""

_WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+"
    r"|(?<=\.)(?:_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|language_model\.)"
    r"|^language_model\."
    r"|(?<=\.)base_layer\."
)
_BUFFERS = re.compile(
    r"(?:^|\.)(?:rotary_emb\.(?:\w+_)?inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$"
)
_EXPERT = re.compile(r"(.*\.)?experts\.(\d+)\.(.+)")


@dataclass(frozen=True, order=True)
class Role:
    """What a stored tensor is in the model."""

    layer: int
    component: str
    matrix: str
    """Matrix, or several joined by ``|`` or ``+`` when the tensor fuses them."""

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Return the matrices in it."""
        return tuple(re.split(r"[|+]", self.matrix))

    @property
    def interleaved(self) -> bool:
        """Tell whether its matrices alternate head by head."""
        return "+" in self.matrix


def clean(name: str) -> str:
    """Strip what wrappers and trainers put around a parameter's name."""
    return _WRAPPERS.sub("", name)


def is_buffer(name: str) -> bool:
    """Tell constants that some versions save (rotary frequencies, causal masks)."""
    return _BUFFERS.search(name) is not None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a configuration."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def family_of(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, Family]:
    """Return the family by ``model_type``, or else the one that knows most of the names."""
    declared = config.get("model_type"), text_config(config).get("model_type")
    for model_type in declared:
        if model_type in FAMILIES:
            return model_type, FAMILIES[model_type]
    known = Counter[str]()
    cleaned = [clean(name) for name in names]
    for model_type, family in FAMILIES.items():
        known[model_type] = sum(role(name, family).component != "other" for name in cleaned)
    best = known.most_common(1)[0][0]
    return best, FAMILIES[best]


def role(name: str, family: Family) -> Role:
    """Say what the (cleaned) parameter ``name`` is; what no row knows is ``other``."""
    inside = family.pattern.fullmatch(name)
    layer = int(inside[1]) if inside else NO_LAYER
    table, rest = (family.block, inside[2]) if inside else (family.top, name)
    stem, _, kind = rest.rpartition(".")
    matrix = table.get(stem)
    if matrix is None and not inside:
        matrix = table.get(family.prefix + stem)
    if matrix is None or kind not in ("weight", "bias"):
        return Role(layer, "other", rest)
    return Role(layer, component(matrix), matrix if kind == "weight" else _bias(matrix))


def _bias(matrix: str) -> str:
    """Name the bias of a matrix: ``W_Q`` → ``b_Q``, ``ln1`` → ``ln1.b``."""
    return matrix.replace("W_", "b_") if matrix.startswith("W_") else f"{matrix}.b"


_COMPONENT = {
    "embed": ("E", "pos"),
    "unembed": ("U", "score"),
    "mlp": ("gate", "in", "out", "router"),
    "attn": ("Q", "K", "V", "O"),
}


def component(matrix: str) -> str:
    """Return the component that a matrix (or a fusion of several) belongs to."""
    if matrix in ("q_norm", "k_norm"):
        return "attn"
    stem = re.split(r"[|+]", matrix)[0]
    if not stem.startswith("W_"):
        return "norm"
    return next(name for name, stems in _COMPONENT.items() if stem[2:] in stems)


def is_tied(config: Mapping[str, Any], family: Family) -> bool:
    """Tell whether the output embedding is the input embedding."""
    return bool(text_config(config).get("tie_word_embeddings", family.tied))


def position(what: Role) -> tuple[int, int, int, str]:
    """Return a sort key that follows the forward pass, with what is unknown last."""
    name = what.parts[0]
    stem = name.removesuffix(".b").replace("b_", "W_")
    rank = MATRICES.index(stem) if stem in MATRICES else len(MATRICES)
    section = 1 if what.layer != NO_LAYER else 0 if what.component == "embed" else 2
    return section, what.layer, 2 * rank + (stem != name), name
