"""A prompt's way through the server: the queue, what the browser is told meanwhile, the picture at the end."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.parse

import numpy as np
import pytest
from PIL import Image

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
TEXTS = [f"scale {i + 1}/{len(SIDES)} · {side}x{side}" for i, side in enumerate(SIDES)]
PIXELS = 64


def as_array(file):
    picture = Image.open(io.BytesIO(file)).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255


def without_fingerprints(nodes):
    """ComfyUI adds to the prompt what nodes say of their files' state."""
    return {name: {k: v for k, v in node.items() if k != "is_changed"} for name, node in nodes.items()}


def test_a_queued_prompt_leaves_its_picture_in_the_history_and_view_gives_it(client, prompt):
    # A blank, a cached or a foreign picture fails: it is not flat, carries this very prompt, and another
    # seed's differs from it.
    wanted = prompt(seed=11)
    first, second = client.run(wanted), client.run(prompt(seed=12))
    assert first.ended == "execution_success"
    (file,), (other,) = first.files(), second.files()
    picture = Image.open(io.BytesIO(file))
    assert picture.size == (PIXELS, PIXELS)
    assert without_fingerprints(json.loads(picture.text["prompt"])) == wanted
    assert as_array(file).std() > 0.05
    assert np.abs(as_array(file) - as_array(other)).mean() > 0.01


def test_a_saved_picture_says_nothing_of_the_machine(client, prompt):
    # The fingerprint of the files is in there (else this would test nothing), but no path to them.
    (file,) = client.run(prompt(seed=13)).files()
    told = Image.open(io.BytesIO(file)).text["prompt"]
    assert json.loads(told)["load"]["is_changed"]
    assert str(client.server.base) not in told
    assert ".safetensors" not in told


def test_prompts_that_wait_are_drawn_in_their_order(client, prompt):
    # Six orders are possible, and the queue has to be seen with two waiting: one after another cannot pass.
    names = [client.queue(prompt(seed=20 + i, batch_size=8)) for i in range(3)]
    waiting = [entry[1] for entry in client.server.get("/queue")["queue_pending"]]
    started = []
    for name in names:
        run = client.follow(name)
        started += [e.data["prompt_id"] for e in run.events if e.kind == "execution_start"]
        assert len(run.files()) == 8
    assert sorted(waiting) == sorted(names[1:])
    assert started == names


def test_every_scale_is_told_with_its_number_and_side(client, prompt):
    run = client.run(prompt(seed=31, preview="every scale"))
    # The lines are compared whole and in their order: one left out, doubled or of another scale fails.
    assert run.texts == TEXTS
    bars = [(e.data["value"], e.data["max"]) for e in run.events if e.kind == "progress"]
    assert [bar for i, bar in enumerate(bars) if bar not in bars[:i]] == [
        (k + 1, len(SIDES)) for k in range(len(SIDES))
    ]


def test_every_scale_shows_its_own_picture_and_the_last_one_is_the_result(client, prompt):
    run = client.run(prompt(seed=32, preview="every scale"))
    events = [e for e in run.events if e.kind == "preview"]
    assert [e.data["node_id"] for e in events] == ["sample"] * len(SIDES)
    frames = [as_array(e.picture) for e in events]
    steps = [np.abs(a - b).mean() for a, b in zip(frames, frames[1:], strict=False)]
    # Frames that repeat give 0; JPEG and scaling alone stay under 0.01, as the last frame shows.
    assert min(steps) > 0.002, steps
    (result,) = run.pictures()
    result = np.frombuffer(result, np.uint8).reshape(PIXELS, PIXELS, 3) / 255
    far = [float(np.abs(frame - result).mean()) for frame in frames]
    # Frames in the wrong order, of another picture of the batch or of another prompt are far at the end.
    assert far[-1] < 0.015, far
    assert far[0] > 5 * far[-1], far


def test_without_previews_nothing_but_progress_is_told(client, prompt):
    run = client.run(prompt(seed=33, preview="off"))
    assert run.texts == TEXTS
    assert not [e for e in run.events if e.kind in ("preview", "binary 1")]


def test_the_editor_is_told_a_checkpoint_s_sides_and_the_presets_for_them(client, prompt):
    chosen = prompt(seed=1)["load"]["inputs"]
    ask = {name: chosen[name] for name in ("checkpoint", "preset") if name in chosen}
    facts = client.server.get("/star/model?" + urllib.parse.urlencode(ask))
    assert facts["sides"] == [str(side) for side in SIDES]
    assert facts["has_sampler"]
    told = client.server.get("/star/presets?" + urllib.parse.urlencode({"maps": " ".join(facts["sides"])}))
    presets = {preset["name"]: preset for preset in told["presets"]}
    assert "top_k 600" in presets["top-k"]["schedule"]
    assert presets["top-k"]["sampler"] is None
    assert presets["sampler"]["sampler"]["strategy"]


def test_what_the_editor_cannot_be_told_says_why(client):
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.server.get("/star/model?checkpoint=none.safetensors")
    assert refused.value.code == 400
    assert "none.safetensors" in json.loads(refused.value.read())["error"]
