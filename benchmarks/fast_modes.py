"""What every fast mode gains, on random weights of a released shape, and costs, on the shipped model.

    python benchmarks/fast_modes.py [--size d16-256] [--dtype bfloat16]

Gain: seconds per picture against the exact mode, in turn on one machine. Cost, at equal seeds in float32: the
largest and the mean difference of a scale's guided logits after the exact mode's scales before it, in standard
deviations of those logits; the share of equal tokens when both run freely; PSNR of the pictures. KID and
R-precision of a mode come from `python -m star_core evaluate --schedules ... --int8`. Prints the gain as one
JSON line after every turn, and ends in one with the cost too.

With CUDA graphs every mode keeps its own, recorded in a first turn that is not timed; on a GPU too small for
that they are recorded again before every timed picture.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from workbench import GIB, PROMPT, SIZES, build_star, config_of, machine, middle, report, settle, table

import star_core.generate
from star_core.canvas import Canvas
from star_core.evaluation.sheet import load_prompts
from star_core.graphs import Replays
from star_core.int8 import quantize_linears
from star_core.presets import half_the_steps, on_last, read_schedule
from star_core.request import Request, ScaleStep
from star_core.schedule import ScaleSchedule
from star_core.star import Options, Star, load

HELD_BY_GRAPHS = 8 * GIB
"""At most, of one mode at 1024 px: cache and scratch memory."""

Change = Callable[[ScaleSchedule], ScaleSchedule]


@dataclass(frozen=True)
class Mode:
    """A named way to draw: what it changes of a schedule, and whether weights have 8 bits."""

    name: str
    base: str
    change: Change
    int8: bool = False


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
        Mode("int8", "official-512", same, int8=True),
        Mode("fast, int8", "fast", same, int8=True),
    ]
    refined = [
        Mode("exact, sampler", "official-1024", same),
        Mode("half the sampler's steps", "official-1024", half_the_steps),
        Mode("sampler, unguided last 2 scales", "official-1024", unguided(2)),
        Mode("fast-1024", "fast-1024", same),
    ]
    return plain + refined if sampler else plain


# The gain


def time_modes(
    size: str, dtype: torch.dtype, device: torch.device, rounds: int, *, graphs: bool
) -> Iterator[dict[str, dict[str, Any]]]:
    """Draw with every mode in turn; yield after each turn seconds and the ratio to the exact mode of its kind.

    A mode that fails is yielded with its error, and left out from then on.
    """
    config = config_of(size)
    exact = build_star(config, 0, dtype, device)
    small = build_star(config, 0, dtype, device)
    quantize_linears(small.transformer)
    if small.causal_sampler is not None:
        quantize_linears(small.causal_sampler)
    every = modes(sampler=config.transformer.has_sampler)
    seconds: dict[str, list[float]] = {mode.name: [] for mode in every}
    stars = {mode.name: copy.copy(small if mode.int8 else exact) for mode in every}
    roomy = graphs and torch.cuda.mem_get_info(device)[0] > len(every) * HELD_BY_GRAPHS
    shared = Replays[Canvas]() if graphs and not roomy else None
    for star in stars.values():
        star.replays = Replays() if roomy else shared
    errors: dict[str, str] = {}
    for turn in range(rounds + 1):
        for mode in [mode for mode in every if mode.name not in errors]:
            schedule = mode.change(read_schedule(mode.base, config.maps))
            options = Options(seed=turn, schedule=schedule)
            try:
                if shared is not None:  # those of the mode before are forgotten: recorded anew, not timed
                    stars[mode.name].draw([PROMPT], options=options)
                settle(device)
                began = time.perf_counter()
                stars[mode.name].draw([PROMPT], options=options)
                settle(device)
            except RuntimeError as error:  # on a GPU, where one mode's kernels may be missing
                errors[mode.name] = str(error)[:500]
                continue
            if turn:
                seconds[mode.name].append(time.perf_counter() - began)
        if turn:
            yield {**_gains(every, seconds), **{name: {"error": words} for name, words in errors.items()}}


def _gains(every: Sequence[Mode], seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    found = {}
    for mode in every:
        plain = seconds["exact, sampler" if "1024" in mode.base else "exact"]
        if ratios := [a / b for a, b in zip(plain, seconds[mode.name], strict=False)]:
            found[mode.name] = {"seconds": middle(seconds[mode.name]), "faster_by": middle(ratios, digits=2)}
    return found


# The cost


class Logits:
    """The guided logits of the next scale drawn, taken where tokens are made from them."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __enter__(self) -> Logits:
        self._original = star_core.generate._draw_scale

        def recorded(picture: Any, *arguments: Any) -> Any:
            _, _, schedule, features, scale, *_ = arguments
            self.last = picture.guided_logits(features, schedule.scales[scale].strength)
            return self._original(picture, *arguments)

        star_core.generate._draw_scale = recorded
        return self

    def __exit__(self, *_: object) -> None:
        star_core.generate._draw_scale = self._original

    def of(self, star: Star, request: Request, before: tuple[ScaleStep, ...]) -> Tensor:
        """Return the logits (B, n, V) of the scale after the given ones."""
        for _ in star.run(dataclasses.replace(request, prefix=before, stop=len(before) + 1)):
            pass
        assert self.last is not None, "the scale was drawn"
        return self.last


def psnr(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean PSNR in dB of pictures in [0, 1]; equal ones count as 60."""
    errors = (ours - theirs).square().flatten(1).mean(dim=1)
    return float((-10 * errors.clamp_min(1e-6).log10()).mean())


def cost_of_modes(count: int, seed: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Draw the sheet's prompts with the shipped model by every mode; compare with the exact one."""
    exact = load(device=device)
    small = copy.copy(exact)
    small.transformer = quantize_linears(copy.deepcopy(exact.transformer))
    small.causal_sampler = quantize_linears(copy.deepcopy(exact.causal_sampler))
    prompts = [entry.prompt for entry in load_prompts()][:count]
    kept: dict[str, tuple[tuple[ScaleStep, ...], Tensor, list[Tensor]]] = {}
    found = {}
    every = modes(sampler=exact.causal_sampler is not None)
    with Logits() as logits:
        for mode in every:
            star = small if mode.int8 else exact
            schedule = mode.change(read_schedule(mode.base, exact.config.maps))
            request = star.request(prompts, options=Options(seed=seed, schedule=schedule))
            steps = tuple(star.run(request))
            pictures = star.decode(steps[-1].f_hat)
            reference = "exact, sampler" if "1024" in mode.base else "exact"
            if mode.name == reference:
                own = [logits.of(star, request, steps[:scale]) for scale in range(len(steps))]
                kept[mode.name] = steps, pictures, own
                continue
            base_steps, base_pictures, base_logits = kept[reference]
            errors, equal = [], []
            for scale, theirs in enumerate(base_logits):
                ours = logits.of(star, request, base_steps[:scale])
                errors.append((ours - theirs).abs() / theirs.std())
                equal.append((steps[scale].tokens == base_steps[scale].tokens).float().flatten())
            found[mode.name] = {
                "largest_logit_error": round(max(float(error.max()) for error in errors), 3),
                "mean_logit_error": round(float(torch.cat([e.flatten() for e in errors]).mean()), 4),
                "equal_tokens": round(float(torch.cat(equal).mean()), 3),
                "psnr_db": round(psnr(pictures, base_pictures), 2),
            }
    return found


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
    for times in time_modes(arguments.size, dtype, device, arguments.rounds, graphs=graphs):
        report({**found, "gain": times})
    found["gain"] = times
    costs = {} if arguments.no_cost else cost_of_modes(arguments.prompts, arguments.seed, device)
    print("\n".join(lines(times, costs)), file=sys.stderr)
    if costs:
        report({**found, "cost": costs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
