"""Decoding piece by piece, for pictures that do not fit into memory in one go.

A tile normalises and attends over itself alone, so a tiled picture is near the whole one, not equal to it.
Tiles overlap and are blended linearly, so that no seam shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import TokenMap
from .vqvae import VQVAE

TILE = 32
OVERLAP = 8


def tile_of(token_map: TokenMap) -> TokenMap:
    """Return how much of a token map is decoded at once: a tile, or all of a smaller map."""
    height, width = token_map
    return min(height, TILE), min(width, TILE)


def decode_in_tiles(vqvae: VQVAE, f_hat: Tensor, *, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Return the pictures (B, 3, h * f, w * f) in [0, 1] of f_hat (B, D, h, w), one tile at a time.

    `tile` and `overlap` count latent cells. A map that fits into one tile is decoded whole.
    """
    if not 0 < overlap <= tile // 2:
        raise ValueError(f"tiles of {tile} cells overlap by 1 to {tile // 2}, not {overlap}")
    height, width = f_hat.shape[-2:]
    scale = vqvae.config.downsample
    total = f_hat.new_zeros(f_hat.shape[0], 3, height * scale, width * scale)
    weight = f_hat.new_zeros(1, 1, height * scale, width * scale)
    for top, bottom in _spans(height, tile, overlap):
        rows = _fade(top, bottom, height, overlap, scale).to(f_hat.device)
        for left, right in _spans(width, tile, overlap):
            columns = _fade(left, right, width, overlap, scale).to(f_hat.device)
            share = rows[:, None] * columns[None, :]
            place = (..., slice(top * scale, bottom * scale), slice(left * scale, right * scale))
            total[place] += vqvae.pictures(f_hat[..., top:bottom, left:right]) * share
            weight[place] += share
    return total / weight


def _spans(length: int, tile: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) of tiles that cover a side; the last one is moved back to end with it."""
    start = 0
    while start + tile < length:
        yield start, start + tile
        start += tile - overlap
    yield max(length - tile, 0), length


def _fade(start: int, stop: int, length: int, overlap: int, scale: int) -> Tensor:
    """Return a tile's weights along one side in pixels: rising and falling where it meets a neighbour."""
    pixels = (stop - start) * scale
    ramp = (torch.arange(pixels) + 0.5) / (overlap * scale)
    weights = torch.ones(pixels)
    if start > 0:
        weights = torch.minimum(weights, ramp)
    if stop < length:
        weights = torch.minimum(weights, ramp.flip(0))
    return weights
