"""All benchmarks one after the other, within a time limit, into one JSON line.

    STAR_REFERENCE=path/to/STAR-T2I python benchmarks/everything.py [--minutes 10] [--out results.json]

For a machine that is at hand for minutes alone: what matters most runs first, what no longer fits is left out
by name, what a benchmark had when its time was up is kept and marked unfinished, and every result is written as
soon as it is there. Sizes and settings are each benchmark's own
defaults, which suit a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BENCHMARKS = ("fast_modes", "against_official", "scaling", "load")


def run(name: str, seconds: float) -> dict[str, Any]:
    """Run one benchmark; return what it reports, or why there is nothing."""
    if name == "against_official" and "STAR_REFERENCE" not in os.environ:
        return {"left_out": "STAR_REFERENCE names no checkout of Davinci-XLab/STAR-T2I"}
    if seconds <= 0:
        return {"left_out": "no time was left"}
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py")], stdout=subprocess.PIPE, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        so_far = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        whole_lines = so_far[: so_far.rfind("\n") + 1].splitlines()
        left_out = {"left_out": f"not done within {seconds:.0f} s"}
        return {**json.loads(whole_lines[-1]), "unfinished": True} if whole_lines else left_out
    lines = done.stdout.splitlines()
    if not lines:
        return {"left_out": f"ended with exit code {done.returncode} and no result"}
    return {**json.loads(lines[-1]), "exit_code": done.returncode}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--out", type=Path, help="file for the results so far")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Any] = {}
    for name in arguments.only:
        results[name] = run(name, end - time.monotonic())
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results))
    print(json.dumps(results))
    return max((result.get("exit_code", 0) for result in results.values()), default=0)


if __name__ == "__main__":
    sys.exit(main())
