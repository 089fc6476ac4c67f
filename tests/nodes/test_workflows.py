"""Every shipped workflow in ComfyUI's own executor, with the shipped model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "workflows" / "api"
NEEDS_FILES = "released_1024"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))


def watched(name: str, empty_prompt):
    """Return a workflow whose pictures go to a probe instead of a file."""
    prompt = empty_prompt()
    prompt.nodes = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for number, node in prompt.nodes.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            prompt.nodes[number] = {"class_type": "TestProbe", "inputs": {"value": node["inputs"]["images"]}}
    return prompt


def probes(prompt) -> list[str]:
    return [number for number, node in prompt.nodes.items() if node["class_type"] == "TestProbe"]


def test_there_are_workflows_to_run():
    assert len(WORKFLOWS) >= 8
    assert NEEDS_FILES in WORKFLOWS


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name != NEEDS_FILES])
def test_a_workflow_draws_its_pictures(comfy, empty_prompt, name: str):
    prompt = watched(name, empty_prompt)
    ran = comfy.run(prompt)
    assert probes(prompt)
    for probe in probes(prompt):
        pictures = ran.array(probe)
        assert pictures.ndim == 4
        assert pictures.shape[-1] == 3
        assert np.isfinite(pictures).all()
        assert all(picture.std() > 0.02 for picture in pictures), "no picture is a flat colour"


def test_a_workflow_draws_the_same_again_and_another_with_another_seed(comfy, empty_prompt):
    prompt = watched("text_to_picture", empty_prompt)
    (probe,) = probes(prompt)
    first = comfy.run(prompt).array(probe)
    (sample,) = (n for n, node in prompt.nodes.items() if node["class_type"] == "StarSample")
    other = comfy.run(prompt.change(sample, seed=12345)).array(probe)
    assert np.array_equal(comfy.run(prompt).array(probe), first)
    assert not np.array_equal(other, first)


def test_the_released_model_s_workflow_says_what_is_missing(comfy, empty_prompt):
    ran = comfy.run(watched(NEEDS_FILES, empty_prompt))
    assert not ran.valid
    assert "star-1024" in ran.complaint
    assert "models/star" in ran.complaint.replace("\\\\", "/")
