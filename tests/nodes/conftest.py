"""A ComfyUI process with the pack in it, a tiny checkpoint for it, and prompts to run there."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from star_core.checkpoint import Networks, save_networks
from star_core.config import StarConfig, TransformerConfig, VQVAEConfig, square_maps
from star_core.model_files import SHIPPED
from star_core.vqvae import VQVAE
from star_core.weights import save_vqvae

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

from comfyui_place import MISSING, find_comfyui, find_python  # noqa: E402

SIDES = (1, 2, 4, 6, 10, 16)
SCHEDULE = "guidance ramp 1; temperature 2"
"""Hot, so that two seeds never draw the same map: random weights are sure of themselves for no reason."""
NARROW = 64
"""Width of the text states of the checkpoint `narrow`."""


class Comfy:
    """The process, asked line by line."""

    def __init__(self, comfyui: Path, models: Path, scratch: Path) -> None:
        script = Path(__file__).with_name("comfy_process.py")
        self.models, self.scratch = models, scratch
        self._log = (scratch / "log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [find_python(comfyui), str(script), str(comfyui), str(ROOT), str(models), str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            pytest.fail(f"ComfyUI ended:\n{self._log.read()[-3000:]}")
        reply: dict[str, Any] = json.loads(line)
        assert "failed" not in reply, reply.get("traceback")
        return reply

    def run(self, prompt: Prompt, *, faults: dict[str, int] | None = None, **options: Any) -> Ran:
        outputs = [name for name, node in prompt.nodes.items() if node["class_type"] == "TestProbe"]
        reply = self.ask("run", prompt=prompt.nodes, outputs=outputs, faults=faults or {}, **options)
        return Ran(reply)

    def array(self, values: np.ndarray, name: str) -> str:
        # A name of its own: ComfyUI would take an equal one for an equal input and not read it again.
        path = self.scratch / f"{name}-{len(list(self.scratch.iterdir()))}.npy"
        np.save(path, values.astype(np.float32))
        return str(path)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


@dataclasses.dataclass
class Ran:
    """What came of a prompt."""

    reply: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.reply[name]

    @property
    def complaint(self) -> str:
        """What the user reads: the error before execution, or the one at it."""
        return str(self.reply.get("errors") or self.reply.get("error"))

    def tokens(self, probe: str = "probe") -> list[list[list[int]]]:
        assert self.reply["valid"], self.complaint
        assert self.reply["ok"], self.complaint
        return self.reply["seen"][probe]["tokens"]  # type: ignore[no-any-return]

    def array(self, probe: str = "probe") -> np.ndarray:
        assert self.reply["valid"], self.complaint
        assert self.reply["ok"], self.complaint
        return np.load(self.reply["seen"][probe]["array"])  # type: ignore[no-any-return]


class Prompt:
    """An API prompt under construction. Inputs that a test does not give have the node's defaults."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, name: str, kind: str, **inputs: Any) -> Prompt:
        self.nodes[name] = {"class_type": kind, "inputs": {**DEFAULTS.get(kind, {}), **inputs}}
        return self

    def probe(self, node: str, slot: int = 0, name: str = "probe") -> Prompt:
        return self.add(name, "TestProbe", value=[node, slot])

    def change(self, name: str, **inputs: Any) -> Prompt:
        """Return a copy in which one node has other inputs."""
        copy = Prompt()
        copy.nodes = json.loads(json.dumps(self.nodes))
        copy.nodes[name]["inputs"].update(inputs)
        return copy


DEFAULTS: dict[str, dict[str, Any]] = {
    "StarLoad": {
        "checkpoint": "tiny/star.safetensors",
        "text_encoder": "automatic",
        "vqvae": "automatic",
        "precision": "auto",
        "preset": "from the file",
    },
    "StarSample": {
        "seed": 1,
        "batch_size": 1,
        "width": 0,
        "height": 0,
        "start_scale": 0,
        "preview": "off",
    },
    "StarVQDecode": {"last_scale": 0, "tiled": False},
    "StarCausalSampler": {"strategy": "official", "guidance": 4.0},
}


def sampled(text: str = "a red apple", **options: Any) -> Prompt:
    """Return the prompt load -> encode -> sample -> probe."""
    prompt = Prompt().add("load", "StarLoad").add("text", "StarCLIPEncode", text_encoder=["load", 1], text=text)
    prompt.add("sample", "StarSample", model=["load", 0], positive=["text", 0], **options)
    return prompt.probe("sample")


@pytest.fixture(scope="session")
def prompt() -> Callable[..., Prompt]:
    return sampled


@pytest.fixture(scope="session")
def empty_prompt() -> Callable[[], Prompt]:
    return Prompt


def tiny_config(*, sampler: bool, text_width: int = 128, sides: tuple[int, ...] = SIDES) -> StarConfig:
    return StarConfig(
        name="tiny",
        transformer=TransformerConfig(
            depth=2,
            width=64,
            heads=2,
            scales=len(sides),
            text_width=text_width,
            codebook_size=64,
            code_width=8,
            cross_attention="independent",
            sampler_depth=1 if sampler else 0,
        ),
        vqvae=VQVAEConfig(
            base_channels=8,
            channel_multipliers=(1, 1, 2),
            residual_blocks=1,
            codebook_size=64,
            code_width=8,
            norm_groups=4,
        ),
        maps=square_maps(sides),
        schedule=SCHEDULE,
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, weigh: Callable[..., None]) -> Path:
    """A folder models/star with tiny checkpoints: one without a causal sampler, one of narrow text states, one
    of other scales."""
    place = tmp_path_factory.mktemp("star")
    kinds = {
        "tiny": tiny_config(sampler=True),
        "plain": tiny_config(sampler=False),
        "narrow": tiny_config(sampler=False, text_width=NARROW),
        "coarse": tiny_config(sampler=False, sides=(1, 4, 16)),
    }
    for name, config in kinds.items():
        networks, vqvae = Networks(config.transformer), VQVAE(config.vqvae)
        weigh(networks, 1)
        weigh(vqvae, 2)
        save_networks(place / name / "star.safetensors", config, networks)
        save_vqvae(place / name / "vqvae.safetensors", vqvae)
        for folder in ("text_encoder", "tokenizer"):
            shutil.copytree(SHIPPED / folder, place / name / folder)
    write_narrow_text_encoder(place / "narrow" / "text_encoder")
    return place


def write_narrow_text_encoder(folder: Path) -> None:
    """Write a CLIP text model of another width over the one in a folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= {"hidden_size": NARROW, "intermediate_size": NARROW, "num_hidden_layers": 1}
    settings["num_attention_heads"] = 1
    CLIPTextModel(CLIPTextConfig(**settings)).save_pretrained(folder)


@pytest.fixture(scope="session")
def comfy(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Comfy]:
    place = find_comfyui()
    if place is None:
        pytest.skip(MISSING)
    process = Comfy(place, models, tmp_path_factory.mktemp("scratch"))
    yield process
    process.close()
