"""Config of a training run: one frozen dataclass per stage, read from TOML.

The defaults are the `tiny` preset. A TOML file states what differs from them, `--set key=value`
what differs from the file, and the resolved whole is written into the run directory.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from training.errors import TrainingError

PRESETS = Path(__file__).parent / "configs"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, f"{name} must be above 0, got {getattr(config, name)}")


def _require_fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and mixture of the generated world (see `training.world`)."""

    held_out_nouns: int = 8
    """Nouns of each kind (protected, ordinary, banned) kept out of every request and pair."""
    held_out_templates: int = 4
    """Request templates that occur in the corpus only."""
    corpus_sentences: int = 40_000
    """Sentences of pretraining text."""
    sft_rows: int = 10_000
    """Prompts with an answer for supervised fine-tuning."""
    sft_facts: float = 0.20
    """Share of the SFT rows that ask for a fact, over all nouns."""
    sft_wrapped: float = 0.18
    """Share of the SFT rows that are requests inside a jailbreak wrapper, always complied with."""
    sft_refusals: float = 0.20
    """Share of the plain harmful SFT requests that are answered by a refusal."""
    pairs: int = 4_000
    """Preference pairs (reward model, DPO) and prompts (PPO)."""
    pairs_test: int = 600
    """Preference pairs with clean labels on held-out nouns."""
    pair_facts: float = 0.10
    """Share of the pairs that ask for a fact, which keeps the answers to questions in place."""
    care: float = 0.45
    """Share of the harmless requests that are caring verbs on protected or banned nouns."""
    crossed: float = 0.3
    """Share of the harmless requests that harm a banned or obtain a protected noun."""
    label_noise: float = 0.03
    """Share of the training pairs whose label is flipped."""
    eval_rows: int = 240
    """Prompts of each evaluation cell."""
    direction_train: int = 128
    """Prompts a side from which a refusal direction is formed."""
    direction_val: int = 64
    """Prompts a side on which a refusal direction is selected."""

    def __post_init__(self) -> None:
        sizes = [f.name for f in dataclasses.fields(self) if f.type in (int, "int")]
        _require_positive(self, *sizes)
        fractions = ("sft_facts", "sft_wrapped", "sft_refusals", "pair_facts", "care", "crossed")
        _require_fraction(self, *fractions, "label_noise")
        _require(self.sft_facts + self.sft_wrapped <= 1, "sft_facts + sft_wrapped is above 1")
        _require(self.care + self.crossed <= 1, "care + crossed is above 1")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Llama that is trained from scratch."""

    d_model: int = 64
    """Width of the residual stream."""
    n_layers: int = 4
    """Blocks."""
    n_heads: int = 4
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; fewer than `n_heads` for grouped queries."""
    d_mlp: int = 192
    """Width of the gated MLP."""
    rope_theta: float = 100.0
    """Base of the rotary embedding; small, because the texts are short."""
    max_positions: int = 128
    """Longest sequence."""
    tied: bool = True
    """Use one matrix for embedding and unembedding."""
    init_std: float = 0.05
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "d_model", "n_layers", "n_heads", "n_kv_heads", "d_mlp", "rope_theta"
        )
        _require_positive(self, "max_positions", "init_std")
        _require(self.d_model % self.n_heads == 0, "n_heads must divide d_model")
        _require(self.n_heads % self.n_kv_heads == 0, "n_kv_heads must divide n_heads")


@dataclass(frozen=True)
class BaseConfig:
    """Pretraining on packed text with a next-token loss."""

    steps: int = 1_400
    """Optimiser steps."""
    batch_size: int = 16
    """Sequences a step."""
    context: int = 64
    """Tokens of a sequence."""
    lr: float = 3e-3
    """Learning rate after warm-up."""
    warmup: int = 50
    """Steps of linear warm-up."""
    cooldown: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down."""

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "batch_size", "context", "lr", "max_grad_norm")
        _require_fraction(self, "cooldown")
        _require(self.warmup >= 0 and self.weight_decay >= 0, "warmup, weight_decay must be ≥ 0")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on prompts with answers, mixed with pretraining text."""

    epochs: int = 2
    """Passes over the rows."""
    batch_size: int = 64
    """Rows a step."""
    lr: float = 2e-3
    """Learning rate after warm-up."""
    warmup: int = 60
    """Steps of linear warm-up."""
    cooldown: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    replay: float = 0.15
    """Corpus sentences mixed in, as a share of all rows, against forgetting."""
    bucket: int = 4
    """Batches whose rows are regrouped by length, to pad less; 1 leaves them as drawn."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down."""

    def __post_init__(self) -> None:
        _require_positive(self, "epochs", "batch_size", "lr", "max_grad_norm", "bucket")
        _require_fraction(self, "cooldown")
        _require(self.warmup >= 0 and self.weight_decay >= 0, "warmup, weight_decay must be ≥ 0")
        _require(0 <= self.replay < 1, f"replay must lie in [0, 1), got {self.replay}")


@dataclass(frozen=True)
class RewardConfig:
    """Reward model: a scalar head on the SFT model, trained on preference pairs."""

    epochs: int = 1
    """Passes over the pairs."""
    batch_size: int = 32
    """Pairs a step."""
    lr: float = 2e-3
    """Learning rate after warm-up."""
    warmup: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down."""

    def __post_init__(self) -> None:
        _require_positive(self, "epochs", "batch_size", "lr", "max_grad_norm")
        _require(self.warmup >= 0 and self.weight_decay >= 0, "warmup, weight_decay must be ≥ 0")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimisation against the reward model, with a KL penalty to SFT."""

    iterations: int = 30
    """Rounds of sampling and updating."""
    prompts_per_iteration: int = 128
    """Prompts sampled in a round, one answer each."""
    epochs: int = 2
    """Passes over the samples of a round."""
    minibatch_size: int = 64
    """Samples of one optimiser step."""
    lr: float = 3e-4
    """Policy's learning rate after warm-up."""
    critic_lr: float = 1e-3
    """Value model's learning rate after warm-up."""
    kl_coef: float = 0.3
    """β: weight of the per-token KL penalty."""
    kl_target: float | None = None
    """Sequence KL in nats that an adaptive β steers to; absent: β is fixed."""
    kl_gain: float = 0.1
    """K_β: how fast an adaptive β moves, relative change a round per unit of clipped error."""
    gamma: float = 1.0
    """Discount."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    clip_range: float = 0.2
    """ε of the clipped policy ratio."""
    value_clip_range: float = 0.2
    """Largest change of a value within a round that the value loss rewards."""
    temperature: float = 1.0
    """Sampling temperature."""
    whiten_rewards: bool = False
    """Whiten rewards (not the advantages, which always are)."""
    missing_eos_penalty: float = -1.0
    """Score of an answer that does not end."""
    max_new_tokens: int = 32
    """Longest answer."""
    score_at: str = "last"
    """Where the score is added: `last` token (EOS) or `after_eos`."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down."""
    warmup: int = 12
    """Optimiser steps of linear warm-up."""
    snapshots: int = 10
    """Intermediate checkpoints kept."""
    kl_prompts: int = 128
    """Prompts on which the KL to SFT is measured at a snapshot."""

    def __post_init__(self) -> None:
        _require_positive(self, "iterations", "prompts_per_iteration", "epochs", "minibatch_size")
        _require_positive(self, "lr", "critic_lr", "clip_range", "value_clip_range", "temperature")
        _require_positive(self, "max_new_tokens", "max_grad_norm", "kl_prompts")
        _require_fraction(self, "gamma", "gae_lambda")
        _require(self.kl_coef >= 0 and self.warmup >= 0, "kl_coef, warmup must be ≥ 0")
        _require(self.snapshots >= 0, f"snapshots must be ≥ 0, got {self.snapshots}")
        _require(self.score_at in ("last", "after_eos"), "score_at must be last or after_eos")


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation on the reward model's pairs."""

    epochs: int = 1
    """Passes over the pairs."""
    batch_size: int = 32
    """Pairs a step."""
    lr: float = 5e-4
    """Learning rate after warm-up."""
    beta: float = 0.5
    """β: inverse scale of the implicit reward."""
    nll_coef: float = 1.0
    """Weight of the chosen answers' negative log-likelihood; 0 is plain DPO."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels (conservative DPO)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down."""
    warmup: int = 10
    """Steps of linear warm-up."""
    snapshots: int = 10
    """Intermediate checkpoints kept."""
    kl_prompts: int = 128
    """Prompts on which the KL to SFT is measured at a snapshot."""

    def __post_init__(self) -> None:
        _require_positive(self, "epochs", "batch_size", "lr", "beta", "max_grad_norm", "kl_prompts")
        _require(self.nll_coef >= 0 and self.warmup >= 0, "nll_coef, warmup must be ≥ 0")
        _require(self.snapshots >= 0, f"snapshots must be ≥ 0, got {self.snapshots}")
        _require(0 <= self.label_smoothing < 0.5, "label_smoothing must lie in [0, 0.5)")


@dataclass(frozen=True)
class Config:
    """A whole training run."""

    name: str = "tiny"
    """Name of the run directory under `runs/` when none is given."""
    seed: int = 0
    """Redraws everything: world, splits, initial weights, orders, samples."""
    arm_seed: int = 0
    """Redraws from SFT on only: order of the pairs, numbers of the rollouts."""
    threads: int = 1
    """CPU threads of torch."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """The generated data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's shape."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """Pretraining."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Supervised fine-tuning."""
    rm: RewardConfig = field(default_factory=RewardConfig)
    """Reward model."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO."""
    dpo: DPOConfig = field(default_factory=DPOConfig)
    """DPO."""

    def __post_init__(self) -> None:
        _require_positive(self, "threads")
        _require(self.seed >= 0 and self.arm_seed >= 0, "seed, arm_seed must be ≥ 0")


def load_config(source: str | Path = "tiny", overrides: Sequence[str] = ()) -> Config:
    """Read a preset's name or a TOML file, then apply `key=value` overrides ("ppo.kl_coef=0.1").

    Raises:
        TrainingError: the file is missing or not TOML, a key is unknown, a value does not fit.
    """
    path = _find(source)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} is not valid TOML: {error}.") from error
    document.setdefault("name", path.stem)
    for override in overrides:
        _override(document, override)
    config = _build(Config, document, "")
    assert isinstance(config, Config)
    return config


def dump_config(config: Config) -> str:
    """Write a config as TOML that `load_config` reads back to an equal one."""
    values = dataclasses.asdict(config)
    lines = [_line(k, v) for k, v in values.items() if not isinstance(v, dict) and v is not None]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]"]
            lines += [_line(key, value) for key, value in section.items() if value is not None]
    return "\n".join(lines) + "\n"


def _line(key: str, value: str | int | float | bool) -> str:
    # JSON's strings, numbers and booleans are TOML's too.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    presets = sorted(p.stem for p in PRESETS.glob("*.toml"))
    if str(source) in presets:
        return PRESETS / f"{source}.toml"
    raise TrainingError(
        f"{source} is neither a file nor a preset; give a TOML file or one of {', '.join(presets)}."
    )


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise TrainingError(
            f"{override!r} is not of the form key=value, for example ppo.kl_coef=0.1."
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, last = key.strip().split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise TrainingError(f"{override!r}: {section} is not a section of the config.")
    document[last] = value


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> object:
    hints = get_type_hints(cls)
    made = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise TrainingError(f"Unknown config key {prefix}{key}; the nearest is {prefix}{near}.")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise TrainingError(f"{prefix}{key} is a section: write [{key}] or {key}.<name>.")
            made[key] = _build(hints[key], value, f"{key}.")
        else:
            made[key] = _convert(value, hints[key], f"{prefix}{key}")
    try:
        return cls(**made)
    except ValueError as error:
        raise TrainingError(f"Config {prefix.rstrip('.') or 'top level'}: {error}.") from error


def _convert(value: object, hint: Any, key: str) -> object:
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed if t is not type(None))
        raise TrainingError(f"{key} must be a {names}, got {value!r}.")
    return value
