"""Ids, inputs, types, defaults and outputs are frozen: shared workflows depend on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"
LOCALES = Path(__file__).parents[2] / "locales"
FROZEN = FIXTURES / "nodes.json"
LISTS = {"StarLoad": ("checkpoint", "text_encoder", "vqvae")}
"""Inputs whose choices are files; the first one stands still."""


@pytest.fixture(scope="module")
def info(comfy):
    return comfy.ask("object_info")


def frozen(info):
    """Return of /object_info what a saved workflow depends on."""
    record = {}
    for name, node in info.items():
        inputs = []
        for category in ("required", "optional"):
            for field, (kind, *rest) in node["input"].get(category, {}).items():
                options = dict(rest[0]) if rest else {}
                choices = kind if isinstance(kind, list) else options.get("options")
                if field in LISTS.get(name, ()):
                    choices = choices[:1]
                inputs.append(
                    {
                        "id": field,
                        "type": "COMBO" if choices else kind,
                        "optional": category == "optional",
                        **{
                            key: options[key]
                            for key in ("default", "min", "max", "multiline")
                            if key in options
                        },
                        **({"choices": choices} if choices else {}),
                    }
                )
        record[name] = {
            "display_name": node["display_name"],
            "category": node["category"],
            "inputs": inputs,
            "outputs": list(zip(node["output_name"], node["output"], strict=True)),
        }
    return json.loads(json.dumps(record))


def test_the_contract_is_as_it_was_frozen(info):
    assert frozen(info) == json.loads(FROZEN.read_text(encoding="utf-8"))


def test_every_node_input_and_output_explains_itself(info):
    for name, node in info.items():
        assert len(node["description"]) > 30, name
        fields = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert fields
        for field, (_, options) in fields.items():
            assert len(options.get("tooltip", "")) > 20, f"{name}.{field} has no tooltip"
        assert all(node["output_name"]), name
        assert all(node["output_tooltips"]), f"{name} has outputs without a tooltip"


def test_paired_negative_prompts_are_explained(info):
    _, options = info["StarSample"]["input"]["optional"]["negative"]
    assert "start token and the causal sampler alone" in options["tooltip"]


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_locales_cover_every_node_input_and_output(info, language):
    texts = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(info)
    for name, node in info.items():
        ours = texts[name]
        fields = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert set(ours["inputs"]) == set(fields), name
        assert set(ours["outputs"]) == {str(i) for i in range(len(node["output"]))}, name
        for field in (*ours["inputs"].values(), *ours["outputs"].values()):
            assert field["name"]
            assert field["tooltip"]
        assert ours["display_name"]
        assert ours["description"]
        if language == "en":
            assert ours["description"] == node["description"]
            assert {f: t["tooltip"] for f, t in ours["inputs"].items()} == {
                f: options["tooltip"] for f, (_, options) in fields.items()
            }


def test_the_editor_is_told_a_model_s_sides_and_its_presets(comfy):
    facts = comfy.ask("answer", name="model_facts", query={"checkpoint": "tiny/star.safetensors"})
    own = facts.pop("own")
    assert own["name"] == "checkpoint's own"
    assert own["sampler"] is None
    assert "temperature 2" in own["schedule"]
    assert "maps 1 2 4 6 10 16" in own["schedule"]
    assert facts == {
        "name": "tiny",
        "sides": ["1", "2", "4", "6", "10", "16"],
        "codebook": 64,
        "has_sampler": True,
    }
    table = comfy.ask("answer", name="preset_table", query={"maps": "1 2 4 6 10 16"})["presets"]
    by_name = {preset["name"]: preset for preset in table}
    assert by_name["top-k"]["sampler"] is None
    assert by_name["demo-1024"]["sampler"]["strategy"] == "official"
    assert "top_k 600" in by_name["demo-1024"]["schedule"]
    assert "steps" not in by_name["demo-1024"]["schedule"]
    assert "steps 0*4 8 15" in by_name["demo-1024"]["sampler"]["steps"]
