"""FP8 weights on a GPU that multiplies them: rounding to the bit, products, capture, whole pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from star_core import fp8, load
from star_core.fp8 import Float8Linear, has_products, round_rows
from star_core.kernels import given_up, references_only
from star_core.request import Options

LAYERS = [
    (1920, 7680),
    (7680, 1920),
    (1920, 5760),
    (1920, 1920),
    (1024, 4096),
    (4096, 1024),
    (64, 32),
    (32, 1920),
]
"""Sides of layers of the released models, and small ones."""
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _products(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Skip where there are no FP8 products; fail where the reference stood in for the kernel."""
    if not has_products(gpu):
        pytest.skip(f"{torch.cuda.get_device_name(gpu)} has no FP8 products")
    with caplog.at_level(logging.INFO):
        yield
    assert not given_up(), caplog.text


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def some_linear(inside: int, outside: int, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(inside, outside, device="cuda", dtype=dtype).requires_grad_(False)
    sizes = torch.logspace(-2, 1, outside, device="cuda")[:, None]
    linear.weight.copy_(normal(1, outside, inside) * sizes / inside**0.5)
    return linear


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Return the error of tokens (n, C), all of which count alike."""
    lengths = exact.double().norm(dim=1)
    return float(((ours.double() - exact.double()).norm(dim=1) / lengths).square().mean().sqrt())


def assert_rounded_alike(rows: Tensor, multiple: int) -> None:
    ours, our_scale = round_rows(rows, multiple=multiple)
    with references_only():
        theirs, their_scale = round_rows(rows, multiple=multiple)
    assert torch.equal(our_scale, their_scale)
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "columns", "multiple"),
    [(1, 1920, 16), (2, 7680, 16), (33, 1000, 16), (3, 16384, 1), (8192, 1920, 16), (8192, 7680, 16)],
)
def test_rows_are_rounded_as_the_reference_does_to_the_bit(
    served: list[str], count: int, columns: int, multiple: int, dtype: torch.dtype
):
    rows = normal(2, count, columns) * torch.logspace(-6, 3, count, device="cuda")[:, None]
    rows[-1, : columns // 2] = 0
    assert_rounded_alike(rows.to(dtype), multiple)
    assert served == ["rounding.round_rows"]


def test_rows_at_the_ends_of_the_range_are_rounded_as_the_reference_does(served: list[str]):
    rows = normal(3, 6, 1920).bfloat16()
    rows[0] = 0
    rows[1] *= 1e-30
    rows[2] *= 1e37
    # Numbers that lie just between two of the format's, and its largest.
    rows[3] = torch.linspace(-448, 448, 1920, device="cuda").round()
    rows[4] = torch.arange(1920, device="cuda") / 2**12
    rows[4, 0] = 448
    rows[5] = 1
    assert_rounded_alike(rows, 16)
    assert served == ["rounding.round_rows"]
    assert torch.isfinite(round_rows(rows)[0].float()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inside", "outside"), LAYERS)
@torch.no_grad()
def test_a_product_is_within_five_percent_for_any_number_of_tokens(
    inside: int, outside: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    linear = some_linear(inside, outside, dtype)
    ours = Float8Linear(linear)
    monkeypatch.setattr(fp8, "_by_whole_weights", None)  # the products, or an error
    x = normal(4, 8192, inside).to(dtype)
    x[0] *= 50  # every token has its own step
    for count in (1, 2, 8, 15, 16, 17, 20, 100, 8192):
        got, exact = ours(x[:count]), linear(x[:count])
        assert got.dtype == dtype
        assert got.shape == exact.shape
        # 0.037 in the mean; of a token's few numbers in the smallest layer the error is as often 0.1.
        assert relative_error(got, exact) < (0.05 if count * outside >= 2048 else 0.2)
        assert relative_error(got[-1:], exact[-1:]) < (0.05 if outside >= 1024 else 0.2)


@pytest.mark.parametrize(("inside", "outside"), LAYERS)
@torch.no_grad()
def test_a_token_is_the_same_however_many_fill_up_its_16_and_near_in_any_crowd(inside: int, outside: int):
    # Up to 16 tokens are one shape of product. Of more, cuBLAS may choose another kernel, which adds up in
    # another order, as it does with bfloat16 weights, in sums that FP8 products keep with fewer bits.
    ours = Float8Linear(some_linear(inside, outside, torch.bfloat16))
    x = normal(5, 8192, inside).bfloat16()
    for crowd in (16, 48, 8192):
        together = ours(x[:crowd])
        for count in (crowd - 15, crowd - 1):
            assert torch.equal(ours(x[:count]), together[:count])
    alone = ours(x[:1])
    for crowd in (40, 8192):
        assert relative_error(ours(x[:crowd])[:1], alone) < 0.02


@torch.no_grad()
def test_nothing_waits_and_a_graph_repeats_the_product(no_waiting: Callable):
    for dtype in (torch.bfloat16, torch.float32):
        ours = Float8Linear(some_linear(1920, 7680, dtype))
        x = normal(6, 2, 3, 1920).to(dtype)
        ours(x)  # builds the kernel
        torch.cuda.synchronize()
        with no_waiting():
            ours(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = ours(x)
        x.copy_(normal(7, *x.shape))
        graph.replay()
        assert torch.equal(held, ours(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_model_draws_with_and_without_graphs(
    gpu: torch.device, dtype: torch.dtype, served: list[str], caplog: pytest.LogCaptureFixture
):
    plain = load(device=gpu, dtype=dtype, eight_bit="fp8")
    repeated = load(device=gpu, dtype=dtype, eight_bit="fp8", graphs=True)
    assert not caplog.records
    for schedule in ("official-512", "demo-1024", "fast"):
        for star in (plain, repeated):
            served.clear()
            for seed in (1, 2):
                picture = star.draw(["a red apple"], options=Options(seed=seed, schedule=schedule))
                assert torch.isfinite(picture).all()
                assert picture.std() > 0.05
            assert "rounding.round_rows" in served
    # A masked text of full length rounds otherwise, and 8 bits turn a last bit into a step now and then.
    near = 0
    for seed, prompt in enumerate(("a red apple", "cat", "red heart", "tree")):
        options = Options(seed=seed, schedule="top_k 1")
        ours, theirs = (next(iter(star.generate([prompt], options=options))) for star in (repeated, plain))
        near += torch.equal(ours.tokens, theirs.tokens)
    assert near >= 3
