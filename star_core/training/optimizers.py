"""What moves the weights: optimizers, their learning rate, and a step down a loss's gradient."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from .muon import Muon

LARGEST_GRADIENT = 2.0
WEIGHT_DECAY = 0.05
"""The share of itself that a weight loses at a step, times the rate."""


def rate_at(step: int, done: float, peak: float, *, warmup: int = 100, decay: float = 0.4) -> float:
    """Return the learning rate: linear warm-up, flat, then linear to 2 % over the last `decay` share.

    done: the share of the run that is behind. The flat middle lets a finished run be resumed with more steps
    without a second warm-up.
    """
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, max(0.0, (1 - done) / decay))
    return peak * rise * (0.02 + 0.98 * fall)


def adamw(
    parameters: Iterable[Tensor], rate: float, device: torch.device, *, betas: tuple[float, float], decay: float
) -> torch.optim.AdamW:
    """Return AdamW, whose steps can be recorded on a GPU."""
    on_gpu = device.type == "cuda"
    made = torch.optim.AdamW(parameters, rate, betas=betas, weight_decay=decay, capturable=on_gpu)
    return recordable(made, device)


Made = TypeVar("Made", bound=torch.optim.Optimizer)


def recordable(optimizer: Made, device: torch.device) -> Made:
    """Return an optimizer, new or loaded, with what changes from step to step where a recorded step reads it:
    rates and numbers of steps in tensors on a GPU."""
    on_gpu = device.type == "cuda"
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if on_gpu else rate
        if "capturable" in group:
            group["capturable"] = on_gpu
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].to(device)
    return optimizer


def muon_and_adamw(
    network: nn.Module, args: argparse.Namespace, device: torch.device, *, decay: float = WEIGHT_DECAY
) -> list[torch.optim.Optimizer]:
    """Return Muon over the blocks' matrices and AdamW over everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        inner = "blocks." in name and parameter.ndim == 2
        (matrices if inner else others).append(parameter)
    dtype = torch.bfloat16 if args.bfloat16 else None
    return [
        recordable(Muon(matrices, args.rate, weight_decay=decay, dtype=dtype), device),
        adamw(others, args.rate, device, betas=(0.9, 0.95), decay=decay),
    ]


def descend(loss: Tensor, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make a step down a loss's gradient, whose norm is cut to LARGEST_GRADIENT."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), LARGEST_GRADIENT)
    for optimizer in optimizers:
        optimizer.step()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate to rate times the group's own factor."""
    for group in optimizer.param_groups:
        own = rate * group.get("factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own
