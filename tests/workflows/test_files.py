"""The workflow files as files: what they name, how they are laid out, and that both forms say the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
FROZEN = json.loads((ROOT / "tests" / "fixtures" / "nodes.json").read_text())
CORE = {"SaveImage", "PreviewImage", "ImageScale", "ImageBatch", "SolidMask", "MaskComposite", "MaskToImage"}
WANTED = {
    "text_to_picture",
    "five_nodes_with_schedules",
    "schedule_comparison",
    "coarse_to_fine",
    "prompt_per_scale",
    "variation",
    "inpainting",
    "released_1024",
}
CONTROL = {"fixed", "increment", "decrement", "randomize"}
TITLE = 34


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def twin(path: Path) -> dict[str, Any]:
    return read(FOLDER / "api" / path.name)


def name(path: Path) -> str:
    return path.stem


every = pytest.mark.parametrize("path", FILES, ids=name)


def test_there_is_a_workflow_for_everything_the_pack_does():
    assert {path.stem for path in FILES} == WANTED
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == WANTED


@every
def test_it_has_a_thumbnail_for_the_template_browser(path: Path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        picture.load()
        assert picture.format == "JPEG"
        assert min(picture.size) >= 256
        assert sum(map(bool, picture.convert("L").histogram())) > 20, "a blank thumbnail"


@every
def test_it_uses_this_pack_and_core_nodes_alone(path: Path):
    kinds = {node["type"] for node in read(path)["nodes"]}
    assert kinds <= set(FROZEN) | CORE | {"MarkdownNote"}
    assert {"StarLoad", "StarCLIPEncode", "StarSample"} <= kinds


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for child in children for text in texts(child)]


@every
def test_files_are_named_relatively(path: Path):
    for node in twin(path).values():
        for text in texts(node["inputs"]):
            assert not text.startswith(("/", "~", "\\")), text
            assert ".." not in text, text
            assert ":\\" not in text, text


@every
def test_links_join_what_both_ends_say(path: Path):
    flow = read(path)
    nodes = {node["id"]: node for node in flow["nodes"]}
    assert len(nodes) == len(flow["nodes"])
    for number, origin, output, target, slot, kind in flow["links"]:
        source, sink = nodes[origin]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in source["links"]
        assert sink["link"] == number
        assert source["type"] == sink["type"] == kind
    linked = [entry["link"] for node in flow["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(linked) == sorted(link[0] for link in flow["links"])


@every
def test_no_node_lies_on_another(path: Path):
    boxes = [
        (
            node["pos"][0],
            node["pos"][1] - TITLE,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in read(path)["nodes"]
    ]
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{one} and {other}"


def spelled(flow: dict[str, Any]) -> dict[str, Any]:
    """Return the API form that the canvas form means, as the frontend writes it."""
    links = {link[0]: link for link in flow["links"]}
    prompt = {}
    for node in flow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = [value for value in node["widgets_values"] if value not in CONTROL]
        inputs: dict[str, Any] = {}
        for entry in node["inputs"]:
            if entry["link"] is not None:
                _, origin, output, *_ = links[entry["link"]]
                inputs[entry["name"]] = [str(origin), output]
            elif "widget" in entry:
                inputs[entry["name"]] = values.pop(0)
        assert not values, f"{node['type']} has values without inputs: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@every
def test_both_forms_say_the_same(path: Path):
    api = {
        number: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for number, node in twin(path).items()
    }
    assert api == spelled(read(path))


@every
def test_inputs_are_those_of_the_frozen_nodes(path: Path):
    for node in twin(path).values():
        if node["class_type"] in FROZEN:
            known = {entry["id"] for entry in FROZEN[node["class_type"]]["inputs"]}
            assert set(node["inputs"]) <= known
