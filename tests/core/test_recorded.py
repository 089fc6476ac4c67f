"""Training steps that are recorded and repeated, and lessons with wrong tokens in them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.config import square_maps, token_count
from star_core.graphs import Tapes
from star_core.quantizer import MultiScaleQuantizer
from star_core.training.muon import Muon
from star_core.training.optimizers import set_rate
from star_core.training.recorded import UNRECORDED, RecordedStep
from star_core.training.run import OwnPrecisionGroupNorm, operations_for
from star_core.training.self_correction import NEIGHBOURS, TokenCorruption


def network_and_step() -> tuple[nn.Module, Muon, RecordedStep, RecordedStep]:
    generator = torch.Generator().manual_seed(0)
    network = nn.Linear(6, 4, bias=False)
    nn.init.normal_(network.weight, generator=generator)
    optimizer = Muon(network.parameters(), torch.tensor(0.1))

    def step(x: Tensor, y: Tensor, *, squared: bool) -> tuple[Tensor, ...]:
        made = network(x)
        loss = F.mse_loss(made, y) if squared else F.l1_loss(made, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return network, optimizer, RecordedStep(step, None), RecordedStep(step, Tapes(torch.device("cpu")))


def test_a_recorded_step_learns_as_an_unrecorded_one():
    generator = torch.Generator().manual_seed(1)
    batches = [[torch.randn(3, n, generator=generator) for n in (6, 4)] for _ in range(UNRECORDED + 4)]
    (plain, plain_optimizer, step, _), (taped, taped_optimizer, _, recorded) = (
        network_and_step(),
        network_and_step(),
    )
    for number, batch in enumerate(batches):
        for optimizer in (plain_optimizer, taped_optimizer):
            set_rate(optimizer, 0.1 / (1 + number))
        # A tape, other than a CUDA graph, does the work while it records it: that batch counts twice.
        expected = [step(*batch, squared=True) for _ in range(1 + (number == UNRECORDED))][-1]
        found = recorded(*batch, squared=True)
        torch.testing.assert_close(found[0], expected[0], msg=f"step {number}")
        torch.testing.assert_close(taped.weight, plain.weight)
    before = taped.weight.clone()
    set_rate(taped_optimizer, 0.0)
    recorded(*batches[0], squared=True)
    assert torch.equal(taped.weight, before), "a recorded step reads the rate anew"


def test_each_shape_and_each_kind_of_step_has_its_own_recording():
    network, _, _, recorded = network_and_step()
    for rows in (3, 5):
        for squared in (True, False):
            for _ in range(UNRECORDED + 2):
                x, y = torch.randn(rows, 6), torch.randn(rows, 4)
                with torch.no_grad():
                    made = network(x)
                    expected = F.mse_loss(made, y) if squared else F.l1_loss(made, y)
                found = recorded(x, y, squared=squared)[0].clone()
            torch.testing.assert_close(found, expected)


MAPS = square_maps([1, 2, 4])


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(64, 8)
    nn.init.normal_(quantizer.codebook.weight)
    return quantizer


@torch.no_grad()
def test_what_is_drawn_wrong_is_made_up_for(quantizer):
    features = torch.randn(40, 8, 4, 4)
    generator = torch.Generator().manual_seed(2)
    right = quantizer.quantize(features, MAPS)
    corruption = TokenCorruption(quantizer, MAPS, 0.6)
    chances = corruption.chances(40, generator)
    assert chances.shape == (40, token_count(MAPS))
    shown: list[Tensor] = []
    show = corruption.of(chances)

    def watched(scale: int, tokens: Tensor) -> Tensor:
        shown.append(show(scale, tokens))
        return shown[-1]

    wrong = quantizer.quantize(features, MAPS, watched)
    assert torch.equal(wrong.tokens[0], right.tokens[0]), "what is asked for stays right"
    # From the second scale on what is asked for is the nearest to what the wrong ones have left.
    rest = features - quantizer.contribution(quantizer.lookup(shown[0], MAPS[0]), 0, MAPS)
    asked = quantizer.nearest(F.interpolate(rest, size=MAPS[1], mode="area"))
    assert torch.equal(wrong.tokens[1], asked)
    assert not torch.equal(wrong.tokens[1], right.tokens[1])
    taken = quantizer.f_hats(shown, MAPS)
    for ours, theirs in zip(wrong.f_hats, taken, strict=True):
        torch.testing.assert_close(ours, theirs)
    # Blind to the mistakes, the same scales would end further away.
    blind = quantizer.f_hats([shown[0], shown[1], right.tokens[2]], MAPS)[-1]
    corrected = quantizer.f_hats([shown[0], shown[1], wrong.tokens[2]], MAPS)[-1]
    assert F.mse_loss(corrected, features) < 0.95 * F.mse_loss(blind, features)


@torch.no_grad()
def test_wrong_tokens_are_as_many_as_told_half_of_them_near_misses(quantizer):
    corruption = TokenCorruption(quantizer, MAPS, 0.6)
    tokens = torch.randint(64, (400, 16), generator=torch.Generator().manual_seed(3))
    chances = corruption.chances(400, torch.Generator().manual_seed(4))
    wrong = corruption.of(chances)(2, tokens)
    share = (wrong != tokens).float().mean().item()
    # Half the largest share on average; one in 64 of another picture's tokens is the right one.
    assert share == pytest.approx(0.3, abs=0.02)
    differ = (wrong != tokens).float().mean(dim=1)
    assert differ.max() > 0.55 > 0.05 > differ.min()
    distances = torch.cdist(quantizer.codebook.weight, quantizer.codebook.weight)
    ranks = distances.argsort(dim=1).argsort(dim=1)[tokens, wrong][wrong != tokens]
    near = (ranks <= NEIGHBOURS).float().mean().item()
    assert near == pytest.approx(0.5 + 0.5 * NEIGHBOURS / 63, abs=0.03)
    assert set(ranks.tolist()) > set(range(1, NEIGHBOURS + 1))
    none = TokenCorruption(quantizer, MAPS, 0.0)
    assert torch.equal(none.of(none.chances(400, torch.Generator()))(2, tokens), tokens)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_of_wrong_tokens_that_is_none_is_refused(share, quantizer):
    with pytest.raises(ValueError, match="of the tokens cannot be wrong"):
        TokenCorruption(quantizer, MAPS, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_normalisation_keeps_its_input_s_precision(dtype):
    plain, half = nn.GroupNorm(4, 16, eps=1e-6), OwnPrecisionGroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(plain.weight)
    half.load_state_dict(plain.state_dict())
    x = 3 + 2 * torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        made = half(x.to(dtype))
    assert made.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(made.float(), plain(x), atol=tolerance, rtol=tolerance)


def test_a_gpu_s_vqvae_differs_in_its_normalisation_alone():
    layers = operations_for(torch.device("cuda"))
    assert layers.GroupNorm is OwnPrecisionGroupNorm
    assert layers.Conv2d is nn.Conv2d
    assert operations_for(torch.device("cpu")) is nn
    assert nn.GroupNorm is not OwnPrecisionGroupNorm
