"""Where the time of a picture goes, and how it grows with batch, resolution and depth.

    python benchmarks/scaling.py [--depths 16] [--pixels 128 256] [--batches 1 2 4]

Random weights of the released shapes, the released schedule without the causal sampler (with it: --sampler).
For every combination: seconds per picture and per scale, the share of text, transformer, causal sampler,
sampling and decoding, and peak memory (on a GPU with CUDA graphs too), beside the floor: the operations of a
scale at the rate of this machine's largest matrix product, or its bytes at the rate of a copy, whichever takes
longer. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from workbench import (
    GIB,
    PROMPT,
    Peak,
    build_star,
    config_of,
    give_back,
    machine,
    middle,
    report,
    settle,
    table,
)

import star_core.causal_sampler
import star_core.generate
from star_core.config import StarConfig, square_maps, token_count
from star_core.graphs import Replays
from star_core.request import Options
from star_core.star import Star

SIDES = {
    128: (1, 2, 3, 4, 5, 6, 8),
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Token maps by the picture's side in pixels: the released ones, and a small one for small machines."""
DECODER_FLOP_PER_PIXEL = 6.46e12 / 2**20
TEXT_FLOP_PER_TOKEN = 2 * 12 * 1024**2 * 23
PARTS = ("text", "transformer", "causal sampler", "sampling", "decoding", "rest")


def config_for(depth: int, pixels: int, *, sampler: bool) -> StarConfig:
    """Return a released shape of this depth with the maps of a picture's side."""
    base = config_of("d16-256" if depth == 16 else "d30-1024-sampler" if sampler else "d30-1024")
    maps = square_maps(SIDES[pixels])
    width = 64 * depth
    transformer = dataclasses.replace(base.transformer, depth=depth, width=width, heads=depth, scales=len(maps))
    return dataclasses.replace(base, transformer=transformer, maps=maps, schedule=base.schedule)


class Stopwatch:
    """Seconds spent in named functions; a function inside another counts for the inner one alone."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._open: list[float] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        settle(self._device)
        began, self._open = time.perf_counter(), [*self._open, 0.0]
        try:
            yield
        finally:
            settle(self._device)
            took = time.perf_counter() - began
            inside = self._open.pop()
            self.seconds[name] += took - inside
            if self._open:
                self._open[-1] += took

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Time every call of owner.attribute as this part."""
        original: Callable[..., Any] = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return original(*arguments, **options)

        setattr(owner, attribute, timed)


@contextlib.contextmanager
def watched(star: Star, watch: Stopwatch) -> Iterator[None]:
    """Time the parts of a model within the block."""
    modules = (star_core.generate, star_core.causal_sampler)
    kept = [(module, module.draw) for module in modules]
    places = [(star, "encode_text", "text"), (star, "decode", "decoding")]
    places += [(star.transformer, name, "transformer") for name in ("features", "logits", "text_keys")]
    if star.causal_sampler is not None:
        places.append((star.causal_sampler, "forward", "causal sampler"))
    places += [(module, "draw", "sampling") for module in modules]
    for owner, attribute, name in places:
        watch.watch(owner, attribute, name)
    try:
        yield
    finally:
        for owner, attribute, _ in places[: -len(modules)]:
            delattr(owner, attribute)
        for module, draw in kept:
            module.draw = draw


def measure(star: Star, batch: int, runs: int, device: torch.device) -> dict[str, Any]:
    """Draw a few batches; return medians of whole pictures, then of scales and parts in a run of their own."""
    prompts = [PROMPT] * batch
    whole, peak = whole_batches(star, prompts, runs, device)
    repeated: dict[str, Any] = {}
    if device.type == "cuda":
        star.replays, star.text_replays = Replays(), Replays()
        try:
            seconds, held = whole_batches(star, prompts, runs, device, graphs=True)
            repeated = {"seconds_with_graphs": middle(seconds) / batch, "peak_gib_with_graphs": held}
        except RuntimeError as error:  # the figures without them are worth having
            repeated = {"graphs_error": str(error)[:500]}
        star.replays = star.text_replays = None
    watch, scales = Stopwatch(device), []
    with watched(star, watch), watch.part("rest"):
        steps = star.generate(prompts, options=Options(seed=1))
        settle(device)
        last = time.perf_counter()  # not before: the text is read when a picture is asked for
        for step in steps:
            settle(device)
            scales.append(time.perf_counter() - last)
            last, f_hat = time.perf_counter(), step.f_hat
        star.decode(f_hat)
    total = sum(watch.seconds.values())
    return {
        "batch": batch,
        "seconds_per_picture": middle(whole) / batch,
        "peak_gib": peak,
        **repeated,
        "seconds_per_scale": [round(seconds, 4) for seconds in scales],
        "shares": {name: round(seconds / total, 3) for name, seconds in watch.seconds.items()},
    }


def whole_batches(
    star: Star, prompts: list[str], runs: int, device: torch.device, *, graphs: bool = False
) -> tuple[list[float], float]:
    """Return the seconds of each warm batch, text and decoding included, and the peak in GiB."""
    peak, seconds = Peak(device, graphs=graphs), []
    give_back(device)
    star.draw(prompts, options=Options(seed=0))
    peak.reset()
    for seed in range(1, runs + 1):
        settle(device)
        began = time.perf_counter()
        star.draw(prompts, options=Options(seed=seed))
        settle(device)
        seconds.append(time.perf_counter() - began)
    return seconds, round(peak.read() / GIB, 2)


# The floor


def rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return the FLOP/s of a large matrix product and the bytes/s of a copy, the best of several."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            settle(device)
            began = time.perf_counter()
            work()
            settle(device)
            times.append(time.perf_counter() - began)
        return min(times)

    return 2 * side**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source))


def floor_seconds(config: StarConfig, batch: int, itemsize: int, flops: float, bandwidth: float) -> float:
    """Return the least seconds that a guided batch without the causal sampler can take, decoding included."""
    t = config.transformer
    rows, total, seen = 2 * batch, 0.0, 0
    text = batch * 12
    for height, width in config.maps:
        tokens = height * width
        seen += tokens
        weights = t.depth * 14 * t.width**2 + t.width * t.codebook_size
        # Cross-attention is the conditional rows' alone: two of a block's 14 squares, for half the rows.
        products = 2 * tokens * (rows * weights - (rows - batch) * t.depth * 2 * t.width**2)
        attention = 4 * t.depth * t.width * tokens * (rows * seen + text)
        moved = itemsize * (weights + 2 * t.depth * rows * seen * t.width)
        total += max((products + attention) / flops, moved / bandwidth)
    pixels = batch * config.resolution[0] * config.resolution[1]
    return total + (pixels * DECODER_FLOP_PER_PIXEL + text * TEXT_FLOP_PER_TOKEN) / flops


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--depths", type=int, nargs="+", choices=(16, 30), default=[30] if cuda else [16])
    parser.add_argument(
        "--pixels", type=int, nargs="+", choices=SIDES, default=[1024, 256] if cuda else [128, 256]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8] if cuda else [1, 2, 4])
    parser.add_argument("--sampler", action="store_true", help="with the causal sampler, depth 30 alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sampler and arguments.depths != [30]:
        parser.error("the causal sampler was released at depth 30: add --depths 30")
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    flops, bandwidth = rates(dtype, device)
    results: list[dict[str, Any]] = []
    whole = {
        "benchmark": "scaling",
        "machine": machine(device),
        "dtype": arguments.dtype,
        "seeds": f"1..{arguments.runs}",
        "gflops": round(flops / 1e9),
        "gb_per_second": round(bandwidth / 1e9, 1),
        "results": results,
    }
    for depth in arguments.depths:
        for pixels in arguments.pixels:
            config = config_for(depth, pixels, sampler=arguments.sampler)
            star = build_star(config, 0, dtype, device)
            for batch in arguments.batches:
                found = measure(star, batch, arguments.runs, device)
                floor = floor_seconds(config, batch, dtype.itemsize, flops, bandwidth) / batch
                results.append(
                    {
                        "depth": depth,
                        "pixels": pixels,
                        "tokens": token_count(config.maps),
                        **found,
                        "floor_seconds_per_picture": round(floor, 4),
                    }
                )
                print("\n".join(lines(results[-1])), file=sys.stderr, flush=True)
                report(whole)
            del star
    return 0


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield what a person reads of one combination."""
    yield (
        f"depth {result['depth']}, {result['pixels']} px, batch {result['batch']}:"
        f" {result['seconds_per_picture']:.3f} s a picture"
        f" (floor {result['floor_seconds_per_picture']:.3f}), {result['peak_gib']} GiB"
    )
    if "seconds_with_graphs" in result:
        yield (f"  with graphs {result['seconds_with_graphs']:.3f} s, {result['peak_gib_with_graphs']} GiB")
    yield "  scales " + " ".join(f"{seconds:.3f}" for seconds in result["seconds_per_scale"])
    shares = [[name, f"{share:.0%}"] for name, share in result["shares"].items() if share]
    yield from ("  " + line for line in table(shares))


if __name__ == "__main__":
    sys.exit(main())
