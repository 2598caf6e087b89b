"""Prompts: reading them from files, and turning them into tokens with a chat template."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from weightdiff.errors import WeightdiffError

_TEXT_KEYS = ("prompt", "instruction", "question", "goal", "text")


@dataclass(frozen=True)
class Prompt:
    """One instruction, as a user would type it."""

    text: str
    cluster: str | None = None
    """Prompts of one cluster (one noun, say) are not independent of each other."""
    id: str = ""
    """Names the prompt in results and keys its random numbers; its text when empty."""
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Everything else the file said about it."""

    @property
    def key(self) -> str:
        """Return what the prompt's random numbers are derived from."""
        return self.id or self.text


def load_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read prompts from a JSON list, JSON lines, or a text file with one prompt a line.

    An entry is a string, or an object with the prompt under ``prompt`` (or ``instruction``,
    ``question``, ``goal``, ``text``) and optionally ``cluster`` and ``id``.

    Raises:
        WeightdiffError: If the file is missing, cannot be parsed, or holds no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise WeightdiffError(f"cannot read the prompts in {path}: {reason}") from error
    prompts = [_prompt(entry, path, number) for number, entry in _entries(text, path)]
    if not prompts:
        raise WeightdiffError(f"{path} holds no prompt; give at least one")
    return prompts


def as_prompts(prompts: Iterable[Prompt | str]) -> list[Prompt]:
    """Return ``prompts`` with strings wrapped."""
    return [Prompt(p) if isinstance(p, str) else p for p in prompts]


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Return the hash of the texts in their order."""
    joined = json.dumps([prompt.text for prompt in prompts], ensure_ascii=False)
    return hashlib.sha256(joined.encode()).hexdigest()


def _entries(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".json":
        entries = _parse(text, path, "it") if text.strip() else []
        if not isinstance(entries, list):
            raise WeightdiffError(f"{path} must hold a JSON list of prompts")
        yield from enumerate(entries, 1)
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from ((n, _parse(line, path, f"line {n}")) for n, line in lines)
    else:
        yield from ((n, line.strip()) for n, line in lines)


def _parse(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightdiffError(f"{path}: {where} is not JSON ({error.msg})") from error


def _prompt(entry: Any, path: Path, number: int) -> Prompt:
    row = {"prompt": entry} if isinstance(entry, str) else entry
    keys = [k for k in _TEXT_KEYS if isinstance(row, dict) and isinstance(row.get(k), str)]
    if not keys or not row[keys[0]].strip():
        raise WeightdiffError(
            f"{path}: entry {number} has no prompt; it must be a string, or an object with one of "
            + ", ".join(_TEXT_KEYS)
        )
    cluster = row.get("cluster")
    return Prompt(
        text=row[keys[0]],
        cluster=None if cluster is None else str(cluster),
        id=str(row.get("id", "")),
        row={k: v for k, v in row.items() if k not in (keys[0], "cluster", "id")},
    )


@dataclass(frozen=True)
class ChatFormat:
    """How an instruction becomes tokens: ``prefix + instruction + post-instruction tokens``.

    The template's own tokens are found by templating many instructions: what all of them begin
    and end with belongs to the template.
    """

    tokenizer: Any
    plain: bool = False
    """Tokenise the instruction as it is, for models without a chat template."""

    def __post_init__(self) -> None:
        if not self.plain and not self.tokenizer.chat_template:
            raise WeightdiffError(
                "the tokenizer has no chat template; give one (--chat-template FILE), or say that "
                "prompts are to be used as they are (--plain)"
            )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of one instruction, up to where the answer begins.

        A plain prompt gets the special tokens that the tokenizer itself adds, such as BOS.
        """
        if self.plain:
            ids: list[int] = self.tokenizer(text).input_ids
            return ids
        chat = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        ids = self.tokenizer(rendered, add_special_tokens=False).input_ids
        return ids

    @cached_property
    def _probes(self) -> list[list[int]]:
        words = _probe_words(self.tokenizer)
        return [self.encode(text) for text in words + [f"{w} {v}" for w, v in pairwise(words)]]

    @cached_property
    def n_prefix(self) -> int:
        """Number of tokens before the instruction."""
        return _common_prefix(self._probes)

    @cached_property
    def n_post(self) -> int:
        """Number of tokens after the instruction; the last of them precedes the answer."""
        return _common_prefix([ids[::-1] for ids in self._probes])

    @cached_property
    def positions(self) -> list[int]:
        """Post-instruction positions, counted from the end: ``[-n_post, …, -1]``.

        A template that puts nothing after the instruction has one, −1, which is then the
        instruction's own last token.
        """
        return list(range(-max(self.n_post, 1), 0))

    @cached_property
    def position_tokens(self) -> list[str]:
        """The token at each of ``positions``, or ``(instruction)``."""
        if not self.n_post:
            return ["(instruction)"]
        tokens: list[str] = self.tokenizer.convert_ids_to_tokens(self._probes[0][-self.n_post :])
        return tokens

    def places(self, mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """Number the place of each token of left-padded prompts.

        ``0 … n_prefix−1`` are the template's first tokens, ``n_prefix`` any token of the
        instruction, then one number for each post-instruction position up to ``n_places − 2``;
        ``n_places − 1`` is the response. Padding gets 0.
        """
        n_pos = mask.shape[1]
        column = torch.arange(n_pos, device=mask.device)
        offset = column[None] - (n_pos - mask.sum(1, keepdim=True))
        from_end = column[None] - n_pos
        places = offset.clamp(0, self.n_prefix)
        after = from_end >= -self.n_post
        return torch.where(after, self.n_prefix + 1 + self.n_post + from_end, places)

    @property
    def n_places(self) -> int:
        """Number of different places, the response being the last."""
        return self.n_prefix + self.n_post + 2


def _probe_words(tokenizer: Any, wanted: int = 12) -> list[str]:
    """Return ordinary words spread over the vocabulary that survive a round trip."""
    words: dict[str, None] = {}
    size = len(tokenizer)
    for index in range(0, size, max(1, size // 400)):
        word = tokenizer.decode([index]).strip()
        ids = tokenizer(word, add_special_tokens=False).input_ids if word.isalpha() else []
        if ids and tokenizer.unk_token_id not in ids:
            words[word] = None
    spread = list(words)
    if len(spread) < 2:
        raise WeightdiffError("the tokenizer's vocabulary has no two words to find the template by")
    return spread[:: max(1, len(spread) // wanted)]


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


@dataclass(frozen=True)
class Batch:
    """Left-padded token ids of some of the rows."""

    index: list[int]
    """Which rows, in the caller's order."""
    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Return the rows as one tensor padded on the left, and the mask of real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None] >= width - lengths[:, None]


def batches(rows: Sequence[Sequence[int]], pad_id: int, batch_size: int) -> Iterator[Batch]:
    """Yield the rows in batches of similar length, longest first so that memory peaks at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        yield Batch(index, *pad_left([rows[i] for i in index], pad_id))
