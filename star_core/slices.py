"""Convolutions over large feature maps, a few rows at a time, with the same result as in one go.

What a tile of a picture cannot know is only the normalisation: its mean and deviation are taken over the whole
map first. Then normalise, activate and convolve go strip by strip, each with the rows above and below that the
kernel sees. Whole maps exist only as input and output of a layer. It takes longer, and is for where memory is
short. Inference alone: training needs the whole map's graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

STRIP = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Elements of one strip: what a CPU's cache holds, what fills a GPU. Smaller maps are computed whole."""

SUMMED = 1 << 14
"""Numbers of a channel that a CPU sums up one after the other, in float32, without losing digits that count."""

_sliced: ContextVar[bool] = ContextVar("sliced", default=False)


@contextlib.contextmanager
def in_strips() -> Iterator[None]:
    """Compute large maps in strips within the block, in this thread."""
    token = _sliced.set(True)
    try:
        yield
    finally:
        _sliced.reset(token)


@dataclass(frozen=True)
class Strip:
    """Rows top..bottom of a map, and how many rows of its neighbours lie above and below them."""

    top: int
    bottom: int
    above: int
    below: int

    def of(self, x: Tensor) -> Tensor:
        """Return the rows of x (B, C, h, w), its neighbours' included."""
        return x[:, :, self.top - self.above : self.bottom + self.below]

    def inner(self, y: Tensor, scale: int = 1) -> Tensor:
        """Return the strip's own rows of what its rows became, `scale` times as high."""
        return y[:, :, self.above * scale : y.shape[2] - self.below * scale]

    def rows(self, scale: int = 1) -> slice:
        """Return where those rows belong."""
        return slice(self.top * scale, self.bottom * scale)


def worth_slicing(x: Tensor, scale: int = 1) -> bool:
    """Whether a map x (B, C, h, w), to become `scale` times as high and wide, is computed in strips."""
    return _sliced.get() and not torch.is_grad_enabled() and x.numel() * scale * scale > _most(x)


def strips(x: Tensor, scale: int = 1) -> Iterator[Strip]:
    """Yield strips of a map x (B, C, h, w) from top to bottom, with a row of each neighbour."""
    height, rows = x.shape[2], _rows(x, scale)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        yield Strip(top, bottom, min(1, top), min(1, height - bottom))


def _rows(x: Tensor, scale: int = 1) -> int:
    """Return how many rows of a map x (B, C, h, w) a strip has."""
    return max(1, _most(x) // (x.numel() // x.shape[2] * scale * scale))


def _most(x: Tensor) -> int:
    return STRIP.get(x.device.type, STRIP["cuda"])


def norm_silu_conv(
    x: Tensor, norm: nn.GroupNorm, conv: nn.Module, *, channels: int, onto: Tensor | None = None
) -> Tensor:
    """Return conv(silu(norm(x))) of x (B, C, h, w) for a 3x3 convolution to `channels`, in strips.

    onto (B, channels, h, w): another map that the result is added to, in its place.
    """
    out = _empty_like(x, channels, x.shape[2], x.shape[3]) if onto is None else onto
    for seen, made in _apart(x, out):
        normalised = _normaliser(seen, norm)
        for strip in strips(seen):
            rows = strip.inner(conv(F.silu(normalised(strip.of(seen)), inplace=True).to(x.dtype)))
            if onto is None:
                made[:, :, strip.rows()] = rows
            else:
                made[:, :, strip.rows()] += rows
    return out


def enlarged_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """Return the 3x3 convolution of x (B, C, h, w) after doubling its sides, in strips."""
    out = _empty_like(x, x.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    for strip in strips(x, 2):
        doubled = F.interpolate(strip.of(x), scale_factor=2.0, mode="nearest")
        out[:, :, strip.rows(2)] = strip.inner(conv(doubled), 2)
    return out


Normaliser = Callable[[Tensor], Tensor]


def _apart(x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x and its output as they are computed: on a CPU, which has no use for more, picture by picture."""
    return zip(x.split(1), out.split(1), strict=True) if _by_channels(x) else iter([(x, out)])


def _by_channels(x: Tensor) -> bool:
    """Whether `batch_norm` normalises x: in bfloat16 a CPU's makes no float32 copies. Else nothing is won."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _normaliser(x: Tensor, norm: nn.GroupNorm) -> Normaliser:
    """Return what makes norm(x)'s rows of x's rows."""
    weight, bias = (each.to(x.device, torch.float32) for each in (norm.weight, norm.bias))
    each = x.shape[1] // norm.num_groups
    mean, variance = _moments(x, norm.num_groups)
    means = mean.float().repeat_interleave(each, dim=1)
    if _by_channels(x):
        variances = variance.float().repeat_interleave(each, dim=1)
        return lambda rows: F.batch_norm(rows, means[0], variances[0], weight, bias, eps=norm.eps)
    scale = (variance + norm.eps).rsqrt().float().repeat_interleave(each, dim=1) * weight
    shift = bias - means * scale
    factor, addend = (rearrange(part, "b c -> b c 1 1") for part in (scale, shift))
    return lambda rows: torch.addcmul(addend, rows.float(), factor)


def _moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean and variance (B, G) of each group of channels of x (B, C, h, w)."""
    # Other devices may have nothing wider (Apple's, Intel's).
    wide = torch.float64 if x.device.type in ("cpu", "cuda") else torch.float32
    most = max(1, SUMMED // x.shape[3]) if _by_channels(x) else x.shape[2]
    counts, found = [], []
    for rows in x.split(min(_rows(x), most), dim=2):
        counts.append(rows.shape[2])
        found.append([each.to(wide) for each in _moments_of_rows(rows, groups)])
    means, variances = (torch.stack(each) for each in zip(*found, strict=True))
    weights = torch.tensor(counts, dtype=wide, device=x.device)[:, None, None] / x.shape[2]
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0)


def _moments_of_rows(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean and variance (B, G) of each group of channels of rows (B, C, n, w)."""
    if _by_channels(rows):
        zeros, ones = rows.new_zeros(rows.shape[1], dtype=torch.float32), rows.new_ones(rows.shape[1]).float()
        # The only operation that takes moments of half precision in float32 and writes no map.
        found = torch.batch_norm_update_stats(rows, zeros, ones, 0.0)
        means, variances = (each.double().view(1, groups, -1) for each in found)
        mean = means.mean(dim=-1)
        return mean, (variances + (means - mean.unsqueeze(-1)).square()).mean(dim=-1)
    grouped = rearrange(rows.float(), "b (g c) h w -> b g (c h w)", g=groups)
    variance, mean = torch.var_mean(grouped, dim=-1, correction=0)
    return mean, variance


def _empty_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
