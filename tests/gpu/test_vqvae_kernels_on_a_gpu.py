"""The VQ-VAE's compiled kernels against their references, at the released sizes, and whole pictures by both."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="no Triton here: there are no kernels to compare")

from star_core import load, slices
from star_core.config import VQVAEConfig
from star_core.kernels import references_only
from star_core.kernels.convolutions import _multiplies, _to_few_channels
from star_core.quantizer import enlarged
from star_core.vqvae import (
    LAYOUT,
    VQVAE,
    attended,
    convolved,
    convolved_apart,
    convolved_onto,
    doubled,
    norm_silu,
    normalised,
)

pytestmark = pytest.mark.usefixtures("kernels_serve")
ERROR = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Greatest difference beside the largest number expected: a step of the halves there."""
SHAPES = {
    "1024 px": (1, 160, 1024, 1024),
    "512 px": (1, 320, 512, 512),
    "256 px": (1, 320, 256, 256),
    "64 cells": (1, 640, 64, 64),
    "a batch": (5, 160, 96, 64),
    "odd sides": (2, 640, 37, 19),
    "one position": (3, 160, 1, 1),
}


@pytest.fixture(scope="module")
def released() -> VQVAE:
    """A VQ-VAE of the released size with random weights."""
    with torch.random.fork_rng(), torch.device("cuda"):
        torch.manual_seed(0)
        return VQVAE(VQVAEConfig()).requires_grad_(False).eval()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def picture(*shape: int) -> Tensor:
    """Return channels far from zero and unlike each other, and rows unlike each other, channels last."""
    steps = torch.linspace(0.1, 3, shape[2], device="cuda")[:, None]
    x = 5 + 4 * normal(1, 1, shape[1], 1, 1) + normal(2, *shape) * steps
    return x.contiguous(memory_format=LAYOUT)


def layer(channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(32, channels, eps=1e-6, device="cuda").requires_grad_(False)
    norm.weight.copy_(1 + 0.5 * normal(3, channels))
    norm.bias.copy_(normal(4, channels))
    return norm


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def decibels(ours: Tensor, theirs: Tensor) -> float:
    return float(-10 * (ours - theirs).square().mean().log10())


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("case", SHAPES)
@torch.no_grad()
def test_pictures_are_normalised_as_in_float32(served: list[str], case: str, dtype: torch.dtype):
    norm = layer(SHAPES[case][1]).to(dtype)
    x = picture(*SHAPES[case]).to(dtype)
    theirs = F.group_norm(x.float(), 32, norm.weight.float(), norm.bias.float(), norm.eps)
    ours = normalised(x, norm)
    assert distance(ours, theirs) < ERROR[dtype]
    assert distance(norm_silu(x, norm), F.silu(theirs)) < ERROR[dtype]
    assert served == ["norms.normalised", "norms.norm_silu"]
    assert ours.dtype == dtype
    assert ours.stride() == x.stride()


def convolution(channels: int, out: int, dtype: torch.dtype) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, 3, padding=1, device="cuda").requires_grad_(False)
    conv.weight.copy_(normal(11, *conv.weight.shape) / conv.weight[0].numel() ** 0.5)
    conv.bias.copy_(3 * normal(12, out))
    return conv.to(dtype).to(memory_format=LAYOUT)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("case", SHAPES)
@torch.no_grad()
def test_convolutions_are_those_of_float32(served: list[str], case: str, dtype: torch.dtype):
    batch, channels, *sides = SHAPES[case]
    x, conv, norm = picture(*SHAPES[case]).to(dtype), convolution(channels, channels, dtype), layer(channels)
    total = normal(13, batch, channels, *sides).to(dtype).contiguous(memory_format=LAYOUT)
    exact = F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=1)
    normed = F.silu(F.group_norm(exact, 32, norm.weight, norm.bias, norm.eps))
    # cuDNN sums up float32 in an order of its own.
    error = max(ERROR[dtype], 3e-5)
    assert distance(convolved(x, conv), exact) < error
    made, bias = convolved_apart(x, conv)
    assert distance(norm_silu(made, norm.to(dtype), bias), normed) < 2 * error
    summed = exact + total.float()
    assert distance(convolved_onto(total, x, conv), summed) < error
    assert torch.equal(doubled(x), F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert served == [
        *("convolutions.convolved", "convolutions.convolved_apart", "norms.norm_silu"),
        *("convolutions.convolved_onto", "convolutions.doubled"),
    ]


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("case", SHAPES)
@torch.no_grad()
def test_pictures_are_made_as_in_float32(served: list[str], case: str, dtype: torch.dtype):
    x = picture(*SHAPES[case]).to(dtype)
    conv = convolution(x.shape[1], 3, dtype)
    # Before Ampere nobody multiplies halves so.
    assert (_to_few_channels(x, conv) is None) == (dtype == torch.float32 or not _multiplies(x.device))
    exact = F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=1)
    assert distance(convolved(x, conv), exact) < max(ERROR[dtype], 3e-5)
    assert served == ["convolutions.convolved"] or dtype == torch.float32


@torch.no_grad()
def test_more_pictures_than_32_bits_count_are_their_singles():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of GPU memory are free")
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAEConfig()).to("cuda", torch.bfloat16).channels_last().requires_grad_(False)
    f_hat = torch.randn(14, 32, 64, 64, device="cuda")
    whole = vqvae.pictures(f_hat)
    for row in (0, 11, 12, 13):
        alone = vqvae.pictures(f_hat[row : row + 1])
        torch.testing.assert_close(whole[row : row + 1], alone, atol=2e-2, rtol=0)


@torch.no_grad()
def test_more_numbers_than_32_bits_count_are_normalised(served: list[str]):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    norm = layer(160).bfloat16()
    few = picture(2, 160, 1024, 1024).bfloat16()
    many = few.repeat(7, 1, 1, 1).contiguous(memory_format=LAYOUT)
    assert many.numel() > 2**31
    # Batches are cut otherwise: sums round otherwise.
    assert distance(norm_silu(many, norm)[-1], norm_silu(few, norm)[-1]) < ERROR[torch.bfloat16]
    assert served == ["norms.norm_silu"] * 2


@torch.no_grad()
def test_the_host_waits_for_nothing_and_graphs_record_it():
    x, norm = picture(1, 320, 64, 64).half(), layer(320).half()
    conv, last = convolution(320, 320, torch.float16), convolution(320, 3, torch.float16)
    codes = normal(14, 1, 32, 3, 5)
    q, k, v = normal(5, 3, 1, 1, 256, 640)

    def work() -> tuple[Tensor, ...]:
        made, bias = convolved_apart(x, conv)
        total = convolved_onto(doubled(x)[:, :, :64, :64].contiguous(memory_format=LAYOUT), x, conv)
        normed = norm_silu(made, norm, bias)
        return norm_silu(x, norm), normed, total, convolved(x, last), enlarged(codes, (9, 8)), attended(q, k, v)

    expected = work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, expected, strict=True))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("tokens", [1, 61, 4096, 9216])
@torch.no_grad()
def test_wide_heads_attend_as_in_float64(served: list[str], tokens: int, dtype: torch.dtype):
    # As the layer's product leaves them: queries, keys and values of a position one behind the other.
    whole = normal(6, 1, tokens, 3, 640).to(dtype)
    whole[:, :, 0] *= 3
    q, k, v = whole.permute(2, 0, 1, 3).unsqueeze(2)
    theirs = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert distance(attended(q, k, v), theirs) < ERROR[dtype]
    assert served == ["wide.attended"]


@torch.no_grad()
def test_a_decoder_s_channels_stay_last(served: list[str], released: VQVAE):
    layouts: dict[str, list[bool]] = {}
    watched = copy.deepcopy(released).bfloat16().channels_last()
    for name, module in watched.decoder.named_modules():
        module.register_forward_hook(
            lambda _, args, out, name=name: layouts.update(
                {name: [t.is_contiguous(memory_format=LAYOUT) for t in (*args, out)]}
            )
        )
        if isinstance(module, nn.GroupNorm | nn.Conv2d):
            module._forward_hooks.clear()  # a watched layer computes itself
    watched.pictures(normal(7, 1, 32, 16, 12))
    norms = sum(isinstance(module, nn.GroupNorm) for module in watched.decoder.modules())
    assert sum(name.startswith("norms.") for name in served) == norms
    assert layouts
    assert all(all(last) for last in layouts.values()), layouts


@pytest.mark.parametrize("size", [(32, 32), (11, 17)], ids=str)
def test_whole_pictures_are_the_same_with_and_without_kernels(
    served: list[str], released: VQVAE, size: tuple[int, int]
):
    f_hat = normal(8, 2, 32, *size)
    ours = released.pictures(f_hat)
    assert set(served) == {
        *("norms.norm_silu", "norms.normalised", "wide.attended", "convolutions.convolved"),
        *("convolutions.convolved_apart", "convolutions.convolved_onto", "convolutions.doubled"),
    }
    with references_only():
        theirs = released.pictures(f_hat)
    assert float(theirs.std()) > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    with torch.no_grad():
        features = released.encode(2 * theirs - 1)
        with references_only():
            expected = released.encode(2 * theirs - 1)
    assert distance(features, expected) < 1e-4


def test_in_bfloat16_the_picture_is_as_near_as_the_reference_s(released: VQVAE):
    f_hat = normal(8, 1, 32, 32, 32)
    half = copy.deepcopy(released).bfloat16().channels_last()
    with references_only():
        exact, theirs = released.pictures(f_hat), half.pictures(f_hat)
    ours = half.pictures(f_hat)
    # Of random weights; bfloat16 itself costs about as much (46 dB), by whatever operations.
    assert decibels(ours, exact) > min(45.0, decibels(theirs, exact) - 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_give_the_picture_that_kernels_give(
    monkeypatch: pytest.MonkeyPatch, released: VQVAE, dtype: torch.dtype
):
    # Strips take no kernels for their layers, and other orders of summing.
    monkeypatch.setitem(slices.STRIP, "cuda", 1 << 20)
    f_hat = normal(9, 1, 32, 24, 20)
    model = copy.deepcopy(released).to(dtype).channels_last()
    whole, sliced = model.pictures(f_hat), model.pictures(f_hat, sliced=True)
    if dtype == torch.float32:
        torch.testing.assert_close(sliced, whole, atol=1e-4, rtol=0)
    else:
        exact = released.pictures(f_hat)
        with references_only():  # kernels round less often
            theirs = model.pictures(f_hat)
        assert decibels(sliced, exact) > decibels(theirs, exact) - 1


def test_the_shipped_model_decodes_the_same_picture_with_and_without_kernels(
    gpu: torch.device, served: list[str]
):
    vqvae = load(device=gpu).vqvae
    assert vqvae.decoder.conv_in.weight.is_contiguous(memory_format=LAYOUT)
    f_hat = normal(10, 1, vqvae.config.code_width, 16, 16)
    ours = vqvae.pictures(f_hat)
    assert served
    with references_only():
        torch.testing.assert_close(ours, vqvae.pictures(f_hat), atol=1e-4, rtol=0)
