"""A GPU, or one line that says what is missing."""

from __future__ import annotations

import os

import pytest
import torch

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
