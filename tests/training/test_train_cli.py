import subprocess
import sys

import pytest
from click.testing import CliRunner

from training.cli import STAGES, train
from training.config import load_config
from training.run import PARENTS


def test_stages_are_those_of_the_run():
    assert tuple(PARENTS) == STAGES


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom training.cli import train\n"
        "try:\n    train(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CONFIG is a preset" in done.stdout


def test_training_prints_the_directory_and_nothing_else(tmp_path):
    arguments = ["smoke", "--out", str(tmp_path / "run"), "--until", "base", "--seed", "3"]
    arguments += ["--set", "base.steps=4", "--set", "world.corpus_sentences=200"]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'run'}\n"
    config = load_config(tmp_path / "run" / "config.toml")
    assert (config.seed, config.base.steps, config.name) == (3, 4, "smoke")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 1, "neither a file nor a preset"),
        (["--set", "ppo.bta=1"], 1, "Unknown config key ppo.bta"),
        (["--set", "nothing"], 1, "key=value"),
        (["--seed", "-1"], 2, "--seed"),
        (["--until", "grpo"], 2, "--until"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, code, words):
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
