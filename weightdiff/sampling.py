"""Drawing tokens with random numbers that belong to the prompt, not to the batch."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int
from torch import Tensor


def uniforms(seed: int, keys: Sequence[str], n: int) -> Float64[np.ndarray, "row n"]:
    """Return ``n`` numbers in [0, 1) for every key, a function of (seed, key) alone.

    Counter-based (Philox), keyed by a hash, so that rows can be drawn in any order and company.
    """
    return np.stack([np.random.Generator(_philox(seed, key)).random(n) for key in keys])


def _philox(seed: int, key: str) -> np.random.Philox:
    digest = hashlib.sha256(f"{seed}|{key}".encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


def next_tokens(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    draws: Float64[Tensor, " batch"] | None = None,
) -> Int[Tensor, " batch"]:
    """Choose one token a row: the most likely at temperature 0, else by the inverse of the CDF.

    ``draws`` are uniform in [0, 1); the token is the first whose cumulative probability, in order
    of the vocabulary and in fp64, exceeds the row's draw.
    """
    if draws is None or temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # Scaling by the last entry keeps a draw near 1 inside the vocabulary.
    return (cdf <= draws[:, None] * cdf[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
