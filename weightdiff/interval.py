"""Intervals for rates: prompts built from the same noun are not independent draws."""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import norm


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of ``successes`` among ``n`` independent trials.

    Both ends lie in [0, 1]; without trials the interval is (0, 1).

    Raises:
        ValueError: If there are more successes than trials, or fewer than none.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..{n}, got {successes}")
    return _wilson(float(successes), n, confidence)


def _wilson(successes: float, n: int, confidence: float) -> tuple[float, float]:
    if n == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    p = successes / n
    # Wilson 1927: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    centre = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    # At p = 0 and p = 1 one end is p itself, which rounding misses by 1e-17 to either side.
    return (0.0 if p == 0 else low), (1.0 if p == 1 else high)


def cluster_bootstrap(
    values: Sequence[float] | Sequence[bool],
    clusters: Sequence[Hashable],
    n: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile interval of the mean of ``values`` when whole clusters are redrawn.

    ``n`` resamples of the clusters with replacement; the mean is over rows, so that large clusters
    weigh more, as they do in the point estimate. When every cluster of a 0/1 outcome has the same
    mean the bootstrap has no width, which says nothing about the next cluster: Wilson's interval
    with one trial per cluster is returned instead. Davison & Hinkley 1997, section 3.8.

    Raises:
        ValueError: If the two sequences differ in length, or are empty.
    """
    outcome = np.asarray(values, dtype=np.float64)
    if len(outcome) != len(clusters) or len(outcome) == 0:
        raise ValueError(f"{len(outcome)} values for {len(clusters)} clusters; both need one a row")
    codes = {cluster: code for code, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([codes[cluster] for cluster in clusters])
    totals = np.bincount(index, weights=outcome)
    sizes = np.bincount(index)
    means = totals / sizes
    if np.ptp(means) == 0 and np.isin(outcome, (0.0, 1.0)).all():
        return _wilson(float(means[0]) * len(codes), len(codes), confidence)
    drawn = np.random.default_rng(seed).integers(len(codes), size=(n, len(codes)))
    resampled = totals[drawn].sum(1) / sizes[drawn].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def rate_interval(
    values: Sequence[bool], clusters: Sequence[Hashable | None], seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of a rate: bootstrapped when clusters are known, else Wilson's."""
    known = [cluster for cluster in clusters if cluster is not None]
    if known and len(known) == len(values):
        return cluster_bootstrap(values, known, seed=seed)
    return wilson(sum(values), len(values))
