"""The VQ-VAE's convolutions on a GPU, with as few passes over memory beside cuDNN's product as there can be.

PyTorch adds a convolution's bias in a pass of its own, number by number. Here normalisation takes it in, or the
sum with what the result is added to. A convolution to fewer channels than FEWEST, which cuDNN leaves to a slow
general kernel, makes FEWEST of them; doubling a map's sides copies in pieces of 8 bytes.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from .channels import WARPS, channels_last, cut_of, reads_its_own
from .norms import normalised_with

FEWEST = 8
"""Channels of the halves that tensor cores make together."""
PIECE = torch.int64
"""What several numbers are copied as."""


def convolved(x: Tensor, conv: nn.Module) -> Tensor | None:
    """Do what `vqvae.convolved` does."""
    if not _serves(conv, x):
        return None
    missing = FEWEST - conv.out_channels
    if missing > 0 and x.element_size() == 2:
        weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 0, 0, missing))
        made = F.conv2d(x, weight, F.pad(_bias(conv), (0, missing)), conv.stride, conv.padding)
        return made[:, : conv.out_channels]
    made = _without_bias(x, conv)
    return _summed(made, _bias(conv), onto=None)


def conv_norm_silu(x: Tensor, conv: nn.Module, norm: nn.GroupNorm) -> Tensor | None:
    """Do what `vqvae.conv_norm_silu` does."""
    if not _serves(conv, x):
        return None
    made = _without_bias(x, conv)
    normed = normalised_with(made, norm, _bias(conv), activate=True)
    if normed is not None:
        return normed
    total = _summed(made, _bias(conv), onto=None)
    return None if total is None else F.silu(norm(total), inplace=True)


def convolved_onto(total: Tensor, x: Tensor, conv: nn.Module) -> Tensor | None:
    """Do what `vqvae.convolved_onto` does, in one pass over `total`."""
    if not (_serves(conv, x) and channels_last(total) and total.dtype == x.dtype):
        return None
    if cut_of(total.numel() // total.shape[1], total.shape[1]) is None:
        return None
    return _summed(_without_bias(x, conv), _bias(conv), onto=total)


def doubled(x: Tensor) -> Tensor | None:
    """Do what `vqvae.doubled` does."""
    if x.ndim != 4 or not channels_last(x) or x.shape[1] * x.element_size() % PIECE.itemsize:
        return None
    batch, channels, height, width = x.shape
    out = torch.empty(
        batch,
        channels,
        2 * height,
        2 * width,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    # By way of a single axis, since strides of sides of 1 may be anything.
    pieces, places = (t.permute(0, 2, 3, 1).reshape(-1).view(PIECE) for t in (x, out))
    places = places.view(batch, height, 2, width, 2, -1)
    places.copy_(pieces.view(batch, height, 1, width, 1, -1).expand_as(places))
    return out


def _serves(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution that is computed here of pictures x."""
    if x.ndim != 4 or not channels_last(x) or torch.is_autocast_enabled(x.device.type):
        return False
    if not isinstance(conv, nn.Conv2d) or not reads_its_own(conv, nn.Conv2d, x):
        return False
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and conv.groups == 1 and conv.dilation == (1, 1) and conv.weight.dtype == x.dtype


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None, "a layer without is not served"
    return conv.bias


def _without_bias(x: Tensor, conv: nn.Conv2d) -> Tensor:
    made = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
    return made.contiguous(memory_format=torch.channels_last)  # as cuDNN leaves it


def _summed(x: Tensor, bias: Tensor, onto: Tensor | None) -> Tensor | None:
    """Return x (B, C, h, w) + bias (C,) in its place; with `onto` added, in the place of that.

    None where it is not made for x.
    """
    batch, channels, height, width = x.shape
    cut = cut_of(batch * height * width, channels)
    if cut is None:
        return None
    total = x if onto is None else onto
    _sums[(cut.columns * cut.blocks,)](
        x,
        bias,
        total,
        cut.rows,
        width=cut.width,
        channels=channels,
        chunk=cut.chunk,
        block=cut.block,
        onto=onto is not None,
        num_warps=WARPS,
    )
    return total


@triton.jit(do_not_specialize=["rows"])
def _sums(
    x: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    width: tl.constexpr,
    channels: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    onto: tl.constexpr,
) -> None:
    """Write x + bias, and with `onto` what stood there. Grid: chunks of a row times blocks of rows."""
    columns: tl.constexpr = width // chunk
    first = tl.program_id(0) // columns * block
    column = tl.program_id(0) % columns * chunk
    row = tl.arange(0, block)[:, None]
    lane = tl.arange(0, chunk)[None, :]
    start = first.to(tl.int64) * width + column
    at = row * width + lane
    there = first + row < rows
    value = tl.load(x + start + at, mask=there, other=0.0).to(tl.float32)
    value += tl.load(bias + (column + lane) % channels).to(tl.float32)
    if onto:
        value += tl.load(total + start + at, mask=there, other=0.0).to(tl.float32)
    tl.store(total + start + at, value.to(total.dtype.element_ty), mask=there)
