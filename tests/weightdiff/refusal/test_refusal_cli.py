import json

import pytest
from click.testing import CliRunner

from weightdiff.cli import main


@pytest.fixture(scope="module")
def files(planted_hf, tokenizer, harmful, harmless, tmp_path_factory):
    """A checkpoint directory, prompt files and a lexicon, as a user has them."""
    root = tmp_path_factory.mktemp("cli")
    planted_hf.save_pretrained(root / "ckpt")
    tokenizer.save_pretrained(root / "ckpt")
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        rows = [{"id": p.id, "prompt": p.text, "cluster": p.cluster} for p in prompts]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "empty.txt").write_text("\n")
    words = {"refusal_tokens": ["sorry"], "refusal_phrases": ["never"]}
    (root / "lexicon.json").write_text(json.dumps({**words, "compliance_phrases": ["gladly"]}))
    return root


def call(files, *more, harmless="harmless.jsonl", ckpt="ckpt"):
    args = ["refusal", str(files / ckpt), "--harmful", str(files / "harmful.jsonl")]
    args += ["--harmless", str(files / harmless), "--lexicon", str(files / "lexicon.json")]
    args += ["--max-new-tokens", "4", "--random", "1", *map(str, more)]
    return CliRunner().invoke(main, args)


def test_json_is_one_document(files, tmp_path):
    result = call(files, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["picks"]["affine"]["passed"]
    row = next(
        r
        for r in document["effects"]
        if (r["intervention"], r["prompts"], r["control"]) == ("affine", "harmful", "")
    )
    assert (row["refusal_rate"], row["compliance_rate"]) == (0.0, 1.0)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "candidates.parquet",
        "completions.jsonl",
        "direction.json",
        "direction.safetensors",
        "effects.parquet",
        "refusal.html",
    }


def test_the_table_fits_a_narrow_terminal(files, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = call(files)
    assert result.exit_code == 0, result.stderr
    assert "affine" in result.stdout and "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "change, message",
    [
        ({"harmless": "empty.txt"}, "holds no prompt"),
        ({"harmless": "none.txt"}, "cannot read"),
        ({"ckpt": "none"}, "no checkpoint"),
    ],
)
def test_bad_input_is_one_sentence(files, change, message):
    result = call(files, **change)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
