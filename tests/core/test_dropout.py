"""Dropout in training: which layers, which share, and the same numbers in a run that goes on."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor

from star_core.config import square_maps
from star_core.rope import axial_rope_of_maps
from star_core.training.dropout import Dropout
from star_core.training.optimizers import muon_and_adamw
from star_core.transformer import SelfBlock, TextBlock

ROTATION = axial_rope_of_maps(square_maps([1, 2]), 64, 10000.0, 64.0)


@pytest.fixture
def block() -> TextBlock:
    torch.manual_seed(0)
    return TextBlock(64, 1, 16)


def run(block: TextBlock, x: Tensor) -> Tensor:
    return block(x, ROTATION, block.text_keys(torch.ones(len(x), 3, 16), None))


def test_a_share_of_what_a_branch_adds_is_left_out_and_the_rest_scaled_up(block):
    dropout = Dropout([block], 0.25, seed=3)
    x = torch.ones(64, 5, 64)
    for layer in (block.attn.proj, block.cross_attn.proj, block.ffn.contract):
        whole = layer.eval()(torch.ones(512, layer.in_features))
        dropout.begin(0)
        thinned = layer.train()(torch.ones(512, layer.in_features))
        left_out = thinned == 0
        assert left_out.float().mean().item() == pytest.approx(0.25, abs=0.01)
        torch.testing.assert_close(thinned[~left_out], (whole / 0.75)[~left_out])
    assert not torch.equal(run(block, x), run(block, x))
    block.eval()
    assert torch.equal(run(block, x), run(block, x))


def test_a_step_leaves_out_the_same_whatever_ran_before(block):
    dropout = Dropout([block], 0.25, seed=3)
    x = torch.randn(2, 5, 64)
    dropout.begin(7)
    first = run(block, x)
    torch.rand(5)
    dropout.begin(7)
    assert torch.equal(run(block, x), first)
    dropout.begin(8)
    assert not torch.equal(run(block, x), first)


def test_without_a_share_nothing_is_touched(block):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    Dropout([block], 0.0, seed=3).begin(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not layer._forward_hooks for layer in block.modules())


def test_a_causal_sampler_s_blocks_are_thinned_too():
    torch.manual_seed(0)
    block = SelfBlock(64, 1)
    Dropout([block], 0.5, seed=3).begin(0)
    x = torch.ones(2, 5, 64)
    assert not torch.equal(block(x, ROTATION), block(x, ROTATION))


def test_weights_lose_the_share_that_was_asked_for():
    layer = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    args = argparse.Namespace(rate=0.5, bfloat16=False)
    for decay in (0.1, 0.4):
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in muon_and_adamw(layer, args, torch.device("cpu"), decay=decay):
            optimizer.step()
        for parameter, was in zip(layer.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), was * (1 - 0.5 * decay))
