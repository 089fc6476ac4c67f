"""Weights that do not all fit a GPU: some blocks' matrices lie in the host's memory and come for their turn.

Streamed blocks share two places in GPU memory: while one computes, the next one's matrices are copied on a
stream of their own. A block's parameters are views of its place, so that the very kernels run that would run if
all were there: equal pictures. What is read outside a block's forward pass (the text's keys and values) stays.
Small scales wait for the bus, large ones hide it: a picture reads the streamed weights once per scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .causal_sampler import CausalSampler
from .config import StarConfig
from .memory import decoding_bytes, drawing_bytes
from .text_encoder import TextEncoder
from .transformer import Transformer
from .vqvae import VQVAE

PLACES = 2
ALIGNMENT = 256
"""Bytes, as torch's allocator aligns: products choose their kernels by it."""
STAYS = "cross_attn.kv.weight"
"""A block's matrix that is read before its forward pass, once per prompt."""


@dataclass(frozen=True)
class _Matrix:
    """A parameter of a module, and where its elements lie in the block's piece."""

    owner: nn.Module
    name: str
    shape: torch.Size
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()

    def of(self, piece: Tensor) -> Tensor:
        return piece[self.start : self.stop].view(self.shape)


def _matrices(block: nn.Module) -> list[_Matrix]:
    """Return what is streamed of a block, one behind the other."""
    found: list[_Matrix] = []
    for path, parameter in block.named_parameters():
        if parameter.ndim == 2 and path != STAYS:
            step = max(1, ALIGNMENT // parameter.element_size())
            start = -(-found[-1].stop // step) * step if found else 0
            owner, _, name = path.rpartition(".")
            found.append(_Matrix(block.get_submodule(owner), name, parameter.shape, start))
    return found


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class StreamedBlocks:
    """The matrices of blocks that run one after the other, in the host's memory; `copied` counts bytes."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.copied = 0
        self.number = len(blocks)
        self._device = device
        self._cuda = device.type == "cuda"
        layouts = [_matrices(block) for block in blocks]
        self._hosts = [self._packed(matrices) for matrices in layouts]
        largest = max(len(host) for host in self._hosts)
        number = min(PLACES, len(blocks))
        dtype = self._hosts[0].dtype
        self._places = [torch.empty(largest, dtype=dtype, device=device) for _ in range(number)]
        self._held: list[int | None] = [None] * number
        if self._cuda:
            self._copies = torch.cuda.Stream(device)
            self._copies.wait_stream(torch.cuda.current_stream(device))
            self._ready = [torch.cuda.Event() for _ in range(number)]
            self._done = [torch.cuda.Event() for _ in range(number)]
        for index, (block, matrices) in enumerate(zip(blocks, layouts, strict=True)):
            for matrix in matrices:
                view = matrix.of(self._places[index % number])
                setattr(matrix.owner, matrix.name, nn.Parameter(view, requires_grad=False))
            self._watch(block, index)

    def _packed(self, matrices: Sequence[_Matrix]) -> Tensor:
        """Return matrices in one piece of the host's memory, from where a GPU fetches without its help."""
        whole = [matrix.owner.get_parameter(matrix.name) for matrix in matrices]
        kinds = {parameter.dtype for parameter in whole}
        assert len(kinds) == 1, f"a block's matrices share a dtype, these have {kinds}"
        host = torch.zeros(matrices[-1].stop, dtype=kinds.pop(), pin_memory=self._cuda)
        for matrix, parameter in zip(matrices, whole, strict=True):
            matrix.of(host).copy_(parameter.detach())
        return host

    def _watch(self, block: nn.Module, index: int) -> None:
        def before(*_: object) -> None:
            self._bring(index)

        def after(*_: object) -> None:
            if self._cuda:
                self._done[index % len(self._places)].record(torch.cuda.current_stream(self._device))

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after, always_call=True)

    def _bring(self, index: int) -> None:
        """Have a block's matrices in their place before it computes, and the next one's on the way."""
        place = index % len(self._places)
        self._copy(index)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._ready[place])
        following = (index + 1) % len(self._hosts)
        if following % len(self._places) != place:
            self._copy(following)

    def _copy(self, index: int) -> None:
        place, host = index % len(self._places), self._hosts[index]
        if self._held[place] == index:
            return
        self._held[place] = index
        self.copied += host.nbytes
        target = self._places[place][: len(host)]
        if not self._cuda:
            target.copy_(host)
            return
        target.record_stream(self._copies)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._done[place])  # until whoever was there has computed
            target.copy_(host, non_blocking=True)
            self._ready[place].record(self._copies)


def least_room(transformer: Transformer) -> int:
    """Return the bytes that a transformer takes on the GPU with all blocks streamed."""
    piece = _piece_bytes(transformer)
    return tensor_bytes(transformer) + (PLACES - len(transformer.blocks)) * piece


def _piece_bytes(transformer: Transformer) -> int:
    return max(sum(m.owner.get_parameter(m.name).nbytes for m in _matrices(b)) for b in transformer.blocks)


def streamed_count(transformer: Transformer, room: int) -> int:
    """Return how many blocks must be streamed for a transformer to take `room` bytes.

    Raises ValueError where even two blocks at a time are too many.
    """
    whole, piece, depth = tensor_bytes(transformer), _piece_bytes(transformer), len(transformer.blocks)
    if whole <= room:
        return 0
    count = -(-(whole + PLACES * piece - room) // piece)
    count += count % PLACES  # neighbours in turn never share a place, the last one and the first included
    if count > depth and least_room(transformer) <= room:
        count = depth
    if count > depth:
        raise ValueError(f"{room} bytes are too few for these weights: {least_room(transformer)} at least")
    return count


def stream_weights(transformer: Transformer, room: int, device: torch.device) -> StreamedBlocks | None:
    """Move a transformer to a device, `room` bytes of it at most; the rest is streamed. None: all is there.

    Streamed blocks are spread evenly among those that stay, so that copies go on meanwhile.
    Raises ValueError where even two blocks at a time are too many.
    """
    depth, count = len(transformer.blocks), streamed_count(transformer, room)
    chosen = [b for i, b in enumerate(transformer.blocks) if (i + 1) * count // depth > i * count // depth]
    streamed = StreamedBlocks(chosen, device) if chosen else None
    transformer.to(device)
    return streamed


@dataclass(frozen=True)
class Parts:
    """What a model is made of, and its configuration."""

    config: StarConfig
    transformer: Transformer
    causal_sampler: CausalSampler | None
    vqvae: VQVAE
    encoder: TextEncoder

    def beside(self) -> int:
        """Return the bytes that one guided picture of the trained size takes beside the transformer's weights.

        Text is read before the cache is there, and decoded when it is gone.
        """
        config, itemsize = self.config, self.transformer.dtype.itemsize
        drawing = drawing_bytes(config.transformer, config.maps, 1, guided=True, itemsize=itemsize)
        decoding = decoding_bytes(config.vqvae, config.maps[-1], 1, itemsize=itemsize)
        stay = sum(map(tensor_bytes, self._stay()))
        return stay + max(drawing, decoding, tensor_bytes(self.encoder))

    def least(self) -> int:
        """Return the fewest bytes in which such a picture can be drawn."""
        return self.beside() + least_room(self.transformer)

    def fit_into(self, memory: int, device: torch.device) -> StreamedBlocks | None:
        """Bring everything to where it must be for such a picture to take `memory` bytes of the device.

        Raises ValueError saying how much it takes at least.
        """
        if memory < self.least():
            height, width = self.config.resolution
            raise ValueError(
                f"{memory / 1e9:.2f} GB are too little for a picture of {width}x{height} by {self.config.name}"
                f" in {str(self.transformer.dtype).removeprefix('torch.')}:"
                f" {self.least() / 1e9 + 0.005:.2f} GB is the least that works"
            )
        for part in self._stay():
            part.to(device)
        keep_on_host(self.encoder, pinned=device.type == "cuda")
        return stream_weights(self.transformer, memory - self.beside(), device)

    def _stay(self) -> list[nn.Module]:
        return [part for part in (self.causal_sampler, self.vqvae) if part is not None]


def keep_on_host(module: nn.Module, *, pinned: bool) -> None:
    """Move a module's tensors to the host's memory, where a GPU can fetch them fast."""
    for tensor in (*module.parameters(), *module.buffers()):
        host = tensor.data.to("cpu")
        tensor.data = host.pin_memory() if pinned else host


@contextlib.contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module's tensors on a device within the block; afterwards they are where they were."""
    tensors = (*module.parameters(), *module.buffers())
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home
