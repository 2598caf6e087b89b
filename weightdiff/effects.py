"""What a direction causes: answers and next-token scores with and without it, and controls."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from weightdiff.activations import activation_rows
from weightdiff.controls import random_directions
from weightdiff.direction import Direction
from weightdiff.errors import WeightdiffError
from weightdiff.interval import rate_interval
from weightdiff.intervene import (
    Addition,
    AffineAblation,
    Intervention,
    Positions,
    ZeroAblation,
    generate,
    last_logits,
)
from weightdiff.judge import Lexicon, judge
from weightdiff.model import Model
from weightdiff.prompts import Prompt, as_prompts
from weightdiff.score import kl_divergence, refusal_log_odds

Means = Mapping[str, Float64[Tensor, "place d_model"]]


@dataclass(frozen=True)
class Effects:
    """Rates and scores under every intervention and control, and the answers behind them."""

    table: pd.DataFrame
    """One row per (intervention, control, draw, prompts)."""
    completions: pd.DataFrame
    """One row per answer: intervention, control, draw, prompts, id, cluster, prompt, response, …"""

    def summary(self) -> pd.DataFrame:
        """Return one row per (intervention, prompts), the random controls as their range."""
        rows = []
        for (name, prompts), group in self.table.groupby(["intervention", "prompts"], sort=False):
            real, random = group[group["control"] == ""], group[group["control"] != ""]
            row = real.iloc[0][["n", "refusal_rate", "compliance_rate", "log_odds", "kl"]].to_dict()
            for verdict in ("refusal", "compliance"):
                rates = random[f"{verdict}_rate"]
                row[f"random_{verdict}"] = rates.mean() if len(rates) else float("nan")
            rows.append({"intervention": name, "prompts": prompts, **row})
        return pd.DataFrame(rows)


def causal_effects(
    model: Model,
    direction: Direction,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    lexicon: Lexicon | None = None,
    *,
    means: Means | None = None,
    interventions: Sequence[str] = ("none", "zero", "affine", "addition"),
    positions: Positions = "all",
    addition_positions: Positions = "last",
    alpha: float = 1.0,
    n_random: int = 3,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Effects:
    """Generate answers to held-out prompts under each intervention, and judge them.

    Args:
        model: The model to intervene in; not necessarily the one the direction came from.
        direction: Its unit is ablated, ``alpha`` times its raw mean difference is added.
        harmful: Held-out prompts, each with its cluster if they are not independent.
        harmless: Likewise.
        lexicon: How answers are judged, and the refusal tokens.
        means: μ of affine ablation, from `harmless_means`; the direction's own if not given.
        interventions: Which of ``none, zero, affine, addition`` to do.
        positions: Where zero- and affine ablation act.
        addition_positions: Where addition acts.
        alpha: Factor of the addition.
        n_random: Isotropic random directions of equal norm that go through each intervention.
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        seed: Of sampled answers, random directions and bootstraps.

    Returns:
        ``table``: counts, rates in [0, 1] and their 95 % intervals for refusal and compliance,
        ``log_odds`` of refusal at the last prompt token, and ``kl`` = KL(base ‖ intervened) there.

    Raises:
        WeightdiffError: If a class of prompts is empty, the direction's width is another, or affine
            ablation is asked for without means.
    """
    lexicon = lexicon or Lexicon.english()
    _check(model, direction, means, interventions)
    sets = {"harmful": as_prompts(harmful), "harmless": as_prompts(harmless)}
    tokens = model.refusal_tokens(lexicon)
    rows, answers = [], []
    for prompts_name, prompts in sets.items():
        if not prompts:
            raise WeightdiffError(f"there are no {prompts_name} prompts to test on")
        encoded = [model.chat.encode(p.text) for p in prompts]
        base = last_logits(model, encoded)
        for label, acting in _trials(
            model, direction, means or direction.means, interventions, positions,
            addition_positions, alpha, n_random, seed,
        ):  # fmt: skip
            logits = last_logits(model, encoded, acting) if acting else base
            texts = generate(model, prompts, max_new_tokens, temperature, seed, acting)
            judged = _judged(prompts, texts, lexicon)
            key = {**label, "prompts": prompts_name}
            answers.append(judged.assign(**key))
            scores = {
                "log_odds": float(refusal_log_odds(logits, tokens).mean()),
                "kl": float(kl_divergence(base, logits).mean()),
            }
            rows.append({**key, "temperature": temperature, **_rates(judged, seed), **scores})
    return Effects(pd.DataFrame(rows), pd.concat(answers, ignore_index=True))


def _check(
    model: Model, direction: Direction, means: Means | None, interventions: Sequence[str]
) -> None:
    unknown = set(interventions) - {"none", "zero", "affine", "addition"}
    if unknown:
        raise WeightdiffError(f"unknown intervention {min(unknown)!r}")
    if direction.mean_diff.shape[-1] != model.d_model or direction.layer >= model.n_layers:
        raise WeightdiffError(
            f"the direction is {direction.mean_diff.shape[-1]} wide, at layer {direction.layer}; "
            f"{model.reference} has d_model {model.d_model} and {model.n_layers} layers"
        )
    if "affine" in interventions and means is None and direction.means is None:
        raise WeightdiffError(
            "affine ablation needs the model's harmless means: pass means=harmless_means(model, "
            "harmless training prompts)"
        )


def _trials(
    model: Model,
    direction: Direction,
    means: Means | None,
    interventions: Sequence[str],
    positions: Positions,
    addition_positions: Positions,
    alpha: float,
    n_random: int,
    seed: int,
) -> Iterator[tuple[dict[str, Any], list[Intervention]]]:
    """Yield a label and the interventions of every row of the table."""
    vector = direction.vector
    drawn = random_directions(model.d_model, float(vector.norm()), n_random, seed)
    candidates: list[tuple[str, int, Tensor]] = [("", 0, vector)]
    candidates += [("random", draw, row) for draw, row in enumerate(drawn)]
    place = {"pos": direction.pos, "layer": direction.layer, "alpha": float("nan")}
    for name in interventions:
        if name == "none":
            empty = {"control": "", "draw": 0, "positions": ""}
            yield {"intervention": name, **empty, **place}, []
            continue
        where = addition_positions if name == "addition" else positions
        for control, draw, each in candidates:
            label = {"intervention": name, "control": control, "draw": draw, "positions": where}
            label |= {**place, "alpha": alpha} if name == "addition" else place
            yield label, [_intervention(name, each, direction.layer, alpha, where, means)]


def _intervention(
    name: str,
    vector: Float64[Tensor, " d_model"],
    layer: int,
    alpha: float,
    positions: Positions,
    means: Means | None,
) -> Intervention:
    if name == "addition":
        return Addition(vector, layer, alpha, positions)
    unit = vector / vector.norm().clamp(min=1e-300)
    if name == "zero":
        return ZeroAblation(unit, positions)
    assert means is not None
    return AffineAblation(unit, means, positions)


def _judged(prompts: Sequence[Prompt], texts: Sequence[str], lexicon: Lexicon) -> pd.DataFrame:
    verdicts = [judge(text, lexicon) for text in texts]
    return pd.DataFrame(
        {
            "id": [p.key for p in prompts],
            "cluster": [p.cluster for p in prompts],
            "prompt": [p.text for p in prompts],
            "response": list(texts),
            "refusal": [v.refusal for v in verdicts],
            "compliance": [v.compliance for v in verdicts],
            "reason": [v.reason for v in verdicts],
        }
    )


def _rates(judged: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Count the verdicts: n, and for each its count, rate and 95 % interval."""
    found: dict[str, Any] = {"n": len(judged)}
    for verdict in ("refusal", "compliance"):
        values = judged[verdict].tolist()
        low, high = rate_interval(values, judged["cluster"].tolist(), seed)
        found |= {
            f"{verdict}_count": sum(values),
            f"{verdict}_rate": sum(values) / len(values),
            f"{verdict}_low": low,
            f"{verdict}_high": high,
        }
    return found


def project(model: Model, prompts: Sequence[Prompt | str], direction: Direction) -> pd.DataFrame:
    """Project prompts on a direction, before every layer, after the instruction and at its end.

    Returns:
        One row per (prompt, pos, layer): ``projection`` r̂ᵀx; and ``relative``, which is 0 at the
        harmless and 1 at the harmful training mean of the same (pos, layer), and is missing where
        the direction has no such mean (the instruction's last token).
    """
    asked = as_prompts(prompts)
    end = -len(model.chat.positions) - 1 if model.chat.n_post else -1
    where = sorted({end, *direction.positions})
    rows = activation_rows(
        model, [model.chat.encode(p.text) for p in asked], where, range(model.n_layers)
    )
    along: Float[Tensor, "row pos layer"] = rows @ direction.unit
    relative = torch.full_like(along, torch.nan)
    for i, pos in enumerate(where):
        if pos in direction.positions:
            j = direction.positions.index(pos)
            zero = direction.harmless_mean[j] @ direction.unit
            one = direction.mean_diff[j] @ direction.unit
            relative[:, i] = (along[:, i] - zero) / one
    index = pd.MultiIndex.from_product(
        [[p.key for p in asked], where, range(model.n_layers)], names=["id", "pos", "layer"]
    )
    values = {"projection": along.flatten().tolist(), "relative": relative.flatten().tolist()}
    made = pd.DataFrame(values, index=index).reset_index()
    clusters = [p.cluster for p in asked for _ in range(len(where) * model.n_layers)]
    made.insert(1, "cluster", clusters)
    return made
