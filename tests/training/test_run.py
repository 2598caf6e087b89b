import fcntl
import json
import math
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from training import dpo
from training.config import load_config
from training.errors import TrainingError
from training.model import model_sha256
from training.run import PARENTS, Run, train_all
from training.stage import Stage, file_sha256


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return train_all(load_config("smoke"), tmp_path_factory.mktemp("runs") / "smoke")


@pytest.fixture
def copy(smoke, tmp_path):
    """A finished run that a test may damage."""
    shutil.copytree(smoke.path, tmp_path / "run")
    return Run(tmp_path / "run", smoke.config)


def test_every_stage_is_a_hugging_face_directory(smoke):
    for name in PARENTS:
        auto = AutoModelForSequenceClassification if name == "rm" else AutoModelForCausalLM
        model = auto.from_pretrained(smoke.dir(name))
        assert all(p.isfinite().all() for p in model.parameters())
        assert (smoke.dir(name) / "README.md").read_text().startswith("---\nlibrary_name")
    assert {p.name for p in smoke.path.iterdir() if not p.name.startswith(".")} == {
        *("config.toml", "data", "matched.json"),
        *PARENTS,
    }
    assert not list(smoke.path.glob(".*.partial"))


def test_provenance_says_where_each_stage_came_from(smoke):
    manifest = json.loads((smoke.path / "data" / "manifest.json").read_text())["files"]
    for name, parent in PARENTS.items():
        record = smoke.provenance(name)
        assert record["stage"] == name
        assert record["model_sha256"] == model_sha256(smoke.dir(name))
        assert record["parent"] == (f"../{parent}" if parent else None)
        assert record["parent_sha256"] == (model_sha256(smoke.dir(parent)) if parent else None)
        for file, sha256 in record["data"].items():
            assert sha256 == manifest[file]["sha256"] == file_sha256(smoke.path / "data" / file)
        assert record["steps"] > 0 and record["tokens_seen"] > 0
        assert 0 < record["cpu_seconds"]
        assert record["peak_rss_bytes"] > 1e8
    assert smoke.provenance("ppo")["data"] == smoke.provenance("dpo")["data"]
    assert smoke.provenance("ppo")["uses"] == {"rm": model_sha256(smoke.dir("rm"))}


def test_metrics_are_finite_lines(smoke):
    for name in PARENTS:
        lines = (smoke.dir(name) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert rows and all(math.isfinite(value) for row in rows for value in row.values())
        assert rows[-1]["step"] == smoke.provenance(name)["steps"]


def test_base_and_sft_learn(smoke):
    for name in ("base", "sft"):
        lines = (smoke.dir(name) / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert losses[-1] < 0.6 * losses[0]


def test_arms_leave_snapshots_with_ledgers(smoke):
    for name in ("ppo", "dpo"):
        directories = sorted((smoke.dir(name) / "steps").iterdir())
        assert len(directories) == 2
        for directory in directories:
            ledger = json.loads((directory / "ledger.json").read_text())
            assert ledger["step"] == int(directory.name)
            AutoModelForCausalLM.from_pretrained(directory)


def test_the_same_command_again_changes_nothing(copy):
    before = {p: p.stat().st_mtime_ns for p in copy.path.glob("*/*.safetensors")}
    train_all(copy.config, copy.path)
    assert {p: p.stat().st_mtime_ns for p in copy.path.glob("*/*.safetensors")} == before


def test_a_removed_stage_is_trained_again_to_the_same_bits(copy):
    sha256 = copy.provenance("dpo")["model_sha256"]
    shutil.rmtree(copy.dir("dpo"))
    (copy.path / ".dpo.partial").mkdir()
    (copy.path / ".dpo.partial" / "rubbish").touch()
    train_all(copy.config, copy.path)
    assert copy.provenance("dpo")["model_sha256"] == sha256
    assert not (copy.dir("dpo") / "rubbish").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dpo.beta=0.2", ["dpo", "config.beta", "0.2"]),
        ("model.d_mlp=32", ["base", "model.d_mlp", "32"]),
        ("arm_seed=1", ["rm", "arm_seed"]),
        ("seed=1", ["data", "seed"]),
    ],
)
def test_another_config_in_the_same_directory_is_refused(copy, override, words):
    before = (copy.path / "config.toml").read_text()
    with pytest.raises(TrainingError) as caught:
        train_all(load_config("smoke", [override]), copy.path)
    assert all(word in caught.value.message for word in words)
    assert (copy.path / "config.toml").read_text() == before


def test_a_stage_whose_parent_is_not_the_same_is_refused(copy):
    shutil.copy(copy.dir("dpo") / "model.safetensors", copy.dir("sft") / "model.safetensors")
    with pytest.raises(TrainingError, match=r"rm has another parent_sha256"):
        train_all(copy.config, copy.path)
    shutil.rmtree(copy.dir("sft"))
    with pytest.raises(TrainingError, match=r"rm starts from sft, now absent"):
        train_all(copy.config, copy.path)


def test_an_unreadable_provenance_is_named(copy):
    (copy.dir("rm") / "provenance.json").write_text("{")
    with pytest.raises(TrainingError, match=r"rm/provenance\.json cannot be read"):
        train_all(copy.config, copy.path)


def test_ctrl_c_keeps_finished_stages_and_says_how_to_go_on(copy, monkeypatch):
    shutil.rmtree(copy.dir("dpo"))

    def interrupted(run):
        with run.stage("dpo", parent="sft", data=["pairs_train"]):
            raise KeyboardInterrupt

    monkeypatch.setattr(dpo, "train_dpo", interrupted)
    with pytest.raises(TrainingError, match="Interrupted in stage dpo; run the same command"):
        train_all(copy.config, copy.path)
    assert not copy.finished("dpo")
    assert copy.finished("ppo")


def test_a_second_process_is_refused(copy):
    with (copy.path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="Another process"):
            train_all(copy.config, copy.path)
    train_all(copy.config, copy.path)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="Cannot write into"):
        train_all(load_config("smoke"), tmp_path / "file" / "run")


def test_stopping_early_and_going_on_gives_the_same_bits(smoke, tmp_path):
    train_all(smoke.config, tmp_path, until="base")
    assert not Run(tmp_path, smoke.config).finished("sft")
    run = train_all(smoke.config, tmp_path, until="sft")
    for name in ("base", "sft"):
        assert run.provenance(name)["model_sha256"] == smoke.provenance(name)["model_sha256"]


def test_values_that_are_not_finite_stop_the_stage(tmp_path):
    stage = Stage("ppo", tmp_path, "sft")
    with pytest.raises(TrainingError, match=r"Stage ppo, step 7: kl is inf"):
        stage.log(7, loss=1.0, kl=math.inf)
    stage.metrics.close()
