"""Every workflow in a real ComfyUI, unchanged: over POST /prompt, with comfy-cli, and offline validation."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))

from comfy_server import Comfy, Server, find_comfy  # noqa: E402

FOLDER = HERE.parents[1] / "workflows"
RELEASED = FOLDER / "released_1024.json"
FILES = sorted(set(FOLDER.glob("*.json")) - {RELEASED})
FOUND = find_comfy()

pytestmark = pytest.mark.skipif(isinstance(FOUND, str), reason=FOUND if isinstance(FOUND, str) else "")
every = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert isinstance(FOUND, Comfy)
    running = Server(FOUND, tmp_path_factory.mktemp("comfyui"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def object_info(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("info") / "object_info.json"
    file.write_text(json.dumps(server.get("/object_info")))
    return file


def comfy(*words: str) -> dict[str, Any]:
    """Run comfy-cli and return its answer."""
    beside = os.environ.get("COMFYUI_PYTHON", sys.executable)
    found = shutil.which("comfy", path=str(Path(beside).parent)) or shutil.which("comfy")
    if found is None:
        pytest.skip("no comfy-cli: install it beside COMFYUI_PYTHON")
    command = [found, "--json", "--skip-prompt", "--no-enable-telemetry", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"schema": "envelope')]
    assert lines, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def post(server: Server, prompt: dict[str, Any]) -> str:
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(f"{server.url}/prompt", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.loads(answer.read())["prompt_id"])


def finished(server: Server, number: str) -> dict[str, Any]:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        history = server.get(f"/history/{number}")
        if number in history:
            entry: dict[str, Any] = history[number]
            return entry
        time.sleep(0.1)
    raise TimeoutError(f"{number} is not finished:\n{server.said()}")


def pictures(server: Server, entry: dict[str, Any]) -> list[Image.Image]:
    """Return what the nodes of a finished prompt saved or showed."""
    found = []
    for output in entry["outputs"].values():
        for place in output.get("images", []):
            query = urllib.parse.urlencode(place)
            with urllib.request.urlopen(f"{server.url}/view?{query}", timeout=60) as answer:
                found.append(Image.open(io.BytesIO(answer.read())).convert("RGB"))
    return found


@every
def test_its_api_form_runs_and_shows_pictures(server: Server, path: Path):
    entry = finished(server, post(server, json.loads((FOLDER / "api" / path.name).read_text())))
    assert entry["status"]["status_str"] == "success", entry["status"]
    shown = pictures(server, entry)
    assert shown
    assert all(np.asarray(picture).std() > 10 for picture in shown), "a picture of one colour"


@every
def test_comfy_run_takes_it_as_it_is(server: Server, path: Path):
    place = ["--host", "127.0.0.1", "--port", str(server.port)]
    answer = comfy("run", "--workflow", str(path), "--wait", *place)
    assert answer["ok"], answer
    assert answer["data"]["status"] == "completed"
    assert answer["data"]["outputs"]


@every
def test_comfy_workflow_validate_finds_nothing(object_info: Path, path: Path):
    answer = comfy("workflow", "validate", "--workflow", str(path), "--input", str(object_info))
    assert answer["ok"], answer
    assert answer["data"]["error_count"] == answer["data"]["warning_count"] == 0


def test_the_released_model_without_its_files_says_what_to_put_where_and_the_server_lives(server: Server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, json.loads((FOLDER / "api" / RELEASED.name).read_text()))
    answer = json.loads(refused.value.read())
    (node,) = answer["node_errors"].values()
    said = " ".join(error["details"] for error in node["errors"])
    assert node["class_type"] == "StarLoad"
    assert "star-1024/star.safetensors" in said
    assert str(server.base / "models" / "star") in said
    assert "Released weights" in said
    entry = finished(server, post(server, json.loads((FOLDER / "api" / "text_to_picture.json").read_text())))
    assert entry["status"]["status_str"] == "success"


def test_the_released_model_validates_where_its_file_is_listed(object_info: Path, tmp_path: Path):
    info = json.loads(object_info.read_text())
    (kind, options) = info["StarLoad"]["input"]["required"]["checkpoint"]
    listed = kind if isinstance(kind, list) else options["options"]
    listed.append("star-1024/star.safetensors")
    changed = tmp_path / "object_info.json"
    changed.write_text(json.dumps(info))
    answer = comfy("workflow", "validate", "--workflow", str(RELEASED), "--input", str(changed))
    assert answer["ok"], answer
