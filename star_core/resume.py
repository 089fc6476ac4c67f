"""How much of an earlier run a new request repeats, so that only its late scales need drawing again.

A scale depends on the request's maps, seeds, prompts, given and kept tokens and policies up to that scale,
and on every scale before it. Nothing later reaches back: noise is a stream per scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .request import KeptTokens, PromptSpan, Request, ScaleStep
from .schedule import ScaleSchedule


def shared_scales(before: Request, after: Request) -> int:
    """Return how many leading scales two requests of one model draw equally."""
    if (before.maps, before.seeds) != (after.maps, after.seeds):
        return 0
    scales = min(before.stop or len(before.maps), after.stop or len(after.maps))
    for scale in range(scales):
        if not _alike(before, after, scale):
            return scale
    return scales


def _alike(before: Request, after: Request, scale: int) -> bool:
    """Whether two requests that agree on all scales before this one do the same at it."""
    # Rows for guidance change the shape of every matrix product, and with it the last bits of a logit.
    return (
        (scale < before.schedule.guided_scales) == (scale < after.schedule.guided_scales)
        and _same_prompt(_starting(before, scale), _starting(after, scale))
        and _same_step(_given(before, scale), _given(after, scale))
        and _same_kept(before.kept, after.kept, scale)
        and _same_policy(before.schedule, after.schedule, scale)
    )


def _starting(request: Request, scale: int) -> PromptSpan | None:
    return next((span for span in request.prompts if span.start == scale), None)


def _given(request: Request, scale: int) -> ScaleStep | None:
    return request.prefix[scale] if scale < len(request.prefix) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one.cpu(), other.cpu()))


def _same_prompt(one: PromptSpan | None, other: PromptSpan | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = ((one.conditional, other.conditional), (one.unconditional, other.unconditional))
    return all(
        _same(a.hidden, b.hidden) and _same(a.mask, b.mask) and _same(a.pooled, b.pooled) for a, b in pairs
    )


def _same_step(one: ScaleStep | None, other: ScaleStep | None) -> bool:
    if one is None or other is None:
        return one is other
    return _same(one.tokens, other.tokens) and _same(one.f_hat, other.f_hat)


def _same_kept(one: KeptTokens | None, other: KeptTokens | None, scale: int) -> bool:
    if one is None or other is None:
        return one is other
    if not _same(one.masks[scale], other.masks[scale]):
        return False
    mask = one.masks[scale].bool().cpu()
    return _same(one.tokens[scale].cpu()[mask], other.tokens[scale].cpu()[mask])


def _same_policy(one: ScaleSchedule, other: ScaleSchedule, scale: int) -> bool:
    ours, theirs = one.scales[scale], other.scales[scale]
    if ours != theirs:
        return False
    by_sampler = (one.strategy, one.sampler_guidance) == (other.strategy, other.sampler_guidance)
    return by_sampler or not ours.steps
