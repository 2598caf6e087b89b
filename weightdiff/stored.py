"""The tensors of one weight file: where each one's bytes are, read only when asked for.

The safetensors header is parsed here, because importing torch costs more than comparing two small
checkpoints does. Files come from strangers: whatever a header says is checked against the file.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightdiff.errors import WeightdiffError

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of safetensors' dtypes; others (sub-byte ones) are located but never read."""

_MAX_HEADER = 100_000_000
"""The format's own limit on the length of the header, in bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that has not been read: ``nbytes`` bytes at ``offset`` of ``path``, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    data: memoryview | None = None
    """The bytes themselves when they came out of a pickle (mapped, not loaded)."""

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


def read_file(path: Path) -> list[Stored]:
    """Locate every tensor of a ``.safetensors`` file or a torch pickle.

    Raises:
        WeightdiffError: If the file is cut short or contradicts itself, or a pickle holds code.
    """
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> list[Stored]:
    """Parse and check the header: 8 bytes of length, JSON, then the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise WeightdiffError(
                f"{path} is not a whole safetensors file: it has {size} bytes and claims a header "
                f"of {max(length, 0)}; download or save it again"
            )
        header = json_object(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = [_entry(path, name, value, start, size) for name, value in header.items()]
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.nbytes and tensor.offset < end:
            raise WeightdiffError(
                f"{path}: the bytes of tensor {tensor.name} overlap another tensor's; "
                "the header is corrupt, save the file again"
            )
        end = max(end, tensor.offset + tensor.nbytes)
    return tensors


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Stored:
    """Check one line of the header against the file and itself."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        well_formed = isinstance(dtype, str) and all(type(n) is int for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed or min((*shape, begin, end)) < 0 or end < begin:
        raise WeightdiffError(
            f"{path}: the header's entry for tensor {name} is malformed; save the file again"
        )
    if start + end > size:
        raise WeightdiffError(
            f"{path} is cut short: tensor {name} ends at byte {start + end} of {size}; "
            "download or copy it again"
        )
    expected = math.prod(shape) * ITEMSIZE.get(dtype, 0)
    if dtype in ITEMSIZE and expected != end - begin:
        raise WeightdiffError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} needs {expected} "
            f"bytes, the header gives it {end - begin}; save the file again"
        )
    return Stored(name, dtype, shape, path, start + begin, end - begin)


def json_object(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object in which no key occurs twice; ``path`` is named in the error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise WeightdiffError(f"{path} names {twice!r} twice; save the file again")
        return made

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightdiffError(f"{path} is corrupt: its JSON cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise WeightdiffError(f"{path} is corrupt: expected a JSON object")
    return value


def _read_pickle(path: Path) -> list[Stored]:
    """Map the tensors of a torch pickle; no code in it is run (``weights_only``)."""
    import torch

    try:
        # Only the zip format (torch ≥ 1.6) can be mapped; older files are loaded whole.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightdiffError(
            f"{path} cannot be read as a checkpoint of plain tensors ({reason}); "
            "save it as safetensors"
        ) from error
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise WeightdiffError(f"{path} holds no dictionary of tensors; save a state_dict")
    codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    codes |= {torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}
    tensors = []
    for name, tensor in loaded.items():
        if isinstance(tensor, torch.Tensor):
            dense = tensor.detach().contiguous()
            data = (
                dense.reshape(-1).view(torch.uint8).numpy().data
                if dense.numel()
                else memoryview(b"")
            )
            tensors.append(
                Stored(
                    str(name), codes.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape),
                    path, 0, len(data), data,
                )
            )  # fmt: skip
    return tensors
