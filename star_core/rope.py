"""Cross-scale normalised axial RoPE (paper 4.2): every scale's token map spans the same coordinates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import TokenMap
from .transfer import upload


class Rotation(NamedTuple):
    """Cosines and sines, each (L, head_width / 2) float32: one angle per token and complex pair.

    With a leading axis, (R, L, head_width / 2), every row of a batch has tokens of its own.
    """

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device) -> Rotation:
        return Rotation(upload(self.cos, device), upload(self.sin, device))

    def rows(self, start: int, stop: int) -> Rotation:
        """Return the rotations of tokens start..stop-1."""
        return Rotation(self.cos[start:stop], self.sin[start:stop])

    def select(self, positions: Tensor) -> Rotation:
        """Return the rotations of the tokens at `positions` (K,), or those of each row at (R, K)."""
        return Rotation(self.cos[positions], self.sin[positions])


def _coordinates(side: int, extent: float) -> Tensor:
    """Return `side` coordinates stretched to [0, extent], endpoints included, in the official order.

    A side of 1 sits at 0. The official code divides 0 by 0 there when the other side is longer.
    """
    index = torch.arange(side, dtype=torch.float32)
    return index / (side - 1) * extent if side > 1 else index


def axial_rope(token_map: TokenMap, head_width: int, theta: float, extent: float) -> Rotation:
    """Return the rotations of one token map, row by row, as (h * w, head_width / 2).

    The first half of the pairs turns with the column, the second with the row. Paper Eq. 2 has
    i / h * H with i from 1; the released weights follow the code: 0-based, endpoints included.
    """
    height, width = token_map
    exponents = torch.arange(0, head_width, 4, dtype=torch.float32) / head_width
    frequencies = 1.0 / theta**exponents
    columns = torch.outer(_coordinates(width, extent), frequencies)
    rows = torch.outer(_coordinates(height, extent), frequencies)
    angles = torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)], dim=1)
    return Rotation(angles.cos(), angles.sin())


def axial_rope_of_maps(maps: Sequence[TokenMap], head_width: int, theta: float, extent: float) -> Rotation:
    """Return the rotations of all maps' tokens, coarse to fine, as (L, head_width / 2). Nobody may change them:
    they are remembered."""
    return _axial_rope_of_maps(tuple(maps), head_width, theta, extent)


@functools.lru_cache(maxsize=16)
def _axial_rope_of_maps(maps: tuple[TokenMap, ...], head_width: int, theta: float, extent: float) -> Rotation:
    # Outside inference mode, whose tensors no training could use later.
    with torch.inference_mode(False):
        parts = [axial_rope(m, head_width, theta, extent) for m in maps]
        return Rotation(torch.cat([p.cos for p in parts]), torch.cat([p.sin for p in parts]))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate x (B, H, L, head_width) by (L, head_width / 2) or (B, L, head_width / 2) angles, to float32.

    Pairs are neighbours (2k, 2k + 1): one complex number each, turned by one multiplication. In float32,
    because bfloat16 has too few bits for the angles of a 64 x 64 map.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if rotation.cos.ndim == 3:
        rotation = Rotation(rotation.cos.unsqueeze(1), rotation.sin.unsqueeze(1))
    # Other devices may have no complex numbers (Apple's, DirectML's), torch.compile no fused code for them.
    if x.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
        return _rotate_real(pairs, rotation).flatten(-2)
    turned = torch.view_as_complex(pairs) * torch.complex(rotation.cos, rotation.sin)
    return torch.view_as_real(turned).flatten(-2)


def _rotate_real(pairs: Tensor, rotation: Rotation) -> Tensor:
    """Return the turned pairs (..., 2) without complex numbers."""
    even, odd = pairs.unbind(-1)
    turned = (
        even * rotation.cos - odd * rotation.sin,
        even * rotation.sin + odd * rotation.cos,
    )
    return torch.stack(turned, dim=-1)
