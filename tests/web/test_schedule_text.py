"""The editor's parser reads every schedule text as the engine does, and refuses it in the same words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from star_core.presets import SCHEDULES, named_schedule
from star_core.schedule import QUANTITIES
from star_core.schedule_text import ScheduleError, parse_schedule

from .node_script import needs_node, run_node

pytestmark = needs_node

Case = tuple[str, int | None]


def by_engine(text: str, scales: int | None) -> dict[str, Any]:
    try:
        schedule = parse_schedule(text, scales)
    except ScheduleError as error:
        return {"error": str(error)}
    return {
        "text": schedule.to_text(),
        "scales": len(schedule.scales),
        "maps": None if schedule.maps is None else [list(sides) for sides in schedule.maps],
        "values": {name: [getattr(policy, name) for policy in schedule.scales] for name in QUANTITIES},
    }


def assert_agreement(cases: list[Case]) -> list[dict[str, Any]]:
    """Compare both parsers on all cases; return the engine's answers."""
    expected = [by_engine(*case) for case in cases]
    for case, ours, theirs in zip(cases, run_node("schedule_text_main.mjs", cases), expected, strict=True):
        word = ours.pop("word", None)
        assert ours == theirs, case
        if word is not None and "^" in theirs["error"]:
            shown, pointer = theirs["error"].split("\n")[-2:]
            assert shown[pointer.index("^") :].startswith(word), case
    return expected


READ = [
    "maps 1 2 4 6 10 16\ntop_k 600\ntop_p 0.8\nguidance ramp 4\ntemperature 1",
    "maps 1 2 4 6 10 16\nsteps 0*4 8*2\ntransformer_steps 0*4 5 0\nrandom_steps 0*4 5*2",
    "maps 1 2x3 3x4 ; top_k 600*2 300;top_p .5 ; guidance -1e1",
    "top_k 1_000 +5 0",
    "top_p 0.00001 1e-7 0.1",
    "guidance 0 2 4",
    "guidance 0 1.3333333333333333 2.6666666666666665 4",
    "temperature 0.30000000000000004*2 1.",
    "top_k ６００ 5＊2".replace("＊", "*"),
    "smooth yes no\nsteps 0 8",
    "guidance ramp 0\ntop_k 1*5",
    "guidance ramp -2.5\ntop_k 1*2 2*5",
    "top_k 1\u00a0\u30002\x1c3",
    "maps 1 2\nsampler_guidance 2.5\nstrategy masked",
    "guidance -0.0 1",
    "maps 1 2 3\nstretch yes",
    "maps 1 2 3\nstretch no",
    "maps 1 2 3\nunguided no*2 yes\nprune 0 0.4 .5",
    "maps 1 2 3\nunguided no\nprune 0",
]
REFUSED = [
    "",
    " ;\n; ",
    "demo-1024",
    "top_k 600",
    "maps",
    "maps 1",
    "maps 4 2",
    "maps 1 2 4x2 3x5",
    "maps 1 0",
    "maps 1 2x",
    "maps 1 2 3\ntop_k 1 2",
    "maps 1 2 3\ntop_k",
    "maps 1 2 3\nmaps 1 2 3",
    "maps 1 2 3\ntopk 4",
    "maps 1 2 3\n'top\"_k 4",
    "maps 1 2 3\ntop_k six",
    "maps 1 2 3\ntop_k 6.5",
    "maps 1 2 3\ntop_k 6*",
    "maps 1 2 3\ntop_k 6*0",
    "maps 1 2 3\ntop_k 6*4097",
    "maps 1 2 3\ntop_k 99999999999999999999999",
    "maps 1 2 3\ntop_k 5 5 1000001",
    "maps 1 2 3\ntop_p 0.5 0.5 1.5",
    "maps 1 2 3\ntop_p 2",
    "maps 1 2 3\ntop_p nan",
    "maps 1 2 3\ntop_p 1e999",
    "maps 1 2 3\nguidance 1e17",
    "maps 1 2 3\ntemperature 0",
    "maps 1 2 3\ntemperature 1e-5",
    "maps 1 2 3\ntop_k ramp 4",
    "maps 1 2 3\nguidance ramp",
    "maps 1 2 3\nguidance ramp 4 5",
    "maps 1 2 3\nguidance ramp 4*2",
    "maps 1 2 3\nguidance ramp 400",
    "maps 1 2 3\nsmooth maybe",
    "maps 1 2 3\nsmooth yes\nsteps 0 0 4",
    "maps 1 2 3\nsteps -1",
    "maps 1 2 3\nsampler_guidance 101",
    "maps 1 2 3\nsampler_guidance 1 2",
    "maps 1 2 3\nstrategy fast",
    "maps 1 2 3\nstrategy masked masked",
    "maps 1 2 3\nstretch",
    "maps 1 2 3\nstretch 2",
    "maps 1 2 3\nstretch yes no",
    "maps 1 2 3\nstretch yes\nstretch yes",
    "🙂 1\nmaps 1 2",
    "maps 1 2 3\n🙂; top_k x",
    "maps 1 2 3\nsmooth constructor",
    "maps 1 2 3\nunguided 1",
    "maps 1 2 3\nprune 0 0 0.96",
    "maps 1 2 3\nprune 0 0 1",
    "maps 1 2 3\nprune 0 -0.5 0",
    "maps 1 2 3\nprune 0.5",
    "maps 1 2 3\ntop_k 4\nprune 0.1 0.2 0.3",
    "maps 1 2 3\n__proto__ 1",
    "maps 1 2 3\ntop_k \\\u200b\x07",
]


def test_texts_that_are_read() -> None:
    answers = assert_agreement([(text, None) for text in READ])
    assert not [answer for answer in answers if "error" in answer]


def test_texts_that_are_refused() -> None:
    answers = assert_agreement([(text, None) for text in REFUSED])
    assert all("error" in answer for answer in answers)


@pytest.mark.parametrize("sides", [(1, 2, 4, 6, 10, 16), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24, 28, 32)])
def test_every_preset_is_read_and_written_back(sides: tuple[int, ...]) -> None:
    texts = [named_schedule(name, [(side, side) for side in sides]).to_text() for name in SCHEDULES]
    answers = assert_agreement([(text, None) for text in texts])
    assert [answer["text"] for answer in answers] == texts


def test_the_number_of_scales_may_come_from_the_model() -> None:
    texts = [
        "top_k 600",
        "maps 1 2 3",
        "top_k 1 2",
        "guidance ramp 4",
        "top_k 5*0",
        "maps 1 2 3; stretch yes",
        "top_k 1 2; stretch yes",
    ]
    assert_agreement([(text, scales) for text in texts for scales in (1, 2, 3, 14)])


names = st.sampled_from([*QUANTITIES, "maps", "strategy", "sampler_guidance", "stretch", "Top_k"])
words = st.one_of(
    st.integers(-3, 9).map(str),
    st.floats(allow_nan=False, width=16).map(repr),
    st.floats(0, 1).map(repr),
    st.tuples(st.sampled_from(["0", "600", "1.5", "yes"]), st.integers(0, 5)).map(
        lambda run: f"{run[0]}*{run[1]}"
    ),
    st.sampled_from(
        ["ramp", "yes", "no", "masked", "official", "2x3", "8", "1_0", "1__0", "+1", ".", "*2", "1e3"]
    ),
    st.text(alphabet="019.*x_-+eEyn'\"\\é🙂", min_size=1, max_size=5),
)
good_lines = st.one_of(
    st.just("maps 1 2 3"),
    st.tuples(
        st.sampled_from(["top_k", "steps", "random_steps"]),
        st.lists(st.integers(0, 5000).map(str), min_size=3, max_size=3),
    ).map(lambda line: " ".join([line[0], *line[1]])),
    st.tuples(
        st.sampled_from(["top_p", "guidance", "temperature"]),
        st.lists(st.floats(0, 1).map(repr), min_size=3, max_size=3),
    ).map(lambda line: " ".join([line[0], *line[1]])),
    st.floats(-100, 100).map(lambda strength: f"guidance ramp {strength!r}"),
)
any_lines = st.tuples(names, st.lists(words, max_size=4)).map(lambda line: " ".join([line[0], *line[1]]))
texts = st.lists(st.one_of(good_lines, any_lines), max_size=5).flatmap(
    lambda lines: st.sampled_from(["\n", "; ", ";\n  ", "\n\n"]).map(lambda gap: gap.join(lines))
)
cases = st.tuples(texts, st.sampled_from([None, None, 3]))


@settings(
    max_examples=12,
    phases=[Phase.explicit, Phase.generate],  # the message names the one text; shrinking starts node each time
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
@given(st.lists(cases, min_size=60, max_size=120))
def test_random_texts_are_read_or_refused_alike(batch: list[Case]) -> None:
    """A batch per process: starting node costs more than all its texts."""
    assert_agreement(batch)
