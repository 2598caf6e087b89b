"""Splitting prompts so that no cluster falls on both sides."""

from collections.abc import Sequence

import numpy as np

from weightdiff.errors import WeightdiffError
from weightdiff.prompts import Prompt


def split(prompts: Sequence[Prompt], shares: Sequence[float], seed: int = 0) -> list[list[Prompt]]:
    """Return consecutive parts of a random order of the clusters, sized as ``shares``.

    A prompt without a cluster, and a repeated text, is a cluster of its own. Within a part the
    prompts keep their order.

    Raises:
        WeightdiffError: If there are fewer clusters than parts.
    """
    names = [p.cluster if p.cluster is not None else p.text for p in prompts]
    clusters = list(dict.fromkeys(names))
    if len(clusters) < len(shares):
        raise WeightdiffError(
            f"{len(prompts)} prompts in {len(clusters)} clusters cannot be split in "
            f"{len(shares)} parts; give more prompts, or separate files"
        )
    order = np.random.default_rng(seed).permutation(len(clusters))
    bounds = np.cumsum(shares) / sum(shares) * len(clusters)
    # Every part gets a cluster at least.
    ends = [min(max(round(b), i + 1), len(clusters) - len(shares) + i + 1)
            for i, b in enumerate(bounds)]  # fmt: skip
    part = dict.fromkeys(clusters, 0)
    for rank, index in enumerate(order):
        part[clusters[index]] = sum(rank >= end for end in ends[:-1])
    return [
        [p for p, name in zip(prompts, names, strict=True) if part[name] == i]
        for i in range(len(shares))
    ]
