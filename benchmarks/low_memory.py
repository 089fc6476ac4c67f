"""A large model in a few gigabytes of GPU memory: what it costs, and that it draws the same picture.

    python benchmarks/low_memory.py [--size d30-1024] [--gigabytes 6]

First with all the room there is, then with the cap, which torch's allocator enforces: going over it fails.
CUDA's own memory (context, kernels) counts against it. Weights that find no room are streamed from the host's
memory (`star_core/streaming.py`), the text encoder is on the GPU only while it reads, the picture is decoded in
strips. Where the cap proves too small, it is raised by half a gigabyte until it is not, and the result says so.
On a CPU nothing is capped: half of what can be streamed is. Prints what it has as one JSON line after either
part; the exit code is 1 where the pictures differ or the cap was raised.

What d30-1024 takes for one guided picture in bfloat16, worked out beforehand (GB = 1e9 bytes):

    transformer 3.35, of which 30 blocks' matrices 3.10; VQ-VAE 0.22; text encoder 0.68, gone after reading
    KV cache of all scales but the last, two rows of 5355 tokens                           2.47
    last scale, a block's pass: 14 tensors (2, 4096, 1920), keys and values (2, 9451, 1920) 0.59
    last scale, drawing: 6 tensors (2, 4096, 4096) in float32                              0.81
    decoding in strips, when the cache is gone: 6 tensors (160, 1024, 1024)                2.01

Beside the transformer 4.08 (the pass and the drawing do not meet: 3.5 at the same moment), and with two places
for streamed blocks 4.54 at least. CUDA's own memory of 0.6 to 0.8 leaves 5.2 to 5.4 of 6: 22 to 24 of the 30
blocks are streamed, 2.3 to 2.5 GB per scale, 32 to 35 GB a picture, 0.6 to 0.7 s on a bus of 50 GB/s.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from workbench import (
    PROMPT,
    SIZES,
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

from star_core.request import Options
from star_core.star import Star
from star_core.streaming import Parts, StreamedBlocks

STEP = 500_000_000
MOST_OVERHEAD = 1_500_000_000
"""Of CUDA's own memory; more is another process's."""


class Cap:
    """A limit to the memory of a GPU that this process uses, CUDA's own included; None on another device."""

    def __init__(self, device: torch.device, memory: int) -> None:
        self._index = torch.cuda.current_device() if device.type == "cuda" else None
        self.memory, self.overhead = memory, 0
        if self._index is not None:
            self.overhead = min(self._outside(), MOST_OVERHEAD)

    def _outside(self) -> int:
        free, total = torch.cuda.mem_get_info(self._index)
        return total - free - torch.cuda.memory_reserved(self._index)

    @property
    def for_torch(self) -> int:
        return self.memory - self.overhead

    def set(self) -> None:
        """Have torch's allocator refuse more."""
        if self._index is not None:
            total = torch.cuda.mem_get_info(self._index)[1]
            torch.cuda.set_per_process_memory_fraction(self.for_torch / total, self._index)

    def end(self) -> None:
        if self._index is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._index)

    def report(self) -> dict[str, Any]:
        if self._index is None:
            return {}
        stats = torch.cuda.memory_stats(self._index)
        reserved = torch.cuda.max_memory_reserved(self._index)
        return {
            "cap_gb": self.memory / 1e9,
            "outside_torch_gb": round(self._outside() / 1e9, 3),
            "peak_reserved_gb": round(reserved / 1e9, 3),
            "peak_of_the_gpu_gb": round((reserved + self._outside()) / 1e9, 3),
            "allocator_retries": stats.get("num_alloc_retries", 0),
        }


def time_pictures(star: Star, rounds: int, device: torch.device) -> dict[str, Any]:
    """Draw a picture that is not timed, then some that are."""
    peak, seconds = Peak(device), []
    star.draw([PROMPT], options=Options(seed=0))
    peak.reset()
    for seed in range(1, rounds + 1):
        settle(device)
        began = time.perf_counter()
        star.draw([PROMPT], options=Options(seed=seed))
        settle(device)
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": middle(seconds),
        "all_seconds": [round(s, 3) for s in seconds],
        "peak_allocated_gb": round(peak.read() / 1e9, 3),
    }


def sample(star: Star) -> tuple[Tensor, Tensor]:
    """Return one picture's f_hat and the picture, decoded in strips, on the CPU."""
    *_, last = star.generate([PROMPT], options=Options(seed=1))
    return last.f_hat.cpu(), star.decode(last.f_hat, sliced=True).cpu()


def squeezed(star: Star, memory: int, device: torch.device) -> tuple[Star, StreamedBlocks | None]:
    """Return a model of the same parts, which leave the device as far as they must."""
    parts = parts_of(star)
    # From the host, as `load` does it: what stays would otherwise hold the pieces of memory it was made in.
    for module in (star.transformer, star.causal_sampler, star.vqvae, star.text_encoder.model):
        if module is not None:
            module.to("cpu")
    give_back(device)
    streamed = parts.fit_into(memory, device)
    give_back(device)
    small = Star(
        star.config,
        star.transformer,
        star.causal_sampler,
        star.vqvae,
        star.text_encoder,
        device,
        short_of_memory=True,
    )
    return small, streamed


def parts_of(star: Star) -> Parts:
    return Parts(star.config, star.transformer, star.causal_sampler, star.vqvae, star.text_encoder)


def half_way(star: Star) -> int:
    """Return the bytes with which about half of the weights that can be are streamed."""
    parts = parts_of(star)
    whole = parts.beside() + sum(p.nbytes for p in star.transformer.parameters())
    return (parts.least() + whole) // 2


def compare(star: Star, memory: int | None, rounds: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield what is measured with room, then that and what is measured without. The model stays squeezed."""
    found: dict[str, Any] = {"with_room": time_pictures(star, rounds, device)}
    f_hat, picture = sample(star)
    yield dict(found)
    give_back(device)
    cap = Cap(device, half_way(star) if memory is None else memory)
    small, streamed = squeezed(star, cap.for_torch, device)
    found |= {"cuda_overhead_gb": round(cap.overhead / 1e9, 3), "raised": []}
    try:
        while True:
            cap.set()
            try:
                timed = time_pictures(small, rounds, device)
                break
            except torch.OutOfMemoryError as error:
                found["raised"].append({"cap_gb": cap.memory / 1e9, "error": str(error)[:300]})
            # Outside the handler: an exception keeps the frames that hold the tensors.
            give_back(device)
            cap.memory += STEP
        found["within_cap"] = {**timed, **cap.report()}
        before = streamed.copied if streamed else 0
        small_f_hat, small_picture = sample(small)
    finally:
        cap.end()
    found["within_cap"]["streamed_blocks"] = streamed.number if streamed else 0
    found["within_cap"]["streamed_gb_per_picture"] = round(
        (streamed.copied - before) / 1e9 if streamed else 0, 3
    )
    yield {
        **found,
        "slower_by": round(timed["seconds"] / found["with_room"]["seconds"], 2),
        "largest_difference": {
            "f_hat": float((f_hat - small_f_hat).abs().max()),
            "picture": float((picture - small_picture).abs().max()),
        },
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    rows = [["", "s", "peak GB", "reserved", "streamed GB"]]
    for name in ("with_room", "within_cap"):
        part = result[name]
        rest = (part.get("peak_reserved_gb", ""), part.get("streamed_gb_per_picture", ""))
        rows.append([name, f"{part['seconds']:.3f}", f"{part['peak_allocated_gb']:.2f}", *map(str, rest)])
    yield from table(rows)
    yield f"largest difference {result['largest_difference']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="d30-1024" if cuda else "d16-256")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of GPU memory, CUDA's own included")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    star = build_star(config_of(arguments.size), 0, getattr(torch, arguments.dtype), device)
    facts = {
        "benchmark": "low_memory",
        "machine": machine(device),
        "size": arguments.size,
        "dtype": arguments.dtype,
        "batch": 1,
        "seeds": f"1..{arguments.rounds}",
    }
    memory = int(arguments.gigabytes * 1e9) if device.type == "cuda" else None
    for result in compare(star, memory, arguments.rounds, device):
        report({**facts, **result})
    print("\n".join(lines(result)), file=sys.stderr)
    equal = result["largest_difference"]["picture"] == 0
    return 0 if equal and not result["raised"] else 1


if __name__ == "__main__":
    sys.exit(main())
