"""A training step recorded once and then repeated: on a GPU the host would otherwise hold every step up.

A step of these small networks is thousands of kernels of some microseconds, and a host starts one in five to
forty. As a CUDA graph it is one call. What is recorded is the function that a CPU runs; the batch is handed
over by copying it to where the recorded one was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..graphs import CudaRecorder, Recorder, Recording

UNRECORDED = 3
"""First steps of every shape: optimizers and libraries then make what they make on first use."""

Step = Callable[..., tuple[Tensor, ...]]
"""From a batch's tensors, and what is fixed when a step is recorded, to figures to be shown: forward and
backward pass and the optimizer's step. It reads no value back; all that changes between steps is tensors."""


class RecordedStep:
    """A training step on a device. With a recorder, each shape of batch is recorded after its first steps."""

    def __init__(self, step: Step, recorder: Recorder | None) -> None:
        self._step = step
        self._recorder = recorder
        self._ran: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, tuple[Recording, list[Tensor], tuple[Tensor, ...]]] = {}
        if recorder is not None:
            recorder.start()

    def __call__(self, *batch: Tensor, **fixed: Any) -> tuple[Tensor, ...]:
        """Make a step. What it returns is overwritten by the next one."""
        if self._recorder is None:
            return self._step(*batch, **fixed)
        shape = (*((x.shape, x.dtype, x.stride()) for x in batch), *sorted(fixed.items()))
        with self._recorder.ready():
            if shape not in self._recorded and self._ran[shape] < UNRECORDED:
                self._ran[shape] += 1
                return self._step(*batch, **fixed)
            if shape not in self._recorded:
                self._recorded[shape] = self._record(batch, fixed)
            recording, held, figures = self._recorded[shape]
            torch._foreach_copy_(held, list(batch))
            recording.replay()
        return figures

    def _record(
        self, batch: tuple[Tensor, ...], fixed: dict[str, Any]
    ) -> tuple[Recording, list[Tensor], tuple[Tensor, ...]]:
        assert self._recorder is not None, "only then is anything recorded"
        self._recorder.rest()
        held = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in batch]
        torch._foreach_copy_(held, list(batch))
        recording = self._recorder.new()
        with ExitStack() as begun:
            begun.enter_context(recording)
            figures = self._step(*held, **fixed)
        return recording, held, figures


def recorder_for(device: torch.device) -> Recorder | None:
    """Return what records training steps on a device: none on a CPU, which waits for no host."""
    return CudaRecorder(device) if device.type == "cuda" else None
