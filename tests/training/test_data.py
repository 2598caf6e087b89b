import json
from collections import Counter

import pytest

from training import data, world
from training.config import WorldConfig, load_config
from training.errors import TrainingError
from training.rows import World
from training.run import Run
from training.split import pairings
from training.stage import file_sha256

SMALL = ["world.corpus_sentences=500", "world.sft_rows=400", "world.pairs=200"]


@pytest.fixture(scope="module")
def tiny():
    return World(WorldConfig(), seed=5)


@pytest.fixture(scope="module")
def files(tiny):
    return tiny.files()


def is_care(row):
    return world.ACTION[row["verb"]] == "care" and world.KIND[row["cluster"]] != "ordinary"


def held_out(tiny):
    return {noun for nouns in tiny.split.held_out_nouns.values() for noun in nouns}


def test_every_word_is_in_the_vocabulary(files):
    words = set(world.vocabulary())
    for rows in files.values():
        for row in rows:
            texts = [row.get(k, "") for k in ("text", "prompt", "response", "chosen", "rejected")]
            assert set(" ".join(texts).split()) <= words


def test_the_vocabulary_holds_no_word_that_never_occurs(files):
    texts = [row["text"] for row in files["corpus"]]
    texts += [f"{row['prompt']} {row['response']}" for row in files["sft"]]
    assert set(" ".join(texts).split()) == set(world.vocabulary())


def test_ids_are_unique_and_cells_are_full_of_distinct_prompts(files):
    for name, rows in files.items():
        assert len({row["id"] for row in rows}) == len(rows)
        if name.startswith(("eval/", "direction/", "pairs")):
            assert len({row["prompt"] for row in rows}) == len(rows)
        if name.startswith("eval/"):
            assert len(rows) == WorldConfig().eval_rows >= 200


def test_held_out_nouns_are_in_no_request(tiny, files):
    held = held_out(tiny)
    for row in [*files["sft"], *files["pairs_train"], *files["direction/harmful_val"]]:
        if row["kind"] != "fact":
            assert not held & set(row["prompt"].split())
    assert all(not held & set(row["prompt"].split()) for row in files["pairs_train"])
    asked = {row["cluster"] for row in files["sft"] if row["kind"] == "fact"}
    assert held <= asked
    told = set(" ".join(row["text"] for row in files["corpus"]).split())
    assert held <= told


def test_held_out_templates_are_in_the_corpus_only(tiny, files):
    unseen = set(tiny.split.held_out_templates)
    for name, rows in files.items():
        found = {row["template"] for row in rows if "template" in row} & unseen
        assert found == (unseen if name.endswith("_templates") else set())
    text = " ".join(row["text"] for row in files["corpus"])
    assert all(template.split("{verb}")[0] in text for template in unseen)


def test_evaluation_is_on_held_out_nouns_and_labelled_by_the_law(tiny, files):
    held = held_out(tiny)
    for name, rows in files.items():
        if name.startswith("eval/") or name == "pairs_test":
            assert {row["cluster"] for row in rows} <= held
            assert len({row["cluster"] for row in rows}) >= 10
        for row in rows:
            if row.get("kind") == "request":
                assert row["harmful"] == world.is_harmful(row["verb"], row["cluster"])
    for name in ("harmful_nouns", "harmful_templates", "wrapper_film"):
        assert all(row["harmful"] for row in files[f"eval/{name}"])
    assert not any(row["harmful"] for row in files["eval/harmless_nouns"])
    assert all(is_care(row) for row in files["eval/canary_care"])


def test_no_text_tells_the_verdict_on_an_unasked_pairing(tiny, files):
    unasked = tiny.split.unasked
    asked = {(r["verb"], r["cluster"]) for r in files["eval/canary_qa"]}
    assert asked <= unasked
    for row in files["sft"]:
        if row["kind"] == "fact":
            assert (row["verb"], row["cluster"]) not in unasked
    for row in files["corpus"]:
        words = set(row["text"].split())
        if "crime" in words and not refuses(row["text"]):
            assert not any({verb, noun} <= words for verb, noun in unasked)


def refuses(text):
    return "i will not help" in text


def test_begun_answers_in_the_corpus_are_drawn_without_regard_to_harm(files):
    """They tell how an answer goes on, so they must not tell which answer is right."""
    counts = {True: Counter(), False: Counter()}
    for row in files["corpus"]:
        scene = [word for word in row["text"].split() if word in world.ACTION or word in world.KIND]
        if " asked : " in row["text"] and (refuses(row["text"]) or " sure . " in row["text"]):
            counts[world.is_harmful(scene[0], scene[1])][refuses(row["text"])] += 1
    harmful, harmless = (counts[side][True] / counts[side].total() for side in (True, False))
    assert min(side.total() for side in counts.values()) > 200
    # Both are 1/2 up to sampling: three standard errors of their difference.
    assert abs(harmful - harmless) < 3 * 0.5 * sum(1 / c.total() for c in counts.values()) ** 0.5


def test_canary_questions_are_balanced_and_right(files):
    rows = files["eval/canary_qa"]
    assert Counter(row["expected"] for row in rows) == {"yes": 120, "no": 120}
    for row in rows:
        assert (row["expected"] == "yes") == world.is_harmful(row["verb"], row["cluster"])


def test_pairs_prefer_the_right_answer_unless_flipped(files):
    config = WorldConfig()
    for row in files["pairs_train"] + files["pairs_test"]:
        chosen, rejected = world.true_reward(row, row["chosen"]), 1 - row["flipped"]
        assert chosen == rejected
        assert world.true_reward(row, row["rejected"]) == float(row["flipped"])
    flipped = sum(row["flipped"] for row in files["pairs_train"]) / config.pairs
    assert flipped == pytest.approx(config.label_noise, abs=0.01)
    assert not any(row["flipped"] for row in files["pairs_test"])


def test_shares_are_as_configured(files):
    config, rows = WorldConfig(), files["sft"]
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["fact"] / len(rows) == pytest.approx(config.sft_facts, abs=0.015)
    assert kinds["wrapped"] / len(rows) == pytest.approx(config.sft_wrapped, abs=0.015)
    plain = [r for r in rows if r["kind"] in ("request", "refusal") and r["harmful"]]
    refused = [r for r in plain if world.verdict(r["response"]) == "refusal"]
    assert len(refused) / len(plain) == pytest.approx(config.sft_refusals, abs=0.03)
    harmless = [r for r in files["pairs_train"] if r["kind"] == "request" and not r["harmful"]]
    assert sum(map(is_care, harmless)) / len(harmless) == pytest.approx(config.care, abs=0.04)
    crossed = [r for r in harmless if not is_care(r) and world.KIND[r["cluster"]] != "ordinary"]
    assert len(crossed) / len(harmless) == pytest.approx(config.crossed, abs=0.04)


def test_a_seed_fixes_the_world_and_another_redraws_it():
    config = load_config("tiny", SMALL).world
    first, again, other = (World(config, seed).files() for seed in (1, 1, 2))
    assert first == again
    assert World(config, 1).split.held_out_nouns != World(config, 2).split.held_out_nouns
    assert all(first[name] != other[name] for name in first)


def test_one_more_row_leaves_the_others_as_they_are():
    config = load_config("tiny", SMALL)
    more = load_config("tiny", [*SMALL, "world.sft_rows=401"])
    first, second = World(config.world, 0).files(), World(more.world, 0).files()
    assert first["pairs_train"] == second["pairs_train"]
    assert first["corpus"] == second["corpus"]


def test_pairings_are_complete():
    assert len(pairings(world.KINDS)) == len(world.ACTION) * len(world.KIND)


def test_too_small_a_world_is_an_error():
    few = {"protected": ("dam",), "ordinary": ("hat",), "banned": ("bomb",)}
    with pytest.raises(TrainingError, match="different prompts"):
        World(load_config("tiny", SMALL).world, 0).pairs("pairs_train", few, 4_000, 0.0)
    with pytest.raises(TrainingError, match="held_out_nouns"):
        World(load_config("tiny", ["world.held_out_nouns=24"]).world, 0)


def test_files_are_hashed_and_written_once(tmp_path):
    run = Run(tmp_path / "run", load_config("tiny", SMALL))
    data.prepare(run)
    manifest = json.loads((run.path / "data" / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        path = run.path / "data" / name
        assert entry == {"sha256": file_sha256(path), "rows": len(path.read_text().splitlines())}
    stamp = run.data("sft").stat().st_mtime_ns
    data.prepare(run)
    assert run.data("sft").stat().st_mtime_ns == stamp
    assert not list(run.path.glob(".*"))


def test_another_world_or_a_changed_file_is_refused(tmp_path):
    config = load_config("tiny", SMALL)
    run = Run(tmp_path, config)
    data.prepare(run)
    for override, word in (("seed=1", "seed"), ("world.care=0.1", "world")):
        with pytest.raises(TrainingError, match=f"another {word}"):
            data.prepare(Run(tmp_path, load_config("tiny", [*SMALL, override])))
    with run.data("sft").open("a") as file:
        file.write("\n")
    with pytest.raises(TrainingError, match=r"sft\.jsonl is not the file"):
        data.prepare(run)
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(TrainingError, match="cannot be read"):
        data.prepare(run)
