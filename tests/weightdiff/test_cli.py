import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import weightdiff as wd
import weightdiff.compare
import weightdiff.judge
from weightdiff import cli

COMMANDS = ["pipeline", "train", "compare", "refusal", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(cli.main, [command, "--help"])
    assert shown.exit_code == 0
    assert shown.output.startswith("Usage: main " + command)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from weightdiff.cli import main; main(['--help'], standalone_mode=False);"
        "print([m for m in ('torch', 'transformers', 'pandas', 'plotly', 'numba')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in COMMANDS)


def test_a_misspelt_command_is_a_usage_error() -> None:
    shown = CliRunner().invoke(cli.main, ["compair"])
    assert shown.exit_code == 2
    assert "No such command 'compair'" in shown.stderr


@pytest.mark.parametrize("command", [["report"], ["compare", "runs"], ["refusal"]])
def test_a_missing_argument_is_a_usage_error(command: list[str]) -> None:
    assert CliRunner().invoke(cli.main, command).exit_code == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "x/y"), "x/y: No space left on device"),
        (ValueError("a\nb"), "ValueError: a b (run again with --debug"),
        (KeyboardInterrupt(), "interrupted"),
        (wd.WeightdiffError("no tensor", exit_code=3), "no tensor"),
    ],
)
def test_a_failure_is_one_sentence(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli.Main, "get_command", lambda *_: fails)
    shown = CliRunner().invoke(cli.main, ["fails"])
    assert shown.exit_code == getattr(error, "exit_code", 1)
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr
    assert not shown.stdout


def test_debug_stands_anywhere_and_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fails() -> None:
        raise ValueError("deep")

    monkeypatch.setattr(cli.Main, "get_command", lambda *_: fails)
    shown = CliRunner().invoke(cli.main, ["fails", "--debug"])
    assert isinstance(shown.exception, ValueError)


def test_public_names_resolve_and_functions_win_over_modules() -> None:
    for name in wd.__all__:
        assert getattr(wd, name).__module__.startswith("weightdiff.")
    # These modules are imported above; the functions of the same names must still be there.
    assert callable(wd.compare)
    assert callable(wd.judge)
    assert wd.judge("I cannot help with that.").refusal


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wd.nonsense


@pytest.mark.parametrize("name", ["no-such", "."])
def test_report_of_what_is_no_run(name: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli.main, ["report", str(tmp_path / name)])
    assert shown.exit_code == 1
    assert "is not a run directory" in shown.stderr
