"""The VQ-VAE around the quantizer: taming-transformers' encoder and decoder, as VAR uses them (paper 3.1).

Pictures are (B, 3, H, W) in [-1, 1]; features are (B, D, H / f, W / f) with f = `VQVAEConfig.downsample`.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import VQVAEConfig
from .kernels import fused
from .memory import pictures_at_once
from .quantizer import MultiScaleQuantizer
from .slices import enlarged_conv, in_strips, norm_silu_conv, worth_slicing

NORM_EPS = 1e-6
LAYOUT = torch.channels_last
"""Of pictures and features: a quarter faster than channels first on CPUs (NOTES.md)."""


@fused("norms.norm_silu")
def norm_silu(x: Tensor, norm: nn.GroupNorm, bias: Tensor | None = None) -> Tensor:
    """Return silu(norm(x + bias)) of x (B, C, h, w), bias (C,): x may be used up where there is one."""
    if bias is not None:
        bias = bias.to(x).view(-1, 1, 1)
        x = x + bias if torch.is_grad_enabled() else x.add_(bias)
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


@fused("norms.normalised")
def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Return norm(x) of x (B, C, h, w)."""
    return norm(x)  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any


@fused("wide.attended")
def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what queries (B, H, n, C) see of keys and values (B, H, N, C), as (B, H, n, C)."""
    return F.scaled_dot_product_attention(q, k, v)


@fused("convolutions.convolved")
def convolved(x: Tensor, conv: nn.Module) -> Tensor:
    """Return conv(x) of x (B, C, h, w)."""
    made: Tensor = conv(x)
    return made


@fused("convolutions.convolved_apart")
def convolved_apart(x: Tensor, conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return conv(x) of x (B, C, h, w), or what it is without its bias, and that (C,)."""
    return conv(x), None


@fused("convolutions.doubled")
def doubled(x: Tensor) -> Tensor:
    """Return x (B, C, h, w) with each number four times, (B, C, 2 h, 2 w)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@fused("convolutions.convolved_onto", on_cpu="cpu.convolved_onto")
def convolved_onto(total: Tensor, x: Tensor, conv: nn.Module) -> Tensor:
    """Return total (B, C', h, w) + conv(x), written into `total` where no gradients are wanted."""
    made: Tensor = conv(x)
    return total + made if torch.is_grad_enabled() else total.add_(made)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the channels change.

    Without gradients the sum is written into x where the channels stay the same: nobody reads x afterwards, and
    a caller that still names it would keep one more picture-sized tensor.
    """

    def __init__(self, channels_in: int, channels_out: int, groups: int, operations: ModuleType) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(groups, channels_in, eps=NORM_EPS)
        self.conv1 = operations.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = operations.GroupNorm(groups, channels_out, eps=NORM_EPS)
        self.conv2 = operations.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = (
            nn.Identity() if channels_in == channels_out else operations.Conv2d(channels_in, channels_out, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h, w)."""
        if worth_slicing(x):
            return self._in_strips(x)
        h, bias = convolved_apart(norm_silu(x, self.norm1), self.conv1)
        h = norm_silu(h, self.norm2, bias)
        return convolved_onto(self.shortcut(x), h, self.conv2)

    def _in_strips(self, x: Tensor) -> Tensor:
        """Map as `forward` does."""
        channels = self.norm2.num_channels
        h = norm_silu_conv(x, self.norm1, self.conv1, channels=channels)
        shortcut: Tensor = self.shortcut(x)
        return norm_silu_conv(h, self.norm2, self.conv2, channels=channels, onto=shortcut)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int, groups: int, operations: ModuleType) -> None:
        super().__init__()
        self.norm = operations.GroupNorm(groups, channels, eps=NORM_EPS)
        self.qkv = operations.Conv2d(channels, 3 * channels, 1)
        self.proj = operations.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        q, k, v = rearrange(self.qkv(normalised(x, self.norm)), "b (t c) h w -> t b 1 (h w) c", t=3)
        mixed = attended(q, k, v)
        back = rearrange(mixed, "b 1 (h w) c -> b c h w", h=x.shape[2])
        projected: Tensor = self.proj(back)
        return x + projected


class Downsample(nn.Module):
    """Halve both sides: a stride-2 convolution over a picture padded at the right and the bottom."""

    def __init__(self, channels: int, operations: ModuleType) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h / 2, w / 2)."""
        halved: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return halved


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, operations: ModuleType) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2 h, 2 w)."""
        if worth_slicing(x, 2):
            return enlarged_conv(x, self.conv)
        return convolved(doubled(x), self.conv)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention at the lowest one."""

    def __init__(
        self,
        channels: list[int],
        groups: int,
        operations: ModuleType,
        *,
        attend: bool,
        resize: nn.Module | None,
    ) -> None:
        super().__init__()
        pairs = list(zip(channels, channels[1:], strict=False))
        self.block = nn.ModuleList(ResidualBlock(a, b, groups, operations) for a, b in pairs)
        self.attn = nn.ModuleList(SpatialAttention(b, groups, operations) for _, b in pairs if attend)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w'), resized where the level ends in a change of resolution."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x if self.resize is None else self.resize(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, operations: ModuleType) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups, operations)
        self.attn_1 = SpatialAttention(channels, groups, operations)
        self.block_2 = ResidualBlock(channels, channels, groups, operations)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        x = self.block_1(x)
        x = self.attn_1(x)
        return self.block_2(x)  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any


class Encoder(nn.Module):
    """Picture to features."""

    def __init__(self, config: VQVAEConfig, operations: ModuleType) -> None:
        super().__init__()
        base, groups = config.base_channels, config.norm_groups
        widths = [base * m for m in config.channel_multipliers]
        self.conv_in = operations.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([base, *widths], widths, strict=False)):
            lowest = level == len(widths) - 1
            self.down.append(
                Level(
                    [before] + [width] * config.residual_blocks,
                    groups,
                    operations,
                    attend=lowest,
                    resize=None if lowest else Downsample(width, operations),
                )
            )
        self.mid = Middle(widths[-1], groups, operations)
        self.norm_out = operations.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = operations.Conv2d(widths[-1], config.code_width, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, D, H / f, W / f)."""
        x = self.conv_in(pictures)
        for level in self.down:
            x = level(x)
        features: Tensor = self.conv_out(norm_silu(self.mid(x), self.norm_out))
        return features


class Decoder(nn.Module):
    """Features to picture. `up` is stored from the finest level to the lowest, as in taming."""

    def __init__(self, config: VQVAEConfig, operations: ModuleType) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.conv_in = operations.Conv2d(config.code_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups, operations)
        self.up = nn.ModuleList()
        for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            self.up.append(
                Level(
                    [before] + [width] * (config.residual_blocks + 1),
                    groups,
                    operations,
                    attend=level == len(widths) - 1,
                    resize=None if level == 0 else Upsample(width, operations),
                )
            )
        self.norm_out = operations.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = operations.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, 3, h * f, w * f)."""
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        if worth_slicing(x):
            return norm_silu_conv(x, self.norm_out, self.conv_out, channels=3)
        return convolved(norm_silu(x, self.norm_out), self.conv_out)


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder with the two 3x3 convolutions between them."""

    def __init__(self, config: VQVAEConfig, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, operations)
        self.decoder = Decoder(config, operations)
        self.quantizer = MultiScaleQuantizer(config.codebook_size, config.code_width, operations=operations)
        self.quant_conv = operations.Conv2d(config.code_width, config.code_width, 3, padding=1)
        self.post_quant_conv = operations.Conv2d(config.code_width, config.code_width, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the biases, since weights may be kept in another."""
        dtype: torch.dtype = self.post_quant_conv.bias.dtype
        return dtype

    def channels_last(self) -> VQVAE:
        """Lay convolutions' weights out as pictures are: a GPU turns others at every call. Return self."""
        for part in (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv):
            part.to(memory_format=LAYOUT)  # type: ignore[call-overload]  # torch's annotations lack it
        return self

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the features (B, D, H / f, W / f) of pictures (B, 3, H, W) in [-1, 1], not quantized.

        Raises ValueError where a side is not a multiple of f.
        """
        height, width = pictures.shape[-2:]
        step = self.config.downsample
        if height % step or width % step:
            raise ValueError(f"pictures of {width}x{height} pixels: both sides must be multiples of {step}")
        together = pictures_at_once(self.config, (height // step, width // step))
        if len(pictures) > together:
            return torch.cat([self.encode(some) for some in pictures.split(together)])
        pictures = pictures.to(self.dtype, memory_format=LAYOUT)
        features: Tensor = self.quant_conv(self.encoder(pictures))
        return features.float()

    def decode(self, f_hat: Tensor) -> Tensor:
        """Return the pictures (B, 3, h * f, w * f) of f_hat (B, D, h, w), clamped to [-1, 1], float32."""
        together = pictures_at_once(self.config, f_hat.shape[2:])
        if len(f_hat) > together:
            return torch.cat([self.decode(some) for some in f_hat.split(together)])
        f_hat = f_hat.to(self.dtype, memory_format=LAYOUT)
        pictures = self.decoder(self.post_quant_conv(f_hat))
        return pictures.float().clamp(-1, 1)  # type: ignore[no-any-return]  # Module call: Any

    @torch.no_grad()
    def pictures(self, f_hat: Tensor, *, sliced: bool = False) -> Tensor:
        """Return the pictures (B, 3, h * f, w * f) in [0, 1] of f_hat (B, D, h, w), of any scale's step.

        sliced: in strips, which takes less memory and longer, and gives the same pictures (`slices`).
        """
        with in_strips() if sliced else contextlib.nullcontext():
            return (self.decode(f_hat) + 1) / 2
