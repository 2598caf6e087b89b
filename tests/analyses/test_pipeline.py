"""One whole run of the shrunken preset, from nothing to the report."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from analyses import behaviour, refusal_track, what_changes
from analyses.run import Run
from weightdiff.cli import main


def pipeline(out: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["pipeline", "smoke", "--out", str(out), *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "smoke"
    done = pipeline(out)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out / "report.html")
    return Run(out)


def test_the_summary_holds_what_it_promises(run: Run) -> None:
    summary = json.loads((run.path / "summary.json").read_text(encoding="utf-8"))
    assert summary["schema_version"] == 1
    assert list(summary["checkpoints"]) == ["base", "sft", "ppo", "dpo"]
    for name, checkpoint in summary["checkpoints"].items():
        for cell in run.cells:
            for mode in ("greedy", "sampled"):
                rate = checkpoint["behaviour"][cell][mode]["refusal"]
                assert rate["low"] <= rate["rate"] <= rate["high"]
                assert rate["count"] == round(rate["rate"] * rate["n"])
        assert (checkpoint["kl_to_sft"] is None) == (name == "sft")
        assert (checkpoint["delta"] is None) == (name == "base")
        assert set(checkpoint["direction"]["picks"]) == {"affine", "arditi"}
        assert (checkpoint["direction"]["causal"] is None) == (name in ("base", "sft"))
        assert checkpoint["cpu_seconds"] > 0
    assert set(summary["cost"]) >= {"base", "sft", "rm", "ppo", "dpo", "analysis/behaviour"}
    assert summary["matched"]["miss_nats"] >= 0


def test_every_rate_is_a_count_of_judged_answers(run: Run) -> None:
    found = behaviour.load(run)
    again = behaviour.rates(found.answers)
    pd.testing.assert_frame_equal(found.rates, again)
    total = sum(len(run.cell(cell)) for cell in run.cells) * len(behaviour.MODES)
    assert (found.answers.groupby("checkpoint").size() == total).all()
    assert not (found.answers["refusal"] & found.answers["compliance"]).any()


def test_shares_of_every_comparison_sum_to_one(run: Run) -> None:
    moved = what_changes.load(run)
    assert list(moved.comparisons)[:4] == ["base → sft", "sft → ppo", "sft → dpo", "ppo → dpo"]
    shares = moved.by("component").groupby("step")[["share_sq", "share_numel"]].sum()
    # Shares are quotients of fp64 sums: only their rounding is left.
    assert (abs(shares - 1) < 1e-9).all().all()


def test_the_track_compares_a_direction_with_itself(run: Run) -> None:
    table = refusal_track.load(run).table.set_index("checkpoint")
    for name in run.checkpoints:
        assert table.loc[name, f"cos_{name}"] == pytest.approx(1.0, abs=1e-12)
    assert table["auroc"].between(0, 1).all()


def test_the_report_is_one_file_with_the_answers_in_it(run: Run) -> None:
    html = (run.path / "report.html").read_text(encoding="utf-8")
    assert html.count("Plotly.newPlot(") >= 10
    assert "The same prompts, side by side" in html
    assert len(html) < 15_000_000
    assert (run.path / "tables" / "rates.csv").is_file()


def test_a_second_call_computes_nothing_again(run: Run) -> None:
    watched = sorted(run.path.glob("*/provenance.json")) + sorted(
        run.path.glob("analysis/*/key.json")
    )
    before = {path: path.stat().st_mtime_ns for path in watched}
    assert pipeline(run.path).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in watched}


def test_another_config_is_refused_by_name(run: Run) -> None:
    done = pipeline(run.path, "--set", "dpo.beta=0.25")
    assert done.exit_code == 1
    assert "beta" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_the_arms_is_still_reported(run: Run, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    shutil.copytree(run.path, partial, ignore=shutil.ignore_patterns("ppo", "dpo", "analysis"))
    (partial / "matched.json").unlink()
    done = CliRunner().invoke(main, ["report", str(partial)])
    assert done.exit_code == 0, done.output
    summary = json.loads((partial / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["checkpoints"]) == ["base", "sft"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonesuch.toml"], "nonesuch.toml"),
        (["smoke", "--set", "dpo.bata=1"], "beta"),
        (["smoke", "--set", "dpo.beta=-1"], "beta"),
    ],
)
def test_a_bad_config_is_one_sentence(arguments: list[str], said: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = CliRunner().invoke(main, ["pipeline", *arguments, "--out", str(out)])
    assert done.exit_code == 1
    assert said in done.stderr
    assert not out.exists()
