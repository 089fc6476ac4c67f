"""From the host's memory to a device, without waiting for what the device still does; which devices compute."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. One on the CPU goes to a GPU by way of page-locked memory: from other
    memory, the copy would first wait for all the work that the GPU was given."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def why_unusable(device: str) -> str | None:
    """Return in a line why nothing can be computed on a device of this name, None where it can."""
    try:
        torch.zeros(1, device=device).item()  # no number comes back from a device such as meta
    except (RuntimeError, AssertionError, ImportError) as error:
        first, _, _ = str(error).partition("\n")
        return f"{first:.120}"
    return None
