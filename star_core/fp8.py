"""FP8 weights: linear layers in 8-bit floats (e4m3), a fast mode for GPUs that multiply them (Hopper, Ada).

Every output channel has its own scale, and so has every token's activation, both so that the largest magnitude
becomes the format's: what `int8` does with bytes, at twice the rate of bfloat16 products. Where a device has no
such products, or a layer no sides that they take, the weights are made whole again for each product: slow, and
another rounding, since activations stay as they are. What it gains and costs is measured in NOTES.md.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import NO_ROOM, fused
from .upcast import halves_to_upcast

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest magnitude that e4m3 holds."""
SMALLEST = 1e-12
"""A row's largest magnitude counts as no less, so that zeros have a scale too."""
MULTIPLE = 16
"""Sides of a matrix, and tokens, that the FP8 products take; tokens are filled up with zeros."""
LEAST_CAPABILITY = (8, 9)
"""CUDA's, of the first GPUs with FP8 products."""
REFUSED = "NOT_SUPPORTED"
"""What cuBLAS says of a shape that it has no kernel for."""
MOST_PARTS = 8

_PARTS: dict[tuple[torch.device | int, ...], int] = {}
"""Device, tokens, out and in of products that must be made in parts, and in how many: found out once."""

_log = logging.getLogger(__name__)


def has_products(device: torch.device) -> bool:
    """Whether a device, and this PyTorch on it, multiply e4m3 matrices with a scale for every row of both."""
    if device.type != "cuda" or torch.version.hip is not None or not hasattr(torch, "_scaled_mm"):
        return False
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _has_rows_of_scales(torch.device("cuda", index))


@functools.cache
def _has_rows_of_scales(device: torch.device) -> bool:
    """Try the smallest product: builds of PyTorch lack it for some GPUs or systems, and say so only then."""
    side = torch.zeros(MULTIPLE, MULTIPLE, device=device).to(FORMAT)
    scale = torch.ones(MULTIPLE, 1, device=device)
    try:
        found = _product(side, side, scale, scale, None)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if any(said in str(error) for said in NO_ROOM):
            raise  # this once: what is returned is remembered
        _log.info("no FP8 products on %s: %s", device, str(error).splitlines()[0])
        return False
    return isinstance(found, Tensor)


class Float8Linear(nn.Module):
    """A linear layer with weights (out, in) in e4m3 and a float32 scale per output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self._upcast = halves_to_upcast()
        rounded, scale = round_rows(whole.weight.detach())
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out) in the dtype of x."""
        # Codes of one picture come turned on their side: the products want rows in one piece.
        rows = x.reshape(-1, self.in_features).contiguous()
        if x.device.type == "cpu" and x.dtype in self._upcast:
            rows = rows.float()
        # A host that is short of memory may have left the layer behind, and knows nothing of its buffers.
        weight, scale = self.weight.to(x.device), self.scale.to(x.device)
        bias = None if self.bias is None else self.bias.to(x.device)
        fits = self.in_features % MULTIPLE == 0 and self.out_features % MULTIPLE == 0
        product = _by_fp8 if fits and has_products(x.device) else _by_whole_weights
        return product(rows, weight, scale, bias).to(x.dtype).view(*x.shape[:-1], self.out_features)


@fused("rounding.round_rows")
def round_rows(rows: Tensor, *, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Return rows (m, n) in e4m3 and their scales (m, 1) in float32: rows = rounded * scale, nearly.

    Rows of zeros are added until m is a multiple of `multiple`. Scaled by products alone, which round the same
    way everywhere: torch divides by a number in one way on a CPU and in another on a GPU.
    """
    exact, lacking = rows.float(), -len(rows) % multiple
    if lacking:
        exact = F.pad(exact, (0, 0, 0, lacking))
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST) * (1 / LARGEST)
    return (exact * scale.reciprocal()).to(FORMAT), scale


def _by_fp8(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return rows (m, in) times weights (out, in) with scales (out, 1), as (m, out) in bfloat16 or float32.

    cuBLAS refuses some shapes (7680 to 1920 on an H200, not 4096 to 1024): those are made in two or more parts
    of the sum, or, where it takes none, by whole weights.
    """
    rounded, step = round_rows(rows, multiple=MULTIPLE)
    shape = weight.device, len(rounded), *weight.shape
    while (parts := _PARTS.get(shape, 1)) <= MOST_PARTS and not weight.shape[1] % (parts * MULTIPLE):
        try:
            return _summed(rounded, step, weight, scale, bias, parts)[: len(rows)]
        except RuntimeError as error:
            if REFUSED not in str(error):
                raise
            _PARTS[shape] = 2 * parts
    return _by_whole_weights(rows, weight, scale, bias)


def _summed(
    rows: Tensor, step: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, parts: int
) -> Tensor:
    """Return the product of rounded rows (m, in), a sum of `parts` products over a share of `in` each."""
    half = None if bias is None else bias.to(torch.bfloat16)
    columns = zip(rows.chunk(parts, dim=1), weight.chunk(parts, dim=1), strict=True)
    products = [
        _product(left, right, step, scale, half if number == 0 else None)
        for number, (left, right) in enumerate(columns)
    ]
    return products[0] if parts == 1 else torch.stack(products).sum(dim=0, dtype=torch.float32)


def _product(rows: Tensor, weight: Tensor, step: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return one product of e4m3 rows (m, k) and weights (n, k), with their scales (m, 1) and (n, 1)."""
    product: Tensor = torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=step,
        scale_b=scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product


def _by_whole_weights(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the same in the dtype of the rows, which are not rounded."""
    whole = weight.float().mul_(scale).to(rows.dtype)
    return F.linear(rows, whole, None if bias is None else bias.to(rows.dtype))
