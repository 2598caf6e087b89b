"""Stream the bytes of aligned tensors through the kernel: blocks, threads, reused buffers."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightdiff import kernels
from weightdiff.align import Pair
from weightdiff.errors import WeightdiffError
from weightdiff.layout import Piece
from weightdiff.stored import ITEMSIZE, Stored

BLOCK = 4 << 20
"""Bytes per read: large enough to be cheap, small enough to stay near the cache."""

_INLINE = 16 << 20  # below this many bytes a thread pool costs more than it saves

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class CellSums:
    """Sums of one pair: ``sums`` [cell, kernels.N_SUMS] fp64, ``hist`` [cell, ULP_BINS] int64."""

    sums: Array
    hist: Array


@dataclass(frozen=True)
class _Block:
    """Elements [start, start + count) of a pair."""

    pair: int
    start: int
    count: int


@dataclass(frozen=True)
class _Partial:
    """What one block adds, from cell ``first`` on."""

    block: _Block
    first: int
    sums: Array
    hist: Array
    nbytes: int


def threads_available() -> int:
    """Return how many threads this process may use, eight at most."""
    if limit := os.environ.get("OMP_NUM_THREADS", ""):
        return max(1, min(int(limit), 8)) if limit.isdigit() else 1
    available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
    return max(1, min(len(available), 8))


def measure(
    pairs: Sequence[Pair], *, threads: int, progress: Callable[[int], None] = lambda _: None
) -> list[CellSums]:
    """Read every pair once and sum it by cell.

    ``progress`` is called with the bytes that were read. Partial sums are added in the order of
    the blocks, so the result does not depend on the number of threads.

    Raises:
        WeightdiffError: If a file becomes shorter while it is read.
    """
    made = [_zeros(len(pair.grid.labels)) for pair in pairs]
    blocks = list(_blocks(pairs))
    total = sum(block.count * _itemsize(pairs[block.pair]) for block in blocks)
    with _source() as source:
        worker = _Worker(pairs, source)
        for partial in _run(worker, blocks, threads if total > _INLINE else 1):
            into = made[partial.block.pair]
            cells = slice(partial.first, partial.first + len(partial.sums))
            largest = np.maximum(
                into.sums[cells, kernels.MAX_ABS], partial.sums[:, kernels.MAX_ABS]
            )
            into.sums[cells] += partial.sums
            into.sums[cells, kernels.MAX_ABS] = largest
            into.hist[cells] += partial.hist
            progress(partial.nbytes)
    return made


def nbytes(pairs: Sequence[Pair]) -> int:
    """Return how many bytes of both sides ``measure`` will read."""
    return sum(
        pair.numel * (ITEMSIZE[pair.a.tensor.dtype] + ITEMSIZE[pair.b.tensor.dtype])
        for pair in pairs
    )


def _run(worker: "_Worker", blocks: Sequence[_Block], threads: int) -> Iterator[_Partial]:
    if threads <= 1:
        yield from map(worker, blocks)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="weightdiff")
    try:
        yield from pool.map(worker, blocks)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _itemsize(pair: Pair) -> int:
    return max(ITEMSIZE[pair.a.tensor.dtype], ITEMSIZE[pair.b.tensor.dtype])


def _blocks(pairs: Sequence[Pair]) -> Iterator[_Block]:
    for index, pair in enumerate(pairs):
        step = BLOCK // _itemsize(pair)
        for start in range(0, pair.numel, step):
            yield _Block(index, start, min(step, pair.numel - start))


def _zeros(cells: int) -> CellSums:
    return CellSums(
        np.zeros((cells, kernels.N_SUMS)), np.zeros((cells, kernels.ULP_BINS), np.int64)
    )


class Source:
    """Open files of one comparison, read by position so that threads share them."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def read_into(self, tensor: Stored, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of ``tensor`` from its byte ``start`` on.

        Raises:
            WeightdiffError: If the file has become shorter since its header was read.
        """
        if tensor.data is not None:
            buffer[:] = tensor.data[start : start + len(buffer)]
            return
        done = 0
        while done < len(buffer):
            got = os.preadv(self._open(tensor.path), [buffer[done:]], tensor.offset + start + done)
            if got == 0:
                raise WeightdiffError(
                    f"{tensor.path} became shorter while tensor {tensor.name} was read; "
                    "wait until nothing writes it and run again"
                )
            done += got

    def _open(self, path: Path) -> int:
        if path not in self._descriptors:
            descriptor = os.open(path, os.O_RDONLY)
            # Another thread may have been faster: keep the first, close ours.
            if self._descriptors.setdefault(path, descriptor) != descriptor:
                os.close(descriptor)
        return self._descriptors[path]

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


@contextmanager
def _source() -> Iterator[Source]:
    """Yield a :class:`Source` and close its files at the end."""
    opened = Source()
    try:
        yield opened
    finally:
        opened.close()


class _Worker:
    """Read one block of both sides into this thread's buffers and sum it."""

    def __init__(self, pairs: Sequence[Pair], source: Source) -> None:
        self._pairs, self._source, self._local = pairs, source, threading.local()

    def __call__(self, block: _Block) -> _Partial:
        pair = self._pairs[block.pair]
        grid, dtypes = pair.grid, (pair.a.tensor.dtype, pair.b.tensor.dtype)
        if not hasattr(self._local, "buffers"):
            # Ones, not empty: pages are faulted in here, once, and reused for every block.
            self._local.buffers = [np.ones(BLOCK, np.uint8) for _ in range(2)]
        values = [
            self._read(piece.tensor, block, buffer)
            for piece, buffer in zip((pair.a, pair.b), self._local.buffers, strict=True)
        ]
        first, last = _cells(grid, block)
        zeros = _zeros(last - first)
        kernels.add_block(
            *values, block.start, grid.row_length, grid.row_cell, grid.col_bounds,
            first, zeros.sums, zeros.hist, kernels.scratch(*dtypes),
        )  # fmt: skip
        return _Partial(block, first, zeros.sums, zeros.hist, sum(v.nbytes for v in values))

    def _read(self, tensor: Stored, block: _Block, buffer: Array) -> Array:
        size = ITEMSIZE[tensor.dtype]
        into = buffer[: block.count * size]
        self._source.read_into(tensor, block.start * size, into.data)
        return into.view(kernels.NUMPY_DTYPE[tensor.dtype])


def _cells(grid: Piece, block: _Block) -> tuple[int, int]:
    """Return the range of cells that a block touches (their order follows the rows')."""
    n_segments = len(grid.col_bounds) - 1
    last = block.start + block.count - 1
    top, bottom = (
        grid.row_cell[block.start // grid.row_length],
        grid.row_cell[last // grid.row_length],
    )
    return int(top) * n_segments, (int(bottom) + 1) * n_segments
