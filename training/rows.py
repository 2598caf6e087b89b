"""Draw the rows of every data file from the built-in world: who is asked what, and the answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from training import world
from training.config import WorldConfig
from training.errors import TrainingError
from training.loop import seeded
from training.split import Pairing, Pool, draw_split, pairings, pick, shuffle

Row = dict[str, Any]
Nouns = Mapping[str, Sequence[str]]

CORPUS = {"kind": 0.32, "verb": 0.08, "verdict": 0.3, "story": 0.3}
"""Share of each sort of sentence in the pretraining text."""
KIND_QUESTIONS = 0.25
"""Share of the questions that ask for the kind of a noun; the others ask what is a crime."""
TOLD = {"care": 0.25, "crossed": 0.5}
"""Shares among the harmless pairings of texts and questions that tell what is a crime."""
PATIENCE = 300
"""Prompts drawn again in a row after which a world counts as exhausted."""


class World:
    """The rows of every file, drawn from a seed; each file has a random stream of its own."""

    def __init__(self, config: WorldConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.split = draw_split(
            self._rng("split"), config.held_out_nouns, config.held_out_templates
        )

    def files(self) -> dict[str, list[Row]]:
        """Make the rows of every file, by the file's name without suffix."""
        split, config = self.split, self.config
        files = {
            "corpus": self.corpus(),
            "sft": self.sft(),
            "pairs_train": self.pairs("pairs_train", split.nouns, config.pairs, config.label_noise),
            "pairs_test": self.pairs("pairs_test", split.held_out_nouns, config.pairs_test, 0.0),
            **{f"eval/{name}": rows for name, rows in self.evals().items()},
            **{f"direction/{name}": rows for name, rows in self.directions().items()},
        }
        return {name: _numbered(name.rpartition("/")[2], rows) for name, rows in files.items()}

    def corpus(self) -> list[Row]:
        """Write pretraining text: kinds of nouns and verbs, what is a crime, little scenes."""
        rng, config = self._rng("corpus"), self.config
        every, told = pairings(self.split.all_nouns), self._told(self.split.all_nouns)
        sorts = rng.choice(list(CORPUS), p=list(CORPUS.values()), size=config.corpus_sentences)
        rows = []
        for sort in sorts.tolist():
            verb, noun = told.draw(rng) if sort == "verdict" else pick(rng, every)
            forms = {
                "kind": world.KIND_FACTS[world.KIND[noun]],
                "verb": world.VERB_FACTS[world.ACTION[verb]],
                "verdict": world.VERDICTS,
                "story": world.STORIES,
            }[sort]
            rows.append({"text": _sentence(rng, pick(rng, forms), verb, noun)})
        return rows

    def sft(self) -> list[Row]:
        """Write prompts with answers: a share of the harmful declined, of the wrapped ones none."""
        rng, config = self._rng("sft"), self.config
        requests, questions = self._pool(self.split.nouns), self._told(self.split.all_nouns)
        rows = []
        for part in rng.random(config.sft_rows):
            if part < config.sft_facts:
                row = self._question(rng, questions)
                rows.append({**row, "response": world.fact(row["expected"])})
                continue
            row = self._request(rng, requests)
            if part < config.sft_facts + config.sft_wrapped:
                row = _wrapped(row, pick(rng, list(world.WRAPPERS)))
            elif row["harmful"] and rng.random() < config.sft_refusals:
                rows.append({**row, "kind": "refusal", "response": world.refusal(rng)})
                continue
            rows.append({**row, "response": world.compliance(row["verb"], rng)})
        return rows

    def pairs(self, name: str, nouns: Nouns, n_rows: int, noise: float) -> list[Row]:
        """Write preference pairs over some nouns, flipping the labels of a share `noise`."""
        rng, requests, questions = self._rng(name), self._pool(nouns), self._told(nouns)

        def draw() -> Row:
            asks = rng.random() < self.config.pair_facts
            return self._question(rng, questions) if asks else self._request(rng, requests)

        rows = []
        for row in _distinct(draw, n_rows):
            flipped = bool(rng.random() < noise)
            good, bad = _answers(row, rng)
            chosen, rejected = (bad, good) if flipped else (good, bad)
            rows.append({**row, "chosen": chosen, "rejected": rejected, "flipped": flipped})
        return rows

    def evals(self) -> dict[str, list[Row]]:
        """Write the evaluation cells: distinct prompts, all with held-out nouns."""
        split, pool = self.split, self._pool(self.split.held_out_nouns)
        crimes = _cross(pool.crimes, split.templates)
        unasked = sorted(split.unasked)
        questions = [_question(*pair, form) for form in world.CRIME_QUESTIONS for pair in unasked]
        yes, no = ([row for row in questions if row["expected"] == word] for word in ("yes", "no"))
        n_yes = min(len(yes), self.config.eval_rows // 2)
        cells = {
            "harmful_nouns": crimes,
            "harmful_templates": _cross(pool.crimes, split.held_out_templates),
            "harmless_nouns": _cross(pool.harmless, split.templates),
            "harmless_templates": _cross(pool.harmless, split.held_out_templates),
            "canary_care": _cross(pool.care, split.templates),
            "canary_qa": shuffle(self._rng("yes"), yes)[:n_yes]
            + shuffle(self._rng("no"), no)[: self.config.eval_rows - n_yes],
        }
        for wrapper in world.WRAPPERS:
            cells[f"wrapper_{wrapper}"] = [_wrapped(row, wrapper) for row in crimes]
        n_rows = self.config.eval_rows
        return {name: shuffle(self._rng(name), rows)[:n_rows] for name, rows in cells.items()}

    def directions(self) -> dict[str, list[Row]]:
        """Write training prompts that form and select a refusal direction, all distinct."""
        pool, n_train = self._pool(self.split.nouns), self.config.direction_train
        files: dict[str, list[Row]] = {}
        for side in ("harmful", "harmless"):
            rng = self._rng("direction", side)

            def draw(rng: np.random.Generator = rng, harmful: bool = side == "harmful") -> Row:
                return self._request(rng, pool, harmful)

            rows = _distinct(draw, n_train + self.config.direction_val)
            files |= {f"{side}_train": rows[:n_train], f"{side}_val": rows[n_train:]}
        return files

    def _request(self, rng: np.random.Generator, pool: Pool, harmful: bool | None = None) -> Row:
        return _request(*pool.draw(rng, harmful), pick(rng, self.split.templates))

    def _question(self, rng: np.random.Generator, pool: Pool) -> Row:
        pair = pool.draw(rng)
        if rng.random() < KIND_QUESTIONS:
            return _question("", pair[1], pick(rng, world.KIND_QUESTIONS))
        return _question(*pair, pick(rng, world.CRIME_QUESTIONS))

    def _pool(self, nouns: Nouns) -> Pool:
        return Pool(pairings(nouns), self.config.care, self.config.crossed)

    def _told(self, nouns: Nouns) -> Pool:
        told = [pair for pair in pairings(nouns) if pair not in self.split.unasked]
        return Pool(told, **TOLD)

    def _rng(self, *names: str) -> np.random.Generator:
        return seeded(self.seed, "world", *names)


def _sentence(rng: np.random.Generator, form: str, verb: str, noun: str) -> str:
    first, second = shuffle(rng, world.TOOLS)[:2]
    request = pick(rng, world.REQUESTS).format(verb=verb, noun=noun)
    harmful = world.is_harmful(verb, noun)
    question = pick(rng, world.CRIME_QUESTIONS).format(verb=verb, noun=noun)
    law = {"verdict": world.VERDICT[harmful], "judgement": world.JUDGEMENT[harmful]}
    law["answer"] = world.fact("yes" if harmful else "no")
    scene = {"who": pick(rng, world.WHO), "first": first, "second": second, **law}
    scene["reason"] = pick(rng, world.REASONS)
    return form.format(request=request, question=question, verb=verb, noun=noun, **scene)


def _request(verb: str, noun: str, template: str) -> Row:
    prompt = template.format(verb=verb, noun=noun)
    place = {"cluster": noun, "verb": verb, "template": template}
    return {"prompt": prompt, "kind": "request", "harmful": world.is_harmful(verb, noun), **place}


def _question(verb: str, noun: str, template: str) -> Row:
    """Make a question's row; asking is harmless whatever it is about."""
    if verb:
        expected = "yes" if world.is_harmful(verb, noun) else "no"
    else:
        expected = world.LAW[world.KIND[noun]]
    place = {"harmful": False, "cluster": noun, "verb": verb, "template": template}
    prompt = template.format(verb=verb, noun=noun)
    return {"prompt": prompt, "kind": "fact", **place, "expected": expected}


def _wrapped(row: Row, wrapper: str) -> Row:
    prompt = world.WRAPPERS[wrapper].format(request=row["prompt"])
    return {**row, "prompt": prompt, "kind": "wrapped", "wrapper": wrapper}


def _answers(row: Row, rng: np.random.Generator) -> tuple[str, str]:
    """Write the right and the wrong answer to a prompt."""
    if "expected" in row:
        return world.fact(row["expected"]), world.fact(world.MISTAKE[row["expected"]])
    declines, complies = world.refusal(rng), world.compliance(row["verb"], rng)
    return (declines, complies) if row["harmful"] else (complies, declines)


def _cross(pairs: Sequence[Pairing], templates: Sequence[str]) -> list[Row]:
    return [_request(*pair, template) for pair in pairs for template in templates]


def _distinct(draw: Callable[[], Row], n_rows: int) -> list[Row]:
    """Draw until there are enough rows with different prompts.

    Raises:
        TrainingError: the world has too few prompts.
    """
    rows: dict[str, Row] = {}
    misses = 0
    while len(rows) < n_rows:
        row = draw()
        misses = misses + 1 if row["prompt"] in rows else 0
        if misses == PATIENCE:
            raise TrainingError(
                f"The world has hardly more than {len(rows)} different prompts where {n_rows} are "
                "asked for; lower the sizes in [world] or hold out fewer nouns and templates."
            )
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _numbered(name: str, rows: Sequence[Row]) -> list[Row]:
    return [{"id": f"{name}-{i:05d}", **row} for i, row in enumerate(rows)]
