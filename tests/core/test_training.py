"""What the training stages share: windows, resumable batches, the rate curve, Muon, known masks."""

from __future__ import annotations

import argparse
import pickle

import numpy as np
import pytest
import torch

from star_core import load
from star_core.config import square_maps, token_count
from star_core.training.augmentation import Motion, Moved, may_be_mirrored
from star_core.training.causal_sampler import EMPTY_SHARE, known_mask
from star_core.training.emoji import Record
from star_core.training.lessons import Planner, window_positions
from star_core.training.muon import Muon, orthogonalise
from star_core.training.optimizers import rate_at
from star_core.training.run import Average, Checkpoint, PictureStore, shuffled_batches

MAPS = square_maps((1, 2, 3, 4, 6, 8))


def test_a_window_keeps_early_scales_whole_and_the_same_place_of_late_ones():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        positions = window_positions(MAPS, 2, 0.7, generator)
        assert len(positions) == 30 + 4 * 4 + 6 * 6
        assert len(positions.unique()) == len(positions)
        assert positions.max() < token_count(MAPS)
        assert torch.equal(positions[:30], torch.arange(30))
        six, eight = (positions[30:46] - 30).view(4, 4), (positions[46:] - 66).view(6, 6)
        assert torch.equal(six[:, 1:] - six[:, :-1], torch.ones(4, 3, dtype=torch.long))
        top_six, top_eight = int(six[0, 0]) // 6 / 6, int(eight[0, 0]) // 8 / 8
        assert abs(top_six - top_eight) <= 0.3


def test_a_resumed_run_sees_the_batches_of_an_unbroken_one():
    whole = shuffled_batches(50, 8, seed=3, first_step=0)
    batches = [next(whole) for _ in range(20)]
    resumed = shuffled_batches(50, 8, seed=3, first_step=9)
    for expected in batches[9:]:
        assert torch.equal(next(resumed), expected)
    epoch = torch.cat(batches[:6])
    assert len(epoch.unique()) == 48


@pytest.mark.parametrize("batch", [8, 0, -3])
def test_pictures_that_fill_no_batch_are_refused(batch):
    # A negative batch was looked for in endless epochs once.
    with pytest.raises(ValueError, match=f"do not fill one batch of {batch}: choose another --batch"):
        next(shuffled_batches(5, batch, seed=0, first_step=0))


def test_the_rate_rises_stays_and_falls():
    rates = [rate_at(step, step / 1000, 1.0, warmup=100, decay=0.4) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100:600] == [1.0] * 500
    assert rates[-1] < 0.03
    assert all(a >= b for a, b in zip(rates[600:], rates[601:], strict=False))


def test_muon_updates_have_singular_values_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 64), (64, 16), (32, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_muon_agrees_with_torch_in_direction_and_size():
    if not hasattr(torch.optim, "Muon"):
        # torch has it from 2.9 on; the property test above stands alone before that.
        assert torch.__version__ < "2.9"
        return
    generator = torch.Generator().manual_seed(1)
    start, gradient = (torch.randn(24, 40, generator=generator) for _ in range(2))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    reference = torch.optim.Muon([theirs], 0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon([ours], 0.01, weight_decay=0.05)
    for _ in range(3):
        for parameter, maker in ((ours, optimizer), (theirs, reference)):
            parameter.grad = gradient.clone()
            maker.step()
    moved, wanted = (ours - start).detach(), (theirs - start).detach()
    # torch iterates in bfloat16, hence the tolerance.
    assert float((moved - wanted).norm() / wanted.norm()) < 0.05


def test_lessons_of_the_sampler_show_nothing_at_times_and_an_arccos_share_otherwise():
    known = known_mask(4000, 64, np.random.default_rng(0)).float().mean(dim=1)
    empty = float((known == 0).float().mean())
    assert EMPTY_SHARE - 0.02 < empty < EMPTY_SHARE + 0.04
    assert 0.60 < float(known[known > 0].mean()) < 0.68


def test_a_checkpoint_comes_back_with_its_step_and_seconds(tmp_path):
    first = Checkpoint(tmp_path / "checkpoint.pt")
    assert first.load() is None
    first.step = 7
    first.save({"model": {"weight": torch.ones(2)}})
    second = Checkpoint(tmp_path / "checkpoint.pt")
    state = second.load()
    assert second.step == 7
    assert torch.equal(state["model"]["weight"], torch.ones(2))
    assert second.total_seconds() >= first.seconds
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_averaged_weights_follow_quickly_at_first_and_slowly_later():
    module = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
        average = Average(module, 0.998)
        module.weight.fill_(1.0)
    average.update(module)
    assert float(average.state["weight"]) > 0.5
    for _ in range(2000):
        average.update(module)
    assert float(average.state["weight"]) == pytest.approx(1.0, abs=0.05)


def test_muon_in_bfloat16_moves_weights_as_in_float32_nearly():
    generator = torch.Generator().manual_seed(2)
    start, gradient = (torch.randn(24, 40, generator=generator) for _ in range(2))
    exact, rough = (torch.nn.Parameter(start.clone()) for _ in range(2))
    for parameter, dtype in ((exact, None), (rough, torch.bfloat16)):
        parameter.grad = gradient.clone()
        Muon([parameter], 0.01, dtype=dtype).step()
        assert parameter.dtype == torch.float32
    difference = (rough - exact).detach().norm() / (exact - start).detach().norm()
    assert 0 < float(difference) < 0.05


def record(label: str, group: str = "objects") -> Record:
    return Record(0, "Noto", "1f600", label, label, (), group, "train")


def test_pictures_that_tell_left_from_right_are_not_mirrored():
    assert may_be_mirrored(record("red apple"))
    assert not may_be_mirrored(record("right arrow"))
    assert not may_be_mirrored(record("three o'clock"))
    assert not may_be_mirrored(record("keycap 3", "symbols"))


def test_moved_pictures_are_mirrored_shifted_turned_and_resized_on_white():
    pictures = torch.full((64, 3, 48, 48), 1.0)
    pictures[:, :, 18:30, 15:27] = torch.linspace(-1, 0, 12).view(1, 1, 1, 12)
    moved = Moved(torch.arange(64) % 2 == 0, torch.Generator().manual_seed(0))
    drawn = moved(pictures, 0)
    assert (drawn[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 1).all(), "outside there is white"
    ink = (1 - drawn).sum(dim=(1, 2, 3)) / (1 - pictures).sum(dim=(1, 2, 3))
    assert 0.9**2 - 0.03 < ink.min() < 0.9
    assert 1.1 < ink.max() < 1.1**2 + 0.03
    dark, columns = (1 - drawn[:, 0]).sum(dim=1), torch.arange(48.0)
    middle = dark @ columns / dark.sum(dim=1)
    skew = ((columns - middle.unsqueeze(1)) ** 3 * dark).sum(dim=1)
    assert (skew[1::2] > 0).all(), "no odd picture may be mirrored"
    assert {bool(s > 0) for s in skew[0::2]} == {True, False}
    shift = middle[1::2] - (1 - pictures[0, 0]).sum(dim=0) @ columns / (1 - pictures[0, 0]).sum()
    assert 2 < shift.abs().max() < 48 / 12 + 1
    again = moved(pictures[:32], 32)
    torch.testing.assert_close(again, drawn[32:], msg="a picture moves by its number, not its batch")


def test_pictures_that_stay_in_place_are_mirrored_and_nothing_else():
    pictures = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mirrorable = torch.arange(8) % 2 == 0
    drawn = Moved(mirrorable, torch.Generator().manual_seed(0), Motion.NONE)(pictures, 0)
    torch.testing.assert_close(drawn[0::2], pictures[0::2].flip(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn[1::2], pictures[1::2], atol=1e-5, rtol=0)


def test_nudged_pictures_are_shifted_by_a_whole_pixel_at_most_and_stay_sharp():
    pictures = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn = Moved(torch.zeros(64, dtype=torch.bool), torch.Generator().manual_seed(0), Motion.NUDGE)(
        pictures, 0
    )
    white = torch.nn.functional.pad(pictures, (1, 1, 1, 1), value=1.0)
    seen = set()
    for one, framed in zip(drawn, white, strict=True):
        places = [(y, x) for y in range(3) for x in range(3)]
        found = [
            p for p in places if torch.allclose(one, framed[:, p[0] : p[0] + 16, p[1] : p[1] + 16], atol=1e-4)
        ]
        assert len(found) == 1, "it is one shift of the picture, on white"
        seen.update(found)
    assert len(seen) == 9


def test_muon_moves_matrices_together_as_each_alone():
    generator = torch.Generator().manual_seed(3)
    shapes = [(24, 40), (16, 16), (24, 40), (40, 24)]
    starts, gradients = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    together = [torch.nn.Parameter(start.clone()) for start in starts]
    alone = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizers = [Muon(together, 0.01, weight_decay=0.05)]
    optimizers += [Muon([parameter], 0.01, weight_decay=0.05) for parameter in alone]
    for _ in range(3):
        for parameters in (together, alone):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs, start in zip(together, alone, starts, strict=True):
        assert not torch.equal(ours, start)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_plans_are_the_same_whoever_makes_them_and_need_no_network():
    records = [record(f"thing {number}") for number in range(20)]
    planner = Planner(records, load().text_encoder.words.tokenize, variants=3, seed=5)
    assert len(pickle.dumps(planner)) < 5e6, "a tokenizer and records, no weights"
    batches = [torch.randperm(20)[:4] for _ in range(5)]
    inline, made = (list(planner.plans(iter(batches), 7, workers)) for workers in (0, 1))
    assert len(inline) == len(made) == 5
    for ours, theirs, batch in zip(inline, made, batches, strict=True):
        assert torch.equal(ours.pictures, batch)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert any(not torch.equal(inline[0].ids, plan.ids) for plan in inline[1:])


def test_a_share_of_captions_is_plain():
    records = [record(f"thing {number}") for number in range(200)]
    tokenize = load().text_encoder.words.tokenize
    every = torch.arange(200)

    def texts(plain: float) -> list[tuple[int, ...]]:
        planner = Planner(records, tokenize, variants=1, seed=5, plain=plain)
        return [tuple(ids.tolist()) for ids in planner[3, every].ids]

    wanted = [
        tuple(ids.tolist()) for ids in Planner(records, tokenize, variants=1, seed=5).plan(every, None).ids
    ]
    cut = [len(texts(share)[0]) for share in (0.0, 1.0)]
    alike = [
        sum(text[:shorter] == plain[:shorter] for text, plain in zip(texts(share), wanted, strict=True)) / 200
        for share, shorter in zip((0.0, 1.0), (min(n, len(wanted[0])) for n in cut), strict=True)
    ]
    assert alike[0] < 0.5
    assert alike[1] == pytest.approx(0.9, abs=0.07), "but for the empty ones"


def test_a_run_is_done_by_its_steps_or_by_its_time(tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", step=30)
    assert checkpoint.done(argparse.Namespace(steps=100, time_limit=float("inf"))) == pytest.approx(0.3)
    checkpoint.seconds = 50.0
    assert checkpoint.done(argparse.Namespace(steps=100, time_limit=60.0)) == pytest.approx(50 / 60, abs=0.05)
    assert checkpoint.done(argparse.Namespace(steps=100, time_limit=40.0)) > 1


def test_a_store_hands_out_pictures_between_minus_one_and_one():
    levels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    store = PictureStore(levels, torch.device("cpu"))
    assert len(store) == 2
    picture = store.take(torch.tensor([1]))
    assert picture.shape == (1, 3, 4, 4)
    assert torch.equal(picture[0].permute(1, 2, 0), torch.from_numpy(levels[1]).float() / 127.5 - 1)
    assert torch.equal(store.take(slice(1, 2)), picture)
