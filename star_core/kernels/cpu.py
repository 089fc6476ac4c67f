"""What a CPU computes in fewer passes over memory: oneDNN adds and activates as it multiplies, or in place.

In half precision sums are rounded once, where the references round each of their steps. Written without einops,
whose every call takes 4 microseconds: a picture makes thousands.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import LayerCache, scale_of
from ..packed import PackedLinear, has_bfloat16_products, product
from ..rope import Rotation
from ..transformer import norm
from ..upcast import HALVES, Linear, needs_upcast

LENGTH_EPS = 1e-12  # that of F.normalize

_log = logging.getLogger(__name__)


def expanded(x: Tensor, linear: nn.Module) -> Tensor | None:
    """Do what `transformer.expanded` does, the GELU on the product's float32 sums.

    Plain layers alone: one of a host's, or one with 8-bit weights, knows by itself how it is to be applied.
    """
    if isinstance(linear, PackedLinear):
        return linear.expanded(x)
    if linear._forward_hooks or linear._forward_pre_hooks:
        return None
    if type(linear) is Linear and x.dtype in HALVES:
        return linear.expanded(x)
    if type(linear) is not nn.Linear or linear.bias is None or x.dtype != torch.bfloat16:
        return None
    if not has_bfloat16_products():
        return None
    alike = x.dtype == linear.weight.dtype == linear.bias.dtype and x.device == linear.weight.device
    return product(x, linear.weight, linear.bias, gelu=True) if alike else None


def added(x: Tensor, addend: Tensor) -> Tensor | None:
    """Do what `transformer.added` does, in place."""
    return addend.add_(x) if addend.shape == x.shape and addend.dtype == x.dtype else None


def add_then_norm(x: Tensor, addend: Tensor, rows: int) -> tuple[Tensor, Tensor] | None:
    """Do what `transformer.add_then_norm` does, in place."""
    total = added(x, addend)
    return None if total is None else (total, norm(total[:rows]))


def self_heads(
    qkv: Tensor,
    q_bias: Tensor,
    v_bias: Tensor,
    log_scale: Tensor,
    rotation: Rotation,
    cache: LayerCache | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `attention.self_heads` does, queries and keys together and in place."""
    heads, width = log_scale.shape[1], len(q_bias)
    both, v = qkv[..., : 2 * width].float(), qkv[..., 2 * width :]
    both[..., :width].add_(q_bias.to(both))
    v.add_(v_bias.to(v))
    pairs = torch.view_as_complex(both.unflatten(-1, (2, heads, -1, 2)))  # (R, L, 2, H, head_width / 2)
    pairs.mul_(torch.complex(*rotation)[..., None, None, :])
    vectors = torch.view_as_real(pairs).flatten(-2)
    factors = _inverse_lengths(vectors)
    factors[:, :, 0].mul_(scale_of(log_scale, qkv.device).view(heads, 1))
    q, k = vectors.mul_(factors).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v.unflatten(-1, (heads, -1))))
    if cache is None:
        return q.to(v.dtype), k.to(v.dtype), v
    return q.to(v.dtype), *cache.extend(k, v)


def cross_queries(q: Tensor, q_bias: Tensor, log_scale: Tensor) -> Tensor:
    """Do what `attention.cross_queries` does, in place."""
    heads = log_scale.shape[1]
    summed = q.float()
    vectors: Tensor = summed.add_(q_bias.to(summed)).unflatten(-1, (heads, -1))
    factors = _inverse_lengths(vectors).mul_(scale_of(log_scale, q.device).view(heads, 1))
    return vectors.mul_(factors).to(q.dtype).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """Do what `attention.attended` does in float16: a CPU's attention to that takes three times as long."""
    if q.dtype != torch.float16 or not needs_upcast(q.dtype, q.device):
        return None
    wide = mask.float() if mask is not None and mask.is_floating_point() else mask
    mixed = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=wide, scale=1.0)
    return mixed.to(q.dtype)


def _inverse_lengths(x: Tensor) -> Tensor:
    """Return 1 / |x| over the last axis, which stays."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.clamp_min_(LENGTH_EPS).reciprocal_()


def convolved_onto(total: Tensor, x: Tensor, conv: nn.Module) -> Tensor | None:
    """Do what `vqvae.convolved_onto` does, in one pass over `total`."""
    if type(conv) is not nn.Conv2d or conv._forward_hooks or conv._forward_pre_hooks:
        return None
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str) or torch.is_autocast_enabled("cpu"):
        return None
    alike = all(t.dtype == x.dtype for t in (total, *conv.parameters()))
    laid_out = all(t.is_contiguous(memory_format=torch.channels_last) for t in (total, x))
    if not (alike and laid_out and _convolves(x.dtype)):
        return None
    return _convolve_onto(
        total, x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    )


def _convolve_onto(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *layout: object) -> Tensor:
    """Add a convolution of x to total, and return it. layout: padding, stride, dilation and groups."""
    how = "add", 1.0  # times what is there
    no_activation: tuple[object, ...] = None, [], None
    torch.ops.mkldnn._convolution_pointwise_.binary(total, x, weight, bias, *layout, *how, *no_activation)
    return total


@functools.cache
def _convolves(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this dtype here, tried once: what fails afterwards is no matter of the build."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not has_bfloat16_products():
        return False
    x, total = (torch.ones(1, 4, 2, 2, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
    weight = torch.ones(4, 4, 3, 3, dtype=dtype)
    try:
        found = _convolve_onto(total, x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    except Exception as error:  # the operator is private, and differs between versions of PyTorch
        _log.info("No convolutions onto sums in %s: %s", dtype, str(error).partition("\n")[0])
        return False
    return bool((found == 1 + F.conv2d(x, weight, padding=1)).all())
