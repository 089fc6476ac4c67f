"""What every fast mode gains, on random weights of a released shape, and costs, on the shipped model.

    python benchmarks/fast_modes.py [--size d16-256] [--dtype bfloat16] [--seconds 60]

Gain: seconds per picture against the exact mode, in turn on one machine. Cost, at equal seeds in float32: the
largest and the mean difference of a scale's guided logits after the exact mode's scales before it, in standard
deviations of those logits; the share of equal tokens when both run freely; PSNR of the pictures. KID and
R-precision of a mode come from `python -m star_core evaluate --schedules ... --int8`. Prints the gain as one
JSON line after every turn, and ends in one with the cost too. --seconds ends the gain between two pictures.

FP8 is timed only on GPUs with FP8 products. Its cost is measured everywhere; without the products the weights
are made whole, so that it is then the cost of rounded weights alone, not of rounded activations too.

A mode's first picture is not timed. With CUDA graphs every mode keeps its own, recorded then; on a GPU too
small for that they are recorded again before every timed picture.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from workbench import (
    GIB,
    PROMPT,
    SIZES,
    build_networks,
    build_star,
    config_of,
    machine,
    middle,
    report,
    settle,
    table,
)

import star_core.generate
from star_core.canvas import Canvas
from star_core.eight_bit import quantize_linears
from star_core.evaluation.sheet import load_prompts
from star_core.fp8 import has_products
from star_core.graphs import Replays
from star_core.presets import half_the_steps, on_last, read_schedule
from star_core.request import Options, Request, ScaleStep
from star_core.schedule import ScaleSchedule
from star_core.star import Star, load

HELD_BY_GRAPHS = 6 * GIB
"""At most, of one mode at 1024 px: 2.3 of cache, the rest is scratch memory, most of it int8's."""

Change = Callable[[ScaleSchedule], ScaleSchedule]


@dataclass(frozen=True)
class Mode:
    """A named way to draw: what it changes of a schedule, and which 8-bit weights it has."""

    name: str
    base: str
    change: Change
    eight_bit: str | None = None

    @property
    def exact(self) -> str:
        """The name of the mode that this one is compared with."""
        return "exact, sampler" if "1024" in self.base else "exact"


def unguided(last: int) -> Change:
    """Draw the last scales without guidance."""

    def change(schedule: ScaleSchedule) -> ScaleSchedule:
        return on_last(schedule, [{"unguided": True}] * last)

    return change


def pruned(*shares: float) -> Change:
    """Skip shares of the last scales' tokens."""
    return lambda schedule: on_last(schedule, [{"prune": share} for share in shares])


def same(schedule: ScaleSchedule) -> ScaleSchedule:
    return schedule


def modes(*, sampler: bool) -> list[Mode]:
    """Return the exact mode first, then each fast one, those of the sampler where there is one."""
    plain = [
        Mode("exact", "official-512", same),
        Mode("unguided, last scale", "official-512", unguided(1)),
        Mode("unguided, last 2 scales", "official-512", unguided(2)),
        Mode("unguided, last 3 scales", "official-512", unguided(3)),
        Mode("prune 0.5, last scale", "official-512", pruned(0.5)),
        Mode("prune 0.4 0.5, last 2 scales", "official-512", pruned(0.4, 0.5)),
        Mode("fast", "fast", same),
        Mode("int8", "official-512", same, eight_bit="int8"),
        Mode("fast, int8", "fast", same, eight_bit="int8"),
        Mode("fp8", "official-512", same, eight_bit="fp8"),
        Mode("fast, fp8", "fast", same, eight_bit="fp8"),
        Mode("fastest", "fastest", same),
        Mode("fastest, fp8", "fastest", same, eight_bit="fp8"),
    ]
    refined = [
        Mode("exact, sampler", "official-1024", same),
        Mode("half the sampler's steps", "official-1024", half_the_steps),
        Mode("sampler, unguided last 2 scales", "official-1024", unguided(2)),
        Mode("fast-1024", "fast-1024", same),
        Mode("fast-1024, fp8", "fast-1024", same, eight_bit="fp8"),
    ]
    return plain + refined if sampler else plain


def chosen(names: Sequence[str] | None, *, sampler: bool) -> list[Mode]:
    """Return the modes of these names, all by default, and the exact ones that they are compared with."""
    every = modes(sampler=sampler)
    wanted = {name for mode in every if names is None or mode.name in names for name in (mode.name, mode.exact)}
    return [mode for mode in every if mode.name in wanted]


# The gain


def time_modes(
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    *,
    graphs: bool,
    names: Sequence[str] | None = None,
    seconds: float = math.inf,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Draw with every mode in turn; yield after each turn seconds and the ratio to the exact mode of its kind.

    A mode that fails is yielded with its error, and left out from then on. names: see chosen().
    """
    end = time.monotonic() + seconds
    config = config_of(size)
    every = [
        mode
        for mode in chosen(names, sampler=config.transformer.has_sampler)
        if mode.eight_bit != "fp8" or has_products(device)
    ]
    exact = build_star(config, 0, dtype, device)
    by_weights = {None: exact}
    for eight_bit in dict.fromkeys(mode.eight_bit for mode in every if mode.eight_bit):
        networks = quantize_linears(build_networks(config, 0, dtype, device), eight_bit)
        by_weights[eight_bit] = with_networks(exact, networks)
    took: dict[str, list[float]] = {mode.name: [] for mode in every}
    stars = {mode.name: copy.copy(by_weights[mode.eight_bit]) for mode in every}
    roomy = graphs and torch.cuda.mem_get_info(device)[0] > len(every) * HELD_BY_GRAPHS
    shared = Replays[Canvas]() if graphs and not roomy else None
    texts = Replays[Any]() if graphs else None  # all modes have the same text encoder
    for star in stars.values():
        star.replays, star.text_replays = Replays() if roomy else shared, texts
    errors: dict[str, str] = {}
    for turn in range(1, rounds + 1):
        for mode in [mode for mode in every if mode.name not in errors]:
            if time.monotonic() > end:
                break
            schedule = mode.change(read_schedule(mode.base, config.maps))
            options = Options(seed=turn, schedule=schedule)
            try:
                if turn == 1 or shared is not None:  # those of the mode before are forgotten: recorded anew
                    stars[mode.name].draw([PROMPT], options=options)
                settle(device)
                began = time.perf_counter()
                stars[mode.name].draw([PROMPT], options=options)
                settle(device)
                took[mode.name].append(time.perf_counter() - began)
            except RuntimeError as error:  # on a GPU, where one mode's kernels may be missing
                errors[mode.name] = str(error)[:500]
        yield {**_gains(every, took), **{name: {"error": words} for name, words in errors.items()}}
        if time.monotonic() > end:
            return


def _gains(every: Sequence[Mode], took: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return the middle of each mode's seconds, and of its ratios to the exact one where that was drawn."""
    found: dict[str, dict[str, Any]] = {}
    for mode in every:
        if took[mode.name]:
            found[mode.name] = {"seconds": middle(took[mode.name])}
        if ratios := [a / b for a, b in zip(took[mode.exact], took[mode.name], strict=False)]:
            found[mode.name]["faster_by"] = middle(ratios, digits=2)
    return found


def with_networks(star: Star, networks: Any) -> Star:
    """Return a model with other networks, and the same VQ-VAE and text encoder."""
    other = copy.copy(star)
    other.transformer, other.causal_sampler = networks.transformer, networks.causal_sampler
    return other


# The cost


@dataclass(frozen=True)
class Run:
    """What a run drew scale by scale: its steps, what was drawn in each, each one's guided logits (B, n, V)."""

    steps: tuple[ScaleStep, ...]
    drawn: tuple[Any, ...]
    logits: tuple[Tensor, ...]


class Recorder:
    """Takes down guided logits where tokens are made from them, and what is drawn."""

    def __enter__(self) -> Recorder:
        self._original = star_core.generate._draw_scale
        return self

    def __exit__(self, *_: object) -> None:
        star_core.generate._draw_scale = self._original

    def of(self, star: Star, request: Request, *, follow: Run | None = None) -> Run:
        """Return what a run draws; where one to follow is given, each scale is what that drew, and the logits
        are those after its scales before."""
        drawn: list[Any] = []
        logits: list[Tensor] = []

        def recorded(picture: Any, *arguments: Any) -> Any:
            _, _, schedule, features, scale, *_ = arguments
            logits.append(picture.guided_logits(features, schedule.scales[scale].strength))
            made = self._original(picture, *arguments) if follow is None else follow.drawn[scale]
            drawn.append(made)
            return made

        star_core.generate._draw_scale = recorded
        steps = tuple(star.run(request))
        return Run(steps, tuple(drawn), tuple(logits))


def psnr(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean PSNR in dB of pictures in [0, 1]; equal ones count as 60."""
    errors = (ours - theirs).square().flatten(1).mean(dim=1)
    return float((-10 * errors.clamp_min(1e-6).log10()).mean())


def cost_of_modes(
    count: int, seed: int, device: torch.device, names: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Draw the sheet's prompts with the shipped model by every mode; compare with the exact one.

    A mode that fails is returned with its error, and so are all whose exact one fails. names: see chosen().
    """
    exact = load(device=device)
    every = chosen(names, sampler=exact.causal_sampler is not None)
    by_weights = {None: exact}
    for eight_bit in dict.fromkeys(mode.eight_bit for mode in every if mode.eight_bit):
        by_weights[eight_bit] = load(device=device, eight_bit=eight_bit)
    prompts = [entry.prompt for entry in load_prompts()][:count]
    kept: dict[str, tuple[Run, Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    with Recorder() as recorder:
        for mode in every:
            if "error" in found.get(mode.exact, {}):
                found[mode.name] = {"error": f"{mode.exact} failed, with which this is compared"}
                continue
            star = by_weights[mode.eight_bit]
            schedule = mode.change(read_schedule(mode.base, exact.config.maps))
            request = star.request(prompts, options=Options(seed=seed, schedule=schedule))
            try:
                run = recorder.of(star, request)
                if mode.name == mode.exact:
                    kept[mode.exact] = run, star.decode(run.steps[-1].f_hat)
                    continue
                # The mode's logits after the exact scales before; the exact mode's own it drew from.
                like, pictures = kept[mode.exact]
                followed = recorder.of(star, request, follow=like)
                near = psnr(star.decode(run.steps[-1].f_hat), pictures)
                found[mode.name] = {**cost(run, followed, like), "psnr_db": round(near, 2)}
            except RuntimeError as error:  # on a GPU, where one mode's kernels may be missing
                found[mode.name] = {"error": str(error)[:500]}
    return found


def cost(free: Run, followed: Run, exact: Run) -> dict[str, float]:
    """Return the differences of what a mode drew, freely and after the exact scales, from what the exact one
    did."""
    pairs = list(zip(followed.logits, exact.logits, strict=True))
    errors = torch.cat([((a - b).abs() / b.std()).flatten() for a, b in pairs])
    steps = zip(free.steps, exact.steps, strict=True)
    equal = torch.cat([(a.tokens == b.tokens).float().flatten() for a, b in steps])
    return {
        "largest_logit_error": round(float(errors.max()), 3),
        "mean_logit_error": round(float(errors.mean()), 4),
        "equal_tokens": round(float(equal.mean()), 3),
    }


def lines(times: dict[str, dict[str, float]], costs: dict[str, dict[str, float]]) -> Iterator[str]:
    rows = [["", "s", "faster by", "logit error: mean", "largest", "equal tokens", "PSNR dB"]]
    for name in {**times, **costs}:
        time_, cost = times.get(name, {}), costs.get(name, {})
        rows.append(
            [
                name,
                *(str(time_.get(key, "")) for key in ("seconds", "faster_by")),
                *(
                    str(cost.get(key, ""))
                    for key in ("mean_logit_error", "largest_logit_error", "equal_tokens", "psnr_db")
                ),
            ]
        )
    yield from table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="d30-1024-sampler" if cuda else "d16-256")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for the gain; then it ends")
    names = [mode.name for mode in modes(sampler=True)]
    parser.add_argument("--modes", nargs="+", choices=names, metavar="NAME", help="these, and the exact ones")
    parser.add_argument("--prompts", type=int, default=48, help="of the sheet's prompts, for the cost")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--no-cost", action="store_true", help="the gain alone: the cost is every machine's")
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU: launch every kernel")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    graphs = device.type == "cuda" and not arguments.no_graphs
    found: dict[str, Any] = {
        "benchmark": "fast_modes",
        "machine": machine(device),
        "size": arguments.size,
        "dtype": arguments.dtype,
        "graphs": graphs,
        "batch": 1,
        "seed": arguments.seed,
    }
    dtype = getattr(torch, arguments.dtype)
    for times in time_modes(
        arguments.size,
        dtype,
        device,
        arguments.rounds,
        graphs=graphs,
        names=arguments.modes,
        seconds=arguments.seconds,
    ):
        report({**found, "gain": times})
    found["gain"] = times
    costs = (
        {} if arguments.no_cost else cost_of_modes(arguments.prompts, arguments.seed, device, arguments.modes)
    )
    print("\n".join(lines(times, costs)), file=sys.stderr)
    if costs:
        report({**found, "cost": costs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
