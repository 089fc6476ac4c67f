"""What the nodes hand to the engine: schedules from two texts, prompts per scale, masks, tiles, memory."""

from __future__ import annotations

import pytest
import torch

from star_core.config import square_maps, token_count
from star_core.inpainting import keep_outside
from star_core.memory import decoding_bytes, drawing_bytes
from star_core.presets import SCHEDULES, named_schedule, read_schedule
from star_core.prompts import active, spans, switch
from star_core.request import joined
from star_core.schedule import nearest_scale
from star_core.schedule_parts import SamplerPart, assemble, check_part, part_text, read_part
from star_core.schedule_text import ScheduleError, parse_schedule, scales_of
from star_core.tiles import decode_in_tiles

MAPS_6 = square_maps((1, 2, 3, 4, 6, 8))
MAPS_10 = square_maps((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


def put_together(maps=MAPS_6, *, own="sampler", has_sampler=True, **forms):
    return assemble(maps, 4096, has_sampler=has_sampler, own=own, **forms)


def test_without_forms_the_checkpoint_s_own_schedule_holds_as_a_whole():
    assert put_together() == named_schedule("sampler", MAPS_6).fit(MAPS_6, 4096, has_sampler=True)


def test_a_form_for_drawing_alone_refines_nothing():
    schedule = put_together(drawing="top_k 5; guidance 2")
    assert [p.top_k for p in schedule.scales] == [5] * 6
    assert not schedule.refines


def test_a_sampler_form_alone_refines_the_own_schedule_s_draws():
    schedule = put_together(own="top-k", sampler=SamplerPart("steps 0*5 3", "masked", 1.5))
    assert [p.top_k for p in schedule.scales] == [600] * 6
    assert [p.steps for p in schedule.scales] == [0] * 5 + [3]
    assert (schedule.strategy, schedule.sampler_guidance) == ("masked", 1.5)


def test_a_sampler_form_replaces_the_own_schedule_s_steps():
    schedule = put_together(own="sampler", sampler=SamplerPart("steps 0*5 3"))
    assert [p.steps for p in schedule.scales] == [0] * 5 + [3]
    assert [p.random_steps for p in schedule.scales] == [0] * 6


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_preset_in_both_forms_is_the_preset(name):
    preset = named_schedule(name, MAPS_6).fit(MAPS_6, 4096, has_sampler=True)
    part = SamplerPart(name, preset.strategy, preset.sampler_guidance)
    assert put_together(drawing=name, sampler=part) == preset


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_parts_of_a_preset_are_texts_that_make_it_again(name):
    preset = named_schedule(name, MAPS_6)
    part = SamplerPart(part_text(preset, "sampler"), preset.strategy, preset.sampler_guidance)
    whole = put_together(drawing=part_text(preset, "drawing"), sampler=part)
    assert whole == preset.fit(MAPS_6, 4096, has_sampler=True)


@pytest.mark.parametrize(
    ("part", "text", "message", "column"),
    [
        ("drawing", "top_k 5\nsteps 3", "node Causal Sampler", 9),
        ("drawing", "strategy masked; top_k 5", "node Causal Sampler", 1),
        ("sampler", "steps 3\ntop_k 5", "node Scale Schedule", 9),
        ("sampler", "steps 3; sampler_guidance 2", "in the field guidance", 10),
    ],
)
def test_a_line_of_the_other_form_is_pointed_at(part, text, message, column):
    with pytest.raises(ScheduleError, match=rf"{message}.*\(character {column}\)"):
        check_part(text, part)
    with pytest.raises(ScheduleError, match=message):
        read_part(text, part, MAPS_6)


def test_a_text_can_be_checked_without_a_model():
    check_part("top_k 600", "drawing")
    check_part("top_k 600*9 300*3\nguidance ramp 4", "drawing")
    check_part("demo-1024", "sampler")
    for text in ("top_k 600*9 300*3; top_p 0.5 0.4", "top_k x", "", "demo-1025"):
        with pytest.raises(ScheduleError):
            check_part(text, "drawing")


def test_the_sampler_is_refused_on_smooth_scales_and_without_one():
    with pytest.raises(ValueError, match="scale 6: steps is 3 on a smooth scale"):
        put_together(drawing="smooth yes", sampler=SamplerPart("steps 0*5 3"))
    with pytest.raises(ValueError, match="has none"):
        put_together(has_sampler=False, drawing="top_k 5", sampler=SamplerPart("steps 3"))


def test_stretching_takes_the_nearest_scale_by_relative_position():
    text = "maps 1 2 4 8; top_k 5 6 7 8; stretch yes"
    schedule = read_schedule(text, MAPS_6).fit(MAPS_6, 4096, has_sampler=False)
    # Scales at 0, .2, .4, .6, .8, 1 look for the nearest of 0, 1/3, 2/3, 1.
    assert [p.top_k for p in schedule.scales] == [5, 6, 6, 7, 7, 8]
    assert schedule.maps == MAPS_6
    assert nearest_scale(1, 3, 2) == 0, "the coarser one on a tie"
    assert [nearest_scale(s, 10, 10) for s in range(10)] == list(range(10))


def test_stretching_is_written_and_read_and_off_by_default():
    text = "top_k 5 6 7 8; stretch yes"
    schedule = parse_schedule(text)
    assert schedule.stretch
    assert parse_schedule(schedule.to_text()) == schedule
    assert parse_schedule(schedule.to_text(), 10) == schedule, "it keeps its own number of scales"
    assert not parse_schedule("top_k 5 6; stretch no").stretch
    assert (
        read_schedule("top_k 5; stretch yes", MAPS_10).fit(MAPS_10, 99, has_sampler=False).scales[9].top_k == 5
    )
    with pytest.raises(ScheduleError, match="values for 6 scales"):
        read_schedule("top_k 5 6 7 8", MAPS_6)
    with pytest.raises(ValueError, match="stretch yes"):
        parse_schedule("maps 1 2 4 8; top_k 5").fit(MAPS_6, 4096, has_sampler=False)
    with pytest.raises(ValueError, match="stretch yes"):
        parse_schedule("maps 1 2 3 4 5 20; top_k 5").fit(MAPS_6, 4096, has_sampler=False)


@pytest.mark.parametrize("line", ["stretch maybe", "stretch", "stretch yes no", "stretch yes*3"])
def test_a_wrong_stretch_line_is_pointed_at(line):
    with pytest.raises(ScheduleError, match=r"\(character \d+\)"):
        parse_schedule(f"top_k 5 6; {line}")


def test_a_text_says_how_many_scales_it_lists():
    assert scales_of("top_k 5; top_p 0.5*3 0.4") == 4
    assert scales_of("top_k 5 6; maps 1 2 3") == 3
    assert scales_of("top_k 5; guidance ramp 4") is None


def test_a_later_prompt_holds_from_its_scale_on(texts):
    first, second, third = texts(1), texts(2), texts(3)
    both = switch(((0, first),), ((0, second),), 3)
    assert both == ((0, first), (3, second))
    assert switch(both, ((0, third),), 5) == ((0, first), (3, second), (5, third))
    assert switch(both, ((0, third),), 2) == ((0, first), (2, third))
    assert switch(((0, third),), both, 1) == ((0, third), (1, first), (3, second))
    assert switch(((0, third),), both, 4) == ((0, third), (4, second))
    assert switch(both, ((0, third),), 0) == ((0, third),)
    assert active(both, 2) is first
    assert active(both, 3) is second
    with pytest.raises(ValueError, match="cannot start at scale -1"):
        switch(both, both, -1)


def test_spans_change_where_either_text_changes(texts):
    positive, negative = ((0, texts(1)), (3, texts(2))), ((0, texts(9)), (2, texts(8)))
    made = spans(positive, negative, 2)
    assert [span.start for span in made] == [0, 2, 3]
    assert torch.equal(made[1].conditional.pooled, texts(1, 1).pooled)
    assert torch.equal(made[1].unconditional.pooled, texts(8, 8).pooled)
    assert torch.equal(made[2].conditional.hidden, texts(2, 2).hidden)


def test_a_mask_keeps_the_cells_that_are_less_than_half_white(paired, ask, make_schedule):
    steps = paired.run(ask([1, 2], make_schedule("plain")))
    redraw = torch.zeros(2, 8, 12)
    redraw[0, :, 6:] = 1
    kept = keep_outside(steps, redraw)
    assert kept.tokens == tuple(step.tokens for step in steps)
    assert kept.masks[0].tolist() == [[False], [True]], "half of the only cell is white"
    last = kept.masks[-1].reshape(2, 4, 6)
    assert last[0, :, :3].all()
    assert not last[0, :, 3:].any()
    assert last[1].all()


def test_a_mask_with_white_that_redraws_nothing_is_refused(paired, ask, make_schedule):
    steps = paired.run(ask([1, 2], make_schedule("plain")))
    redraw = torch.zeros(2, 16, 24)
    redraw[1, 3:5] = 1  # half of no cell: of four rows, one in each of two
    with pytest.raises(ValueError, match=r"half of no token's cell.*6x4 tokens.*grow it"):
        keep_outside(steps, redraw)
    redraw[1, 2] = redraw[0, 3, 3] = 1
    assert not keep_outside(steps, redraw).masks[-1][1].all()
    assert keep_outside(steps, 0.4 * redraw).masks[-1].all(), "grey is no white"


def test_one_tile_is_the_whole_picture_and_several_come_near_it(paired):
    generator = torch.Generator().manual_seed(3)
    # Smooth, as f_hats are: what differs between a tile and the whole is the normalisation.
    f_hat = torch.nn.functional.interpolate(
        torch.randn(2, 8, 3, 4, generator=generator), size=(18, 30), mode="bicubic"
    )
    whole = paired.vqvae.pictures(f_hat)
    assert torch.equal(decode_in_tiles(paired.vqvae, f_hat, tile=32, overlap=8), whole)
    tiled = decode_in_tiles(paired.vqvae, f_hat, tile=16, overlap=6)
    assert tiled.shape == whole.shape
    unrelated = paired.vqvae.pictures(f_hat.flip(-1))
    assert (tiled - whole).abs().mean() < 0.5 * (unrelated - whole).abs().mean()
    with pytest.raises(ValueError, match="overlap by 1 to 8"):
        decode_in_tiles(paired.vqvae, f_hat, tile=16, overlap=9)


def test_room_for_drawing_holds_the_cache_and_grows_with_what_is_drawn(paired):
    config, maps = paired.config.transformer, paired.maps
    room = drawing_bytes(config, maps, 2, guided=True, itemsize=4)
    cache = paired.transformer.new_cache(4, token_count(maps[:-1]), torch.device("cpu"))
    exact = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert room > exact
    assert room == 2 * drawing_bytes(config, maps, 2, guided=False, itemsize=4)
    assert drawing_bytes(config, maps, 2, guided=True, itemsize=2) < room
    # What is done between passes has the room that a pass leaves: it is alive beside the cache alone.
    assert drawing_bytes(config, maps, 2, guided=True, itemsize=4, between=room - exact) == room
    assert drawing_bytes(config, maps, 2, guided=True, itemsize=4, between=room) == room + exact
    picture = decoding_bytes(paired.config.vqvae, maps[-1], 1, itemsize=4)
    assert decoding_bytes(paired.config.vqvae, maps[-1], 3, itemsize=4) == 3 * picture


def test_batches_are_joined_scale_by_scale(paired, ask, make_schedule):
    first, second = (paired.run(ask(names, make_schedule("plain"))) for names in ([1], [2, 3]))
    whole = joined([first, second])
    assert len(whole) == len(first)
    for one, other, both in zip(first, second, whole, strict=True):
        assert torch.equal(both.tokens, torch.cat([one.tokens, other.tokens]))
        assert torch.equal(both.f_hat, torch.cat([one.f_hat, other.f_hat]))
        assert (both.scale, both.token_map) == (one.scale, one.token_map)


def test_what_was_drawn_smooth_cannot_be_kept_under_a_mask(paired, ask, make_schedule):
    steps = paired.run(ask([1], make_schedule("smooth")))
    with pytest.raises(ValueError, match=r"drawn smooth.*encode the picture"):
        keep_outside(steps, torch.zeros(1, 8, 8))


def test_a_step_repeats_one_picture_and_refuses_several(paired, ask, make_schedule):
    (step, *_) = paired.run(ask([1], make_schedule("plain")))
    three = step.repeated(3)
    assert torch.equal(three.tokens, step.tokens.repeat(3, 1))
    assert torch.equal(three.f_hat, step.f_hat.repeat(3, 1, 1, 1))
    with pytest.raises(ValueError, match="one picture can be repeated, not 3"):
        three.repeated(2)
    moved = step.to(torch.device("cpu"))
    assert (moved.tokens is step.tokens, moved.f_hat is step.f_hat) == (True, True)
    assert (moved.scale, moved.token_map, moved.given, moved.soft) == (0, step.token_map, False, False)
