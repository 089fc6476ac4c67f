"""Weights in the order in which a CPU's matrix units read them, laid out once instead of at every product.

A plain bfloat16 matrix is turned into blocks by each product that reads it (oneDNN), ten times and more a
picture, and small scales spend most of their time on it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether oneDNN is built in, and multiplies bfloat16 on this processor, tried once."""
    operators = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, o) for o in operators):
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16)
    try:
        return bool((product(ones, packed(ones), None) == 16).all())
    except Exception as error:  # the operators are private, and differ between versions of PyTorch
        _log.info("No products in bfloat16 by oneDNN: %s", str(error).partition("\n")[0])
        return False


def can_be_packed(dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether weights of this dtype, on this device, can be packed."""
    return device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16_products()


def check_packing(dtype: torch.dtype, device: torch.device, eight_bit: str | None) -> None:
    """Raise ValueError where weights cannot be packed."""
    if eight_bit or not can_be_packed(dtype, device):
        raise ValueError(
            "packed weights are bfloat16, not 8-bit, for a CPU with bfloat16 products (dtype"
            f" {str(dtype).removeprefix('torch.')}, device {device}, eight_bit {eight_bit}): choose --dtype"
            " bfloat16 on such a CPU, or leave packed out"
        )


def packed(weight: Tensor) -> Tensor:
    """Return a bfloat16 weight (out, in) in oneDNN's order, in memory of its own."""
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return made


class PackedLinear(nn.Module):
    """A linear layer, on a CPU and in bfloat16, whose weight (out, in) is `packed`, and its bias (out,) plain.

    The weight is no parameter: nothing else can read, move, cast, copy or save it.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return product(x, self._weight, self.bias)

    def expanded(self, x: Tensor) -> Tensor:
        """Map (..., in) to the tanh-approximated GELU of (..., out)."""
        return product(x, self._weight, self.bias, gelu=True)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """Return x (..., in) times a weight (out, in), packed or plain, in bfloat16 on a CPU.

    gelu: its tanh-approximated GELU, read from the float32 sums.
    """
    assert x.dtype == torch.bfloat16, f"a bfloat16 product, of activations in {x.dtype}"
    activation, kind = ("gelu", "tanh") if gelu else ("none", "")
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind)
    return made


def put_packed(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put packed layers in the place of a module's linear ones, by their paths; biases stay."""
    for path, weight in weights.items():
        owner, _, leaf = path.rpartition(".")
        plain = cast(nn.Linear, module.get_submodule(path))
        setattr(module.get_submodule(owner), leaf, PackedLinear(weight, plain.bias))
