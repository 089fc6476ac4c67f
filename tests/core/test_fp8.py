"""Weights in 8-bit floats: what a product loses, and what a GPU's FP8 product is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from star_core import fp8, upcast
from star_core.fp8 import FORMAT, LARGEST, Float8Linear, has_products, round_rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_linear(inside: int, outside: int, *, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inside, outside, bias=bias)
    # Channels of very different sizes: one scale for all would lose the small ones.
    linear.weight.data = random(outside, inside) * torch.logspace(-3, 1, outside)[:, None] / inside**0.5
    return linear.requires_grad_(False)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


LIMITS = {"sum": 10**6}
"""The most numbers that the products of `asked` add up, under "sum"."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give the CPU FP8 products that are as particular as CUDA's; return the rows that were asked for."""
    rows: list[int] = []

    def scaled_mm(
        a: Tensor,
        b: Tensor,
        *,
        scale_a: Tensor,
        scale_b: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:
        (m, k), (k_too, n) = a.shape, b.shape
        assert a.dtype == b.dtype == FORMAT
        assert k == k_too
        assert not [side for side in (m, n, k) if side % 16]
        assert a.stride(1) == 1, "rows lie in memory row by row"
        assert b.stride(0) == 1, "weights lie in memory column by column"
        if k > LIMITS["sum"]:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLt")
        assert (scale_a.shape, scale_b.shape) == ((m, 1), (1, n))
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert bias is None or bias.dtype == out_dtype == torch.bfloat16
        rows.append(m)
        product = (a.float() * scale_a) @ (b.float() * scale_b)
        return (product if bias is None else product + bias.float()).to(out_dtype)

    monkeypatch.setattr(fp8, "has_products", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    return rows


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_within_five_percent_and_no_channel_is_much_worse(
    request: pytest.FixtureRequest, products: bool, bias: bool, dtype: torch.dtype
):
    asked = request.getfixturevalue("asked") if products else []
    linear = some_linear(256, 64, bias=bias)
    ours = Float8Linear(linear)
    x = random(3, 40, 256, seed=1)
    # One token a hundred times as large as the others: every token has its own step.
    x[0, 0] *= 100
    got, exact = ours(x.to(dtype)), linear(x)
    assert asked == [128] * products
    assert got.dtype == dtype
    errors = [relative_error(got[1:, :, channel].float(), exact[1:, :, channel]) for channel in range(64)]
    assert sum(errors) / 64 < 0.05
    assert max(errors) < 0.07
    assert relative_error(got[0, 0].float(), exact[0, 0]) < 0.05


def test_tokens_are_filled_up_and_none_depends_on_how_many_there_are(asked: list[int]):
    ours, x = Float8Linear(some_linear(64, 32)), random(40, 64, seed=3)
    together = ours(x)
    for count in (1, 2, 16, 17, 40):
        assert torch.equal(ours(x[:count]), together[:count])
    assert asked == [48, 16, 16, 16, 32, 48]


def test_a_shape_that_is_refused_is_computed_in_parts_or_else_by_whole_weights(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
):
    linear, x = some_linear(512, 64), random(20, 512, seed=5)
    ours = Float8Linear(linear)
    whole = ours(x)
    for limit, products in ((256, 2), (128, 4), (8, 0)):
        monkeypatch.setattr(fp8, "_PARTS", {})
        monkeypatch.setitem(LIMITS, "sum", limit)
        for turn in range(2):
            asked.clear()
            made = ours(x)
            assert relative_error(made, whole) < (0.01 if products else 0.05)
            # What is refused is asked for once.
            assert len(asked) == products, turn


def test_another_error_of_a_product_is_told(asked: list[int], monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Float8Linear(some_linear(32, 32))(random(2, 32))


def test_codes_that_come_turned_are_laid_out_in_rows(asked: list[int]):
    layer, codes = Float8Linear(some_linear(32, 64)), random(1, 32, 3, 3, seed=6)
    turned = codes.permute(0, 2, 3, 1).reshape(1, 9, 32)
    assert not turned[0].is_contiguous()
    assert torch.equal(layer(turned), layer(turned.contiguous()))


def test_sides_that_the_products_do_not_take_are_computed_by_whole_weights(asked: list[int]):
    for inside, outside in ((64, 24), (24, 64), (13, 7)):
        linear, x = some_linear(inside, outside), random(5, inside)
        assert relative_error(Float8Linear(linear)(x), linear(x)) < 0.05
    assert not asked


def test_only_newer_nvidia_gpus_have_the_products(monkeypatch: pytest.MonkeyPatch):
    gpu, capability = torch.device("cuda", 0), [8, 0]
    monkeypatch.setattr(fp8, "_has_rows_of_scales", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(torch.version, "hip", None)
    assert not has_products(gpu)
    for capability[:] in ([8, 9], [9, 0], [12, 0]):
        assert has_products(gpu)
        assert not has_products(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_products(gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delattr(torch, "_scaled_mm")
    assert not has_products(gpu)


def test_a_pytorch_without_rows_of_scales_for_a_gpu_has_no_products(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")

    def refused(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("Rowwise scaling is not currently supported on your device")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    assert not fp8._has_rows_of_scales.__wrapped__(cpu)
    # Older ones return a pair, and know one scale for all.
    monkeypatch.setattr(torch, "_scaled_mm", lambda *arguments, **options: (torch.ones(1), None))
    assert not fp8._has_rows_of_scales.__wrapped__(cpu)
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, **options: torch.ones(16, 16))
    assert fp8._has_rows_of_scales.__wrapped__(cpu)


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate", "CUBLAS_STATUS_ALLOC_FAILED when"])
def test_a_full_memory_is_not_taken_for_a_gpu_without_products(monkeypatch: pytest.MonkeyPatch, said: str):
    def full(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "_scaled_mm", full)
    with pytest.raises(RuntimeError, match=said):
        fp8._has_rows_of_scales.__wrapped__(torch.device("cpu"))


def test_rows_use_the_whole_range_of_the_format():
    rows = random(50, 96, seed=4) * torch.logspace(-8, 8, 50)[:, None]
    rounded, scale = round_rows(rows)
    assert rounded.dtype == FORMAT
    assert (rounded.float().abs().amax(dim=1) == LARGEST).all()
    assert ((rounded.float() * scale - rows).abs() <= rows.abs() * 2**-4 + scale * 2**-10).all()


def test_rows_that_are_added_are_zeros():
    rows = random(5, 32)
    rounded, scale = round_rows(rows, multiple=16)
    assert rounded.shape == (16, 32)
    assert scale.shape == (16, 1)
    assert rounded[5:].float().abs().max() == 0
    for filled, plain in zip((rounded, scale), round_rows(rows), strict=True):
        assert torch.equal(filled[:5].float(), plain.float())
    assert round_rows(random(32, 32), multiple=16)[0].shape == (32, 32)


def test_a_layer_that_a_host_left_behind_computes_where_its_input_is():
    ours = Float8Linear(some_linear(64, 32))
    assert ours(torch.empty(2, 64, device="meta")).device.type == "meta"


def test_a_weight_of_zeros_stays_zero():
    linear = some_linear(16, 8, bias=False)
    linear.weight.data[3] = 0
    made = Float8Linear(linear)(random(4, 16))
    assert torch.isfinite(made).all()
    assert made[:, 3].abs().max() == 0
    assert Float8Linear(linear)(torch.zeros(4, 16)).abs().max() == 0


def test_weights_move_and_are_copied_as_they_are():
    ours = Float8Linear(some_linear(64, 32))
    assert ours.weight.shape == (32, 64)
    assert ours.weight.is_contiguous()
    assert {name: tensor.dtype for name, tensor in ours.named_buffers()} == {
        "weight": FORMAT,
        "scale": torch.float32,
    }
    again = Float8Linear(some_linear(64, 32, bias=True))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(torch.ones(1, 64)), ours(torch.ones(1, 64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_a_cpu_multiplies_no_halves_it_is_asked_for_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    monkeypatch.setattr(upcast, "multiplies", lambda half: False)
    x, ours = random(5, 64, seed=2).to(dtype), Float8Linear(some_linear(64, 32))
    assert torch.equal(ours(x), ours(x.float()).to(dtype))
