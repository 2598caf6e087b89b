"""Metrics from sums against their definitions, and the algebra they must obey."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightdiff import delta

weights = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-100, 100, width=32))


def row(a: np.ndarray, b: np.ndarray) -> delta.Columns:
    """Sum one matrix in fp64 the direct way."""
    d = b - a
    values = {
        "numel": a.size, "sumsq_delta": (d * d).sum(), "sumsq_a": (a * a).sum(),
        "sumsq_b": (b * b).sum(), "dot_a_delta": (a * d).sum(),
        "max_abs": np.abs(d).max(initial=0.0), "n_changed_bits": (a != b).sum(),
        "n_changed_1e-5": (np.abs(d) > 1e-5).sum(),
        "n_changed_rel_1e-3": (np.abs(d) > 1e-3 * np.maximum(abs(a), abs(b))).sum(),
        "nonfinite": 0,
    }  # fmt: skip
    made = {name: np.array([value]) for name, value in values.items()}
    return made | {"ulp_hist": np.array([[a.size, 0]])}


def measure(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    columns = row(a, b)
    made = delta.metrics(columns, **delta.totals(columns))
    return {name: float(values[0]) for name, values in made.items()}


def test_metrics_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 500))
    b[:100] = a[:100]
    got, d = measure(a, b), b - a
    assert got["rel"] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(a), rel=1e-12)
    assert got["rms"] == pytest.approx(np.sqrt(np.mean(d**2)), rel=1e-12)
    cos = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert got["one_minus_cos"] == pytest.approx(1 - cos, rel=1e-9)
    assert got["unchanged_bits"] == pytest.approx(0.2)
    assert (got["share_sq"], got["share_numel"], got["enrichment"]) == (1, 1, 1)


@pytest.mark.parametrize("angle", [1e-1, 1e-3, 1e-5, 1e-7])
def test_a_small_angle_keeps_its_digits(angle: float) -> None:
    rng = np.random.default_rng(1)
    a, other = rng.standard_normal((2, 1000))
    other -= (other @ a) / (a @ a) * a
    other *= np.linalg.norm(a) / np.linalg.norm(other)
    b = 1.001 * (np.cos(angle) * a + np.sin(angle) * other)
    assert measure(a, b)["one_minus_cos"] == pytest.approx(2 * np.sin(angle / 2) ** 2, rel=1e-4)


@settings(max_examples=80, deadline=None)
@given(weights)
def test_a_checkpoint_does_not_differ_from_itself(a: np.ndarray) -> None:
    got = measure(a, a.copy())
    assert (got["rel"], got["rms"], got["one_minus_cos"], got["share_sq"]) == (0, 0, 0, 0)
    assert got["unchanged_bits"] == got["unchanged_1e-5"] == got["unchanged_rel_1e-3"] == 1


@settings(max_examples=80, deadline=None)
@given(weights, st.floats(0.01, 100))
def test_the_cosine_does_not_see_scale(a: np.ndarray, scale: float) -> None:
    a = a + np.sign(a) + (a == 0)
    b = np.roll(a, 1) * np.where(np.arange(a.size) % 3 == 0, -1, 1)
    one, other = (measure(a, factor * b)["one_minus_cos"] for factor in (1, scale))
    assert other == pytest.approx(one, rel=1e-6, abs=1e-12)


def test_zero_over_zero_is_defined() -> None:
    zero, one = np.zeros(3), np.ones(3)
    assert measure(zero, zero)["rel"] == 0
    assert measure(zero, one)["rel"] == np.inf
    assert np.isnan(measure(zero, one)["one_minus_cos"])
    assert measure(one, zero)["rel"] == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(weights, min_size=1, max_size=6), st.randoms())
def test_parts_sum_to_the_whole(parts: list[np.ndarray], random) -> None:
    others = [part + random.random() for part in parts]
    rows = [row(a, b) for a, b in zip(parts, others, strict=True)]
    table = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    table["half"] = np.array([i % 2 for i in range(len(parts))])
    totals = delta.totals(table)
    whole = delta.group(table, (), **totals)
    direct = measure(np.concatenate(parts), np.concatenate(others))
    for name, value in direct.items():
        assert whole[name][0] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name
    halves = delta.group(table, ("half",), **totals)
    assert halves["share_sq"].sum() == pytest.approx(1 if totals["total_sq"] else 0)
    assert halves["share_numel"].sum() == pytest.approx(1)
    assert halves["max_abs"].max() == whole["max_abs"][0]
    assert np.array_equal(halves["ulp_hist"].sum(0), whole["ulp_hist"][0])


def test_groups_keep_the_order_of_their_first_row() -> None:
    rows = [row(np.ones(2), np.zeros(2)) for _ in range(3)]
    table = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    table["name"] = np.array(["z", "a", "z"], object)
    made = delta.group(table, ("name",), **delta.totals(table))
    assert made["name"].tolist() == ["z", "a"]
    assert made["numel"].tolist() == [4, 2]


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 8), ("F16", 11), ("F32", 24)])
def test_the_rounding_floor_is_what_rounding_does(dtype: str, bits: int) -> None:
    w = np.random.default_rng(0).standard_normal(200_000)
    mantissa, exponent = np.frexp(w)
    rounded = np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)
    floor = np.linalg.norm(rounded - w) / np.linalg.norm(w)
    assert delta.ROUNDING_FLOOR[dtype] == pytest.approx(floor, rel=0.05)
    assert delta.rounding_floor(dtype, dtype) == 0
    assert delta.rounding_floor("F32", "BF16") == delta.ROUNDING_FLOOR["BF16"]
