"""A causal language model whose residual stream can be read and edited by hook name.

A thin object around TransformerLens's ``TransformerBridge``. It is given token ids, never strings
(the bridge re-loads tokenizers with a BOS of its own), explicit positions (left padding shifts
them) and a tokenizer read from disk.
"""

import copy
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weightdiff.errors import WeightdiffError
from weightdiff.judge import Lexicon
from weightdiff.prompts import ChatFormat

Hook = tuple[str, Callable[..., Tensor | None]]
"""A TransformerLens hook name and ``fn(activation, hook=point)``; None leaves it unchanged."""


@dataclass(frozen=True)
class Output:
    """Logits of one forward pass, and the key–value cache if one was asked for."""

    logits: Float[Tensor, "batch pos d_vocab"]
    cache: Any = None


class Model:
    """A loaded model, its tokenizer and its chat format. Make one with `load_model`."""

    def __init__(self, bridge: Any, tokenizer: Any, chat: ChatFormat, reference: str) -> None:
        self.bridge = bridge
        self.tokenizer = tokenizer
        self.chat = chat
        self.reference = reference
        self.hf_config = bridge.original_model.config
        self.n_layers: int = len(bridge.blocks)
        self.d_model: int = bridge.cfg.d_model
        signature = inspect.signature(bridge.original_model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature else {}
        self._takes_positions = "position_ids" in signature

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.bridge.original_model.parameters()).device)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends an answer: the generation config's and the tokenizer's."""
        generation = getattr(self.bridge.original_model, "generation_config", None)
        ids: set[int] = set()
        for source in (generation, self.hf_config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            ids |= {value} if isinstance(value, int) else set(value or ())
        return frozenset(ids)

    @cached_property
    def pad_id(self) -> int:
        """A token for padding, which is masked: the tokenizer's, else an end token, else 0."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.eos_ids, default=0)

    @cached_property
    def residual_hooks(self) -> list[str]:
        """Hook names that together edit the whole residual stream, in order of the layers.

        ``resid_pre`` of a later layer is ``resid_post`` of the one before, so only the first is
        here. Parallel blocks (GPT-NeoX) have no ``resid_mid``.
        """
        known = self.bridge.hook_dict
        names = ["blocks.0.hook_resid_pre"]
        for layer in range(self.n_layers):
            names += [f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_resid_post"]
        return [name for name in names if name in known]

    @cached_property
    def sha256(self) -> str:
        """Hash of the parameters, whatever files they came from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.bridge.original_model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @contextmanager
    def hooks(self, hooks: Sequence[Hook]) -> Iterator[None]:
        """Attach ``hooks`` while the block runs; gradients are off.

        Raises:
            WeightdiffError: If the model has no hook point of one of the names.
        """
        unknown = [name for name, _ in hooks if name not in self.bridge.hook_dict]
        if unknown:
            raise WeightdiffError(f"{self.reference} has no hook point {unknown[0]!r}")
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=list(hooks)):
            yield

    def forward(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch total"],
        cache: Any = None,
        use_cache: bool = False,
        all_positions: bool = False,
    ) -> Output:
        """Run the model; ``mask`` covers the cached tokens too, padding is on the left.

        The logits are those of the last position alone, unless ``all_positions``.
        """
        kwargs: dict[str, Any] = {} if all_positions else dict(self._last_only)
        if self._takes_positions:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = positions[:, -ids.shape[1] :]
        with torch.no_grad():
            result = self.bridge(
                ids,
                attention_mask=mask.long(),
                past_key_values=cache,
                use_cache=use_cache,
                return_type="logits_and_cache",
                **kwargs,
            )
        logits = result[0] if all_positions else result[0][:, -1:]
        return Output(logits, result[1] if use_cache else None)

    def run_until(
        self, ids: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], layer: int
    ) -> None:
        """Run the embedding and the blocks before ``layer``, whose ``resid_pre`` hook still fires.

        ``layer`` may be ``n_layers``: then every block runs, and no logits are computed.
        """
        kwargs = {} if not self._takes_positions else {
            "position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)
        }  # fmt: skip
        stop = layer if layer < self.n_layers else None
        with torch.no_grad():
            self.bridge(
                ids, attention_mask=mask.long(), stop_at_layer=stop, **self._last_only, **kwargs
            )

    def refusal_tokens(self, lexicon: Lexicon) -> list[int]:
        """Return the ids of the lexicon's refusal tokens.

        Raises:
            WeightdiffError: If a token is not one token of this tokenizer, or none is left.
        """
        ids = [self._single(token, lexicon.explicit) for token in lexicon.refusal_tokens]
        found = list(dict.fromkeys(i for i in ids if i is not None))
        if not found:
            raise WeightdiffError(
                f"none of the refusal tokens {list(lexicon.refusal_tokens)} is one token of "
                f"{self.reference}; give its own in a lexicon (--lexicon FILE, refusal_tokens)"
            )
        return found

    def _single(self, token: str | int, explicit: bool) -> int | None:
        if isinstance(token, int):
            return token
        ids = self.tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
            return int(ids[0])
        if not explicit:
            return None
        raise WeightdiffError(
            f"the refusal token {token!r} is {len(ids)} tokens of {self.reference}, or an unknown "
            "one; the lexicon's refusal_tokens must be single tokens"
        )

    def __repr__(self) -> str:
        return f"Model({self.reference!r}, {self.n_layers} layers × {self.d_model})"


def load_model(
    source: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    chat_template: str | None = None,
    plain: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Load a causal language model from a directory, a hub id, or memory.

    Args:
        source: A directory, ``org/name[@revision]``, or a Hugging Face model, which is copied.
        tokenizer: Needed for a model in memory; a directory to read it from, or a tokenizer.
        device: Where to put it; by default where it is, for a file the CPU.
        dtype: ``auto`` keeps the stored one.
        chat_template: Jinja text that replaces the tokenizer's own.
        plain: Use prompts as they are, without a chat template.
        trust_remote_code: Run Python code that comes with the checkpoint. Never unless you trust
            its authors.

    Raises:
        WeightdiffError: If there is no such checkpoint, it is not a causal language model, or the
            tokenizer has no chat template.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, str | os.PathLike):
        reference = os.fspath(source)
        tokenizer = tokenizer if tokenizer is not None else reference
        hf_model = _pretrained(reference, dtype, trust_remote_code)
    else:
        if tokenizer is None:
            raise WeightdiffError(
                "a model in memory needs its tokenizer: load_model(model, tokenizer=…)"
            )
        reference = getattr(source, "name_or_path", "") or type(source).__name__
        # Wrapping changes state_dict and save_pretrained, and sdpa becomes eager.
        hf_model = copy.deepcopy(source)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = _tokenizer(os.fspath(tokenizer), trust_remote_code)
    if chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template
    chat = ChatFormat(tokenizer, plain)
    return Model(_boot(hf_model.eval(), tokenizer, device, reference), tokenizer, chat, reference)


def _split_reference(reference: str) -> tuple[str, str | None]:
    """Split ``org/name@revision``; a directory is checked to be one with a configuration."""
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise WeightdiffError(
                f"{reference} has no config.json; give a Hugging Face checkpoint directory"
            )
        return str(path), None
    name, _, revision = reference.partition("@")
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WeightdiffError(f"there is no checkpoint directory {reference}; check the path")
    return name, revision or None


def _pretrained(reference: str, dtype: str | torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    name, revision = _split_reference(reference)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
            local_files_only=Path(name).is_dir(),
        )
    except Exception as error:
        # from_pretrained raises a dozen kinds for a missing, foreign or truncated file.
        first = " ".join(str(error).split())[:300]
        raise WeightdiffError(
            f"cannot load {reference} as a causal language model ({type(error).__name__}: {first})"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(reference: str, trust_remote_code: bool) -> Any:
    """Read a tokenizer exactly as its files say; AutoTokenizer may swap its class for another."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name, revision = _split_reference(reference)
    local = {"local_files_only": Path(name).is_dir(), "revision": revision}
    try:
        if Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file():
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **local)
        return PreTrainedTokenizerFast.from_pretrained(name, **local)
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise WeightdiffError(
            f"cannot load a tokenizer from {reference} ({type(error).__name__}: {first})"
        ) from error


def _boot(hf_model: Any, tokenizer: Any, device: str | torch.device | None, reference: str) -> Any:
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    if device is None:
        device = next(hf_model.parameters()).device
    verbosity = transformers.logging.get_verbosity()
    try:
        return TransformerBridge.boot_transformers(
            # The name is only a label here, but it must look like one of the hub's.
            "local/model",
            hf_model=hf_model.to(device),
            tokenizer=tokenizer,
            device=device,
            dtype=hf_model.dtype,
        )
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        architecture = json.dumps(getattr(hf_model.config, "architectures", None))
        raise WeightdiffError(
            f"TransformerLens has no bridge for {reference} ({architecture}): {error}"
        ) from error
    finally:
        # Importing transformer_lens sets the logger to ERROR for the whole process.
        transformers.logging.set_verbosity(verbosity)
