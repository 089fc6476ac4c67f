"""Pictures moved a little, so that few look like many."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..transfer import upload
from .emoji import Record

MARGIN = 0.125
"""Of a side: how far whole pixels are shifted."""
BACKGROUND = 1.0
"""What a shift brings in: white, on which the training pictures are drawn."""
FARTHEST_NUDGE = 1
"""Pixels that a nudged picture is shifted by at most: it stays sharp, and has other tokens."""
LONGEST_SHIFT, LONGEST_TURN, LARGEST_GROWTH = 1 / 12, math.radians(8), 0.1
"""How a picture is moved at most: shares of its side, an angle, and a share of its size, up or down."""


def augmented(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, H, W), each mirrored or not and shifted by whole pixels."""
    sources = pixel_sources(len(pictures), pictures.shape[2:], generator)
    return gathered(pictures, upload(sources, pictures.device))


def pixel_sources(count: int, sides: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return where each pixel of `count` pictures of these sides (height, width) is taken from, (B, 1, H * W).

    It is the pixel's number in a picture with a margin, on the CPU.
    """
    height, width = sides
    reach = _reach(sides)
    down, right = (torch.randint(2 * r + 1, (count, 1), generator=generator) for r in reach)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.arange(width).expand(count, width)
    columns = right + torch.where(mirrored, across.flip(1), across)
    rows = down + torch.arange(height)
    padded_width = width + 2 * reach[1]
    return (rows.unsqueeze(2) * padded_width + columns.unsqueeze(1)).view(count, 1, -1)


def gathered(pictures: Tensor, sources: Tensor) -> Tensor:
    """Return pictures (B, C, H, W) with the pixels at `sources` (B, 1, H * W), on white.

    As DiffAugment does (arXiv 2006.10738): gradients pass, and both kinds of pictures are treated alike.
    """
    reach = _reach(pictures.shape[2:])
    padded = F.pad(pictures, (reach[1], reach[1], reach[0], reach[0]), value=BACKGROUND)
    every = sources.expand(-1, pictures.shape[1], -1)
    return padded.flatten(2).gather(2, every).view(pictures.shape)


def _reach(sides: Sequence[int]) -> list[int]:
    return [max(1, int(side * MARGIN)) for side in sides]


def may_be_mirrored(record: Record) -> bool:
    """Whether a picture is still what its caption says when left and right change places."""
    told_apart = re.search(r"left|right|clock|east|west", record.label)
    return told_apart is None and record.group not in ("symbols", "flags")


class Motion(enum.Enum):
    """What is done to pictures besides mirroring: nothing, a shift by whole pixels, or more than that."""

    NONE = enum.auto()
    NUDGE = enum.auto()
    MOVE = enum.auto()


class Moved:
    """Mirrors pictures that may be, half of them or, where nothing moves, all; and moves each, on white."""

    def __init__(self, mirrorable: Tensor, generator: torch.Generator, motion: Motion = Motion.MOVE) -> None:
        count = len(mirrorable)
        self.mirrored = mirrorable & ((torch.rand(count, generator=generator) < 0.5) | (motion is Motion.NONE))
        within = (2 * torch.rand(4, count, generator=generator) - 1) * float(motion is Motion.MOVE)
        pixels = torch.randint(-FARTHEST_NUDGE, FARTHEST_NUDGE + 1, (count, 2), generator=generator)
        self.nudges = pixels * (motion is Motion.NUDGE)
        self.shifts = within[:2].T * LONGEST_SHIFT
        self.turns = within[2] * LONGEST_TURN
        self.sizes = 1 + within[3] * LARGEST_GROWTH

    def __call__(self, pictures: Tensor, start: int) -> Tensor:
        """Return pictures (B, 3, H, W) in [-1, 1], numbers start.. of the set, moved."""
        these = slice(start, start + len(pictures))
        flip = torch.where(self.mirrored[these], -1.0, 1.0)
        cos, sin = self.turns[these].cos(), self.turns[these].sin()
        rows = [torch.stack([flip * cos, -flip * sin], dim=1), torch.stack([sin, cos], dim=1)]
        linear = torch.stack(rows, dim=1) / self.sizes[these].view(-1, 1, 1)
        sides = torch.tensor([pictures.shape[3], pictures.shape[2]])
        shifts = self.shifts[these] + self.nudges[these] / sides
        # Coordinates run from -1 to 1: a side is 2.
        matrices = torch.cat([linear, 2 * shifts.unsqueeze(2)], dim=2)
        grid = F.affine_grid(upload(matrices, pictures.device), list(pictures.shape), align_corners=False)
        # Zeros come in from outside: white, where white is 0.
        moved = F.grid_sample(pictures - 1, grid, mode="bicubic", align_corners=False)
        return (moved + 1).clamp(-1, 1)
