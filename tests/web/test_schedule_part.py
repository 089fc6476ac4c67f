"""What a drag, a preset or a model's sides do to a schedule text: one line changes, all else stays."""

from __future__ import annotations

from typing import Any

import pytest

from star_core.presets import SCHEDULES
from star_core.schedule import ramp
from star_core.schedule_parts import check_part
from star_core.schedule_text import ScheduleError, parse_schedule

from .node_script import needs_node, run_node

pytestmark = needs_node


def call(*cases: list[Any]) -> list[Any]:
    return run_node("schedule_part_main.mjs", list(cases))


def value(*case: Any) -> Any:
    (answer,) = call(list(case))
    assert "error" not in answer, answer
    return answer["value"]


@pytest.mark.parametrize(
    ("text", "name", "values", "expected"),
    [
        ("maps 1 2 3\ntop_k 600", "top_k", [600, 300, 300], "maps 1 2 3\ntop_k 600 300*2"),
        ("maps 1 2 3\ntop_k 600 300*2", "top_k", [5, 5, 5], "maps 1 2 3\ntop_k 5"),
        ("maps 1 2 3\nguidance 1", "guidance", [0, 2, 4], "maps 1 2 3\nguidance ramp 4"),
        ("maps 1 2 3\nguidance ramp 4", "guidance", [0, 2.5, 4], "maps 1 2 3\nguidance 0 2.5 4"),
        ("  maps 1 2 3 ;top_k  1   2 3;top_p 1", "top_k", [1, 2, 4], "  maps 1 2 3 ;top_k  1 2 4;top_p 1"),
        ("maps 1 2 3\n", "top_p", [0.5, 0.5, 1], "maps 1 2 3\ntop_p 0.5*2 1"),
        ("maps 1 2 3; top_k 4;", "top_p", [0.5, 0.5, 1], "maps 1 2 3; top_k 4; top_p 0.5*2 1"),
        ("top_k 1 2 3", "top_k", [4, 4, 4], "top_k 4*3"),
        ("guidance 0 1 2", "guidance", [0, 2, 4], "guidance 0 2 4"),
        ("maps 1 2\nsmooth no", "smooth", [False, True], "maps 1 2\nsmooth no yes"),
    ],
)
def test_one_line_changes(text: str, name: str, values: list[float], expected: str) -> None:
    written = value("writeValues", text, name, values)
    assert written == expected
    schedule = parse_schedule(written)
    assert [getattr(policy, name) for policy in schedule.scales] == values


def test_sides_are_written_but_never_stretch_listed_values() -> None:
    sides = ["1", "2", "3x4", "4x6"]
    single, listed = "top_k 600\nguidance ramp 4", "maps 1 2 3\ntop_k 1 2 3"
    written, refused = call(["writeSides", single, sides], ["writeSides", listed, sides])
    assert written["value"] == "maps 1 2 3x4 4x6\ntop_k 600\nguidance ramp 4"
    assert "3 values for 4 scales" in refused["error"]


def test_a_preset_takes_the_place_of_its_lines_only() -> None:
    preset = "maps 1 2 3\ntop_k 4096\ntop_p 0.8"
    assert value("writePreset", "stretch yes; top_k 1; maps 1 2", preset) == (
        "stretch yes; top_k 4096; maps 1 2 3; top_p 0.8"
    )
    assert value("writePreset", "top_k ???", preset) == preset
    # A preset draws the exact picture: fast modes that the text had are gone.
    assert value("writePreset", "maps 1 2 3\nprune 0 0 0.5\ntop_p 1\nunguided yes", preset) == (
        "maps 1 2 3\ntop_p 0.8\ntop_k 4096"
    )
    assert value("writePreset", "prune 0 0 0.5; maps 1 2 3", preset + "\nprune 0 0.2 0.4") == (
        "prune 0 0.2 0.4; maps 1 2 3\ntop_k 4096\ntop_p 0.8".replace("\n", "; ")
    )
    assert value("writePreset", "demo-1024", preset) == preset


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("maps 1 2\ntop_k 5", {"top_k": True, "smooth": False, "unguided": False, "prune": False}),
        ("maps 1 2\nsmooth no; prune 0", {"smooth": False, "prune": True}),
        ("maps 1 2\nsmooth no yes; unguided no yes", {"smooth": True, "unguided": True, "prune": False}),
    ],
)
def test_a_row_that_few_schedules_have_waits_for_its_line(text: str, shown: dict[str, bool]) -> None:
    assert {name: value("isShownIn", name, text) for name in shown} == shown


def test_no_bar_prunes_the_first_scale() -> None:
    assert value("possible", "prune", [0.3, 0.3, 0.3]) == [0, 0.3, 0.3]
    assert value("possible", "top_k", [5, 5]) == [5, 5]
    written = value("writeValues", "maps 1 2 3\nprune 0", "prune", [0, 0.3, 0.3])
    assert [policy.prune for policy in parse_schedule(written).scales] == [0, 0.3, 0.3]
    assert value("rangeOf", "prune", [0, 0.5]) == {"bottom": 0, "top": 0.95}


DRAWING = [
    "maps 1 2\ntop_k 5",
    "maps 1 2\nsteps 8",
    "maps 1 2\nstrategy masked",
    "maps 1 2\nsampler_guidance 1",
]
SAMPLER = ["maps 1 2\nsteps 5", "maps 1 2\ntop_p 1", "maps 1 2\nsmooth no", "maps 1 2\nstrategy masked"]


@pytest.mark.parametrize(("node", "part", "texts"), [
    ("StarScaleSchedule", "drawing", DRAWING),
    ("StarCausalSampler", "sampler", SAMPLER),
])  # fmt: skip
def test_lines_of_the_other_node_are_refused_in_the_nodes_words(node: str, part: Any, texts: list[str]) -> None:
    good, *bad = texts
    taken, *refused = call(*[["readPart", text, node] for text in texts])
    check_part(good, part)
    assert taken == {"value": 2}
    for text, answer in zip(bad, refused, strict=True):
        with pytest.raises(ScheduleError) as caught:
            check_part(text, part)
        assert answer == {"error": str(caught.value)}


def test_a_text_for_any_number_of_scales_takes_the_model_s() -> None:
    node, text = "StarScaleSchedule", "top_k 600\ntop_p 0.8\nguidance ramp 4"
    alone, ours, listed, broken = call(
        ["readPart", text, node],
        ["readPart", text, node, 14],
        ["readPart", "top_k 600*9 3", node, 14],
        ["readPart", "top_k many", node, 14],
    )
    assert "does not say how many scales" in alone["error"]
    assert ours == {"value": 14}
    assert listed == {"value": 10}, "what a text says itself holds"
    assert "many" in broken["error"]


def test_a_lone_word_is_a_presets_name() -> None:
    names = list(SCHEDULES)
    assert [answer["value"] for answer in call(*[["presetName", f" {name}\n"] for name in names])] == names
    assert value("presetName", "top_k 5") is None


@pytest.mark.parametrize(
    ("name", "typed", "expected"),
    [
        ("top_k", "600", 600),
        ("top_k", "6.5", None),
        ("top_k", "1000001", None),
        ("top_p", "0.25", 0.25),
        ("top_p", "1.5", None),
        ("guidance", "-3", -3),
        ("temperature", "0", None),
        ("steps", "4097", None),
        ("smooth", "yes", True),
        ("prune", "0.95", 0.95),
        ("prune", "1", None),
        ("top_p", "", None),
    ],
)
def test_typed_numbers_are_those_the_text_may_have(name: str, typed: str, expected: object) -> None:
    assert value("typedValue", name, typed) == expected


@pytest.mark.parametrize("name", ["top_k", "top_p", "guidance", "temperature", "steps"])
def test_a_bar_gives_back_the_value_it_shows(name: str) -> None:
    values = {"top_k": [0, 1, 30, 600, 4096], "top_p": [0, 0.05, 0.8, 1], "guidance": ramp(4, 5)}
    shown = values.get(name, [1, 2])
    span = value("rangeOf", name, shown)
    heights = [answer["value"] for answer in call(*[["heightOf", name, v, span] for v in shown])]
    assert heights == sorted(heights)
    assert 0 <= heights[0] <= heights[-1] <= 1
    back = [answer["value"] for answer in call(*[["valueAt", name, h, span, True] for h in heights])]
    assert back == pytest.approx(shown, rel=1e-3)


def test_a_negative_guidance_has_room_below_zero() -> None:
    span = value("rangeOf", "guidance", [-3, 0, 4])
    assert span["bottom"] <= -3
    assert span["top"] >= 4
    assert value("valueAt", "guidance", 0, span) == span["bottom"]


def test_keys_step_within_what_the_text_may_have() -> None:
    moves = [
        ("top_p", 0.8, 1, False, 0.81),
        ("top_p", 0.8, 1, True, 0.801),
        ("top_p", 1, 10, False, 1),
        ("top_k", 0, 1, False, 1),
        ("top_k", 1, -1, False, 0),
        ("top_k", 2, 1, False, 3),
        ("top_k", 600, 10, False, 1200),
        ("top_k", 600, 1, True, 601),
        ("top_k", 1_000_000, 1, False, 1_000_000),
        ("steps", 0, -1, False, 0),
        ("temperature", 0.05, -10, False, 0.01),
    ]
    answers = call(*[["stepped", *move[:4]] for move in moves])
    assert [answer["value"] for answer in answers] == [move[4] for move in moves]
