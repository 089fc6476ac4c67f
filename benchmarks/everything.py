"""All benchmarks one after the other, within a time limit, into one JSON line.

    STAR_REFERENCE=path/to/STAR-T2I python benchmarks/everything.py [--minutes 4.67] [--out results.json]

For a machine that is at hand for minutes alone: what matters most runs first, none takes the others' time, what
no longer fits is left out by name, what a benchmark had when its time was up is kept and marked unfinished, and
every result is written as soon as it is there. On a GPU it is meant to end within 280 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """One script, the most seconds it may take of a short time, and its options on a GPU."""

    name: str
    seconds: float = 3600
    options: tuple[str, ...] = ()


ON_A_CPU = tuple(
    Benchmark(name) for name in ("fast_modes", "against_official", "scaling", "load", "low_memory")
)
ON_A_GPU = (
    Benchmark("against_official", 170, ("--sizes", "d30-1024", "d30-1024-sampler")),
    # What a mode costs does not depend on the machine: NOTES.md has it.
    Benchmark("fast_modes", 75, ("--no-cost", "--seconds", "55")),
    Benchmark("low_memory", 60),
    Benchmark("scaling", 75),
    Benchmark("load", 120),
)
"""What matters most first; limits well above what is expected."""
NAMES = tuple(benchmark.name for benchmark in ON_A_CPU)


def run(benchmark: Benchmark, seconds: float) -> dict[str, Any]:
    """Run one benchmark; return what it reports, or why there is nothing, and the exit code of its own end."""
    if benchmark.name == "against_official" and "STAR_REFERENCE" not in os.environ:
        return {"left_out": "STAR_REFERENCE names no checkout of Davinci-XLab/STAR-T2I"}
    if seconds <= 0:
        return {"left_out": "no time was left"}
    command = [sys.executable, str(HERE / f"{benchmark.name}.py"), *benchmark.options]
    # In a session of its own, so that its own processes end with it and leave the machine to the next.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    most, in_time = min(seconds, benchmark.seconds), True
    try:
        output, _ = process.communicate(timeout=most)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if not in_time:
        output, _ = process.communicate()
    if in_time:
        nothing = {"left_out": f"ended with exit code {process.returncode} and no result"}
        return {**(last_result(output) or nothing), "exit_code": process.returncode}
    found = last_result(output[: output.rfind("\n") + 1])
    return {**found, "unfinished": True} if found else {"left_out": f"not done within {most:.0f} s"}


def last_result(output: str) -> dict[str, Any]:
    """Return the last line of an output that is a JSON object, an empty one where none is."""
    for line in reversed(output.splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--minutes", type=float, default=280 / 60 if cuda else 10)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, help="file for the results so far")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Any] = {}
    for benchmark in ON_A_GPU if cuda else ON_A_CPU:
        if benchmark.name not in arguments.only:
            continue
        began = time.monotonic()
        found = run(benchmark, end - began)
        results[benchmark.name] = {**found, "took_seconds": round(time.monotonic() - began, 1)}
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results))
    print(json.dumps(results))
    # That of a process that was killed is below 0.
    return max((abs(result.get("exit_code", 0)) for result in results.values()), default=0)


if __name__ == "__main__":
    sys.exit(main())
