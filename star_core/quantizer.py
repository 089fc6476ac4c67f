"""The multi-scale residual quantizer: one token map per scale, coarse to fine (paper 3.1, VAR's Algorithm 1-2).

f_hat is the running sum that the token maps build up. It stays in float32 whatever the weights are in:
the official code under autocast accumulates it in float16 and drifts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import TokenMap

PHI_COUNT = 4
PHI_RATIO = 0.5
COMMITMENT = 0.25


def phi_index(scale: int, scales: int) -> int:
    """Return which of the four phis serves a scale: the nearest tick, the first one on a tie.

    Computed in float64 as numpy does: exact ties occur (S = 10 and every odd S) and rounding decides
    them, so that another precision would pick another convolution than the official code.
    """
    ticks = np.linspace(1 / 3 / PHI_COUNT, 1 - 1 / 3 / PHI_COUNT, PHI_COUNT)
    return int(np.argmin(np.abs(ticks - scale / (scales - 1))))


def enlarged(codes: Tensor, token_map: TokenMap) -> Tensor:
    """Return codes (B, D, h, w) resized to a token map by bicubic interpolation, (B, D, H, W).

    PyTorch's on a GPU has one thread per place for all pictures and channels: products with the interpolation's
    weights are equal up to rounding, and for hundreds of pictures a hundred times as fast. Other devices may
    have none (Apple's until PyTorch 2.6); products every one has.
    """
    if codes.device.type == "cpu":
        return F.interpolate(codes, size=token_map, mode="bicubic")
    return resized_by_products(codes, token_map, "bicubic")


def averaged(codes: Tensor, token_map: TokenMap) -> Tensor:
    """Return codes (B, D, h, w) averaged over areas down to a token map, (B, D, H, W).

    Apple's GPUs refuse to where a side is not a multiple of the smaller one, and others may; products with the
    shares that places have in an area are equal up to rounding.
    """
    sides = zip(codes.shape[2:], token_map, strict=True)
    if codes.device.type in ("cpu", "cuda") or all(before % after == 0 for before, after in sides):
        return F.interpolate(codes, size=token_map, mode="area")
    return resized_by_products(codes, token_map, "area")


def resized_by_products(codes: Tensor, token_map: TokenMap, mode: str) -> Tensor:
    """Return codes (B, D, h, w) resized to a token map as `F.interpolate` does in a mode, in float32.

    On NVIDIA's GPUs in TF32 where the process allows that for products (`cuda.matmul.allow_tf32`, not by
    default).
    """
    down, across = (
        resizing_weights(before, after, mode, codes.device)
        for before, after in zip(codes.shape[2:], token_map, strict=True)
    )
    kind = codes.device.type
    # Other devices, on which nothing is trained, may know no autocast.
    with torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else contextlib.nullcontext():
        return down @ (codes.float() @ across.mT)


@functools.cache
def resizing_weights(before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Return the matrix (after, before) that resizes a side. Nobody may change it: it is remembered, for good,
    since graphs know it by its address."""
    # Outside inference mode, whose tensors no training could use later.
    with torch.inference_mode(False), torch.no_grad():
        lines = torch.eye(before).view(before, 1, 1, before)
        resized = F.interpolate(lines, size=(1, after), mode=mode).view(before, after)
        return resized.T.contiguous().to(device)


class Phi(nn.Module):
    """phi(h) = 0.5 h + 0.5 conv3x3(h): repairs what upsampling a small token map blurred.

    On NVIDIA's GPUs the products inside are of TF32 unless torch is told not to (`cudnn.allow_tf32`).
    """

    def __init__(self, code_width: int, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.conv = operations.Conv2d(code_width, code_width, kernel_size=3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, D, h, w), in the dtype of the codes."""
        repaired: Tensor = self.conv(codes.to(self.conv.weight.dtype)).to(codes.dtype)
        return codes * (1 - PHI_RATIO) + repaired * PHI_RATIO


@dataclass(frozen=True)
class Quantized:
    """Tokens of every scale, each (B, h * w) int64, and f_hat (B, D, H, W) after each scale, float32."""

    tokens: tuple[Tensor, ...]
    f_hats: tuple[Tensor, ...]


class MultiScaleQuantizer(nn.Module):
    """Codebook and phis; turns encoder features into token maps and token maps into f_hat."""

    def __init__(self, codebook_size: int, code_width: int, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.code_width = code_width
        self.codebook = operations.Embedding(codebook_size, code_width)
        self.phis = nn.ModuleList(Phi(code_width, operations=operations) for _ in range(PHI_COUNT))

    def codebook_vectors(self, device: torch.device) -> Tensor:
        """Return the whole codebook (V, D), read through forward so that a host may stream it."""
        every = torch.arange(self.codebook_size, device=device)
        vectors: Tensor = self.codebook(every)
        return vectors.float()

    def lookup(self, tokens: Tensor, token_map: TokenMap) -> Tensor:
        """Return the codebook vectors (B, D, h, w) of tokens (B, h * w)."""
        vectors: Tensor = self.codebook(tokens)
        return rearrange(vectors.float(), "b (h w) d -> b d h w", h=token_map[0], w=token_map[1])

    def nearest(self, features: Tensor) -> Tensor:
        """Return the nearest codebook entry (B, h * w) of each feature in (B, D, h, w), by L2 distance."""
        points = rearrange(features.float(), "b d h w -> (b h w) d")
        codebook = self.codebook_vectors(features.device)
        lengths = points.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
        distances = torch.addmm(lengths, points, codebook.T, alpha=-2)
        return rearrange(distances.argmin(dim=1), "(b n) -> b n", b=features.shape[0])

    def contribution(self, codes: Tensor, scale: int, maps: Sequence[TokenMap]) -> Tensor:
        """Return what codes (B, D, h, w) of a scale add to f_hat: phi(upsampled codes), (B, D, H, W)."""
        if scale < len(maps) - 1:
            codes = enlarged(codes, maps[-1])
        added: Tensor = self.phis[phi_index(scale, len(maps))](codes)
        return added.float()

    def empty_f_hat(self, batch: int, maps: Sequence[TokenMap], device: torch.device) -> Tensor:
        """Return the f_hat before the first scale: zeros (B, D, H, W) in float32."""
        return torch.zeros(batch, self.code_width, *maps[-1], device=device)

    def next_input(self, f_hat: Tensor, token_map: TokenMap) -> Tensor:
        """Return f_hat area-downsampled to the next scale, (B, h * w, D)."""
        smaller = averaged(f_hat, token_map)
        return rearrange(smaller, "b d h w -> b (h w) d")

    def quantize(
        self,
        features: Tensor,
        maps: Sequence[TokenMap],
        shown: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Quantized:
        """Quantize features (B, D, H, W), the size of the last map, into a token map per scale.

        shown: from a scale and its tokens (B, h * w) to those that f_hat takes instead; what follows makes up
        for them. The result's tokens are the nearest all the same.
        """
        rest = features.float()
        f_hat = torch.zeros_like(rest)
        tokens, f_hats = [], []
        for scale, token_map in enumerate(maps):
            last = scale == len(maps) - 1
            seen = rest if last else averaged(rest, token_map)
            tokens.append(self.nearest(seen))
            taken = tokens[-1] if shown is None else shown(scale, tokens[-1])
            added = self.contribution(self.lookup(taken, token_map), scale, maps)
            f_hat = f_hat + added
            rest = rest - added
            f_hats.append(f_hat)
        return Quantized(tuple(tokens), tuple(f_hats))

    def f_hats(self, tokens: Sequence[Tensor], maps: Sequence[TokenMap]) -> tuple[Tensor, ...]:
        """Return f_hat (B, D, H, W) after each of the given scales' tokens (B, h * w)."""
        f_hat = self.empty_f_hat(tokens[0].shape[0], maps, tokens[0].device)
        after = []
        for scale, scale_tokens in enumerate(tokens):
            codes = self.lookup(scale_tokens, maps[scale])
            f_hat = f_hat + self.contribution(codes, scale, maps)
            after.append(f_hat)
        return tuple(after)

    def teacher_inputs(self, tokens: Sequence[Tensor], maps: Sequence[TokenMap]) -> Tensor:
        """Return the transformer's inputs for scales 1.. under teacher forcing, (B, L - h0 * w0, D)."""
        return self.next_inputs(self.f_hats(tokens[: len(maps) - 1], maps), maps)

    def next_inputs(self, f_hats: Sequence[Tensor], maps: Sequence[TokenMap]) -> Tensor:
        """Return the inputs of scales 1.., (B, L - h0 * w0, D), from f_hat after each scale before them."""
        inputs = [self.next_input(f, m) for f, m in zip(f_hats, maps[1:], strict=True)]
        return torch.cat(inputs, dim=1)

    def training_losses(self, features: Tensor, maps: Sequence[TokenMap]) -> tuple[Tensor, Tensor, Quantized]:
        """Return (straight-through f_hat, quantizer loss, tokens) for features (B, D, H, W).

        The loss is VAR's: per scale, 0.25 x commitment + codebook, averaged over the scales.
        """
        quantized = self.quantize(features.detach(), maps)
        loss = features.new_zeros(())
        for f_hat in quantized.f_hats:
            loss = loss + COMMITMENT * F.mse_loss(features, f_hat.detach())
            loss = loss + F.mse_loss(f_hat, features.detach())
        straight_through = features + (quantized.f_hats[-1] - features).detach()
        return straight_through, loss / len(maps), quantized
