"""The VQ-VAE's convolutions on a GPU, with as few passes over memory beside cuDNN's product as there can be.

PyTorch adds a convolution's bias in a pass of its own, number by number. Here normalisation takes it in, or the
sum with what the result is added to. Convolutions to a few channels, which cuDNN leaves to a slow general
kernel, have one of their own in half precision; doubling a map's sides copies in pieces of 8 bytes.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from .channels import WARPS, channels_last, cut_of, reads_its_own

FEWEST = 16
"""Columns that tensor cores make together; of fewer channels the others are zeros."""
PIXELS = 128
"""Of a row, that a program makes a few channels of."""
AMPERE = (8, 0)
"""The first compute capability with tensor cores for both halves."""
PIECE = torch.int64
"""What several numbers are copied as."""


def convolved(x: Tensor, conv: nn.Module) -> Tensor | None:
    """Do what `vqvae.convolved` does."""
    if not _serves(conv, x):
        return None
    few = _to_few_channels(x, conv) if conv.out_channels < FEWEST else None
    if few is not None:
        return few
    made = _without_bias(x, conv)
    return _summed(made, _bias(conv), onto=None)


def convolved_apart(x: Tensor, conv: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Do what `vqvae.convolved_apart` does."""
    return (_without_bias(x, conv), _bias(conv)) if _serves(conv, x) else None


def convolved_onto(total: Tensor, x: Tensor, conv: nn.Module) -> Tensor | None:
    """Do what `vqvae.convolved_onto` does, in one pass over `total`."""
    # With gradients switched on what stands in `total` may still be wanted.
    if torch.is_grad_enabled() or not (_serves(conv, x) and channels_last(total) and total.dtype == x.dtype):
        return None
    if total.ndim != 4 or cut_of(total.numel() // total.shape[1], total.shape[1]) is None:
        return None
    made = _without_bias(x, conv)
    return _summed(made, _bias(conv), onto=total) if made.shape == total.shape else None


def doubled(x: Tensor) -> Tensor | None:
    """Do what `vqvae.doubled` does."""
    if x.ndim != 4 or not channels_last(x):
        return None
    if x.shape[1] * x.element_size() % PIECE.itemsize or x.data_ptr() % PIECE.itemsize:
        return None
    batch, channels, height, width = x.shape
    out = _empty(x, channels, 2 * height, 2 * width)
    # By way of a single axis, since strides of sides of 1 may be anything.
    pieces, places = (t.permute(0, 2, 3, 1).reshape(-1).view(PIECE) for t in (x, out))
    places = places.view(batch, height, 2, width, 2, -1)
    places.copy_(pieces.view(batch, height, 1, width, 1, -1).expand_as(places))
    return out


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return room for pictures (B, channels, height, width), as many as x holds, channels last."""
    return x.new_empty(len(x), height, width, channels).permute(0, 3, 1, 2)


def _serves(conv: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution that is computed here of pictures x."""
    if x.ndim != 4 or not channels_last(x) or torch.is_autocast_enabled(x.device.type):
        return False
    # Other libraries than cuDNN leave channels first.
    if torch.version.hip is not None or not torch.backends.cudnn.enabled:
        return False
    if not isinstance(conv, nn.Conv2d) or not reads_its_own(conv, nn.Conv2d, x):
        return False
    if type(conv)._conv_forward is not nn.Conv2d._conv_forward or "_conv_forward" in vars(conv):
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


def _to_few_channels(x: Tensor, conv: nn.Conv2d) -> Tensor | None:
    """Return conv(x), channels last; None where it is not one of halves, 3x3 and of the same sides, from a
    multiple of 16 channels, on a GPU with tensor cores for them."""
    batch, channels, height, width = x.shape
    depth = min(64, channels & -channels)
    alike = (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    if not alike or x.element_size() != 2 or depth < 16 or not _multiplies(x.device):
        return None
    taps = F.pad(conv.weight.permute(2, 3, 1, 0), (0, FEWEST - conv.out_channels)).contiguous()
    out = _empty(x, conv.out_channels, height, width)
    _few_channels[triton.cdiv(width, PIXELS), height, batch](
        x,
        taps,
        _bias(conv),
        out,
        height,
        width,
        channels=channels,
        outputs=conv.out_channels,
        columns=FEWEST,
        pixels=PIXELS,
        depth=depth,
        num_warps=4,
    )
    return out


@functools.cache
def _multiplies(device: torch.device) -> bool:
    """Whether Triton has products of a device's tensor cores; without them it would build for a minute."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE


@triton.jit(do_not_specialize=["height", "width"])
def _few_channels(
    x: tl.tensor,
    taps: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.constexpr,
    outputs: tl.constexpr,
    columns: tl.constexpr,
    pixels: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """Write a 3x3 convolution of x (B, h, w, channels) by taps (3, 3, channels, columns), (B, h, w, outputs).

    Grid: pieces of a row, rows, pictures. `depth` channels go into a product at a time.
    """
    pixel = tl.program_id(0) * pixels + tl.arange(0, pixels)
    row = tl.program_id(1)
    picture = x + tl.program_id(2).to(tl.int64) * height * width * channels
    column = tl.arange(0, columns)
    channel = tl.arange(0, depth)
    total = tl.zeros((pixels, columns), tl.float32)
    for tap in tl.static_range(9):
        # A row for each pixel: the interpreter takes no single one for a mask.
        y, across = tl.zeros_like(pixel) + row + tap // 3 - 1, pixel + tap % 3 - 1
        there = (y >= 0) & (y < height) & (across >= 0) & (across < width)
        at = picture + (y.to(tl.int64) * width + across)[:, None] * channels + channel[None, :]
        weights = taps + (tap * channels + channel)[:, None] * columns + column[None, :]
        for first in range(0, channels, depth):
            seen = tl.load(at + first, mask=there[:, None], other=0.0)
            total += tl.dot(seen, tl.load(weights + first * columns))
    wanted = column < outputs
    total += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    start = (tl.program_id(2).to(tl.int64) * height + row) * width
    to = out + (start + pixel)[:, None] * outputs + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(pixel < width)[:, None] & wanted[None, :])


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
