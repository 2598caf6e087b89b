"""Two checkpoints end to end: frames, ties, vocabularies, files, real fine-tunes."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightdiff import stream
from weightdiff.compare import compare, load_comparison, unmatched
from weightdiff.errors import WeightdiffError

SCHEMA = """layer component matrix tensor_a tensor_b shape numel dtype_a dtype_b sumsq_delta sumsq_a
sumsq_b rel rms max_abs one_minus_cos n_changed_bits n_changed_1e-5 n_changed_rel_1e-3 ulp_hist
share_sq share_numel enrichment rounding_floor nonfinite flags""".split()


def noisy(tensors: dict[str, np.ndarray], seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: (w + 0.01 * rng.standard_normal(w.shape)).astype("f4") for n, w in tensors.items()}


def test_the_schema(save, llama) -> None:
    tensors, config = llama
    made = compare(save("a", tensors, config), save("b", noisy(tensors), config))
    assert set(SCHEMA) <= set(made.tensors.columns)
    assert {*SCHEMA, "unit_kind", "unit"} <= set(made.units.columns)
    row = made.tensors.query("layer == 1 and matrix == 'W_K'").iloc[0]
    name = "model.layers.1.self_attn.k_proj.weight"
    a, b = tensors[name].astype("f8"), noisy(tensors)[name].astype("f8")
    assert row["tensor_a"] == row["tensor_b"] == name
    assert (row["shape"], row["numel"], row["dtype_a"]) == ("4×8", 32, "F32")
    assert row["rel"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-6)
    keys = made.units.query("layer == 1 and matrix == 'W_K'")
    assert keys["unit_kind"].tolist() == ["kv_head"] * 2
    assert keys["sumsq_delta"].sum() == pytest.approx(row["sumsq_delta"], rel=1e-12)


def test_any_grouping_is_exact(save, llama) -> None:
    tensors, config = llama
    made = compare(save("a", tensors, config), save("b", noisy(tensors), config))
    everything = np.concatenate([w.ravel() for w in tensors.values()]).astype("f8")
    other = np.concatenate([w.ravel() for w in noisy(tensors).values()]).astype("f8")
    assert made.total["numel"] == everything.size
    assert made.total["rel"] == pytest.approx(
        np.linalg.norm(other - everything) / np.linalg.norm(everything), rel=1e-6
    )
    for keys in (["layer"], ["component"], ["layer", "component"], ["matrix"]):
        table = made.by(*keys)
        assert table["share_sq"].sum() == pytest.approx(1)
        assert table["share_numel"].sum() == pytest.approx(1)
        assert table["numel"].sum() == everything.size
    assert made.summary()["component"].tolist() == ["embed", "attn", "mlp", "norm"]
    with pytest.raises(WeightdiffError, match="no column 'head'"):
        made.by("head")


@pytest.mark.parametrize("dtypes", [("F32", "BF16"), ("F16", "BF16"), ("BF16", "F32")])
def test_mixed_dtypes_are_compared_by_value_and_flagged(dtypes, save, llama) -> None:
    tensors, config = llama
    made = compare(
        save("a", tensors, config, dtypes[0]), save("b", tensors, config, dtypes[1])
    ).tensors
    assert (made[["dtype_a", "dtype_b"]] == list(dtypes)).all(axis=None)
    assert (made["rounding_floor"] == 1.7e-3).all()
    # The test's bf16 truncates, whose error is up to twice that of rounding.
    within = (made["rel"] > 0) & (made["rel"] <= 2 * 1.7e-3)
    assert (made["flags"].str.contains("within-rounding") == within).all()
    assert within.any()


def test_bf16_swallows_a_small_update(save, llama) -> None:
    tensors, config = llama
    nudged = {name: (w * np.float32(1.0005)) for name, w in tensors.items()}
    in_fp32 = compare(save("a", tensors, config), save("b", nudged, config))
    in_bf16 = compare(save("c", tensors, config, "BF16"), save("d", nudged, config, "BF16"))
    assert in_fp32.total["unchanged_bits"] < 0.01 < 0.7 < in_bf16.total["unchanged_bits"]


def test_what_is_not_finite_is_flagged_and_kept_out_of_the_sums(save, llama) -> None:
    tensors, config = llama
    spoilt = noisy(tensors)
    spoilt["model.norm.weight"][:2] = np.nan, np.inf
    made = compare(save("a", tensors, config), save("b", spoilt, config))
    row = made.tensors.query("matrix == 'ln_final'").iloc[0]
    assert (row["nonfinite"], row["flags"]) == (2, "nonfinite")
    assert np.isfinite(made.tensors[["rel", "share_sq"]].to_numpy()).all()
    assert any("NaN or inf" in warning for warning in made.meta["warnings"])


class TestTies:
    def test_both_tied_counts_once(self, save, llama) -> None:
        tensors, config = llama
        stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        made = compare(save("a", tensors, config), save("b", stored, config))
        assert set(made.tensors["component"]) == {"embed", "attn", "mlp", "norm"}
        assert made.total["numel"] == sum(w.size for w in tensors.values())
        assert unmatched(made.meta) == 0

    def test_one_side_tied_compares_with_the_embedding(self, save, llama) -> None:
        tensors, config = llama
        head = tensors["model.embed_tokens.weight"] + np.float32(0.5)
        untied = save("b", tensors | {"lm_head.weight": head}, config | {
            "tie_word_embeddings": False
        })  # fmt: skip
        for a, b in ((save("a", tensors, config), untied), (untied, save("c", tensors, config))):
            made = compare(a, b)
            row = made.tensors.query("matrix == 'W_U'").iloc[0]
            assert {row["tensor_a"], row["tensor_b"]} == {
                "lm_head.weight", "model.embed_tokens.weight"
            }  # fmt: skip
            assert row["rms"] == pytest.approx(0.5, rel=1e-5)
            assert row["flags"] == "tied"
            assert unmatched(made.meta) == 0

    def test_without_a_config_a_stored_head_is_its_own(self, save) -> None:
        w = {"wte.weight": np.ones((3, 2)), "lm_head.weight": np.ones((3, 2))}
        made = compare(save("a", w), save("b", w))
        assert made.tensors["matrix"].tolist() == ["W_E", "W_U"]


def test_a_resized_vocabulary_is_compared_on_the_common_rows(save, llama) -> None:
    tensors, config = llama
    longer = dict(tensors)
    longer["model.embed_tokens.weight"] = np.vstack(
        [tensors["model.embed_tokens.weight"], np.ones((3, 8), "f4")]
    )
    made = compare(save("a", tensors, config), save("b", longer, config))
    row = made.tensors.query("matrix == 'W_E'").iloc[0]
    assert (row["rel"], row["numel"], row["shape"], row["flags"]) == (0, 88, "11×8", "resized")
    assert any("11 rows in A, 14 in B" in warning for warning in made.meta["warnings"])


def test_nothing_is_dropped_in_silence(save, llama) -> None:
    tensors, config = llama
    a = tensors | {"extra.weight": np.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": (
        np.ones(2))}  # fmt: skip
    b = tensors | {"more.weight": np.ones(3), "model.norm.weight": np.ones(9)}
    ids = tensors | {"ids": np.arange(3)}
    made = compare(save("a", a, config), save("b", b, config))
    assert made.meta["removed"] == ["extra.weight"]
    assert made.meta["added"] == ["more.weight"]
    assert [one["tensor"] for one in made.meta["reshaped"]] == ["model.norm.weight"]
    assert made.meta["buffers"]["a"] == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert unmatched(made.meta) == 3
    kinds = dict.fromkeys(ids, "F32") | {"ids": "I64"}
    made = compare(save("c", ids, config, kinds), save("d", ids, config, kinds))
    assert [one["tensor"] for one in made.meta["refused"]["a"]] == ["ids"]
    unknown = tensors | {"extra.weight": np.ones(3)}
    made = compare(save("e", unknown, config), save("f", unknown, config))
    assert made.tensors.query("component == 'other'")["matrix"].tolist() == ["extra.weight"]
    assert any("'other'" in warning for warning in made.meta["warnings"])


def test_two_architectures_share_nothing(save, llama) -> None:
    tensors, config = llama
    gpt2 = {"transformer.wte.weight": np.ones((11, 8)), "transformer.ln_f.weight": np.ones(8)}
    with pytest.raises(WeightdiffError, match="share no tensor"):
        compare(save("a", tensors, config), save("b", gpt2, {"model_type": "gpt2"}))
    with pytest.raises(WeightdiffError, match="share no tensor"):
        compare(save("c", {"model.norm.weight": np.ones(3)}), save("d", {"model.norm.weight": (
            np.ones(4))}))  # fmt: skip


def test_zero_size_and_scalar_tensors_are_rows(save) -> None:
    w = {"none": np.ones((0, 4)), "one": np.float32(3.0), "w": np.ones((2, 2))}
    made = compare(save("a", w), save("b", w)).tensors.set_index("matrix")
    assert made["numel"].to_dict() == {"one": 1, "none": 0, "w": 4}
    assert np.isfinite(made[["rel", "share_sq", "enrichment"]].to_numpy(float)).all()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(
        st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=5
    ).filter(lambda shapes: any(shapes)),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    seed=st.integers(0, 9),
)
def test_any_checkpoint_equals_itself_and_adds_up(
    shapes, dtype, seed, tmp_path_factory, to_bytes
) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("any")
    tensors = {f"t{i}.weight": rng.standard_normal(s) for i, s in enumerate(shapes)}
    other = {name: w + rng.standard_normal(w.shape) for name, w in tensors.items()}
    for name, weights in (("a", tensors), ("b", other)):
        (path / f"{name}.safetensors").write_bytes(to_bytes(weights, dtype))
    same = compare(path / "a.safetensors", path / "a.safetensors")
    assert (same.tensors[["rel", "max_abs", "n_changed_bits"]] == 0).all(axis=None)
    made = compare(path / "a.safetensors", path / "b.safetensors")
    assert made.tensors["numel"].sum() == sum(w.size for w in tensors.values())
    assert made.tensors["sumsq_delta"].sum() == pytest.approx(made.total["sumsq_delta"])


def test_the_result_does_not_depend_on_threads_or_blocks(save, llama, monkeypatch) -> None:
    tensors, config = llama
    paths = save("a", tensors, config, "BF16"), save("b", noisy(tensors), config, "BF16")
    one = compare(*paths, threads=1)
    monkeypatch.setattr(stream, "BLOCK", 64)
    monkeypatch.setattr(stream, "_INLINE", 0)
    small = [compare(*paths, threads=threads) for threads in (1, 3)]
    pd.testing.assert_frame_equal(small[0].tensors, small[1].tensors, check_exact=True)
    pd.testing.assert_frame_equal(one.units, small[0].units, rtol=1e-6)


def test_saved_and_loaded(save, llama, tmp_path: Path) -> None:
    tensors, config = llama
    made = compare(save("a", tensors, config), save("b", noisy(tensors), config))
    out = made.save(tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "compare.html", "meta.json", "tensors.parquet", "units.parquet"
    ]  # fmt: skip
    again = load_comparison(out)
    pd.testing.assert_frame_equal(again.by("layer", "component"), made.by("layer", "component"))
    pd.testing.assert_frame_equal(again.units, made.units)
    assert json.loads(again.to_json())["total"]["rel"] == made.total["rel"]
    assert again.meta["a"]["sha256"] == made.meta["a"]["sha256"] is not None
    (out / "meta.json").write_text('{"schema_version": 99}')
    with pytest.raises(WeightdiffError, match="schema version 99"):
        load_comparison(out)
    (out / "units.parquet").unlink()
    with pytest.raises(WeightdiffError, match=r"lacks units\.parquet"):
        load_comparison(out)


def test_without_heads_there_are_no_units_but_the_same_matrices(save, llama, tmp_path) -> None:
    tensors, config = llama
    paths = save("a", tensors, config), save("b", noisy(tensors), config)
    whole, heads = compare(*paths, heads=False), compare(*paths)
    assert whole.units.empty
    assert whole.tensors["matrix"].tolist() == heads.tensors["matrix"].tolist()
    np.testing.assert_allclose(whole.tensors["rel"], heads.tensors["rel"], rtol=1e-6)
    load_comparison(whole.save(tmp_path / "out")).by("layer")


def test_figures_and_notebook(save, llama) -> None:
    tensors, config = llama
    hostile = tensors | {"<script>alert(1)</script>": np.ones(2)}
    made = compare(save("a", hostile, config), save("b", noisy(hostile), config))
    heat = made.plot.heatmap()
    assert list(heat.data[0].x) == ["in", "0", "1", "out"]
    assert list(heat.data[0].y) == ["embed", "attn", "mlp", "norm", "other"]
    assert heat.data[0].z[1][1] == pytest.approx(
        made.by("layer", "component").query("layer == 0 and component == 'attn'")["rel"].item()
    )
    assert len(made.plot.heads("share_sq").data) == 4
    assert [bar.name for bar in made.plot.components().data] == [
        "share of ‖Δ‖²", "share of parameters"
    ]  # fmt: skip
    assert "<script>" not in made._repr_html_()
    assert "W_Q" in made.plot.heatmap("enrichment", by="matrix").data[0].y


def test_a_real_fine_tune(real_data: Path) -> None:
    """A character GPT, Shakespeare → finance, against numpy on the same files."""
    from safetensors.numpy import load_file

    paths = [real_data / "checkpoints" / f"owngpt-{name}" for name in ("base", "ft")]
    made = compare(*paths)
    a, b = (load_file(path / "model.safetensors") for path in paths)
    assert unmatched(made.meta) == 0
    assert made.total["numel"] == sum(w.size for w in a.values())
    for layer in range(4):
        name = f"transformer.h.{layer}.attn.c_attn.weight"
        for i, matrix in enumerate(("W_Q", "W_K", "W_V")):
            heads = made.units.query(f"layer == {layer} and matrix == '{matrix}'")["rel"]
            want = [
                np.linalg.norm((b[name] - a[name])[:, c : c + 16].astype("f8"))
                / np.linalg.norm(a[name][:, c : c + 16].astype("f8"))
                for c in range(64 * i, 64 * i + 64, 16)
            ]
            np.testing.assert_allclose(heads, want, rtol=1e-6)


def test_a_real_grouped_query_model(real_data: Path) -> None:
    path = real_data / "checkpoints" / "stories260K"
    made = compare(path, path)
    assert (made.tensors["rel"] == 0).all()
    assert made.units.groupby("matrix")["unit"].nunique().to_dict() == {
        "W_K": 4, "W_O": 8, "W_Q": 8, "W_V": 4
    }  # fmt: skip
    assert made.tensors["component"].value_counts().to_dict() == {
        "attn": 20, "mlp": 15, "norm": 11, "embed": 1
    }  # fmt: skip
