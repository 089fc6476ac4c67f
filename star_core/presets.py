"""Schedules by name, one table with the source of each line. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import TokenMap
from .schedule import ScalePolicy, ScaleSchedule, Strategy, ramp
from .schedule_text import ScheduleError, only_word, parse_schedule

GUIDANCE = 4.0
SAMPLER_START = 9
"""Scale index from which the released sampler checkpoint refines (`sample_from_idx`)."""


@dataclass(frozen=True)
class SchedulePreset:
    """A named schedule: what it does, where it comes from, how it is made for a model's maps."""

    description: str
    source: str
    build: Callable[[Sequence[TokenMap]], ScaleSchedule]


def _plain(maps: Sequence[TokenMap], top_k: int, *, smooth: bool = False) -> ScaleSchedule:
    policies = tuple(
        ScalePolicy(top_k=top_k, top_p=0.8, guidance=t, smooth=smooth) for t in ramp(GUIDANCE, len(maps))
    )
    return ScaleSchedule(policies, GUIDANCE, maps=tuple(maps))


def sampler_start(scales: int) -> int:
    """Return the first refined scale: index 9 of the released 14, the same share of another number."""
    return round(SAMPLER_START / 14 * scales)


def _refined(maps: Sequence[TokenMap], top_k: int, *, transformer_first: bool) -> ScaleSchedule:
    start, last = sampler_start(len(maps)), len(maps) - 1
    policies = []
    for scale, guidance in enumerate(ramp(GUIDANCE, len(maps))):
        refined = scale >= start
        longest = transformer_first and scale == last
        steps = (15 if longest else 8) if refined else 0
        policies.append(
            ScalePolicy(
                top_k=top_k,
                top_p=0.8,
                guidance=guidance,
                steps=steps,
                transformer_steps=5 if refined and transformer_first and not longest else 0,
                random_steps=5 if refined else 0,
            )
        )
    strategy: Strategy = "official" if transformer_first else "masked"
    return ScaleSchedule(tuple(policies), GUIDANCE, strategy, tuple(maps))


def _old(maps: Sequence[TokenMap]) -> ScaleSchedule:
    def top_k(scale: int) -> int:
        return 600 if scale < 9 else 300 if scale < 12 else 100

    policies = tuple(
        ScalePolicy(top_k=top_k(scale), top_p=0.8, guidance=guidance)
        for scale, guidance in enumerate(ramp(GUIDANCE, len(maps)))
    )
    return ScaleSchedule(policies, GUIDANCE, maps=tuple(maps))


PRUNED = (0.4, 0.5)
"""Shares of tokens that the fast presets skip on the last scales. This project's own choice."""
PRUNED_MORE = (0.0, 0.3, 0.4, 0.5)
"""Those of the fastest preset, on as many last scales as it draws without guidance."""


def on_last(schedule: ScaleSchedule, changes: Sequence[Mapping[str, Any]]) -> ScaleSchedule:
    """Return a schedule with fields of its last scales changed, one mapping per scale; never the first's."""
    first = len(schedule.scales) - len(changes)
    scales = tuple(
        dataclasses.replace(policy, **changes[scale - first]) if scale >= max(first, 1) else policy
        for scale, policy in enumerate(schedule.scales)
    )
    return dataclasses.replace(schedule, scales=scales)


def half_the_steps(schedule: ScaleSchedule) -> ScaleSchedule:
    """Return a schedule with half the causal sampler's steps of every kind, rounded up."""
    names = ("steps", "transformer_steps", "random_steps")
    scales = tuple(
        dataclasses.replace(policy, **{name: (getattr(policy, name) + 1) // 2 for name in names})
        for policy in schedule.scales
    )
    return dataclasses.replace(schedule, scales=scales)


def _fast(schedule: ScaleSchedule) -> ScaleSchedule:
    """Return a schedule with no guidance on its last scales, part of their tokens skipped, and fewer steps."""
    return _cut_short(half_the_steps(schedule), PRUNED)


def _cut_short(schedule: ScaleSchedule, shares: Sequence[float]) -> ScaleSchedule:
    """Return a schedule whose last scales are drawn without guidance, and skip these shares of their tokens."""
    return on_last(schedule, [{"unguided": True, "prune": share} for share in shares])


SCHEDULES: Mapping[str, SchedulePreset] = {
    "official-256": SchedulePreset(
        "top-k 4096, top-p 0.8, guidance ramp 4, no sampler",
        "released README, evaluation settings of the 256 px models",
        lambda maps: _plain(maps, 4096),
    ),
    "official-512": SchedulePreset(
        "top-k 4096, top-p 0.8, guidance ramp 4, no sampler",
        "released README, evaluation settings of the 512 px model",
        lambda maps: _plain(maps, 4096),
    ),
    "official-1024": SchedulePreset(
        "top-k 4096, causal sampler with the transformer's confidence: 8 steps, 15 on the last scale",
        "released demo, sample_version '1024' (w_mask), with the README's evaluation top-k",
        lambda maps: _refined(maps, 4096, transformer_first=True),
    ),
    "demo-1024": SchedulePreset(
        "as official-1024 with top-k 600",
        "released demo's default settings",
        lambda maps: _refined(maps, 600, transformer_first=True),
    ),
    "sampler": SchedulePreset(
        "top-k 4096, causal sampler alone: 8 steps on every refined scale",
        "released code, any sample_version but '1024'; the paper's \"Sampler\" (table S1)",
        lambda maps: _refined(maps, 4096, transformer_first=False),
    ),
    "old": SchedulePreset(
        "top-k 600, from scale index 9 on 300, from 12 on 100; no sampler",
        "released code, sample_version 'old'",
        _old,
    ),
    "top-k": SchedulePreset(
        "top-k 600, top-p 0.8, guidance ramp 4, no sampler",
        "released demo's defaults without the sampler; table S1's \"top-k 600\"",
        lambda maps: _plain(maps, 600),
    ),
    "smooth": SchedulePreset(
        "VAR's more smooth: Gumbel-softmax on every scale, guidance ramp 4",
        'released code, more_smooth=True; table S1\'s "smooth"',
        lambda maps: _plain(maps, 0, smooth=True),
    ),
    "fast": SchedulePreset(
        "as official-512; the last two scales without guidance and with 40 % and 50 % of their tokens skipped",
        "this project's; what it costs in fidelity stands in NOTES.md",
        lambda maps: _fast(_plain(maps, 4096)),
    ),
    "fast-1024": SchedulePreset(
        "as official-1024 with half the sampler steps; the last two scales as in fast",
        "this project's; what it costs in fidelity stands in NOTES.md",
        lambda maps: _fast(_refined(maps, 4096, transformer_first=True)),
    ),
    "fastest": SchedulePreset(
        "as official-512; the last four scales without guidance, 30 %, 40 % and 50 % of the last three's tokens"
        " skipped",
        "this project's; what it costs in fidelity stands in NOTES.md",
        lambda maps: _cut_short(_plain(maps, 4096), PRUNED_MORE),
    ),
}


def named_schedule(name: str, maps: Sequence[TokenMap]) -> ScaleSchedule:
    """Return the preset of this name for a model's maps. Raises ValueError listing the names."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule {name!r}. There are: {', '.join(SCHEDULES)}")
    return SCHEDULES[name].build(maps)


def read_schedule(text: str, maps: Sequence[TokenMap]) -> ScaleSchedule:
    """Return the schedule of a preset's name or of a schedule text, for a model's maps.

    Raises ScheduleError pointing at the character, ValueError for a schedule of another model.
    """
    word = only_word(text)
    if word is not None:
        if word not in SCHEDULES:
            names = ", ".join(SCHEDULES)
            raise ScheduleError(f"{word!r} is neither a preset ({names}) nor a schedule text")
        return named_schedule(word, maps)
    has_maps = any(line.split()[:1] == ["maps"] for line in text.replace(";", "\n").splitlines())
    return parse_schedule(text, None if has_maps else len(maps))
