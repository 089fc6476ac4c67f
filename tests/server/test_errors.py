"""What goes wrong: each time a sentence for the user, and the next prompt works."""

from __future__ import annotations

import json

import pytest
from client import RefusedError


@pytest.fixture(autouse=True)
def alive(client, prompt):
    """After every error the same server draws a picture, and the same one as before it."""
    first = client.run(prompt(seed=1)).pictures()
    client.free()
    yield
    client.free()
    # Drawn anew, by networks loaded anew: a picture from a cache would say nothing.
    again = client.run(prompt(seed=1))
    assert "sample" not in [n for e in again.events if e.kind == "execution_cached" for n in e.data["nodes"]]
    assert again.pictures() == first


def refusal(client, nodes) -> str:
    """Return what POST /prompt answers to a prompt that must not start."""
    with pytest.raises(RefusedError) as caught:
        client.queue(nodes)
    return json.dumps(caught.value.answer, ensure_ascii=False)


def failure(client, nodes, node: str) -> str:
    """Return what the user reads of a prompt that fails at a node: the same by websocket and in the history."""
    run = client.run(nodes)
    assert run.ended == "execution_error", run.events[-1]
    said = run.events[-1].data
    assert said["node_id"] == node
    kept = dict(run.history["status"]["messages"])["execution_error"]
    assert kept["exception_message"] == said["exception_message"]
    assert run.history["status"]["status_str"] == "error"
    return str(said["exception_message"])


def test_a_schedule_with_a_typo_is_refused_with_the_place(client, prompt):
    nodes = prompt(seed=2, schedule=["schedule", 0])
    settings = {"schedule": "maps 1 2 3 4 5 6 8 10 13 16\ntop_q 0.8"}
    nodes["schedule"] = {"class_type": "StarScaleSchedule", "inputs": settings}
    said = refusal(client, nodes)
    assert "top_q" in said
    assert "(character" in said


def test_a_schedule_of_another_model_fails_at_the_sampling_node(client, prompt):
    nodes = prompt(seed=3, schedule=["schedule", 0])
    settings = {"schedule": "maps 1 2 4 6 10 16\ntop_k 600"}
    nodes["schedule"] = {"class_type": "StarScaleSchedule", "inputs": settings}
    said = failure(client, nodes, "sample")
    assert "1 2 3 4 5 6 8 10 13 16" in said
    assert "6 scales" in said


def test_a_missing_file_is_named_with_its_folder(client, prompt):
    nodes = prompt(seed=4)
    nodes["load"]["inputs"]["checkpoint"] = "star-1024/star.safetensors"
    said = refusal(client, nodes)
    assert "star-1024/star.safetensors" in said
    assert str(client.server.base / "models" / "star") in said


def test_a_file_that_is_cut_off_fails_at_the_loading_node(client, prompt):
    star = client.server.base / "models" / "star"
    (star / "star-cut.safetensors").write_bytes((star / "tiny.safetensors").read_bytes()[:5000])
    nodes = prompt(seed=5)
    nodes["load"]["inputs"]["checkpoint"] = "star-cut.safetensors"
    assert "star-cut.safetensors" in failure(client, nodes, "load")


def test_out_of_memory_while_drawing_reaches_the_user_and_leaves_no_cache(client, prompt):
    client.post("/star_test/fault", {"block": 1})
    said = failure(client, prompt(seed=6, batch_size=16), "sample")
    assert "out of memory" in said
    # The keys and values of the failed batch are gone, whoever keeps the exception.
    client.rest()
    assert client.alive(collect=True)["LayerCache"] == 0
    assert client.post("/star_test/fault", {}) == {"block": 0, "decoder": 0}


def test_out_of_memory_while_decoding_goes_on_in_smaller_pieces(client, prompt):
    whole = client.run(prompt(seed=7, batch_size=2)).pictures()
    client.free()
    client.post("/star_test/fault", {"decoder": 1})
    run = client.run(prompt(seed=7, batch_size=2))
    assert run.ended == "execution_success", run.events[-1]
    warnings = [e.data[1] for e in run.events if e.kind == "text" and e.data[0] == "decode"]
    assert warnings == ["⚠ out of memory decoding whole: trying one by one"]
    # Other batch sizes round otherwise: a step of a pixel's 255 is allowed, another picture is not.
    for one, other in zip(run.pictures(), whole, strict=True):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 2


def test_out_of_memory_that_no_smaller_piece_avoids_reaches_the_user(client, prompt):
    # Whole, in strips, in tiles: the last failure is the user's, none is left for the next prompt.
    client.post("/star_test/fault", {"decoder": 3})
    assert "out of memory" in failure(client, prompt(seed=8), "decode")
    assert client.post("/star_test/fault", {}) == {"block": 0, "decoder": 0}
