"""Finding tensors on disk: every layout of files, and files that lie."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightdiff.checkpoint import open_checkpoint
from weightdiff.errors import WeightdiffError
from weightdiff.stream import Source

W = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read(path: Path) -> dict[str, bytes]:
    source, got = Source(), {}
    for name, tensor in open_checkpoint(path).tensors.items():
        buffer = bytearray(tensor.nbytes)
        source.read_into(tensor, 0, memoryview(buffer))
        got[name] = bytes(buffer)
    source.close()
    return got


def test_a_directory_and_a_lone_file_give_the_same_tensors(save) -> None:
    directory = save("one", W, {"model_type": "llama"})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.tensors["a"].shape == (2, 3)
    assert checkpoint.nbytes == 40
    lone = open_checkpoint(directory / "model.safetensors")
    assert lone.tensors == checkpoint.tensors
    assert lone.config == checkpoint.config
    assert read(directory) == {name: value.tobytes() for name, value in W.items()}


def test_shards_with_and_without_an_index(tmp_path: Path, to_bytes) -> None:
    for name, value in W.items():
        (tmp_path / f"part-{name}.safetensors").write_bytes(to_bytes({name: value}))
    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]
    index = {"weight_map": {name: f"part-{name}.safetensors" for name in W}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read(tmp_path) == {name: value.tobytes() for name, value in W.items()}


def test_the_hash_sees_every_byte(save) -> None:
    one, same = save("one", W), save("same", W)
    other = save("other", W | {"b": W["b"] * 2})
    hashes = [open_checkpoint(path).sha256 for path in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pickle_is_mapped_and_its_code_is_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {"a": torch.arange(6.0).reshape(2, 3).t(), "h": torch.ones(3, dtype=torch.bfloat16)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["a"].shape == (3, 2)
    assert checkpoint.tensors["h"].dtype == "BF16"
    assert read(tmp_path)["a"] == state["a"].contiguous().numpy().tobytes()

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    bad = tmp_path / "bad"
    bad.mkdir()
    torch.save({"a": Evil()}, bad / "model.pt")
    (bad / "other.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("model.pt", "other.pt"):
        with pytest.raises(WeightdiffError, match="plain tensors"):
            open_checkpoint(bad / name)
    assert not (tmp_path / "run").exists()


BROKEN = {
    "empty": (b"", "not a whole safetensors"),
    "short": (b"\x01\x02", "not a whole safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_without_a_header(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightdiffError, match=message):
        open_checkpoint(path)


HOSTILE = {
    "past the end": ({"w": entry(offsets=(0, 8)), "v": entry(offsets=(8, 16))}, "cut short"),
    "overlap": ({"w": entry(), "v": entry(offsets=(4, 12))}, "overlap"),
    "negative offset": ({"w": entry(offsets=(-8, 0))}, "malformed"),
    "backwards": ({"w": entry(offsets=(8, 0))}, "malformed"),
    "negative shape": ({"w": entry(shape=(-1, -2))}, "malformed"),
    "float shape": ({"w": entry(shape=(2.0,))}, "malformed"),
    "true shape": ({"w": entry(shape=(True, 2))}, "malformed"),
    "wrong size": ({"w": entry(shape=(3,))}, "needs 12 bytes"),
    "wrong dtype size": ({"w": entry(dtype="BF16")}, "needs 4 bytes"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "malformed"),
    "not an entry": ({"w": 3}, "malformed"),
    "three offsets": ({"w": entry(offsets=(0, 4, 8))}, "malformed"),
    "a list": ([1, 2], "expected a JSON object"),
    "no json": (b"{'w': 1}", "cannot be read"),
    "deep": (b"[" * 200_000, "cannot be read"),
    "twice": (b'{"w": {}, "w": {}}', "twice"),
    "nothing": ({}, "no tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies(case: str, tmp_path: Path) -> None:
    header, message = HOSTILE[case]
    path = write(tmp_path / "x.safetensors", header, bytes(12))
    with pytest.raises(WeightdiffError, match=message) as caught:
        open_checkpoint(path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(length: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": entry()}, bytes(8), length)
    with pytest.raises(WeightdiffError, match="not a whole safetensors"):
        open_checkpoint(path)


def test_zero_size_and_scalar_tensors(tmp_path: Path) -> None:
    header = {"none": entry(shape=(0, 4), offsets=(0, 0)), "one": entry(shape=(), offsets=(0, 4))}
    tensors = open_checkpoint(write(tmp_path / "x.safetensors", header, bytes(4))).tensors
    assert [tensors[name].numel for name in ("none", "one")] == [0, 1]


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", "gone.safetensors"])
def test_an_index_that_points_elsewhere(shard: str, tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    write(tmp_path / "x.safetensors", {"w": entry()}, bytes(8))
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(WeightdiffError, match="outside its directory|missing"):
        open_checkpoint(inside)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": [1]}', '{"weight_map": {"w": 1}}', "x"])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightdiffError, match="weight_map|cannot be read"):
        open_checkpoint(tmp_path)


def test_an_index_that_promises_what_the_shard_lacks(tmp_path: Path, to_bytes) -> None:
    (tmp_path / "s.safetensors").write_bytes(to_bytes(W))
    index = {"weight_map": dict.fromkeys((*W, "c"), "s.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightdiffError, match="lacks tensor c"):
        open_checkpoint(tmp_path)


def test_one_tensor_in_two_files(tmp_path: Path, to_bytes) -> None:
    for name in ("x", "y"):
        (tmp_path / f"{name}.safetensors").write_bytes(to_bytes(W))
    with pytest.raises(WeightdiffError, match=r"both x\.safetensors and y\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds no weights"),
        (("config.json",), "holds no weights"),
        (("adapter_config.json", "adapter_model.safetensors"), "PEFT adapter"),
        (("__0_0.distcp",), "distributed checkpoint"),
    ],
)
def test_a_directory_that_is_no_model(files, message: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(WeightdiffError, match=message):
        open_checkpoint(tmp_path)


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(WeightdiffError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_that_shrinks_while_it_is_read(save) -> None:
    path = save("one", W)
    tensors = open_checkpoint(path).tensors
    os.truncate(path / "model.safetensors", 80)
    source = Source()
    with pytest.raises(WeightdiffError, match="became shorter"):
        source.read_into(tensors["b"], 0, memoryview(bytearray(16)))
    source.close()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_edit_of_a_file_does_more_than_raise_an_error(data, tmp_path: Path, to_bytes) -> None:
    content = bytearray(to_bytes(W))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = open_checkpoint(path).tensors
    except WeightdiffError:
        return
    size = path.stat().st_size
    for tensor in tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=4)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=4),
                st.dictionaries(
                    st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=3
                ),
            ),
            max_leaves=12,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_json_does_more_than_raise_an_error(header, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header, bytes(64))
    try:
        open_checkpoint(path)
    except WeightdiffError as error:
        assert "x.safetensors" in str(error)


def test_real_checkpoints(real_data: Path) -> None:
    from safetensors import safe_open

    path = real_data / "checkpoints" / "stories260K"
    ours = open_checkpoint(path).tensors
    with safe_open(path / "model.safetensors", framework="np") as theirs:
        assert set(ours) == set(theirs.keys())
        bits = read(path)
        for name in ours:
            assert bits[name] == theirs.get_tensor(name).tobytes()
