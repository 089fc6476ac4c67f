"""A real ComfyUI process with the pack linked in, and a tiny random STAR model in its models/star."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from star_core.causal_sampler import CausalSampler
from star_core.checkpoint import Networks, save_networks
from star_core.config import StarConfig, TransformerConfig, VQVAEConfig, square_maps
from star_core.vqvae import VQVAE
from star_core.weights import save_vqvae

PACK = Path(__file__).resolve().parents[2]
sys.path.append(str(PACK / "tests"))

from comfyui_place import MISSING, find_comfyui, find_python  # noqa: E402

PACK_NAME = "comfyui-star"
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
CODEBOOK = 256
TEXT_WIDTH = 128
START_SECONDS = 180


@dataclass(frozen=True)
class Comfy:
    """A ComfyUI checkout and the Python that has its requirements."""

    path: Path
    python: str

    @property
    def version(self) -> tuple[int, ...]:
        text = (self.path / "comfyui_version.py").read_text()
        match = re.search(r'__version__ = "([\d.]+)"', text)
        assert match, f"{self.path} says no version"
        return tuple(int(part) for part in match.group(1).split("."))


def find_comfy() -> Comfy | str:
    """Return ComfyUI as the environment names it, or one line that says what is missing."""
    path = find_comfyui()
    if path is None:
        return MISSING
    python = find_python(path)
    probe = subprocess.run(
        [python, "-c", "import aiohttp, comfyui_frontend_package"], capture_output=True, text=True
    )
    if probe.returncode:
        return f"{python} lacks ComfyUI's requirements: set COMFYUI_PYTHON to the interpreter that has them"
    return Comfy(path, python)


def skip_below(folder: Path, items: list[pytest.Item], missing: str | None) -> None:
    """Skip the tests of a folder, in one line, where something is missing."""
    for item in items:
        if missing is not None and folder in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=missing))


def write_tiny_model(folder: Path) -> None:
    """Put a model of ten scales with random weights into a folder, laid out as a released one."""
    config = StarConfig(
        name="tiny",
        transformer=TransformerConfig(
            depth=2,
            width=64,
            heads=2,
            scales=len(SIDES),
            text_width=TEXT_WIDTH,
            codebook_size=CODEBOOK,
            code_width=8,
            sampler_depth=2,
        ),
        vqvae=VQVAEConfig(
            base_channels=8,
            channel_multipliers=(1, 2, 2),
            residual_blocks=1,
            codebook_size=CODEBOOK,
            code_width=8,
            norm_groups=4,
        ),
        maps=square_maps(SIDES),
        schedule="top-k",
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        networks = Networks(config.transformer)
        assert isinstance(networks.causal_sampler, CausalSampler)
        vqvae = VQVAE(config.vqvae)
    with torch.no_grad():
        for module in (networks, vqvae):
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1 and float(parameter.abs().max()) == 0:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder.mkdir(parents=True)
    save_networks(folder / "tiny.safetensors", config, networks)
    save_vqvae(folder / "vqvae.safetensors", vqvae)
    for name in ("text_encoder", "tokenizer"):
        (folder / name).symlink_to(PACK / "star_core" / "demo" / name, target_is_directory=True)


class Server:
    """ComfyUI in a process of its own, with a base directory that is thrown away.

    options: more of ComfyUI's command line.
    """

    def __init__(self, comfy: Comfy, base: Path, options: tuple[str, ...] = ()) -> None:
        self.comfy = comfy
        self.base = base
        self.options = options
        self.log = base / "server.log"
        for name in ("custom_nodes", "input", "output", "user", "temp"):
            (base / name).mkdir(parents=True)
        write_tiny_model(base / "models" / "star")
        (base / "custom_nodes" / PACK_NAME).symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [self.comfy.python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-auto-launch", "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base}/user/comfyui.db", "--preview-method", "auto"]
        command += self.options
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.comfy.path, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **quiet}
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, f"ComfyUI ended at its start:\n{self.said()}"
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        self.stop()
        raise TimeoutError(f"ComfyUI did not answer in {START_SECONDS} s:\n{self.said()}")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        """Return the end of what the server wrote."""
        return self.log.read_text(errors="replace")[-4000:]

    def get(self, route: str) -> Any:
        with urllib.request.urlopen(self.url + route, timeout=30) as answer:
            return json.loads(answer.read())

    def set(self, setting: str, value: object) -> None:
        request = urllib.request.Request(
            f"{self.url}/settings/{setting}",
            json.dumps(value).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=30).read()
