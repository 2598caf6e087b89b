"""A checkpoint on disk: its weight files, the tensors in them, and its configuration."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from weightdiff.errors import WeightdiffError
from weightdiff.stored import Stored, json_object, read_file


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model by name, its ``config.json``, and the files both came from."""

    path: Path
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @cached_property
    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 over the weight files in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted(self.files, key=lambda p: p.name):
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def sidecar(self, name: str) -> Path:
        """Return the path of the file ``name`` beside the weights; it need not exist."""
        return (self.path if self.path.is_dir() else self.path.parent) / name


def open_checkpoint(reference: str | os.PathLike[str]) -> Checkpoint:
    """Locate every tensor of a checkpoint without reading any.

    ``reference`` is a directory (one ``.safetensors``, several, or an index with shards; else
    ``.bin`` files) or one ``.safetensors``, ``.bin`` or ``.pt`` file.

    Raises:
        WeightdiffError: If nothing is there, a file is cut short, a header contradicts itself or
            its file, or an index names a shard that is missing or lies outside the directory.
    """
    path = Path(reference)
    if path.is_dir():
        files, expected = _weight_files(path)
    elif path.is_file():
        files, expected = [path], {}
    else:
        raise WeightdiffError(
            f"{path} does not exist; give a local checkpoint directory or a .safetensors file"
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        for tensor in read_file(file):
            if tensor.name in tensors:
                raise WeightdiffError(
                    f"tensor {tensor.name} is in both {tensors[tensor.name].path.name} and "
                    f"{file.name} of {path}; remove the stale file or add an index"
                )
            tensors[tensor.name] = tensor
    for name, shard in expected.items():
        if name not in tensors:
            raise WeightdiffError(
                f"{shard} lacks tensor {name}, which the index of {path} places there; "
                "copy the checkpoint again"
            )
    if not tensors:
        raise WeightdiffError(f"{path} holds no tensors; give a directory with model weights")
    return Checkpoint(path, tensors, _config(path), tuple(files))


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the weight files of a directory and, where there is an index, tensor → shard."""
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        index = directory / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _shards(index)
        if (single := directory / f"{stem}{suffix}").is_file():
            return [single], {}
        several = [p for p in sorted(directory.glob(f"*{suffix}")) if not _is_sidecar(p.name)]
        if several:
            return several, {}
    several = sorted([*directory.glob("*.pt"), *directory.glob("*.pth")])
    if several:
        return several, {}
    if (directory / "adapter_config.json").is_file():
        raise WeightdiffError(
            f"{directory} holds a PEFT adapter, not a whole model; merge it first "
            "(PeftModel.merge_and_unload) and compare the result"
        )
    if any(directory.glob("*.distcp")):
        raise WeightdiffError(
            f"{directory} is a distributed checkpoint (.distcp); convert it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save first"
        )
    raise WeightdiffError(
        f"{directory} holds no weights; expected model.safetensors, its shards with "
        "model.safetensors.index.json, or pytorch_model.bin"
    )


def _is_sidecar(name: str) -> bool:
    """Tell files that accompany weights without being the model: adapters, trainers' state."""
    return name.startswith(("adapter_", "training_args", "optimizer", "scheduler", "rng_state"))


def _shards(index: Path) -> tuple[list[Path], dict[str, Path]]:
    weight_map = json_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightdiffError(f"{index} has no weight_map of tensor names to file names")
    for shard in sorted(set(weight_map.values())):
        # Checked by its parts, not resolved: a hub cache holds links to blobs elsewhere.
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise WeightdiffError(f"{index} names {shard!r}, which lies outside its directory")
        if not (index.parent / shard).is_file():
            raise WeightdiffError(
                f"{index} names {shard}, which is missing; copy the checkpoint again"
            )
    expected = {name: index.parent / shard for name, shard in weight_map.items()}
    return sorted(set(expected.values())), expected


def _config(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    return json_object(file.read_bytes(), file) if file.is_file() else {}
