"""Compare two checkpoints: every matrix and head, in one pass over their bytes."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from weightdiff.align import Alignment, align
from weightdiff.checkpoint import Checkpoint, open_checkpoint
from weightdiff.comparison import SCHEMA_VERSION, Comparison, load_comparison
from weightdiff.delta import Columns
from weightdiff.errors import WeightdiffError
from weightdiff.layout import Layout, lay_out
from weightdiff.rows import tensor_rows, unit_rows

__all__ = ["Comparison", "compare", "load_comparison", "unmatched"]

_SMALL = 64 << 20  # hashing this many bytes is not felt
_SLOW = 256 << 20  # reading this many is, so a progress bar shows


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    heads: bool = True,
    threads: int | None = None,
    progress: bool = True,
    sha256: bool | None = None,
) -> Comparison:
    """Measure Δ = W_b − W_a for every matrix, and every attention head unless ``heads`` is off.

    ``threads`` defaults to the CPUs of this process (or OMP_NUM_THREADS); the result does not
    depend on it. ``sha256`` hashes the weight files too, by default only small ones. Tensors that
    only one side has are listed in ``meta``.

    Raises:
        WeightdiffError: If a checkpoint cannot be read, or the two share no tensor.
    """
    from weightdiff import stream

    started = time.perf_counter()
    sides = open_checkpoint(a), open_checkpoint(b)
    layouts = lay_out(sides[0], heads=heads), lay_out(sides[1], heads=heads)
    aligned = align(*layouts)
    if not aligned.pairs:
        raise WeightdiffError(_nothing_shared(sides, aligned))
    size = stream.nbytes(aligned.pairs)
    with _progress(size, enabled=progress and size >= _SLOW) as advance:
        sums = stream.measure(
            aligned.pairs, threads=threads or stream.threads_available(), progress=advance
        )
    tensors = tensor_rows(aligned.pairs, sums)
    units = unit_rows(aligned.pairs, sums, layouts[0].heads or layouts[1].heads, tensors)
    meta = _meta(sides, layouts, aligned, sha256)
    meta["warnings"] = _warnings(sides, aligned, layouts, tensors)
    meta["seconds"] = round(time.perf_counter() - started, 3)
    return Comparison(tensors, units, meta)


@contextmanager
def _progress(total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show bytes, rate and time left on stderr when it is a terminal."""
    if not enabled:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total, unit="B", unit_scale=True, desc="comparing", disable=None, leave=False
    ) as bar:
        yield lambda done: bar.update(done) and None


def _nothing_shared(sides: tuple[Checkpoint, Checkpoint], aligned: Alignment) -> str:
    if aligned.reshaped:
        one = aligned.reshaped[0]
        why = f"{one['tensor']} is {list(one['a'])} in one and {list(one['b'])} in the other"
    else:
        why = f"one has {next(iter(sides[0].tensors))}, the other {next(iter(sides[1].tensors))}"
    return (
        f"{sides[0].path} and {sides[1].path} share no tensor of one name and shape ({why}); "
        "compare two checkpoints of one architecture"
    )


def _meta(
    sides: tuple[Checkpoint, Checkpoint],
    layouts: tuple[Layout, Layout],
    aligned: Alignment,
    sha256: bool | None,
) -> dict[str, Any]:
    heads = layouts[0].heads or layouts[1].heads
    meta: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for name, side, layout in zip("ab", sides, layouts, strict=True):
        hashed = side.nbytes <= _SMALL if sha256 is None else sha256
        meta[name] = {
            "path": str(side.path),
            "model_type": side.config.get("model_type"),
            "named_as": layout.family,
            "files": [file.name for file in side.files],
            "nbytes": side.nbytes,
            "sha256": side.sha256 if hashed else None,
        }
    meta["heads"] = vars(heads) if heads else None
    meta["added"], meta["removed"] = aligned.added, aligned.removed
    meta["reshaped"], meta["ties"] = aligned.reshaped, aligned.ties
    for name in ("buffers", "refused"):
        meta[name] = {s: getattr(at, name) for s, at in zip("ab", layouts, strict=True)}
    meta["versions"] = {"python": platform.python_version(), "weightdiff": version("weightdiff")}
    return meta


def unmatched(meta: Mapping[str, Any]) -> int:
    """Count the tensors that could not be compared, whatever the reason."""
    refused = meta["refused"]
    return sum(
        map(len, (meta["added"], meta["removed"], meta["reshaped"], refused["a"], refused["b"]))
    )


def _warnings(
    sides: tuple[Checkpoint, Checkpoint],
    aligned: Alignment,
    layouts: tuple[Layout, Layout],
    tensors: Columns,
) -> list[str]:
    """Say in sentences what a reader must know before believing a number."""
    said = list(aligned.ties)
    for names, what in ((aligned.removed, "only in A"), (aligned.added, "only in B")):
        if names:
            said.append(f"{len(names)} tensors {what}, such as {names[0]}")
    if aligned.reshaped:
        one = aligned.reshaped[0]
        said.append(
            f"{len(aligned.reshaped)} tensors differ in shape, such as {one['tensor']}: "
            f"{list(one['a'])} in A and {list(one['b'])} in B"
        )
    for name, layout in zip("AB", layouts, strict=True):
        for one in layout.refused:
            said.append(f"{one['tensor']} of {name} left out: {one['reason']}")
    unknown = [
        m for m, c in zip(tensors["matrix"], tensors["component"], strict=True) if c == "other"
    ]
    if unknown:
        said.append(f"{len(unknown)} tensors of unknown role under 'other', such as {unknown[0]}")
    if layouts[0].heads is None and layouts[1].heads is None:
        said.append("no config.json with a head count, so heads are not told apart")
    said += [pair.note for pair in aligned.pairs if pair.note]
    flags = tensors["flags"].tolist()
    for flag, text in (
        ("nonfinite", "hold NaN or inf, which are left out of the sums and counted"),
        ("within-rounding", "differ by no more than twice what rounding to the other dtype does"),
    ):
        if count := sum(flag in f.split(",") for f in flags):
            said.append(f"{count} matrices {text}")
    tokenizers = [side.sidecar("tokenizer.json") for side in sides]
    if all(t.is_file() for t in tokenizers) and len({t.read_bytes() for t in tokenizers}) > 1:
        said.append("the two tokenizers differ: rows of embeddings may mean different tokens")
    return said
