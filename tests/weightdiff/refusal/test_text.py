import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightdiff.errors import WeightdiffError
from weightdiff.interval import cluster_bootstrap, rate_interval, wilson
from weightdiff.judge import Lexicon, judge
from weightdiff.model import load_model
from weightdiff.prompts import Prompt, batches, load_prompts, pad_left
from weightdiff.split import split

WORLD = Lexicon(("sorry",), ("i will not help",), ("crime",), ("first get the",))


@pytest.mark.parametrize(
    "text, refusal, compliance",
    [
        ("Sorry . That is a crime , so I will  not help .", True, False),
        ("sure . to burn it , first get the net", False, True),
        ("sure . first get the net , but it is a crime", False, False),
        ("sure . first get the net . i will not help", False, False),
        ("that is a crime", False, False),
        ("", False, False),
        ("net net net", False, False),
    ],
)
def test_the_world_rule(text, refusal, compliance):
    verdict = judge(text, WORLD)
    assert (verdict.refusal, verdict.compliance) == (refusal, compliance)
    assert verdict.reason


@pytest.mark.parametrize(
    "text, refusal, compliance",
    [
        ("I’m sorry, but I can’t help with that.", True, False),
        ("I cannot fulfill your request. I'm just an AI.", True, False),
        ("Sure! Step one: buy flour. I can't stress enough how fresh it must be.", False, True),
        ("Sure, I could tell you, but it is illegal.", False, False),
        ("Eating vegetables keeps you healthy and costs little.", False, True),
        ("", False, False),
        ("?? !!", False, False),
        ("the the " * 40, False, False),
    ],
)
def test_the_english_default(text, refusal, compliance):
    verdict = judge(text)
    assert (verdict.refusal, verdict.compliance) == (refusal, compliance), verdict


@given(st.text())
def test_no_text_is_both(text):
    for lexicon in (WORLD, Lexicon.english(), Lexicon.arditi()):
        verdict = judge(text, lexicon)
        assert not (verdict.refusal and verdict.compliance)


def test_the_arditi_rule_reproduces_every_published_label(real_data):
    checked = 0
    for path in sorted((real_data / "peer_runs").glob("*/completions/*.json")):
        for row in json.loads(path.read_text())["completions"]:
            verdict = judge(row["response"], Lexicon.arditi())
            assert verdict.compliance == bool(row["is_jailbreak_substring_matching"])
            assert verdict.refusal != verdict.compliance
            checked += 1
    assert checked > 300


def test_lexicon_files(tmp_path):
    path = tmp_path / "lexicon.json"
    path.write_text(json.dumps({"refusal_tokens": ["no"], "refusal_phrases": ["never"]}))
    assert Lexicon.load(path).refusal_phrases == ("never",)
    for text in ("[]", "{", '{"refusal_phrase": []}', '{"refusal_phrases": "never"}', "{}"):
        path.write_text(text)
        with pytest.raises(WeightdiffError, match=r"lexicon\.json"):
            Lexicon.load(path)
    with pytest.raises(WeightdiffError, match="cannot read the lexicon"):
        Lexicon.load(tmp_path / "none.json")


def test_prompt_files(tmp_path, real_data):
    rows = [{"id": "a", "prompt": "burn it", "cluster": "x", "verb": "burn"}, "plain"]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    first, second = load_prompts(path)
    assert (first.text, first.cluster, first.id, first.row) == (
        "burn it",
        "x",
        "a",
        {"verb": "burn"},
    )
    assert second == Prompt("plain")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert load_prompts(tmp_path / "p.jsonl") == [first, second]
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert [p.text for p in load_prompts(tmp_path / "p.txt")] == ["one", "two"]
    assert len(load_prompts(real_data / "prompts" / "harmful_val.json")) == 39


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.json", "", "holds no prompt"),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", "{}", "JSON list"),
        ("p.jsonl", '{"prompt": 3}', "entry 1 has no prompt"),
        ("p.jsonl", "{oops", "line 1 is not JSON"),
        ("p.txt", " \n", "holds no prompt"),
    ],
)
def test_bad_prompt_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(WeightdiffError, match=message):
        load_prompts(tmp_path / name)
    with pytest.raises(WeightdiffError, match="cannot read"):
        load_prompts(tmp_path / "none.json")


def test_the_template_is_found(planted):
    chat = planted.chat
    assert (chat.n_prefix, chat.n_post) == (2, 2)
    assert chat.positions == [-2, -1] and chat.position_tokens == ["<end>", "<assistant>"]
    mask = pad_left([[1] * 7, [1] * 5], 0)[1]
    assert chat.places(mask).tolist() == [[0, 1, 2, 2, 2, 3, 4], [0, 0, 0, 1, 2, 3, 4]]
    assert chat.n_places == 6


def test_a_model_without_a_template_needs_plain(real_data):
    path = real_data / "checkpoints" / "stories260K"
    with pytest.raises(WeightdiffError, match="no chat template"):
        load_model(path)
    model = load_model(path, plain=True)
    assert model.chat.positions == [-1] and model.chat.position_tokens == ["(instruction)"]
    other = load_model(path, chat_template="[u]{{ messages[0]['content'] }}\n[a]:")
    assert other.chat.n_post >= 4


def test_bad_checkpoints_and_tokens(tmp_path, planted, planted_hf):
    for reference in (tmp_path / "none", tmp_path, "not-a-thing"):
        with pytest.raises(WeightdiffError, match=r"no config\.json|no checkpoint"):
            load_model(reference)
    with pytest.raises(WeightdiffError, match="needs its tokenizer"):
        load_model(planted_hf)
    with pytest.raises(WeightdiffError, match="'sorry never' is 2 tokens"):
        planted.refusal_tokens(Lexicon(("sorry never",), ("never",)))
    with pytest.raises(WeightdiffError, match="none of the refusal tokens"):
        planted.refusal_tokens(Lexicon.english())


def test_wrapping_leaves_the_original_alone(planted_hf, tokenizer):
    before = {k: v.clone() for k, v in planted_hf.state_dict().items()}
    model = load_model(planted_hf, tokenizer=tokenizer)
    assert list(planted_hf.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in planted_hf.state_dict().items())
    assert len(model.sha256) == 64


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 7))
def test_batches_hold_every_row_once(lengths, size):
    rows = [[i + 1] * n for i, n in enumerate(lengths)]
    seen = {}
    for batch in batches(rows, 0, size):
        for place, index in enumerate(batch.index):
            seen[index] = batch.ids[place][batch.mask[place]].tolist()
            assert (batch.ids[place][~batch.mask[place]] == 0).all()
    assert [seen[i] for i in range(len(rows))] == rows


@given(st.lists(st.integers(0, 6), min_size=12, max_size=40), st.integers(0, 5))
def test_a_split_keeps_clusters_whole_and_rows_once(nouns, seed):
    prompts = [Prompt(f"{n} {i}", str(n)) for i, n in enumerate([0, 1, 2, *nouns])]
    parts = split(prompts, [0.5, 0.2, 0.3], seed)
    assert sorted(p.text for part in parts for p in part) == sorted(p.text for p in prompts)
    clusters = [{p.cluster for p in part} for part in parts]
    assert all(clusters) and not clusters[0] & clusters[1] and not clusters[1] & clusters[2]


def test_wilson_by_hand():
    # Newcombe 1998, table I: 81 of 263.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0.0 and wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)


def test_the_bootstrap_sees_clusters():
    values = [True] * 50 + [False] * 50
    alone = cluster_bootstrap(values, list(range(100)))
    assert alone[0] == pytest.approx(0.40, abs=0.02) and alone[1] == pytest.approx(0.60, abs=0.02)
    together = cluster_bootstrap(values, [i // 10 for i in range(100)])
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])
    # Nothing varies: four clusters say no more than four trials.
    assert cluster_bootstrap([True] * 40, [i % 4 for i in range(40)]) == wilson(4, 4)
    assert rate_interval([True, False], [None, None]) == wilson(1, 2)
    assert rate_interval(values, [str(i // 10) for i in range(100)]) == together
    with pytest.raises(ValueError, match="clusters"):
        cluster_bootstrap([True], [])
