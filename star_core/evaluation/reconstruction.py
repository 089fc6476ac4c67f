"""How near a reconstructed picture is to its original: PSNR, and LPIPS over uint8 arrays."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from .inception import Pictures, check_pictures
from .lpips import LPIPS

_BATCH = 32


def psnr(pictures: Pictures, originals: Pictures) -> NDArray[np.float64]:
    """Return the (N,) peak signal-to-noise ratios in dB, infinite where two pictures are equal."""
    _check_pair(pictures, originals)
    difference = pictures.astype(np.float64) - originals
    mean_square = np.square(difference).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / mean_square))


def perceptual(metric: LPIPS, pictures: Pictures, originals: Pictures) -> NDArray[np.float32]:
    """Return the (N,) LPIPS distances of two uint8 arrays (N, H, W, 3)."""
    _check_pair(pictures, originals)
    device = metric.shift.device

    def signed(block: Pictures) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(block)).to(device)
        return rearrange(tensor, "b h w c -> b c h w").float() / 127.5 - 1

    with torch.inference_mode():
        distances = [
            metric(signed(pictures[start : start + _BATCH]), signed(originals[start : start + _BATCH])).cpu()
            for start in range(0, len(pictures), _BATCH)
        ]
    return np.asarray(torch.cat(distances).numpy(), dtype=np.float32)


def _check_pair(pictures: Pictures, originals: Pictures) -> None:
    """Raise ValueError unless both are uint8 pictures (N, H, W, 3) of one shape."""
    check_pictures(pictures)
    check_pictures(originals)
    if pictures.shape != originals.shape:
        raise ValueError(f"pictures {pictures.shape} and originals {originals.shape} differ in shape")
