"""ScaleSchedule: every choice the generation loop makes, per scale, with a readable text form. No torch.

The text form has one `name values` line per quantity (`;` separates as a line break does):

    maps 1 2 3 4 5 6 8 10 13 16
    top_k 600*9 300*3
    top_p 0.8
    guidance ramp 4
    steps 0*6 8*4

Values repeat by `*`, one value serves all scales, `ramp g` is g s / (S - 1), the released guidance.
`maps` is optional; sides are numbers or HxW. Quantities that are not written keep their defaults.
A line `stretch yes` lets a model with another number of scales, or of other sides, use the schedule: each
of its scales takes the policy of the nearest one by relative position s / (S - 1). Without it such a model
refuses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
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


class ScheduleError(ValueError):
    """A schedule text that cannot be read. The message shows the line and points at the character."""


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
        """Return the text form; `parse_schedule` reads it back to an equal schedule."""
        lines = [f"maps {sides_text(self.maps)}"] if self.maps is not None else []
        for name in QUANTITIES:
            values = [getattr(policy, name) for policy in self.scales]
            if name in FAST_MODES and not any(values):
                continue
            lines.append(f"{name} {_values_text(values, ramp=name == 'guidance')}")
        lines.append(f"sampler_guidance {_number_text(self.sampler_guidance)}")
        lines.append(f"strategy {self.strategy}")
        if self.stretch:
            lines.append("stretch yes")
        return "\n".join(lines)


def _yes_or_no(word: str) -> bool:
    return {"yes": True, "no": False}[word]


QUANTITIES: dict[str, Callable[[str], bool | int | float]] = {
    "top_k": int,
    "top_p": float,
    "guidance": float,
    "temperature": float,
    "smooth": _yes_or_no,
    "steps": int,
    "transformer_steps": int,
    "random_steps": int,
    "unguided": _yes_or_no,
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


def _values_text(values: Sequence[bool | int | float], *, ramp: bool) -> str:
    if ramp and len(values) > 1 and values[-1] and list(values) == _ramp(values[-1], len(values)):
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


_ramp = ramp


@dataclass(frozen=True)
class _Word:
    text: str
    start: int


@dataclass(frozen=True)
class _Line:
    """One `name values` line of a schedule text and where it stands."""

    whole: str
    words: tuple[_Word, ...]

    def fail(self, word: _Word, problem: str) -> ScheduleError:
        start = self.whole.rfind("\n", 0, word.start) + 1
        stop = self.whole.find("\n", word.start)
        shown = self.whole[start : stop if stop >= 0 else None]
        column = word.start - start
        return ScheduleError(f"{problem} (character {word.start + 1})\n  {shown}\n  {' ' * column}^")


def parse_schedule(text: str, scales: int | None = None) -> ScaleSchedule:
    """Read the text form. `scales` is the model's number of scales, needed where every line has one value.

    Raises ScheduleError pointing at the character that is wrong.
    """
    lines = _lines(text)
    values: dict[str, list[bool | int | float]] = {}
    maps: tuple[TokenMap, ...] | None = None
    strategy: Strategy = "official"
    sampler_guidance = 4.0
    stretch = _stretches(lines)
    expected = _expected_scales(lines, scales, stretch=stretch)
    seen: set[str] = set()
    for line in lines:
        name, rest = line.words[0], line.words[1:]
        if name.text in seen:
            raise line.fail(name, f"{name.text} is written twice")
        seen.add(name.text)
        if not rest:
            raise line.fail(name, f"{name.text} has no value")
        if name.text == "maps":
            maps = _maps_of(line, rest, expected)
        elif name.text == "strategy":
            strategy = _strategy_of(line, rest)
        elif name.text == "sampler_guidance":
            sampler_guidance = _only_value(line, rest)
        elif name.text == "stretch":
            continue
        elif name.text in QUANTITIES:
            values[name.text] = _spread(line, rest, QUANTITIES[name.text], expected)
        else:
            known = ", ".join(["maps", *QUANTITIES, "sampler_guidance", "strategy", "stretch"])
            raise line.fail(name, f"{name.text!r} is no quantity. There are: {known}")
    policies = _policies(lines, values, expected)
    try:
        return ScaleSchedule(policies, sampler_guidance, strategy, maps, stretch)
    except ValueError as error:
        line, word = _culprit(lines, str(error))
        raise line.fail(word, str(error)) from error


def _policies(
    lines: list[_Line], values: dict[str, list[bool | int | float]], scales: int
) -> tuple[ScalePolicy, ...]:
    policies = []
    for scale in range(scales):
        fields = {name: column[scale] for name, column in values.items()}
        try:
            policies.append(ScalePolicy(**fields))  # type: ignore[arg-type]  # checked by QUANTITIES
        except ValueError as error:
            line, word = _culprit(lines, str(error), scale)
            raise line.fail(word, f"scale {scale + 1}: {error}") from error
    return tuple(policies)


def _culprit(lines: list[_Line], message: str, scale: int = 0) -> tuple[_Line, _Word]:
    """Return the word that a message is about: the scale's, in the line of the quantity it begins with."""
    for line in lines:
        if re.match(rf"{re.escape(line.words[0].text)}\b", message):
            return line, _word_of_scale(line.words[1:], scale)
    return lines[0], lines[0].words[0]


def _word_of_scale(words: tuple[_Word, ...], scale: int) -> _Word:
    reach = 0
    for word in words:
        reach += _count_of(word)
        if scale < reach and word.text != "ramp":
            return word
    return words[-1]


def _lines(text: str) -> list[_Line]:
    lines = []
    for match in re.finditer(r"[^;\n]+", text):
        words = tuple(_Word(w.group(), match.start() + w.start()) for w in re.finditer(r"\S+", match.group()))
        if words:
            lines.append(_Line(text, words))
    if not lines:
        raise ScheduleError("the schedule is empty: write a preset's name, or `top_k 600; top_p 0.8`")
    return lines


def _count_of(word: _Word) -> int:
    repeat = re.search(r"\*(\d{1,9})$", word.text)
    return int(repeat.group(1)) if repeat else 1


def refuse_lines(text: str, elsewhere: Mapping[str, str]) -> None:
    """Raise ScheduleError at the first line whose quantity belongs elsewhere, with the reason given."""
    for line in _lines(text):
        name = line.words[0]
        if name.text in elsewhere:
            raise line.fail(name, elsewhere[name.text])


def scales_of(text: str) -> int | None:
    """Return how many scales a text says it has, None where one value serves them all."""
    lines = _lines(text)
    return next((n for line in _by_worth(lines) if (n := _listed(line)) is not None), None)


def _stretches(lines: list[_Line]) -> bool:
    """Return what the text's `stretch` line says, False where there is none."""
    for line in lines:
        if line.words[0].text == "stretch" and len(line.words) > 1:
            for surplus in line.words[2:]:
                raise line.fail(surplus, "stretch takes one value")
            if "*" in line.words[1].text:
                raise line.fail(line.words[1], "stretch takes one value, for all scales together")
            return bool(_one_value(line, line.words[1], _yes_or_no))
    return False


def _expected_scales(lines: list[_Line], scales: int | None, *, stretch: bool) -> int:
    """Return the number of scales: the caller's, that of the maps, or of the first line that lists values.

    A text that stretches is of its own number of scales, wherever it says one.
    """
    if scales is not None and not stretch:
        return scales
    for line in _by_worth(lines):
        if (listed := _listed(line)) is not None:
            return listed
    if scales is not None:
        return scales
    raise ScheduleError(
        "the schedule does not say how many scales it has: add a `maps` line, as in"
        " `maps 1 2 3 4 5 6 8 10 13 16`"
    )


def _by_worth(lines: list[_Line]) -> list[_Line]:
    """Return the lines in the order in which they are asked for the number of scales: maps first."""
    return sorted(lines, key=lambda line: line.words[0].text != "maps")


def _listed(line: _Line) -> int | None:
    """Return how many scales a line lists, None where it has one value or a ramp."""
    name, rest = line.words[0].text, line.words[1:]
    count = sum(_count_of(word) for word in rest)
    listed = name in QUANTITIES and rest and rest[0].text != "ramp"
    return min(count, MAX_STEPS) if (name == "maps" and rest) or (listed and count > 1) else None


def _spread(
    line: _Line,
    words: tuple[_Word, ...],
    read: Callable[[str], bool | int | float],
    scales: int,
) -> list[bool | int | float]:
    if words[0].text == "ramp":
        if line.words[0].text != "guidance" or len(words) != 2:
            raise line.fail(words[0], "`ramp` is written as in `guidance ramp 4`")
        return list(ramp(_only_value(line, words[1:]), scales))
    values: list[bool | int | float] = []
    for word in words:
        count = _count_of(word)
        if count > MAX_STEPS:
            raise line.fail(word, f"{count} repetitions are too many")
        values += [_one_value(line, word, read)] * count
    if len(values) == 1:
        return values * scales
    if len(values) != scales:
        raise line.fail(words[0], f"{len(values)} values for {scales} scales")
    return values


def _only_value(line: _Line, words: tuple[_Word, ...]) -> float:
    """Return the number of a line that has one for all scales."""
    for surplus in words[1:]:
        raise line.fail(surplus, f"{line.words[0].text} takes one value")
    (word,) = words
    if "*" in word.text:
        raise line.fail(word, f"{line.words[0].text} takes one value, for all scales together")
    return float(_one_value(line, word, float))


def _one_value(line: _Line, word: _Word, read: Callable[[str], bool | int | float]) -> bool | int | float:
    text = re.sub(r"\*\d{1,9}$", "", word.text)
    try:
        value = read(text)
    except (ValueError, KeyError) as error:
        kind = {int: "a whole number", float: "a number"}.get(read, "yes or no")  # type: ignore[call-overload]
        raise line.fail(word, f"{text!r} is not {kind}") from error
    if value != value or value in (float("inf"), float("-inf")):
        raise line.fail(word, f"{text!r} is not a finite number")
    return value


def _maps_of(line: _Line, words: tuple[_Word, ...], expected: int) -> tuple[TokenMap, ...]:
    maps = tuple(_map_of(line, word) for word in words)
    if len(maps) != expected:
        raise line.fail(words[0], f"{len(maps)} maps for {expected} scales")
    for stop in range(min(2, len(maps)), len(maps) + 1):
        try:
            check_maps(maps[:stop])
        except ValueError as error:
            raise line.fail(words[stop - 1], str(error)) from error
    return maps


def _map_of(line: _Line, word: _Word) -> TokenMap:
    match = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", word.text)
    if match is None:
        raise line.fail(word, f"{word.text!r} is not a side such as 8 or 6x10")
    height = int(match.group(1))
    return height, int(match.group(2) or height)


def _strategy_of(line: _Line, words: tuple[_Word, ...]) -> Strategy:
    for surplus in words[1:]:
        raise line.fail(surplus, "strategy takes one value")
    (word,) = words
    for strategy in get_args(Strategy):
        if word.text == strategy:
            return strategy  # type: ignore[no-any-return]  # get_args returns Any
    raise line.fail(word, f"strategy is one of {', '.join(get_args(Strategy))}")
