"""The one-pass sums behind every elementwise metric, compiled by numba, without torch.

Stored values arrive as integers whose NumPy type says what they encode: ``uint16`` is bf16,
``int16`` is fp16, ``uint32`` is fp32. Differences are formed in fp32; sums are fp32 within
``CHUNK`` elements (vectorised) and fp64 across chunks. A chunk that holds something fp32 cannot
carry (NaN, inf, an overflowing square, values near the underflow) is summed again in fp64, element
by element, with the non-finite ones left out and counted.
"""

from typing import Any, no_type_check

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload

CHUNK = 1024
"""Elements per vectorised run: 32 additions per lane keep fp32 sums within 5e-7."""

SUMSQ_DELTA, SUMSQ_A, SUMSQ_B, DOT_A_DELTA, MAX_ABS = 0, 1, 2, 3, 4
N_CHANGED_BITS, N_CHANGED_1E5, N_CHANGED_REL, NONFINITE = 5, 6, 7, 8
N_SUMS = 9
"""Columns of the sums; all but MAX_ABS add up."""

ULP_BINS = 33
"""Bin 0 counts distance 0, bin k distances in [2^(k-1), 2^k)."""

NUMPY_DTYPE = {"BF16": np.uint16, "F16": np.int16, "F32": np.uint32}

_TINY = np.float32(1e-15)  # squares of anything smaller lose digits in fp32
_FASTMATH = {"reassoc", "contract", "nsz"}  # vectorise sums; NaN and inf keep their meaning


@intrinsic
@no_type_check
def _float_of(typing_context, bits):
    """Reinterpret 32 bits as fp32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@intrinsic
@no_type_check
def _bits_of(typing_context, value):
    """Reinterpret fp32 as 32 bits."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@no_type_check
def _value(stored):  # pragma: no cover - replaced by the overload below
    raise NotImplementedError


@overload(_value)
@no_type_check
def _overload_value(stored):
    """Decode one stored element to fp32, exactly."""
    if stored == types.uint16:  # bf16 is the upper half of fp32
        return lambda stored: _float_of(np.uint32(np.uint32(stored) << np.uint32(16)))
    if stored == types.uint32:
        return lambda stored: _float_of(stored)

    def fp16(stored):
        magnitude = np.uint32(np.uint32(np.uint16(stored)) & np.uint32(0x7FFF))
        sign = np.uint32(np.uint32(np.uint16(stored) & np.uint16(0x8000)) << np.uint32(16))
        shifted = np.uint32(magnitude << np.uint32(13))
        normal = np.uint32(shifted + np.uint32(112 << 23))
        # Subnormal: the mantissa over 2^10, by a subtraction that is exact.
        small = _float_of(np.uint32(shifted + np.uint32(113 << 23))) - _float_of(
            np.uint32(113 << 23)
        )
        bits = normal if magnitude >= np.uint32(0x0400) else _bits_of(small)
        bits = np.uint32(bits + np.uint32(112 << 23)) if magnitude >= np.uint32(0x7C00) else bits
        return _float_of(np.uint32(bits | sign))

    return fp16


@no_type_check
def _ulps(x, y):  # pragma: no cover - replaced by the overload below
    raise NotImplementedError


@overload(_ulps)
@no_type_check
def _overload_ulps(x, y):
    """Count the representable values between two stored elements (+0 and -0 are one value).

    Of two dtypes the coarser counts: a step of bf16 is 2^16 of fp32, one of fp16 2^13.
    """
    if x == y and x == types.uint32:

        def fp32(x, y):
            p, q = np.uint32(x & np.uint32(0x7FFFFFFF)), np.uint32(y & np.uint32(0x7FFFFFFF))
            opposite = np.uint32(x ^ y) > np.uint32(0x7FFFFFFF)
            return np.uint32(p + q) if opposite else np.uint32(max(p, q) - min(p, q))

        return fp32
    if x == y:

        def half(x, y):
            p, q = np.uint16(x) & np.uint16(0x7FFF), np.uint16(y) & np.uint16(0x7FFF)
            opposite = (np.uint16(x) ^ np.uint16(y)) > np.uint16(0x7FFF)
            return np.uint16(p + q) if opposite else np.uint16(max(p, q) - min(p, q))

        return half
    shift = 16 if types.uint16 in (x, y) else 13

    def mixed(x, y):
        s, t = _bits_of(_value(x)), _bits_of(_value(y))
        p, q = np.uint32(s & np.uint32(0x7FFFFFFF)), np.uint32(t & np.uint32(0x7FFFFFFF))
        opposite = np.uint32(s ^ t) > np.uint32(0x7FFFFFFF)
        steps = np.uint32(p + q) if opposite else np.uint32(max(p, q) - min(p, q))
        return np.uint32(steps >> np.uint32(shift))

    return mixed


@no_type_check
def _differ(x, y):  # pragma: no cover - replaced by the overload below
    raise NotImplementedError


@overload(_differ)
@no_type_check
def _overload_differ(x, y):
    """Compare bits of one dtype, values of two."""
    if x == y:
        return lambda x, y: x != y
    return lambda x, y: _bits_of(_value(x)) != _bits_of(_value(y))


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
@no_type_check
def _fast_sums(a, b):
    """Sum over one chunk in fp32 lanes; the largest |d| comes back as bits, so that NaN shows."""
    dd, aa, bb, ad = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    n_abs, n_rel, largest = np.int32(0), np.int32(0), np.uint32(0)
    for i in range(a.size):
        x, y = _value(a[i]), _value(b[i])
        d = y - x
        dd += d * d
        aa += x * x
        bb += y * y
        ad += x * d
        size = abs(d)
        largest = max(largest, _bits_of(size))
        n_abs = np.int32(n_abs + (size > np.float32(1e-5)))
        n_rel = np.int32(n_rel + (size > np.float32(1e-3) * max(abs(x), abs(y))))
    return dd, aa, bb, ad, n_abs, n_rel, largest


@njit(nogil=True, cache=True)
@no_type_check
def _careful_sums(a, b, sums):
    """Sum over one chunk in fp64, leaving out and counting what is not finite."""
    for i in range(a.size):
        x, y = _value(a[i]), _value(b[i])
        if not (np.isfinite(x) and np.isfinite(y)):
            sums[NONFINITE] += 1
            continue
        d = np.float64(y) - np.float64(x)
        sums[SUMSQ_DELTA] += d * d
        sums[SUMSQ_A] += np.float64(x) * np.float64(x)
        sums[SUMSQ_B] += np.float64(y) * np.float64(y)
        sums[DOT_A_DELTA] += np.float64(x) * d
        size = abs(y - x)
        sums[MAX_ABS] = max(sums[MAX_ABS], np.float64(size))
        sums[N_CHANGED_1E5] += size > np.float32(1e-5)
        sums[N_CHANGED_REL] += size > np.float32(1e-3) * max(abs(x), abs(y))


@njit(nogil=True, cache=True)
@no_type_check
def _ulp_distances(a, b, ulps):
    """Write every distance; return the number of changed elements and the largest distance."""
    changed, largest = np.int32(0), ulps[0]
    for i in range(a.size):
        distance = _ulps(a[i], b[i])
        ulps[i] = distance
        largest = max(largest, distance)
        changed = np.int32(changed + _differ(a[i], b[i]))
    return changed, largest


@njit(nogil=True, cache=True)
@no_type_check
def _count_from(ulps, threshold):
    count = np.uint16(0)  # as narrow as the lanes: CHUNK fits
    for i in range(ulps.size):
        count = np.uint16(count + np.uint16(ulps[i] >= threshold))
    return count


@njit(nogil=True, cache=True)
@no_type_check
def _add_chunk(a, b, sums, hist, ulps):
    """Add one chunk of at most CHUNK elements, all of one cell."""
    dd, aa, bb, ad, n_abs, n_rel, largest = _fast_sums(a, b)
    infinite = np.uint32(0x7F800000)
    d_max = _float_of(largest)
    faint = np.float32(a.size) * _TINY * _TINY
    fragile = largest >= infinite or not np.isfinite(dd + aa + bb + ad)
    fragile |= (largest > 0 and d_max < _TINY) or aa < faint or bb < faint
    if fragile:
        _careful_sums(a, b, sums)
    else:
        sums[SUMSQ_DELTA] += dd
        sums[SUMSQ_A] += aa
        sums[SUMSQ_B] += bb
        sums[DOT_A_DELTA] += ad
        sums[MAX_ABS] = max(sums[MAX_ABS], np.float64(d_max))
        sums[N_CHANGED_1E5] += n_abs
        sums[N_CHANGED_REL] += n_rel
    distances = ulps[: a.size]
    changed, furthest = _ulp_distances(a, b, distances)
    sums[N_CHANGED_BITS] += changed
    above, threshold, k = a.size, np.uint64(1), 0
    while above > 0:
        beyond = 0
        if threshold <= furthest:
            beyond = np.int64(_count_from(distances, ulps.dtype.type(threshold)))
        hist[k] += above - beyond
        above, threshold, k = beyond, np.uint64(threshold * np.uint64(2)), k + 1


@njit(nogil=True, cache=True)
@no_type_check
def add_block(a, b, start, row_length, row_cell, col_bounds, first_cell, sums, hist, ulps):
    """Add the elements ``start``, ``start + 1``, ... of two tensors to the sums of their cells.

    ``a``, ``b`` hold stored values; ``row_length``, ``row_cell``, ``col_bounds`` are those of
    ``layout.Piece``; row 0 of ``sums`` [cell, N_SUMS] and ``hist`` [cell, ULP_BINS] is the cell
    ``first_cell``; ``ulps`` is scratch for CHUNK distances.
    """
    n_segments = col_bounds.size - 1
    row, col = start // row_length, start % row_length
    segment = np.searchsorted(col_bounds, col, side="right") - 1
    i = 0
    while i < a.size:
        take = min(col_bounds[segment + 1] - col, a.size - i, CHUNK)
        cell = row_cell[row] * n_segments + segment - first_cell
        _add_chunk(a[i : i + take], b[i : i + take], sums[cell], hist[cell], ulps)
        i += take
        col += take
        if col == col_bounds[segment + 1]:
            segment += 1
            if segment == n_segments:
                segment, col, row = 0, 0, row + 1


def scratch(dtype_a: str, dtype_b: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return room for one chunk's distances: 16 bits where both sides have 16 of one dtype."""
    narrow = dtype_a == dtype_b and dtype_a != "F32"
    return np.zeros(CHUNK, np.uint16 if narrow else np.uint32)
