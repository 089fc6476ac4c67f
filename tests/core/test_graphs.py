"""Recorded scales: what is repeated is what the loop would have computed, for other prompts and seeds too.

No GPU is needed: `Tape` repeats recorded operations over recorded memory, as a CUDA graph does. What CUDA
itself does with graphs is tested in tests/gpu.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import star_core.sampling
from star_core import load
from star_core.generate import generate
from star_core.graphs import CudaRecorder, Pace, Program, Replays, Tape, Tapes, look_at_once
from star_core.kernels import references_only
from star_core.request import KeptTokens, Options, Request, ScaleStep
from star_core.sampling import KeptNoise, PictureSeed, ScaleNoise, keep_top_p
from star_core.schedule import ScaleSchedule
from star_core.text_encoder import TextStates

CPU = torch.device("cpu")
KINDS = ["plain", "smooth", "confidence", "masked", "official"]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filter as a GPU does: the CPU's own way sorts some rows only, and the host has to know which."""
    monkeypatch.setattr(star_core.sampling, "_filtered", keep_top_p)


@pytest.fixture
def replays() -> Replays:
    return Replays(Tapes)


def run(model: object, request: object, replays: Replays | None = None) -> list[ScaleStep]:
    with references_only():  # what a tape records
        return list(generate(model.transformer, model.sampler, model.quantizer, request, CPU, replays))


def assert_same(ours: list[ScaleStep], theirs: list[ScaleStep]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.f_hat, b.f_hat, atol=1e-4, rtol=1e-4)  # smooth drawing sharpens
        assert (a.scale, a.token_map, a.given, a.soft) == (b.scale, b.token_map, b.given, b.soft)


def with_prompt_from(request: Request, scale: int, states: TextStates) -> Request:
    span = dataclasses.replace(request.prompts[0], conditional=states, start=scale)
    return dataclasses.replace(request, prompts=(*request.prompts, span))


def changed(schedule: ScaleSchedule, scale: int, **fields: object) -> ScaleSchedule:
    scales = list(schedule.scales)
    scales[scale] = dataclasses.replace(scales[scale], **fields)
    return dataclasses.replace(schedule, scales=tuple(scales))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[int]]:
    """Count the passes of a model's transformer: the list grows by one for each."""

    def watch(model: object) -> list[int]:
        seen, features = [], model.transformer.features

        def counted(*arguments: object, **options: object) -> Tensor:
            seen.append(1)
            return features(*arguments, **options)

        monkeypatch.setattr(model.transformer, "features", counted)
        return seen

    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_scales_are_those_of_the_loop_for_other_prompts_and_seeds(
    tiny: Callable, ask: Callable, make_schedule: Callable, replays: Replays, passes: Callable, kind: str
):
    for cross_attention in ("paired", "independent"):
        model = tiny(cross_attention)
        counted = passes(model)
        schedule = make_schedule(kind)
        for turn, names in enumerate(([1, 2], [3, 4], [5, 6])):
            request = ask(names, schedule, seeds=[PictureSeed(turn), PictureSeed(7 + turn, 1)])
            counted.clear()
            recorded = run(model, request, replays)
            # Twice where it is recorded: once before, once for the recording.
            assert len(counted) == (2 * len(model.maps) if turn == 0 else 0)
            assert_same(recorded, run(model, request))


@pytest.mark.parametrize("kind", ["plain", "official"])
def test_fast_modes_are_repeated_too(
    tiny: Callable, ask: Callable, make_schedule: Callable, replays: Replays, kind: str
):
    model = tiny("independent")
    schedule = changed(make_schedule(kind), 2, prune=0.3)
    schedule = changed(schedule, 3, prune=0.5, unguided=True)
    for seed in range(3):
        request = ask([seed, seed + 1], schedule, seeds=[PictureSeed(seed), PictureSeed(seed, 1)])
        assert_same(run(model, request, replays), run(model, request))


def test_what_was_yielded_is_not_overwritten_by_the_next_picture(
    paired: object, ask: Callable, make_schedule: Callable, replays: Replays
):
    first = run(paired, ask([1], make_schedule("plain")), replays)
    kept = [(step.tokens.clone(), step.f_hat.clone()) for step in first]
    run(paired, ask([2], make_schedule("plain"), seeds=[PictureSeed(9)]), replays)
    for step, (tokens, f_hat) in zip(first, kept, strict=True):
        assert torch.equal(step.tokens, tokens)
        assert torch.equal(step.f_hat, f_hat)


def test_a_map_that_is_full_early_ends_early_when_repeated(
    paired: object, ask: Callable, make_schedule: Callable, replays: Replays, monkeypatch: pytest.MonkeyPatch
):
    # With one picture in a batch the official strategy fills a map before its last step now and then. What a
    # full map would still have drawn is then not repeated: the tape's pieces are counted.
    schedule = make_schedule("official")
    played: list[int] = []
    replay = Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda tape: (played.append(1), replay(tape))[1])
    counts = set()
    for seed in range(12):
        request = ask([1], schedule, seeds=[PictureSeed(seed)])
        played.clear()
        recorded = run(paired, request, replays)
        counts.add(len(played))
        assert_same(recorded, run(paired, request))
    assert len(counts) > 1


def test_a_run_that_was_given_up_is_gone_on_with_by_the_next(
    paired: object, ask: Callable, make_schedule: Callable, replays: Replays, passes: Callable
):
    counted = passes(paired)
    schedule = changed(make_schedule("plain"), 3, prune=0.5)
    steps = generate(paired.transformer, paired.sampler, paired.quantizer, ask([1], schedule), CPU, replays)
    next(steps)
    next(steps)
    steps.close()
    counted.clear()
    request = ask([2], schedule, seeds=[PictureSeed(3)])
    recorded = run(paired, request, replays)
    assert len(counted) == 2 * 2, "the first two scales were there already"
    assert_same(recorded, run(paired, request))


def test_an_error_forgets_what_was_kept_and_the_next_run_is_right(
    paired: object, ask: Callable, make_schedule: Callable, replays: Replays
):
    request = ask([1], make_schedule("plain"))
    steps = generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU, replays)
    next(steps)
    with pytest.raises(RuntimeError, match="broken"):
        steps.throw(RuntimeError("broken"))
    assert not replays._programs
    assert replays._kept is None
    assert_same(run(paired, request, replays), run(paired, request))


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="no tapes in inference mode before torch 2.5")
def test_memory_made_in_inference_mode_is_not_lent_outside_it(
    paired: object, ask: Callable, make_schedule: Callable, replays: Replays
):
    request = ask([1], make_schedule("plain"))
    with torch.inference_mode():
        run(paired, request, replays)
    assert_same(run(paired, request, replays), run(paired, request))


@pytest.mark.parametrize("change", ["batch", "schedule", "weights", "spans"])
def test_another_shape_of_work_is_recorded_anew(
    tiny: Callable,
    ask: Callable,
    texts: Callable,
    make_schedule: Callable,
    replays: Replays,
    passes: Callable,
    change: str,
):
    model = tiny("paired")
    request = ask([1], make_schedule("plain"))
    run(model, request, replays)
    if change == "batch":
        request = ask([1, 2], make_schedule("plain"))
    elif change == "schedule":
        request = ask([1], make_schedule("plain", guidance=2.0))
    elif change == "weights":
        weight = -model.transformer.head.weight
        model.transformer.head.weight = torch.nn.Parameter(weight, requires_grad=False)
    else:
        request = with_prompt_from(request, 2, texts(3))
    counted = passes(model)
    recorded = run(model, request, replays)
    assert len(counted) == 2 * len(model.maps)
    assert_same(recorded, run(model, request))


def test_a_prompt_that_changes_on_the_way_is_repeated(
    tiny: Callable, ask: Callable, texts: Callable, make_schedule: Callable, replays: Replays
):
    for cross_attention in ("paired", "independent"):
        model = tiny(cross_attention)
        schedule = changed(make_schedule("plain"), 3, unguided=True)
        for seed, (first, second) in enumerate([(1, 2), (3, 4)]):
            request = ask([first], schedule, seeds=[PictureSeed(seed)])
            request = with_prompt_from(request, 3, texts(second))
            assert_same(run(model, request, replays), run(model, request))


def test_given_and_kept_tokens_are_drawn_without_recordings(
    paired: object, ask: Callable, make_schedule: Callable, replays: Replays
):
    schedule = make_schedule("plain")
    whole = run(paired, ask([1], schedule))
    prefixed = dataclasses.replace(ask([1], schedule), prefix=tuple(whole[:2]))
    masks = tuple(torch.arange(h * w).unsqueeze(0) % 2 == 0 for h, w in paired.maps)
    kept = KeptTokens(tuple(step.tokens for step in whole), masks)
    for request in (prefixed, dataclasses.replace(ask([1], schedule), kept=kept)):
        assert_same(run(paired, request, replays), run(paired, request))
        assert not replays._programs


def test_two_runs_at_once_do_not_share_memory(
    paired: object, ask: Callable, make_schedule: Callable, replays: Replays
):
    requests = [ask([name], make_schedule("plain"), seeds=[PictureSeed(name)]) for name in (1, 2)]
    running: list[Iterator[ScaleStep]] = [
        generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU, replays)
        for request in requests
    ]
    pairs = list(zip(*running, strict=True))
    for number, request in enumerate(requests):
        assert_same([pair[number] for pair in pairs], run(paired, request))


# The tape itself.


def test_a_tape_repeats_work_over_the_recorded_memory():
    x = torch.arange(6.0)
    total = torch.zeros(())
    with Tape() as tape:
        y = (x.view(2, 3) * 2).sum(dim=1)
        total.add_(y.sum())
    assert y.tolist() == [6, 24]
    x.copy_(torch.ones(6))
    tape.replay()
    assert y.tolist() == [6, 6]
    assert total.item() == 30 + 12


@pytest.mark.parametrize(
    "asking",
    [
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.__setitem__(x > 1, torch.zeros(1)),
        lambda x: torch.rand(3),
    ],
    ids=["a value", "places", "a selection", "a selection's change", "chance"],
)
def test_a_tape_refuses_what_no_graph_can_hold(asking: Callable):
    with pytest.raises(RuntimeError, match="graph"), Tape():
        asking(torch.arange(3.0))


def test_a_program_stops_where_a_flag_is_up_and_does_its_last_piece():
    x, total, after = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def work(look: Callable) -> Tensor:
        total.zero_()
        for _ in range(4):
            total.add_(x)
            if look(total >= 5):
                break
        look(None)
        after.copy_(total)
        return after

    program = Program(Tapes(CPU), work)
    for value, expected in ((1, 4), (2, 6), (5, 5)):
        x.fill_(value)
        assert program.replay().item() == expected == work(look_at_once).item()


# Chance and pace.


def test_kept_noise_is_that_of_the_loop_in_the_same_memory():
    noise = KeptNoise([PictureSeed(1)], 2, CPU)
    first = [noise.uniform(4), noise.gumbel(2, 3), noise.uniform(2)]
    noise.renew([PictureSeed(8, 1)])
    noise.rewind()
    again = [noise.uniform(4), noise.gumbel(2, 3), noise.uniform(2)]
    wanted = ScaleNoise([PictureSeed(8, 1)], 2, CPU)
    for held, kept, number in zip(
        first, again, (wanted.uniform(4), wanted.gumbel(2, 3), wanted.uniform(2)), strict=True
    ):
        assert held is kept
        assert torch.equal(kept, number)
    noise.rewind()
    with pytest.raises(AssertionError, match="same numbers"):
        noise.uniform(5)


def test_the_host_is_one_scale_ahead_of_a_gpu_at_most(monkeypatch: pytest.MonkeyPatch):
    done: list[int] = []

    class Event:
        made = 0

        def __init__(self) -> None:
            self.number = Event.made
            Event.made += 1

        def record(self, stream: str) -> None:
            assert stream == "of cuda:1"

        def synchronize(self) -> None:
            done.append(self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    pace = Pace(torch.device("cuda:1"))
    for scale in range(5):
        pace.before_scale()
        # Before scale s is handed over, scale s - 2 is waited for: the device has s - 1 to do meanwhile.
        assert done == list(range(max(0, scale - 1)))
        pace.after_scale()


def test_a_cpu_is_never_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda: pytest.fail("no events without a GPU"))
    pace = Pace(CPU)
    for _ in range(3):
        pace.before_scale()
        pace.after_scale()


# The public face.


def test_a_star_repeats_scales_and_refuses_to_where_there_is_no_gpu(passes: Callable):
    with pytest.raises(
        ValueError, match="graphs are CUDA's, this model is on cpu: leave them out, or use a GPU"
    ):
        load(graphs=True)
    star, plain = load(), load()
    star.replays = Replays(Tapes)
    counted = passes(star)
    schedule = "top_k 600; top_p 0.8; guidance ramp 4; steps 0*4 3 0*5; transformer_steps 1; strategy official"
    for seed, prompt in enumerate(("a red apple", "cat")):
        counted.clear()
        # Without the four largest maps: they are most of the time, and nothing new.
        options = Options(seed=seed, schedule=schedule, stop=6)
        ours, theirs = (model.draw([prompt], options=options) for model in (star, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        assert bool(counted) == (seed == 0)


def test_a_recorded_text_encoder_gives_the_states_of_any_prompts(replays: Replays):
    encoder = load().text_encoder
    for prompts in (["cat"], ["a red apple on a tree"], [""], ["heart", "a"], ["two words", ""]):
        ours, theirs = encoder.encode(prompts, replays), encoder.encode(prompts)
        assert torch.equal(ours.mask, theirs.mask)
        torch.testing.assert_close(ours.hidden, theirs.hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.pooled, theirs.pooled, atol=1e-5, rtol=1e-5)


def test_a_text_encoder_that_cannot_be_recorded_is_launched_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    star = load()
    plain = star.encode_text(["cat"])
    star.text_replays = Replays(Tapes)
    whole = star.text_encoder._whole
    monkeypatch.setattr(star.text_encoder, "_whole", lambda ids, mask: (bool(mask.all()), whole(ids, mask))[1])
    found = star.encode_text(["cat"])
    assert torch.equal(found.hidden, plain.hidden)
    assert "cannot be recorded" in caplog.text
    assert star.text_replays is None


class Stream:
    """Stands in for a CUDA stream."""

    def __init__(self, *_: object) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)


def test_work_that_breaks_off_is_waited_for_as_any_other(monkeypatch: pytest.MonkeyPatch):
    here = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(KeyboardInterrupt), recorder.ready():
        raise KeyboardInterrupt
    assert recorder._stream.waits == [here]
    assert here.waits == [recorder._stream], "its kernels may still write to memory that is given away now"
