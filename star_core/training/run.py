"""What every training stage shares: resumable state on disk, the learning-rate curve, averaged weights."""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transfer import upload
from ..weights import read_pickle

log = logging.getLogger(__name__)

LARGEST_GRADIENT = 2.0


Number = TypeVar("Number", int, float)


def _number(text: str, kind: Callable[[str], Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None


def _positive(text: str) -> int:
    if (number := _number(text, int)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is no number of steps: give 1 or more")
    return number


def positive_time(text: str) -> float:
    """Return an option's seconds or minutes. Raises argparse.ArgumentTypeError where no time is left."""
    found = _number(text, float)
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text} leaves no time: give more than 0")
    return found


def share(text: str) -> float:
    """Return an option's share. Raises argparse.ArgumentTypeError for one that is not from 0 to below 1."""
    found = _number(text, float)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give 0 to below 1")
    return found


def number_of_scales(text: str) -> int:
    """Return an option's number of scales. Raises argparse.ArgumentTypeError for one below 0."""
    if (number := _number(text, int)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is no number of scales: give 0 or more")
    return number


def training_seed(text: str) -> int:
    """Return an option's seed. Raises argparse.ArgumentTypeError for one that generators do not take."""
    found = _number(text, int)
    if not 0 <= found < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is no seed: give 0 to {2**32 - 1}")
    return found


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """Add how many processes make captions."""
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that make captions ahead, for a fast GPU"
    )


def add_compile_argument(parser: argparse.ArgumentParser) -> None:
    """Add whether the blocks' operations are fused."""
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="fuse the blocks' operations with torch.compile; on a CPU it needs a C++ compiler",
    )


def compile_blocks(args: argparse.Namespace, blocks: Iterable[nn.Module]) -> None:
    """Fuse each block's operations where it was asked for.

    Block by block: blocks are alike, and what is around them is little. A ninth shape (caption length, window
    or whole maps) would run unfused, torch says so then.
    """
    if args.compile:
        for block in blocks:
            block.compile(dynamic=False)


def add_run_arguments(parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float) -> None:
    """Add the options that every stage has."""
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and export")
    parser.add_argument("--steps", type=_positive, default=steps, help="total steps, resumed ones too")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate, help="peak learning rate")
    parser.add_argument("--seed", type=training_seed, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--log-every", type=int, default=20, help="steps between lines of progress")
    parser.add_argument(
        "--time-limit",
        type=positive_time,
        default=math.inf,
        help="seconds of training after which the run ends, before its steps: for a machine lent for minutes",
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="forward passes under bfloat16 autocast, for processors that have it",
    )


def precision(args: argparse.Namespace) -> torch.autocast:
    """Return the context of a stage's forward passes: bfloat16 autocast where it was asked for."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bfloat16)


def rate_at(step: int, done: float, peak: float, *, warmup: int = 100, decay: float = 0.4) -> float:
    """Return the learning rate: linear warm-up, flat, then linear to 2 % over the last `decay` share.

    done: the share of the run that is behind. The flat middle lets a finished run be resumed with more steps
    without a second warm-up.
    """
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, max(0.0, (1 - done) / decay))
    return peak * rise * (0.02 + 0.98 * fall)


class OwnPrecisionGroupNorm(nn.GroupNorm):
    """Group normalisation in its input's precision, with statistics in float32.

    Autocast would make all of it float32, twice the bytes of what is most of a step of the VQ-VAE on a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def operations_for(device: torch.device) -> ModuleType:
    """Return the layers of a VQ-VAE that is trained on a device."""
    if device.type != "cuda":
        return nn
    layers = ModuleType("layers")
    vars(layers).update(vars(nn) | {"GroupNorm": OwnPrecisionGroupNorm})
    return layers


class Average:
    """Exponential moving average of a module's parameters, the weights that are exported."""

    def __init__(self, module: nn.Module, keep: float) -> None:
        self.keep = keep
        self.steps = 0
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    def resume(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a stored state after `steps` updates, on the device where the parameters are."""
        for name, value in self.state.items():
            value.copy_(state[name])
        self.steps = steps

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present parameters in, faster at the start of a run."""
        self.steps += 1
        keep = min(self.keep, self.steps / (self.steps + 10))
        present = module.state_dict()
        moving = [name for name, value in present.items() if value.is_floating_point()]
        # One call for all: on a GPU a step would otherwise wait for hundreds of tiny ones.
        torch._foreach_lerp_([self.state[n] for n in moving], [present[n] for n in moving], 1 - keep)
        for name in present.keys() - moving:
            self.state[name].copy_(present[name])


@dataclass
class Checkpoint:
    """One resumable state on disk; saving is atomic, so that a kill leaves the last whole file."""

    path: Path
    step: int = 0
    saved: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Any] | None:
        """Return the stored state, or None where there is none yet."""
        if not self.path.exists():
            return None
        state = read_pickle(self.path)
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.saved = self.step
        log.info("resuming %s at step %d (%.0f s so far)", self.path, self.step, self.seconds)
        return dict(state)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state with the step and the seconds spent so far.

        What a stage exports is written before: killed between the two, it makes its last steps again.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = {**state, "step": self.step, "seconds": self.total_seconds()}
        part = self.path.with_suffix(".part")
        torch.save(whole, part)
        os.replace(part, self.path)
        self.saved = self.step

    def done(self, args: argparse.Namespace) -> float:
        """Return the share of a run that is behind: of its steps, or of its time where that is further."""
        return float(max(self.step / args.steps, self.total_seconds() / args.time_limit))

    def total_seconds(self) -> float:
        """Return the seconds of training, earlier sessions counted in."""
        return self.seconds + time.monotonic() - self.started


def shuffled_batches(count: int, batch: int, seed: int, first_step: int) -> Iterator[Tensor]:
    """Yield batches of indices below `count`, epoch by epoch, from step `first_step` on.

    Epoch e's order depends on (seed, e) alone, so that a resumed run sees what an unbroken one would.
    """
    if count < batch:
        raise ValueError(f"{count} pictures do not fill one batch of {batch}: lower --batch")
    per_epoch = count // batch
    step = first_step
    while True:
        epoch, within = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        for start in range(within, per_epoch):
            yield order[start * batch : (start + 1) * batch]
            step += 1


def generator_of(seed: int, step: int, purpose: int) -> torch.Generator:
    """Return the random numbers of a run's step for one purpose of several, whatever was drawn before."""
    (number,) = np.random.SeedSequence([seed, step, purpose]).generate_state(1)
    return torch.Generator().manual_seed(int(number))


class PictureStore:
    """All pictures, uint8 (N, H, W, 3), on the device that trains: a step copies none over."""

    def __init__(self, pictures: npt.NDArray[np.uint8], device: torch.device) -> None:
        self._pictures = torch.from_numpy(np.array(pictures)).to(device)

    def __len__(self) -> int:
        return len(self._pictures)

    def take(self, indices: Tensor | slice) -> Tensor:
        """Return the pictures at `indices` (B,) or in a slice as (B, 3, H, W) float32 in [-1, 1]."""
        if isinstance(indices, Tensor):
            indices = upload(indices, self._pictures.device)
        return self._pictures[indices].permute(0, 3, 1, 2).float().div(127.5).sub(1)


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


def restore(
    network: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: Mapping[str, Any], folder: Path
) -> None:
    """Go on from the "model" and "optimizers" of a checkpoint of the run in `folder`, on the network's device.

    Raises ValueError for one of another network.
    """
    try:
        network.load_state_dict(state["model"])
    except RuntimeError as error:
        difference = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"the run in {folder} was begun with a network of other sizes ({difference}): give the options that"
            " it began with, or another --run"
        ) from None
    device = next(network.parameters()).device
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
        recordable(optimizer, device)


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
