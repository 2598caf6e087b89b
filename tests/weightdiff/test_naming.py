"""Names of parameters → what they are, for every family of the table."""

import pytest

from weightdiff import naming
from weightdiff.naming import FAMILIES, NO_LAYER, Role, clean, family_of, is_buffer, is_tied, role

CASES = {
    "llama": {
        "model.embed_tokens.weight": (NO_LAYER, "embed", "W_E"),
        "model.layers.3.self_attn.q_proj.weight": (3, "attn", "W_Q"),
        "model.layers.3.self_attn.q_proj.bias": (3, "attn", "b_Q"),
        "model.layers.12.mlp.gate_proj.weight": (12, "mlp", "W_gate"),
        "model.layers.0.post_attention_layernorm.weight": (0, "norm", "ln2"),
        "model.norm.weight": (NO_LAYER, "norm", "ln_final"),
        "lm_head.weight": (NO_LAYER, "unembed", "W_U"),
        "score.weight": (NO_LAYER, "unembed", "W_score"),
        "layers.1.self_attn.o_proj.weight": (1, "attn", "W_O"),
        "embed_tokens.weight": (NO_LAYER, "embed", "W_E"),
        "model.layers.1.adapter.weight": (1, "other", "adapter.weight"),
        "vision.patch.weight": (NO_LAYER, "other", "vision.patch.weight"),
    },
    "qwen3": {"model.layers.0.self_attn.q_norm.weight": (0, "attn", "q_norm")},
    "gemma2": {
        "model.layers.0.post_attention_layernorm.weight": (0, "norm", "ln1_post"),
        "model.layers.0.pre_feedforward_layernorm.weight": (0, "norm", "ln2"),
    },
    "gpt2": {
        "transformer.h.2.attn.c_attn.weight": (2, "attn", "W_Q|W_K|W_V"),
        "transformer.h.2.attn.c_attn.bias": (2, "attn", "b_Q|b_K|b_V"),
        "h.2.ln_1.bias": (2, "norm", "ln1.b"),
        "wpe.weight": (NO_LAYER, "embed", "W_pos"),
    },
    "gpt_neox": {
        "gpt_neox.layers.4.attention.query_key_value.weight": (4, "attn", "W_Q+W_K+W_V"),
        "embed_out.weight": (NO_LAYER, "unembed", "W_U"),
    },
}


@pytest.mark.parametrize("family", CASES)
def test_roles(family: str) -> None:
    for name, expected in CASES[family].items():
        got = role(name, FAMILIES[family])
        assert (got.layer, got.component, got.matrix) == expected, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_names_matrices_of_the_closed_set(family: str) -> None:
    row = FAMILIES[family]
    for matrix in (*row.block.values(), *row.top.values()):
        assert naming.component(matrix) in naming.COMPONENTS
        assert all(part in naming.MATRICES for part in Role(0, "attn", matrix).parts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("model._fsdp_wrapped_module.norm.weight", "model.norm.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
         "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.submodule.weight", "model.submodule.weight"),
    ],
)  # fmt: skip
def test_wrappers_are_stripped(name: str, expected: str) -> None:
    assert clean(name) == expected


def test_buffers_are_told_from_biases() -> None:
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.bias",
                 "h.3.attn.masked_bias", "gpt_neox.layers.0.attention.bias"):  # fmt: skip
        assert is_buffer(name)
    for name in ("transformer.h.0.attn.c_attn.bias", "model.layers.0.self_attn.q_proj.bias"):
        assert not is_buffer(name)


def test_the_family_is_declared_or_guessed() -> None:
    assert family_of({"model_type": "gemma2"}, [])[0] == "gemma2"
    assert family_of({"text_config": {"model_type": "qwen3"}}, [])[0] == "qwen3"
    assert family_of({"model_type": "new"}, CASES["gpt_neox"])[0] == "gpt_neox"
    assert family_of({}, ["h.0.attn.c_attn.weight", "wte.weight"])[1] is FAMILIES["gpt2"]


def test_ties_come_from_the_config_or_the_family() -> None:
    assert is_tied({}, FAMILIES["gpt2"])
    assert not is_tied({"tie_word_embeddings": False}, FAMILIES["gpt2"])
    assert not is_tied({}, FAMILIES["llama"])
    assert is_tied({"text_config": {"tie_word_embeddings": True}}, FAMILIES["llama"])


def test_rows_follow_the_forward_pass() -> None:
    family = FAMILIES["llama"]
    names = ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight",
             "model.layers.0.mlp.down_proj.weight", "x.weight", "model.embed_tokens.weight",
             "model.layers.1.self_attn.q_proj.bias"]  # fmt: skip
    ordered = sorted((role(n, family) for n in names), key=naming.position)
    assert [r.matrix for r in ordered] == [
        "W_E", "W_out", "W_Q", "b_Q", "ln_final", "W_U", "x.weight"
    ]  # fmt: skip
