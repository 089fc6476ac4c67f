"""The door to fused kernels: plain PyTorch is the reference, and a kernel stands in where it can.

`fused` names the kernels beside a function. A GPU's takes a call that needs no gradients where Triton can build
it, a CPU's a call where gradients are off: it works in place. Every other call runs the function itself. This
module knows no Triton: the kernels' modules are imported at the first call that they may take.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEVICES = ("cuda",)
"""Types of devices that a GPU's kernels run on."""
CPU = ("cpu",)
NO_ROOM = ("out of memory", "ALLOC_FAILED")
"""What errors say that only mean a full device."""

_log = logging.getLogger(__name__)
_wanted: ContextVar[bool] = ContextVar("wanted", default=True)
_given_up: set[str] = set()


@contextlib.contextmanager
def references_only() -> Iterator[None]:
    """Run the references in a with-block, in this thread. Graphs repeat what they were recorded with."""
    before = _wanted.set(False)
    try:
        yield
    finally:
        _wanted.reset(before)


def given_up() -> tuple[str, ...]:
    """Return a GPU's kernels that could not be built: this process runs their references from then on."""
    return tuple(sorted(_given_up))


def fused(
    kernel: str | None = None, *, on_cpu: str | None = None
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Mark a function as the reference of a GPU's `kernel`, "module.function" in this package, and of a CPU's.

    A kernel has the function's arguments, its tensors first and by position, and returns the same, or None for
    shapes and dtypes that it does not take. Until then it changes nothing. A GPU's may fail to be built, and
    the function serves instead. A CPU's is PyTorch, and may use up tensors of which the function says so: its
    errors are the caller's, since what it has begun cannot be begun again.
    """

    def mark(reference: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(reference)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            made: Result | None = None
            if _may_take(args, kernel, DEVICES):
                made = _by_kernel(str(kernel), args, kwargs)
            elif _may_take(args, on_cpu, CPU):
                made = _named(str(on_cpu))(*args, **kwargs)
            return reference(*args, **kwargs) if made is None else made

        return run

    return mark


def _may_take(args: Sequence[object], kernel: str | None, devices: Sequence[str]) -> bool:
    """Whether a kernel for these types of devices is there for a call with these arguments."""
    first = args[0] if args else None
    if kernel is None or not isinstance(first, Tensor) or first.device.type not in devices:
        return False
    # torch.compile fuses a reference's operations itself.
    if torch.compiler.is_compiling() or not _wanted.get() or kernel in _given_up:
        return False
    if torch.is_grad_enabled():
        if devices is CPU:
            return False
        tensors = [a for a in args if isinstance(a, Tensor)]
        layers = [a for a in args if isinstance(a, nn.Module)]
        weights = [parameter for layer in layers for parameter in layer.parameters()]
        if any(t.requires_grad for t in (*tensors, *weights)):
            return False
    # A mode wants to see PyTorch's operations: a tape would miss what a kernel writes.
    return _get_current_dispatch_mode() is None


@functools.cache
def _named(kernel: str) -> Callable[..., Any]:
    module, function = kernel.split(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f".{module}", __name__), function)
    return found


def _by_kernel(kernel: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return a kernel's result; None where it does not take the arguments, or cannot be built."""
    try:
        # Triton starts kernels on the current device, wherever the tensors are.
        with torch.cuda.device_of(args[0]):
            return _named(kernel)(*args, **kwargs)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        if any(said in str(error) for said in NO_ROOM):
            return None  # this once: Triton and cuBLAS have no class for it
        # No compiler, an old GPU, another Triton: builds fail in more ways than can be named, and none of them
        # is the user's affair, since the reference gives the same picture.
        _given_up.add(kernel)
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        level = logging.INFO if missing else logging.WARNING
        _log.log(level, "No fused kernel %s, PyTorch's operations serve instead: %s", kernel, error)
        _log.debug("How it failed", exc_info=error)
        return None
