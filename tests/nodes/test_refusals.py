"""Wrong input: each a sentence on the node, before or at execution, and the next prompt works."""

from __future__ import annotations

import io
import pickle
import shutil

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def alive(comfy, prompt):
    """After every refusal the same process still draws."""
    yield
    assert len(comfy.run(prompt(seed=1)).tokens()) == 6


def refused(ran, *words):
    assert not ran.reply.get("ok"), "nothing was refused"
    for word in words:
        assert word in ran.complaint, ran.complaint


def test_a_missing_checkpoint_says_which_file_which_folder_and_where_to_get_it(comfy, prompt):
    ran = comfy.run(prompt().change("load", checkpoint="star-1024/star.safetensors"))
    assert not ran.valid
    refused(ran, "star-1024/star.safetensors", str(comfy.models), "Released", "convert")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "tiny/../../secret.safetensors", "..\\secret.safetensors"]
)
@pytest.mark.parametrize("field", ["checkpoint", "vqvae", "text_encoder"])
def test_a_name_that_leaves_the_folder_is_refused(comfy, prompt, models, name, field):
    shutil.copy(models / "tiny" / "star.safetensors", models.parent / "secret.safetensors")
    ran = comfy.run(prompt().change("load", **{field: name}))
    assert not ran.valid
    refused(ran, "no file")


def test_an_absolute_name_is_refused(comfy, prompt, models):
    ran = comfy.run(prompt().change("load", checkpoint=str(models / "tiny" / "star.safetensors")))
    assert not ran.valid
    refused(ran, "no file")


def broken(models, name, content):
    place = models / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(content)
    return name


def test_a_corrupted_checkpoint_is_refused(comfy, prompt, models):
    whole = (models / "tiny" / "star.safetensors").read_bytes()
    name = broken(models, "broken/star.safetensors", whole[: len(whole) // 2])
    shutil.copy(models / "tiny" / "vqvae.safetensors", models / "broken")
    refused(comfy.run(prompt().change("load", checkpoint=name)), name.split("/")[1], "not a whole safetensors")


def test_an_original_pth_names_the_command_that_converts_it(comfy, prompt, models):
    buffer = io.BytesIO()
    torch.save({"trainer": {}}, buffer)
    name = broken(models, "star-original.pth", buffer.getvalue())
    refused(comfy.run(prompt().change("load", checkpoint=name)), "python -m star_core convert", name)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("field", ["checkpoint", "vqvae", "text_encoder"])
def test_a_pickle_that_runs_code_is_not_run(comfy, prompt, models, tmp_path, suffix, field):
    mark = tmp_path / "ran"
    name = broken(models, f"bomb-{field}.{suffix}", pickle.dumps(Bomb(str(mark))))
    ran = comfy.run(prompt().change("load", **{field: name}))
    refused(ran, name)
    assert not mark.exists(), "the pickle ran"


def test_a_preset_that_the_file_contradicts_is_refused(comfy, prompt):
    ran = comfy.run(prompt().change("load", preset="star-256-d16"))
    refused(ran, "star-256-d16", "leave the preset out")


def test_a_preset_that_is_none_is_refused(comfy, prompt):
    refused(comfy.run(prompt().change("load", preset="star-9000")), "star-9000")


@pytest.mark.parametrize(("node", "field"), [("load", "precision"), ("sample", "preview")])
def test_a_choice_that_is_none_is_refused(comfy, prompt, node, field):
    # ComfyUI 0.3.64 does not check the choices of such nodes itself.
    refused(comfy.run(prompt(seed=701).change(node, **{field: "sideways"})), "sideways")


@pytest.mark.parametrize("text", ["top_k 600\ntop_q 0.8", "top_k six", "top_k 1 2 3", "", "officious-256"])
def test_a_typo_in_a_schedule_is_pointed_at_before_anything_runs(comfy, prompt, text):
    whole = f"maps 1 2 4 6 10 16\n{text}" if text[:1] == "t" else text
    graph = prompt().add("schedule", "StarScaleSchedule", schedule=whole)
    ran = comfy.run(graph.change("sample", schedule=["schedule", 0]))
    assert not ran.valid
    refused(ran, "(character" if text[:1] == "t" else "schedule")


def test_a_sampler_line_in_the_schedule_points_at_the_other_node(comfy, prompt):
    graph = prompt().add("schedule", "StarScaleSchedule", schedule="maps 1 2 4 6 10 16\nsteps 3")
    ran = comfy.run(graph.change("sample", schedule=["schedule", 0]))
    assert not ran.valid
    refused(ran, "Causal Sampler", "character 20")
    graph = prompt().add("sampler", "StarCausalSampler", steps="steps 3\ntop_k 5")
    ran = comfy.run(graph.change("sample", sampler=["sampler", 0]))
    assert not ran.valid
    refused(ran, "Scale Schedule")


def test_a_schedule_for_other_scales_is_refused_by_name_unless_it_stretches(comfy, prompt):
    graph = prompt().add("schedule", "StarScaleSchedule", schedule="maps 1 2 4 8\ntop_k 5 6 7 8")
    graph = graph.change("sample", schedule=["schedule", 0])
    refused(comfy.run(graph), "1 2 4 6 10 16", "stretch yes")
    stretched = comfy.run(graph.change("schedule", schedule="maps 1 2 4 8\ntop_k 5 6 7 8\nstretch yes"))
    assert len(stretched.tokens()) == 6


def test_a_sampler_for_a_checkpoint_without_one_is_refused(comfy, prompt):
    graph = prompt().change("load", checkpoint="plain/star.safetensors")
    graph.add("sampler", "StarCausalSampler", steps="steps 4")
    refused(comfy.run(graph.change("sample", sampler=["sampler", 0])), "causal sampler", "has none")


def test_a_size_that_the_model_does_not_have_is_refused_with_the_list(comfy, prompt):
    refused(comfy.run(prompt(width=100, height=100)), "100x100", "Trained: 64x64", "84x48")
    refused(comfy.run(prompt(width=64)), "give both")


def test_batch_0_is_refused(comfy, prompt):
    ran = comfy.run(prompt(batch_size=0))
    assert not ran.valid
    refused(ran, "smaller than min of 1")


def test_an_empty_prompt_is_the_unconditional_one(comfy, prompt):
    ran = comfy.run(prompt(text=""))
    assert ran.tokens() != comfy.run(prompt()).tokens()
    assert ["text", "0 of 75 tokens"] in ran.texts


def test_a_prompt_beyond_77_tokens_is_cut_and_says_what_was_left_out(comfy, prompt):
    ran = comfy.run(prompt(text="apple " * 75 + "zebra crossing"))
    (told,) = (text for node, text in ran.texts if node == "text")
    assert told.startswith("⚠ 77 of 75 tokens")
    assert "zebra crossing" in told
    assert "apple" not in told
    assert ran.tokens() == comfy.run(prompt(text="apple " * 75)).tokens()


def test_core_s_conditioning_is_refused_and_ours_is_named(comfy, prompt):
    # What core's encoder gives, without its model: a hidden state and a pooled one, untagged.
    graph = prompt().add("zero", "ConditioningZeroOut", conditioning=["text", 0])
    refused(comfy.run(graph.change("sample", positive=["zero", 0])), "CLIP Encode (STAR)", "changed by a node")
    graph = prompt().add("two", "ConditioningCombine", conditioning_1=["text", 0], conditioning_2=["text", 0])
    refused(comfy.run(graph.change("sample", positive=["two", 0])), "2 prompts", "CLIP Encode (STAR)")
    graph = prompt().add("area", "ConditioningSetArea", conditioning=["text", 0], width=64, height=64, x=0, y=0)
    graph = graph.change("area", strength=1.0).change("sample", positive=["area", 0])
    refused(comfy.run(graph), "area", "CLIP Encode (STAR)")
    graph = prompt().add("core", "TestConditioning")
    refused(comfy.run(graph.change("sample", positive=["core", 0])), "CLIP Text Encode", "CLIP Encode (STAR)")


def test_a_text_encoder_of_another_width_is_refused_where_it_is_loaded(comfy, prompt):
    graph = prompt().change("load", text_encoder="narrow/text_encoder/model.safetensors")
    refused(comfy.run(graph), "width 128", "gives 64", "trained with")


def test_a_prompt_of_another_model_s_encoder_is_refused(comfy, prompt):
    graph = prompt().add("other", "StarLoad", checkpoint="narrow/star.safetensors")
    assert (
        len(
            comfy.run(
                graph.change("text", text_encoder=["other", 1]).change("sample", model=["other", 0])
            ).tokens()
        )
        == 6
    )
    refused(comfy.run(graph.change("text", text_encoder=["other", 1])), "positive", "width 128", "have 64")
    graph.add("no", "StarCLIPEncode", text_encoder=["other", 1], text="blue")
    refused(comfy.run(graph.change("sample", negative=["no", 0])), "negative", "width 128", "have 64")


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("vqvae.safetensors", "no VQ-VAE there"),
        ("text_encoder", "no text encoder there"),
        ("tokenizer", "no tokenizer found"),
    ],
)
def test_a_checkpoint_alone_says_what_is_missing_beside_it(comfy, prompt, models, part, told):
    place = models / f"alone-{part}"
    shutil.copytree(models / "tiny", place)
    shutil.rmtree(place / part) if (place / part).is_dir() else (place / part).unlink()
    ran = comfy.run(prompt().change("load", checkpoint=f"{place.name}/star.safetensors"))
    refused(ran, str(place), told)
    assert "--" not in ran.complaint, "an option of the command line"


def test_a_mask_or_a_start_scale_without_start_tokens_is_refused(comfy, prompt):
    refused(comfy.run(prompt(start_scale=2)), "start_scale is 2", "VQ Encode")
    graph = prompt().add("mask", "TestSource", path=comfy.array(np.ones((1, 64, 64)), "white"))
    refused(comfy.run(graph.change("sample", mask=["mask", 0])), "a mask is connected", "VQ Encode")


def test_an_image_of_another_size_is_refused_with_the_sizes_and_the_node_that_helps(comfy, prompt):
    graph = prompt().add("image", "TestSource", path=comfy.array(np.ones((1, 70, 64, 3)), "odd"))
    graph.add("encode", "StarVQEncode", model=["load", 0], vqvae=["load", 2], image=["image", 0])
    ran = comfy.run(graph.probe("encode", name="encoded"))
    refused(ran, "64x70 pixels", "Trained: 64x64", "Upscale Image")


def test_batches_that_do_not_match_are_refused(comfy, prompt):
    graph = prompt(batch_size=2)
    graph.add("again", "StarSample", model=["load", 0], positive=["text", 0], start_tokens=["sample", 0])
    graph = graph.change("again", batch_size=3, start_scale=2).probe("again", name="varied")
    refused(comfy.run(graph), "2 pictures for a batch of 3")
    graph = graph.change("again", batch_size=2).add(
        "mask", "TestSource", path=comfy.array(np.ones((3, 64, 64)), "3")
    )
    refused(comfy.run(graph.change("again", mask=["mask", 0])), "3 masks for a batch of 2")


@pytest.mark.parametrize(("ours", "theirs"), [("tiny", "coarse"), ("coarse", "tiny")])
@pytest.mark.parametrize("side", [0, 64])
def test_start_tokens_of_another_model_s_scales_are_refused(comfy, prompt, ours, theirs, side):
    graph = prompt().change("load", checkpoint=f"{theirs}/star.safetensors")
    graph.add("ours", "StarLoad").add("again", "StarSample", model=["ours", 0], positive=["text", 0])
    graph = graph.change("ours", checkpoint=f"{ours}/star.safetensors")
    graph = graph.change("again", start_tokens=["sample", 0], start_scale=1, width=side, height=side)
    refused(comfy.run(graph.probe("again", name="varied")), "of another model", "tiny draws", "VQ Encode")


def test_a_mask_over_a_picture_that_was_drawn_smooth_is_refused(comfy, prompt):
    graph = prompt().add("smooth", "StarScaleSchedule", schedule="smooth")
    graph = graph.change("sample", schedule=["smooth", 0])
    graph.add("mask", "TestSource", path=comfy.array(np.zeros((1, 64, 64)), "black"))
    graph.add("again", "StarSample", model=["load", 0], positive=["text", 0], start_tokens=["sample", 0])
    graph = graph.probe("again", name="varied").change("again", start_scale=2)
    assert comfy.run(graph).ok, "its coarse scales may be taken: they are whole"
    refused(comfy.run(graph.change("again", mask=["mask", 0])), "drawn smooth", "VQ Encode")


def test_a_mask_too_thin_for_any_token_is_refused(comfy, prompt):
    thin = np.zeros((1, 64, 64))
    thin[:, 30:32] = 1
    graph = prompt().add("mask", "TestSource", path=comfy.array(thin[:, 1:], "thin"))
    graph.add("again", "StarSample", model=["load", 0], positive=["text", 0], start_tokens=["sample", 0])
    graph = graph.change("again", mask=["mask", 0]).probe("again", name="varied")
    refused(comfy.run(graph), "too thin", "16x16 tokens", "grow it")


def test_numbers_below_0_that_come_over_a_link_are_refused(comfy, prompt):
    graph = prompt().add("less", "TestNumber", text="-1")
    graph.add("again", "StarSample", model=["load", 0], positive=["text", 0], start_tokens=["sample", 0])
    refused(
        comfy.run(graph.change("again", start_scale=["less", 0]).probe("again", name="varied")),
        "start_scale is -1",
        "6 scales",
    )
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0], last_scale=["less", 0])
    refused(comfy.run(graph.probe("decode", name="shown")), "last_scale is -1", "6 scales")
    graph = graph.change("decode", last_scale=0)
    graph.add("grid", "StarLabelledGrid", images=["decode", 0], labels="", columns=["less", 0])
    refused(comfy.run(graph.probe("grid", name="laid")), "columns is -1")
    graph = prompt().add("none", "TestNumber", text="0")
    graph.add("both", "StarPromptFromScale", conditioning=["text", 0], later=["text", 0])
    graph = graph.change("both", start_scale=["none", 0]).change("sample", positive=["both", 0])
    refused(comfy.run(graph), "start_scale is 0", "counted from 1")


def test_half_an_emoji_in_a_prompt_is_refused(comfy, prompt):
    refused(comfy.run(prompt(text="a red \ud83d car")), "half a character", "its place 7", "\\ud83d")


def test_scales_beyond_the_model_s_are_refused(comfy, prompt):
    graph = prompt().add(
        "both", "StarPromptFromScale", conditioning=["text", 0], later=["text", 0], start_scale=7
    )
    refused(comfy.run(graph.change("sample", positive=["both", 0])), "scale 7", "6 scales")
    graph = prompt().add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0], last_scale=7)
    refused(comfy.run(graph.probe("decode", name="image")), "last_scale is 7", "6 scales")


def test_more_labels_than_pictures_are_refused(comfy, empty_prompt):
    graph = empty_prompt().add("image", "TestSource", path=comfy.array(np.ones((1, 64, 64, 3)), "one"))
    graph.add("grid", "StarLabelledGrid", images=["image", 0], labels="a\nb", columns=0)
    refused(comfy.run(graph.probe("grid")), "2 labels for 1 pictures")
