"""The official sampling loop and ours as two samples of pictures: tokens, and how fast maps fill.

Only for the process that `compare_official.py` runs in. Tokens within a picture depend on each other, so that
tables of chi-square do not apply; instead whole pictures are swapped between the two samples at random, which
is exact however a picture's tokens hang together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from official_log import watching
from official_pair import Pair
from torch import Tensor

from star_core import generate
from star_core.causal_sampler import unmask_counts
from star_core.presets import SAMPLER_START
from star_core.schedule import ScaleSchedule, Strategy

PERMUTATIONS = 1999


@dataclass(frozen=True)
class Sample:
    """N pictures: tokens (N, L) of all scales, known (N, T): tokens fixed after each step of each scale."""

    tokens: Tensor
    known: Tensor


def official_sample(pair: Pair, seeds: Sequence[int], *, top_k: int, top_p: float) -> Sample:
    """Run the official loop once per seed, batch 1, as the released demo does."""
    tokens, known = [], []
    for seed in seeds:
        torch.manual_seed(seed)  # the official loop draws its random orders from the global generator
        with watching(pair.var) as log:
            pair.official_run(seed, top_k=top_k, top_p=top_p, w_mask=True, sample_version="1024")
        tokens.append(torch.cat(log.tokens()))
        known.append(torch.cat([torch.stack(f.known).sum(dim=1) for f in log.fillings()]))
    return Sample(torch.stack(tokens), torch.stack(known))


def our_sample(pair: Pair, schedule: ScaleSchedule, seeds: Sequence[int], strategy: Strategy) -> Sample:
    """Run our loop for all seeds in one batch."""
    known: list[Tensor] = []
    refine = generate.refine

    def counted(work: Any, start: Any, *free: Any) -> Iterator[Any]:
        maps = list(refine(work, start, *free))
        counts = [filling.known.sum(dim=1) for filling in maps]
        # A map that is full early ends our loop; the official one goes on over the full map.
        counts += [counts[-1]] * (work.policy.steps - len(counts))
        known.extend(counts)
        yield from maps

    generate.refine = counted
    try:
        steps = pair.our_run(dataclasses.replace(schedule, strategy=strategy), seeds)
    finally:
        generate.refine = refine
    return Sample(torch.cat([step.tokens for step in steps], dim=1), torch.stack(known, dim=1))


def _p_value(features: Tensor, first: int, *, seed: int, chi_square: bool) -> float:
    """Return how often a random split of the rows (N, F) differs at least as much as the given one.

    The distance of the two column sums a, b is sum (a - b)^2 / (a + b), or, for features that are no
    counts, sum (a - b)^2 of standardised columns. Both samples have equal size.
    """
    number = len(features)
    assert number == 2 * first, "the two samples have equal size"
    if not chi_square:
        deviation = features.std(dim=0)
        features = (features - features.mean(dim=0))[:, deviation > 0] / deviation[deviation > 0]
    total = features.sum(dim=0)
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(PERMUTATIONS, number, generator=generator).argsort(dim=1).argsort(dim=1)
    given = (torch.arange(number) < first).unsqueeze(0)
    sides = torch.cat([given, ranks < first]).float() @ features
    apart = (2 * sides - total).square()
    distances = (apart / total.clamp_min(1) if chi_square else apart).sum(dim=1)
    return float((distances >= distances[0] * (1 - 1e-6)).double().mean())


def token_p_value(first: Sample, second: Sample, columns: slice, codebook: int, seed: int) -> float:
    """Compare how often each token stands at each position of the given columns."""
    both = torch.cat([first.tokens, second.tokens])[:, columns]
    counts = F.one_hot(both, codebook).flatten(1).float()
    return _p_value(counts[:, counts.sum(dim=0) > 0], len(first.tokens), seed=seed, chi_square=True)


def fill_p_value(first: Sample, second: Sample, seed: int) -> float:
    """Compare how many tokens are fixed after each step of each refined scale."""
    both = torch.cat([first.known, second.known]).double().float()
    return _p_value(both, len(first.known), seed=seed, chi_square=False)


def fill_shares(sample: Sample, sides: Sequence[int]) -> list[float]:
    """Return the mean filled share after five steps of each scale that fixes twice, and as scheduled."""
    shares = []
    for place, side in enumerate(sides[SAMPLER_START:-1]):
        fixed = sample.known[:, place * 8 + 4].double().mean() / side**2
        shares.append(round(float(fixed), 3))
    return shares


def scheduled_shares(sides: Sequence[int]) -> list[float]:
    return [round(sum(unmask_counts(8, s * s)[:5]) / (s * s), 3) for s in sides[SAMPLER_START:-1]]
