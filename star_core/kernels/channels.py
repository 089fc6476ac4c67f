"""What the VQ-VAE's kernels share: how programs divide pictures whose channels lie last, and whom they serve.

In memory a picture is (positions, channels). Some positions count as one row, so that a power of two, up to
CHUNK, divides a row: programs then need no masks along it and read and write in the widest pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 128
"""Numbers of a row that a program takes, 256 bytes of the halves."""
LEAST_CHUNK = 4
TILE = 4096
"""Numbers that a program holds: 16 per thread at 8 warps."""
WARPS = 8
CHANGING = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")
"""What ComfyUI's layers hold where their weights are to be changed as they compute."""


@dataclass(frozen=True)
class Cut:
    """How programs divide pictures (B, C, h, w) of (positions, C) each in memory."""

    fold: int
    """Positions of a row."""
    rows: int
    width: int
    chunk: int

    @property
    def block(self) -> int:
        """Rows that a program holds."""
        return TILE // self.chunk

    @property
    def columns(self) -> int:
        return self.width // self.chunk

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block)


def cut_of(positions: int, channels: int) -> Cut | None:
    """Return how programs divide so many positions; None where rows would be cut too small."""
    fold = 1
    while _power_in(channels * fold) < CHUNK and positions % (2 * fold) == 0:
        fold *= 2
    chunk = min(CHUNK, _power_in(channels * fold))
    return Cut(fold, positions // fold, channels * fold, chunk) if chunk >= LEAST_CHUNK else None


def _power_in(number: int) -> int:
    """Return the largest power of two that divides a number."""
    return number & -number


def channels_last(x: Tensor) -> bool:
    """Whether pictures x lie as the kernels read them, in a dtype that they read, and are not nothing."""
    return x.dtype in DTYPES and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


def reads_its_own(layer: nn.Module, kind: type[nn.Module], x: Tensor) -> bool:
    """Whether a layer would do as its kind does, with its weights just as they are, and nobody watches it.

    ComfyUI's layers bring weights from elsewhere, or change them by the functions named here, as they compute.
    """
    known = type(layer).forward is kind.forward or hasattr(type(layer), "weight_function")
    if not known or not isinstance(layer, kind) or "forward" in vars(layer):
        return False
    pending = [getattr(layer, name, None) for name in CHANGING]
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    for_all = (modules._global_forward_hooks, modules._global_forward_pre_hooks)
    if any((*pending, *hooks, *for_all)):
        return False
    weights = (layer.weight, layer.bias)
    return all(
        isinstance(w, Tensor)
        and w.device == x.device
        and w.dtype in DTYPES
        and (w.ndim > 1 or w.is_contiguous())
        and not (w.requires_grad and torch.is_grad_enabled())
        for w in weights
    )
