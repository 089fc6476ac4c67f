"""Dropout in training: which layers, which share, and the same numbers in a run that goes on."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor

from star_core.config import square_maps
from star_core.graphs import Tapes
from star_core.rope import axial_rope_of_maps
from star_core.training.dropout import Dropout, hashed, signed
from star_core.training.optimizers import muon_and_adamw
from star_core.training.recorded import UNRECORDED, RecordedStep
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
    thinned = run(block, x)
    assert not torch.equal(run(block.eval(), x), thinned)
    assert torch.equal(run(block.train(), x), thinned)


def test_a_step_leaves_out_the_same_whatever_ran_before(block):
    dropout = Dropout([block], 0.25, seed=3)
    x = torch.randn(2, 5, 64)
    dropout.begin(7)
    first = run(block, x)
    dropout.begin(7)
    assert torch.equal(run(block, x), first)
    dropout.begin(8)
    assert not torch.equal(run(block, x), first)


def test_the_process_s_random_numbers_are_left_alone_and_without_a_share_the_block_is(block):
    state = torch.get_rng_state()
    Dropout([block], 0.0, seed=3).begin(1)
    assert all(not layer._forward_hooks for layer in block.modules())
    Dropout([block], 0.5, seed=3).begin(1)
    run(block, torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_steps_and_neighbours_are_left_out_independently_of_each_other(block):
    layers = [block.attn.proj, block.cross_attn.proj, block.ffn.contract]
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.ones_(layer.bias)
    dropout = Dropout([block], 0.5, seed=3)
    masks = []
    for step in (0, 1):
        dropout.begin(step)
        masks += [layer(torch.ones(256, layer.in_features)) > 0 for layer in layers]
    kept = torch.stack(masks).flatten(1).float() * 2 - 1
    expected = kept.shape[1] ** -0.5  # the deviation of a correlation where there is none
    alike = kept @ kept.T / kept.shape[1] - torch.eye(len(kept))
    assert alike.abs().max() < 4.5 * expected
    for away in (1, 2, 64, 128):
        assert (kept[:, away:] * kept[:, :-away]).mean(dim=1).abs().max() < 4.5 * expected


def test_a_compiled_block_leaves_out_what_the_plain_one_does_and_has_its_gradients(block):
    dropout = Dropout([block], 0.25, seed=3)
    x, hidden = torch.randn(2, 5, 64), torch.randn(2, 3, 16)
    seen, mask = torch.ones(2, 3, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).tril()

    def results() -> list[Tensor]:
        found = []
        for step in (4, 5):
            dropout.begin(step)
            out = block(x, ROTATION, block.text_keys(hidden, seen), mask=mask)
            found += [out.detach(), *torch.autograd.grad(out.square().mean(), list(block.parameters()))]
        return found

    plain = results()
    block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for ours, theirs in zip(results(), plain, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.equal(plain[0], plain[len(plain) // 2])


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="torch 2.4 compiles each block apart: 2.5 is needed")
def test_blocks_share_what_is_compiled_of_them():
    blocks = [TextBlock(64, 1, 16) for _ in range(10)]
    Dropout(blocks, 0.25, seed=3).begin(1)
    text, compiled = torch.ones(2, 3, 16), 0

    def counted(graph: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend=counted, fullgraph=True, dynamic=False)
        block(torch.ones(2, 5, 64), ROTATION, block.text_keys(text, None))
    assert compiled == 1, "the compiler gives up on a function with more than eight versions"


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan")])
def test_a_share_that_is_none_is_refused(share, block):
    with pytest.raises(ValueError, match="cannot be left out"):
        Dropout([block], share, seed=0)


def test_a_recorded_step_leaves_out_what_its_number_says():
    layer = torch.nn.Linear(16, 16)
    block = torch.nn.ModuleDict({"ffn": torch.nn.ModuleDict({"contract": layer})})
    dropout = Dropout([block], 0.5, seed=3)
    recorded = RecordedStep(lambda x: (layer(x),), Tapes(torch.device("cpu")))
    x, seen = torch.ones(4, 16), set()
    for step in range(UNRECORDED + 4):
        dropout.begin(step)
        (found,) = recorded(x)
        assert torch.equal(found, layer(x)), f"step {step}"
        seen.add(tuple((found == 0).flatten().tolist()))
    assert len(seen) == UNRECORDED + 4


def test_hashes_are_those_of_splitmix64():
    # The first outputs of the published generator from the state 0: its increments, finalized.
    increments = [signed(number * 0x9E3779B97F4A7C15) for number in (1, 2, 3)]
    found = [number % 2**64 for number in hashed(torch.tensor(increments)).tolist()]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_causal_sampler_s_blocks_are_thinned_too():
    torch.manual_seed(0)
    block = SelfBlock(64, 1)
    x = torch.ones(2, 5, 64)
    whole = block(x, ROTATION)
    Dropout([block], 0.5, seed=3).begin(0)
    assert not torch.equal(block(x, ROTATION), whole)


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
