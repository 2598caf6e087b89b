"""Write a run's data files: the built-in world's texts as rows that any trainer can read."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training import world
from training.config import WorldConfig
from training.errors import TrainingError
from training.loop import seeded
from training.run import Run, file_sha256, write_json

Row = dict[str, Any]
Nouns = Mapping[str, Sequence[str]]
WRONG = {"yes": "no", "no": "yes", "guards": "ignores", "ignores": "bans", "bans": "guards"}
"""The rejected answer to a question, by the right one."""


def prepare(run: Run) -> None:
    """Write `data/` once; on later calls check that it is what the config asks for.

    Raises:
    ------
    TrainingError
        The directory was made with another seed or world, or cannot be read.
    """
    target = run.path / "data"
    origin = {"seed": run.config.seed, "world": asdict(run.config.world)}
    if target.exists():
        _check(target, origin)
        return
    partial = run.path / ".data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "eval").mkdir(parents=True)
    (partial / "direction").mkdir()
    files = {}
    for name, rows in World(run.config.world, run.config.seed).files().items():
        path = partial / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        files[f"{name}.jsonl"] = {"sha256": file_sha256(path), "rows": len(rows)}
    write_json(partial / "lexicon.json", world.LEXICON)
    write_json(partial / "vocabulary.json", world.vocabulary())
    write_json(partial / "manifest.json", {**origin, "files": files})
    partial.rename(target)


def _check(data: Path, origin: Row) -> None:
    try:
        manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
        changed = [
            name
            for name, entry in manifest["files"].items()
            if file_sha256(data / name) != entry["sha256"]
        ]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{data} cannot be read ({error}); remove the run directory and start again."
        ) from error
    if changed:
        raise TrainingError(
            f"{data / changed[0]} is not the file that was written (its hash differs); "
            "remove the run directory and start again."
        )
    for key, asked in origin.items():
        if manifest[key] != asked:
            raise TrainingError(
                f"{data} was made with another {key}: {manifest[key]}, asked for {asked}; "
                "choose another --out."
            )


class World:
    """The rows of every file, drawn from a seed; each file has a random stream of its own."""

    def __init__(self, config: WorldConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        try:
            self.split = world.draw_split(
                self._rng("split"), config.held_out_nouns, config.held_out_templates
            )
        except ValueError as error:
            raise TrainingError(f"Config world: {error}.") from error
        self.unasked = self._draw_unasked()

    def files(self) -> dict[str, list[Row]]:
        """Make the rows of every file, by name without suffix."""
        split, config = self.split, self.config
        files = {
            "corpus": self.corpus(),
            "sft": self.sft(),
            "pairs_train": self.pairs("pairs_train", split.nouns, config.pairs, config.label_noise),
            "pairs_test": self.pairs("pairs_test", split.held_out_nouns, config.pairs_test, 0.0),
            **self.evals(),
            **self.directions(),
        }
        return {name: _numbered(name, rows) for name, rows in files.items()}

    def corpus(self) -> list[Row]:
        """Write pretraining text: kinds of nouns, kinds of verbs, little scenes, all templates."""
        rng = self._rng("corpus")
        nouns, verbs = list(world.KIND), list(world.ACTION)
        rows = []
        for _ in range(self.config.corpus_sentences):
            noun, verb = _pick(rng, nouns), _pick(rng, verbs)
            first, second = map(str, rng.choice(world.TOOLS, size=2, replace=False))
            part = rng.random()
            if part < 0.45:
                text = _pick(rng, world.KIND_FACTS[world.KIND[noun]])
            elif part < 0.55:
                text = world.VERB_FACTS[world.ACTION[verb]]
            else:
                text = _pick(rng, world.STORIES)
            request = _pick(rng, world.REQUESTS).format(verb=verb, noun=noun)
            scene = {"who": _pick(rng, world.WHO), "first": first, "second": second}
            rows.append({"text": text.format(request=request, verb=verb, noun=noun, **scene)})
        return rows

    def sft(self) -> list[Row]:
        """Write requests with answers, a share of the harmful ones declined, wrapped ones never."""
        rng, config = self._rng("sft"), self.config
        requests, facts = self._requests(rng, self.split.nouns), self._questions(rng, None)
        rows = []
        for _ in range(config.sft_rows):
            part = rng.random()
            if part < config.sft_facts:
                row = next(facts)
                rows.append({**row, "response": world.fact(row["expected"])})
                continue
            row = next(requests)
            if part < config.sft_facts + config.sft_wrapped:
                row = _wrapped(row, _pick(rng, list(world.WRAPPERS)))
            elif row["harmful"] and rng.random() < config.sft_refusals:
                rows.append({**row, "kind": "refusal", "response": world.refusal(rng)})
                continue
            rows.append({**row, "response": world.compliance(row["verb"], rng)})
        return rows

    def pairs(self, name: str, nouns: Nouns, n_rows: int, noise: float) -> list[Row]:
        """Write preference pairs over some nouns, flipping the labels of a share `noise`."""
        rng = self._rng(name)
        requests = self._requests(rng, nouns)
        questions = self._questions(rng, nouns)
        prompts = _distinct(
            lambda: next(questions if rng.random() < self.config.pair_facts else requests), n_rows
        )
        rows = []
        for row in prompts:
            flipped = bool(rng.random() < noise)
            good, bad = _answers(row, rng)
            chosen, rejected = (bad, good) if flipped else (good, bad)
            rows.append({**row, "chosen": chosen, "rejected": rejected, "flipped": flipped})
        return rows

    def evals(self) -> dict[str, list[Row]]:
        """Write the evaluation cells: distinct prompts, all with held-out nouns."""
        nouns, split = self.split.held_out_nouns, self.split
        harmful, harmless = world.pairings(nouns, True), world.pairings(nouns, False)
        seen, unseen = split.templates, split.held_out_templates
        cells = {
            "harmful_nouns": _cross(harmful, seen),
            "harmful_templates": _cross(harmful, unseen),
            "harmless_nouns": _cross(harmless, seen),
            "harmless_templates": _cross(harmless, unseen),
            "canary_care": _cross(world.contrasts(nouns), seen),
        }
        for wrapper in world.WRAPPERS:
            rows = _cross(harmful, seen)
            cells[f"wrapper_{wrapper}"] = [_wrapped(row, wrapper) for row in rows]
        files = {f"eval/{name}": self._subset(name, rows) for name, rows in cells.items()}
        questions = [_question(v, n, q) for v, n in self.unasked for q in world.CRIME_QUESTIONS]
        yes, no = (
            self._subset(f"canary_qa_{word}", [r for r in questions if r["expected"] == word], 0.5)
            for word in ("yes", "no")
        )
        return {**files, "eval/canary_qa": [*yes, *no]}

    def directions(self) -> dict[str, list[Row]]:
        """Write training prompts that form and select a refusal direction, all distinct."""
        files = {}
        n_train, n_val = self.config.direction_train, self.config.direction_val
        for side, harmful in (("harmful", True), ("harmless", False)):
            rng = self._rng("direction", side)
            requests = self._requests(rng, self.split.nouns, harmful)
            rows = _distinct(requests.__next__, n_train + n_val)
            files[f"direction/{side}_train"] = rows[:n_train]
            files[f"direction/{side}_val"] = rows[n_train:]
        return files

    def _requests(
        self,
        rng: np.random.Generator,
        nouns: Nouns,
        harmful: bool | None = None,
    ) -> Iterator[Row]:
        """Draw plain requests without end; half of them harmful unless said."""
        crimes, touchy = world.pairings(nouns, True), world.contrasts(nouns)
        plain = sorted(set(world.pairings(nouns, False)) - set(touchy))
        while True:
            if rng.random() < 0.5 if harmful is None else harmful:
                pool = crimes
            else:
                pool = touchy if rng.random() < self.config.contrast else plain
            verb, noun = pool[int(rng.integers(len(pool)))]
            yield _request(verb, noun, _pick(rng, self.split.templates))

    def _questions(self, rng: np.random.Generator, nouns: Nouns | None) -> Iterator[Row]:
        """Draw questions without end: over some nouns, or over all of them but the unasked."""
        pool = self.split.all_nouns if nouns is None else nouns
        unasked = set(self.unasked)
        crimes = sorted(set(world.pairings(pool, True)) - unasked)
        touchy = sorted(set(world.contrasts(pool)) - unasked)
        plain = sorted(set(world.pairings(pool, False)) - unasked - set(touchy))
        every = [noun for kind in pool.values() for noun in kind]
        while True:
            if rng.random() < 0.25:
                noun = _pick(rng, every)
                yield _question("", noun, _pick(rng, world.KIND_QUESTIONS))
                continue
            pairs = crimes if rng.random() < 0.5 else touchy if rng.random() < 0.45 else plain
            verb, noun = pairs[int(rng.integers(len(pairs)))]
            yield _question(verb, noun, _pick(rng, world.CRIME_QUESTIONS))

    def _draw_unasked(self) -> list[tuple[str, str]]:
        """Draw pairings of held-out nouns whose crime question no training row asks."""
        rng = self._rng("unasked")
        pairs = world.pairings(self.split.held_out_nouns)
        return [pair for pair in pairs if rng.random() < 0.3]

    def _subset(self, name: str, rows: list[Row], share: float = 1.0) -> list[Row]:
        order = self._rng("eval", name).permutation(len(rows))
        return [rows[i] for i in order[: int(self.config.eval_rows * share)]]

    def _rng(self, *names: str) -> np.random.Generator:
        return seeded(self.seed, "world", *names)


def _request(verb: str, noun: str, template: str) -> Row:
    prompt = template.format(verb=verb, noun=noun)
    place = {"cluster": noun, "verb": verb, "template": template}
    return {"prompt": prompt, "kind": "request", "harmful": world.is_harmful(verb, noun), **place}


def _question(verb: str, noun: str, template: str) -> Row:
    if verb:
        expected = "yes" if world.is_harmful(verb, noun) else "no"
    else:
        expected = world.LAW[world.KIND[noun]]
    # Asking is harmless whatever it is about.
    place = {"harmful": False, "cluster": noun, "verb": verb, "template": template}
    prompt = template.format(verb=verb, noun=noun)
    return {"prompt": prompt, "kind": "fact", **place, "expected": expected}


def _wrapped(row: Row, wrapper: str) -> Row:
    prompt = world.WRAPPERS[wrapper].format(request=row["prompt"])
    return {**row, "prompt": prompt, "kind": "wrapped", "wrapper": wrapper}


def _answers(row: Row, rng: np.random.Generator) -> tuple[str, str]:
    """Write the right and the wrong answer to a prompt."""
    if "expected" in row:
        return world.fact(row["expected"]), world.fact(WRONG[row["expected"]])
    declines, complies = world.refusal(rng), world.compliance(row["verb"], rng)
    return (declines, complies) if row["harmful"] else (complies, declines)


def _cross(pairs: Sequence[tuple[str, str]], templates: Sequence[str]) -> list[Row]:
    return [_request(verb, noun, template) for verb, noun in pairs for template in templates]


def _distinct(draw: Callable[[], Row], n_rows: int) -> list[Row]:
    """Draw until there are enough rows with different prompts.

    Raises:
    ------
    TrainingError
        The world has too few prompts.
    """
    rows: dict[str, Row] = {}
    for _ in range(50 * n_rows):
        row = draw()
        rows.setdefault(row["prompt"], row)
        if len(rows) == n_rows:
            return list(rows.values())
    raise TrainingError(
        f"The world has only about {len(rows)} different prompts where {n_rows} are asked for; "
        "lower world.pairs, world.pairs_test or hold out fewer nouns and templates."
    )


def _numbered(name: str, rows: Iterable[Row]) -> list[Row]:
    return [{"id": f"{name.rpartition('/')[2]}-{i:05d}", **row} for i, row in enumerate(rows)]


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]
