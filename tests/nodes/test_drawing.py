"""The nodes draw what the engine draws; each scale-wise trick changes what it says, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from star_core import Options, load

SCALES = 6


@pytest.fixture(scope="module")
def star(models):
    return load(models / "tiny")


def test_a_picture_is_the_engine_s_own(comfy, prompt, star):
    # Against star_core itself, loaded apart from ComfyUI: layers, dtypes and seeds are the same.
    graph = prompt(seed=7, batch_size=2)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    ran = comfy.run(graph)
    steps = list(star.generate(["a red apple"], options=Options(seed=7, count=2)))
    assert ran.tokens() == [step.tokens.tolist() for step in steps]
    image = ran.array("image")
    assert image.shape == (2, 64, 64, 3)
    assert image.min() >= 0
    assert image.max() <= 1
    expected = star.decode(steps[-1].f_hat).permute(0, 2, 3, 1).numpy()
    assert np.abs(image - expected).max() < 1e-4


def test_a_text_encoder_s_halves_are_not_made_wide(comfy, prompt):
    # What it gives is float32 all the same: the picture above is the engine's.
    ran = comfy.run(prompt(seed=7).probe("load", 1, name="text"))
    assert ran.reply["seen"]["text"]["dtypes"] == ["torch.float16", "torch.float32"]


def test_a_batch_s_pictures_do_not_depend_on_its_size(comfy, prompt):
    three = comfy.run(prompt(seed=3, batch_size=3)).tokens()
    one = comfy.run(prompt(seed=3, batch_size=1)).tokens()
    assert [scale[:1] for scale in three] == one
    assert three[-1][0] != three[-1][1]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_precision_is_the_weights_dtype(comfy, prompt, precision):
    graph = prompt().change("load", precision=precision).probe("load", name="model")
    ran = comfy.run(graph)
    assert ran.reply["seen"]["model"]["dtype"] == f"torch.{precision}"
    assert len(ran.tokens()) == SCALES


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bit_precision_is_the_engine_with_8_bit_weights(comfy, prompt, models, precision):
    exact = comfy.run(prompt(seed=530)).tokens()
    ran = comfy.run(prompt(seed=530).change("load", precision=precision))
    assert ran.tokens() != exact
    small = load(models / "tiny", eight_bit=precision)
    steps = small.generate(["a red apple"], options=Options(seed=530))
    assert ran.tokens() == [step.tokens.tolist() for step in steps]


def test_the_schedule_reaches_the_engine(comfy, prompt, star):
    graph = prompt().add("schedule", "StarScaleSchedule", schedule="top_k 1\nguidance 2", model=["load", 0])
    graph = graph.change("sample", schedule=["schedule", 0])
    expected = list(star.generate(["a red apple"], options=Options(seed=1, schedule="top_k 1; guidance 2")))
    assert comfy.run(graph).tokens() == [step.tokens.tolist() for step in expected]


def test_the_sampler_reaches_the_engine_with_strategy_and_guidance(comfy, prompt, star):
    graph = prompt().add("schedule", "StarScaleSchedule", schedule="top_k 20\nguidance 2")
    graph.add("sampler", "StarCausalSampler", steps="steps 0*4 5*2", strategy="masked", guidance=1.5)
    graph = graph.change("sample", schedule=["schedule", 0], sampler=["sampler", 0])
    text = "top_k 20; guidance 2; steps 0*4 5*2; strategy masked; sampler_guidance 1.5"
    expected = list(star.generate(["a red apple"], options=Options(seed=1, schedule=text)))
    assert comfy.run(graph).tokens() == [step.tokens.tolist() for step in expected]


def test_a_negative_prompt_is_what_guidance_leads_away_from(comfy, prompt, star):
    graph = prompt().add("no", "StarCLIPEncode", text_encoder=["load", 1], text="blue")
    graph = graph.change("sample", negative=["no", 0])
    expected = list(star.generate(["a red apple"], "blue", options=Options(seed=1)))
    assert comfy.run(graph).tokens() == [step.tokens.tolist() for step in expected]


def test_a_late_prompt_changes_late_scales_only(comfy, prompt):
    graph = prompt().add("other", "StarCLIPEncode", text_encoder=["load", 1], text="a blue rocket")
    graph.add("both", "StarPromptFromScale", conditioning=["text", 0], later=["other", 0], start_scale=4)
    alone = comfy.run(prompt()).tokens()
    mixed = comfy.run(graph.change("sample", positive=["both", 0])).tokens()
    other = comfy.run(graph.change("sample", positive=["other", 0])).tokens()
    assert mixed[:3] == alone[:3]
    assert mixed[3:] != alone[3:]
    assert mixed[0] != other[0] or mixed[1:3] != other[1:3]
    first = comfy.run(graph.change("both", start_scale=1).change("sample", positive=["both", 0])).tokens()
    assert first == other


def test_start_scale_takes_the_coarse_scales_and_draws_the_rest(comfy, prompt):
    graph = prompt(seed=5)
    graph.add(
        "again", "StarSample", model=["load", 0], positive=["text", 0], start_tokens=["sample", 0], seed=6
    )
    graph = graph.change("again", start_scale=3).probe("again", name="varied")
    ran = comfy.run(graph)
    start, varied = ran.tokens(), ran.tokens("varied")
    assert varied[:3] == start[:3]
    assert all(a != b for a, b in zip(varied[3:], start[3:], strict=True))
    assert ran.seen["varied"]["given"] == [True] * 3 + [False] * 3


def test_one_start_picture_serves_a_batch(comfy, prompt):
    graph = prompt()
    graph.add(
        "again",
        "StarSample",
        model=["load", 0],
        positive=["text", 0],
        start_tokens=["sample", 0],
        start_scale=5,
        batch_size=3,
    )
    ran = comfy.run(graph.probe("again", name="varied"))
    assert all(a == b * 3 for a, b in zip(ran.tokens("varied")[:5], ran.tokens()[:5], strict=True))


def inpainted(comfy, prompt, mask, **options):
    graph = prompt(seed=5).add("mask", "TestSource", path=comfy.array(mask, "mask"))
    graph.add("again", "StarSample", model=["load", 0], positive=["text", 0], start_tokens=["sample", 0])
    graph = graph.change("again", mask=["mask", 0], seed=8, **options).probe("again", name="painted")
    return comfy.run(graph)


def test_black_keeps_the_start_tokens_at_every_scale_and_white_draws_anew(comfy, prompt):
    mask = np.zeros((1, 64, 64))
    mask[:, :, 32:] = 1
    ran = inpainted(comfy, prompt, mask)
    changed = 0
    for side, before, after in zip((1, 2, 4, 6, 10, 16), ran.tokens(), ran.tokens("painted"), strict=True):
        old, new = (np.array(tokens).reshape(side, side) for tokens in (before, after))
        # Half of the middle column's cells is white where the side is odd: half is drawn anew.
        assert (old[:, : side // 2] == new[:, : side // 2]).all()
        changed += (old[:, side // 2 :] != new[:, side // 2 :]).sum()
    # 413 tokens, of which a half is drawn anew from 64 codes: chance keeps a few, not most.
    assert changed > 130


def test_a_mask_of_another_size_is_stretched_over_the_picture(comfy, prompt):
    fine, coarse = np.zeros((1, 64, 64)), np.zeros((1, 32, 16))
    fine[:, :, 32:] = 1
    coarse[:, :, 8:] = 1
    one, other = inpainted(comfy, prompt, fine), inpainted(comfy, prompt, coarse)
    assert one.tokens("painted") == other.tokens("painted")


def test_a_black_mask_gives_the_start_picture_back_and_the_node_says_so(comfy, prompt):
    ran = inpainted(comfy, prompt, np.zeros((1, 64, 64)))
    assert ran.tokens("painted") == ran.tokens()
    assert any(node == "again" and "nothing is drawn anew" in text for node, text in ran.texts)
    masks = np.zeros((2, 64, 64))
    masks[1, :, 32:] = masks[0, 5, 5] = 1
    ran = inpainted(comfy, prompt, masks, batch_size=2)
    assert len(ran.tokens("painted")) == 6, "a speck beside another picture's mask is no reason to refuse it"
    assert any("the masks of 1 of 2 pictures" in text for node, text in ran.texts if node == "again")


def test_a_mask_of_another_shape_than_the_picture_s_is_told_of(comfy, prompt):
    def told(mask, start_scale=0):
        # From another scale on, so that nothing of the run before serves: nothing drawn, nothing said.
        ran = inpainted(comfy, prompt, mask, start_scale=start_scale)
        assert len(ran.tokens("painted")) == 6
        return {text.partition(" · ")[2].partition(" · ")[2] for node, text in ran.texts if node == "again"}

    mask = np.zeros((1, 64, 96))
    mask[:, :, 48:] = 1
    assert told(mask) == {"⚠ mask of 96x64 stretched over 64x64"}
    assert told(mask[:, :, 14:86], 1) == {""}, "less than a token's width"
    assert told(np.ones((1, 64, 96)), 2) == {""}, "the same everywhere"


def test_a_picture_is_encoded_to_the_engine_s_tokens_and_decoded_near_itself(comfy, empty_prompt, star):
    import torch

    picture = np.linspace(0, 1, 64 * 64 * 3).reshape(1, 64, 64, 3)
    graph = empty_prompt().add("load", "StarLoad")
    graph.add("image", "TestSource", path=comfy.array(picture, "picture"))
    graph.add("encode", "StarVQEncode", model=["load", 0], vqvae=["load", 2], image=["image", 0])
    ran = comfy.run(graph.probe("encode"))
    steps = star.encode_image(torch.from_numpy(picture.astype(np.float32)).permute(0, 3, 1, 2))
    assert ran.tokens() == [step.tokens.tolist() for step in steps]


def test_scales_to_images_shows_every_scale_of_a_picture_before_the_next(comfy, prompt):
    graph = prompt(batch_size=2)
    graph.add("grown", "StarScalesToImages", vqvae=["load", 2], tokens=["sample", 0])
    graph.add("third", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0], last_scale=3)
    graph.add("last", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0])
    for name in ("grown", "third", "last"):
        graph.probe(name, name=f"{name} image")
    ran = comfy.run(graph)
    grown, third, last = (ran.array(f"{name} image") for name in ("grown", "third", "last"))
    assert grown.shape == (2 * SCALES, 64, 64, 3)
    # Batches of another size round differently in the last bits.
    assert np.abs(grown[2] - third[0]).max() < 1e-4
    assert np.abs(grown[SCALES + 2] - third[1]).max() < 1e-4
    assert np.abs(grown[-1] - last[1]).max() < 1e-4
    assert np.abs(grown[2] - grown[5]).max() > 1e-2


def test_another_size_is_drawn_with_the_engine_s_maps(comfy, prompt, star):
    height, width = 48, 84
    ran = comfy.run(prompt(width=width, height=height))
    expected = list(star.generate(["a red apple"], options=Options(seed=1, size=(height, width))))
    assert ran.tokens() == [step.tokens.tolist() for step in expected]
    assert tuple(ran.seen["probe"]["maps"][-1]) == (12, 21)


def test_a_grid_lays_pictures_out_with_a_label_under_each(comfy, empty_prompt):
    pictures = np.zeros((3, 64, 64, 3))
    pictures[0, ..., 0] = pictures[1, ..., 1] = pictures[2, ..., 2] = 1
    graph = empty_prompt().add("image", "TestSource", path=comfy.array(pictures, "pictures"))
    graph.add("grid", "StarLabelledGrid", images=["image", 0], labels="red\ngreen", columns=2)
    grid = comfy.run(graph.probe("grid")).array()
    assert grid.shape[0] == 1
    assert grid.shape[2] == 2 * 64 + 3 * 8
    for top, left, colour in ((8, 8, (1, 0, 0)), (8, 80, (0, 1, 0))):
        assert np.allclose(grid[0, top : top + 64, left : left + 64], colour)
    under = grid[0, 72:90, 8:72]
    assert under.min() < 0.5, "the first label is not there"
    bare = comfy.run(graph.change("grid", labels="")).array()
    assert (bare[0].sum(-1) < 0.5).sum() == 0, "there is text without a label"


@pytest.mark.parametrize(
    ("text", "font", "said"),
    [
        ("red", "own", ""),
        ("é", "own", ""),
        ("红车", "wide", ""),
        ("é红車", "wide", "boxes stand for 車:"),
        ("🚗", "own", "boxes stand for 🚗:"),
    ],
)
def test_labels_are_written_in_a_font_that_has_their_letters(comfy, text, font, said):
    chosen = comfy.ask("font_of", text=text, fonts={"narrow": "éж", "wide": "é红车"})
    assert chosen["font"] == font
    assert len(chosen["said"]) == bool(said)
    assert all(said in line for line in chosen["said"])


def test_where_weights_are_kept_in_8_bits_auto_is_what_the_device_computes_in(comfy):
    assert comfy.ask("dtype_with_8_bit_weights") == {"dtype": "torch.bfloat16"}


def test_a_label_without_spaces_goes_on_in_the_next_line(comfy, empty_prompt):
    white = np.ones((1, 64, 64, 3))
    graph = empty_prompt().add("image", "TestSource", path=comfy.array(white, "one white"))
    graph.add("grid", "StarLabelledGrid", images=["image", 0], labels="m" * 40, columns=1)
    grid = comfy.run(graph.probe("grid")).array()
    dark = grid[0, 72:].sum(-1).min(axis=1) < 1.5
    lines = int(np.sum(dark[1:] & ~dark[:-1]))
    assert lines >= 4, "as many lines as forty letters take"
    assert grid[0, :, 72:].min() > 0.9, "none reaches beyond its picture"


def test_labels_of_any_script_are_drawn(comfy, empty_prompt):
    white = np.ones((2, 64, 64, 3))
    graph = empty_prompt().add("image", "TestSource", path=comfy.array(white, "white"))
    graph.add("grid", "StarLabelledGrid", images=["image", 0], labels="größe\n尺度", columns=2)
    grid = comfy.run(graph.probe("grid")).array()
    assert (grid[0, :, :72].sum(-1) < 1).sum() > 10
    assert (grid[0, :, 80:].sum(-1) < 1).sum() > 10
