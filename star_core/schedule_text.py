"""A schedule's text form, read: `ScaleSchedule.to_text` writes it. No torch.

It has one `name values` line per quantity (`;` separates as a line break does):

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

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

from .config import TokenMap, check_maps
from .schedule import MAX_STEPS, QUANTITIES, ScalePolicy, ScaleSchedule, Strategy, ramp, yes_or_no


class ScheduleError(ValueError):
    """A schedule text that cannot be read. The message shows the line and points at the character."""


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


def only_word(text: str) -> str | None:
    """Return the one word of a text that has no more, such as a preset's name, else None."""
    words = [word for part in re.split(r"[;\n]", text) for word in part.split()]
    return words[0] if len(words) == 1 else None


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
            return bool(_one_value(line, line.words[1], yes_or_no))
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
