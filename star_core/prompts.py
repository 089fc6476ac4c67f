"""Prompts that change on the way: which text holds from which scale on."""

from __future__ import annotations

from .request import PromptSpan
from .text_encoder import TextStates

Timeline = tuple[tuple[int, TextStates], ...]
"""(first scale, text) pairs by rising scale, the first at scale 0."""


def switch(before: Timeline, later: Timeline, start: int) -> Timeline:
    """Return `before` up to scale `start`, from which on `later` holds as it would have held there."""
    if start < 0:
        raise ValueError(f"a prompt cannot start at scale {start}")
    kept = tuple(pair for pair in before if pair[0] < start)
    return (*kept, (start, active(later, start)), *(pair for pair in later if pair[0] > start))


def active(timeline: Timeline, scale: int) -> TextStates:
    """Return the text that holds at a scale."""
    *_, (_, states) = (pair for pair in timeline if pair[0] <= scale)
    return states


def spans(positive: Timeline, negative: Timeline, count: int) -> tuple[PromptSpan, ...]:
    """Return the prompt spans of `count` pictures: a new one wherever either text changes."""
    starts = sorted({start for start, _ in (*positive, *negative)})
    return tuple(
        PromptSpan(
            active(positive, start).repeat_each(count), active(negative, start).repeat_each(count), start
        )
        for start in starts
    )
