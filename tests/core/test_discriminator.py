"""The discriminator: what it learns, how it is kept from learning by heart, and how its loss is balanced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.training.augmentation import augmented, pixel_sources
from star_core.training.discriminator import (
    Adversary,
    Discriminator,
    adaptive_weight,
    discriminator_loss,
    feature_distance,
    generator_loss,
    network_features,
)


class Edges:
    """Stands in for AlexNet, whose weights are a download: two maps of fixed random convolutions."""

    channels = (8, 16)

    def __init__(self, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = [
            torch.randn(8, 3, 5, 5, generator=generator),
            torch.randn(16, 8, 3, 3, generator=generator),
        ]

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        for weight in self.weights:
            pictures = F.relu(F.conv2d(pictures, weight, stride=2))
            yield pictures


def test_it_learns_to_tell_sharp_from_blurred():
    torch.default_generator.manual_seed(0)
    network, discriminator = Edges(), Discriminator(Edges.channels)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(40):
        sharp = torch.rand(4, 3, 32, 32, generator=generator).round() * 2 - 1
        blurred = F.avg_pool2d(sharp, 5, stride=1, padding=2)
        loss = discriminator_loss(
            discriminator(network_features(network, sharp)), discriminator(network_features(network, blurred))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Untrained it scores both alike, with a loss of 1.
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert sum(losses[-10:]) / 10 < 0.7


def test_its_gradient_makes_pictures_more_convincing_once_its_head_start_is_over():
    torch.default_generator.manual_seed(0)
    network = Edges()
    adversary = Adversary([network], 20, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for step in range(21):
        sharp = torch.rand(8, 3, 32, 32, generator=generator).round() * 2 - 1
        blurred = F.avg_pool2d(sharp, 5, stride=1, padding=2).requires_grad_(True)
        assert adversary.ready == (step >= 20)
        sources = tuple(pixel_sources(8, (32, 32), generator) for _ in range(2))
        push, loss = adversary.step(blurred, sharp, sources, ready=adversary.ready)
        adversary.steps += 1
        assert (push is None) == (step < 20)
    assert not loss.requires_grad
    assert push is not None
    assert blurred.grad is None
    with torch.no_grad():
        pictures = [blurred - size * push / push.std() for size in (-0.05, 0.0, 0.05)]
        scores = [
            -generator_loss(adversary.discriminator(network_features(network, some))).item()
            for some in pictures
        ]
    assert scores[0] < scores[1] < scores[2]


def test_it_may_look_through_several_networks():
    pictures = torch.rand(2, 3, 32, 32, requires_grad=True)
    sources = tuple(pixel_sources(2, (32, 32), torch.Generator().manual_seed(1)) for _ in range(2))
    pushes = []
    for networks in ([Edges(3), Edges(4)], [Edges(3), Edges(3)], [Edges(4), Edges(4)]):
        torch.default_generator.manual_seed(0)  # the same heads for each
        adversary = Adversary(networks, 0, torch.device("cpu"))
        assert len(adversary.discriminator.heads) == 4
        push, _ = adversary.step(pictures, pictures.detach(), sources, ready=True)
        assert push is not None
        pushes.append(push)
    both, first, second = pushes
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)


def test_features_of_equal_pictures_have_no_distance_and_its_gradient_leads_to_the_real_one():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    assert feature_distance(Edges(), real, real) == 0
    made = (real + 0.3 * torch.randn(real.shape, generator=generator)).requires_grad_(True)
    distance = feature_distance(Edges(), made, real)
    (gradient,) = torch.autograd.grad(distance, made)
    with torch.no_grad():
        assert feature_distance(Edges(), made - 0.1 * gradient / gradient.std(), real) < distance


def test_the_network_sees_a_picture_twice_as_large_and_every_place_counts_alike():
    maps = network_features(Edges(), torch.rand(2, 3, 32, 32))
    assert [tuple(found.shape) for found in maps] == [(2, 8, 30, 30), (2, 16, 14, 14)]
    for found in maps:
        squares = found.square().mean(dim=1)
        # A place at which no channel is active stays zero.
        assert torch.all(torch.isclose(squares, torch.ones(())) | (squares == 0))
        assert squares.max() > 0.9


def test_pictures_are_mirrored_and_shifted_whole_on_white_and_pass_gradients_on():
    numbers = torch.arange(16 * 16, dtype=torch.float32).view(1, 1, 16, 16) + 2
    pictures = numbers.repeat(512, 3, 1, 1).requires_grad_(True)
    found = augmented(pictures, torch.Generator().manual_seed(0))
    assert found.shape == pictures.shape
    # Whole pixels and white: nothing in between.
    assert set(found.flatten().tolist()) <= {1.0, *numbers.flatten().tolist()}
    middle = found[:, 0, 8, 8] - 2
    rising = found[:, 0, 8, 9] > found[:, 0, 8, 8]
    seen = {
        (int(number) // 16 - 8, int(number) % 16 - (8 if straight else 7), bool(straight))
        for number, straight in zip(middle.tolist(), rising.tolist(), strict=True)
    }
    assert seen == {(y, x, m) for y in range(-2, 3) for x in range(-2, 3) for m in (True, False)}
    found.sum().backward()
    assert pictures.grad is not None
    # Each pixel is there once, or is pushed out.
    assert set(pictures.grad.flatten().tolist()) == {0.0, 1.0}


def test_the_hinge_stops_where_both_are_told_apart_by_one():
    real, drawn = [torch.full((2, 16), 1.5)] * 2, [torch.full((2, 16), -1.5)] * 2
    assert discriminator_loss(real, drawn) == 0
    assert discriminator_loss(drawn, real) == pytest.approx(2.5)
    assert generator_loss(drawn) == pytest.approx(1.5)


def test_every_head_counts_alike_however_many_places_it_has():
    few, many = torch.full((2, 4), 3.0), torch.full((2, 400), -1.0)
    assert generator_loss([few, many]) == pytest.approx(-1.0)


def test_balanced_gradients_move_the_last_layer_equally_hard():
    layer = nn.Conv2d(4, 3, 1)
    pictures = layer(torch.randn(2, 4, 8, 8))
    pull, push = torch.randn_like(pictures), torch.randn_like(pictures) * 0.1
    share = adaptive_weight(pictures, pull, push, layer.weight)
    assert not share.requires_grad
    moves = [
        torch.autograd.grad(pictures, layer.weight, gradient, retain_graph=True)[0].norm()
        for gradient in (pull, share * push)
    ]
    assert moves[0] == pytest.approx(moves[1].item(), rel=1e-3)
    assert adaptive_weight(pictures, pull, push * 0, layer.weight).item() == 100.0
