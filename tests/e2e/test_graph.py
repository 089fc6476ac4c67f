"""From an empty canvas to a picture, by mouse and keyboard, and back from the saved picture to the graph."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from browser import ComfyPage
    from comfy_server import Server

PROMPT = "a red apple"

DROP = """async ([url, name]) => {
    const bytes = await (await fetch(url)).arrayBuffer();
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type: "image/png" }));
    const canvas = app.canvas.canvas;
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const at = { bubbles: true, cancelable: true, clientX: left + width * 0.7, clientY: top + height * 0.9 };
    for (const kind of ["dragenter", "dragover", "drop"])
        canvas.dispatchEvent(new DragEvent(kind, { ...at, dataTransfer: transfer }));
}"""

PICTURE = """(id) => {
    const node = app.canvas.graph.getNodeById(id);
    const shown = document.querySelector(`[data-node-id="${id}"] img[src*="/view"]`) ?? node.imgs?.[0];
    return Boolean(shown?.complete && shown.naturalWidth > 0 && shown.src.includes("star_e2e"));
}"""


@dataclass(frozen=True)
class Graph:
    load: int
    encode: int
    schedule: int
    sample: int
    decode: int
    save: int


def build(comfy: ComfyPage) -> Graph:
    """Add the nodes by search and drag the links between them, away from the edges, where a drag scrolls."""
    comfy.look_at(0, 0, 0.7)
    graph = Graph(
        load=comfy.add_by_search("Load STAR", "StarLoad", 360, 160),
        encode=comfy.add_by_search("CLIP Encode (STAR)", "StarCLIPEncode", 360, 600),
        schedule=comfy.add_by_search("Scale Schedule", "StarScaleSchedule", 740, 160),
        sample=comfy.add_by_search("Scale-wise Sample", "StarSample", 1140, 160),
        decode=comfy.add_by_search("VQ Decode", "StarVQDecode", 1400, 160),
        save=comfy.add_by_search("Save Image", "SaveImage", 1400, 460),
    )
    for origin, output, target, name in (
        (graph.load, "model", graph.schedule, "model"),
        (graph.load, "text_encoder", graph.encode, "text_encoder"),
        (graph.load, "model", graph.sample, "model"),
        (graph.encode, "conditioning", graph.sample, "positive"),
        (graph.schedule, "schedule", graph.sample, "schedule"),
        (graph.load, "vqvae", graph.decode, "vqvae"),
        (graph.sample, "tokens", graph.decode, "tokens"),
        (graph.decode, "image", graph.save, "images"),
    ):
        comfy.drag_link(origin, output, target, name)
    comfy.write(graph.encode, "text", PROMPT)
    comfy.write(graph.save, "filename_prefix", "star_e2e")
    return graph


def wait_for_outputs(server: Server, prompt_id: str, comfy: ComfyPage) -> dict[str, Any]:
    for _ in range(240):
        history = server.get(f"/history/{prompt_id}")
        if prompt_id in history:
            record = history[prompt_id]
            assert record["status"]["status_str"] == "success", json.dumps(record["status"])[:3000]
            return dict(record["outputs"])
        comfy.settle(500)
    raise TimeoutError(f"the prompt did not end:\n{server.said()}")


def queue(comfy: ComfyPage, server: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """Press Run; return the prompt's nodes as sent, and what came of them."""
    before = set(server.get("/history"))
    sent = comfy.queue()["prompt"]
    for _ in range(240):
        new = set(server.get("/history")) - before
        if new:
            return sent, wait_for_outputs(server, new.pop(), comfy)
        comfy.settle(500)
    raise TimeoutError(f"nothing was queued:\n{server.said()}")


def of_kind(prompt: dict[str, Any], kind: str) -> dict[str, Any]:
    (node,) = [node for node in prompt.values() if node["class_type"] == kind]
    return dict(node["inputs"])


def test_from_an_empty_canvas_to_a_picture_and_back(comfy: ComfyPage, server: Server) -> None:
    graph = build(comfy)
    comfy.drag_bar(graph.schedule, "top_p", 4, 0.5)
    text, bars = comfy.value(graph.schedule, "schedule"), comfy.bar_values(graph.schedule, "top_p")
    assert bars[:4] == [0.8] * 4
    assert bars[4] == pytest.approx(0.5, abs=0.04)

    sent, outputs = queue(comfy, server)
    assert of_kind(sent, "StarScaleSchedule")["schedule"] == text, "the dragged value is in the queued prompt"
    assert "schedule_bars" not in of_kind(sent, "StarScaleSchedule"), "the bars are no input"
    assert of_kind(sent, "StarCLIPEncode")["text"] == PROMPT
    (picture,) = outputs[str(graph.save)]["images"]
    comfy.page.wait_for_function(PICTURE, arg=graph.save, timeout=20_000)
    comfy.shot("five-nodes")

    address = "/view?" + urllib.parse.urlencode(picture)
    with urllib.request.urlopen(server.url + address, timeout=30) as answer:
        assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
    comfy.start_empty()
    assert comfy.nodes("StarScaleSchedule") == []
    comfy.page.evaluate(DROP, [address, picture["filename"]])
    comfy.page.wait_for_function("app.canvas.graph._nodes.length === 6", timeout=20_000)
    comfy.settle(1500)
    (schedule,) = comfy.nodes("StarScaleSchedule")
    assert comfy.value(schedule, "schedule") == text
    assert comfy.bar_values(schedule, "top_p") == bars
    comfy.shot("dropped-png")


def test_the_server_refuses_a_broken_text_in_the_editors_words(comfy: ComfyPage, server: Server) -> None:
    broken = "maps 1 2 3 4 5 6 8 10 13 16\ntop_k 600 300"
    schedule = comfy.add("StarScaleSchedule", 80, 90, schedule=broken)
    load = comfy.add("StarLoad", 600, 90, checkpoint="tiny.safetensors")
    encode = comfy.add("StarCLIPEncode", 600, 420)
    sample = comfy.add("StarSample", 1050, 90)
    decode = comfy.add("StarVQDecode", 1400, 90)
    save = comfy.add("SaveImage", 1400, 300)
    for link in (
        (load, "text_encoder", encode, "text_encoder"),
        (load, "model", sample, "model"),
        (encode, "conditioning", sample, "positive"),
        (schedule, "schedule", sample, "schedule"),
        (load, "vqvae", decode, "vqvae"),
        (sample, "tokens", decode, "tokens"),
        (decode, "image", save, "images"),
    ):
        comfy.connect(*link)
    with comfy.page.expect_response(
        lambda r: r.request.method == "POST" and r.url.endswith("/prompt")
    ) as answered:
        comfy.page.get_by_role("button", name="Run", exact=True).first.click()
    assert answered.value.status == 400
    assert "2 values for 10 scales" in answered.value.text()
    assert "2 values for 10 scales" in comfy.editor(schedule).locator(".star-message").inner_text()
    comfy.press("Escape")


def test_help_pages_show_with_their_pictures(comfy: ComfyPage, server: Server) -> None:
    for kind, definition in server.get("/object_info").items():
        if not definition["python_module"].endswith("comfyui-star"):
            continue
        for page in (f"{kind}.md", f"{kind}/zh.md", f"{kind}/ja.md"):
            address = f"{server.url}/extensions/comfyui-star/docs/{page}"
            with urllib.request.urlopen(address, timeout=30) as answer:
                text = answer.read().decode()
            assert text.startswith("# "), page
            (picture,) = [line for line in text.splitlines() if line.startswith("![")]
            name = picture[picture.index("](") + 2 : picture.rindex(")")]
            # Links are relative to docs/, for translations too.
            with urllib.request.urlopen(
                f"{server.url}/extensions/comfyui-star/docs/{name}", timeout=30
            ) as answer:
                assert answer.headers["Content-Type"].startswith("image/"), name
