"""Normalised axial RoPE: what a rotation means, whatever the size and shape of the map."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from star_core.rope import Rotation, _rotate_real, axial_rope, axial_rope_of_maps, rotate

THETA, EXTENT, HEAD = 10_000.0, 64.0, 16
sides = st.integers(1, 9)


def angles(token_map: tuple[int, int]) -> torch.Tensor:
    """Return the first column pair's and the first row pair's angle per token; both have frequency 1."""
    rotation = axial_rope(token_map, HEAD, THETA, EXTENT)
    both = torch.atan2(rotation.sin, rotation.cos)
    return torch.stack([both[:, 0], both[:, HEAD // 4]], dim=1)


@given(sides, sides)
def test_a_map_has_one_angle_per_token_and_pair(height: int, width: int):
    cos, sin = axial_rope((height, width), HEAD, THETA, EXTENT)
    assert cos.shape == sin.shape == (height * width, HEAD // 2)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


@given(sides, sides)
def test_columns_turn_the_first_half_of_the_pairs_and_rows_the_second(height: int, width: int):
    cos, _ = axial_rope((height, width), HEAD, THETA, EXTENT)
    grid = cos.reshape(height, width, HEAD // 2)
    by_column, by_row = grid.chunk(2, dim=-1)
    assert torch.equal(by_column, by_column[:1].expand_as(by_column))
    assert torch.equal(by_row, by_row[:, :1].expand_as(by_row))


@given(st.integers(2, 9), st.integers(2, 9))
def test_every_map_spans_the_same_coordinates_corner_to_corner(height: int, width: int):
    cos, sin = axial_rope((height, width), HEAD, THETA, EXTENT)
    other = axial_rope((5, 3), HEAD, THETA, EXTENT)
    for corner, theirs in ((0, 0), (width - 1, 2), ((height - 1) * width, 12), (height * width - 1, 14)):
        torch.testing.assert_close(cos[corner], other.cos[theirs], atol=1e-5, rtol=0)
        torch.testing.assert_close(sin[corner], other.sin[theirs], atol=1e-5, rtol=0)


def test_coordinates_are_the_released_formula():
    rotation = axial_rope((4, 7), HEAD, THETA, EXTENT)
    for row in range(4):
        for column in range(7):
            for k in range(4):
                frequency = THETA ** -(4 * k / HEAD)
                x, y = column / 6 * EXTENT * frequency, row / 3 * EXTENT * frequency
                token = row * 7 + column
                assert rotation.cos[token, k].item() == pytest.approx(math.cos(x), abs=1e-5)
                assert rotation.sin[token, 4 + k].item() == pytest.approx(math.sin(y), abs=1e-5)


def test_a_side_of_one_sits_at_zero_even_beside_a_longer_one():
    assert angles((1, 1)).tolist() == [[0.0, 0.0]]
    assert (angles((1, 5))[:, 1] == 0).all()
    assert (angles((5, 1))[:, 0] == 0).all()
    assert torch.isfinite(axial_rope((1, 64), 64, THETA, EXTENT).cos).all()


def test_a_turned_map_has_rows_and_columns_exchanged():
    wide = axial_rope((3, 5), HEAD, THETA, EXTENT).cos.reshape(3, 5, 2, HEAD // 4)
    tall = axial_rope((5, 3), HEAD, THETA, EXTENT).cos.reshape(5, 3, 2, HEAD // 4)
    assert torch.equal(wide.transpose(0, 1).flip(2), tall)


def test_all_maps_follow_each_other_and_can_be_cut_out_again():
    maps = ((1, 1), (2, 3), (4, 5))
    whole = axial_rope_of_maps(maps, HEAD, THETA, EXTENT)
    assert whole.cos.shape == (27, HEAD // 2)
    third = axial_rope((4, 5), HEAD, THETA, EXTENT)
    assert torch.equal(whole.rows(7, 27).sin, third.sin)
    chosen = whole.select(torch.tensor([0, 26, 7]))
    assert torch.equal(chosen.cos, whole.cos[[0, 26, 7]])


def test_a_rotation_keeps_lengths_and_undoes_itself_backwards():
    x = torch.randn(2, 3, 20, HEAD, generator=torch.Generator().manual_seed(0))
    rotation = axial_rope((4, 5), HEAD, THETA, EXTENT)
    turned = rotate(x, rotation)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[:, :, 1:], x[:, :, 1:])
    back = rotate(turned, Rotation(rotation.cos, -rotation.sin))
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


def test_pairs_are_neighbours():
    quarter = Rotation(torch.zeros(1, 2), torch.ones(1, 2))
    turned = rotate(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), quarter)
    assert turned.tolist() == [[[[-2.0, 1.0, -4.0, 3.0]]]]


def test_attention_scores_depend_on_distance_alone():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(HEAD, generator=generator), torch.randn(HEAD, generator=generator)
    rotation = axial_rope((6, 6), HEAD, THETA, EXTENT)
    queries = rotate(q.expand(1, 1, 36, HEAD), rotation)
    keys = rotate(k.expand(1, 1, 36, HEAD), rotation)
    scores = (queries @ keys.transpose(-1, -2)).reshape(6, 6, 6, 6)
    assert scores[0, 0, 2, 1].item() == pytest.approx(scores[3, 4, 5, 5].item(), abs=1e-3)
    assert scores[4, 2, 1, 3].item() == pytest.approx(scores[3, 1, 0, 2].item(), abs=1e-3)


def test_a_rotation_in_bfloat16_is_computed_in_float32():
    x = torch.randn(1, 1, 64 * 64, 64, generator=torch.Generator().manual_seed(2))
    rotation = axial_rope((64, 64), 64, THETA, EXTENT)
    coarse = rotate(x.bfloat16(), rotation)
    exact = rotate(x.bfloat16().float(), rotation)
    torch.testing.assert_close(coarse, exact, atol=0, rtol=0)


def test_a_device_without_complex_numbers_rotates_equally(poor_device: Callable):
    x = torch.randn(2, 3, 20, 64, generator=torch.Generator().manual_seed(3))
    rotation = axial_rope((4, 5), 64, THETA, EXTENT)
    real = _rotate_real(x.unflatten(-1, (-1, 2)), rotation).flatten(-2)
    torch.testing.assert_close(rotate(x, rotation), real, atol=1e-6, rtol=0)
    with poor_device():
        assert rotate(x.to("meta"), Rotation(*(part.to("meta") for part in rotation))).shape == x.shape


def test_rotations_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        axial_rope_of_maps([(3, 5), (7, 2)], HEAD, THETA, EXTENT)
    rotation = axial_rope_of_maps([(3, 5), (7, 2)], HEAD, THETA, EXTENT)
    x = torch.randn(1, 1, 29, HEAD, requires_grad=True)
    rotate(x, rotation).sum().backward()
    assert x.grad is not None
