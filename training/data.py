"""Write a run's data files once, with their hashes, and check them on later runs."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training import world
from training.errors import TrainingError
from training.rows import World
from training.run import Run
from training.stage import file_sha256, sync_tree, write_json


def prepare(run: Run) -> None:
    """Write `data/` once; on later calls check that it is what the config asks for.

    Raises:
        TrainingError: the directory was made with another seed or world, or cannot be read.
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
    sync_tree(partial)
    partial.rename(target)


def _check(data: Path, origin: dict[str, Any]) -> None:
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
