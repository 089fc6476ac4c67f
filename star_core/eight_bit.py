"""8-bit weights, a fast mode that the loader switches on: which formats there are, which layers take them.

The heads, whose logits decide tokens, stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from .fp8 import Float8Linear, has_products
from .int8 import Int8Linear

FORMATS: dict[str, Callable[[nn.Linear], nn.Module]] = {"int8": Int8Linear, "fp8": Float8Linear}
"""What `load` calls them, and the layer of each."""
EXACT = ("head",)
"""Names of layers that keep their weights."""

_log = logging.getLogger(__name__)


def quantize_linears(module: nn.Module, eight_bit: str) -> nn.Module:
    """Replace the linear layers below a module, heads apart, one at a time; return the module."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            quantize_linears(child, eight_bit)
        elif name not in EXACT:
            setattr(module, name, FORMATS[eight_bit](child))
    return module


def check_eight_bit(eight_bit: str | None, device: torch.device) -> None:
    """Say so where a device has to make FP8 weights whole for every product.

    Raises ValueError for a format that is none of `FORMATS`, and for a device that cannot even hold it.
    """
    if eight_bit is not None and eight_bit not in FORMATS:
        raise ValueError(f"8-bit weights are {' or '.join(FORMATS)}, not {eight_bit!r}")
    if eight_bit == "fp8" and device.type == "mps":
        raise ValueError("fp8 cannot be had on mps, which knows no 8-bit floats: choose int8 or bfloat16")
    if eight_bit == "fp8" and not has_products(device):
        _log.warning(
            "fp8 is slow on %s, which has no FP8 products (NVIDIA's Ada, Hopper and later have): weights are"
            " made whole for each product. int8, or no 8-bit weights, will be faster here",
            device,
        )
