import json

import numpy as np
import pandas as pd
import pytest
import torch

from weightdiff.controls import covariance_directions, permuted_directions, random_directions
from weightdiff.direction import load_direction, refusal_direction
from weightdiff.effects import causal_effects, project
from weightdiff.errors import WeightdiffError
from weightdiff.refusal import refusal
from weightdiff.score import kl_divergence, refusal_log_odds
from weightdiff.selection import select_direction


@pytest.fixture(scope="module")
def found(planted, harmful, harmless, lexicon):
    return refusal_direction(planted, harmful, harmless, lexicon=lexicon, max_new_tokens=4)


@pytest.mark.parametrize("run, n_layers", [("qwen-1_8b-chat", 24), ("llama-2-7b-chat-hf", 32)])
def test_the_published_choice_is_reproduced(real_data, run, n_layers):
    directory = real_data / "peer_runs" / run
    scores = json.loads((directory / "direction_evaluations.json").read_text())
    chosen = json.loads((directory / "direction_metadata.json").read_text())
    kept = json.loads((directory / "direction_evaluations_filtered.json").read_text())
    selection = select_direction(scores, n_layers, rule="arditi")
    assert selection.pick == (chosen["pos"], chosen["layer"])
    got = selection.kept[["pos", "layer", "ablation", "addition", "kl"]].to_numpy().tolist()
    assert got == [list(row.values()) for row in kept]
    assert len(selection.candidates) == len(scores)


def candidates(**changes):
    rows = [
        {"pos": -1, "layer": layer, "ablation": -float(layer), "addition": 1.0, "kl": 0.01}
        | {"affine": -float(layer), "affine_kl": 0.01, "norm": 1.0}
        for layer in range(4)
    ]
    for layer, change in changes.items():
        rows[int(layer[1:])] |= change
    return pd.DataFrame(rows)


def test_every_gate_names_its_reason_and_the_rules_differ():
    table = candidates(l0={"norm": 0.0}, l1={"kl": 0.2, "affine_kl": 0.0}, l2={"addition": -1.0})
    arditi, affine = (select_direction(table, 4, rule) for rule in ("arditi", "affine"))
    assert arditi.pick is None and not arditi.passed
    reasons = arditi.candidates.set_index("layer")["discarded"]
    assert reasons[0] == "zero norm" and reasons[1] == "KL 0.2 > 0.1"
    assert reasons[2] == "addition -1 < 0" and reasons[3] == "layer 3 is one of the last"
    # Nothing is left, and yet there is a ranking: by score, what has no norm last.
    assert arditi.candidates["layer"].tolist() == [3, 2, 1, 0]
    assert affine.pick == (-1, 3)
    assert affine.kept["layer"].tolist() == [3, 1]


def test_scores_that_are_not_numbers_come_last():
    selection = select_direction(candidates(l3={"affine": np.nan}), 4, "affine")
    assert selection.pick == (-1, 2)
    assert selection.candidates["layer"].tolist()[-1] == 3


def test_answers_outweigh_the_first_token():
    fine = {"affine_compliance": 1.0, "affine_harmless": 1.0, "addition_refusal": 0.98}
    shallow = {"affine_compliance": 0.1, "affine_harmless": 1.0, "addition_refusal": 1.0}
    table = candidates(l0=fine, l1=fine, l2=fine, l3=shallow)
    selection = select_direction(table, 4, "affine")
    assert selection.pick == (-1, 2)
    assert "10% of the answers comply" in selection.candidates["discarded"].iloc[-1]


def test_missing_columns_are_an_error():
    with pytest.raises(ValueError, match="affine"):
        select_direction(
            [{"pos": -1, "layer": 0, "ablation": 0, "addition": 0, "kl": 0}], 2, "affine"
        )


def test_log_odds_and_kl_against_plain_formulas():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(-1)
    share = p[:, [2, 7]].sum(-1)
    torch.testing.assert_close(refusal_log_odds(logits, [2, 7]), (share / (1 - share)).log())
    compat = torch.log(share + 1e-8) - torch.log(1 - share + 1e-8)
    torch.testing.assert_close(refusal_log_odds(logits, [2, 7], eps_compat=True), compat)
    q = (2 * logits).softmax(-1)
    torch.testing.assert_close(kl_divergence(logits, 2 * logits), (p * (p / q).log()).sum(-1))
    # Exact far outside of what 1 − p can hold.
    assert float(refusal_log_odds(torch.tensor([100.0, 0.0]), [0])) == pytest.approx(100.0)


def test_the_planted_direction_is_found(found, planted_axis):
    assert found.layer >= 1 and found.passed
    assert abs(float(found.unit @ planted_axis.double())) > 0.999
    assert found.by("arditi").layer == 1
    zero = found.candidates.set_index(["pos", "layer"])["discarded_affine"]
    assert zero[(-1, 0)].startswith("zero norm")


def test_it_causes_refusal_and_random_directions_do_not(planted, found, harmful, harmless, lexicon):
    effects = causal_effects(
        planted, found, harmful, harmless, lexicon, max_new_tokens=4, n_random=2
    )
    table = effects.table.set_index(["intervention", "control", "draw", "prompts"])

    def rates(name, prompts, control="", draw=0):
        row = table.loc[(name, control, draw, prompts)]
        return row["refusal_rate"], row["compliance_rate"]

    assert rates("none", "harmful") == (1, 0) and rates("none", "harmless") == (0, 1)
    for name in ("zero", "affine"):
        assert rates(name, "harmful") == (0, 1) and rates(name, "harmless") == (0, 1)
    assert rates("addition", "harmless") == (1, 0)
    for draw in range(2):
        assert rates("zero", "harmful", "random", draw) == (1, 0)
        assert rates("affine", "harmful", "random", draw) == (1, 0)
    assert table.loc[("none", "", 0, "harmful"), "kl"] == 0
    assert len(effects.completions) == len(effects.table) * len(harmful)
    # Four nouns that all refuse: as wide as four trials, not as sixteen.
    assert table.loc[("none", "", 0, "harmful"), "refusal_low"] == pytest.approx(0.51, abs=0.01)


def test_projections_are_zero_and_one_at_the_training_means(planted, found, harmful, harmless):
    at = ["pos", "layer"]
    bad, good = (project(planted, p, found) for p in (harmful, harmless))
    for table, wanted in ((bad, 1.0), (good, 0.0)):
        means = table.groupby(at)["relative"].mean()
        assert means[(found.pos, found.layer)] == pytest.approx(wanted, abs=0.25)
    assert set(bad["pos"]) == {-3, -2, -1}
    assert bad[bad["pos"] == -3]["relative"].isna().all()


def test_a_saved_direction_comes_back(found, tmp_path):
    back = load_direction(found.save(tmp_path / "d"))
    assert (back.pos, back.layer, back.rule) == (found.pos, found.layer, found.rule)
    assert torch.equal(back.mean_diff, found.mean_diff) and back.mean_diff.dtype == torch.float64
    pd.testing.assert_frame_equal(back.candidates, found.candidates, check_dtype=False)
    assert back.info["prompts_sha256"] == found.info["prompts_sha256"]
    assert back.select("affine").best == found.select("affine").best
    with pytest.raises(WeightdiffError, match="no saved direction"):
        load_direction(tmp_path)


def test_controls_have_the_norm_and_the_shape_asked_for():
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(8)
    labels = [True] * 20 + [False] * 30
    for made in (
        random_directions(8, 2.5, 4, 1),
        covariance_directions(rows, 2.5, 4, 1),
        permuted_directions(rows, labels, 2.5, 4, 1),
    ):
        assert made.shape == (4, 8)
        torch.testing.assert_close(made.norm(dim=1), torch.full((4,), 2.5, dtype=torch.float64))
    # A coordinate without variance stays without.
    assert covariance_directions(rows, 1.0, 4)[:, 0].abs().max() < 1e-12


def test_the_whole_analysis_splits_by_cluster_and_saves(
    planted, harmful, harmless, lexicon, tmp_path
):
    result = refusal(planted, harmful, harmless, lexicon=lexicon, n_random=1, max_new_tokens=4)
    rates = result.rates().set_index(["intervention", "prompts"])
    assert rates.loc[("affine", "harmful"), "compliance_rate"] == 1
    assert rates.loc[("addition", "harmless"), "refusal_rate"] == 1
    out = result.save(tmp_path)
    page = (out / "refusal.html").read_text()
    assert "Refusal direction" in page and "<script src" not in page
    assert len(pd.read_parquet(out / "effects.parquet")) == len(result.effects.table)
    tested = {
        json.loads(x)["cluster"] for x in (out / "completions.jsonl").read_text().splitlines()
    }
    assert len(tested) == 2
    assert "affine" in result._repr_html_() and "layer" in result.direction._repr_html_()


def test_bad_input_is_a_sentence(planted, harmful, harmless, lexicon):
    with pytest.raises(WeightdiffError, match="no harmless"):
        refusal_direction(planted, harmful, [], lexicon=lexicon)
    with pytest.raises(WeightdiffError, match="are the same"):
        refusal_direction(planted, harmful, harmful, lexicon=lexicon)
    with pytest.raises(WeightdiffError, match="cannot be split"):
        refusal(planted, harmful[:1], harmless, lexicon=lexicon)
    with pytest.raises(WeightdiffError, match="shortest prompt has"):
        refusal_direction(planted, harmful, harmless, lexicon=lexicon, positions=[-40])
