"""From the host's memory to a device, without waiting for what the device is still doing."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. One on the CPU goes to a GPU by way of page-locked memory: from other
    memory, the copy would first wait for all the work that the GPU was given."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
