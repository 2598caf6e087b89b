"""The ledger's counts and the rule by which snapshots are matched."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import TrainingError
from training.ledger import Ledger, frozen, mean_true_reward, snapshot_steps
from training.matched import match_by_kl, nearest_pair
from training.model import load_model, load_tokenizer
from training.run import Run, Stage

kls = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


def entries(values, se=0.1):
    return [{"step": 10 * (i + 1), "kl": kl, "kl_se": se} for i, kl in enumerate(values)]


def test_snapshots_are_even_and_end_with_the_last_step():
    assert snapshot_steps(30, 10) == set(range(3, 31, 3))
    assert snapshot_steps(125, 2) == {62, 125}
    assert snapshot_steps(3, 10) == {1, 2, 3}
    assert snapshot_steps(5, 0) == set()


def test_the_furthest_pair_within_tolerance_wins_over_the_nearest():
    a, b = nearest_pair(entries([0.1, 0.5, 1.0]), entries([0.1, 0.52, 1.08, 3.0]), 0.1)
    assert (a["kl"], b["kl"]) == (1.0, 1.08)


def test_without_a_pair_in_tolerance_the_nearest_is_taken():
    a, b = nearest_pair(entries([0.1, 0.5]), entries([1.0, 4.0]), 0.1)
    assert (a["kl"], b["kl"]) == (0.5, 1.0)


@given(kls, kls, st.floats(0.01, 0.5))
@settings(max_examples=100, deadline=None)
def test_no_other_pair_is_better(first, second, tolerance):
    a, b = nearest_pair(entries(first), entries(second), tolerance)
    miss = 2 * abs(a["kl"] - b["kl"]) / (a["kl"] + b["kl"])
    for x in first:
        for y in second:
            other = 2 * abs(x - y) / (x + y)
            if miss <= tolerance:
                assert other > tolerance or x + y <= a["kl"] + b["kl"]
            else:
                assert other >= miss


def write_ledgers(run, stage, values):
    for entry in entries(values):
        directory = run.dir(stage) / "steps" / f"{entry['step']:06d}"
        directory.mkdir(parents=True)
        (directory / "ledger.json").write_text(json.dumps(entry))


def test_matched_json_names_the_snapshots_and_the_miss(arm_run):
    run = arm_run()
    write_ledgers(run, "ppo", [0.2, 1.0])
    write_ledgers(run, "dpo", [0.3, 1.05, 2.0])
    matched = match_by_kl(run)
    assert matched == json.loads((run.path / "matched.json").read_text())
    paths = {arm: snapshot["path"] for arm, snapshot in matched["snapshots"].items()}
    assert paths == {"ppo": "ppo/steps/000020", "dpo": "dpo/steps/000020"}
    assert matched["within_tolerance"] and matched["miss_nats"] == pytest.approx(-0.05)
    assert matched["miss_standard_errors"] == pytest.approx(0.05 / math.hypot(0.1, 0.1))


def test_an_arm_without_snapshots_is_an_error(arm_run):
    run = arm_run()
    write_ledgers(run, "ppo", [0.2])
    with pytest.raises(TrainingError, match="dpo has no steps"):
        match_by_kl(run)


class Kept(Stage):
    """Remembers what a stage would write."""

    def __init__(self):
        self.started = self.started_cpu = 0.0

    def snapshot(self, step, model, tokenizer, **ledger):
        self.ledger = {"step": step, **ledger}
        return Path("nowhere")


def test_path_and_displacement_of_known_moves(arm_run):
    run: Run = arm_run()
    policy, tokenizer = load_model(run.dir("sft")), load_tokenizer(run.dir("sft"))
    rows, kept = run.rows("pairs_train"), Kept()
    ledger = Ledger(run, kept, policy, frozen(policy), tokenizer, rows, 8)
    ledger.snapshot(0)
    assert kept.ledger["kl"] == kept.ledger["path_length"] == kept.ledger["displacement"] == 0
    weight = policy.model.norm.weight
    for move in (3.0, -4.0, 0.5):
        with torch.no_grad():
            weight[0] += move
        ledger.moved()
    ledger.snapshot(3)
    assert kept.ledger["path_length"] == pytest.approx(7.5)
    assert kept.ledger["displacement"] == pytest.approx(0.5)
    assert kept.ledger["kl"] > 0 and kept.ledger["kl_prompts"] == 8


def test_true_reward_is_left_out_where_rows_do_not_say_what_is_right():
    rows = [{"harmful": True}, {"harmful": False, "expected": "yes"}]
    assert mean_true_reward(rows, ["sorry . i will not help .", "no"]) == 0.5
    assert mean_true_reward([{"prompt": "hello"}], ["hi"]) is None
