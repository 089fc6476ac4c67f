"""While it runs: progress, previews, cancelling, reuse of scales, and memory that is given back."""

from __future__ import annotations

import os
import shutil

import pytest

from star_core.memory import decoding_bytes
from star_core.stored import FileHeader, resolve_config

SCALES, DEPTH = 6, 2
SIDES = (1, 2, 4, 6, 10, 16)


def progress(ran):
    return [text for node, text in ran.texts if node == "sample"]


def test_every_scale_says_its_number_and_its_side(comfy, prompt):
    ran = comfy.run(prompt(seed=100))
    assert progress(ran) == [f"scale {i + 1}/6 · {side}x{side}" for i, side in enumerate(SIDES)]


def test_a_size_that_was_not_trained_is_marked(comfy, prompt):
    said = progress(comfy.run(prompt(seed=101, width=128, height=32)))
    assert said[-1] == "scale 6/6 · 32x8 · untrained size"


@pytest.mark.parametrize(
    ("preview", "method", "shown"),
    [("every scale", "none", SCALES), ("off", "auto", 0), ("auto", "none", 0)],
)
def test_previews_follow_the_choice_and_comfyui_s_own(comfy, prompt, preview, method, shown):
    seed = 200 + shown + len(preview) + len(method)
    ran = comfy.run(prompt(seed=seed, preview=preview), preview_method=method)
    pictures = [size for _, _, size in ran.previews if size]
    assert pictures == [[64, 64]] * shown
    assert ran.previews[-1][:2] == [SCALES, SCALES]


def test_auto_shows_the_first_scale_where_comfyui_previews(comfy, prompt):
    ran = comfy.run(prompt(seed=250, preview="auto"), preview_method="latent2rgb")
    assert [size for _, _, size in ran.previews if size][0] == [64, 64]


@pytest.mark.parametrize("block", [1, 4, 11])
def test_cancel_acts_at_the_next_block_and_the_next_prompt_works(comfy, prompt, block):
    whole = comfy.run(prompt(seed=299)).tokens()
    comfy.run(prompt(seed=1))
    ran = comfy.run(prompt(seed=299), faults={"interrupt_at_block": block}, inspect=True)
    assert ran.interrupted
    assert not ran.ok
    # The check is made before a block: of the twelve, only the one in which Cancel was pressed ends.
    assert ran.count["blocks"] == block
    assert ran.hooks == 0
    again = comfy.run(prompt(seed=299), inspect=True)
    assert again.tokens() == whole
    assert again.caches == 0


@pytest.mark.parametrize(("fault", "seed"), [("oom_at_block", 300), ("error_at_block", 301)])
def test_an_error_reaches_the_user_and_the_next_prompt_works(comfy, prompt, fault, seed):
    ran = comfy.run(prompt(seed=seed), faults={fault: 7}, inspect=True)
    assert not ran.ok
    assert ran.error_node == "sample"
    assert "made up" in ran.error
    assert ran.hooks == 0
    again = comfy.run(prompt(seed=seed), inspect=True)
    assert len(again.tokens()) == SCALES
    assert again.caches == 0


def test_only_late_scales_are_drawn_again_and_the_result_is_that_of_a_whole_run(comfy, prompt):
    graph = prompt(seed=400).add("schedule", "StarScaleSchedule", schedule="top_k 20*6")
    graph = graph.change("sample", schedule=["schedule", 0])
    late = graph.change("schedule", schedule="top_k 20*4 3*2")
    first = comfy.run(graph)
    assert first.count["drawn"] == SCALES
    resumed = comfy.run(late)
    assert resumed.count["drawn"] == 2
    comfy.run(prompt(seed=401))
    whole = comfy.run(late)
    assert whole.count["drawn"] == SCALES
    assert resumed.tokens() == whole.tokens()
    assert resumed.tokens()[:4] == first.tokens()[:4]
    assert resumed.tokens()[4:] != first.tokens()[4:]


def test_a_late_prompt_draws_late_scales_alone(comfy, prompt):
    graph = prompt(seed=410).add("other", "StarCLIPEncode", text_encoder=["load", 1], text="a blue rocket")
    graph.add("both", "StarPromptFromScale", conditioning=["text", 0], later=["other", 0], start_scale=5)
    graph = graph.change("sample", positive=["both", 0])
    assert comfy.run(graph).count["drawn"] == SCALES
    assert comfy.run(graph.change("other", text="a green tree")).count["drawn"] == 2


def test_a_cancelled_run_goes_on_where_it_stopped(comfy, prompt):
    comfy.run(prompt(seed=1))
    ran = comfy.run(prompt(seed=420), faults={"interrupt_at_block": 9})
    assert ran.interrupted
    assert comfy.run(prompt(seed=420)).count["drawn"] == 2


def test_a_run_that_is_cancelled_while_it_reads_what_is_known_loses_none_of_it(comfy, prompt):
    graph = prompt(seed=430).add("schedule", "StarScaleSchedule", schedule="top_k 20*6")
    graph = graph.change("sample", schedule=["schedule", 0])
    comfy.run(graph)
    graph = graph.change("schedule", schedule="top_k 20*5 3")
    assert comfy.run(graph, faults={"interrupt_at_block": 3}).interrupted
    assert comfy.run(graph).count["drawn"] == 1


def test_each_node_goes_on_from_its_own_last_run(comfy, prompt):
    graph = prompt(seed=440).add("schedule", "StarScaleSchedule", schedule="top_k 20*6")
    graph = graph.change("sample", schedule=["schedule", 0])
    graph.add("other", "StarSample", model=["load", 0], positive=["text", 0], schedule=["schedule", 0])
    graph = graph.change("other", seed=441).probe("other", name="second")
    assert comfy.run(graph).count["drawn"] == 2 * SCALES
    assert comfy.run(graph.change("schedule", schedule="top_k 20*5 3")).count["drawn"] == 2


def test_the_runs_of_longest_ago_are_forgotten_where_they_take_too_much(comfy, prompt):
    graph = prompt(seed=445).add("schedule", "StarScaleSchedule", schedule="top_k 20*6")
    graph = graph.change("sample", schedule=["schedule", 0])
    graph.add("other", "StarSample", model=["load", 0], positive=["text", 0], schedule=["schedule", 0])
    graph = graph.change("other", seed=446).probe("other", name="second")
    few = {"bytes_remembered": 1}
    assert comfy.run(graph, faults=few).count["drawn"] == 2 * SCALES
    # The latest one is kept whatever it takes.
    again = comfy.run(graph.change("schedule", schedule="top_k 20*5 3"), faults=few)
    assert again.count["drawn"] in (SCALES + 1, 2 * SCALES), "the other one's last run was still there"


def test_a_checkpoint_chosen_over_a_link_is_loaded_once(comfy, prompt):
    graph = prompt(seed=450).add("name", "TestText", text="tiny/star.safetensors")
    graph = graph.change("load", checkpoint=["name", 0])
    assert comfy.run(graph).count["drawn"] == SCALES
    assert comfy.run(graph).count["drawn"] == 0
    assert comfy.run(graph.change("name", text="plain/star.safetensors")).count["drawn"] == SCALES


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("text_encoder/config.json", True),
        ("tokenizer/vocab.json", True),
        ("tokenizer/merges.txt", True),
        ("another.safetensors", False),
    ],
)
def test_what_a_model_is_made_of_is_read_again_when_it_changes_and_nothing_else(
    comfy, prompt, models, file, again
):
    place = models / f"changing-{file.replace('/', '-')}"
    shutil.copytree(models / "tiny", place)
    graph = prompt(seed=455).change("load", checkpoint=f"{place.name}/star.safetensors")
    assert comfy.run(graph).count["drawn"] == SCALES
    (place / file).touch()
    os.utime(place / file, (10**9, 10**9))
    assert comfy.run(graph).count["drawn"] == (SCALES if again else 0)


def test_previews_asked_for_later_show_what_is_drawn_already(comfy, prompt):
    comfy.run(prompt(seed=460))
    ran = comfy.run(prompt(seed=460, preview="every scale"))
    assert ran.count["drawn"] == 0
    assert [size for _, _, size in ran.previews if size] == [[64, 64]] * SCALES
    assert len(progress(ran)) == SCALES


def test_a_full_memory_ends_previews_and_not_the_drawing(comfy, prompt):
    whole = comfy.run(prompt(seed=470)).tokens()
    comfy.run(prompt(seed=1))
    ran = comfy.run(prompt(seed=470, preview="every scale"), faults={"only_in_strips": 1})
    assert ran.tokens() == whole
    assert ran.count["decoded"] == 1, "it is not tried again at every scale"
    assert not [size for _, _, size in ran.previews if size]
    assert len(progress(ran)) == SCALES


def test_another_seed_takes_nothing_over(comfy, prompt):
    comfy.run(prompt(seed=430))
    assert comfy.run(prompt(seed=431)).count["drawn"] == SCALES


def test_decoding_falls_back_to_smaller_pieces_with_a_warning(comfy, prompt):
    graph = prompt(seed=500, batch_size=2)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    whole = comfy.run(graph).array("image")
    graph = graph.change("sample", seed=1)
    comfy.run(graph)
    graph = graph.change("sample", seed=500)
    ran = comfy.run(graph, faults={"largest_batch": 1})
    assert abs(ran.array("image") - whole).max() < 1e-4
    assert ["decode", "⚠ out of memory decoding whole: trying one by one"] in ran.texts


def test_a_cpu_decodes_a_large_batch_in_pieces_between_which_cancel_acts(comfy, prompt, models):
    config = resolve_config(FileHeader(models / "tiny" / "star.safetensors"), None)
    most = 2**26 // decoding_bytes(config.vqvae, config.maps[-1], 1, itemsize=4)
    graph = prompt(seed=509, batch_size=most + 1)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    ran = comfy.run(graph, faults={"largest_batch": most})
    assert len(ran.array("image")) == most + 1
    assert not [text for _, text in ran.texts if "out of memory" in text]


def test_memory_that_is_full_in_words_alone_is_full(comfy, prompt):
    graph = prompt(seed=507, batch_size=2)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    said = "MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)"
    ran = comfy.run(graph, faults={"largest_batch": 1, "out_of_memory_in_words": said})
    assert ran.ok
    assert ["decode", "⚠ out of memory decoding whole: trying one by one"] in ran.texts


def test_tiles_ask_for_the_room_of_a_tile(comfy, prompt):
    graph = prompt(seed=508)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    whole = comfy.run(graph, faults={"tile": 8}).reply["room"][-1]
    tiled = comfy.run(graph.change("decode", tiled=True), faults={"tile": 8}).reply["room"][-1]
    assert whole == 4 * tiled, "of 16x16 cells a tile of 8x8 is a quarter"


def test_as_many_pictures_are_decoded_and_encoded_together_as_fit(comfy, prompt):
    graph = prompt(seed=505, batch_size=3)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    graph.add("encode", "StarVQEncode", model=["load", 0], vqvae=["load", 2], image=["decode", 0])
    graph.probe("encode", name="encoded")
    ran = comfy.run(graph)
    assert (ran.count["decoded"], ran.count["encoded"]) == (1, 1)
    together, encoded = ran.array("image"), ran.tokens("encoded")
    comfy.run(graph.change("sample", seed=1))
    ran = comfy.run(graph, faults={"free_memory": 1})
    assert (ran.count["decoded"], ran.count["encoded"]) == (3, 3)
    assert abs(ran.array("image") - together).max() < 1e-4
    assert ran.tokens("encoded") == encoded
    assert not [text for _, text in ran.texts if "memory" in text]


def test_where_even_a_tile_does_not_fit_the_error_is_the_user_s(comfy, prompt):
    graph = prompt(seed=510)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    ran = comfy.run(graph, faults={"largest_side": 1})
    assert not ran.ok
    assert ran.error_node == "decode"
    assert ran.count["decoded"] == 3
    assert [text for _, text in ran.texts if "memory" in text] == [
        f"⚠ out of memory decoding {way}: trying {following}"
        for way, following in (("whole", "in strips"), ("in strips", "in tiles"))
    ]


def test_strips_under_comfyui_s_layers_are_the_same_picture(comfy, prompt):
    graph = prompt(seed=540, batch_size=2)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    ran = comfy.run(graph)
    whole = ran.array("image")
    assert ran.count["strips"] == 0
    comfy.run(graph.change("sample", seed=1))
    ran = comfy.run(graph, faults={"only_in_strips": 1, "strip": 300})
    assert abs(ran.array("image") - whole).max() < 1e-4
    assert ran.count["strips"] > 0
    assert ran.count["decoded"] == 1 + 1 + 2


def test_tiled_decoding_of_a_map_that_fits_one_tile_is_the_whole_picture(comfy, prompt):
    graph = prompt(seed=520)
    graph.add("decode", "StarVQDecode", vqvae=["load", 2], tokens=["sample", 0]).probe("decode", name="image")
    whole = comfy.run(graph).array("image")
    assert abs(comfy.run(graph.change("decode", tiled=True)).array("image") - whole).max() < 1e-5


def test_dynamic_memory_s_layers_are_filled_like_any_others(comfy, models):
    # Layers of newer versions begin as nothing where ComfyUI streams weights; then a strict load knows no name.
    from star_core.checkpoint import load_networks

    _, networks = load_networks(models / "tiny" / "star.safetensors")
    assert comfy.ask("build_lazily")["parameters"] == sum(1 for _ in networks.parameters())


@pytest.mark.parametrize("products", [True, False])
def test_a_cpu_without_bfloat16_products_multiplies_in_float32(comfy, products):
    found = comfy.ask("multiplied", products=products)
    wanted = "torch.bfloat16" if products else "torch.float32"
    assert [dtypes for dtypes in found["seen"] if dtypes != [wanted, wanted]] == []
    assert len(found["seen"]) == 2, "ComfyUI multiplies by torch.nn.functional"
    assert found["made"] == ["torch.bfloat16", "torch.bfloat16"]


def test_free_really_frees(comfy, prompt):
    comfy.run(prompt(seed=600))
    freed = comfy.ask("free")
    assert freed["before"] >= 1
    assert freed["after"] == 0
    assert freed["loaded"] == 0
    assert len(comfy.run(prompt(seed=601)).tokens()) == SCALES
