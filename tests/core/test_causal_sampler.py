"""The causal sampler: its head, how many tokens a step fixes, and how a map fills."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from star_core.causal_sampler import (
    CausalSampler,
    PartialMap,
    Refinement,
    refine,
    sampler_logits,
    unmask_counts,
)
from star_core.rope import Rotation
from star_core.sampling import PictureSeed, ScaleNoise, guide
from star_core.schedule import ScalePolicy

CPU = torch.device("cpu")
STRATEGIES = ("official", "confidence", "masked")
POLICY = ScalePolicy(top_k=9, top_p=0.9, steps=6, transformer_steps=3, random_steps=2)
N, V = 20, 16


@given(st.integers(1, 40), st.integers(1, 400))
def test_steps_fix_every_token_once_and_at_least_one_each(steps: int, tokens: int):
    counts = unmask_counts(steps, tokens)
    assert len(counts) == min(steps, tokens)
    assert sum(counts) == tokens
    assert min(counts) >= 1


def test_one_step_fixes_everything_and_no_token_needs_no_step():
    assert unmask_counts(1, 30) == [30]
    assert unmask_counts(5, 0) == []


@pytest.mark.parametrize(("steps", "side"), [(8, 16), (8, 21), (15, 64), (8, 8)])
def test_counts_follow_the_released_arccos_schedule(steps: int, side: int):
    shares = torch.arccos(torch.linspace(1, 0, steps)) / (torch.pi / 2)
    expected = (shares / shares.sum() * side**2).round().clamp_min(1).int().tolist()
    expected[-1] += side**2 - sum(expected)
    assert unmask_counts(steps, side**2) == expected
    assert expected == sorted(expected)


def test_the_first_five_of_eight_steps_fix_44_percent():
    counts = unmask_counts(8, 27 * 27)
    assert sum(counts[:5]) / sum(counts) == pytest.approx(0.44, abs=0.01)


def some_logits(seed: int, rows: int = 2) -> Tensor:
    return 3 * torch.randn(rows, N, V, generator=torch.Generator().manual_seed(seed))


def work(
    strategy: str,
    *,
    policy: ScalePolicy = POLICY,
    transformer_logits: Tensor | None = None,
    logits: Callable[[Tensor, Tensor], Tensor] | None = None,
    seeds: tuple[PictureSeed, ...] = (PictureSeed(3, 0), PictureSeed(3, 1)),
) -> Refinement:
    rows = len(seeds)
    return Refinement(
        transformer_logits=some_logits(1, rows) if transformer_logits is None else transformer_logits,
        # Known tokens move the other logits, as the head's do.
        logits=logits or (lambda tokens, known: some_logits(2, rows) + _echo(tokens, known)),
        policy=policy,
        strategy=strategy,
        noise=ScaleNoise(seeds, 4, CPU),
    )


def _echo(tokens: Tensor, known: Tensor) -> Tensor:
    sums = (torch.where(known, tokens, 0) * torch.arange(1, N + 1)).sum(dim=1) % V
    return torch.nn.functional.one_hot(sums, V).unsqueeze(1) * 2.0


def nothing(rows: int = 2) -> PartialMap:
    return PartialMap(torch.zeros(rows, N, dtype=torch.long), torch.zeros(rows, N, dtype=torch.bool))


def partly(seed: int = 0) -> PartialMap:
    """Return a start with 13 known tokens in row 0 and none in row 1."""
    tokens = torch.randint(V, (2, N), generator=torch.Generator().manual_seed(seed))
    known = torch.stack([torch.arange(N) < 13, torch.zeros(N, dtype=torch.bool)])
    return PartialMap(tokens, known)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("start", [nothing(), partly()], ids=["empty", "partly known"])
def test_fixed_tokens_stay_fixed_and_the_map_ends_full(strategy: str, start: PartialMap):
    before = start
    for after in refine(work(strategy), start):
        assert after.known[before.known].all()
        assert torch.equal(after.tokens[before.known], before.tokens[before.known])
        assert (after.known.sum(dim=1) > before.known.sum(dim=1))[~before.known.all(dim=1)].all()
        before = after
    assert before.known.all()
    assert torch.equal(before.tokens[start.known], start.tokens[start.known])
    assert ((before.tokens >= 0) & (before.tokens < V)).all()


@pytest.mark.parametrize("strategy", ["confidence", "masked"])
def test_a_plain_step_fixes_its_count_of_each_row(strategy: str):
    fills = [after.known.sum(dim=1).tolist() for after in refine(work(strategy), partly())]
    first, second = unmask_counts(6, N - 13), unmask_counts(6, N)
    assert [row for row, _ in fills] == [13 + sum(first[: i + 1]) for i in range(6)]
    assert [row for _, row in fills] == [sum(second[: i + 1]) for i in range(6)]


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_official_fills_at_least_as_fast_as_plain(seed: int, steps: int, by_transformer: int, by_chance: int):
    policy = ScalePolicy(
        top_k=9, top_p=0.9, steps=steps, transformer_steps=by_transformer, random_steps=by_chance
    )
    seeds = (PictureSeed(seed), PictureSeed(seed, 1))
    official, plain = (
        [after.known.sum(dim=1) for after in refine(work(s, policy=policy, seeds=seeds), nothing())]
        for s in ("official", "confidence")
    )
    assert len(official) <= len(plain)
    for ours, theirs in zip(official, plain, strict=False):
        assert (ours >= theirs).all()
    assert (official[-1] == N).all()
    counts = unmask_counts(steps, N)
    most = [sum(counts[: i + 1]) + sum(counts[: min(i + 1, by_transformer)]) for i in range(len(official))]
    assert all((ours <= limit).all() for ours, limit in zip(official, most, strict=True))


def test_official_really_fills_faster_while_the_transformer_draws():
    official = [after.known.sum().item() for after in refine(work("official"), nothing())]
    plain = [after.known.sum().item() for after in refine(work("confidence"), nothing())]
    assert official[1] > plain[1]


def test_masked_never_uses_the_transformers_logits():
    poison = torch.full((2, N, V), torch.nan)
    clean = list(refine(work("masked"), nothing()))
    poisoned = list(refine(work("masked", transformer_logits=poison), nothing()))
    assert torch.equal(clean[-1].tokens, poisoned[-1].tokens)


@pytest.mark.parametrize("strategy", ["official", "confidence"])
def test_the_first_steps_draw_from_the_transformer_and_the_others_from_the_sampler(strategy: str):
    asked = []

    def logits(tokens: Tensor, known: Tensor) -> Tensor:
        asked.append(known.clone())
        return some_logits(2)

    fillings = list(refine(work(strategy, logits=logits), nothing()))
    assert len(asked) == len(fillings) - 3
    assert torch.equal(asked[0], fillings[2].known)
    only_transformer = dataclasses.replace(POLICY, transformer_steps=6)
    asked.clear()
    list(refine(work(strategy, policy=only_transformer, logits=logits), nothing()))
    assert not asked


def test_the_sampler_is_asked_with_what_is_known_so_far():
    seen = []

    def logits(tokens: Tensor, known: Tensor) -> Tensor:
        seen.append(PartialMap(tokens.clone(), known.clone()))
        return some_logits(2)

    start = partly()
    fillings = [start, *refine(work("masked", logits=logits), start)]
    for asked, filling in zip(seen, fillings, strict=False):
        assert torch.equal(asked.known, filling.known)
        assert torch.equal(asked.tokens[asked.known], filling.tokens[filling.known])


def test_by_confidence_the_surest_tokens_come_first():
    sure = torch.zeros(1, N, V)
    sure[0, :, 5] = torch.arange(N).float()
    policy = ScalePolicy(top_k=2, steps=4)
    result = list(
        refine(
            work("masked", policy=policy, logits=lambda tokens, known: sure, seeds=(PictureSeed(0),)),
            nothing(1),
        )
    )
    # The later the position, the surer the token 5; all others tie, so that top-k leaves them in.
    count = unmask_counts(4, N)[0] + unmask_counts(4, N)[1]
    assert result[1].known[0].nonzero().flatten().tolist() == list(range(N - count, N))


def test_the_first_steps_fix_in_an_order_of_chance():
    policy = ScalePolicy(top_k=1, steps=4, random_steps=4)
    sure = torch.zeros(1, N, V)
    sure[0, :, 5] = torch.arange(N).float()
    orders = set()
    for index in range(12):
        first = next(
            refine(
                work("masked", policy=policy, logits=lambda *_: sure, seeds=(PictureSeed(0, index),)),
                nothing(1),
            )
        )
        orders.add(tuple(first.known[0].nonzero().flatten().tolist()))
    assert len(orders) > 6


def test_official_counts_known_positions_among_the_most_confident():
    # The known half is the surest by far, so the first of both fixes finds nothing new to fix.
    sure = torch.zeros(1, N, V)
    sure[0, :10, 5] = 20.0
    start = PartialMap(torch.zeros(1, N, dtype=torch.long), (torch.arange(N) < 10).unsqueeze(0))
    policy = ScalePolicy(steps=3, transformer_steps=3, random_steps=3)
    first = next(
        refine(work("official", policy=policy, transformer_logits=sure, seeds=(PictureSeed(0),)), start)
    )
    assert first.known.sum().item() == 10 + unmask_counts(3, 10)[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_fill_apart_even_when_one_knows_more(strategy: str):
    *_, together = refine(work(strategy), partly())
    for row in range(2):
        start = partly()
        alone_start = PartialMap(start.tokens[row : row + 1], start.known[row : row + 1])
        alone_work = work(
            strategy,
            transformer_logits=some_logits(1)[row : row + 1],
            logits=lambda tokens, known, row=row: some_logits(2)[row : row + 1] + _echo(tokens, known),
            seeds=(PictureSeed(3, row),),
        )
        *_, alone = refine(alone_work, alone_start)
        assert torch.equal(alone.tokens[0], together.tokens[row])


def test_more_steps_than_free_tokens_fix_one_at_a_time():
    policy = dataclasses.replace(POLICY, steps=30)
    fills = [after.known.sum(dim=1).tolist() for after in refine(work("masked", policy=policy), nothing())]
    assert fills == [[i + 1, i + 1] for i in range(N)]


def test_nothing_is_drawn_where_everything_is_known():
    full = PartialMap(torch.zeros(2, N, dtype=torch.long), torch.ones(2, N, dtype=torch.bool))
    assert list(refine(work("official"), full)) == []


def test_a_start_is_not_edited_in_place():
    start = partly()
    tokens, known = start.tokens.clone(), start.known.clone()
    list(refine(work("official"), start))
    assert torch.equal(start.tokens, tokens)
    assert torch.equal(start.known, known)


# The head.

MAP = (3, 4)


def head_inputs(model: object, rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Rotation]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(rows, 12, 8, generator=generator)
    codes[:, ::2] = 0
    features = torch.randn(rows, 12, 64, generator=generator)
    pooled = torch.randn(rows, 16, generator=generator)
    rotation = model.transformer.rotations(((1, 1), MAP))
    return codes, features, pooled, rotation


def test_the_head_gives_float32_logits_for_every_position_but_the_first(paired: object):
    logits = paired.sampler(*head_inputs(paired)[:3], 2, head_inputs(paired)[3])
    assert logits.shape == (2, 12, 64)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("changed", ["codes", "features", "pooled"])
def test_everything_the_head_is_given_moves_all_positions_of_its_row_alone(paired: object, changed: str):
    codes, features, pooled, rotation = head_inputs(paired)
    before = paired.sampler(codes, features, pooled, 2, rotation)
    given = {"codes": codes.clone(), "features": features.clone(), "pooled": pooled.clone()}
    given[changed][1] += torch.tensor(1.0)
    after = paired.sampler(given["codes"], given["features"], given["pooled"], 2, rotation)
    assert torch.equal(before[0], after[0])
    assert ((before[1] - after[1]).abs().amax(dim=-1) > 1e-5).all()


def test_one_known_token_is_seen_from_everywhere(paired: object):
    codes, features, pooled, rotation = head_inputs(paired)
    before = paired.sampler(codes, features, pooled, 2, rotation)
    codes = codes.clone()
    codes[:, 11] += 1
    after = paired.sampler(codes, features, pooled, 2, rotation)
    assert ((before - after).abs().amax(dim=-1) > 1e-6).all()


def test_the_head_knows_which_scale_it_refines(paired: object):
    codes, features, pooled, rotation = head_inputs(paired)
    second = paired.sampler(codes, features, pooled, 2, rotation)
    third = paired.sampler(codes, features, pooled, 3, rotation)
    assert (second - third).abs().max() > 1e-2


def test_rows_of_the_head_never_touch_each_other(paired: object):
    codes, features, pooled, rotation = head_inputs(paired, 3)
    together = paired.sampler(codes, features, pooled, 2, rotation)
    for row in range(3):
        one = slice(row, row + 1)
        alone = paired.sampler(codes[one], features[one], pooled[one], 2, rotation)
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)


def test_the_samplers_guidance_is_constant_and_twins_share_the_known_tokens(paired: object):
    codes, features, pooled, rotation = head_inputs(paired, 4)
    codes = codes[:2]
    logits = paired.sampler(codes.repeat(2, 1, 1), features, pooled, 3, rotation)
    guided = sampler_logits(paired.sampler, codes, features, pooled, 3, rotation, 2.5)
    torch.testing.assert_close(guided, guide(logits[:2], logits[2:], 2.5))
    single = sampler_logits(paired.sampler, codes, features[:2], pooled[:2], 3, rotation, 2.5)
    torch.testing.assert_close(single, logits[:2], atol=1e-5, rtol=1e-5)


def test_the_head_runs_in_bfloat16(paired: object):
    codes, features, pooled, rotation = head_inputs(paired)
    exact = paired.sampler(codes, features, pooled, 2, rotation)
    coarse: CausalSampler = copy.deepcopy(paired.sampler).bfloat16()
    logits = coarse(codes, features.bfloat16(), pooled, 2, rotation)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_fresh_weights_depend_on_the_generator_alone(paired: object):
    one, two = CausalSampler(paired.config.transformer), CausalSampler(paired.config.transformer)
    one.initialise(torch.Generator().manual_seed(0))
    two.initialise(torch.Generator().manual_seed(0))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
        assert torch.isfinite(value).all()


def test_a_sampler_can_begin_as_the_transformer_and_see_what_is_known(paired: object):
    codes, features, pooled, rotation = head_inputs(paired)
    codes, features = 3 * codes, 12 * features
    sampler = CausalSampler(paired.config.transformer)
    sampler.initialise(torch.Generator().manual_seed(0))
    sampler.begin_as(paired.transformer, 12.0, 3.0)
    wanted = paired.transformer.logits(features)
    unknown = (codes == 0).all(dim=-1)
    logits = sampler(codes, features, pooled, 2, rotation)
    torch.testing.assert_close(logits[unknown], wanted[unknown], atol=1e-4, rtol=1e-4)
    empty = sampler(torch.zeros_like(codes), features, pooled, 2, rotation)
    torch.testing.assert_close(empty, wanted, atol=1e-4, rtol=1e-4)
    for name in ("qkv.weight", "q_bias", "v_bias", "log_scale"):
        copied = paired.transformer.blocks[-1].attn.get_parameter(name)
        assert torch.equal(sampler.blocks[-1].attn.get_parameter(name), copied)
    # Known codes weigh about as much as features do where they stand.
    seen: list[Tensor] = []
    sampler.fuse.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 1:]))
    sampler(torch.zeros_like(codes), features, pooled, 2, rotation)
    sampler(codes, torch.zeros_like(features), pooled, 2, rotation)
    by_features, by_codes = seen[0].std(), seen[1][~unknown].std()
    assert 0.5 < by_codes / by_features < 2
    # One step down the gradient at unknown places, and what is known elsewhere counts.
    loss = torch.nn.functional.cross_entropy(logits[unknown], torch.zeros(int(unknown.sum()), dtype=torch.long))
    loss.backward()
    for name in ("blocks.0.attn.proj.weight", "blocks.0.ffn.contract.weight", "head.weight"):
        parameter = sampler.get_parameter(name)
        assert parameter.grad.abs().max() > 0, f"{name} cannot learn"
        parameter.data.sub_(0.1 * parameter.grad)
    apart = sampler(codes, features, pooled, 2, rotation) - sampler(0 * codes, features, pooled, 2, rotation)
    assert apart[unknown].abs().max() > 1e-3


@pytest.mark.parametrize("depth", [1, 5])
def test_a_sampler_of_any_depth_can_begin_as_the_transformer(depth: int, paired: object):
    codes, features, pooled, rotation = head_inputs(paired)
    sampler = CausalSampler(dataclasses.replace(paired.config.transformer, sampler_depth=depth))
    sampler.initialise(torch.Generator().manual_seed(0))
    sampler.begin_as(paired.transformer, 1.0, 1.0)
    wanted = paired.transformer.logits(features)
    unknown = (codes == 0).all(dim=-1)
    found = sampler(codes, features, pooled, 1, rotation)
    torch.testing.assert_close(found[unknown], wanted[unknown], atol=1e-4, rtol=1e-4)
