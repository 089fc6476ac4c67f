"""From safetensors files to a loaded model and to the first token, against reading the bytes.

    python benchmarks/load.py [--size d16-256] [--dtype bfloat16]

A random model of the released shape is written once. Then, in processes of their own and in turn: `bytes`
reads every file from front to back into one buffer; `load` loads the model; `first token` loads it, encodes a
prompt and draws the first scale. Each with the files in the system's cache (warm), and after asking the
system to forget them (cold). Imports are not counted. A loaded model is mapped, not read: what it puts off is
in the first token. Peak memory is the process's, beside the size of the files: two copies of the weights
would show; on a GPU, reading apart, it is that of its tensors. Prints what it has as one JSON line after every
state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from workbench import (
    GIB,
    PROMPT,
    SIZES,
    Peak,
    config_of,
    machine,
    middle,
    report,
    settle,
    table,
    write_model,
)

from star_core.request import Options
from star_core.star import load

WAYS = ("bytes", "load", "first token")
STATES = ("warm", "cold")
CHUNK = 64 * 2**20


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            with contextlib.suppress(AttributeError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def can_forget(folder: Path) -> bool:
    """Whether the system can drop these files from its cache: not where they live in memory alone."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return False
    place = str(folder.resolve())
    found = ("", "")
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        if place.startswith(point.rstrip("/") + "/") and len(point) >= len(found[0]):
            found = point, kind
    return found[1] not in ("", "tmpfs", "ramfs")


def read_bytes(folder: Path) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def work(arguments: argparse.Namespace) -> None:
    """Do one way once; print seconds and peak memory."""
    device, folder = torch.device(arguments.device), Path(arguments.folder)
    torch.set_num_threads(arguments.threads)
    if arguments.way != "bytes":
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

        if device.type == "cuda":
            torch.zeros(1, device=device)
            with contextlib.suppress(ImportError):
                import triton  # noqa: F401
    peak = Peak(torch.device("cpu") if arguments.way == "bytes" else device)
    peak.reset()
    began = time.perf_counter()
    if arguments.way == "bytes":
        read_bytes(folder)
    else:
        dtype = getattr(torch, arguments.dtype)
        star = load(folder, dtype=dtype, text_dtype=dtype, device=device)
        if arguments.way == "first token":
            next(star.generate([PROMPT], options=Options(seed=1)))
    if arguments.way != "bytes":
        settle(device)
    print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak.read()}))


def run_once(way: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--dtype", arguments.dtype]
    command += ["--device", arguments.device, "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians and peaks of every way and state, and medians of the rounds' ratios to reading."""
    found = {name: runs for name, runs in found.items() if runs}
    return {
        "seconds": {name: middle([run["seconds"] for run in runs]) for name, runs in found.items()},
        "peak_gib": {name: round(max(run["peak"] for run in runs) / GIB, 3) for name, runs in found.items()},
        "against_reading": {
            name: middle(
                [a["seconds"] / b["seconds"] for a, b in zip(found[name], found[base], strict=True)], digits=2
            )
            for name in found
            if (base := f"bytes, {name.rsplit(', ', 1)[1]}") != name
        },
    }


def lines(result: dict[str, Any]) -> Iterator[str]:
    rows = [["", "s", "of reading", "peak GiB"]]
    for name, seconds in result["seconds"].items():
        ratio = result["against_reading"].get(name, "")
        rows.append([name, f"{seconds:.3f}", str(ratio), f"{result['peak_gib'][name]:.2f}"])
    yield f"{result['size']}, {result['files_gib']:.2f} GiB of files"
    yield from table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="d30-256" if cuda else "d16-256")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=1 if cuda else 3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        work(arguments)
        return 0
    device = torch.device(arguments.device)
    found: dict[str, list[dict[str, Any]]] = {f"{way}, {state}": [] for way in WAYS for state in STATES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(config_of(arguments.size), 0, getattr(torch, arguments.dtype), folder, device)
        states = STATES if can_forget(folder) else STATES[:1]
        size = sum(path.stat().st_size for path in weight_files(folder))
        facts = {
            "benchmark": "load",
            "machine": machine(device),
            "size": arguments.size,
            "dtype": arguments.dtype,
            "files_gib": round(size / GIB, 3),
        }
        if device.type == "cuda":
            run_once("first token", arguments, folder)  # kernels are built once, and lie on disk from then on
        for _ in range(arguments.rounds):
            for state in states:
                if state == "warm":  # a cold round before it has left in the cache what it has touched alone
                    run_once("bytes", arguments, folder)
                for way in WAYS:
                    if state == "cold":
                        forget(folder)
                    found[f"{way}, {state}"].append(run_once(way, arguments, folder))
                result = {**facts, **summary(found)}
                report(result)
    print("\n".join(lines(result)), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
