"""Runs small enough for a test: the real world's data, a random model in SFT's place."""

import dataclasses
import json
import shutil

import pytest

from training import data
from training.config import load_config
from training.model import build_model, build_tokenizer, save_model
from training.run import Run

SMALL = (
    "world.corpus_sentences=64",
    "world.sft_rows=64",
    "world.pairs=64",
    "world.pairs_test=40",
    "world.eval_rows=16",
    "world.direction_train=8",
    "world.direction_val=8",
    "model.d_model=16",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.n_kv_heads=1",
    "model.d_mlp=32",
    "model.init_std=0.2",
    "rm.batch_size=16",
    "rm.epochs=1",
    "ppo.iterations=3",
    "ppo.prompts_per_iteration=16",
    "ppo.minibatch_size=8",
    "ppo.max_new_tokens=10",
    "ppo.snapshots=2",
    "ppo.kl_prompts=8",
    "dpo.batch_size=16",
    "dpo.snapshots=2",
    "dpo.kl_prompts=8",
)


@pytest.fixture(scope="session")
def untrained_sft(tmp_path_factory):
    """Hold data and a random model under the name of SFT, for stages that start from there."""
    run = Run(tmp_path_factory.mktemp("runs") / "untrained", load_config("tiny", SMALL))
    data.prepare(run)
    words = json.loads((run.path / "data" / "vocabulary.json").read_text(encoding="utf-8"))
    tokenizer = build_tokenizer(words, run.config.model.max_positions)
    model = build_model(run.config.model, tokenizer, 0)
    # Many end tokens, or a random model's answers would hardly ever end.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(60, 90)]
    save_model(run.dir("sft"), model, tokenizer, "random")
    return run


@pytest.fixture
def arm_run(untrained_sft, tmp_path):
    """Copy the untrained run; `arm_run("ppo.epochs=1")` changes its config."""

    def make(*overrides, name="run"):
        path = tmp_path / name
        shutil.copytree(untrained_sft.path, path)
        return Run(path, dataclasses.replace(load_config("tiny", (*SMALL, *overrides)), name=name))

    return make


@pytest.fixture
def coarse_adamw(monkeypatch):
    """AdamW with ε = 1e-6, in the stages too, for comparing two implementations.

    At Adam's 1e-8 a gradient entry that cancels to rounding noise takes a full step, of either
    sign, and one such entry in ten thousand is a difference of 1e-4.
    """
    from training import dpo, loop, reward

    def coarse(*args, **kwargs):
        optimizer = loop.adamw(*args, **kwargs)
        for group in optimizer.param_groups:
            group["eps"] = 1e-6
        return optimizer

    for stage in (dpo, reward):
        monkeypatch.setattr(stage, "adamw", coarse)
    return coarse
