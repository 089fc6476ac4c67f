"""The loop over scales: rows, seeds, restarts, kept tokens, and what is left when it stops."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import star_core.causal_sampler as causal_sampler_module
import star_core.generate as generate_module
from star_core.attention import LayerCache
from star_core.canvas import Canvas
from star_core.causal_sampler import sampler_logits
from star_core.config import maps_for_size, token_count
from star_core.generate import generate
from star_core.request import KeptTokens, Options, PromptSpan, ScaleStep
from star_core.sampling import Draw, PictureSeed, draw, smooth_weights
from star_core.schedule import ScalePolicy, ScaleSchedule
from star_core.star import Star
from star_core.text_encoder import TextStates

CPU = torch.device("cpu")
SCALES = 4
LOGITS_TOLERANCE = 1e-4


def row_of(states: TextStates, row: int) -> TextStates:
    one = slice(row, row + 1)
    return TextStates(states.hidden[one], states.mask[one], states.pooled[one])


def same_tokens(ours: list[ScaleStep], theirs: list[ScaleStep], our_row: int = 0, their_row: int = 0) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a.tokens[our_row], b.tokens[their_row]) for a, b in pairs)


def step_row(step: ScaleStep, row: int) -> ScaleStep:
    one = slice(row, row + 1)
    return dataclasses.replace(step, tokens=step.tokens[one], f_hat=step.f_hat[one])


# Cached and uncached.


@pytest.mark.parametrize("maps", [None, ((1, 2), (2, 3), (3, 3), (3, 7))], ids=["rectangles", "wide start"])
def test_the_loops_features_equal_one_uncached_pass_over_its_tokens(
    tiny: Callable,
    ask: Callable,
    texts: Callable,
    make_schedule: Callable,
    monkeypatch: pytest.MonkeyPatch,
    maps: tuple | None,
):
    for cross_attention in ("paired", "independent"):
        model = tiny(cross_attention, **({"maps": maps} if maps else {}))
        transformer, seen = model.transformer, []
        features = transformer.features

        def recorded(
            *args: object, features: Callable = features, seen: list = seen, **options: object
        ) -> Tensor:
            seen.append(features(*args, **options))
            return seen[-1]

        monkeypatch.setattr(transformer, "features", recorded)
        steps = model.run(ask([1, 2], make_schedule("plain"), maps=model.maps))
        cached = torch.cat(seen, dim=1)
        monkeypatch.undo()
        conditional, away = texts(1, 2), texts(99, 99)
        rows = [conditional] if cross_attention == "paired" else [conditional, away]
        keys = transformer.text_keys(torch.cat([t.hidden for t in rows]), torch.cat([t.mask for t in rows]))
        pooled = torch.cat([conditional.pooled, away.pooled])
        inputs = model.quantizer.teacher_inputs([s.tokens for s in steps], model.maps).repeat(2, 1, 1)
        uncached = transformer(inputs, pooled, keys, model.maps)
        assert cached.shape == (4, token_count(model.maps), 64)
        torch.testing.assert_close(cached, uncached, atol=5e-5, rtol=1e-4)


def test_f_hat_is_what_the_tokens_build_unless_they_were_drawn_softly(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    steps = model.run(ask([1, 2], schedule))
    rebuilt = model.quantizer.f_hats([s.tokens for s in steps], model.maps)
    for step, f_hat in zip(steps, rebuilt, strict=True):
        assert step.token_map == model.maps[step.scale]
        assert step.tokens.shape == (2, step.token_map[0] * step.token_map[1])
        assert step.tokens.dtype == torch.int64
        assert step.f_hat.shape == (2, 8, 4, 6)
        assert step.f_hat.dtype == torch.float32
        assert not step.given
        if step.soft:
            assert (step.f_hat - f_hat).abs().max() > 1e-3
        else:
            torch.testing.assert_close(step.f_hat, f_hat, atol=1e-5, rtol=1e-5)
    assert [s.scale for s in steps] == [0, 1, 2, 3]


# What was drawn from, recorded in order.


@dataclass(frozen=True)
class Recorded:
    """One draw of a batch: logits (B, n, V), the numbers that decided, and the tokens."""

    logits: Tensor
    numbers: Tensor
    tokens: Tensor
    top_k: int = 0
    top_p: float = 0.0
    temperature: float = 1.0


@pytest.fixture
def drawn_from(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Return a list that fills with every draw while pictures are made."""
    records: list[Recorded] = []

    def recording_draw(logits: Tensor, uniform: Tensor, **options: object) -> Draw:
        result = draw(logits, uniform, **options)
        records.append(Recorded(logits, uniform, result.tokens, **options))
        return result

    def recording_smooth(logits: Tensor, gumbel: Tensor, ratio: float) -> Tensor:
        weights = smooth_weights(logits, gumbel, ratio)
        records.append(Recorded(logits * (1 + ratio), gumbel, weights.argmax(dim=-1)))
        return weights

    monkeypatch.setattr(generate_module, "draw", recording_draw)
    monkeypatch.setattr(causal_sampler_module, "draw", recording_draw)
    monkeypatch.setattr(generate_module, "smooth_weights", recording_smooth)
    return records


def take(records: list[Recorded]) -> list[Recorded]:
    taken = list(records)
    records.clear()
    return taken


def test_logits_of_a_batch_are_within_1e_4_of_its_singles_on_the_same_tokens(
    model: object, ask: Callable, schedule: ScaleSchedule, drawn_from: list
):
    names, seeds = [1, 2, 3], [PictureSeed(5, i) for i in range(3)]
    request = ask(names, schedule, seeds=seeds)
    steps: list[ScaleStep] = []
    for step in generate(model.transformer, model.sampler, model.quantizer, request, CPU):
        together = take(drawn_from)
        for row, name in enumerate(names):
            prefix = tuple(step_row(earlier, row) for earlier in steps)
            single = ask([name], schedule, seeds=[seeds[row]], prefix=prefix, stop=step.scale + 1)
            model.run(single)
            alone = take(drawn_from)
            assert 1 <= len(alone) <= len(together)
            for ours, theirs in zip(together, alone, strict=False):
                distance = (ours.logits[row] - theirs.logits[0]).abs().max()
                assert distance < LOGITS_TOLERANCE, f"scale {step.scale}, picture {row}"
        steps.append(step)
    assert len(steps) == SCALES


def margins(record: Recorded, row: int) -> Tensor:
    """Return, per position, how far a row's draw was from another token: 0 is a tie.

    The least of: the gap at top-k's and at top-p's edge, and the distance of the number from the nearest
    step of the cumulative distribution; for a smooth draw the gap between the best two.
    """
    logits, numbers = record.logits[row] / record.temperature, record.numbers[row]
    if numbers.shape == logits.shape:
        best = (logits + numbers).topk(2, dim=-1).values
        return best[:, 0] - best[:, 1]
    gaps = [torch.full(numbers.shape, torch.inf)]
    if 0 < record.top_k < logits.shape[-1]:
        best = logits.topk(record.top_k + 1, dim=-1).values
        gaps.append(best[:, -2] - best[:, -1])
        logits = logits.masked_fill(logits < best[:, -2:-1], -torch.inf)
    if record.top_p > 0:
        ascending, order = logits.sort(dim=-1)
        reached = ascending.softmax(dim=-1).cumsum(dim=-1)
        gaps.append((reached[:, :-1] - (1 - record.top_p)).abs().amin(dim=-1))
        dropped = (reached <= 1 - record.top_p).scatter(-1, order, reached <= 1 - record.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    gaps.append((cumulative - numbers.unsqueeze(-1)).abs().amin(dim=-1))
    return torch.stack(gaps).amin(dim=0)


def test_a_near_tie_is_recognised_and_a_clear_draw_is_not():
    logits = torch.tensor([[[2.0, 1.0, 0.0]]])
    edge = logits.softmax(-1).cumsum(-1)[0, 0, 0].item()
    for number, near in ((edge, True), (edge - 0.05, False), (edge + 0.05, False)):
        record = Recorded(logits, torch.tensor([[number]]), torch.zeros(1, 1, dtype=torch.long))
        assert (margins(record, 0) < LOGITS_TOLERANCE).item() is near
    tied = torch.tensor([[[2.0, 1.0, 1.0 + 1e-6]]])
    record = Recorded(tied, torch.tensor([[0.2]]), torch.zeros(1, 1, dtype=torch.long), top_k=2)
    assert margins(record, 0).item() < LOGITS_TOLERANCE


def show_equal_or_near_tie(
    batch: list[ScaleStep], row: int, single: list[ScaleStep], ours: list[Recorded], theirs: list[Recorded]
) -> None:
    """Assert that a picture's tokens are equal alone and in a batch, or that a near-tie parted them."""
    if same_tokens(batch, single, row, 0):
        return
    for in_batch, alone in zip(ours, theirs, strict=False):
        differ = in_batch.tokens[row] != alone.tokens[0]
        if differ.any():
            least = margins(alone, 0)[differ].min()
            assert least < 10 * LOGITS_TOLERANCE, f"parted by {least}, which is no tie"
            return
    raise AssertionError("all draws are equal and the pictures are not")


def test_the_loop_asks_the_sampler_with_position_0_its_own_scale_and_constant_guidance(
    paired: object, ask: Callable, texts: Callable, make_schedule: Callable, drawn_from: list
):
    schedule = dataclasses.replace(make_schedule("masked"), sampler_guidance=2.5)
    steps = paired.run(ask([1, 2], schedule))
    first_of_last_scale = [r for r in take(drawn_from) if r.logits.shape[1] == 24][0]
    transformer, pooled = paired.transformer, torch.cat([texts(1, 2).pooled, texts(99, 99).pooled])
    inputs = paired.quantizer.teacher_inputs([s.tokens for s in steps], paired.maps).repeat(2, 1, 1)
    keys = transformer.text_keys(texts(1, 2).hidden, texts(1, 2).mask)
    features = transformer(inputs, pooled, keys, paired.maps)[:, -24:]
    rotation = transformer.rotations(paired.maps).select(torch.tensor([0, *range(19, 43)]))
    expected = sampler_logits(
        paired.sampler, torch.zeros(2, 24, 8), features, pooled, SCALES - 1, rotation, 2.5
    )
    torch.testing.assert_close(first_of_last_scale.logits, expected, atol=5e-4, rtol=1e-4)


def test_free_running_pictures_of_a_batch_are_their_singles(
    model: object, ask: Callable, schedule: ScaleSchedule, drawn_from: list
):
    names, seeds = [1, 2, 3, 1], [PictureSeed(5), PictureSeed(5), PictureSeed(8, 2), PictureSeed(5, 1)]
    batch = model.run(ask(names, schedule, seeds=seeds))
    ours = take(drawn_from)
    for row, (name, seed) in enumerate(zip(names, seeds, strict=True)):
        single = model.run(ask([name], schedule, seeds=[seed]))
        show_equal_or_near_tie(batch, row, single, ours, take(drawn_from))


def test_changing_one_prompt_never_changes_another_picture(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    before, after = model.run(ask([1, 2], schedule)), model.run(ask([1, 3], schedule))
    assert same_tokens(before, after, 0, 0)
    assert not same_tokens(before, after, 1, 1)
    torch.testing.assert_close(before[-1].f_hat[0], after[-1].f_hat[0], atol=1e-5, rtol=1e-5)


def test_a_negative_prompt_changes_its_own_picture_alone(
    model: object, ask: Callable, texts: Callable, schedule: ScaleSchedule
):
    before = model.run(ask([1, 2], schedule, unconditional=texts(99, 99)))
    after = model.run(ask([1, 2], schedule, unconditional=texts(99, 50)))
    assert same_tokens(before, after, 0, 0)
    assert not same_tokens(before, after, 1, 1)


def test_a_picture_depends_on_prompt_seed_and_index_wherever_it_stands(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    pictures = [(1, PictureSeed(5)), (2, PictureSeed(5)), (1, PictureSeed(5, 1)), (2, PictureSeed(6))]
    names, seeds = zip(*pictures, strict=True)
    batch = model.run(ask(names, schedule, seeds=seeds))
    order = [3, 0, 2, 1]
    moved = model.run(ask([names[i] for i in order], schedule, seeds=[seeds[i] for i in order]))
    for there, here in enumerate(order):
        assert same_tokens(batch, moved, here, there)
    beside_others = model.run(ask([7, 1], schedule, seeds=[PictureSeed(9, 3), PictureSeed(5, 1)]))
    assert same_tokens(batch, beside_others, 2, 1)


def test_the_same_seed_draws_the_same_tokens_and_another_others(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    first = model.run(ask([1], schedule, seeds=[PictureSeed(5)]))
    again = model.run(ask([1], schedule, seeds=[PictureSeed(5)]))
    assert same_tokens(first, again)
    assert torch.equal(first[-1].f_hat, again[-1].f_hat)
    assert not same_tokens(first, model.run(ask([1], schedule, seeds=[PictureSeed(6)])))
    assert not same_tokens(first, model.run(ask([1], schedule, seeds=[PictureSeed(5, 1)])))


def test_one_batch_with_equal_pictures_draws_them_equal(model: object, ask: Callable, schedule: ScaleSchedule):
    steps = model.run(ask([1, 2, 1], schedule))
    assert same_tokens(steps, steps, 0, 2)
    assert not same_tokens(steps, steps, 0, 1)


# Restarts, swaps, stops.


@pytest.mark.parametrize("start", [1, 3, SCALES])
def test_resuming_at_a_scale_equals_the_full_run(
    model: object, ask: Callable, schedule: ScaleSchedule, start: int
):
    full = model.run(ask([1, 2], schedule))
    resumed = model.run(ask([1, 2], schedule, prefix=tuple(full[:start])))
    assert [s.given for s in resumed] == [scale < start for scale in range(SCALES)]
    assert [s.soft for s in resumed] == [s.soft for s in full]
    for ours, theirs in zip(resumed, full, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.f_hat, theirs.f_hat)


def test_resuming_with_another_seed_varies_only_the_scales_that_are_drawn(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    full = model.run(ask([1], schedule))
    varied = model.run(ask([1], schedule, seeds=[PictureSeed(77)], prefix=tuple(full[:2])))
    assert same_tokens(full[:2], varied[:2])
    assert not same_tokens(full[2:], varied[2:])


@pytest.mark.parametrize("swap", [1, 3])
def test_a_prompt_swapped_from_a_scale_on_changes_only_scales_from_there(
    model: object, ask: Callable, texts: Callable, schedule: ScaleSchedule, swap: int
):
    request = ask([1, 2], schedule)
    full = model.run(request)
    away = request.prompts[0].unconditional
    spans = (*request.prompts, PromptSpan(texts(1, 4), away, start=swap))
    swapped = model.run(dataclasses.replace(request, prompts=spans))
    assert same_tokens(full[:swap], swapped[:swap], 1, 1)
    assert not same_tokens(full[swap:], swapped[swap:], 1, 1)
    assert same_tokens(full, swapped, 0, 0), "the other picture kept its prompt"
    resumed = model.run(dataclasses.replace(request, prompts=spans, prefix=tuple(full[:swap])))
    assert same_tokens(resumed, swapped, 1, 1)


def test_a_span_of_the_same_prompt_changes_nothing(model: object, ask: Callable, schedule: ScaleSchedule):
    request = ask([1, 2], schedule)
    again = dataclasses.replace(request.prompts[0], start=2)
    repeated = model.run(dataclasses.replace(request, prompts=(*request.prompts, again)))
    assert same_tokens(model.run(request), repeated, 1, 1)


@pytest.mark.parametrize("stop", [1, 3])
def test_stopping_early_draws_the_same_first_scales(
    model: object, ask: Callable, schedule: ScaleSchedule, stop: int
):
    full = model.run(ask([1, 2], schedule))
    stopped = model.run(ask([1, 2], schedule, stop=stop))
    assert len(stopped) == stop
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(stopped, full, strict=False))
    assert torch.equal(stopped[-1].f_hat, full[stop - 1].f_hat)


def test_whoever_stops_iterating_stops_the_work(
    paired: object, ask: Callable, make_schedule: Callable, monkeypatch: pytest.MonkeyPatch
):
    looked = []
    features = paired.transformer.features
    monkeypatch.setattr(paired.transformer, "features", lambda *a, **o: looked.append(1) or features(*a, **o))
    request = ask([1], make_schedule("plain"))
    steps = generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU)
    assert not looked
    next(steps)
    assert len(looked) == 1
    next(steps)
    steps.close()
    assert len(looked) == 2


# Kept tokens.


def some_kept(tokens: Callable, maps: tuple, seed: int = 0) -> KeptTokens:
    """Return random tokens to keep for three pictures: some, all, none."""
    generator = torch.Generator().manual_seed(seed)
    masks = tuple(
        torch.stack(
            [
                torch.rand(h * w, generator=generator) < 0.5,
                torch.ones(h * w, dtype=torch.bool),
                torch.zeros(h * w, dtype=torch.bool),
            ]
        )
        for h, w in maps
    )
    return KeptTokens(tokens(maps, 3, seed), masks)


def test_kept_tokens_are_equal_at_every_scale(
    model: object, ask: Callable, tokens: Callable, schedule: ScaleSchedule
):
    kept = some_kept(tokens, model.maps)
    steps = model.run(ask([1, 2, 3], schedule, kept=kept))
    for step, wanted, mask in zip(steps, kept.tokens, kept.masks, strict=True):
        assert torch.equal(step.tokens[mask], wanted[mask])
    # The picture that keeps everything is the picture of those tokens, however it is drawn.
    whole = model.quantizer.f_hats(kept.tokens, model.maps)[-1]
    torch.testing.assert_close(steps[-1].f_hat[1], whole[1], atol=1e-5, rtol=1e-5)
    free = model.run(ask([1, 2, 3], schedule))
    assert same_tokens(steps, free, 2, 2), "a picture that keeps nothing is drawn freely"
    assert not same_tokens(steps, free, 0, 0)


def test_what_stands_under_an_open_mask_is_never_read(
    model: object, ask: Callable, tokens: Callable, schedule: ScaleSchedule
):
    kept = some_kept(tokens, model.maps)
    other = tuple(
        torch.where(mask, ours, theirs)
        for mask, ours, theirs in zip(kept.masks, kept.tokens, tokens(model.maps, 3, 9), strict=True)
    )
    first = model.run(ask([1, 2, 3], schedule, kept=kept))
    second = model.run(ask([1, 2, 3], schedule, kept=KeptTokens(other, kept.masks)))
    assert all(same_tokens(first, second, row, row) for row in range(3))


def test_kept_tokens_are_seen_by_what_is_drawn_around_them(
    model: object, ask: Callable, tokens: Callable, schedule: ScaleSchedule
):
    kept = some_kept(tokens, model.maps)
    others = KeptTokens(tokens(model.maps, 3, 9), kept.masks)
    first = model.run(ask([1, 2, 3], schedule, kept=kept))
    second = model.run(ask([1, 2, 3], schedule, kept=others))
    drawn = ~kept.masks[3][0]
    assert not torch.equal(first[3].tokens[0][drawn], second[3].tokens[0][drawn])


def test_keeping_a_pictures_own_tokens_draws_that_picture_again(
    model: object, ask: Callable, make_schedule: Callable
):
    request = ask([1, 2], make_schedule("plain"))
    full = model.run(request)
    masks = tuple(torch.rand(s.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for s in full)
    kept = KeptTokens(tuple(s.tokens for s in full), masks)
    again = model.run(dataclasses.replace(request, kept=kept))
    assert all(same_tokens(full, again, row, row) for row in range(2))


# Guidance.


@pytest.fixture
def row_counts(paired: object, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that fills with the rows of every pass of the paired model."""
    counts: list[int] = []
    features = paired.transformer.features

    def counted(x: Tensor, *args: object, **options: object) -> Tensor:
        counts.append(x.shape[0])
        return features(x, *args, **options)

    monkeypatch.setattr(paired.transformer, "features", counted)
    return counts


def unreadable(count: int) -> TextStates:
    """Return texts that would ruin every number they touched."""
    hidden = torch.full((count, 7, 16), torch.nan)
    return TextStates(hidden, torch.ones(count, 7, dtype=torch.bool), torch.full((count, 16), torch.nan))


@pytest.mark.parametrize("pictures", [[3, 3], [1, 3]], ids=["as long", "of two lengths"])
def test_the_loop_never_reads_the_padding_of_a_text(
    model: object, ask: Callable, schedule: ScaleSchedule, pictures: list
):
    request = ask(pictures, schedule)
    (span,) = request.prompts
    spoilt = span.conditional.hidden.masked_fill(~span.conditional.mask.unsqueeze(-1), 1e4)
    text = dataclasses.replace(span, conditional=dataclasses.replace(span.conditional, hidden=spoilt))
    assert same_tokens(model.run(request), model.run(dataclasses.replace(request, prompts=(text,))))


@pytest.mark.parametrize("kind", ["plain", "smooth", "official", "masked"])
def test_without_guidance_no_unconditional_row_is_computed(
    paired: object, ask: Callable, make_schedule: Callable, row_counts: list, kind: str
):
    schedule = make_schedule(kind, guidance=0.0)
    steps = paired.run(ask([1, 2], schedule, unconditional=unreadable(2)))
    assert row_counts == [2] * SCALES
    assert torch.isfinite(steps[-1].f_hat).all()


@pytest.mark.parametrize("kind", ["plain", "smooth", "official", "masked"])
def test_without_guidance_a_picture_is_the_conditional_one(
    model: object, ask: Callable, make_schedule: Callable, kind: str
):
    nothing = make_schedule(kind, guidance=0.0)
    conditional = model.run(ask([1, 2], nothing))
    # The twins are computed here, for one scale's sake, and lead nowhere: guided by a hair's breadth.
    hair = dataclasses.replace(nothing.scales[0], guidance=1e-12)
    with_twins = dataclasses.replace(nothing, scales=(hair, *nothing.scales[1:]))
    beside = model.run(ask([1, 2], with_twins))
    assert all(same_tokens(conditional, beside, row, row) for row in range(2))


def test_guidance_computes_one_twin_per_picture_and_moves_the_picture(
    paired: object, ask: Callable, make_schedule: Callable, row_counts: list
):
    guided = paired.run(ask([1, 2], make_schedule("plain")))
    assert row_counts == [4] * SCALES
    assert not same_tokens(guided, paired.run(ask([1, 2], make_schedule("plain", guidance=0.0))))


def test_the_samplers_own_guidance_needs_the_twins_too(
    paired: object, ask: Callable, make_schedule: Callable, row_counts: list
):
    schedule = dataclasses.replace(make_schedule("masked", guidance=0.0), sampler_guidance=3.0)
    guided = paired.run(ask([1, 2], schedule))
    assert row_counts == [4] * SCALES
    row_counts.clear()
    free = paired.run(ask([1, 2], dataclasses.replace(schedule, sampler_guidance=0.0)))
    assert row_counts == [2] * SCALES
    assert same_tokens(guided[:2], free[:2])
    assert not same_tokens(guided[2:], free[2:])


def test_logits_are_guided_by_each_scales_own_strength(
    model: object, ask: Callable, texts: Callable, make_schedule: Callable, drawn_from: list
):
    schedule = make_schedule("plain")
    full = model.run(ask([1], schedule))
    guided = take(drawn_from)
    for scale in range(SCALES):
        prefix = tuple(full[:scale])

        def at(strength: float, scale: int = scale, prefix: tuple = prefix) -> Tensor:
            policies = tuple(dataclasses.replace(p, guidance=strength) for p in schedule.scales)
            changed = dataclasses.replace(schedule, scales=policies)
            model.run(ask([1], changed, prefix=prefix, stop=scale + 1))
            return take(drawn_from)[-1].logits

        conditional, unconditional = at(0.0), at(-1.0)
        strength = schedule.scales[scale].guidance
        expected = (1 + strength) * conditional - strength * unconditional
        torch.testing.assert_close(guided[scale].logits, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "smooth", "official", "masked"])
def test_a_paired_negative_prompt_acts_through_its_pooled_state_alone(
    paired: object, ask: Callable, texts: Callable, make_schedule: Callable, kind: str
):
    schedule = make_schedule(kind)
    away, other = texts(99, 99), texts(50, 50)
    expected = paired.run(ask([1, 2], schedule, unconditional=away))
    states = TextStates(other.hidden, other.mask, away.pooled)
    same = paired.run(ask([1, 2], schedule, unconditional=states))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(expected, same, strict=True))
    assert torch.equal(expected[-1].f_hat, same[-1].f_hat)
    states = TextStates(away.hidden, away.mask, other.pooled)
    moved = paired.run(ask([1, 2], schedule, unconditional=states))
    assert not same_tokens(expected, moved)


def test_an_independent_negative_prompt_is_read_whole(
    tiny: Callable, ask: Callable, texts: Callable, make_schedule: Callable
):
    model = tiny("independent")
    away, other = texts(99), texts(50)
    expected = model.run(ask([1], make_schedule("plain"), unconditional=away))
    states = TextStates(other.hidden, other.mask, away.pooled)
    assert not same_tokens(expected, model.run(ask([1], make_schedule("plain"), unconditional=states)))


def test_paired_and_independent_agree_without_twins(tiny: Callable, ask: Callable, make_schedule: Callable):
    request = ask([1, 2], make_schedule("plain", guidance=0.0))
    assert same_tokens(tiny("paired").run(request), tiny("independent").run(request))


# What is left behind.


@pytest.fixture
def caches(paired: object, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Return a list that fills with weak references to every key-value cache."""
    made: list[weakref.ref] = []
    new_cache = paired.transformer.new_cache

    def watched(*args: object) -> object:
        cache = new_cache(*args)
        made.append(weakref.ref(cache))
        made.extend(weakref.ref(layer.keys) for layer in cache.layers)
        return cache

    monkeypatch.setattr(paired.transformer, "new_cache", watched)
    return made


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Make sure that memory goes at once, not when the collector comes by."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["plain", "smooth", "official"])
def test_a_finished_picture_leaves_no_cache(
    paired: object, ask: Callable, make_schedule: Callable, caches: list, kind: str
):
    with without_garbage_collection():
        steps = paired.run(ask([1], make_schedule(kind)))
        assert len(caches) == 3
        assert not any(cache() is not None for cache in caches)
    assert len(steps) == SCALES


@pytest.mark.parametrize("kind", ["plain", "smooth", "official"])
def test_closing_the_generator_leaves_no_cache(
    paired: object, ask: Callable, make_schedule: Callable, caches: list, kind: str
):
    with without_garbage_collection():
        request = ask([1], make_schedule(kind))
        steps = generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU)
        for _ in range(3):
            next(steps)
        assert all(cache() is not None for cache in caches)
        steps.close()
        assert not any(cache() is not None for cache in caches)


def test_forgetting_the_generator_leaves_no_cache(
    paired: object, ask: Callable, make_schedule: Callable, caches: list
):
    with without_garbage_collection():
        request = ask([1], make_schedule("plain"))
        steps = generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU)
        next(steps)
        del steps
        assert not any(cache() is not None for cache in caches)


def test_an_exception_thrown_into_the_generator_leaves_no_cache(
    paired: object, ask: Callable, make_schedule: Callable, caches: list
):
    with without_garbage_collection():
        request = ask([1], make_schedule("plain"))
        steps = generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU)
        next(steps)
        with contextlib.suppress(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt())
        assert not any(cache() is not None for cache in caches)
        assert next(steps, None) is None


@pytest.mark.parametrize("kind", ["plain", "smooth", "official"])
def test_an_exception_inside_a_scale_leaves_no_cache(
    paired: object,
    ask: Callable,
    make_schedule: Callable,
    caches: list,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    class OutOfMemoryError(Exception):
        pass

    calls = []

    def failing(*args: object) -> Tensor:
        calls.append(1)
        raise OutOfMemoryError

    # The causal sampler fails in the middle of its steps, the others when their codes are looked up.
    if kind == "official":
        monkeypatch.setattr(paired.sampler, "forward", failing)
    else:
        monkeypatch.setattr(paired.quantizer, "contribution", failing)
    with without_garbage_collection():
        request = ask([1], make_schedule(kind))
        steps = generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU)
        with contextlib.suppress(OutOfMemoryError):
            list(steps)
        assert calls
        assert caches
        assert not any(cache() is not None for cache in caches)


def test_drawing_changes_neither_the_model_nor_the_request_nor_the_process(
    model: object, ask: Callable, tokens: Callable, schedule: ScaleSchedule
):
    kept = some_kept(tokens, model.maps)
    first = tuple(model.run(ask([1, 2, 3], schedule, stop=1)))
    request = ask([1, 2, 3], schedule, kept=kept, prefix=first)
    before = copy.deepcopy(request)
    parts = (model.transformer, model.sampler, model.vqvae)
    weights = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    random_state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    for _ in generate(model.transformer, model.sampler, model.quantizer, request, CPU):
        assert torch.is_grad_enabled(), "the loop's no_grad leaked out of a step"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_default_dtype() == dtype
    for part, kept_weights in zip(parts, weights, strict=True):
        assert not part.training
        assert all(torch.equal(value, kept_weights[name]) for name, value in part.state_dict().items())
    for ours, theirs in ((request.kept.tokens, before.kept.tokens), (request.kept.masks, before.kept.masks)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(request.prefix[0].f_hat, before.prefix[0].f_hat)
    assert torch.equal(request.prompts[0].conditional.hidden, before.prompts[0].conditional.hidden)


def test_no_gradient_is_kept_even_where_weights_want_one(
    paired: object, ask: Callable, schedule: ScaleSchedule
):
    model = copy.deepcopy(paired)
    for part in (model.transformer, model.sampler, model.vqvae):
        part.requires_grad_(True)
    for step in model.run(ask([1], schedule)):
        assert not step.f_hat.requires_grad


def test_f_hat_stays_float32_when_the_model_runs_in_bfloat16(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    coarse = copy.deepcopy(model)
    for part in (coarse.transformer, coarse.sampler, coarse.vqvae):
        part.bfloat16()
    steps = coarse.run(ask([1, 2], schedule))
    assert {s.f_hat.dtype for s in steps} == {torch.float32}
    assert torch.isfinite(steps[-1].f_hat).all()


def test_in_float16_texts_of_unequal_length_are_drawn_as_in_float32(model: object, ask: Callable):
    # Padding has keys of length 0, and the least length that is divided by is 0 in float16.
    coarse = copy.deepcopy(model)
    for part in (coarse.transformer, coarse.sampler):
        part.half()
    asked = ask([1, 4], ScaleSchedule((ScalePolicy(top_k=24, guidance=1.0),) * SCALES))
    (span,) = asked.prompts
    assert len({int(mask.sum()) for mask in span.conditional.mask}) == 2
    # As a text encoder's states are.
    bare = [
        dataclasses.replace(t, hidden=t.hidden * t.mask[..., None])
        for t in (span.conditional, span.unconditional)
    ]
    asked = dataclasses.replace(asked, prompts=(PromptSpan(*bare),))
    pairs = list(zip(model.run(asked), coarse.run(asked), strict=True))
    equal = [(a.tokens == b.tokens).float().mean(dim=1).min() for a, b in pairs[:3]]
    assert min(equal) > 0.6


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_told_and_no_tokens_are_made_of_them(
    paired: object, ask: Callable, make_schedule: Callable, number: float
):
    model = copy.deepcopy(paired)
    model.transformer.blocks[1].ffn.contract.bias[3] = number
    run = generate(model.transformer, model.sampler, model.quantizer, ask([1], make_schedule("plain")), CPU)
    with pytest.raises(ValueError, match="not finite at scale 1, in float32: .* checkpoint is damaged"):
        next(run)


def test_a_run_holds_keys_of_what_it_draws_alone(model: object, ask: Callable):
    def capacity(stays: bool = False, **fields: object) -> int:
        request = ask([1], ScaleSchedule((ScalePolicy(top_k=9), *(ScalePolicy(top_k=9, **fields),) * 3)))
        request = dataclasses.replace(request, stop=stop)
        canvas = Canvas(model.transformer, request, request.schedule, CPU, stays=stays)
        assert canvas.cache.layers[0].keys.shape[2] == canvas.cached[(stop or SCALES) - 1] or stays
        return int(canvas.cache.layers[0].keys.shape[2])

    stop = None
    assert capacity() == 1 + 6 + 12
    assert capacity(prune=0.5) == 1 + 3 + 6
    stop = 2
    assert capacity() == 1
    assert capacity(stays=True) == 1 + 6 + 12
    stop = 1
    assert capacity() == 0
    assert len(model.run(dataclasses.replace(ask([1], ScaleSchedule((ScalePolicy(),) * SCALES)), stop=1))) == 1


@pytest.mark.parametrize(
    ("strategy", "by_transformer", "asked"), [("masked", 2, 0), ("official", 0, 0), ("confidence", 2, 1)]
)
def test_the_transformer_is_asked_for_logits_only_where_a_step_draws_from_them(
    model: object,
    ask: Callable,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    by_transformer: int,
    asked: int,
):
    policy = ScalePolicy(top_k=9, guidance=1.0, steps=3, transformer_steps=by_transformer)
    schedule = ScaleSchedule((ScalePolicy(top_k=9),) * 3 + (policy,), strategy=strategy)
    seen: list[int] = []
    whole = model.transformer.logits
    monkeypatch.setattr(model.transformer, "logits", lambda x: seen.append(x.shape[1]) or whole(x))
    model.run(ask([1], schedule))
    assert seen.count(24) == asked


# What the schedule cannot mean.


def test_top_k_beyond_the_codebook_is_no_filter(model: object, ask: Callable):
    pictures = [
        model.run(ask([1], ScaleSchedule((ScalePolicy(top_k=k, guidance=2.0),) * SCALES)))
        for k in (0, 64, 4096)
    ]
    assert same_tokens(pictures[0], pictures[1])
    assert same_tokens(pictures[0], pictures[2])


def test_more_steps_than_tokens_fix_one_token_a_step(model: object, ask: Callable):
    def refined(steps: int) -> ScaleSchedule:
        policy = ScalePolicy(top_k=9, guidance=1.0, steps=steps)
        return ScaleSchedule((policy,) * SCALES, strategy="masked")

    many, clamped = model.run(ask([1], refined(4000))), model.run(ask([1], refined(24)))
    assert same_tokens(many, clamped)


def test_a_schedule_of_another_model_is_refused_before_anything_is_drawn(
    paired: object, ask: Callable, make_schedule: Callable
):
    steps = generate(
        paired.transformer, None, paired.quantizer, ask([1], make_schedule("plain", scales=5)), CPU
    )
    with pytest.raises(ValueError, match="the schedule has 5 scales, the model draws 4"):
        next(steps)
    steps = generate(paired.transformer, None, paired.quantizer, ask([1], make_schedule("masked")), CPU)
    with pytest.raises(ValueError, match="this checkpoint has none"):
        next(steps)


def test_requests_that_contradict_themselves_are_refused(
    ask: Callable, texts: Callable, tokens: Callable, make_schedule: Callable, paired: object
):
    schedule = make_schedule("plain")
    request = ask([1, 2], schedule)
    span = request.prompts[0]
    full = paired.run(request)
    late, outside = dataclasses.replace(span, start=1), dataclasses.replace(span, start=4)
    kept = KeptTokens(tokens(paired.maps, 2, 0), tuple(t > 0 for t in tokens(paired.maps, 2, 0)))
    wider = dataclasses.replace(full[0], f_hat=torch.zeros(2, 8, 4, 8))
    single = dataclasses.replace(full[0], f_hat=torch.zeros(1, 8, 4, 6))
    cases: list[tuple[dict, str]] = [
        ({"prompts": ()}, "prompt spans start at rising scales"),
        ({"prompts": (late,)}, r"the first at 0, got \[1\]"),
        ({"prompts": (span, late, late)}, r"got \[0, 1, 1\]"),
        ({"prompts": (span, outside)}, "a prompt starts at scale 4, the model has 4 scales"),
        ({"stop": 0}, "can stop after 1 to 4 scales, not after 0"),
        ({"stop": 5}, "not after 5"),
        ({"prefix": tuple(full[:3]), "stop": 2}, "3 scales are given, 2 are wanted"),
        ({"prefix": (full[1],)}, r"given scale 1 has tokens \(2, 6\)"),
        ({"prefix": tuple(step_row(s, 0) for s in full[:1])}, r"given scale 1 has tokens \(1, 1\)"),
        ({"seeds": (PictureSeed(0),)}, "2 texts for 1 pictures"),
        ({"prompts": (PromptSpan(texts(1, 2), texts(9)),)}, "1 texts for 2 pictures"),
        ({"kept": dataclasses.replace(kept, tokens=kept.tokens[:3])}, "kept tokens have shapes"),
        ({"kept": dataclasses.replace(kept, masks=kept.masks[::-1])}, "kept masks have shapes"),
        ({"kept": dataclasses.replace(kept, tokens=kept.masks)}, "whole numbers, these are torch.bool"),
        ({"prefix": (wider,)}, r"another size: f_hat \(2, 8, 4, 8\), wanted 2 of \(4, 6\)"),
        ({"prefix": (single,)}, r"another size: f_hat \(1, 8, 4, 6\), wanted 2 of \(4, 6\)"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(request, **changes)


@pytest.mark.parametrize("token", [-1, 64])
def test_kept_tokens_of_another_codebook_are_refused_before_anything_is_drawn(
    ask: Callable, paired: object, make_schedule: Callable, token: int
):
    request = ask([1], make_schedule("plain"))
    tokens = [step.tokens.clone() for step in paired.run(request)]
    tokens[2][0, 5] = token
    kept = KeptTokens(tuple(tokens), tuple(torch.ones_like(t).bool() for t in tokens))
    steps = generate(paired.transformer, None, paired.quantizer, dataclasses.replace(request, kept=kept), CPU)
    with pytest.raises(ValueError, match=rf"scale 3 are .*{token}.*, this model's codebook has 64"):
        next(steps)


@pytest.mark.parametrize("kind", ["plain", "smooth", "official", "confidence", "masked"])
def test_tokens_that_are_not_kept_may_be_any_numbers(
    ask: Callable, paired: object, tokens: Callable, make_schedule: Callable, kind: str
):
    some, masks = tokens(paired.maps, 2, 0), tuple(t % 2 > 0 for t in tokens(paired.maps, 2, 1))
    assert 0 < masks[1].sum() < masks[1].numel()
    wild = tuple(torch.where(mask, t, 10**6 - 2 * 10**6 * t) for t, mask in zip(some, masks, strict=True))
    request = ask([1, 2], make_schedule(kind))
    one, other = (
        paired.run(dataclasses.replace(request, kept=KeptTokens(kept, masks))) for kept in (some, wild)
    )
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.f_hat, theirs.f_hat)


def test_kept_tokens_of_four_bytes_give_steps_of_eight_as_any_others(
    ask: Callable, paired: object, make_schedule: Callable
):
    request = ask([1], make_schedule("masked"))
    tokens = tuple(step.tokens.int() for step in paired.run(request))
    kept = KeptTokens(tokens, tuple(torch.arange(t.shape[1])[None] % 2 == 0 for t in tokens))
    for step in paired.run(dataclasses.replace(request, kept=kept)):
        assert step.tokens.dtype == torch.int64


def test_a_turned_map_of_as_many_tokens_is_no_prefix(ask: Callable, paired: object, make_schedule: Callable):
    request = ask([1], make_schedule("plain"))
    full = paired.run(request)
    turned = dataclasses.replace(full[1], token_map=(3, 2))
    with pytest.raises(ValueError, match=r"of a \(3, 2\) map, wanted \(1, 6\) of \(2, 3\)"):
        dataclasses.replace(request, prefix=(full[0], turned))


# The public face.


class Words:
    """Stands in for a text encoder: a prompt is a made-up text named by its length."""

    width = 16

    def __init__(self, texts: Callable[..., TextStates]) -> None:
        self._texts = texts

    def encode(self, prompts: list[str]) -> TextStates:
        return self._texts(*(len(prompt) for prompt in prompts))


@pytest.fixture
def star(paired: object, texts: Callable) -> Star:
    return Star(paired.config, paired.transformer, paired.sampler, paired.vqvae, Words(texts), CPU)


def test_pictures_of_a_prompt_follow_each_other_and_each_can_be_had_alone(star: Star):
    batch = star.draw(["a", "bcd"], options=Options(seed=3, count=2))
    assert batch.shape == (4, 3, 16, 24)
    assert batch.min() >= 0
    assert batch.max() <= 1
    for row, (prompt, index) in enumerate([("a", 0), ("a", 1), ("bcd", 0), ("bcd", 1)]):
        alone = star.draw([prompt], options=Options(seed=3, indices=(index,)))
        torch.testing.assert_close(alone[0], batch[row], atol=1e-4, rtol=1e-4)
    assert (batch[0] - batch[1]).abs().max() > 0.01
    chosen = star.draw(["bcd", "a"], options=Options(seed=3, indices=(1, 0)))
    torch.testing.assert_close(chosen, batch[[3, 0]], atol=1e-4, rtol=1e-4)


def test_a_schedule_may_be_an_object_a_name_or_a_text(star: Star):
    chosen = star.schedule("smooth", star.maps(None))
    pictures = [star.draw(["a"], options=Options(schedule=s)) for s in (chosen, "smooth", chosen.to_text())]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


def test_another_size_is_drawn_with_its_own_maps(star: Star):
    maps, trained = maps_for_size(star.config, 24, 16)
    assert not trained
    steps = list(star.generate(["a"], options=Options(size=(24, 16))))
    assert [s.token_map for s in steps] == list(maps)
    assert star.decode(steps[-1].f_hat).shape == (1, 3, 24, 16)
    with pytest.raises(ValueError, match="Trained: 24x16"):
        star.generate(["a"], options=Options(size=(16, 16)))


def test_an_encoded_image_is_its_own_prefix(star: Star):
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    given = star.encode_image(image)
    assert [s.token_map for s in given] == list(star.config.maps)
    again = star.draw(["a"], options=Options(prefix=given))
    torch.testing.assert_close(again, star.decode(given[-1].f_hat))
    kept = KeptTokens(tuple(s.tokens for s in given), tuple(torch.ones_like(s.tokens).bool() for s in given))
    torch.testing.assert_close(star.draw(["a"], options=Options(kept=kept)), again, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot draw 20x20 pixels"):
        star.encode_image(torch.zeros(1, 3, 20, 20))
    with pytest.raises(ValueError, match=r"pictures are \(B, 3, H, W\), got \(3, 16, 24\)"):
        star.encode_image(torch.zeros(3, 16, 24))


def test_prompts_may_change_from_a_scale_on(star: Star):
    plain = list(star.generate(["a", "bc"]))
    swapped = list(star.generate([(0, ["a", "bc"]), (2, ["a", "bcde"])]))
    assert same_tokens(plain[:2], swapped[:2], 1, 1)
    assert not same_tokens(plain[2:], swapped[2:], 1, 1)
    assert same_tokens(plain, swapped, 0, 0)


def test_negative_prompts_are_one_for_all_or_one_each(star: Star):
    one = star.draw(["a", "bc"], "xyz")
    each = star.draw(["a", "bc"], ["xyz", "xyz"])
    assert torch.equal(one, each)
    assert not torch.equal(one, star.draw(["a", "bc"], ["xyz", "xyzw"]))


@pytest.mark.parametrize(
    ("prompts", "negative", "message"),
    [
        ("a red apple", "", r"write \[prompt\] for one"),
        ([], "", "there is no prompt"),
        (["a", "b"], ["x"], "as many texts everywhere"),
        ([(0, ["a", "b"]), (2, ["c"])], "", "as many texts everywhere"),
        ([(1, ["a"])], "", "the first at 0"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(star: Star, prompts: object, negative: object, message: str):
    with pytest.raises(ValueError, match=message):
        star.generate(prompts, negative)


def test_a_text_encoder_of_another_width_is_refused(paired: object, texts: Callable):
    words = Words(texts)
    words.width = 17
    with pytest.raises(ValueError, match="text states of width 16, this text encoder gives 17"):
        Star(paired.config, paired.transformer, None, paired.vqvae, words, CPU)


def test_a_bad_schedule_is_refused_before_the_first_scale(star: Star):
    with pytest.raises(ValueError, match="neither a preset"):
        star.generate(["a"], options=Options(schedule="topk"))
    with pytest.raises(ValueError, match="3 scales"):
        star.generate(["a"], options=Options(schedule="maps 1 2 3; top_k 5"))


def test_options_that_contradict_themselves_are_refused(star: Star):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        Options(count=0)
    with pytest.raises(ValueError, match="leave count at 1"):
        Options(count=2, indices=(0, 1))
    with pytest.raises(ValueError, match="3 indices for 2 prompts"):
        star.generate(["a", "b"], options=Options(indices=(0, 1, 2)))


def test_a_kept_exception_does_not_keep_the_cache(paired, ask, make_schedule):
    steps = paired_steps(paired, ask, make_schedule)
    next(steps)
    caches = [o for o in gc.get_objects() if type(o) is LayerCache]
    assert caches, "a running generator has its cache"
    watched = [weakref.ref(cache) for cache in caches]
    del caches
    with pytest.raises(RuntimeError, match="stop") as kept:
        steps.throw(RuntimeError("stop"))
    assert kept.value.__traceback__ is not None
    assert not [ref for ref in watched if ref() is not None]


def paired_steps(paired, ask, make_schedule):
    request = ask([1], make_schedule("plain"))
    return generate(paired.transformer, paired.sampler, paired.quantizer, request, CPU)
