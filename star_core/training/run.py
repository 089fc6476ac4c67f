"""What every training stage shares: its steps, resumable state on disk, averaged weights."""

from __future__ import annotations

import argparse
import enum
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transfer import upload
from ..weights import read_pickle
from .optimizers import rate_at, recordable, set_rate

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")


def compile_blocks(args: argparse.Namespace, blocks: Iterable[nn.Module]) -> None:
    """Fuse each block's operations where it was asked for.

    Block by block: blocks are alike, and what is around them is little. A ninth shape (caption length, window
    or whole maps) would run unfused, torch says so then. torch 2.4 compiles every block apart.
    """
    if args.compile:
        for block in blocks:
            block.compile(dynamic=False)


def use_threads(args: argparse.Namespace) -> None:
    """Let torch use as many CPU threads as a stage's options allow."""
    if args.threads:
        torch.set_num_threads(args.threads)


def precision(args: argparse.Namespace) -> torch.autocast:
    """Return the context of a stage's forward passes: bfloat16 autocast where it was asked for."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bfloat16)


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
    if not 1 <= batch <= count:
        raise ValueError(f"{count} pictures do not fill one batch of {batch}: choose another --batch")
    per_epoch = count // batch
    step = first_step
    while True:
        epoch, within = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        for start in range(within, per_epoch):
            yield order[start * batch : (start + 1) * batch]
            step += 1


class Purpose(enum.IntEnum):
    """What a step's random numbers are for: each purpose has its own."""

    WINDOW = 1
    CORRUPTION = 2
    DROPOUT = 3
    PICTURES = 4


def generator_of(seed: int, step: int, purpose: Purpose) -> torch.Generator:
    """Return the random numbers of a run's step for one purpose of several, whatever was drawn before."""
    return torch.Generator().manual_seed(seed_of(seed, step, purpose))


def seed_of(seed: int, step: int, purpose: Purpose) -> int:
    """Return the seed of a run's step for one purpose of several."""
    (number,) = np.random.SeedSequence([seed, step, purpose]).generate_state(1)
    return int(number)


@dataclass(frozen=True)
class TrainingStep(Generic[Batch]):
    """A step to be made: its number, the share of the run that is behind, its batch, whether it is told of."""

    number: int
    done: float
    batch: Batch
    told: bool


class TrainingRun:
    """A network on its way: its optimizers, its averaged weights, the checkpoint that its run resumes from."""

    def __init__(
        self,
        args: argparse.Namespace,
        network: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        keep: float,
    ) -> None:
        """keep: the share of the averaged weights that a step leaves as they are."""
        self._args = args
        self._network = network
        self._optimizers = optimizers
        try:
            args.run.mkdir(parents=True, exist_ok=True)  # not first when hours are to be saved
        except OSError as error:
            raise ValueError(f"--run {args.run} can be no folder: {error.strerror}") from None
        self.average = Average(network, keep)
        self.checkpoint = Checkpoint(args.run / "checkpoint.pt")

    @property
    def step(self) -> int:
        """How many steps are made."""
        return self.checkpoint.step

    def resume(self) -> dict[str, Any] | None:
        """Go on from the checkpoint and return all that it holds, None where there is none."""
        state = self.checkpoint.load()
        if state is not None:
            restore(self._network, self._optimizers, state, self._args.run)
            self.average.resume(state["average"], self.step)
        return state

    def save(self, more: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint, with what else a stage resumes from."""
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        state = {"model": self._network.state_dict(), "optimizers": optimizers, "average": self.average.state}
        self.checkpoint.save({**state, **(more or {})})

    def start_clock(self) -> None:
        """Count a run's seconds from now on: what was prepared is no training."""
        self.checkpoint.started = time.monotonic()

    def steps(self, batches: Iterable[Batch], save: Callable[[], None]) -> Iterator[TrainingStep[Batch]]:
        """Yield the steps that are left, with their learning rates set; `save` at times and at the end.

        A run that ends before its first step is saved as well.
        """
        for batch in batches:
            step, done = self.step, self.checkpoint.done(self._args)
            if done >= 1:
                break
            for optimizer in self._optimizers:
                set_rate(optimizer, rate_at(step, done, self._args.rate))
            yield TrainingStep(step, done, batch, step % self._args.log_every == 0)
            self.average.update(self._network)
            self.checkpoint.step += 1
            if self.step % self._args.save_every == 0:
                save()
        if self.step > self.checkpoint.saved or not self.checkpoint.path.exists():
            save()

    def tell(self, figures: str) -> None:
        """Log a step's figures, with its number and the run's seconds."""
        log.info("step %d %.0f s %s", self.step, self.checkpoint.total_seconds(), figures)


def check_same_sides(args: argparse.Namespace, state: Mapping[str, Any]) -> None:
    """Raise ValueError for a checkpoint of other scales; runs from before they were stored say none."""
    if (sides := state.get("sides", args.sides)) != args.sides:
        began = " ".join(map(str, sides))
        raise ValueError(f"the run in {args.run} was begun with --sides {began}: give those, or another --run")


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
    # Runs of the tokenizer and the decoder had a single one once.
    kept = state["optimizers"] if "optimizers" in state else [state["optimizer"]]
    for optimizer, stored in zip(optimizers, kept, strict=True):
        asked = [group["weight_decay"] for group in optimizer.param_groups]
        optimizer.load_state_dict(stored)
        # As the rate, it is what the run is asked for now.
        for group, decay in zip(optimizer.param_groups, asked, strict=True):
            group["weight_decay"] = decay
        recordable(optimizer, device)
