"""Decoding in strips: the same pictures, whatever the strips, and no larger tensor than needed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from star_core import slices
from star_core.slices import enlarged_conv, in_strips, norm_silu_conv, strips, worth_slicing
from star_core.vqvae import LAYOUT


@pytest.fixture(params=[1, 300, 2000])
def small_strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Make strips of a row, of a few rows, of many."""
    monkeypatch.setitem(slices.STRIP, "cpu", request.param)
    return request.param


def random_map(*shape: int, seed: int = 0) -> Tensor:
    # Off zero and unlike from row to row: a mean of strips' means would show.
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return 3 + x * torch.linspace(0.1, 4, shape[2])[:, None]


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAYOUT], ids=["channels first", "channels last"])
@torch.no_grad()
def test_a_layer_in_strips_is_the_layer(small_strips: int, layout: torch.memory_format):
    norm, conv = nn.GroupNorm(4, 8), nn.Conv2d(8, 6, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = random_map(2, 8, 13, 7).to(memory_format=layout)
    whole = conv(nn.functional.silu(norm(x)))
    torch.testing.assert_close(norm_silu_conv(x, norm, conv, channels=6), whole, atol=2e-5, rtol=1e-5)
    base = random_map(2, 6, 13, 7, seed=1)
    added = norm_silu_conv(x, norm, conv, channels=6, onto=base.clone())
    torch.testing.assert_close(added, base + whole, atol=2e-5, rtol=1e-5)
    wide = nn.Conv2d(8, 8, 3, padding=1)
    enlarged = wide(nn.functional.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(enlarged_conv(x, wide), enlarged, atol=2e-5, rtol=1e-5)
    assert norm_silu_conv(x, norm, conv, channels=6).is_contiguous(memory_format=layout)


@torch.no_grad()
def test_a_layer_in_strips_is_the_layer_in_half_precision_too(small_strips: int):
    norm, conv = nn.GroupNorm(4, 8).bfloat16(), nn.Conv2d(8, 6, 3, padding=1).bfloat16()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = random_map(2, 8, 13, 7).bfloat16().to(memory_format=LAYOUT)
    # The groups' means and the channels' within a group differ, and so do the pictures'.
    x += 3 * torch.randn(2, 8, 1, 1, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = copy.deepcopy(conv).float()(nn.functional.silu(copy.deepcopy(norm).float()(x.float())))
    rounding = (conv(nn.functional.silu(norm(x))) - exact).abs().max()
    assert 0 < rounding < 0.05
    found = norm_silu_conv(x, norm, conv, channels=6)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 2 * rounding
    base = random_map(2, 6, 13, 7, seed=1).bfloat16().to(memory_format=LAYOUT)
    added = norm_silu_conv(x, norm, conv, channels=6, onto=base.clone())
    torch.testing.assert_close(added, base + found)


def test_the_moments_need_no_wider_numbers_of_a_device_than_it_has(poor_device: Callable):
    with poor_device():
        mean, variance = slices._moments(torch.empty(1, 8, 6, 5, device="meta"), 4)
    assert (mean.dtype, variance.dtype) == (torch.float32, torch.float32)


@torch.no_grad()
def test_the_moments_of_a_large_map_are_right_to_many_digits():
    # Summed up one by one in float32 a million numbers of this mean lose their deviation.
    x = (100 + random_map(1, 8, 1024, 1024) / 8).bfloat16().to(memory_format=LAYOUT)
    wide = x.double().reshape(1, 4, -1)
    mean, variance = slices._moments(x, 4)
    torch.testing.assert_close(mean, wide.mean(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance, wide.var(dim=-1, correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [(4, 6), (8, 3)], ids=str)
def test_a_picture_decoded_in_strips_is_the_picture(paired: object, small_strips: int, size: tuple[int, int]):
    f_hat = torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(0))
    whole = paired.vqvae.pictures(f_hat)
    assert whole.std() > 0.05
    torch.testing.assert_close(paired.vqvae.pictures(f_hat, sliced=True), whole, atol=1e-5, rtol=0)
    half = copy.deepcopy(paired.vqvae).bfloat16()
    differs = (half.pictures(f_hat, sliced=True) - whole).abs().max()
    assert differs < 3 * (half.pictures(f_hat) - whole).abs().max()


def test_strips_are_taken_only_where_they_are_asked_for(paired: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(slices.STRIP, "cpu", 1)
    x = torch.zeros(1, 8, 4, 4)
    with torch.no_grad():
        assert not worth_slicing(x)
        with in_strips():
            assert worth_slicing(x)
            with torch.enable_grad():
                assert not worth_slicing(x), "training needs the whole map's graph"
        assert not worth_slicing(x)
    with torch.no_grad(), pytest.raises(KeyError), in_strips():
        raise KeyError
    with torch.no_grad():
        assert not worth_slicing(x), "an error leaves the block as anything else does"


def test_strips_cover_every_row_once_with_a_neighbours_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(slices.STRIP, "cpu", 3 * 5)
    x = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 5)
    parts = list(strips(x))
    assert [(p.top, p.bottom) for p in parts] == [(0, 3), (3, 6), (6, 8)]
    assert [p.of(x)[0, 0, :, 0].tolist() for p in parts] == [[0, 1, 2, 3], [2, 3, 4, 5, 6], [5, 6, 7]]
    assert torch.cat([p.inner(p.of(x)) for p in parts], dim=2).equal(x)


def test_no_tensor_of_a_sliced_layer_is_larger_than_its_output(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(slices.STRIP, "cpu", 8 * 16 * 4)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None):
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple) else (made,):
                if isinstance(one, Tensor) and one._base is None:
                    sizes.append(one.numel())
            return made

    norm, conv = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, padding=1)
    x = random_map(1, 8, 64, 16)
    with torch.no_grad(), Watch():
        norm_silu_conv(x, norm, conv, channels=8)
    # Beside the output, a strip with its neighbours' rows: 6 of 64.
    assert sorted(set(sizes))[-1] == x.numel()
    assert sorted(set(sizes))[-2] <= 8 * 16 * 6
