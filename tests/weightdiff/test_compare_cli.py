"""``weightdiff compare`` as a user meets it: output, exit codes, errors, imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from weightdiff.cli import main


@pytest.fixture
def pair(save, llama) -> tuple[str, str]:
    tensors, config = llama
    moved = {name: w + np.float32(0.01) for name, w in tensors.items()}
    return str(save("a", tensors, config)), str(save("b", moved, config))


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, args)])


def test_tables_fit_a_terminal(pair, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(*pair)
    assert result.exit_code == 0, result.output
    for text in ("rel by layer", "components", "largest change", "attn", "enrichment", "W_E"):
        assert text in result.stdout
    assert "\x1b" not in result.stdout
    table = [line for line in result.stdout.splitlines() if not line.startswith(("A ", "B "))]
    assert max(map(len, table)) <= 80
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written without --out"


def test_many_layers_become_rows(save) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(30)]
    path = save("deep", {name: np.ones((2, 2)) for name in names})
    result = run(path, path)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()[2:])) <= 80
    assert any(line.split()[:1] == ["29"] for line in result.stdout.splitlines())


def test_json_is_one_document(pair, tmp_path: Path) -> None:
    result = run(*pair, "--json", "--out", tmp_path / "out")
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["components"][0]["component"] == "embed"
    assert len(document["units"]) == 2 * (4 + 2 + 2 + 4)
    assert len(document["tensors"]) == 20


def test_out_writes_tables_and_a_page(pair, tmp_path: Path) -> None:
    result = run(*pair, "--out", tmp_path / "deep" / "out")
    assert result.exit_code == 0
    names = sorted(path.name for path in (tmp_path / "deep" / "out").iterdir())
    assert names == ["compare.html", "meta.json", "tensors.parquet", "units.parquet"]
    html = (tmp_path / "deep" / "out" / "compare.html").read_text()
    assert "http://" not in html.split("</head>")[0]
    assert "enrichment" in html


def test_unmatched_tensors_end_with_3(pair, save, llama) -> None:
    tensors, config = llama
    fewer = dict(tensors)
    fewer.pop("model.layers.1.mlp.up_proj.weight")
    other = save("fewer", fewer, config)
    result = run(pair[0], other)
    assert result.exit_code == 3
    assert "1 tensors only in A, such as model.layers.1.mlp.up_proj.weight" in result.stderr
    assert run(pair[0], other, "--allow-unmatched").exit_code == 0


def test_checkpoints_without_a_common_tensor_end_with_1(pair, save) -> None:
    result = run(pair[0], save("other", {"x.weight": np.ones(3)}))
    assert result.exit_code == 1
    assert "share no tensor" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("kind", ["missing", "no weights", "truncated", "unwritable"])
def test_bad_input_is_one_sentence(kind: str, pair, tmp_path: Path) -> None:
    bad, args = tmp_path / "bad", []
    if kind != "missing":
        bad.mkdir()
    if kind == "truncated":
        whole = (Path(pair[0]) / "model.safetensors").read_bytes()
        (bad / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    if kind == "unwritable":
        bad, args = Path(pair[1]), ["--out", Path(pair[1]) / "config.json"]
    result = run(pair[0], bad, *args)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "bad" in result.stderr or kind == "unwritable"
    assert "Traceback" not in result.output


def test_usage_errors_end_with_2(pair) -> None:
    assert run(pair[0]).exit_code == 2
    assert run(*pair, "--threads", "0").exit_code == 2
    assert run(*pair, "--nonsense").exit_code == 2


def test_nothing_half_written_when_the_disk_is_full(pair, tmp_path: Path, monkeypatch) -> None:
    import pandas as pd

    def full(self, path, **_):
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    result = run(*pair, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_heavy_libraries_stay_out(pair) -> None:
    code = (
        "import sys; from weightdiff.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'plotly', 'scipy.sparse'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *pair],
        capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]"
