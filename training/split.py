"""Draw what of the built-in world is held out, and pairings of verbs and nouns from the rest."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from training import world
from training.errors import TrainingError

Pairing = tuple[str, str]
"""A verb and a noun."""
T = TypeVar("T")

UNASKED = 0.3
"""Share of the held-out nouns' pairings that are kept for evaluation: nothing in training says
whether they are a crime."""


@dataclass(frozen=True)
class Split:
    """What training may see in requests, and what it may not."""

    nouns: Mapping[str, tuple[str, ...]]
    """Kind → nouns of requests and pairs."""
    held_out_nouns: Mapping[str, tuple[str, ...]]
    """Kind → nouns of the corpus and of questions only."""
    templates: tuple[str, ...]
    """Request templates of requests and pairs."""
    held_out_templates: tuple[str, ...]
    """Request templates of the corpus only."""
    unasked: frozenset[Pairing]
    """Pairings of held-out nouns that occur in no text that tells whether they are a crime."""

    @property
    def all_nouns(self) -> dict[str, tuple[str, ...]]:
        """Kind → every noun."""
        return {kind: self.nouns[kind] + self.held_out_nouns[kind] for kind in world.KINDS}


def draw_split(rng: np.random.Generator, held_out_nouns: int, held_out_templates: int) -> Split:
    """Draw which nouns of each kind and which templates are held out.

    Raises:
        TrainingError: nothing would be left to train on.
    """
    fewest = min(map(len, world.KINDS.values()))
    if held_out_nouns >= fewest or held_out_templates >= len(world.REQUESTS):
        raise TrainingError(
            f"Config world: held_out_nouns must be below {fewest} and held_out_templates below "
            f"{len(world.REQUESTS)}, got {held_out_nouns} and {held_out_templates}."
        )
    shuffled = {kind: shuffle(rng, nouns) for kind, nouns in world.KINDS.items()}
    templates = shuffle(rng, world.REQUESTS)
    held = {kind: tuple(nouns[:held_out_nouns]) for kind, nouns in shuffled.items()}
    pairs = shuffle(rng, pairings(held))
    return Split(
        nouns={kind: tuple(nouns[held_out_nouns:]) for kind, nouns in shuffled.items()},
        held_out_nouns=held,
        templates=tuple(templates[held_out_templates:]),
        held_out_templates=tuple(templates[:held_out_templates]),
        unasked=frozenset(pairs[: round(UNASKED * len(pairs))]),
    )


def pairings(nouns: Mapping[str, Sequence[str]]) -> list[Pairing]:
    """List every verb with every noun."""
    return list(itertools.product(world.ACTION, itertools.chain.from_iterable(nouns.values())))


class Pool:
    """Pairings over some nouns in four groups, from which training draws by given shares.

    `care` are the caring verbs on touchy nouns (guarded or banned), `crossed` the others that are
    harmless in spite of both words: harming what is banned, obtaining what is guarded. Without
    many of these a model learns that any harsh verb with any touchy noun is a crime.
    """

    def __init__(self, every: Sequence[Pairing], care: float, crossed: float) -> None:
        self.crimes = [pair for pair in every if world.is_harmful(*pair)]
        self.harmless = [pair for pair in every if not world.is_harmful(*pair)]
        touchy = [(v, n) for v, n in self.harmless if world.KIND[n] != "ordinary"]
        self.care = [(v, n) for v, n in touchy if world.ACTION[v] == "care"]
        self.crossed = [(v, n) for v, n in touchy if world.ACTION[v] != "care"]
        self.ordinary = [(v, n) for v, n in self.harmless if world.KIND[n] == "ordinary"]
        self.shares = np.cumsum([care, crossed])

    def draw(self, rng: np.random.Generator, harmful: bool | None = None) -> Pairing:
        """Draw a pairing; a crime in half of the cases unless said."""
        if rng.random() < 0.5 if harmful is None else harmful:
            return pick(rng, self.crimes)
        groups = (self.care, self.crossed, self.ordinary)
        return pick(rng, groups[int(np.searchsorted(self.shares, rng.random(), side="right"))])


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Draw one item."""
    return items[int(rng.integers(len(items)))]


def shuffle(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """Return the items in a random order."""
    return [items[i] for i in rng.permutation(len(items)).tolist()]
