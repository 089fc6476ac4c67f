"""The patch discriminator: what it learns, and how its loss is balanced against the distance."""

from __future__ import annotations

import pytest
import torch

from star_core.training.discriminator import PatchDiscriminator, balance, convincing_loss, judging_loss


def test_it_learns_to_tell_sharp_from_blurred():
    torch.default_generator.manual_seed(0)
    judge = PatchDiscriminator()
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        sharp = torch.rand(8, 3, 32, 32, generator=generator).round() * 2 - 1
        blurred = torch.nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2)
        loss = judging_loss(judge(sharp), judge(blurred))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert judge(sharp).shape == (8, 1, 4, 4)
    # Untrained it scores both alike, with a loss of 1.
    assert loss.item() < 0.2


def test_the_hinge_stops_where_both_are_told_apart_by_one():
    real, drawn = torch.full((2, 1, 4, 4), 1.5), torch.full((2, 1, 4, 4), -1.5)
    assert judging_loss(real, drawn) == 0
    assert judging_loss(drawn, real) == pytest.approx(2.5)
    assert convincing_loss(drawn) == pytest.approx(1.5)


def test_balanced_losses_pull_the_last_layer_equally_hard():
    weight = torch.nn.Parameter(torch.ones(3))
    distance, convincing = (weight * 2).sum(), (weight * 0.25).sum()
    share = balance(distance, convincing, weight)
    assert share.item() == pytest.approx(8.0, rel=1e-3)
    assert not share.requires_grad
    assert balance(distance, convincing * 0, weight).item() == 100.0
