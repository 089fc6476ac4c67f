"""CUDA graphs: a scale's work recorded once, then repeated over the same memory without the host's help.

A picture of 14 scales is tens of thousands of small kernels; repeated as graphs, the host starts each scale
with one call. What is recorded is the very function that runs without graphs, over memory that stays: a
`Recording` only remembers what the device did. `CudaGraph` is CUDA's own; `Tape` is the reference beside it,
which repeats recorded operations over the recorded tensors on any device, the CPU too, under the same rules:
nothing that the host computed meanwhile reaches the device, and no value comes back but at a look.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

Result = TypeVar("Result")
Kept = TypeVar("Kept", bound="Forgettable")

Look = Callable[[Tensor | None], bool]
"""How a scale's work lets the host look at a flag; None: where whoever was told to stop goes on."""


class Forgettable(Protocol):
    """Memory that can be let go."""

    def forget(self) -> None: ...


class Recording(Protocol):
    """Device work that ran, or was captured, in a with-block, and can be repeated."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None: ...

    def replay(self) -> None:
        """Repeat the work over the memory it was recorded with."""


def look_at_once(flag: Tensor | None) -> bool:
    """Return a flag's value: how work that is not recorded looks."""
    return flag is not None and bool(flag)


def never(flag: Tensor | None) -> bool:
    """Never stop: how the run before a recording sees every step."""
    return False


class Recorder(Protocol):
    """Makes recordings, for one canvas after another."""

    def start(self) -> None:
        """Begin with the recordings of another canvas; those of the last one are gone."""

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Be, in a with-block, where recordings are made and where work runs before them."""

    def rest(self) -> None:
        """Give back the scratch memory of work that ran before a recording."""

    def new(self) -> Recording:
        """Return a recording that has not begun."""


class CudaGraph:
    """A CUDA graph. Nothing runs while it is captured; graphs of one pool share their scratch memory."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads ask of the GPU meanwhile, a server's or a preview's, is their affair.
        self._capture = torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )

    def __enter__(self) -> CudaGraph:
        self._capture.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._capture.__exit__(kind, error, traceback)

    def replay(self) -> None:
        """Start the graph on the current stream."""
        self._graph.replay()


class CudaRecorder:
    """Makes CUDA graphs that share a memory pool, on one stream of their own.

    A stream of their own: cuBLAS keeps a workspace per stream, which graphs know by address, and torch frees
    that of a graph's stream with the graph. The work that runs before a recording uses the same one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def start(self) -> None:
        """Take a new memory pool: one whose graphs are gone is not taken up again."""
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Make the recordings' device and stream the current ones; outside, wait for what was begun here."""
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            # Left whatever happens: a capture that breaks off does not leave its own stream.
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:  # what was begun may still write where the next work is given memory
                here.wait_stream(self._stream)

    def rest(self) -> None:
        """Give the device back what torch's allocator keeps unused: no other work would get this stream's."""
        torch.cuda.empty_cache()

    def new(self) -> CudaGraph:
        """Return a graph that is not captured yet."""
        return CudaGraph(self._pool, self._stream)


class Tape(TorchDispatchMode):
    """Operations with the tensors they read and wrote: what a CUDA graph is, on any device.

    Raises RuntimeError where the host reads a value, or where random numbers are drawn that would be new each
    time: no CUDA graph could hold that. Not seen: copies from the host's memory, and work that reads what
    another piece has overwritten, since every tensor here keeps its own memory.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _asks_the_device(func, args):
            raise RuntimeError(f"{func} reads a value back from the device: no graph can hold it")
        # Attention bears this tag for its dropout, which is off here.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            raise RuntimeError(f"{func} draws random numbers: a graph would draw other ones each time")
        result = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat every operation, those of a backward pass too; its result goes where it went before."""
        for func, args, kwargs, result in self._operations:
            fresh, before = (tree_flatten(r)[0] for r in (func(*args, **kwargs), result))
            for new, old in zip(fresh, before, strict=True):
                if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


class Tapes:
    """Makes tapes, of any device's work."""

    def __init__(self, device: torch.device) -> None:
        pass

    def start(self) -> None:
        """Nothing: tapes share nothing."""

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Be where one is: tapes are made anywhere."""
        return contextlib.nullcontext()

    def rest(self) -> None:
        """Nothing: tapes keep their tensors."""

    def new(self) -> Tape:
        """Return an empty tape."""
        return Tape()


def _asks_the_device(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation's result, or the shape of it, is known to the host only once the device is done."""
    if func in _INDEXED:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


class Program(Generic[Result]):
    """One scale's work, in pieces between which the host may look at a flag. It is run once before."""

    def __init__(self, recorder: Recorder, work: Callable[[Look], Result]) -> None:
        self._recorder = recorder
        self._work = work  # holds the memory that was handed in, which a CUDA graph knows by address alone
        self._pieces: list[Recording] = []
        self._flags: list[Tensor | None] = []
        with recorder.ready():
            work(never)  # libraries have then what they make on first use
            recorder.rest()
            with contextlib.ExitStack() as self._open:
                self._begin()
                self.result = work(self._cut)

    def _begin(self) -> None:
        piece = self._recorder.new()
        self._open.enter_context(piece)
        self._pieces.append(piece)

    def _cut(self, flag: Tensor | None) -> bool:
        """End a piece and begin the next; the work goes on as if the flag were down."""
        self._open.close()
        self._flags.append(flag)
        self._begin()
        return False

    def replay(self) -> Result:
        """Repeat the work. Where a flag is up, only the last piece is left to do."""
        for piece, flag in zip(self._pieces[:-1], self._flags, strict=True):
            piece.replay()
            if look_at_once(flag):
                break
        self._pieces[-1].replay()
        return self.result


class Replays(Generic[Kept]):
    """The memory and the programs of the last shape of work; one run at a time uses them."""

    def __init__(self, make_recorder: Callable[[torch.device], Recorder] = CudaRecorder) -> None:
        self._make_recorder = make_recorder
        self._recorder: Recorder | None = None
        self._device: torch.device | None = None
        self._shape: Hashable = None
        self._kept: Kept | None = None
        self._programs: dict[int, Program[Any]] = {}
        self._free = threading.Lock()

    @contextlib.contextmanager
    def opened(self, shape: Hashable, device: torch.device, make: Callable[[], Kept]) -> Iterator[Kept | None]:
        """Lend what is kept for a shape of work, made anew where the last one was another.

        None while another run has it. After an error nothing is kept; a run that is given up leaves all.
        """
        if not self._free.acquire(blocking=False):
            yield None
            return
        try:
            if self._kept is None or shape != self._shape:
                self.forget()
                if self._recorder is None or self._device != device:
                    self._recorder, self._device = self._make_recorder(device), device
                self._recorder.start()
                self._kept, self._shape = make(), shape
            yield self._kept
        except GeneratorExit:
            raise
        except BaseException:
            self.forget()
            raise
        finally:
            self._free.release()

    def forget(self) -> None:
        """Let go of memory and programs."""
        self._programs.clear()
        if self._kept is not None:
            self._kept.forget()
        self._kept = None

    def run(self, scale: int, work: Callable[[Look], Result]) -> Result:
        """Do a scale's work, from its recording where there is one. The next run overwrites the result."""
        if scale not in self._programs:
            assert self._recorder is not None, "a run opens the memory first"
            self._programs[scale] = Program(self._recorder, work)
        result: Result = self._programs[scale].replay()
        return result


class Pace:
    """Keeps the host at most one scale ahead of the device, so that previews and cancelling are in time."""

    AHEAD = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None

    def before_scale(self) -> None:
        """Wait until all scales but the last AHEAD ones that were started are done."""
        while self._events is not None and len(self._events) > self.AHEAD:
            self._events.pop(0).synchronize()

    def after_scale(self) -> None:
        """Remember that a scale was started."""
        if self._events is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
