"""Fast modes: off is the exact picture, and each does what it says and nothing to its neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import star_core.generate as generate_module
from star_core.config import TokenMap
from star_core.generate import generate
from star_core.pruning import restore, run_count, take, worth_running
from star_core.request import KeptTokens, Options, ScaleStep
from star_core.resume import shared_scales
from star_core.rope import axial_rope, rotate
from star_core.sampling import PictureSeed
from star_core.schedule import ScaleSchedule
from star_core.star import load

SCALES = 4


def with_fields(schedule: ScaleSchedule, first: int, **fields: object) -> ScaleSchedule:
    """Return the schedule with fields changed from a scale on."""
    scales = tuple(
        dataclasses.replace(policy, **fields) if scale >= first else policy
        for scale, policy in enumerate(schedule.scales)
    )
    return dataclasses.replace(schedule, scales=scales)


def tokens_of(steps: list[ScaleStep], row: int = 0) -> list[Tensor]:
    return [step.tokens[row] for step in steps]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture
def passes(model: object, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that fills with rows and tokens of every pass through the transformer."""
    seen: list[tuple[int, int]] = []
    features = model.transformer.features

    def recorded(x: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(tuple(x.shape[:2]))
        return features(x, *args, **options)

    monkeypatch.setattr(model.transformer, "features", recorded)
    return seen


# Guidance off from a scale on.


def test_unguided_scales_draw_what_no_guidance_draws_and_the_others_do_not_change(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    full = model.run(ask([1, 2], schedule))
    fast = model.run(ask([1, 2], with_fields(schedule, 2, unguided=True)))
    by_zero = with_fields(schedule, 2, guidance=0.0)
    if schedule.refines:
        by_zero = dataclasses.replace(by_zero, sampler_guidance=0.0)
    zero = model.run(ask([1, 2], by_zero))
    for row in range(2):
        assert equal(tokens_of(fast[:2], row), tokens_of(full[:2], row))
        assert equal(tokens_of(fast, row), tokens_of(zero, row))
        assert not equal(tokens_of(fast[2:], row), tokens_of(full[2:], row))


def test_no_unconditional_row_is_computed_after_the_last_guided_scale(
    model: object, ask: Callable, schedule: ScaleSchedule, passes: list
):
    model.run(ask([1, 2], with_fields(schedule, 2, unguided=True)))
    assert [rows for rows, _ in passes] == [4, 4, 2, 2]
    passes.clear()
    # One more guided scale at the end needs its twins' keys of every scale before.
    last = dataclasses.replace(with_fields(schedule, 1, unguided=True).scales[3], unguided=False)
    fast = with_fields(schedule, 1, unguided=True)
    model.run(ask([1, 2], dataclasses.replace(fast, scales=(*fast.scales[:3], last))))
    assert [rows for rows, _ in passes] == [4, 4, 4, 4]


def test_the_sampler_is_unguided_too(model: object, ask: Callable, make_schedule: Callable):
    schedule = with_fields(make_schedule("masked", guidance=0.0), 2, unguided=True)
    strong = dataclasses.replace(schedule, sampler_guidance=50.0)
    none = dataclasses.replace(schedule, sampler_guidance=0.0)
    assert not strong.guided
    assert equal(tokens_of(model.run(ask([1], strong))), tokens_of(model.run(ask([1], none))))


def test_a_resumed_unguided_picture_is_the_whole_run(model: object, ask: Callable, schedule: ScaleSchedule):
    fast = with_fields(schedule, 2, unguided=True)
    full = model.run(ask([1, 2], fast))
    for start in (1, 2, 3):
        resumed = model.run(ask([1, 2], fast, prefix=tuple(full[:start])))
        assert all(equal(tokens_of(resumed, row), tokens_of(full, row)) for row in range(2))


def test_scales_before_the_unguided_ones_are_shared_with_the_exact_run(ask: Callable, make_schedule: Callable):
    exact = ask([1], make_schedule("plain"))
    fast = ask([1], with_fields(exact.schedule, 2, unguided=True))
    assert shared_scales(exact, fast) == 2


# Token pruning.


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_pruned_scale_runs_its_share_of_tokens(
    model: object, ask: Callable, schedule: ScaleSchedule, passes: list, share: float
):
    full = model.run(ask([1, 2], schedule))
    wide = [tokens for _, tokens in passes]
    passes.clear()
    fast = model.run(ask([1, 2], with_fields(schedule, 2, prune=share)))
    narrow = [tokens for _, tokens in passes]
    assert narrow[:2] == wide[:2]
    assert narrow[2:] == [run_count(n, share) for n in wide[2:]]
    assert all(few < all_ for few, all_ in zip(narrow[2:], wide[2:], strict=True))
    assert equal(tokens_of(fast[:2]), tokens_of(full[:2]))
    assert not equal(tokens_of(fast[2:]), tokens_of(full[2:]))


def test_a_pruned_picture_does_not_depend_on_its_neighbours(
    model: object, ask: Callable, schedule: ScaleSchedule
):
    fast = with_fields(with_fields(schedule, 2, prune=0.4), 3, unguided=True, prune=0.6)
    batch = model.run(ask([1, 2, 3], fast, seeds=[PictureSeed(s) for s in (5, 6, 7)]))
    alone = model.run(ask([2], fast, seeds=[PictureSeed(6)]))
    assert equal(tokens_of(batch, 1), tokens_of(alone))


def test_resuming_a_pruned_picture_equals_the_whole_run(model: object, ask: Callable, schedule: ScaleSchedule):
    fast = with_fields(schedule, 2, prune=0.5)
    full = model.run(ask([1, 2], fast))
    for start in (1, 2, 3):
        resumed = model.run(ask([1, 2], fast, prefix=tuple(full[:start])))
        assert all(equal(tokens_of(resumed, row), tokens_of(full, row)) for row in range(2))


def test_a_pruned_scale_is_restored_from_the_scale_before(
    model: object, ask: Callable, make_schedule: Callable, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[TokenMap, TokenMap]] = []

    def recorded(run: Tensor, positions: Tensor, earlier: Tensor, earlier_map: TokenMap, token_map: TokenMap):
        assert earlier.shape[:2] == (run.shape[0], earlier_map[0] * earlier_map[1])
        seen.append((earlier_map, token_map))
        return restore(run, positions, earlier, earlier_map, token_map)

    monkeypatch.setattr(generate_module, "restore", recorded)
    schedule = with_fields(with_fields(make_schedule("plain"), 2, prune=0.4), 3, unguided=True)
    model.run(ask([1, 2], schedule))
    assert seen == [(model.maps[1], model.maps[2]), (model.maps[2], model.maps[3])]


def test_kept_tokens_are_pruned_first(
    model: object, ask: Callable, tokens: Callable, make_schedule: Callable, monkeypatch: pytest.MonkeyPatch
):
    taken: list[Tensor] = []
    original = generate_module.worth_running

    def recorded(*arguments: object) -> Tensor:
        taken.append(original(*arguments))
        return taken[-1]

    monkeypatch.setattr(generate_module, "worth_running", recorded)
    # A quarter of every map is to be drawn, half of it may be run: all that is drawn is run.
    masks = tuple(torch.arange(h * w).expand(2, -1) >= (h * w + 3) // 4 for h, w in model.maps)
    kept = KeptTokens(tokens(model.maps, 2, 3), masks)
    model.run(ask([1, 2], with_fields(make_schedule("plain"), 2, prune=0.5), kept=kept))
    for positions, mask in zip(taken, masks[2:], strict=True):
        for row in range(4):
            free = set((~mask[row % 2]).nonzero().flatten().tolist())
            assert free <= set(positions[row].tolist())


def test_a_stretched_schedule_shares_its_scales_with_itself():
    star = load()
    text = "maps 1 2 3; top_k 5; guidance 1; unguided no no yes; stretch yes"
    request = star.request(["a cat"], options=Options(schedule=text))
    assert request.schedule.guided_scales == 7
    assert shared_scales(request, request) == 10


def test_pruning_next_to_nothing_is_nearly_the_whole_look(
    model: object, ask: Callable, make_schedule: Callable
):
    # One token of 24 is restored: the others' features change only through the missing keys.
    schedule = make_schedule("plain", guidance=0.0)
    full = model.run(ask([1], schedule))
    fast = model.run(ask([1], with_fields(schedule, 3, prune=0.05)))
    same = (full[3].tokens == fast[3].tokens).float().mean()
    assert same > 0.6


def test_what_lies_far_from_the_mean_is_run_in_its_own_order():
    x = torch.zeros(2, 6, 4)
    x[0, 4], x[0, 1] = 5.0, -3.0
    x[1, 0], x[1, 5] = -1.0, 2.0
    assert worth_running(x, 0.67).tolist() == [[1, 4], [0, 5]]
    assert run_count(6, 0.95) == 1
    assert run_count(1, 0.9) == 1
    assert run_count(100, 0.4) == 60


def test_restored_features_are_the_run_ones_and_the_enlarged_earlier_ones():
    earlier = torch.arange(4.0).view(1, 4, 1)
    positions = torch.tensor([[0, 15]])
    features = restore(torch.tensor([[[10.0], [20.0]]]), positions, earlier, (2, 2), (4, 4))
    assert features[0, [0, 15], 0].tolist() == [10, 20]
    grid = features[0, :, 0].view(4, 4)
    assert grid[0, 3] == 1
    assert grid[3, 0] == 2
    assert 0 < grid[1, 1] < 3
    torch.testing.assert_close(take(features, positions).flatten(), torch.tensor([10.0, 20.0]))


def test_rows_of_a_batch_may_turn_by_angles_of_their_own():
    rotation = axial_rope((3, 4), 16, 10_000.0, 64.0)
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 2, 3, 7, 11], [1, 4, 5, 6, 10]])
    together = rotate(x, rotation.select(positions))
    for row in range(2):
        alone = rotate(x[row : row + 1], rotation.select(positions[row]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=0, rtol=0)


# The words for them.


def test_off_leaves_no_trace_in_a_schedules_text(make_schedule: Callable):
    exact = make_schedule("plain")
    assert "unguided" not in exact.to_text()
    assert "prune" not in exact.to_text()
    fast = with_fields(exact, 2, unguided=True, prune=0.5).to_text()
    assert "\nunguided no*2 yes*2\nprune 0*2 0.5*2\n" in fast


def test_the_first_scale_cannot_be_pruned(make_schedule: Callable):
    with pytest.raises(
        ValueError, match=r"prune is 0\.5 at scale 1.*begin with 0, as in `prune 0\*4 0\.4 0\.5`"
    ):
        with_fields(make_schedule("plain"), 0, prune=0.5)


# No value is read back from the device within a scale.


@pytest.mark.parametrize(
    ("kind", "cross_attention"),
    [("plain", "paired"), ("smooth", "independent"), ("confidence", "paired"), ("masked", "independent")],
)
def test_the_loop_never_asks_the_device_for_a_value_nor_for_what_few_devices_have(
    tiny: Callable,
    ask: Callable,
    make_schedule: Callable,
    poor_device: Callable,
    kind: str,
    cross_attention: str,
):
    # On the meta device there are no values: whoever asked for one would raise. The official strategy does, to
    # see whether it may end early. Whether sending noise to a GPU is waited for, no CPU can show.
    meta = torch.device("meta")
    model = tiny(cross_attention)
    schedule = with_fields(make_schedule(kind), 2, prune=0.3)
    schedule = with_fields(schedule, 3, unguided=True)
    nowhere = (part.to(meta) for part in (model.transformer, model.sampler, model.quantizer))
    with poor_device():
        steps = list(generate(*nowhere, ask([1, 2], schedule), meta))
    assert [tuple(step.tokens.shape) for step in steps] == [(2, h * w) for h, w in model.maps]
    assert steps[-1].f_hat.is_meta


def test_asking_a_device_without_values_is_noticed():
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool(torch.zeros(1, device="meta").any())
