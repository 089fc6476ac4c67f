"""The compiled kernels against their references, at the sizes of the released models and in whole pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="no Triton here: there are no kernels to compare")

from star_core import attention, load, sampling, transformer
from star_core.attention import LayerCache
from star_core.graphs import Replays
from star_core.kernels import references_only
from star_core.request import Options
from star_core.rope import Rotation
from star_core.sampling import PictureSeed

pytestmark = pytest.mark.usefixtures("kernels_serve")
KINDS = ["plain", "smooth", "confidence", "masked", "official"]
UNIT_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}
"""Greatest difference of vectors of length 1: one step of the halves; of float32, that of a GPU's exp."""
ALMOST_ONE = 1 - 2**-24


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Compare queries, keys or values (R, H, L, head_width), all measured in lengths of the expected ones."""
    assert ours.dtype == theirs.dtype
    length = theirs.float().norm(dim=-1, keepdim=True).clamp_min(1e-3)
    error = UNIT_ERROR[ours.dtype]
    torch.testing.assert_close(ours.float() / length, theirs.float() / length, atol=error, rtol=0)


@dataclasses.dataclass
class Inputs:
    """What self-attention is prepared from: rows of `tokens` tokens, behind a cache of `capacity`."""

    dtype: torch.dtype
    tokens: int
    heads: int = 30
    head_width: int = 64
    rows: int = 2
    turns_by_row: bool = False
    filled: int = 0
    capacity: int | None = None

    def cache(self) -> LayerCache | None:
        if self.capacity is None:
            return None
        shape = self.rows, self.heads, self.capacity, self.head_width
        cache = LayerCache(normal(7, *shape).to(self.dtype), normal(8, *shape).to(self.dtype))
        cache.filled = self.filled
        return cache

    def arguments(self, cache: LayerCache | None) -> tuple:
        width = self.heads * self.head_width
        turns = (self.rows,) if self.turns_by_row else ()
        angles = 3 * normal(4, *turns, self.tokens, self.head_width // 2)
        return (
            normal(1, self.rows, self.tokens, 3 * width).to(self.dtype),
            normal(2, width).to(self.dtype),
            normal(3, width).to(self.dtype),
            2 + 2 * normal(5, 1, self.heads, 1, 1),
            Rotation(angles.cos(), angles.sin()),
            cache,
        )


CASES = {
    "first scale": {"tokens": 1, "capacity": 5000},
    "small scale": {"tokens": 9, "capacity": 5000, "filled": 5},
    "odd offset": {"tokens": 2304, "capacity": 5000, "filled": 1357},
    "last scale, not stored": {"tokens": 4096, "capacity": 5000, "filled": 4893},
    "no cache": {"tokens": 1025},
    "tokens of each row's own": {"tokens": 1433, "capacity": 5000, "filled": 31, "turns_by_row": True},
    "one picture of sixteen heads": {"tokens": 256, "heads": 16, "rows": 1},
    "narrow heads": {"tokens": 24, "heads": 2, "head_width": 32, "capacity": 24},
    "narrowest heads": {"tokens": 300, "heads": 3, "head_width": 4},
    "wide heads": {"tokens": 300, "heads": 5, "head_width": 256},
    "many rows": {"tokens": 100, "rows": 33},
}


@pytest.mark.parametrize("dtype", UNIT_ERROR)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_heads_are_prepared_as_the_reference_does(served: list[str], case: str, dtype: torch.dtype):
    inputs = Inputs(dtype, **CASES[case])
    ours_cache, theirs_cache = inputs.cache(), inputs.cache()
    ours = attention.self_heads(*inputs.arguments(ours_cache))
    assert served == ["attention.self_heads"]
    with references_only():
        theirs = attention.self_heads(*inputs.arguments(theirs_cache))
    assert served == ["attention.self_heads"]
    for our, their in zip(ours, theirs, strict=True):
        assert_near(our, their)
    if ours_cache is not None and theirs_cache is not None:
        assert ours_cache.filled == theirs_cache.filled
        assert_near(ours_cache.keys, theirs_cache.keys)
        assert torch.equal(ours_cache.values, theirs_cache.values)
        stored = theirs_cache.filled > inputs.filled
        assert (ours[1].data_ptr() == ours_cache.keys.data_ptr()) == stored


@torch.no_grad()
def test_more_numbers_than_32_bits_count_are_prepared(served: list[str]):
    # 2.2 thousand million numbers of qkv; the last row is the one that lies beyond.
    inputs = Inputs(torch.bfloat16, tokens=4096, rows=94)
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    qkv, *others = inputs.arguments(None)
    assert qkv.numel() > 2**31
    last = [t[-1:].clone() for t in attention.self_heads(qkv, *others)]
    assert served == ["attention.self_heads"]
    with references_only():
        theirs = attention.self_heads(qkv[-1:].clone(), *others)
    for our, their in zip(last, theirs, strict=True):
        assert_near(our, their)


@pytest.mark.parametrize("dtype", UNIT_ERROR)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 30), (4096, 30), (333, 16)])
@torch.no_grad()
def test_cross_queries_are_the_reference_s(served: list[str], dtype: torch.dtype, tokens: int, heads: int):
    q, bias = normal(1, 1, tokens, 64 * heads).to(dtype), normal(2, 64 * heads).to(dtype)
    log_scale = 2 + 2 * normal(3, 1, heads, 1, 1)
    ours = attention.cross_queries(q, bias, log_scale)
    assert served == ["attention.cross_queries"]
    with references_only():
        assert_near(ours, attention.cross_queries(q, bias, log_scale))


def test_guidance_is_the_reference_s_to_the_last_bit(served: list[str]):
    for count in (1, 777, 4096):
        logits = 3 * normal(1, 2, count, 4096)
        for strength in (0.5, 3.0, 7.3):
            ours = sampling.guide(logits[:1], logits[1:], strength)
            with references_only():
                assert torch.equal(ours, sampling.guide(logits[:1], logits[1:], strength))
    assert served == ["sampling.guide"] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "adding", "wanted"), [(2, 2, 1), (2, 1, 2), (16, 16, 16)])
def test_sums_and_their_norms_are_the_reference_s(
    served: list[str], dtype: torch.dtype, rows: int, adding: int, wanted: int
):
    for tokens, columns in ((1, 1920), (300, 1920), (40, 1000)):
        x = 5 + normal(1, rows, tokens, columns).to(dtype)
        addend = normal(2, adding, tokens, columns).to(dtype)
        total, normed = transformer.add_then_norm(x, addend, wanted)
        with references_only():
            wanted_total, wanted_normed = transformer.add_then_norm(x, addend, wanted)
        assert torch.equal(total, wanted_total)
        error = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(normed, wanted_normed, atol=error, rtol=error)
    assert served == ["residual.add_then_norm"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_takes_its_activation_along(served: list[str], dtype: torch.dtype):
    layer = torch.nn.Linear(1920, 7680, device="cuda", dtype=dtype).requires_grad_(False)
    exact = torch.nn.functional.gelu
    for rows in (1, 2, 20, 4096):
        x = normal(rows, 2, rows, 1920).to(dtype)
        ours = transformer.expanded(x, layer)
        theirs = exact(
            torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()),
            approximate="tanh",
        )
        assert ours.dtype == dtype
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 4e-3
    assert served == ["products.expanded"] * 4


def assert_same_draw(
    logits: Tensor, uniform: Tensor, *, top_k: int, top_p: float, temperature: float = 1.0
) -> None:
    """Compare a kernel's draws with the reference's, and both with the probabilities in float64.

    Sums round otherwise, so that a number at a border may take the token beside it, and the token at top-p's
    border, the least likely of those kept, may go or another like it stay.
    """
    policy = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    ours = sampling.draw(logits, uniform, **policy)
    with references_only():
        theirs = sampling.draw(logits, uniform, **policy)
    kept = sampling.keep_top_p(sampling.keep_top_k(logits / temperature, top_k), top_p)
    chances = kept.double().softmax(dim=-1)
    cumulative = chances.cumsum(dim=-1)
    slack = torch.full_like(uniform, 1e-5)
    if 0 < top_p < 1:
        slack += 2 * chances.masked_fill(chances == 0, 1).amin(dim=-1)
    for drawn in (ours, theirs):
        at = drawn.tokens.unsqueeze(-1)
        upper, own = cumulative.gather(-1, at).squeeze(-1), chances.gather(-1, at).squeeze(-1)
        # Where rounding puts a number on the total itself, the likeliest token is taken.
        past = (uniform > 1 - 1e-5) & (drawn.tokens == chances.argmax(dim=-1))
        assert ((uniform <= upper + slack) | past).all()
        assert (uniform >= upper - own - slack).all()
    same = ours.tokens == theirs.tokens
    assert float(same.double().mean()) > 0.99
    change = (ours.confidence / theirs.confidence - 1).abs()[same]
    assert (change <= 2 * slack[same]).all()
    assert float((change > 1e-5).double().mean()) < 0.02


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 0.0), (1, 0.0), (5, 0.3), (600, 0.8), (4096, 0.8), (0, 0.999), (900, 1.0), (600, 0.0)],
)
def test_draws_are_the_reference_s(served: list[str], top_k: int, top_p: float):
    uniform = torch.rand(1, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    uniform[0, 0], uniform[0, 1] = 0.0, ALMOST_ONE
    for sharpness in (0.05, 1.0, 4.0):
        logits = sharpness * normal(3, 1, 4096, 4096)
        assert_same_draw(logits, uniform, top_k=top_k, top_p=top_p)
        # Half precision is full of ties.
        assert_same_draw(logits.bfloat16().float(), uniform, top_k=top_k, top_p=top_p)
        assert_same_draw(logits, uniform, top_k=top_k, top_p=top_p, temperature=0.7)
    assert served == ["sampling.draw"] * 9


@pytest.mark.parametrize("size", [64, 1000, 8192, 16384])
def test_codebooks_of_other_sizes_are_drawn_from(served: list[str], size: int):
    logits = 3 * normal(4, 2, 300, size)
    uniform = torch.rand(2, 300, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    assert_same_draw(logits, uniform, top_k=size // 2, top_p=0.8)
    assert served == ["sampling.draw"]


def test_a_filtered_token_is_never_drawn():
    logits = 2 * normal(5, 1, 4096, 4096)
    with references_only():
        allowed = sampling.keep_top_k(logits, 40) > -torch.inf
    for number in (0.0, 0.1, 0.5, 0.9999, ALMOST_ONE):
        uniform = torch.full((1, 4096), number, device="cuda")
        tokens = sampling.draw(logits, uniform, top_k=40, top_p=0.0).tokens
        assert allowed.gather(-1, tokens.unsqueeze(-1)).all()


def test_the_two_zeros_tie_on_a_gpu_too():
    # A compiler that drops the line which makes them one would part them.
    logits = torch.tensor([-1.0, -0.0, 0.0, -2.0], device="cuda").repeat(1, 2, 1)
    uniform = torch.tensor([[0.1, 0.9]], device="cuda")
    assert sampling.draw(logits, uniform, top_k=1, top_p=0.0).tokens.tolist() == [[1, 2]]


def test_rows_that_are_no_numbers_still_give_tokens_of_the_codebook():
    logits = torch.full((1, 3, 50), torch.nan, device="cuda")
    logits[0, 1] = -torch.inf
    logits[0, 2] *= -1
    uniform = torch.full((1, 3), 0.5, device="cuda")
    tokens = sampling.draw(logits, uniform, top_k=5, top_p=0.5).tokens
    assert ((tokens >= 0) & (tokens < 50)).all()


@torch.no_grad()
def test_nothing_waits_and_a_graph_repeats_the_kernels(no_waiting: Callable):
    inputs = Inputs(torch.float32, tokens=24, heads=2, capacity=64, filled=7)
    cache = inputs.cache()
    arguments = inputs.arguments(cache)
    logits, uniform = 3 * normal(6, 1, 24, 64), torch.rand(1, 24, device="cuda")

    def work() -> tuple[Tensor, Tensor]:
        cache.filled = inputs.filled
        q, _, _ = attention.self_heads(*arguments)
        return q, sampling.draw(logits, uniform, top_k=9, top_p=0.8).tokens

    work()  # builds the kernels
    torch.cuda.synchronize()
    with no_waiting():
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work()
    arguments[0].copy_(normal(20, *arguments[0].shape))
    logits.copy_(3 * normal(21, *logits.shape))
    graph.replay()
    for held, fresh in zip(recorded, work(), strict=True):
        assert torch.equal(held, fresh)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_pictures_are_the_same_with_and_without_kernels_and_graphs(
    tiny: Callable, ask: Callable, make_schedule: Callable, moved: Callable, served: list[str], kind: str
):
    for cross_attention in ("paired", "independent"):
        on_gpu, with_kernels, without = moved(tiny(cross_attention)), Replays(), Replays()
        for turn in range(3):
            seeds = [PictureSeed(turn), PictureSeed(turn, 1)]
            schedule = make_schedule(kind)
            scales = list(schedule.scales)
            scales[2] = dataclasses.replace(scales[2], prune=0.3)
            request = ask([turn, turn + 1], dataclasses.replace(schedule, scales=tuple(scales)), seeds=seeds)
            with references_only():
                served.clear()
                expected = on_gpu.run(request)
                recorded = on_gpu.run(request, without)
                assert not served
            runs = {
                "references in graphs": recorded,
                "kernels": on_gpu.run(request),
                "kernels in graphs": on_gpu.run(request, with_kernels),
            }
            assert served
            for name, steps in runs.items():
                equal = [torch.equal(a.tokens, b.tokens) for a, b in zip(steps, expected, strict=True)]
                assert all(equal), (name, turn, equal)
        # Graphs know memory by address: the two sets are let go before the next model's are made.
        with_kernels.forget()
        without.forget()


def test_the_shipped_model_draws_nearly_all_tokens_alike_with_and_without_kernels(gpu: torch.device):
    star = load(device=gpu)
    prompts, alike = ["a red apple", "cat", "rocket", "tree"], []
    for seed in (1, 2):
        options = Options(seed=seed)
        ours = [step.tokens for step in star.generate(prompts, options=options)]
        with references_only():
            theirs = [step.tokens for step in star.generate(prompts, options=options)]
        alike.append((torch.cat(ours, dim=1) == torch.cat(theirs, dim=1)).float().mean(dim=1))
    # Float32 sums round otherwise: a token at a border may differ, and later scales of its picture follow it.
    equal = torch.cat(alike) == 1
    assert int(equal.sum()) >= 6, f"of 8 pictures: {torch.cat(alike).tolist()}"
