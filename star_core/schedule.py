"""ScaleSchedule: every choice the generation loop makes, per scale. No torch.

Its text form is read by `schedule_text`, and described there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .config import TokenMap, check_maps

Strategy = Literal["official", "confidence", "masked"]
"""Order and source of the causal sampler's tokens.

official: as the released loop; while the transformer draws, each step fixes twice (the most confident over
all positions, then as many in random order), so that the map fills faster than its schedule says.
confidence: each step fixes its count once. masked: as confidence, and every step draws from the sampler,
without the transformer's confidence (the paper's "Sampler"; the others are its "Sampler*")."""

MAX_TOP_K = 1_000_000
MAX_STEPS = 4096
MAX_PRUNE = 0.95
SAME_AREA = 0.25
"""How far two maps' areas may differ while a schedule for one still means the other (relative)."""


@dataclass(frozen=True)
class ScalePolicy:
    """What one scale does.

    top_k, top_p: filters, 0 is off. guidance: t in (1 + t) cond - t uncond. temperature: divides logits.
    smooth: VAR's soft draw; filters do not apply. steps: causal sampler steps, 0 is off; of them the first
    `transformer_steps` draw from the transformer's logits and the first `random_steps` fix in random order.

    Two fast modes, off unless asked for: unguided draws without guidance, the causal sampler's included (where
    all later scales do as well, no unconditional row is computed any more). prune is the share of the map's
    tokens that the transformer skips; their features are restored from the scale before (`pruning`).
    """

    top_k: int = 0
    top_p: float = 0.0
    guidance: float = 0.0
    temperature: float = 1.0
    smooth: bool = False
    steps: int = 0
    transformer_steps: int = 0
    random_steps: int = 0
    unguided: bool = False
    prune: float = 0.0

    def __post_init__(self) -> None:
        checks = (
            (0 <= self.top_k <= MAX_TOP_K, f"top_k is a count or 0 for off, got {self.top_k}"),
            (0 <= self.top_p <= 1, f"top_p lies between 0 and 1, got {self.top_p}"),
            (-100 <= self.guidance <= 100, f"guidance lies within -100..100, got {self.guidance}"),
            (
                0.01 <= self.temperature <= 100,
                f"temperature lies within 0.01..100, got {self.temperature}",
            ),
            (0 <= self.steps <= MAX_STEPS, f"steps lies within 0..{MAX_STEPS}, got {self.steps}"),
            (
                0 <= self.transformer_steps <= MAX_STEPS,
                f"transformer_steps lies within 0..{MAX_STEPS}, got {self.transformer_steps}",
            ),
            (
                0 <= self.random_steps <= MAX_STEPS,
                f"random_steps lies within 0..{MAX_STEPS}, got {self.random_steps}",
            ),
            (0 <= self.prune <= MAX_PRUNE, f"prune lies within 0..{MAX_PRUNE}, got {self.prune}"),
            (
                not (self.smooth and self.steps),
                f"steps is {self.steps} on a smooth scale, which the causal sampler cannot draw",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)

    @property
    def strength(self) -> float:
        """The guidance that applies to the transformer's logits."""
        return 0.0 if self.unguided else self.guidance


@dataclass(frozen=True)
class ScaleSchedule:
    """The policies of all scales, the causal sampler's guidance (constant) and its strategy.

    `maps` are the token maps the schedule was written for; None means any model with as many scales.
    `stretch` lets a model with other maps use it too.
    """

    scales: tuple[ScalePolicy, ...]
    sampler_guidance: float = 4.0
    strategy: Strategy = "official"
    maps: tuple[TokenMap, ...] | None = None
    stretch: bool = False

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("a schedule needs at least one scale")
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy is one of {get_args(Strategy)}, got {self.strategy!r}")
        if not -100 <= self.sampler_guidance <= 100:
            raise ValueError(f"sampler_guidance lies within -100..100, got {self.sampler_guidance}")
        if self.maps is not None:
            check_maps(self.maps)
            if len(self.maps) != len(self.scales):
                raise ValueError(f"maps has {len(self.maps)} entries for {len(self.scales)} scales")
        if self.scales[0].prune:
            raise ValueError(
                f"prune is {self.scales[0].prune} at scale 1, which has no scale before it to restore tokens"
                " from: begin with 0, as in `prune 0*4 0.4 0.5`"
            )

    @property
    def refines(self) -> bool:
        """Whether any scale uses the causal sampler."""
        return any(policy.steps for policy in self.scales)

    @property
    def guided(self) -> bool:
        """Whether any draw needs unconditional logits."""
        return self.guided_scales > 0

    @property
    def guided_scales(self) -> int:
        """How many leading scales are run with unconditional twins: up to the last one that guides."""
        last = 0
        for number, policy in enumerate(self.scales, start=1):
            if policy.strength or (policy.steps and self.sampler_strength(number - 1)):
                last = number
        return last

    def asks_transformer(self, scale: int) -> bool:
        """Whether any step of a refined scale draws from the transformer's logits."""
        return self.strategy != "masked" and self.scales[scale].transformer_steps > 0

    def sampler_strength(self, scale: int) -> float:
        """Return the guidance of the causal sampler's logits at a scale."""
        return 0.0 if self.scales[scale].unguided else self.sampler_guidance

    def fit(self, maps: Sequence[TokenMap], codebook_size: int, *, has_sampler: bool) -> ScaleSchedule:
        """Return the schedule as a model with these maps can run it.

        Clamped: top_k to the codebook, steps to the tokens of the map. Raises ValueError for another
        number of scales or maps of other sizes where the schedule does not stretch, and for sampler steps
        on a model without a causal sampler.
        """
        self._check_maps_of_model(maps)
        if self.refines and not has_sampler:
            raise ValueError(
                "the schedule uses the causal sampler, but this checkpoint has none: set steps to 0,"
                " or load a checkpoint with the sampler"
            )
        fitted = tuple(
            dataclasses.replace(
                policy,
                top_k=min(policy.top_k, codebook_size),
                steps=min(policy.steps, height * width),
            )
            for policy, (height, width) in zip(self._stretched(len(maps)), maps, strict=True)
        )
        return dataclasses.replace(self, scales=fitted, maps=tuple(maps))

    def _check_maps_of_model(self, maps: Sequence[TokenMap]) -> None:
        if self.stretch:
            return
        if len(maps) != len(self.scales):
            raise ValueError(
                f"the schedule has {len(self.scales)} scales, the model draws {len(maps)}"
                f" ({sides_text(maps)}): use a preset of the model, write one value per scale, or add a"
                " line `stretch yes`"
            )
        if self.maps is not None and not _alike(self.maps, maps):
            raise ValueError(
                f"the schedule is written for maps {sides_text(self.maps)}, the model draws"
                f" {sides_text(maps)}: use a preset of the model, leave the maps line out, or add a line"
                " `stretch yes`"
            )

    def _stretched(self, scales: int) -> list[ScalePolicy]:
        """Return a policy per scale of a model: the nearest by relative position, the coarser on a tie."""
        ours = len(self.scales)
        return [self.scales[nearest_scale(scale, scales, ours)] for scale in range(scales)]

    def to_text(self) -> str:
        """Return the text form; `schedule_text.parse_schedule` reads it back to an equal schedule."""
        lines = [f"maps {sides_text(self.maps)}"] if self.maps is not None else []
        for name in QUANTITIES:
            values = [getattr(policy, name) for policy in self.scales]
            if name in FAST_MODES and not any(values):
                continue
            lines.append(f"{name} {_values_text(values, may_ramp=name == 'guidance')}")
        lines.append(f"sampler_guidance {_number_text(self.sampler_guidance)}")
        lines.append(f"strategy {self.strategy}")
        if self.stretch:
            lines.append("stretch yes")
        return "\n".join(lines)


def yes_or_no(word: str) -> bool:
    """Return what "yes" or "no" says. Raises KeyError for another word."""
    return {"yes": True, "no": False}[word]


QUANTITIES: dict[str, Callable[[str], bool | int | float]] = {
    "top_k": int,
    "top_p": float,
    "guidance": float,
    "temperature": float,
    "smooth": yes_or_no,
    "steps": int,
    "transformer_steps": int,
    "random_steps": int,
    "unguided": yes_or_no,
    "prune": float,
}
"""The per-scale quantities in the order of their lines, each with the reader of one value."""

FAST_MODES = ("unguided", "prune")
"""Quantities that trade fidelity for time: a text without them means the exact picture."""


def _alike(ours: Sequence[TokenMap], theirs: Sequence[TokenMap]) -> bool:
    """Whether maps are the same but for another aspect ratio: nearly the same area per scale."""
    pairs = zip(ours, theirs, strict=True)
    return all(abs(a[0] * a[1] / (b[0] * b[1]) - 1) <= SAME_AREA for a, b in pairs)


def ramp(strength: float, scales: int) -> list[float]:
    """Return the released guidance per scale: strength s / (S - 1), none at the first scale."""
    return [strength * (scale / max(scales - 1, 1)) for scale in range(scales)]


def nearest_scale(scale: int, scales: int, ours: int) -> int:
    """Return which of `ours` scales lies nearest to a scale of `scales` by relative position s / (S - 1)."""
    last, our_last = max(scales - 1, 1), max(ours - 1, 1)
    # Whole numbers, so that a tie is one: |i / our_last - scale / last| times both denominators.
    return min(range(ours), key=lambda i: abs(i * last - scale * our_last))


def sides_text(maps: Sequence[TokenMap]) -> str:
    """Return token maps as readable sides: `8` for a square map, `6x10` (HxW) for another."""
    return " ".join(str(h) if h == w else f"{h}x{w}" for h, w in maps)


def _number_text(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return repr(int(value)) if value == int(value) else repr(value)


def _values_text(values: Sequence[bool | int | float], *, may_ramp: bool) -> str:
    if may_ramp and len(values) > 1 and values[-1] and list(values) == ramp(values[-1], len(values)):
        return f"ramp {_number_text(values[-1])}"
    runs: list[tuple[bool | int | float, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    if len(runs) == 1 and len(values) > 1:
        return _number_text(values[0])
    return " ".join(_number_text(v) if n == 1 else f"{_number_text(v)}*{n}" for v, n in runs)
