"""The refusal direction: difference in means, its candidates, its choice, its file.

Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float64
from torch import Tensor

from weightdiff.activations import mean_activations, place_means
from weightdiff.artefact import atomic_path, output_dir, write_json
from weightdiff.candidates import judge_candidates, score_candidates
from weightdiff.errors import WeightdiffError
from weightdiff.intervene import generate_tokens
from weightdiff.judge import Lexicon
from weightdiff.model import Model, load_model
from weightdiff.prompts import Prompt, as_prompts, prompts_sha256
from weightdiff.selection import Rule, Selection, select_direction
from weightdiff.split import split

__all__ = [
    "Direction",
    "harmless_means",
    "load_direction",
    "mean_diff",
    "refusal_direction",
    "select_direction",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Direction:
    """Mean differences at every (pos, layer), and the one that was chosen.

    Layer l means ``blocks.l.hook_resid_pre``; pos counts from the end of the prompt.
    """

    mean_diff: Float64[Tensor, "pos layer d_model"]
    """Mean over harmful minus mean over harmless prompts."""
    harmless_mean: Float64[Tensor, "pos layer d_model"]
    positions: tuple[int, ...]
    """The position of each entry of the first axis."""
    pos: int
    layer: int
    rule: str
    """How (pos, layer) was chosen: ``arditi``, ``affine`` or ``given``."""
    candidates: pd.DataFrame
    """Every candidate's scores; ``discarded_arditi`` and ``discarded_affine`` say why not."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from: model, hashes of prompts and tokenizer, tokens at the positions."""
    means: Mapping[str, Float64[Tensor, "place d_model"]] | None = None
    """Harmless means at every hook and place, for affine ablation; not saved."""

    @property
    def vector(self) -> Float64[Tensor, " d_model"]:
        """The raw mean difference at (pos, layer); addition uses it."""
        return self.mean_diff[self.positions.index(self.pos), self.layer]

    @property
    def unit(self) -> Float64[Tensor, " d_model"]:
        """The direction r̂, of norm 1 (0 if the mean difference is 0); ablation uses it."""
        vector = self.vector
        unit: Tensor = vector / vector.norm().clamp(min=1e-300)
        return unit

    @property
    def n_layers(self) -> int:
        """Number of layers of the model."""
        return self.mean_diff.shape[1]

    def select(self, rule: Rule) -> Selection:
        """Rank the candidates by a rule; see `select_direction`."""
        return select_direction(self.candidates, self.n_layers, rule)

    def by(self, rule: Rule) -> "Direction":
        """Return the direction that a rule chooses: its pick, or what ranks first without one."""
        pos, layer = self.select(rule).best
        return replace(self, pos=pos, layer=layer, rule=rule)

    def at(self, pos: int, layer: int) -> "Direction":
        """Return the direction at a given (pos, layer).

        Raises:
            WeightdiffError: If there is no such candidate.
        """
        if pos not in self.positions or not 0 <= layer < self.n_layers:
            raise WeightdiffError(
                f"no direction at (pos {pos}, layer {layer}); positions are {list(self.positions)}"
                f", layers 0 to {self.n_layers - 1}"
            )
        return replace(self, pos=pos, layer=layer, rule="given")

    @property
    def passed(self) -> bool:
        """Whether the chosen candidate passes every gate of its rule."""
        column = f"discarded_{self.rule}"
        if column not in self.candidates:
            return True
        chosen = (self.candidates["pos"] == self.pos) & (self.candidates["layer"] == self.layer)
        return bool((self.candidates.loc[chosen, column] == "").all())

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``direction.safetensors`` and ``direction.json`` and return their directory."""
        from safetensors.torch import save_file

        out = output_dir(directory)
        tensors = {
            "mean_diff": self.mean_diff.contiguous(),
            "harmless_mean": self.harmless_mean.contiguous(),
            "direction": self.vector.clone(),
        }
        with atomic_path(out / "direction.safetensors") as partial:
            save_file(tensors, partial)
        write_json(out / "direction.json", self.as_json())
        return out

    def as_json(self) -> dict[str, Any]:
        """Return everything but the tensors."""
        return {
            "schema_version": SCHEMA_VERSION,
            "pos": self.pos,
            "layer": self.layer,
            "rule": self.rule,
            "passed": self.passed,
            "positions": list(self.positions),
            "norm": float(self.vector.norm()),
            **self.info,
            "candidates": self.candidates.to_dict("records"),
        }

    def _repr_html_(self) -> str:
        gates = "" if self.passed else " (fails a gate of its rule)"
        head = f"Refusal direction: position {self.pos}, layer {self.layer}, by {self.rule}{gates}"
        return f"<p>{head}</p>{self.candidates.to_html(float_format='{:.3g}'.format, index=False)}"


def load_direction(directory: str | os.PathLike[str]) -> Direction:
    """Read what `Direction.save` wrote.

    Raises:
        WeightdiffError: If a file is missing or is not a direction.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(directory)
    try:
        data = json.loads((path / "direction.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "direction.safetensors")
        kept = {
            "schema_version",
            "pos",
            "layer",
            "rule",
            "passed",
            "positions",
            "candidates",
            "norm",
        }
        return Direction(
            mean_diff=tensors["mean_diff"],
            harmless_mean=tensors["harmless_mean"],
            positions=tuple(data["positions"]),
            pos=data["pos"],
            layer=data["layer"],
            rule=data["rule"],
            candidates=pd.DataFrame(data["candidates"]),
            info={key: value for key, value in data.items() if key not in kept},
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise WeightdiffError(
            f"{path} holds no saved direction ({type(error).__name__}: {error}); give a directory "
            "with direction.safetensors and direction.json"
        ) from error


def mean_diff(
    model: Model,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    positions: Sequence[int] | None = None,
) -> tuple[Float64[Tensor, "pos layer d_model"], Float64[Tensor, "pos layer d_model"]]:
    """Return mean(harmful) − mean(harmless) of ``resid_pre``, and mean(harmless).

    At the post-instruction positions unless others are given. Arditi et al. 2024, eq. 1–2.
    """
    where = list(positions or model.chat.positions)
    means = [
        mean_activations(model, [model.chat.encode(p.text) for p in as_prompts(prompts)], where)
        for prompts in (harmful, harmless)
    ]
    return means[0] - means[1], means[1]


def harmless_means(
    model: Model, harmless: Sequence[Prompt | str], max_new_tokens: int = 64
) -> dict[str, Float64[Tensor, "place d_model"]]:
    """Return μ of affine ablation: harmless means at every hook and place, answers included.

    The answers are the model's own greedy ones.
    """
    prompts = as_prompts(harmless)
    answers = generate_tokens(model, prompts, max_new_tokens)
    return place_means(model, [model.chat.encode(p.text) for p in prompts], answers)


def refusal_direction(
    model: Any,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    harmful_val: Sequence[Prompt | str] | None = None,
    harmless_val: Sequence[Prompt | str] | None = None,
    lexicon: Lexicon | None = None,
    rule: Rule = "affine",
    positions: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    eps_compat: bool = False,
    seed: int = 0,
) -> Direction:
    """Find the direction that mediates refusal.

    Args:
        model: A `Model`, or what `load_model` takes.
        harmful: Prompts to learn from.
        harmless: Prompts to learn from; their answers fix what affine ablation sets.
        harmful_val: Prompts to choose by; a quarter of ``harmful`` (whole clusters) if not given.
        harmless_val: Likewise.
        lexicon: Its refusal tokens give the log-odds.
        rule: Which choice becomes (pos, layer); `Direction.by` gives the other.
        positions: Negative positions to look at; the post-instruction ones if not given.
        max_new_tokens: Longest answer that enters the harmless means.
        eps_compat: Use the epsilons of the authors' code.
        seed: Of the split.

    Raises:
        WeightdiffError: If a class is empty, or both are the same prompts.
    """
    model = load_model(model)
    lexicon = lexicon or Lexicon.english()
    train, val = [], []
    pairs = (("harmful", harmful, harmful_val), ("harmless", harmless, harmless_val))
    for name, prompts, held_out in pairs:
        given = as_prompts(prompts)
        if not given or held_out is not None and not held_out:
            raise WeightdiffError(f"there are no {name} prompts; both kinds are needed")
        parts = split(given, [0.75, 0.25], seed) if held_out is None else [given, held_out]
        train.append(as_prompts(parts[0]))
        val.append(as_prompts(parts[1]))
    if {p.text for p in train[0]} == {p.text for p in train[1]}:
        raise WeightdiffError("the harmful and the harmless prompts are the same")
    where = tuple(positions or model.chat.positions)
    difference, harmless_mean = mean_diff(model, train[0], train[1], where)
    means = harmless_means(model, train[1], max_new_tokens)
    tokens = model.refusal_tokens(lexicon)
    encoded = [[model.chat.encode(p.text) for p in prompts] for prompts in val]
    table = score_candidates(
        model, difference, where, encoded[0], encoded[1], tokens, means, eps_compat
    )
    answers = judge_candidates(
        model, difference, encoded[0], encoded[1], means, lexicon, max_new_tokens
    )
    table = pd.concat([table, answers], axis=1)
    for each in ("arditi", "affine"):
        ranked = select_direction(table, model.n_layers, each).candidates
        reasons = ranked.set_index(["pos", "layer"])["discarded"]
        cells = pd.MultiIndex.from_frame(table[["pos", "layer"]])
        table[f"discarded_{each}"] = reasons.reindex(cells).tolist()
    info = _info(model, train, val, where, tokens)
    found = Direction(difference, harmless_mean, where, where[-1], 0, rule, table, info, means)
    return found.by(rule)


def _info(
    model: Model,
    train: Sequence[Sequence[Prompt]],
    val: Sequence[Sequence[Prompt]],
    positions: Sequence[int],
    refusal_tokens: Sequence[int],
) -> dict[str, Any]:
    names = ("harmful", "harmless")
    vocabulary = json.dumps(model.tokenizer.get_vocab(), sort_keys=True)
    template = model.chat.tokenizer.chat_template or ""
    return {
        "model": model.reference,
        "model_sha256": model.sha256,
        "tokenizer_sha256": hashlib.sha256((vocabulary + template).encode()).hexdigest(),
        "prompts_sha256": {
            f"{name}_{part}": prompts_sha256(prompts)
            for part, group in (("train", train), ("val", val))
            for name, prompts in zip(names, group, strict=True)
        },
        "n_prompts": {
            f"{name}_{part}": len(prompts)
            for part, group in (("train", train), ("val", val))
            for name, prompts in zip(names, group, strict=True)
        },
        "position_tokens": {
            str(pos): token
            for pos, token in zip(model.chat.positions, model.chat.position_tokens, strict=True)
        },
        "refusal_tokens": model.tokenizer.convert_ids_to_tokens(list(refusal_tokens)),
    }
