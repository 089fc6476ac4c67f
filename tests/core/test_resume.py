"""Resuming: how many scales of an earlier run a request repeats; the rest is drawn as in a whole run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from star_core.request import KeptTokens, PromptSpan
from star_core.resume import shared_scales
from star_core.sampling import PictureSeed

SCALES = 4


def with_policy(request, scale, **fields):
    scales = list(request.schedule.scales)
    scales[scale] = dataclasses.replace(scales[scale], **fields)
    return dataclasses.replace(request, schedule=dataclasses.replace(request.schedule, scales=tuple(scales)))


def test_equal_requests_share_every_scale(ask, schedule):
    assert shared_scales(ask([1, 2], schedule), ask([1, 2], schedule)) == SCALES


@pytest.mark.parametrize("scale", range(SCALES))
def test_a_changed_policy_is_felt_from_its_scale_on(ask, make_schedule, scale):
    before = ask([1], make_schedule("plain"))
    assert shared_scales(before, with_policy(before, scale, top_k=3)) == scale


def test_what_decides_every_scale_shares_nothing(ask, make_schedule):
    before = ask([1], make_schedule("plain"))
    assert shared_scales(before, ask([2], make_schedule("plain"))) == 0
    assert shared_scales(before, ask([1], make_schedule("plain"), seeds=[PictureSeed(6)])) == 0
    assert shared_scales(before, ask([1, 1], make_schedule("plain"))) == 0
    assert shared_scales(before, ask([1], make_schedule("plain", guidance=0.0))) == 0


def test_a_prompt_is_felt_from_its_span_on(ask, make_schedule, texts):
    before = ask([1], make_schedule("plain"))
    later = PromptSpan(texts(2), texts(99), 2)
    switched = dataclasses.replace(before, prompts=(*before.prompts, later))
    assert shared_scales(before, switched) == 2
    other = dataclasses.replace(before, prompts=(*before.prompts, dataclasses.replace(later, start=3)))
    assert shared_scales(switched, other) == 2


def test_the_sampler_s_guidance_and_strategy_are_felt_where_it_refines(ask, make_schedule):
    before = ask([1], make_schedule("official"))
    for change in ({"sampler_guidance": 1.0}, {"strategy": "masked"}):
        after = dataclasses.replace(before, schedule=dataclasses.replace(before.schedule, **change))
        assert shared_scales(before, after) == 2
    plain = ask([1], make_schedule("plain"))
    after = dataclasses.replace(plain, schedule=dataclasses.replace(plain.schedule, strategy="masked"))
    assert shared_scales(plain, after) == SCALES


def test_kept_and_given_tokens_are_felt_where_they_differ(ask, make_schedule, tokens, paired):
    request = ask([1], make_schedule("plain"))
    kept = KeptTokens(tokens(paired.maps, 1, 3), tuple(t < 20 for t in tokens(paired.maps, 1, 4)))
    held = dataclasses.replace(request, kept=kept)
    assert shared_scales(request, held) == 0
    masks = [mask.clone() for mask in kept.masks]
    masks[2] = ~masks[2]
    assert shared_scales(held, dataclasses.replace(request, kept=KeptTokens(kept.tokens, tuple(masks)))) == 2
    beneath = [t + (~m).long() for t, m in zip(kept.tokens, kept.masks, strict=True)]
    assert shared_scales(held, dataclasses.replace(held, kept=KeptTokens(tuple(beneath), kept.masks))) == SCALES
    steps = paired.run(request)
    given = dataclasses.replace(request, prefix=tuple(steps[:2]))
    assert shared_scales(given, given) == SCALES
    assert shared_scales(given, dataclasses.replace(request, prefix=tuple(steps[:1]))) == 1


@pytest.mark.parametrize("scale", range(1, SCALES))
def test_a_resumed_run_draws_what_a_whole_one_does(model, ask, schedule, scale):
    before = ask([1, 2], schedule)
    after = with_policy(before, scale, top_k=3, temperature=1.5)
    shared = shared_scales(before, after)
    assert shared == scale
    resumed = model.run(dataclasses.replace(after, prefix=tuple(model.run(before)[:shared])))
    whole = model.run(after)
    assert [step.given for step in resumed] == [i < shared for i in range(SCALES)]
    for one, other in zip(resumed, whole, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.f_hat, other.f_hat)
