import dataclasses
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import Config, DPOConfig, PPOConfig, WorldConfig, dump_config, load_config
from training.errors import TrainingError


def test_tiny_is_the_defaults():
    assert load_config("tiny") == Config()


@given(
    st.integers(0, 2**40),
    st.floats(1e-9, 1e3),
    st.none() | st.floats(0.01, 50.0),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
)
def test_what_is_dumped_loads_back(tmp_path_factory, seed, lr, kl_target, name):
    config = Config(name=name, seed=seed, ppo=PPOConfig(lr=lr, kl_target=kl_target))
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_overrides_win_over_the_file_and_keep_types(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[ppo]\nkl_coef = 0.2\niterations = 7\n")
    config = load_config(path, ["ppo.kl_coef=1", "ppo.score_at=after_eos", "seed=3"])
    assert (config.ppo.kl_coef, config.ppo.iterations, config.seed) == (1.0, 7, 3)
    assert isinstance(config.ppo.kl_coef, float)
    assert config.ppo.score_at == "after_eos"
    assert config.name == "mine"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.klcoef=1", ["ppo.klcoef", "ppo.kl_coef"]),
        ("pppo.lr=1", ["pppo", "ppo"]),
        ("ppo.iterations=1.5", ["ppo.iterations", "int", "1.5"]),
        ("ppo.iterations=true", ["ppo.iterations", "int", "True"]),
        ("ppo=1", ["ppo", "[ppo]"]),
        ("seed.x=1", ["seed"]),
        ("ppo.lr", ["key=value"]),
        ("model.n_heads=3", ["model", "n_heads must divide d_model"]),
        ("dpo.label_smoothing=0.5", ["dpo", "label_smoothing"]),
    ],
)
def test_a_wrong_setting_is_one_sentence(override, words):
    with pytest.raises(TrainingError) as caught:
        load_config("tiny", [override])
    assert all(word in caught.value.message for word in words)


def test_a_missing_config_names_the_presets():
    with pytest.raises(TrainingError, match=r"nowhere.*smoke, tiny"):
        load_config("nowhere")


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.toml").write_text("a = = 1")
    with pytest.raises(TrainingError, match=r"broken\.toml is not valid TOML"):
        load_config(tmp_path / "broken.toml")


def test_every_field_is_documented():
    for cls in (Config, *(type(getattr(Config(), f.name)) for f in dataclasses.fields(Config))):
        if not dataclasses.is_dataclass(cls):
            continue
        body = inspect.getsource(cls)
        for field in dataclasses.fields(cls):
            line = body.index(f"\n    {field.name}: ")
            assert body[line + 1 :].split("\n")[1].startswith('    """'), (cls, field.name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WorldConfig(sft_facts=0.6, sft_wrapped=0.6),
        lambda: WorldConfig(label_noise=1.5),
        lambda: DPOConfig(beta=0.0),
        lambda: PPOConfig(score_at="first"),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError):
        make()
