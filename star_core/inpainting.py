"""Inpainting: which tokens of a picture stay while the rest is drawn anew."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor

from .config import TokenMap
from .quantizer import averaged
from .request import KeptTokens, ScaleStep

REDRAWN_SHARE = 0.5
"""Share of a token's cell from which on it is drawn anew.

Half, so that the coarse scales of a picture with a small hole stay: a coarse token that is drawn anew moves
the whole picture, kept tokens' places included, because finer tokens only add to it.
"""


def keep_outside(steps: Sequence[ScaleStep], redraw: Tensor) -> KeptTokens:
    """Return what a mask (B, H, W) keeps of a picture's scales: 1 is drawn anew, 0 stays.

    The mask may have any size; it is laid over the whole picture and averaged over each token's cell.
    Raises ValueError for scales drawn smooth, whose tokens do not hold the picture that is to stay, and for a
    mask whose white is too thin for any token of any picture.
    """
    if any(step.soft for step in steps):
        raise ValueError(
            "the picture to keep was drawn smooth: it is a mixture that its tokens do not hold. Decode it and"
            " encode the picture (VQ Decode, VQ Encode), or draw it without smooth"
        )
    masks = tuple(_kept(redraw, step.token_map) for step in steps)
    if masks[-1].all() and (redraw >= REDRAWN_SHARE).any():
        height, width = steps[-1].token_map
        raise ValueError(
            "the mask's white is too thin: it covers half of no token's cell, even at the last scale of"
            f" {width}x{height} tokens, and nothing would be drawn anew. Paint it wider, or grow it"
        )
    return KeptTokens(tuple(step.tokens for step in steps), masks)


def _kept(redraw: Tensor, token_map: TokenMap) -> Tensor:
    """Return where tokens of a map stay, (B, h * w) bool."""
    share = averaged(rearrange(redraw.float(), "b h w -> b 1 h w"), token_map)
    return rearrange(share, "b 1 h w -> b (h w)") < REDRAWN_SHARE
