"""How much memory is free, as far as the system says: on a GPU, in the machine, in a container."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Where Linux says what a container may take and has taken: control groups of the second version, the first."""


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU or, for a CPU, where this process runs; None if not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device.index)
        return free
    if device.type != "cpu":
        return None
    known = [free for free in (_free_in_the_machine(), _left_in_the_container()) if free is not None]
    return min(known, default=None)


def _free_in_the_machine() -> int | None:
    with contextlib.suppress(OSError):
        if available := re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE):
            return int(available.group(1)) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_the_container() -> int | None:
    for folder, most, taken in CONTAINERS:
        # Without a limit there is no such file, no number in it, or one beyond any machine.
        with contextlib.suppress(OSError, ValueError):
            left = int((folder / most).read_text()) - int((folder / taken).read_text())
            # Files that were read and may be dropped count as taken.
            stat = (folder / "memory.stat").read_text()
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
            return max(0, left + max(map(int, cached), default=0))
    return None
