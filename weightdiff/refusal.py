"""The whole refusal analysis of one checkpoint: find the direction, choose it, prove it causal."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from weightdiff.artefact import atomic_path, output_dir, write_text
from weightdiff.direction import Direction, refusal_direction
from weightdiff.effects import Effects, causal_effects, project
from weightdiff.errors import WeightdiffError
from weightdiff.intervene import Positions
from weightdiff.judge import Lexicon
from weightdiff.model import load_model
from weightdiff.prompts import Prompt, as_prompts
from weightdiff.selection import Rule
from weightdiff.split import split

if TYPE_CHECKING:
    from weightdiff.plots.refusal import RefusalPlots

__all__ = ["Refusal", "causal_effects", "project", "refusal"]

SCHEMA_VERSION = 1
RULES: tuple[Rule, Rule] = ("affine", "arditi")
PROMPTS = {"train": 128, "val": 64, "test": 200}
"""How many prompts of each class are used at most."""
_SHARES = (0.5, 0.2, 0.3)


@dataclass(frozen=True)
class Refusal:
    """A checkpoint's refusal direction and what it causes on held-out prompts."""

    direction: Direction
    """The direction that the affine rule chooses; ``direction.by("arditi")`` is the other."""
    effects: Effects
    """Answers and scores under each intervention, ``rule`` saying with which choice."""

    @property
    def candidates(self) -> pd.DataFrame:
        """Every (pos, layer) with its scores and why each rule discarded it."""
        return self.direction.candidates

    @cached_property
    def plot(self) -> "RefusalPlots":
        """The figures: ``candidates()`` and ``effects()``."""
        from weightdiff.plots.refusal import RefusalPlots

        return RefusalPlots(self)

    def rates(self, rule: Rule = "affine") -> pd.DataFrame:
        """Return refusal and compliance per intervention and prompts, beside random directions."""
        chosen = self.effects.table[self.effects.table["rule"] == rule]
        return Effects(chosen, self.effects.completions).summary()

    def as_json(self) -> dict[str, Any]:
        """Return the whole result but the answers, for `--json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "direction": {
                k: v for k, v in self.direction.as_json().items() if k != "schema_version"
            },
            "picks": {rule: _pick(self.direction.by(rule)) for rule in RULES},
            "effects": self.effects.table.to_dict("records"),
        }

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the direction, tables, answers and ``refusal.html``; return the directory."""
        from weightdiff.plots.refusal import refusal_page

        out = output_dir(directory)
        self.direction.save(out)
        for name, frame in (("candidates", self.candidates), ("effects", self.effects.table)):
            with atomic_path(out / f"{name}.parquet") as partial:
                frame.to_parquet(partial)
        lines = self.effects.completions.to_json(orient="records", lines=True, force_ascii=False)
        write_text(out / "completions.jsonl", lines)
        refusal_page(self).write(out / "refusal.html")
        return out

    def _repr_html_(self) -> str:
        table = self.rates().to_html(float_format="{:.3g}".format, index=False)
        return f"<p>{describe(self.direction)}</p>{table}"


def describe(direction: Direction) -> str:
    """Say in one sentence which direction was chosen, how, and whether it passed its gates."""
    token = direction.info.get("position_tokens", {}).get(str(direction.pos), "")
    where = f"position {direction.pos}" + (f" ({token})" if token else "")
    text = f"{where}, before layer {direction.layer}, by the {direction.rule} rule"
    return text if direction.passed else f"{text}; no candidate passes every gate, this ranks first"


def _pick(direction: Direction) -> dict[str, Any]:
    return {"pos": direction.pos, "layer": direction.layer, "passed": direction.passed}


def refusal(
    model: Any,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    *,
    harmful_val: Sequence[Prompt | str] | None = None,
    harmless_val: Sequence[Prompt | str] | None = None,
    harmful_test: Sequence[Prompt | str] | None = None,
    harmless_test: Sequence[Prompt | str] | None = None,
    lexicon: Lexicon | None = None,
    positions: Positions = "all",
    alpha: float = 1.0,
    n_random: int = 3,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    eps_compat: bool = False,
    seed: int = 0,
) -> Refusal:
    """Find a checkpoint's refusal direction and measure what it causes on held-out prompts.

    Prompts that are not given as ``_val`` or ``_test`` are split off from the first ones, whole
    clusters at a time; at most `PROMPTS` of each are used, drawn with ``seed``. Random directions
    accompany the affine pick; the pick of the authors' rule is tested beside it where it differs.

    Args:
        model: A `Model`, or what `load_model` takes.
        harmful: Prompts that the model should refuse.
        harmless: Prompts that it should answer.
        harmful_val: To choose the direction by.
        harmless_val: Likewise.
        harmful_test: To measure effects on.
        harmless_test: Likewise.
        lexicon: Refusal tokens and phrases; English by default.
        positions: Where ablation acts.
        alpha: Factor of the addition, which acts at the last prompt token.
        n_random: Random directions of equal norm as controls.
        max_new_tokens: Longest answer.
        temperature: Of the tested answers; 0 is greedy.
        eps_compat: Use the epsilons of the authors' code.
        seed: Of splits, sampled answers, random directions and bootstraps.

    Raises:
        WeightdiffError: If a class is empty or has too few prompts to split.
    """
    model = load_model(model)
    lexicon = lexicon or Lexicon.english()
    parts = {
        "harmful": _parts("harmful", harmful, harmful_val, harmful_test, seed),
        "harmless": _parts("harmless", harmless, harmless_val, harmless_test, seed),
    }
    direction = refusal_direction(
        model,
        parts["harmful"]["train"],
        parts["harmless"]["train"],
        harmful_val=parts["harmful"]["val"],
        harmless_val=parts["harmless"]["val"],
        lexicon=lexicon,
        max_new_tokens=max_new_tokens,
        eps_compat=eps_compat,
        seed=seed,
    )
    tables, completions = [], []
    for rule in RULES:
        chosen = direction.by(rule)
        same = rule != "affine" and (chosen.pos, chosen.layer) == (direction.pos, direction.layer)
        if same:
            continue
        effects = causal_effects(
            model,
            chosen,
            parts["harmful"]["test"],
            parts["harmless"]["test"],
            lexicon,
            interventions=("none", "zero", "affine", "addition")[rule != "affine" :],
            positions=positions,
            alpha=alpha,
            n_random=n_random if rule == "affine" else 0,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        tables.append(effects.table.assign(rule=rule))
        completions.append(effects.completions.assign(rule=rule))
    every = Effects(pd.concat(tables, ignore_index=True), pd.concat(completions, ignore_index=True))
    return Refusal(direction, every)


def _parts(
    name: str,
    prompts: Sequence[Prompt | str],
    val: Sequence[Prompt | str] | None,
    test: Sequence[Prompt | str] | None,
    seed: int,
) -> dict[str, list[Prompt]]:
    """Return train, val and test prompts, splitting off what was not given."""
    given = {"train": as_prompts(prompts)}
    given |= {k: as_prompts(v) for k, v in (("val", val), ("test", test)) if v is not None}
    for part, each in given.items():
        if not each:
            raise WeightdiffError(f"there are no {name} {part} prompts; both kinds are needed")
    missing = [part for part in ("val", "test") if part not in given]
    if missing:
        shares = [_SHARES[0], *(_SHARES[list(PROMPTS).index(part)] for part in missing)]
        for part, each in zip(
            ["train", *missing], split(given["train"], shares, seed), strict=True
        ):
            given[part] = each
    return {part: _at_most(given[part], n, seed) for part, n in PROMPTS.items()}


def _at_most(prompts: list[Prompt], n: int, seed: int) -> list[Prompt]:
    if len(prompts) <= n:
        return prompts
    kept = np.random.default_rng(seed).choice(len(prompts), n, replace=False)
    return [prompts[i] for i in sorted(kept)]
