"""Writing results so that a file under its final name is always a whole one."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightdiff.errors import WeightdiffError


def output_dir(path: str | os.PathLike[str]) -> Path:
    """Make ``path`` (with its parents) and check that files can be created in it.

    Raises:
        WeightdiffError: it is a file, cannot be made, or cannot be written to.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # os.access answers for the real user and lies on some network mounts: try it instead.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise WeightdiffError(
            f"cannot write to the output directory {directory} ({error.strerror}); "
            "choose another one with --out"
        ) from error
    return directory


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its name when the block ends well.

    The content is flushed to the disk before the rename; when the block raises, the temporary
    file is removed and whatever stood at ``path`` before is untouched.
    """
    final = Path(path)
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(final)
    except OSError as error:
        raise WeightdiffError(
            f"cannot write {final} ({error.strerror or error}); nothing was left under that name"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as strict JSON, whole or not at all; NaN and infinities become null."""
    write_text(path, dump_json(value) + "\n")


def dump_json(value: Any) -> str:
    """Return ``value`` as strict JSON text; NaN and infinities become null.

    Accepts NumPy scalars and arrays, paths, and anything with ``tolist``.
    """
    return json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
