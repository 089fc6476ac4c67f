"""Every kernel against its reference, by Triton's interpreter on a CPU. `test_kernels.py` starts this file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import pytest
import torch
from torch import Tensor

from star_core import attention, fp8, kernels, sampling, transformer
from star_core.attention import LayerCache
from star_core.kernels import attention as by_attention
from star_core.kernels import references_only
from star_core.kernels import residual as by_residual
from star_core.kernels import rounding as by_rounding
from star_core.kernels import sampling as by_sampling
from star_core.rope import Rotation
from star_core.sampling import PictureSeed

assert os.environ.get("TRITON_INTERPRET") == "1", "test_kernels.py runs this file, in Triton's interpreter"

ALMOST_ONE = 1 - 2**-24
UNIT_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-6}
"""Greatest difference of vectors of length 1. The interpreter cuts bfloat16 off where a GPU rounds."""


@pytest.fixture(autouse=True)
def _no_kernels_of_the_cpu() -> Iterator[None]:
    """What a test calls by its reference's name is the reference."""
    with references_only():
        yield


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(seed: int, *shape: int) -> Rotation:
    angles = 3 * normal(seed, *shape)
    return Rotation(angles.cos(), angles.sin())


def of_unit_length(x: Tensor, like: Tensor) -> Tensor:
    return x.float() / like.float().norm(dim=-1, keepdim=True).clamp_min(1e-3)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Compare queries, keys or values (R, H, L, head_width), all measured in lengths of the expected ones."""
    assert ours.dtype == theirs.dtype
    error = UNIT_ERROR[ours.dtype]
    torch.testing.assert_close(of_unit_length(ours, theirs), of_unit_length(theirs, theirs), atol=error, rtol=0)


@dataclasses.dataclass
class Inputs:
    """What self-attention is prepared from: rows of `tokens` tokens, behind a cache of `capacity`."""

    head_width: int = 64
    dtype: torch.dtype = torch.float32
    rows: int = 2
    heads: int = 3
    tokens: int = 37
    turns_by_row: bool = False
    filled: int = 0
    capacity: int | None = None

    def cache(self) -> LayerCache | None:
        if self.capacity is None:
            return None
        shape = self.rows + 1, self.heads, self.capacity, self.head_width
        cache = LayerCache(normal(7, *shape).to(self.dtype), normal(8, *shape).to(self.dtype))
        cache.filled = self.filled
        return cache

    def arguments(self, cache: LayerCache | None) -> tuple:
        width = self.heads * self.head_width
        turns = (self.rows,) if self.turns_by_row else ()
        qkv = normal(1, self.rows, self.tokens, 3 * width)
        qkv[0, 0] = 0  # a key without a length
        log_scale = torch.tensor([0.5, 4.0, 9.0, -1.0][: self.heads]).reshape(1, -1, 1, 1)  # 9: beyond log 100
        biases = normal(2, width).to(self.dtype), normal(3, width).to(self.dtype)
        turned = rotation(4, *turns, self.tokens, self.head_width // 2)
        return qkv.to(self.dtype), *biases, log_scale, turned, cache


CASES = {
    "plain": Inputs(),
    "half": Inputs(dtype=torch.float16),
    "bfloat16": Inputs(dtype=torch.bfloat16),
    "narrow heads": Inputs(head_width=8),
    "wide heads": Inputs(head_width=128, tokens=17),
    "one token": Inputs(tokens=1, rows=1),
    "tokens of each row's own": Inputs(turns_by_row=True),
    "empty cache": Inputs(capacity=50),
    "cache filled before": Inputs(capacity=60, filled=11, dtype=torch.float16),
    "cache filled up": Inputs(capacity=48, filled=11),
    "last scale, not stored": Inputs(capacity=47, filled=11),
    "last scale of a pruned bfloat16 row": Inputs(
        capacity=40, filled=11, dtype=torch.bfloat16, turns_by_row=True
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_heads_are_prepared_as_the_reference_does(case: str):
    inputs = CASES[case]
    ours_cache, theirs_cache = inputs.cache(), inputs.cache()
    ours = by_attention.self_heads(*inputs.arguments(ours_cache))
    theirs = attention.self_heads(*inputs.arguments(theirs_cache))
    assert ours is not None
    for our, their in zip(ours, theirs, strict=True):
        assert_near(our, their)
    # Mixed values are laid out as queries are; then joining the heads for the projection is free.
    assert ours[0].transpose(1, 2).is_contiguous()
    assert theirs[0].transpose(1, 2).is_contiguous()
    if ours_cache is not None and theirs_cache is not None:
        assert ours_cache.filled == theirs_cache.filled
        assert_near(ours_cache.keys, theirs_cache.keys)
        assert_near(ours_cache.values, theirs_cache.values)
        stored = theirs_cache.filled > inputs.filled
        assert (ours[1].data_ptr() == ours_cache.keys.data_ptr()) == stored


def test_many_tokens_are_prepared_by_programs_of_several_heads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(by_attention, "MANY_TOKENS", 16)
    for heads in (1, 2, 3, 4):
        inputs = Inputs(heads=heads)
        ours = by_attention.self_heads(*inputs.arguments(None))
        for our, their in zip(ours, attention.self_heads(*inputs.arguments(None)), strict=True):
            assert_near(our, their)


def test_biases_are_added_in_the_dtype_of_the_tensors():
    # Were the sums not rounded, the numbers would still be near, but one in eight would be another half.
    arguments = Inputs(dtype=torch.float16).arguments(None)
    ours, theirs = (f(*arguments)[0] for f in (by_attention.self_heads, attention.self_heads))
    assert float((ours == theirs).double().mean()) > 0.98


def test_biases_and_scales_may_be_of_another_dtype():
    qkv, q_bias, v_bias, log_scale, turned, cache = Inputs(dtype=torch.float16).arguments(None)
    arguments = qkv, q_bias.float(), v_bias.double(), log_scale.half(), turned, cache
    for our, their in zip(by_attention.self_heads(*arguments), attention.self_heads(*arguments), strict=True):
        assert_near(our, their)


def test_what_the_kernels_are_not_made_for_is_left_to_the_reference():
    assert by_attention.self_heads(*Inputs(head_width=12).arguments(None)) is None
    qkv, *others = Inputs().arguments(None)
    assert by_attention.self_heads(qkv.double(), *others) is None
    assert by_attention.self_heads(torch.cat([qkv, qkv], dim=-1)[..., : qkv.shape[-1]], *others) is None
    inputs = Inputs(capacity=50)
    cache = inputs.cache()
    cache.keys = cache.keys.half()
    assert by_attention.self_heads(*inputs.arguments(cache)) is None
    assert by_attention.cross_queries(normal(1, 1, 2, 24), normal(2, 24), torch.zeros(1, 2, 1, 1)) is None
    few, much = normal(1, 1, 2, 5), torch.rand(1, 2)
    options = {"top_k": 0, "top_p": 0.0}
    assert by_sampling.draw(few.half(), much, **options) is None
    assert by_sampling.draw(few.expand(3, 2, 5), much.expand(3, 2), **options) is None
    assert by_sampling.draw(normal(1, 1, 1, 16385), torch.rand(1, 1), **options) is None
    assert by_sampling.guide(few, few[..., :1], 1.0) is None


@pytest.mark.parametrize("dtype", UNIT_ERROR)
@pytest.mark.parametrize("head_width", [4, 32, 64, 256])
def test_cross_queries_are_the_reference_s(dtype: torch.dtype, head_width: int):
    q, bias = normal(1, 2, 19, 3 * head_width).to(dtype), normal(2, 3 * head_width).to(dtype)
    log_scale = torch.tensor([0.5, 4.0, 9.0]).reshape(1, -1, 1, 1)
    ours, theirs = (f(q, bias, log_scale) for f in (by_attention.cross_queries, attention.cross_queries))
    assert_near(ours, theirs)
    assert ours.transpose(1, 2).is_contiguous()
    assert theirs.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "adding", "wanted"), [(1, 1, 1), (4, 4, 2), (4, 2, 4), (2, 1, 1)])
@pytest.mark.parametrize("columns", [64, 100])
def test_sums_and_their_norms_are_the_reference_s(
    dtype: torch.dtype, rows: int, adding: int, wanted: int, columns: int
):
    x, addend = 5 + normal(1, rows, 7, columns).to(dtype), normal(2, adding, 7, columns).to(dtype)
    found = by_residual.add_then_norm(x, addend, wanted)
    assert found is not None
    total, normed = transformer.add_then_norm(x, addend, wanted)
    assert torch.equal(found[0], total)
    assert found[1].shape == (wanted, 7, columns)
    error = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found[1], normed, atol=error, rtol=error)


def test_guidance_is_the_reference_s_to_the_last_bit():
    conditional, unconditional = normal(1, 2, 3, 700), normal(2, 2, 3, 700)
    for strength in (0.0, 3.0, 7.3, -1.0, 2):
        ours = by_sampling.guide(conditional, unconditional, strength)
        assert torch.equal(ours, sampling.guide(conditional, unconditional, strength))


def assert_same_draw(logits: Tensor, uniform: Tensor, **policy: float) -> None:
    ours = by_sampling.draw(logits, uniform, **policy)
    theirs = sampling.draw(logits, uniform, **policy)
    assert ours.tokens.dtype == theirs.tokens.dtype
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.confidence, theirs.confidence, atol=1e-5, rtol=1e-5)


def numbers(count: int) -> Tensor:
    """Return numbers (1, count) in [0, 1), both ends among them."""
    chance = torch.rand(1, count, generator=torch.Generator().manual_seed(9))
    chance[0, 0], chance[0, -1] = 0.0, ALMOST_ONE
    return chance


@pytest.mark.parametrize("size", [64, 1000])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.8, 0.999, 1.0])
def test_draws_are_the_reference_s(size: int, top_k: int, top_p: float):
    # From almost flat rows to such as have one token only.
    sharpness = torch.tensor([0.01, 2.0, 100.0]).reshape(1, 3, 1)
    logits = sharpness * normal(5, 1, 3, size)
    policy = {"top_k": min(top_k, size), "top_p": top_p, "temperature": 1.0 if size == 64 else 0.7}
    assert_same_draw(logits, numbers(3), **policy)


def test_draws_from_the_whole_codebook_are_the_reference_s():
    logits = 3 * normal(6, 1, 5, 4096)
    for top_k, top_p in ((0, 0.8), (600, 0.8), (4096, 0.999), (4095, 0.0)):
        assert_same_draw(logits, numbers(5), top_k=top_k, top_p=top_p)


def test_rows_of_any_batch_are_drawn_on_their_own():
    logits, uniform = 2 * normal(7, 3, 2, 50), torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    assert_same_draw(logits, uniform, top_k=7, top_p=0.9)


def test_numbers_of_any_size_and_sign_are_in_order():
    rows = [
        [1e30, -1e30, 3.0, 2.0, -3.4e38, 3.3e38],
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        [1e-40, -1e-40, 0.0, -1e-38, 1e-38, -2.0],
        [5.0, 4.9, 1e-3, -1e-3, -4.9, -5.0],
    ]
    logits = torch.tensor([rows])
    for top_k, top_p in ((0, 0.0), (1, 0.0), (2, 0.0), (4, 0.9), (5, 0.0), (0, 0.4), (0, 0.9)):
        for number in (0.0, ALMOST_ONE):
            assert_same_draw(logits, torch.full((1, 4), number), top_k=top_k, top_p=top_p)


def test_ties_with_the_last_of_top_k_stay():
    logits = normal(8, 1, 8, 40).round()
    for top_k in (1, 3, 9):
        assert_same_draw(logits, numbers(8), top_k=top_k, top_p=0.0)
    assert_same_draw(torch.full((1, 8, 40), -2.5), numbers(8), top_k=3, top_p=0.0)


def test_the_two_zeros_tie():
    logits = torch.tensor([-1.0, -0.0, 0.0, -2.0]).repeat(1, 2, 1)
    drawn = by_sampling.draw(logits, torch.tensor([[0.1, 0.9]]), top_k=1, top_p=0.0)
    assert drawn.tokens.tolist() == [[1, 2]]


def test_past_every_token_the_likeliest_is_drawn():
    assert_same_draw(normal(10, 1, 4, 50), torch.ones(1, 4), top_k=9, top_p=0.9)


@pytest.mark.parametrize("top_k", [0, 30])
@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.85])
def test_of_ties_at_the_border_of_top_p_the_first_go(top_p: float, top_k: int):
    for logits in (
        normal(9, 1, 4, 40).round(),
        torch.zeros(1, 4, 40),
        normal(9, 1, 4, 40).bfloat16().float(),
    ):
        kept = sampling.keep_top_p(sampling.keep_top_k(logits, top_k), top_p)
        cumulative = kept.double().softmax(dim=-1).cumsum(dim=-1)
        uniform = numbers(4)
        tokens = (cumulative <= uniform.double().unsqueeze(-1)).sum(dim=-1)
        ours = by_sampling.draw(logits, uniform, top_k=top_k, top_p=top_p)
        assert torch.equal(ours.tokens, tokens)


def test_rows_that_are_no_numbers_still_give_tokens_of_the_codebook():
    # Whatever a broken row means: a token outside would stop the GPU for good at its codebook vector.
    logits = torch.full((1, 3, 50), torch.nan)
    logits[0, 1] = -torch.inf
    logits[0, 2] *= -1
    tokens = by_sampling.draw(logits, torch.tensor([[0.5, 0.5, 0.5]]), top_k=5, top_p=0.5).tokens
    assert ((tokens >= 0) & (tokens < 50)).all()


FEW_TOKENS = ((1, 1), (1, 2), (2, 2), (2, 3))
"""The interpreter takes some 30 ms for each token that is drawn."""


@pytest.mark.parametrize(
    ("cross_attention", "kind"), [("paired", "plain"), ("paired", "smooth"), ("independent", "official")]
)
def test_whole_pictures_are_the_reference_s(
    tiny: Callable,
    ask: Callable,
    make_schedule: Callable,
    monkeypatch: pytest.MonkeyPatch,
    cross_attention: str,
    kind: str,
):
    model, schedule = tiny(cross_attention, FEW_TOKENS), make_schedule(kind)
    scales = list(schedule.scales)
    scales[2] = dataclasses.replace(scales[2], prune=0.3)
    schedule = dataclasses.replace(schedule, scales=tuple(scales))
    request = ask([1], schedule, seeds=[PictureSeed(1)], maps=FEW_TOKENS)
    expected = model.run(request)
    served = []
    named = kernels._named
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_named", lambda name: (served.append(name), named(name))[1])
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_wanted", ContextVar("wanted", default=True))
        steps = model.run(request)
    assert not kernels.given_up()
    wanted = {"attention.self_heads", "attention.cross_queries", "residual.add_then_norm", "sampling.guide"}
    # The one asked, and not for float32; the others not a GPU's.
    wanted |= {"products.expanded", "cpu.added", "cpu.attended"}
    assert set(served) == (wanted if kind == "smooth" else wanted | {"sampling.draw"})
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(steps, expected, strict=True))
    served.clear()
    again = model.run(request)
    assert not served
    assert all(torch.equal(a.f_hat, b.f_hat) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("dtype", by_rounding.DTYPES)
@pytest.mark.parametrize(
    ("count", "columns", "multiple"), [(1, 64, 16), (5, 1000, 1), (20, 96, 16), (3, 16384, 1)]
)
def test_rows_are_rounded_to_8_bits_as_the_reference_does(
    count: int, columns: int, multiple: int, dtype: torch.dtype
):
    rows = normal(1, count, columns).mul(torch.logspace(-3, 3, count)[:, None]).to(dtype)
    rows[-1, : columns // 2] = 0
    ours, our_scale = by_rounding.round_rows(rows, multiple=multiple)
    theirs, their_scale = fp8.round_rows(rows, multiple=multiple)
    assert ours.dtype == theirs.dtype
    assert torch.equal(our_scale, their_scale)
    # The interpreter loses the carry where a number rounds up to a power of two, and makes half of it; what
    # lies between two numbers, or is very small, may be a step off. tests/gpu compares a GPU bit by bit.
    ours, theirs = ours.float(), theirs.float()
    step = (theirs.abs() * 2**-3).clamp_min(2**-9)
    power = theirs.abs().log2().frac() == 0
    carry_lost = power & (ours == theirs / 2)
    assert (((ours - theirs).abs() <= step) | carry_lost).all()
    assert float((ours == theirs).double().mean()) > 0.9


def test_rows_of_zeros_and_those_that_are_added_are_zeros():
    ours, scale = by_rounding.round_rows(torch.zeros(3, 32), multiple=16)
    assert ours.shape == (16, 32)
    assert ours.float().abs().max() == 0
    assert (scale == torch.tensor(1e-12) * (1 / 448)).all()


def test_rows_that_the_kernel_is_not_made_for_are_left_to_the_reference():
    rows = normal(1, 4, 32)
    assert by_rounding.round_rows(rows.t()) is None
    assert by_rounding.round_rows(rows.double()) is None
    assert by_rounding.round_rows(rows[:0]) is None
    assert by_rounding.round_rows(torch.zeros(1, by_rounding.MOST_COLUMNS + 1)) is None
