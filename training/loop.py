"""What every stage's loop shares: seeds, orders of rows, optimiser and schedule."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def derived_seed(seed: int, *names: str | int) -> int:
    """Hash a seed and the names of what it is for into 63 bits."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seeded(seed: int, *names: str | int) -> np.random.Generator:
    """Make a generator of its own for one purpose, so that no other draw can shift it."""
    return np.random.Generator(np.random.Philox(key=derived_seed(seed, *names)))


def batches(n_rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Yield row numbers of each batch; an epoch's order depends on (seed, epoch) only.

    The last batch of an epoch holds what is left.
    """
    for epoch in range(epochs):
        order = seeded(seed, "order", epoch).permutation(n_rows).tolist()
        for start in range(0, n_rows, batch_size):
            yield order[start : start + batch_size]


def bucketed(
    orders: Iterable[list[int]], lengths: Sequence[int], window: int
) -> Iterator[list[int]]:
    """Regroup the rows of `window` batches at a time by length, so that little is padded."""
    orders = iter(orders)
    while group := list(itertools.islice(orders, window)):
        rows = sorted(itertools.chain.from_iterable(group), key=lambda row: lengths[row])
        for start in itertools.accumulate([0, *map(len, group[:-1])]):
            yield rows[start : start + len(group[0])]


def n_batches(n_rows: int, batch_size: int, epochs: int) -> int:
    """Count what `batches` yields."""
    return epochs * -(-n_rows // batch_size)


def adamw(
    model_or_params: nn.Module | Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0
) -> AdamW:
    """Make AdamW (Loshchilov & Hutter 2019; betas 0.9, 0.999, eps 1e-8), decaying matrices only."""
    if isinstance(model_or_params, nn.Module):
        model_or_params = model_or_params.parameters()
    params = [p for p in model_or_params if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused: one kernel call instead of a dozen small ones for every tensor.
    return AdamW(
        [g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True
    )


def warmup_constant(optimizer: torch.optim.Optimizer, warmup_steps: int) -> LambdaLR:
    """Raise the learning rate linearly over the first steps, then hold it.

    Constant, because under a decay an intermediate checkpoint is not a valid shorter run.
    """
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))


def trapezoid(
    optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int, cooldown: float
) -> LambdaLR:
    """Warm up, hold, and fall linearly to 0 over the last share `cooldown` of the steps.

    For the models that the arms start from, which need no valid intermediate checkpoint.
    """
    fall = max(1, round(steps * cooldown))

    def scale(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        return rise if cooldown == 0 else min(rise, max(0.0, (steps - step) / fall))

    return LambdaLR(optimizer, scale)


def clip_gradients(params: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale the gradient down to `max_norm` and return the norm it had."""
    return nn.utils.clip_grad_norm_(params, max_norm)
