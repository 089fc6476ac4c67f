"""Runs the official code and this engine on the same inputs; `test_official.py` starts it.

A process of its own, because the official builder patches torch for the whole process.
Usage: python compare_official.py JOB OUT, with STAR_REFERENCE naming an official checkout. JOB is a size of
official_pair.SIZES, `replay` or `statistics`; OUT is the JSON file to write what was measured to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from official_log import Log, Step, watching
from official_pair import CFG, SIZES, Pair, Size, build, stub_unused_packages
from official_statistics import (
    fill_p_value,
    fill_shares,
    official_sample,
    our_sample,
    scheduled_shares,
    token_p_value,
)

from star_core import causal_sampler, generate
from star_core.presets import SAMPLER_START, named_schedule
from star_core.sampling import Draw, ScaleNoise, keep_top_k, keep_top_p
from star_core.schedule import ScalePolicy, ScaleSchedule, ramp

Measured = dict[str, Any]


def furthest(ours: Tensor, official: Tensor) -> float:
    """Return the largest absolute difference."""
    assert ours.shape == official.shape, f"shapes {tuple(ours.shape)} and {tuple(official.shape)} differ"
    return float((ours.double() - official.double()).abs().max())


# One size: tokenizer, teacher forcing, greedy and smooth generation


def compare_tokenizer(pair: Pair, generator: torch.Generator) -> tuple[Measured, list[Tensor]]:
    """Encode, quantize and decode one random picture with both; return what differs, and its tokens."""
    side = pair.size.sides[-1] * 16
    coarse = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    grain = torch.randn(1, 3, side, side, generator=generator)
    picture = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    picture = (picture + 0.2 * grain).clamp(-1, 1)
    features = pair.vae.quant_conv(pair.vae.encoder(picture))
    tokens = pair.vae.quantize.f_to_idxBl_or_fhat(features, to_fhat="idx")
    f_hats = pair.vae.quantize.f_to_idxBl_or_fhat(features, to_fhat="fhat")
    quantized = pair.vqvae.quantizer.quantize(pair.vqvae.encode(picture), pair.size.maps)
    measured = {
        "encoder_features": furthest(pair.vqvae.encode(picture), features),
        "differing_tokens": int((torch.cat(quantized.tokens, 1) != torch.cat(tokens, 1)).sum()),
        "distinct_tokens": len(torch.cat(tokens, 1).unique()),
        "f_hat": max(furthest(a, b) for a, b in zip(quantized.f_hats, f_hats, strict=True)),
        "reconstruction": furthest(pair.vqvae.decode(f_hats[-1]), pair.vae.fhat_to_img(f_hats[-1])),
    }
    return measured, tokens


def compare_teacher(pair: Pair, tokens: list[Tensor]) -> Measured:
    """Run both transformers over all scales of given tokens at once."""
    inputs = pair.vae.quantize.idxBl_to_var_input(tokens)
    logits, features, _ = pair.var(inputs, **pair.official_text(rows=1))
    transformer, text = pair.networks.transformer, pair.conditional
    keys = transformer.text_keys(text.hidden, text.mask)
    our_inputs = pair.vqvae.quantizer.teacher_inputs(tokens, pair.size.maps)
    our_features = transformer(inputs, text.pooled, keys, pair.size.maps)
    return {
        "teacher_inputs": furthest(our_inputs, inputs),
        "teacher_features": furthest(our_features, features),
        "teacher_logits": furthest(transformer.logits(our_features), logits),
        "logits_deviation": float(logits.std()),
    }


def compare_greedy(pair: Pair) -> Measured:
    """Generate the likeliest picture with both, guided, without the causal sampler."""
    with watching(pair.var) as log:
        picture = pair.official_run(top_k=1)
    policies = tuple(ScalePolicy(top_k=1, guidance=t) for t in ramp(CFG, len(pair.size.sides)))
    steps = pair.our_run(ScaleSchedule(policies, CFG))
    differing = [int((s.tokens[0] != o).sum()) for s, o in zip(steps, log.tokens(), strict=True)]
    return {
        "greedy_differing_tokens": sum(differing),
        "greedy_distinct_tokens": len(torch.cat(log.tokens()).unique()),
        "greedy_smallest_margin": min(float(step.margin().min()) for step in log.plain),
        "greedy_picture": furthest(pair.vqvae.decode(steps[-1].f_hat) / 2 + 0.5, picture),
    }


def compare_smooth(pair: Pair) -> Measured:
    """Generate a soft picture with both from the same noise."""
    with watching(pair.var) as log:
        picture = pair.official_run(more_smooth=True)
    noise = iter(log.exponentials)
    drawn = ScaleNoise.gumbel
    ScaleNoise.gumbel = lambda self, *shape: -next(noise).log()
    try:
        policies = tuple(ScalePolicy(guidance=t, smooth=True) for t in ramp(CFG, len(pair.size.sides)))
        steps = pair.our_run(ScaleSchedule(policies, CFG))
    finally:
        ScaleNoise.gumbel = drawn
    ours = pair.vqvae.decode(steps[-1].f_hat) / 2 + 0.5
    return {
        "smooth_picture": furthest(ours, picture),
        "smooth_picture_mean": float((ours - picture).abs().mean()),
        "smooth_contrast": float(picture.std()),
    }


def compare_size(size: Size, seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    pair = build(size, seed)
    measured, tokens = compare_tokenizer(pair, generator)
    return measured | compare_teacher(pair, tokens) | compare_greedy(pair) | compare_smooth(pair)


# The causal sampler's loop, on the official loop's own random numbers


class Replay:
    """Makes our loop draw and order what the official loop did; notes how far its own numbers are."""

    def __init__(self, log: Log, top_k: int, top_p: float) -> None:
        self._queue: Iterator[Step] = iter(log.plain)
        self._scales = iter(zip(log.refined, log.fillings(), strict=True))
        self._order: Tensor | None = None
        self._filters = (top_k, top_p)
        self.logits = self.confidence = 0.0
        self.steps = self.differing_positions = 0

    def uniform(self, noise: ScaleNoise, *shape: int) -> Tensor:
        """Stand in for ScaleNoise.uniform: the recorded order after a draw, any number before one."""
        order, self._order = self._order, None
        return torch.zeros(1, *shape) if order is None else order.unsqueeze(0)

    def draw(self, logits: Tensor, uniform: Tensor, *, top_k: int, top_p: float, temperature: float) -> Draw:
        """Stand in for sampling.draw: the recorded tokens, and what we think of their logits."""
        step = next(self._queue)
        assert temperature == 1.0
        self.steps += 1
        self.logits = max(self.logits, furthest(logits[0], step.logits))
        # On the official logits: a last bit may move a token across the edge of top-p.
        kept = keep_top_p(keep_top_k(step.logits, top_k), top_p).softmax(dim=-1)
        confidence = kept.gather(-1, step.tokens.unsqueeze(-1)).squeeze(-1)
        self.confidence = max(self.confidence, furthest(confidence, step.confidence))
        self._order = step.order
        return Draw(step.tokens.unsqueeze(0), confidence.unsqueeze(0))

    def refine(self, refine: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """Stand in for generate.refine: the real one, compared after each step."""
        steps, filling = next(self._scales)
        self._queue = iter(steps)
        known = iter(filling.known)
        for ours in refine(*arguments):
            official = next(known)
            wrong = (ours.known[0] != official) | (official & (ours.tokens[0] != filling.tokens))
            self.differing_positions += int(wrong.sum())
            yield ours
        # The official loop goes on stepping over a map that is full already.
        self.differing_positions += sum(int((~rest).sum()) for rest in known)


@contextmanager
def replaced(replay: Replay) -> Iterator[None]:
    draw, refine, uniform = generate.draw, generate.refine, ScaleNoise.uniform
    generate.draw = causal_sampler.draw = replay.draw
    generate.refine = lambda *arguments: replay.refine(refine, *arguments)
    ScaleNoise.uniform = lambda noise, *shape: replay.uniform(noise, *shape)
    try:
        yield
    finally:
        generate.draw = causal_sampler.draw = draw
        generate.refine, ScaleNoise.uniform = refine, uniform


REPLAYED: Mapping[str, tuple[str, str]] = {"1024": ("demo-1024", "official"), "new": ("sampler", "masked")}
"""sample_version of the official loop -> our preset, and the strategy that it uses."""


def compare_replay(seed: int) -> Measured:
    """Follow the official loop draw by draw, in both of its sampler policies."""
    size = SIZES["14-scales"]
    pair = build(size, seed)
    measured: Measured = {}
    for version, (preset, strategy) in REPLAYED.items():
        schedule = named_schedule(preset, size.maps)
        assert schedule.strategy == strategy
        with watching(pair.var) as log:
            picture = pair.official_run(
                seed,
                top_k=min(schedule.scales[0].top_k, size.codebook),
                top_p=0.8,
                w_mask=True,
                sample_version=version,
            )
        replay = Replay(log, 0, 0.8)
        with replaced(replay):
            steps = pair.our_run(schedule)
        measured[version] = {
            "steps": replay.steps,
            "logits": replay.logits,
            "confidence": replay.confidence,
            "differing_positions": replay.differing_positions,
            "picture": furthest(pair.vqvae.decode(steps[-1].f_hat) / 2 + 0.5, picture),
        }
    return measured


# The causal sampler's loop, as a distribution


def compare_statistics(seed: int, pictures: int = 208) -> Measured:
    """Draw pictures with the official loop and with two of our strategies, and test each against it."""
    size = SIZES["statistics"]
    pair = build(size, seed)
    pair.vae.fhat_to_img = lambda f_hat: f_hat  # no picture is looked at here
    schedule = named_schedule("demo-1024", size.maps)
    seeds = range(pictures)
    start = time.process_time()
    official = official_sample(pair, seeds, top_k=size.codebook, top_p=0.8)
    measured: Measured = {
        "pictures": pictures,
        "official_seconds": time.process_time() - start,
        "official_fill": fill_shares(official, size.sides),
        "scheduled_fill": scheduled_shares(size.sides),
    }
    plain = sum(side * side for side in size.sides[:SAMPLER_START])
    for strategy in ("official", "confidence"):
        ours = our_sample(pair, schedule, seeds, strategy)
        measured[strategy] = {
            "plain_tokens": token_p_value(official, ours, slice(plain), size.codebook, seed),
            "refined_tokens": token_p_value(official, ours, slice(plain, None), size.codebook, seed),
            "fill": fill_p_value(official, ours, seed),
            "mean_fill": fill_shares(ours, size.sides),
        }
    return measured


def main() -> None:
    job, out = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, os.environ["STAR_REFERENCE"])
    stub_unused_packages()
    jobs: dict[str, Callable[[], Measured]] = {
        name: partial(compare_size, size, seed) for seed, (name, size) in enumerate(SIZES.items(), start=1)
    }
    jobs |= {"replay": partial(compare_replay, seed=5), "statistics": partial(compare_statistics, seed=7)}
    with torch.no_grad():
        measured = {name: jobs[name]() for name in job.split(",")}
    out.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
