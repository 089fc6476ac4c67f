"""A GPU, or one line that says what is missing; tiny models on it."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from star_core.generate import generate
from star_core.graphs import Replays
from star_core.kernels import given_up
from star_core.request import Request, ScaleStep

REQUIRED = "STAR_REQUIRE_GPU"


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """A CUDA device. Without one the test is skipped, or fails where STAR_REQUIRE_GPU is set."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    missing = "there is no CUDA device"
    if os.environ.get(REQUIRED):
        pytest.fail(f"{missing}, and {REQUIRED} is set")
    pytest.skip(f"{missing} (with {REQUIRED}=1 that fails)")


@pytest.fixture(autouse=True)
def _exact_products(gpu: torch.device) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def kernels_serve(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where a reference stood in for its kernel: then nothing would have been compared."""
    with caplog.at_level(logging.INFO):
        yield
    assert not given_up(), caplog.text


@pytest.fixture
def no_waiting() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Make a context that raises where the host waits for the GPU."""

    @contextlib.contextmanager
    def strict() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return strict


@dataclass(frozen=True)
class OnGpu:
    """A tiny model's modules on the GPU."""

    transformer: nn.Module
    sampler: nn.Module
    quantizer: nn.Module
    device: torch.device

    def run(self, request: Request, replays: Replays | None = None) -> list[ScaleStep]:
        steps = generate(self.transformer, self.sampler, self.quantizer, request, self.device, replays)
        return [step.to(torch.device("cpu")) for step in steps]


@pytest.fixture
def moved(gpu: torch.device) -> Callable[[object], OnGpu]:
    """Move a tiny model's modules to the GPU."""

    def move(model: object) -> OnGpu:
        parts = (copy.deepcopy(part).to(gpu) for part in (model.transformer, model.sampler, model.quantizer))
        return OnGpu(*parts, gpu)

    return move
