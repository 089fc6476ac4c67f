"""One ComfyUI server for each file of tests, drawing with the model that ships with the pack."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e")]

from comfy_server import Comfy, Server, find_comfy, skip_below  # noqa: E402

if TYPE_CHECKING:
    from client import Client

Prompt = dict[str, dict[str, Any]]


def missing() -> str | None:
    """Return one line that says what these tests lack here, None where they can run."""
    if importlib.util.find_spec("websocket") is None:
        return "needs websocket-client: pip install websocket-client"
    found = find_comfy()
    return found if isinstance(found, str) else None


MISSING = missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip_below(HERE, items, MISSING)


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the options that the file of tests names in OPTIONS."""
    comfy = find_comfy()
    assert isinstance(comfy, Comfy), comfy
    running = Server(comfy, tmp_path_factory.mktemp("comfyui"), getattr(request.module, "OPTIONS", ()))
    shutil.copy(HERE / "fault_pack.py", running.base / "custom_nodes")
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    from client import Client

    user = Client(server)
    yield user
    user.close()


VARIED = "top_k 600\ntop_p 0.8\nguidance ramp 4"
"""A schedule under which seeds differ. The shipped model's own leaves only the first two scales free."""


def graph(seed: int, text: str = "Fluent 3D emoji of a red apple", **sample: Any) -> Prompt:
    """Return load -> encode, schedule -> sample -> decode -> save with the shipped model, as an API prompt."""
    load = {"checkpoint": "shipped model", "text_encoder": "automatic", "vqvae": "automatic"}
    settings = {"seed": seed, "batch_size": 1, "width": 0, "height": 0, "start_scale": 0, "preview": "off"}
    wires = {"model": ["load", 0], "positive": ["text", 0], "schedule": ["schedule", 0]}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "load": ("StarLoad", {**load, "precision": "auto", "preset": "from the file"}),
        "text": ("StarCLIPEncode", {"text_encoder": ["load", 1], "text": text}),
        "schedule": ("StarScaleSchedule", {"schedule": VARIED}),
        "sample": ("StarSample", {**wires, **settings, **sample}),
        "decode": (
            "StarVQDecode",
            {"vqvae": ["load", 2], "tokens": ["sample", 0], "last_scale": 0, "tiled": False},
        ),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "star"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in kinds.items()}


@pytest.fixture(scope="session")
def prompt() -> Callable[..., Prompt]:
    return graph
