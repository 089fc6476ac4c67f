"""A handful of pictures to train on, and what stands in for downloads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from star_core.training.splits import heldout

TRAINED, HELD_OUT = 12, 3


class Distance(nn.Module):
    """Stands in for LPIPS, whose weights are a download: the stages need its call, and maps to judge by."""

    channels = (3,)

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        yield torch.nn.functional.avg_pool2d(pictures, 4)

    def forward(self, drawn: Tensor, real: Tensor) -> Tensor:
        return (drawn - real).square().mean(dim=(1, 2, 3))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture set of 32 px: coloured squares, three of them in a held-out pair."""
    folder = tmp_path_factory.mktemp("data")
    style, families = next(iter(heldout().pairs.items()))
    concepts = ["a trained family"] * TRAINED + [sorted(families)[0]] * HELD_OUT
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (len(concepts), 1, 1, 3), dtype=np.uint8)
    np.save(folder / "pictures-32.npy", np.broadcast_to(colours, (len(concepts), 32, 32, 3)))
    rows = [
        {
            "style": style,
            "code": f"{i:x}",
            "concept": c,
            "label": f"thing {i}",
            "tags": ["square"],
            "group": "x",
        }
        for i, c in enumerate(concepts)
    ]
    (folder / "records-32.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def distance() -> nn.Module:
    return Distance()
