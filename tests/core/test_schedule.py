"""Schedules: their text form, what they refuse and where they point, and the table of presets."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star_core.config import PRESETS, square_maps
from star_core.presets import SCHEDULES, named_schedule, read_schedule, sampler_start
from star_core.schedule import QUANTITIES, ScalePolicy, ScaleSchedule, ramp, sides_text
from star_core.schedule_text import ScheduleError, parse_schedule

MAPS_6 = square_maps((1, 2, 3, 4, 6, 8))
MAPS_10 = PRESETS["star-256-d16"].maps
MAPS_12 = PRESETS["star-512-d30-12-scales"].maps
MAPS_14 = PRESETS["star-1024-d30"].maps
WIDE_6 = ((1, 1), (1, 4), (2, 4), (2, 8), (3, 12), (4, 16))

policies = st.builds(
    ScalePolicy,
    top_k=st.integers(0, 5000),
    top_p=st.floats(0, 1),
    guidance=st.floats(-100, 100),
    temperature=st.floats(0.01, 100),
    steps=st.integers(0, 40),
    transformer_steps=st.integers(0, 40),
    random_steps=st.integers(0, 40),
    unguided=st.booleans(),
    prune=st.floats(0, 0.95),
) | st.builds(ScalePolicy, guidance=st.floats(-100, 100), smooth=st.just(True))


@st.composite
def schedules(draw: st.DrawFn) -> ScaleSchedule:
    count = draw(st.integers(2, 14))
    scales = draw(st.lists(policies, min_size=count, max_size=count))
    if draw(st.booleans()):
        strengths = ramp(draw(st.floats(-100, 100)), count)
        scales = [dataclasses.replace(p, guidance=t) for p, t in zip(scales, strengths, strict=True)]
    scales[0] = dataclasses.replace(scales[0], prune=0.0)
    growth = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=count, max_size=count))
    maps = tuple(
        (1 + sum(g for g, _ in growth[: i + 1]), 1 + sum(g for _, g in growth[: i + 1])) for i in range(count)
    )
    return ScaleSchedule(
        tuple(scales),
        draw(st.floats(-100, 100)),
        draw(st.sampled_from(["official", "confidence", "masked"])),
        draw(st.sampled_from([None, maps])),
        draw(st.booleans()),
    )


@given(schedules())
def test_a_schedule_round_trips_through_its_text(schedule: ScaleSchedule):
    text = schedule.to_text()
    again = parse_schedule(text, len(schedule.scales))
    assert again == schedule
    assert again.to_text() == text
    assert parse_schedule(text.replace("\n", " ; "), len(schedule.scales)) == schedule


@given(schedules())
def test_a_text_with_maps_says_itself_how_many_scales_it_has(schedule: ScaleSchedule):
    maps = tuple((i + 1, i + 2) for i in range(len(schedule.scales)))
    assert parse_schedule(dataclasses.replace(schedule, maps=maps).to_text()).maps == maps


@given(
    st.text(alphabet="maps top_kx*ramp guidance;\n0123456789.-+eE_ yesno steps smooth strategy", max_size=80)
)
def test_any_text_is_read_or_refused_as_a_schedule_error(text: str):
    for scales in (None, 4):
        with contextlib.suppress(ScheduleError):
            parse_schedule(text, scales)


def test_values_repeat_and_one_value_serves_all_scales():
    schedule = parse_schedule("top_k 600*2 300 100*3; top_p 0.8; steps 0*4 8*2; smooth no", 6)
    assert [p.top_k for p in schedule.scales] == [600, 600, 300, 100, 100, 100]
    assert {p.top_p for p in schedule.scales} == {0.8}
    assert [p.steps for p in schedule.scales] == [0, 0, 0, 0, 8, 8]
    assert {p.temperature for p in schedule.scales} == {1.0}


def test_a_ramp_is_the_released_guidance():
    schedule = parse_schedule("maps 1 2 3 4 6\nguidance ramp 4")
    assert [p.guidance for p in schedule.scales] == [0, 1, 2, 3, 4]
    assert ramp(4, 14)[9] == pytest.approx(4 * 9 / 13)
    assert "guidance ramp 4" in schedule.to_text()


def test_maps_may_be_rectangles():
    schedule = parse_schedule("maps 1 2x3 3x4; top_k 5")
    assert schedule.maps == ((1, 1), (2, 3), (3, 4))
    assert sides_text(schedule.maps) == "1 2x3 3x4"


REFUSALS = [
    # (text, the part that the caret must stand under, how often that part occurred before, message)
    ("top_k 600 oops 3", "oops", 0, "'oops' is not a whole number"),
    ("top_k 600 0.5 3", "0.5", 0, "'0.5' is not a whole number"),
    ("maps 1 2 3; top_p high", "high", 0, "'high' is not a number"),
    ("maps 1 2 3; top_p nan", "nan", 0, "'nan' is not a finite number"),
    ("maps 1 2 3; temperature inf", "inf", 0, "'inf' is not a finite number"),
    ("maps 1 2 3\nsmooth maybe", "maybe", 0, "'maybe' is not yes or no"),
    ("maps 1 2 3\ntop_q 0.8", "top_q", 0, "'top_q' is no quantity. There are: maps, top_k"),
    ("maps 1 2 3\ntop_p", "top_p", 0, "top_p has no value"),
    ("top_k 4 5 6\nmaps", "maps", 0, "maps has no value"),
    ("maps 1 2 3\ntop_p 0.8\n  top_p 0.9", "top_p 0.9", 0, "top_p is written twice"),
    ("maps 1 2 3\ntop_k 600*2 300*2", "600*2", 0, "4 values for 3 scales"),
    ("maps 1 2 3\ntop_k 600*99999", "600*99999", 0, "99999 repetitions are too many"),
    ("maps 1 2 3\ntop_k 1*99999999999", "1*99999999999", 0, "is not a whole number"),
    ("maps 1 2 3\nguidance ramp", "ramp", 0, "`ramp` is written as in `guidance ramp 4`"),
    ("maps 1 2 3\nguidance ramp 4 5", "ramp", 0, "`ramp` is written as in `guidance ramp 4`"),
    ("maps 1 2 3\nguidance ramp 4*3", "4*3", 0, "guidance takes one value"),
    ("maps 1 2 3\ntop_p ramp 4", "ramp", 0, "`ramp` is written as in"),
    ("maps 1 2 3\nguidance ramp x", "x", 0, "'x' is not a number"),
    ("maps 1 2 3\nguidance ramp 400", "400", 0, "scale 2: guidance lies within"),
    ("maps 1 2 3\ntop_k 4\ntop_p 0.5 1.5 0.5", "1.5", 0, "scale 2: top_p lies between 0 and 1, got 1.5"),
    ("maps 1 2 3\ntop_p 0.5*2 7", "7", 0, "scale 3: top_p lies between"),
    ("maps 1 2 3\ntop_k 1 1 -5", "-5", 0, "scale 3: top_k is a count or 0 for off, got -5"),
    ("maps 1 2 3\nsteps 4\ntransformer_steps 9999", "9999", 0, "transformer_steps lies within"),
    ("maps 1 2 3\ntop_k 4\nsmooth no*2 yes\nsteps 0 8*2", "8*2", 0, "scale 3: steps is 8 on a smooth scale"),
    ("maps 1 2 3\nsampler_guidance 4 5", "5", 0, "sampler_guidance takes one value"),
    ("maps 1 2 3\nsampler_guidance 4*3", "4*3", 0, "sampler_guidance takes one value"),
    ("maps 1 2 3\nsampler_guidance 400", "400", 0, "sampler_guidance lies within"),
    ("maps 1 2 3\nstrategy greedy", "greedy", 0, "strategy is one of official, confidence, masked"),
    ("maps 1 2 3\nstrategy masked official", "official", 0, "strategy takes one value"),
    ("top_k 4 5 6\nmaps 1 2 two", "two", 0, "'two' is not a side such as 8 or 6x10"),
    ("top_k 4\nmaps 1 2 0", "0", 0, "'0' is not a side"),
    ("top_k 4\nmaps 1 2x", "2x", 0, "'2x' is not a side"),
    ("top_k 4\nmaps 1 8 4 9", "4", 1, "token maps must not shrink"),
    ("top_k 4\nmaps 9", "9", 0, "at least two scales"),
    ("top_k 4 5\nmaps 1 2 3", "4", 0, "2 values for 3 scales"),
]


@pytest.mark.parametrize(("text", "part", "earlier", "message"), REFUSALS)
def test_a_wrong_text_is_refused_with_a_caret_under_the_wrong_character(
    text: str, part: str, earlier: int, message: str
):
    place = -1
    for _ in range(earlier + 1):
        place = text.index(part, place + 1)
    with pytest.raises(ScheduleError) as refusal:
        parse_schedule(text)
    complaint, shown, caret = str(refusal.value).split("\n")
    assert message in complaint
    assert f"(character {place + 1})" in complaint
    line_start = text.rfind("\n", 0, place) + 1
    assert shown.strip() == text[line_start:].split("\n")[0].strip()
    assert shown[caret.index("^") :].startswith(part.split()[0])


def test_another_number_of_maps_than_the_model_has_is_pointed_at():
    with pytest.raises(ScheduleError, match=r"3 maps for 4 scales \(character 6\)"):
        parse_schedule("maps 1 2 3", 4)


@pytest.mark.parametrize("text", ["", "  ", "\n;\n"])
def test_an_empty_schedule_says_how_to_write_one(text: str):
    with pytest.raises(ScheduleError, match="the schedule is empty: write a preset's name"):
        parse_schedule(text)


def test_a_schedule_that_does_not_say_its_scales_asks_for_maps():
    with pytest.raises(ScheduleError, match="add a `maps` line"):
        parse_schedule("top_k 600; guidance ramp 4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"guidance": 1e9}, "guidance"),
        ({"temperature": 0.0}, "temperature"),
        ({"steps": -1}, "steps"),
        ({"random_steps": -1}, "random_steps"),
        ({"prune": 1.0}, "prune lies within 0..0.95"),
        ({"smooth": True, "steps": 8}, "steps is 8 on a smooth scale"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ScalePolicy(**fields)


def test_a_schedule_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one scale"):
        ScaleSchedule(())
    with pytest.raises(ValueError, match="strategy is one of"):
        ScaleSchedule((ScalePolicy(),), strategy="greedy")
    with pytest.raises(ValueError, match="maps has 2 entries for 3 scales"):
        ScaleSchedule((ScalePolicy(),) * 3, maps=((1, 1), (2, 2)))
    with pytest.raises(ValueError, match="sampler_guidance"):
        ScaleSchedule((ScalePolicy(),), sampler_guidance=float("nan"))


def test_another_number_of_scales_is_refused():
    schedule = named_schedule("top-k", MAPS_10)
    with pytest.raises(ValueError, match="the schedule has 10 scales, the model draws 6 \\(1 2 3 4 6 8\\)"):
        schedule.fit(MAPS_6, 4096, has_sampler=False)


def test_sampler_steps_are_refused_without_a_sampler():
    schedule = named_schedule("sampler", MAPS_14)
    with pytest.raises(ValueError, match="this checkpoint has none: set steps to 0"):
        schedule.fit(MAPS_14, 4096, has_sampler=False)
    assert schedule.fit(MAPS_14, 4096, has_sampler=True) == schedule


def test_top_k_above_the_codebook_is_clamped_and_the_text_stays_as_it_was():
    schedule = parse_schedule("maps 1 2 3\ntop_k 4096 600 0")
    text = schedule.to_text()
    fitted = schedule.fit(schedule.maps, 1000, has_sampler=False)
    assert [p.top_k for p in fitted.scales] == [1000, 600, 0]
    assert schedule.to_text() == text
    assert "top_k 4096 600 0" in text


def test_steps_above_the_tokens_of_a_map_are_clamped():
    schedule = parse_schedule("maps 1 2x3 4x5\nsteps 8")
    fitted = schedule.fit(schedule.maps, 64, has_sampler=True)
    assert [p.steps for p in fitted.scales] == [1, 6, 8]
    assert [p.steps for p in schedule.scales] == [8, 8, 8]


def test_unconditional_rows_are_needed_only_where_something_guides():
    plain = ScaleSchedule((ScalePolicy(),) * 3)
    assert not plain.guided
    assert not plain.refines
    assert ScaleSchedule((ScalePolicy(), ScalePolicy(guidance=1.0))).guided
    refined = ScaleSchedule((ScalePolicy(), ScalePolicy(steps=2)))
    assert refined.refines
    assert refined.guided
    assert not dataclasses.replace(refined, sampler_guidance=0.0).guided


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("maps", [MAPS_6, WIDE_6, MAPS_10, MAPS_12, MAPS_14], ids=lambda maps: f"{maps[-1]}")
def test_every_preset_builds_for_every_number_of_scales_and_round_trips(name: str, maps: tuple):
    schedule = named_schedule(name, maps)
    assert len(schedule.scales) == len(maps)
    assert schedule.maps == maps
    assert read_schedule(schedule.to_text(), maps) == schedule
    assert parse_schedule(schedule.to_text()) == schedule
    assert read_schedule(f" {name}\n", maps) == schedule
    assert schedule.fit(maps, 4096, has_sampler=True).scales[-1].steps == schedule.scales[-1].steps


@pytest.mark.parametrize("preset", SCHEDULES.values())
def test_every_preset_says_what_it_does_and_where_it_comes_from(preset: object):
    assert preset.description
    assert preset.source


def test_the_released_sampler_schedule_is_as_released():
    schedule = named_schedule("official-1024", MAPS_14)
    assert [p.steps for p in schedule.scales] == [0] * 9 + [8] * 4 + [15]
    assert [p.transformer_steps for p in schedule.scales] == [0] * 9 + [5] * 4 + [0]
    assert [p.random_steps for p in schedule.scales] == [0] * 9 + [5] * 5
    assert schedule.strategy == "official"
    assert schedule.sampler_guidance == 4
    assert [p.guidance for p in schedule.scales] == ramp(4, 14)
    assert {p.top_p for p in schedule.scales} == {0.8}


def test_the_other_released_policies_are_as_released():
    masked = named_schedule("sampler", MAPS_14)
    assert [p.steps for p in masked.scales] == [0] * 9 + [8] * 5
    assert masked.strategy == "masked"
    assert not any(p.transformer_steps for p in masked.scales)
    old = named_schedule("old", MAPS_14)
    assert [p.top_k for p in old.scales] == [600] * 9 + [300] * 3 + [100] * 2
    assert not old.refines
    assert all(p.smooth for p in named_schedule("smooth", MAPS_10).scales)
    assert {p.top_k for p in named_schedule("top-k", MAPS_10).scales} == {600}
    assert {p.top_k for p in named_schedule("official-256", MAPS_10).scales} == {4096}


def test_the_sampler_starts_at_the_same_share_of_the_scales():
    assert sampler_start(14) == 9
    assert sampler_start(6) == 4
    assert sampler_start(10) == 6


def test_every_released_checkpoint_has_a_schedule_that_fits_it():
    for config in PRESETS.values():
        schedule = read_schedule(config.schedule, config.maps)
        schedule.fit(config.maps, 4096, has_sampler=config.transformer.has_sampler)


def test_the_256_px_sampler_refines_the_scale_that_its_training_refined():
    config = PRESETS["star-256-d30-sampler"]
    schedule = read_schedule(config.schedule, config.maps)
    assert [p.steps for p in schedule.scales] == [0] * 9 + [8]
    assert [p.transformer_steps for p in schedule.scales] == [0] * 9 + [5]
    assert [p.random_steps for p in schedule.scales] == [0] * 9 + [5]
    assert [p.guidance for p in schedule.scales] == ramp(4, 10)
    assert (schedule.strategy, schedule.sampler_guidance) == ("official", 4)


@pytest.mark.parametrize("text", ["smooth;", ";smooth", " smooth ;\n", "smooth\n;"])
def test_a_separator_beside_a_preset_s_name_is_none_of_it(text: str):
    assert read_schedule(text, MAPS_6) == named_schedule("smooth", MAPS_6)


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ScheduleError, match="'topk' is neither a preset .*top-k.* nor a schedule text"):
        read_schedule("topk", MAPS_6)
    with pytest.raises(ValueError, match="no schedule 'topk'. There are: official-256"):
        named_schedule("topk", MAPS_6)


def test_a_text_without_maps_is_read_for_the_model():
    schedule = read_schedule("top_k 600; guidance ramp 4", MAPS_6)
    assert len(schedule.scales) == 6
    assert schedule.maps is None


def test_every_quantity_is_a_field_of_a_policy():
    assert tuple(QUANTITIES) == tuple(field.name for field in dataclasses.fields(ScalePolicy))


def test_a_schedule_for_other_maps_is_refused_and_one_for_another_aspect_ratio_is_not():
    schedule = parse_schedule("maps 1 2 3 4 6 8; top_k 5")
    with pytest.raises(ValueError, match="written for maps 1 2 3 4 6 8, the model draws 1 2 3 4 5 8"):
        schedule.fit(square_maps((1, 2, 3, 4, 5, 8)), 64, has_sampler=False)
    stretched = ((1, 1), (2, 2), (2, 4), (3, 5), (5, 7), (7, 9))
    assert schedule.fit(stretched, 64, has_sampler=False).maps == stretched
