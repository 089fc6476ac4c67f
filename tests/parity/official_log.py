"""What the official loop did, seen from outside: its draws, random orders and fixed positions.

Only for the process that `compare_official.py` runs in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Step:
    """One draw for all n positions of a scale.

    logits (n, V): guided, before the filters. tokens (n,), confidence (n,). fixed: the positions that
    each of the step's selections names, known ones among them. order (n,): what decided, where chance did.
    """

    logits: Tensor
    tokens: Tensor
    confidence: Tensor
    fixed: list[Tensor] = field(default_factory=list)
    order: Tensor | None = None

    def margin(self) -> Tensor:
        """Return how far the best logit stands above the second, per position."""
        best = self.logits.topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]


@dataclass
class Filling:
    """A refined scale after each step: known (n,) masks, and the tokens that were fixed."""

    known: list[Tensor]
    tokens: Tensor


@dataclass
class Log:
    """One official run: the draws of plain scales, the steps of refined ones, the noise of smooth ones."""

    plain: list[Step] = field(default_factory=list)
    refined: list[list[Step]] = field(default_factory=list)
    exponentials: list[Tensor] = field(default_factory=list)

    @property
    def latest(self) -> Step:
        return (self.refined[-1] if self.refined else self.plain)[-1]

    def add(self, step: Step) -> None:
        (self.refined[-1] if self.refined else self.plain).append(step)

    def fillings(self) -> list[Filling]:
        return [_filling(steps) for steps in self.refined]

    def tokens(self) -> list[Tensor]:
        """Return the tokens (n,) of every scale."""
        return [step.tokens for step in self.plain] + [filling.tokens for filling in self.fillings()]


def _filling(steps: list[Step]) -> Filling:
    known = torch.zeros_like(steps[0].tokens, dtype=torch.bool)
    tokens = torch.full_like(steps[0].tokens, -1)
    after = []
    for step in steps:
        for positions in step.fixed:
            chosen = torch.zeros_like(known)
            chosen[positions] = True
            tokens = torch.where(chosen & ~known, step.tokens, tokens)
            known = known | chosen
        after.append(known)
    assert bool(known.all()), "the official loop fills every map"
    return Filling(after, tokens)


@contextmanager
def watching(var: Any) -> Iterator[Log]:
    """Record one run of the official model while the block runs."""
    from models import var_drop  # the official package

    log = Log()
    sample, topk, rand_like = var_drop.sample_with_top_k_top_p_, torch.topk, torch.rand_like
    exponential = Tensor.exponential_
    scheduler = getattr(var, "mask_scheduler", None)

    def seen_scale(**options: Any) -> None:
        log.refined.append([])
        type(scheduler)._create_scheduler(scheduler, **options)

    def seen_sample(logits: Tensor, *, return_conf: bool = False, **options: Any) -> Any:
        before = logits[0].clone()  # the official filters work in place
        tokens, confidence = sample(logits, return_conf=True, **options)
        log.add(Step(before, tokens[0], confidence[0, :, 0]))
        return (tokens, confidence) if return_conf else tokens

    def seen_topk(scores: Tensor, **options: Any) -> Any:
        result = topk(scores, **options)
        log.latest.fixed.append(result.indices[0])
        return result

    def seen_rand_like(like: Tensor) -> Tensor:
        drawn = rand_like(like)
        log.latest.order = drawn[0, :, 0]
        return drawn

    def seen_exponential(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        drawn = exponential(tensor, *args, **options)
        log.exponentials.append(drawn.clone())
        return drawn

    if scheduler is not None:
        scheduler._create_scheduler = seen_scale
    var_drop.sample_with_top_k_top_p_ = seen_sample
    torch.topk, torch.rand_like, Tensor.exponential_ = seen_topk, seen_rand_like, seen_exponential
    try:
        yield log
    finally:
        if scheduler is not None:
            del scheduler._create_scheduler
        var_drop.sample_with_top_k_top_p_ = sample
        torch.topk, torch.rand_like, Tensor.exponential_ = topk, rand_like, exponential
