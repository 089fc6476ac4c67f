"""One schedule from two forms: how every scale is drawn, and where the causal sampler refines it. No torch.

Each form is a schedule text of its own lines (both may carry `maps` and `stretch`), or a preset's name, of
which each form takes its part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .config import TokenMap, square_maps
from .presets import SCHEDULES, read_schedule
from .schedule import ScalePolicy, ScaleSchedule, Strategy
from .schedule_text import only_word, refuse_lines, scales_of

Part = Literal["drawing", "sampler"]

DRAWING = ("top_k", "top_p", "guidance", "temperature", "smooth", "unguided", "prune")
SAMPLER = ("steps", "transformer_steps", "random_steps")

_ELSEWHERE: Mapping[Part, Mapping[str, str]] = {
    "drawing": {
        name: f"{name} is the causal sampler's: it belongs to the node Causal Sampler"
        for name in (*SAMPLER, "sampler_guidance", "strategy")
    },
    "sampler": {
        **{
            name: f"{name} is not the causal sampler's: it belongs to the node Scale Schedule"
            for name in DRAWING
        },
        "sampler_guidance": "sampler_guidance is written in the field guidance, not in the text",
        "strategy": "strategy is chosen in its own field, not in the text",
    },
}


@dataclass(frozen=True)
class SamplerPart:
    """The causal sampler's form: its steps as text, and what holds for all scales together."""

    text: str
    strategy: Strategy = "official"
    guidance: float = 4.0


def check_part(text: str, part: Part) -> None:
    """Refuse a text that no model could read, before there is a model. Raises ScheduleError."""
    scales = scales_of(text) if only_word(text) is None else None
    read_part(text, part, square_maps(range(1, 1 + (scales or 2))))


def read_part(text: str, part: Part, maps: Sequence[TokenMap]) -> ScaleSchedule:
    """Return the schedule of one form for a model's maps; lines of the other form are refused."""
    if only_word(text) not in SCHEDULES:
        refuse_lines(text, _ELSEWHERE[part])
    return read_schedule(text, maps)


def assemble(
    maps: Sequence[TokenMap],
    codebook_size: int,
    *,
    has_sampler: bool,
    own: str,
    drawing: str | None = None,
    sampler: SamplerPart | None = None,
) -> ScaleSchedule:
    """Return the schedule of the given forms, fitted to a model.

    own: the checkpoint's own schedule, used where no form is given for drawing; its sampler steps count only
    where neither form is given. Raises ValueError for what the model cannot run.
    """
    text = own if drawing is None else drawing
    drawn = read_schedule(own, maps) if drawing is None else read_part(text, "drawing", maps)
    drawn = drawn.fit(maps, codebook_size, has_sampler=True)
    if sampler is not None:
        steps = read_part(sampler.text, "sampler", maps).fit(maps, codebook_size, has_sampler=True)
        whole = ScaleSchedule(_merged(drawn, steps), sampler.guidance, sampler.strategy, tuple(maps))
    elif drawing is None:
        whole = drawn
    else:
        nothing = ScaleSchedule(tuple(ScalePolicy() for _ in maps))
        whole = dataclasses.replace(drawn, scales=_merged(drawn, nothing))
    return whole.fit(maps, codebook_size, has_sampler=has_sampler)


def _merged(drawn: ScaleSchedule, steps: ScaleSchedule) -> tuple[ScalePolicy, ...]:
    """Return the policies of the first schedule with the sampler's steps of the second."""
    policies = []
    for scale, (policy, refined) in enumerate(zip(drawn.scales, steps.scales, strict=True)):
        fields = {name: getattr(refined, name) for name in SAMPLER}
        try:
            policies.append(dataclasses.replace(policy, **fields))
        except ValueError as error:
            raise ValueError(f"scale {scale + 1}: {error}") from error
    return tuple(policies)


def part_text(schedule: ScaleSchedule, part: Part) -> str:
    """Return the lines of one form that stand for a schedule."""
    wanted = ("maps", "stretch", *(DRAWING if part == "drawing" else SAMPLER))
    return "\n".join(line for line in schedule.to_text().splitlines() if line.split()[0] in wanted)
