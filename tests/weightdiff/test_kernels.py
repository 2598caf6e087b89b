"""The one-pass kernel against fp64 numpy, for every pair of dtypes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightdiff import kernels

DTYPES = ("F32", "BF16", "F16")
PAIRS = list(itertools.product(DTYPES, DTYPES))


def run(a: np.ndarray, b: np.ndarray, dtypes: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    sums, hist = np.zeros((1, kernels.N_SUMS)), np.zeros((1, kernels.ULP_BINS), np.int64)
    kernels.add_block(
        a, b, 0, a.size, np.zeros(1, np.int64), np.array([0, a.size]), 0, sums, hist,
        kernels.scratch(*dtypes),
    )  # fmt: skip
    return sums[0], hist[0]


def ordered(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Integers in the order of the values, consecutive ones one ulp apart; both zeros are 0."""
    width = {"F32": 31, "BF16": 15, "F16": 15}[dtype]
    unsigned = bits.view({"F32": np.uint32}.get(dtype, np.uint16)).astype(np.int64)
    magnitude = unsigned & ((1 << width) - 1)
    return np.where(unsigned >> width, -magnitude, magnitude)


def expected(
    a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray, dtypes: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(invalid="ignore", over="ignore"):
        d32 = np.abs(y - x)
    x64, y64 = x[finite].astype(np.float64), y[finite].astype(np.float64)
    d = y64 - x64
    larger = np.maximum(np.abs(x), np.abs(y))[finite]
    changed = a != b if dtypes[0] == dtypes[1] else x.view(np.uint32) != y.view(np.uint32)
    sums = [
        (d * d).sum(), (x64 * x64).sum(), (y64 * y64).sum(), (x64 * d).sum(),
        d32[finite].max(initial=0), changed.sum(),
        (d32[finite] > np.float32(1e-5)).sum(),
        (d32[finite] > np.float32(1e-3) * larger).sum(), (~finite).sum(),
    ]  # fmt: skip
    if dtypes[0] == dtypes[1]:
        distance = np.abs(ordered(a, dtypes[0]) - ordered(b, dtypes[0]))
    else:
        step = 16 if "BF16" in dtypes else 13
        both = [ordered(v.view(np.uint32), "F32") for v in (x, y)]
        distance = np.abs(both[0] - both[1]) >> step
    bins = [int(n).bit_length() for n in distance]
    return np.array(sums), np.bincount(bins, minlength=kernels.ULP_BINS)


def check(values: tuple[np.ndarray, np.ndarray], dtypes: tuple[str, str], codec) -> None:
    encode, decode = codec
    a, b = (encode(v, dtype) for v, dtype in zip(values, dtypes, strict=True))
    x, y = decode(a, dtypes[0]), decode(b, dtypes[1])
    sums, hist = run(a.view(kernels.NUMPY_DTYPE[dtypes[0]]), b, dtypes)
    want, bins = expected(a, b, x, y, dtypes)
    # ⟨a, Δ⟩ may cancel: its error is relative to Σ|a·Δ| ≤ ‖a‖‖Δ‖.
    scale = np.maximum(np.abs(want), 0)
    scale[kernels.DOT_A_DELTA] = np.sqrt(want[kernels.SUMSQ_A] * want[kernels.SUMSQ_DELTA])
    assert np.all(np.abs(sums[:4] - want[:4]) <= 1e-6 * scale[:4])
    assert np.array_equal(sums[4:], want[4:])
    assert np.array_equal(hist, bins)


@pytest.mark.parametrize("dtypes", PAIRS, ids="-".join)
@pytest.mark.parametrize("case", ["weights", "tiny change", "subnormal", "zeros", "constant"])
def test_equals_fp64_numpy(case: str, dtypes: tuple[str, str], codec) -> None:
    rng = np.random.default_rng(len(case))
    n = 3 * kernels.CHUNK + 37
    a = (0.02 * rng.standard_normal(n)).astype(np.float32)
    step = 1e-2 if case == "weights" else 1e-5
    b = (a * (1 + step * rng.standard_normal(n))).astype(np.float32)
    if case == "subnormal":
        a, b = a * np.float32(1e-5), b * np.float32(1e-5)
    if case == "zeros":
        a[::2], b[1::2], a[::3], b[::5] = 0.0, -0.0, -0.0, 0.0
    if case == "constant":
        a[:], b[:] = 0.1, 0.1001
    check((a, b), dtypes, codec)


@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("BF16", "BF16"), ("F16", "F16")], ids="-".join)
def test_what_is_not_finite_is_left_out_and_counted(dtypes: tuple[str, str], codec) -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal(2000).astype(np.float32)
    b = a + np.float32(0.01)
    a[3], a[1500], b[7], b[1500], a[1999] = np.nan, np.inf, -np.inf, np.inf, -np.nan
    check((a, b), dtypes, codec)


def test_squares_beyond_fp32_are_summed_in_fp64(codec) -> None:
    rng = np.random.default_rng(2)
    for scale in (1e30, 1e-30, 1e-42):
        a = (rng.standard_normal(1500) * scale).astype(np.float32)
        check((a, np.flip(a)), ("F32", "F32"), codec)
    check((np.full(9, 3e38), np.full(9, -3e38)), ("F32", "F32"), codec)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_bit_pattern_of_16_bits_is_counted_right(data) -> None:
    dtype = data.draw(st.sampled_from(["BF16", "F16"]))
    words = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50)
    a = np.array(data.draw(words), np.uint16)
    b = np.array(data.draw(st.permutations(a.tolist())), np.uint16)
    bits = [v.view(kernels.NUMPY_DTYPE[dtype]) for v in (a, b)]
    _, hist = run(*bits, (dtype, dtype))
    distance = np.abs(ordered(a, dtype) - ordered(b, dtype))
    assert np.array_equal(
        hist, np.bincount([int(n).bit_length() for n in distance], minlength=kernels.ULP_BINS)
    )


def test_every_fp16_value_is_decoded(codec) -> None:
    """Sum one element at a time against zero: a² is then the value's square."""
    _, decode = codec
    bits = np.arange(2**16, dtype=np.uint16).view(np.int16)
    with np.errstate(invalid="ignore"):
        values = decode(bits, "F16").astype(np.float64)
    n = bits.size
    sums, hist = np.zeros((n, kernels.N_SUMS)), np.zeros((n, kernels.ULP_BINS), np.int64)
    kernels.add_block(
        np.zeros(n, np.int16), bits, 0, 1, np.arange(n), np.array([0, 1]), 0, sums, hist,
        kernels.scratch("F16", "F16"),
    )  # fmt: skip
    finite = np.isfinite(values)
    assert np.allclose(sums[finite, kernels.SUMSQ_B], values[finite] ** 2, rtol=3e-7, atol=0)
    assert np.array_equal(sums[finite, kernels.MAX_ABS], np.abs(values[finite]))
    assert np.array_equal(sums[:, kernels.NONFINITE] == 1, ~finite)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_and_cells_add_up_however_they_are_cut(data) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows, widths = data.draw(st.integers(1, 9)), data.draw(st.lists(st.integers(1, 5), min_size=1))
    bounds = np.cumsum([0, *widths])
    groups = np.sort(rng.integers(0, 3, rows))
    a = rng.standard_normal((rows, bounds[-1])).astype(np.float32)
    b = rng.standard_normal(a.shape).astype(np.float32)
    cells = 3 * len(widths)
    sums, hist = np.zeros((cells, kernels.N_SUMS)), np.zeros((cells, kernels.ULP_BINS), np.int64)
    cuts = sorted(data.draw(st.sets(st.integers(1, a.size), max_size=4)) | {a.size})
    start = 0
    for stop in cuts:
        part = [v.reshape(-1)[start:stop].view(np.uint32) for v in (a, b)]
        kernels.add_block(
            *part, start, a.shape[1], groups, bounds, 0, sums, hist, kernels.scratch("F32", "F32")
        )
        start = stop
    for cell in range(cells):
        group, segment = divmod(cell, len(widths))
        part = (b - a)[groups == group, bounds[segment] : bounds[segment + 1]].astype(np.float64)
        assert sums[cell, kernels.SUMSQ_DELTA] == pytest.approx((part**2).sum(), rel=1e-6)
        assert hist[cell].sum() == part.size
