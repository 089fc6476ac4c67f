"""Weights in bytes: what a product loses, and which products a device is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from star_core import int8
from star_core.int8 import INSTRUCTIONS, Int8Linear


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_linear(inside: int, outside: int, *, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inside, outside, bias=bias)
    # Channels of very different sizes: one scale for all would lose the small ones.
    linear.weight.data = random(outside, inside) * torch.logspace(-3, 1, outside)[:, None] / inside**0.5
    return linear.requires_grad_(False)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.fixture(params=["by bytes", "made whole"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How this CPU multiplies, whichever it would."""
    largest = torch.full((32, 32), 127, dtype=torch.int8)
    if request.param == "by bytes" and not (torch._int_mm(largest, largest) == 32 * 127**2).all():
        pytest.skip("without VNNI this PyTorch's sums of bytes overflow (2.4 does): they are not used there")
    monkeypatch.setattr(int8, "has_byte_products", lambda: request.param == "by bytes")
    return str(request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("way")
def test_a_product_is_within_two_percent_in_every_channel(bias: bool, dtype: torch.dtype):
    linear = some_linear(256, 64, bias=bias)
    ours = Int8Linear(linear)
    x = random(3, 40, 256, seed=1)
    # One token a hundred times as large as the others: every token has its own step.
    x[0, 0] *= 100
    got, exact = ours(x.to(dtype)), linear(x)
    assert got.dtype == dtype
    for channel in range(64):
        assert relative_error(got[1:, :, channel].float(), exact[1:, :, channel]) < 0.02
    assert relative_error(got[0, 0].float(), exact[0, 0]) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_without_byte_products_makes_the_weights_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    monkeypatch.setattr(int8, "has_byte_products", lambda: True)
    linear = some_linear(64, 32)
    ours, x = Int8Linear(linear), (300 * random(5, 64, seed=2)).to(dtype)
    by_bytes = ours(x)
    monkeypatch.setattr(int8, "BYTE_DEVICES", ())
    whole = ours(x)
    assert whole.dtype == dtype
    assert not torch.equal(whole, by_bytes), "the other way was taken"
    assert relative_error(whole.float(), linear(x.float())) < 0.01
    odd = some_linear(13, 7)
    assert relative_error(Int8Linear(odd)(random(40, 13)), odd(random(40, 13))) < 0.02


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out of the processor is forgotten afterwards."""
    yield
    int8.has_byte_products.cache_clear()


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_bytes_are_multiplied_where_there_are_instructions_for_it_alone(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, name: str
):
    for other in INSTRUCTIONS:
        monkeypatch.delattr(torch.cpu, other, raising=False)
    products, counted = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *given: products.append(1) or counted(*given))
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, name, lambda there=there: there, raising=False)
        int8.has_byte_products.cache_clear()
        Int8Linear(some_linear(64, 32))(random(5, 64))
        assert len(products) == 1, "by bytes the first time alone"


def test_this_pytorch_can_be_asked_for_the_instructions():
    assert [name for name in INSTRUCTIONS if hasattr(torch.cpu, name)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_that_multiplies_no_bytes_is_asked_for_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    monkeypatch.setattr(int8, "has_byte_products", lambda: False)
    x, ours = (300 * random(5, 64, seed=2)).to(dtype), Int8Linear(some_linear(64, 32))
    assert torch.equal(ours(x), ours(x.float()).to(dtype))


def test_a_token_does_not_depend_on_how_many_there_are(way: str):
    ours, x = Int8Linear(some_linear(64, 32)), random(40, 64, seed=3)
    together = ours(x)
    for count in (1, 5, 16, 17, 25, 36):
        # Bytes add up exactly, in whatever order.
        torch.testing.assert_close(
            ours(x[:count]), together[:count], rtol=0, atol=0 if way == "by bytes" else 1e-5
        )


def test_a_layer_that_a_host_left_behind_computes_where_its_input_is():
    ours = Int8Linear(some_linear(64, 32))
    assert ours(torch.empty(2, 64, device="meta")).device.type == "meta"


@pytest.mark.usefixtures("way")
def test_a_weight_of_zeros_stays_zero():
    linear = some_linear(16, 8, bias=False)
    linear.weight.data[3] = 0
    made = Int8Linear(linear)(random(4, 16))
    assert torch.isfinite(made).all()
    assert made[:, 3].abs().max() == 0
    assert Int8Linear(linear)(torch.zeros(4, 16)).abs().max() == 0
