"""From logits to tokens: guidance, filters, draws and whose randomness a picture uses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from star_core.sampling import (
    FEW,
    MAX_SEED,
    PictureSeed,
    ScaleNoise,
    _keep_top_p_by_few,
    draw,
    guide,
    keep_top_k,
    keep_top_p,
    smooth_weights,
)

CPU = torch.device("cpu")
ALMOST_ONE = 1 - 2**-24
"""The largest number that a uniform float32 in [0, 1) can be."""


def some_logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(logits: Tensor) -> list[bool]:
    return (logits > -torch.inf).tolist()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.99, 0.9999])
@pytest.mark.parametrize("sharpness", [0.0, 0.3, 1.0, 3.0])
def test_the_short_way_to_top_p_keeps_what_the_whole_sort_keeps(p: float, sharpness: float):
    # Flat rows reach p far beyond the few, sharp ones within a handful: both ways are taken.
    logits = sharpness * some_logits(20, 64, 4 * FEW)
    assert torch.equal(_keep_top_p_by_few(logits, p), keep_top_p(logits, p))


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda logits: logits.bfloat16().float(),
    "integers": torch.round,
}


@pytest.mark.parametrize("rounded", ROUNDED)
@given(st.integers(0, 10_000), st.floats(0.3, 5), st.floats(0.01, 0.999), st.sampled_from([40, 2 * FEW]))
def test_of_ties_at_the_border_both_ways_to_top_p_keep_the_same(
    rounded: str, seed: int, sharpness: float, p: float, size: int
):
    # Coarse logits: the border of nearly every row lies among equal ones, of which `topk` hands out any.
    logits = ROUNDED[rounded](sharpness * some_logits(seed, 8, size))
    assert torch.equal(_keep_top_p_by_few(logits, p), keep_top_p(logits, p))


def test_of_ties_at_the_border_of_top_p_the_first_go_first():
    logits = torch.tensor([[2.0, 0.0, 2.0, 9.0, 2.0, 0.0, 2.0]])
    logits = torch.cat([logits, torch.full((1, 2 * FEW), -torch.inf)], dim=-1)
    least = logits.softmax(dim=-1)
    p = float(1 - 2 * least[0, 1] - 2.5 * least[0, 0])  # what falls: both of 0, two and a half of 2
    for filtered in (keep_top_p(logits, p), _keep_top_p_by_few(logits, p)):
        assert (filtered[0] > -torch.inf).nonzero().flatten().tolist() == [3, 4, 6]


def test_the_short_way_to_top_p_respects_an_earlier_top_k():
    logits = keep_top_k(some_logits(21, 8, 4 * FEW), 5)
    torch.testing.assert_close(_keep_top_p_by_few(logits, 0.9), keep_top_p(logits, 0.9), atol=0, rtol=0)
    torch.testing.assert_close(_keep_top_p_by_few(logits[:, :7], 0.9), keep_top_p(logits[:, :7], 0.9))


def test_guidance_moves_away_from_the_unconditional():
    conditional, unconditional = some_logits(0, 2, 3, 5), some_logits(1, 2, 3, 5)
    guided = guide(conditional, unconditional, 3.0)
    torch.testing.assert_close(guided, 4 * conditional - 3 * unconditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, -1.0), unconditional)


def test_top_k_keeps_the_largest_and_all_ties_with_the_last_of_them():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert kept(keep_top_k(logits, 1)) == [False, True, False, False, False]
    assert kept(keep_top_k(logits, 2)) == [False, True, True, True, False]
    assert kept(keep_top_k(logits, 3)) == [False, True, True, True, False]
    assert kept(keep_top_k(logits, 4)) == [True, True, True, True, False]


@pytest.mark.parametrize("k", [0, 5, 6, 1000])
def test_top_k_of_zero_or_of_the_whole_codebook_keeps_everything(k: int):
    logits = some_logits(2, 3, 5)
    assert torch.equal(keep_top_k(logits, k), logits)


def test_top_p_drops_the_least_likely_of_that_share_and_no_more():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert kept(keep_top_p(logits, 0.65)) == [False, False, True, True]
    assert kept(keep_top_p(logits, 0.75)) == [False, True, True, True]
    assert kept(keep_top_p(logits, 0.95)) == [True, True, True, True]
    assert kept(keep_top_p(logits, 0.0)) == [True, True, True, True]
    assert kept(keep_top_p(logits, 1.0)) == [True, True, True, True]


@given(st.integers(0, 10_000), st.floats(1e-6, 1.0), st.floats(0.01, 50))
def test_top_p_always_keeps_the_best(seed: int, p: float, spread: float):
    logits = spread * some_logits(seed, 4, 31)
    best = logits.argmax(dim=-1, keepdim=True)
    filtered = keep_top_p(logits, p)
    assert (filtered.gather(-1, best) > -torch.inf).all()
    dropped = logits.softmax(-1)[filtered == -torch.inf].sum()
    assert dropped <= 4 * (1 - p) + 1e-5


def test_top_p_keeps_exactly_one_of_equally_likely_tokens_when_it_must():
    assert sum(kept(keep_top_p(torch.zeros(8), 1e-6))) == 1


def test_filters_leave_what_they_are_given_alone():
    logits = some_logits(3, 2, 4, 16)
    before = logits.clone()
    uniform = torch.full((2, 4), 0.5)
    keep_top_k(logits, 3)
    keep_top_p(logits, 0.5)
    draw(logits, uniform, top_k=3, top_p=0.5, temperature=0.5)
    smooth_weights(logits, torch.zeros_like(logits), 0.5)
    assert torch.equal(logits, before)


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.06, 0.04]).log()
    count = 60_000
    uniform = torch.rand(1, count, generator=torch.Generator().manual_seed(0))
    tokens = draw(logits.expand(1, count, 6), uniform, top_k=5, top_p=0.92).tokens
    # The sixth falls to top-k; of the rest, the fifth's 0.0625 falls to top-p's lowest 0.08.
    expected = torch.tensor([0.30, 0.25, 0.20, 0.15]) / 0.90
    observed = tokens.flatten().bincount(minlength=6)
    assert observed[4:].tolist() == [0, 0]
    chi_square = ((observed[:4] - count * expected) ** 2 / (count * expected)).sum()
    # Three degrees of freedom: chance exceeds 21.1 once in ten thousand seeds, and this one is fixed.
    assert chi_square < 21.1


def test_evenly_spread_numbers_give_every_token_its_share_exactly():
    logits = some_logits(4, 12)
    count = 20_000
    uniform = ((torch.arange(count) + 0.5) / count).unsqueeze(0)
    tokens = draw(logits.expand(1, count, 12), uniform, top_k=0, top_p=0.0).tokens
    shares = tokens.flatten().bincount(minlength=12) / count
    torch.testing.assert_close(shares, logits.softmax(-1), atol=2 / count, rtol=0)


@given(
    st.integers(0, 10_000),
    st.integers(0, 40),
    st.floats(0, 1),
    st.floats(0.05, 5),
    st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_draw_never_picks_a_filtered_token(
    seed: int, top_k: int, top_p: float, temperature: float, number: float
):
    logits = some_logits(seed, 2, 9, 33)
    uniform = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed))
    uniform[0, 0], uniform[0, 1], uniform[0, 2] = number, 0.0, ALMOST_ONE
    drawn = draw(logits, uniform, top_k=top_k, top_p=top_p, temperature=temperature)
    survivors = keep_top_p(keep_top_k(logits / temperature, top_k), top_p) > -torch.inf
    assert survivors.gather(-1, drawn.tokens.unsqueeze(-1)).all()
    assert (drawn.confidence > 0).all()


def test_the_smallest_and_the_largest_number_take_the_first_and_the_last_survivor():
    logits = torch.tensor([-9.0, 1.0, 2.0, -9.0, 1.5, -9.0]).expand(1, 2, 6)
    uniform = torch.tensor([[0.0, ALMOST_ONE]])
    assert draw(logits, uniform, top_k=3, top_p=0.0).tokens.tolist() == [[1, 4]]
    assert draw(logits, uniform, top_k=1, top_p=0.0).tokens.tolist() == [[2, 2]]


@pytest.mark.parametrize("size", [2, 64, 4096])
def test_a_number_at_the_very_end_still_gives_a_token_of_the_codebook(size: int):
    for seed in range(20):
        logits = some_logits(seed, 1, 3, size)
        for number in (ALMOST_ONE, 1.0):
            tokens = draw(logits, torch.full((1, 3), number), top_k=0, top_p=0.5).tokens
            assert int(tokens.max()) < size


def test_confidence_is_the_probability_after_both_filters():
    logits = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).log()
    drawn = draw(logits, torch.tensor([[0.99]]), top_k=2, top_p=0.0)
    assert drawn.tokens.item() == 3
    assert drawn.confidence.item() == pytest.approx(0.4 / 0.7)
    drawn = draw(logits, torch.tensor([[0.0]]), top_k=3, top_p=0.5)
    assert drawn.tokens.item() == 2
    # After top-k 3 the lowest has 0.2 / 0.9 of the probability, less than 1 - p: it falls, the next does not.
    assert drawn.confidence.item() == pytest.approx(0.3 / 0.7)


def test_temperature_divides_the_logits_before_the_filters():
    logits, uniform = some_logits(5, 2, 7, 20), torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    cold = draw(logits, uniform, top_k=9, top_p=0.7, temperature=0.5)
    scaled = draw(logits / 0.5, uniform, top_k=9, top_p=0.7)
    assert torch.equal(cold.tokens, scaled.tokens)
    assert torch.equal(cold.confidence, scaled.confidence)
    freezing = draw(logits, uniform, top_k=0, top_p=0.0, temperature=0.01)
    assert torch.equal(freezing.tokens, logits.argmax(-1))


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_smooth_weights_are_weights_and_sharpen_with_the_scale(seed: int, ratio: float):
    logits = some_logits(seed, 2, 3, 15)
    gumbel = ScaleNoise([PictureSeed(seed), PictureSeed(seed, 1)], 0, CPU).gumbel(3, 15)
    weights = smooth_weights(logits, gumbel, ratio)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    assert torch.equal(weights.argmax(-1), (logits * (1 + ratio) + gumbel).argmax(-1))


def test_smooth_weights_are_the_released_formula():
    logits, gumbel = some_logits(6, 1, 1, 8), some_logits(7, 1, 1, 8)
    for scale, scales in ((0, 10), (4, 10), (9, 10)):
        ratio = scale / (scales - 1)
        temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
        scores = (logits * (1 + ratio) + gumbel) / temperature
        expected = scores.exp() / scores.exp().sum() if scores.max() < 80 else scores.softmax(-1)
        torch.testing.assert_close(smooth_weights(logits, gumbel, ratio), expected, atol=1e-6, rtol=1e-4)


def test_gumbel_numbers_are_gumbel_numbers():
    gumbel = ScaleNoise([PictureSeed(1)], 0, CPU).gumbel(200_000)
    assert torch.isfinite(gumbel).all()
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert gumbel.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)


def numbers(seeds: list[PictureSeed], scale: int) -> Tensor:
    return ScaleNoise(seeds, scale, CPU).uniform(16)


def test_a_row_has_its_own_stream_wherever_it_stands():
    first, second, third = PictureSeed(7, 0), PictureSeed(7, 1), PictureSeed(8, 0)
    together = numbers([first, second, third], 2)
    assert torch.equal(numbers([third, first], 2), together[[2, 0]])
    assert torch.equal(numbers([second], 2), together[1:2])
    assert len({tuple(row) for row in together.tolist()}) == 3
    assert not torch.equal(numbers([first], 3), together[:1])
    assert ((together >= 0) & (together < 1)).all()


def test_streams_go_on_and_can_be_had_again():
    noise = ScaleNoise([PictureSeed(3)], 1, CPU)
    one, two = noise.uniform(4), noise.uniform(4)
    assert not torch.equal(one, two)
    again = ScaleNoise([PictureSeed(3)], 1, CPU)
    assert torch.equal(again.uniform(4), one)
    assert torch.equal(again.uniform(4), two)


def test_neighbouring_seeds_indices_and_scales_never_share_a_stream():
    seen = {
        tuple(PictureSeed(seed, index).generator(scale).get_state().tolist()[:64])
        for seed in (0, 1, 10, 11, 110, MAX_SEED)
        for index in (0, 1, 10, 11)
        for scale in (0, 1, 10)
    }
    assert len(seen) == 6 * 4 * 3


def test_the_numbers_of_a_seed_never_change():
    # Pictures are remembered by their seed: another recipe of streams would draw other pictures.
    expected = torch.rand(3, generator=torch.Generator().manual_seed(stream_of("star/42/3/5")))
    assert torch.equal(ScaleNoise([PictureSeed(42, 3)], 5, CPU).uniform(3), expected.unsqueeze(0))


def stream_of(name: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (MAX_SEED + 1, 0), (0, -1)])
def test_seeds_outside_their_range_are_refused(seed: int, index: int):
    with pytest.raises(ValueError, match="seed|index"):
        PictureSeed(seed, index)


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    ScaleNoise([PictureSeed(1)], 0, CPU).uniform(5)
    ScaleNoise([PictureSeed(1)], 0, CPU).gumbel(5)
    assert torch.equal(torch.get_rng_state(), before)
