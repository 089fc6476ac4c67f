"""What a CPU computes in fewer passes, against the references: near in any dtype, and the same pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from star_core import attention, load, transformer, vqvae
from star_core.attention import LayerCache
from star_core.kernels import cpu, given_up, references_only
from star_core.packed import has_bfloat16_products
from star_core.rope import Rotation
from star_core.sampling import PictureSeed

UNIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}
"""Greatest difference of numbers of about 1."""
HEADS, HEAD_WIDTH, ROWS, TOKENS = 3, 8, 2, 5
WIDTH = HEADS * HEAD_WIDTH


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_reference(function: Callable, *arguments: object) -> object:
    with references_only():
        return function(*arguments)


def heads_of(dtype: torch.dtype, cache: LayerCache | None, *, turns: tuple[int, ...] = ()) -> tuple:
    qkv = normal(1, ROWS, TOKENS, 3 * WIDTH, dtype=dtype)
    qkv[0, 0, WIDTH : 2 * WIDTH] = 0  # a key without a length
    biases = normal(2, WIDTH, dtype=dtype) / 4, normal(3, WIDTH, dtype=dtype) / 4
    log_scale = torch.tensor([0.5, 4.0, 9.0]).reshape(1, -1, 1, 1)  # 9: beyond log 100
    angles = 3 * normal(4, *turns, TOKENS, HEAD_WIDTH // 2)
    return qkv, *biases, log_scale, Rotation(angles.cos(), angles.sin()), cache


def cache_of(dtype: torch.dtype, capacity: int | None) -> LayerCache | None:
    if capacity is None:
        return None
    shape = ROWS + 1, HEADS, capacity, HEAD_WIDTH
    cache = LayerCache(normal(7, *shape, dtype=dtype), normal(8, *shape, dtype=dtype))
    cache.filled = 4
    return cache


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("capacity", [None, 20, 9, 8], ids=["no cache", "cache", "filled up", "not stored"])
@pytest.mark.parametrize("turns", [(), (ROWS,)], ids=["", "tokens of each row's own"])
def test_heads_are_the_reference_s(
    dtype: torch.dtype, capacity: int | None, turns: tuple[int, ...], served: list[str]
):
    ours_cache, theirs_cache = cache_of(dtype, capacity), cache_of(dtype, capacity)
    ours = attention.self_heads(*heads_of(dtype, ours_cache, turns=turns))
    assert served == ["cpu.self_heads"]
    theirs = by_reference(attention.self_heads, *heads_of(dtype, theirs_cache, turns=turns))
    scale = torch.tensor([0.5, 4.0, 4.6052]).exp().reshape(1, -1, 1, 1)
    for our, their, unit in zip(ours, theirs, (scale, torch.ones(1), torch.ones(1)), strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our.float() / unit, their.float() / unit, atol=3 * UNIT[dtype], rtol=2**-7)
    if ours_cache is not None:
        assert ours_cache.filled == theirs_cache.filled
        torch.testing.assert_close(ours_cache.keys, theirs_cache.keys, atol=3 * UNIT[dtype], rtol=2**-7)
        assert torch.equal(ours_cache.values, theirs_cache.values)


@pytest.mark.parametrize("dtype", UNIT)
def test_queries_of_the_text_are_the_reference_s(dtype: torch.dtype, served: list[str]):
    _, bias, _, log_scale, *_ = heads_of(dtype, None)
    ours = attention.cross_queries(normal(1, ROWS, TOKENS, WIDTH, dtype=dtype), bias, log_scale)
    assert served == ["cpu.cross_queries"]
    q = normal(1, ROWS, TOKENS, WIDTH, dtype=dtype)
    theirs = by_reference(attention.cross_queries, q, bias, log_scale)
    torch.testing.assert_close(ours, theirs, atol=3 * UNIT[dtype], rtol=2**-6)


def test_biases_in_bfloat16_are_added_before_anything_is_rounded():
    dtype = torch.bfloat16
    exact = by_reference(
        attention.self_heads, *(t.float() if isinstance(t, Tensor) else t for t in heads_of(dtype, None))
    )
    ours, theirs = (
        attention.self_heads(*heads_of(dtype, None)),
        by_reference(attention.self_heads, *heads_of(dtype, None)),
    )
    errors = [(found[0].float() - exact[0]).abs().mean() for found in (ours, theirs)]
    assert errors[0] < 0.9 * errors[1]


def test_biases_and_scales_may_be_of_another_dtype():
    qkv, q_bias, v_bias, log_scale, turned, cache = heads_of(torch.float16, None)
    arguments = q_bias.float(), v_bias.double(), log_scale.half(), turned, cache
    ours = attention.self_heads(qkv.clone(), *arguments)
    theirs = by_reference(attention.self_heads, qkv, *arguments)
    for our, their, length in zip(ours, theirs, (100, 1, 1), strict=True):
        assert our.dtype == torch.float16
        torch.testing.assert_close(our, their, atol=3e-3 * length, rtol=0)


@pytest.mark.parametrize("dtype", UNIT)
def test_sums_are_the_reference_s_to_the_last_bit_and_lie_in_the_addend(dtype: torch.dtype, served: list[str]):
    x = normal(1, 4, TOKENS, WIDTH, dtype=dtype)
    before = x.clone()
    addend = normal(2, 4, TOKENS, WIDTH, dtype=dtype)
    expected = by_reference(transformer.added, x, addend.clone())
    with_norm = by_reference(transformer.add_then_norm, x, addend.clone(), 3)
    ours, normed = transformer.add_then_norm(x, addend, 3)
    assert torch.equal(ours, expected)
    assert torch.equal(normed, with_norm[1])
    assert len(normed) == 3
    assert ours.data_ptr() == addend.data_ptr()
    other = normal(2, 4, TOKENS, WIDTH, dtype=dtype)
    ours = transformer.added(x, other)
    assert torch.equal(ours, expected)
    assert ours.data_ptr() == other.data_ptr()
    assert served == ["cpu.add_then_norm", "cpu.added"]
    assert torch.equal(x, before), "the caller's residual stream stays"


@pytest.mark.parametrize("other", ["twins", "dtype"])
def test_sums_that_do_not_fit_the_addend_are_left_to_the_reference(other: str, served: list[str]):
    x = normal(1, 4, TOKENS, WIDTH)
    addend = normal(2, 2 if other == "twins" else 4, TOKENS, WIDTH)
    addend = addend.bfloat16() if other == "dtype" else addend
    before = addend.clone()
    expected = x + (torch.cat([addend, addend]) if other == "twins" else addend.float())
    assert torch.equal(transformer.added(x, addend), expected)
    assert torch.equal(transformer.add_then_norm(x, addend, 4)[0], expected)
    assert torch.equal(addend, before)
    assert not served


def test_a_failure_half_way_is_not_begun_again(monkeypatch: pytest.MonkeyPatch):
    def full(x: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(cpu, "norm", full)
    x, addend = torch.ones(2, 1, 4), torch.ones(2, 1, 4)
    with pytest.raises(RuntimeError, match="can't allocate"):
        transformer.add_then_norm(x, addend, 2)
    monkeypatch.undo()
    assert float(transformer.add_then_norm(x, torch.ones(2, 1, 4), 2)[0].max()) == 2
    assert not given_up()


def test_where_gradients_are_on_nothing_is_used_up():
    x, addend = torch.ones(2, 1, 4), torch.ones(2, 1, 4)
    conv, total = convolution(torch.float32), picture(1, torch.float32)
    before = total.clone()
    with torch.enable_grad():
        transformer.added(x, addend)
        vqvae.convolved_onto(total, picture(2, torch.float32), conv)
    assert float(addend.max()) == 1
    assert torch.equal(total, before)


def convolution(dtype: torch.dtype, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **options}).to(dtype).requires_grad_(False)


def picture(seed: int, dtype: torch.dtype) -> Tensor:
    return normal(seed, 2, 8, 6, 7, dtype=dtype).contiguous(memory_format=vqvae.LAYOUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_is_added_where_the_sum_lies(dtype: torch.dtype, served: list[str]):
    if dtype == torch.bfloat16 and not has_bfloat16_products():
        pytest.skip("this processor multiplies no bfloat16")
    conv, x, total = convolution(dtype), picture(1, dtype), picture(2, dtype)
    exact = total.double() + by_reference(conv.double(), x.double())
    conv.to(dtype)
    theirs = by_reference(vqvae.convolved_onto, total.clone(), x, conv)
    ours = vqvae.convolved_onto(total, x, conv)
    assert served == ["cpu.convolved_onto"]
    assert not given_up()
    assert ours.data_ptr() == total.data_ptr()
    torch.testing.assert_close(ours, theirs, atol=2 * UNIT[dtype], rtol=2**-7)
    if dtype == torch.bfloat16:
        assert (ours - exact).abs().mean() < (theirs - exact).abs().mean()


class HostsConvolution(nn.Conv2d):
    """A host's layer, which casts its weights or lets others change them as it is applied."""


@pytest.mark.parametrize(
    "what", ["host", "hook", "hook before", "dtype", "sum's layout", "layout", "half", "mirrored", "autocast"]
)
def test_other_convolutions_are_left_to_their_layers(what: str):
    conv, x, total = convolution(torch.float32), picture(1, torch.float32), picture(2, torch.float32)
    if what == "host":
        conv = HostsConvolution(8, 8, 3, padding=1).requires_grad_(False)
    elif what == "hook":
        conv.register_forward_hook(lambda layer, given, made: made)
    elif what == "hook before":
        conv.register_forward_pre_hook(lambda layer, given: given)
    elif what == "dtype":
        conv = conv.double()
    elif what == "sum's layout":
        total = total.contiguous()
    elif what == "layout":
        x = x.contiguous()
    elif what == "mirrored":
        conv = convolution(torch.float32, padding_mode="reflect")
    elif what == "half":
        conv, x, total = conv.half(), x.half(), total.half()
    before = total.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert cpu.convolved_onto(total, x, conv) is None
    assert torch.equal(total, before)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_a_hook_is_left_to_it(register: str):
    layer = nn.Linear(16, 32).bfloat16().requires_grad_(False)
    x = normal(1, 1, 2, 16, dtype=torch.bfloat16)
    assert (cpu.expanded(x, layer) is not None) == has_bfloat16_products()
    getattr(layer, register)(lambda *_: None)
    assert cpu.expanded(x, layer) is None


def test_finding_out_what_a_cpu_can_do_draws_no_random_numbers():
    cpu._convolves.cache_clear()
    has_bfloat16_products.cache_clear()
    before = torch.get_rng_state()
    for dtype in UNIT:
        cpu._convolves(dtype)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_decoder_adds_all_its_convolutions_in_place(served: list[str]):
    decoder = load().vqvae
    features = normal(1, 2, 32, 16, 16)
    ours = decoder.decode(features)
    blocks = [m for m in decoder.decoder.modules() if isinstance(m, vqvae.ResidualBlock)]
    assert served == ["cpu.convolved_onto"] * len(blocks)
    torch.testing.assert_close(ours, by_reference(decoder.decode, features), atol=1e-5, rtol=0)


def test_under_autocast_pictures_are_near_the_reference_s(
    tiny: Callable, ask: Callable, make_schedule: Callable
):
    model = tiny("independent").transformer
    text = model.text_keys(normal(1, 2, 7, model.config.text_width), None)
    x = normal(2, 2, 5, model.config.width)
    angles = normal(3, 5, model.config.head_width // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    with torch.autocast("cpu", torch.bfloat16):
        ours = model.features(x, rotation, text)
        theirs = by_reference(model.features, x, rotation, text)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("cross_attention", ["paired", "independent"])
@pytest.mark.parametrize("kind", ["plain", "smooth", "official"])
def test_whole_pictures_are_the_reference_s(
    tiny: Callable, ask: Callable, make_schedule: Callable, served: list[str], cross_attention: str, kind: str
):
    model = tiny(cross_attention)
    request = ask([1, 2], make_schedule(kind), seeds=[PictureSeed(1), PictureSeed(2)])
    ours = model.run(request)
    assert set(served) == {"cpu.self_heads", "cpu.cross_queries", "cpu.add_then_norm", "cpu.added"}
    assert not given_up()
    theirs = by_reference(model.run, request)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.f_hat, b.f_hat, atol=3e-4, rtol=1e-4)  # smooth drawing sharpens
