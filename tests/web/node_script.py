"""Scripts of this folder that answer lines of JSON by what the editor's functions return, in Node.js."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NODE = shutil.which("node")
SECONDS = 60

needs_node = pytest.mark.skipif(NODE is None, reason="needs `node` (Node.js 20.19 or newer) on the path")


@functools.cache
def started(script: str) -> subprocess.Popen[str]:
    """Start a script, once. It ends with its standard input, which is when this process does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([str(NODE), str(HERE / script)], text=True, encoding="utf-8", **pipes)


def run_node(script: str, cases: list[Any]) -> list[Any]:
    """Return the script's JSON answers to JSON cases."""
    process = started(script)
    assert process.stdin is not None
    assert process.stdout is not None
    impatient = threading.Timer(SECONDS, process.kill)
    impatient.start()
    try:
        process.stdin.write(json.dumps(cases) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # it has ended before
        line = ""
    finally:
        impatient.cancel()
    if not line.endswith("\n"):
        started.cache_clear()  # the next caller's is a new one
        pytest.fail(f"{script} ended with {process.wait()}, or was ended after {SECONDS} s")
    answers: list[Any] = json.loads(line)
    assert len(answers) == len(cases)
    return answers
