"""The multi-scale quantizer: which phi, which tokens, and the f_hat that they build up."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from star_core.quantizer import (
    MultiScaleQuantizer,
    Phi,
    averaged,
    enlarged,
    phi_index,
    resized_by_products,
)

RECTANGLES = ((1, 1), (2, 3), (3, 4), (4, 6))


def features(batch: int = 2, seed: int = 0, size: tuple[int, int] = (4, 6)) -> Tensor:
    return torch.randn(batch, 8, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def quantizer(paired: object) -> MultiScaleQuantizer:
    return paired.quantizer


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (9, [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_ties_between_phis_fall_as_in_the_released_code(scales: int, expected: list[int]):
    assert [phi_index(scale, scales) for scale in range(scales)] == expected


@given(st.integers(2, 40))
def test_phis_are_used_in_order_from_the_first_to_the_last(scales: int):
    used = [phi_index(scale, scales) for scale in range(scales)]
    assert used == sorted(used)
    assert (used[0], used[-1]) == (0, 3)


def test_phi_is_half_itself_and_half_a_convolution():
    phi = Phi(8)
    codes = features()
    torch.testing.assert_close(
        phi(codes), 0.5 * codes + 0.5 * F.conv2d(codes, phi.conv.weight, phi.conv.bias, padding=1)
    )


def test_f_hats_of_tokens_are_those_of_the_quantization(quantizer: MultiScaleQuantizer):
    quantized = quantizer.quantize(features(), RECTANGLES)
    assert [t.shape for t in quantized.tokens] == [(2, 1), (2, 6), (2, 12), (2, 24)]
    rebuilt = quantizer.f_hats(quantized.tokens, RECTANGLES)
    for ours, theirs in zip(rebuilt, quantized.f_hats, strict=True):
        assert ours.shape == (2, 8, 4, 6)
        torch.testing.assert_close(ours, theirs)


def test_f_hats_of_the_first_scales_need_the_first_tokens_alone(quantizer: MultiScaleQuantizer):
    quantized = quantizer.quantize(features(), RECTANGLES)
    some = quantizer.f_hats(quantized.tokens[:2], RECTANGLES)
    assert len(some) == 2
    torch.testing.assert_close(some[1], quantized.f_hats[1])


def test_tokens_are_the_nearest_entries_of_what_is_left(quantizer: MultiScaleQuantizer):
    wanted = features()
    quantized = quantizer.quantize(wanted, RECTANGLES)
    rest = wanted
    for scale, token_map in enumerate(RECTANGLES):
        seen = F.adaptive_avg_pool2d(rest, token_map)
        distances = torch.cdist(seen.flatten(2).transpose(1, 2), quantizer.codebook.weight.expand(2, -1, -1))
        chosen = distances.gather(2, quantized.tokens[scale].unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(chosen, distances.amin(dim=2), atol=1e-5, rtol=1e-5)
        rest = wanted - quantized.f_hats[scale]


def test_the_codebooks_own_vectors_are_found_again(quantizer: MultiScaleQuantizer):
    tokens = torch.arange(24).flip(0).expand(2, 24)
    codes = quantizer.lookup(tokens, (4, 6))
    assert codes.shape == (2, 8, 4, 6)
    assert torch.equal(codes[0, :, 1, 2], quantizer.codebook.weight[tokens[0, 1 * 6 + 2]])
    assert torch.equal(quantizer.nearest(codes), tokens)


def test_the_last_scale_is_neither_averaged_nor_upsampled(quantizer: MultiScaleQuantizer):
    codes = features()
    torch.testing.assert_close(quantizer.contribution(codes, 3, RECTANGLES), quantizer.phis[3](codes))
    small = features(size=(2, 3))
    upsampled = F.interpolate(small, size=(4, 6), mode="bicubic")
    torch.testing.assert_close(
        quantizer.contribution(small, 1, RECTANGLES), quantizer.phis[phi_index(1, 4)](upsampled)
    )


def test_the_next_input_is_an_area_average_row_by_row(quantizer: MultiScaleQuantizer):
    f_hat = features()
    smaller = quantizer.next_input(f_hat, (2, 3))
    assert smaller.shape == (2, 6, 8)
    torch.testing.assert_close(smaller[:, 4], f_hat[:, :, 2:4, 2:4].mean(dim=(2, 3)))
    torch.testing.assert_close(quantizer.next_input(f_hat, (4, 6))[:, 8], f_hat[:, :, 1, 2])


@pytest.mark.parametrize("token_map", [(1, 1), (3, 5), (6, 5), (4, 8), (13, 10), (15, 16), (16, 16)])
def test_averages_by_products_are_those_of_the_areas(token_map: tuple[int, int]):
    # Where a side is no multiple of the smaller one Apple's GPUs have nothing else.
    codes = torch.randn(2, 8, 15, 16, generator=torch.Generator().manual_seed(3))
    expected = F.interpolate(codes, size=token_map, mode="area")
    torch.testing.assert_close(resized_by_products(codes, token_map, "area"), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(averaged(codes, token_map), expected)


def test_a_device_needs_neither_bicubic_interpolation_nor_averages_over_areas(poor_device: Callable):
    codes = torch.empty(2, 4, 3, 5, device="meta")
    with poor_device():
        assert enlarged(codes, (16, 12)).shape == (2, 4, 16, 12)
        assert averaged(codes, (2, 2)).shape == (2, 4, 2, 2)
        with pytest.raises(NotImplementedError, match="interpolate"):
            F.interpolate(codes, size=(16, 12), mode="bicubic")


def test_teacher_inputs_are_the_inputs_of_the_loop(quantizer: MultiScaleQuantizer):
    quantized = quantizer.quantize(features(), RECTANGLES)
    expected = [quantizer.next_input(quantized.f_hats[s - 1], RECTANGLES[s]) for s in (1, 2, 3)]
    inputs = quantizer.teacher_inputs(quantized.tokens, RECTANGLES)
    assert inputs.shape == (2, 6 + 12 + 24, 8)
    torch.testing.assert_close(inputs, torch.cat(expected, dim=1))


def test_the_last_tokens_do_not_enter_the_teacher_inputs(quantizer: MultiScaleQuantizer):
    tokens = list(quantizer.quantize(features(), RECTANGLES).tokens)
    before = quantizer.teacher_inputs(tokens, RECTANGLES)
    tokens[3] = (tokens[3] + 1) % 64
    assert torch.equal(quantizer.teacher_inputs(tokens, RECTANGLES), before)


def test_pictures_of_a_batch_are_quantized_apart(quantizer: MultiScaleQuantizer):
    wanted = features(3)
    together = quantizer.quantize(wanted, RECTANGLES)
    for row in range(3):
        alone = quantizer.quantize(wanted[row : row + 1], RECTANGLES)
        for ours, theirs in zip(alone.tokens, together.tokens, strict=True):
            assert torch.equal(ours, theirs[row : row + 1])


def test_f_hat_stays_float32_under_bfloat16_weights(quantizer: MultiScaleQuantizer):
    coarse = copy.deepcopy(quantizer).bfloat16()
    quantized = coarse.quantize(features(), RECTANGLES)
    assert {f.dtype for f in quantized.f_hats} == {torch.float32}
    assert {f.dtype for f in coarse.f_hats(quantized.tokens, RECTANGLES)} == {torch.float32}
    assert coarse.empty_f_hat(2, RECTANGLES, torch.device("cpu")).dtype == torch.float32
    assert coarse.codebook_vectors(torch.device("cpu")).dtype == torch.float32
    assert coarse.teacher_inputs(quantized.tokens, RECTANGLES).dtype == torch.float32


class _Streamed(nn.Module):
    """An embedding whose table nobody can see: it answers through forward alone."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self._table = [nn.Embedding(count, width)]

    def forward(self, index: Tensor) -> Tensor:
        return self._table[0](index)


def test_the_codebook_is_read_through_forward_alone():
    operations = types.SimpleNamespace(Embedding=_Streamed, Conv2d=nn.Conv2d)
    quantizer = MultiScaleQuantizer(64, 8, operations=operations)
    with torch.no_grad():
        quantized = quantizer.quantize(features(), RECTANGLES)
        rebuilt = quantizer.f_hats(quantized.tokens, RECTANGLES)
        assert quantizer.codebook_vectors(torch.device("cpu")).shape == (64, 8)
    torch.testing.assert_close(rebuilt[-1], quantized.f_hats[-1])


def test_gradients_pass_straight_through_and_the_loss_reaches_codebook_and_features(paired: object):
    quantizer = copy.deepcopy(paired.quantizer).requires_grad_(True)
    wanted = features().requires_grad_()
    f_hat, loss, quantized = quantizer.training_losses(wanted, RECTANGLES)
    torch.testing.assert_close(f_hat, quantized.f_hats[-1])
    (passed,) = torch.autograd.grad(f_hat.sum(), wanted, retain_graph=True)
    assert torch.equal(passed, torch.ones_like(passed))
    loss.backward()
    assert wanted.grad.abs().max() > 0
    assert quantizer.codebook.weight.grad.abs().max() > 0
    by_hand = sum(1.25 * F.mse_loss(f, wanted.detach()) for f in quantized.f_hats) / 4
    torch.testing.assert_close(loss.detach(), by_hand.detach())


def test_features_are_not_edited_in_place(quantizer: MultiScaleQuantizer):
    wanted = features()
    before = wanted.clone()
    quantized = quantizer.quantize(wanted, RECTANGLES)
    assert torch.equal(wanted, before)
    f_hats = [f.clone() for f in quantized.f_hats]
    quantizer.next_input(quantized.f_hats[0], (2, 3))
    assert all(torch.equal(a, b) for a, b in zip(f_hats, quantized.f_hats, strict=True))


@pytest.mark.parametrize("before", [(1, 1), (2, 3), (5, 4), (13, 10)])
def test_products_resize_as_bicubic_interpolation_does(before):
    codes = torch.randn(3, 4, *before, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(codes, size=(16, 12), mode="bicubic")
    torch.testing.assert_close(resized_by_products(codes, (16, 12), "bicubic"), expected, atol=2e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            resized_by_products(codes, (16, 12), "bicubic"), expected, atol=2e-6, rtol=1e-5
        )
