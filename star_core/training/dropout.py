"""Dropout while a transformer is trained: a share of what a block's attention and feed-forward add is left out.

The released training leaves out whole branches (DropPath, 0.1 at depth 24), which is next to nothing at a small
depth. The few thousand pictures of the shipped model are learnt by heart without more (NOTES.md).

What is left out is computed from (seed, step, layer, place) by a hash, and no generator is asked: a resumed run
leaves out the same, on a CPU what a GPU does, and a recorded step reads what has changed from a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .run import seed_of

DROPOUT = 3
"""What of a step's random numbers are for."""
BRANCH_ENDS = ("attn.proj", "cross_attn.proj", "ffn.contract")
"""The layers whose output a block adds to what it was given."""
BITS = 24
"""Of a hash, that are compared with the share."""


class Dropout:
    """Leaves out a share of what blocks add, in training mode, and scales up the rest (arXiv 1207.0580)."""

    def __init__(
        self, blocks: Iterable[nn.Module], share: float, seed: int, device: torch.device | None = None
    ) -> None:
        """Take the blocks of a transformer or a causal sampler; a share of 0 leaves them alone."""
        self._share = share
        self._seed = seed
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        layers = [layer for block in blocks for name, layer in block.named_modules() if name in BRANCH_ENDS]
        if share > 0:
            for number, layer in enumerate(layers):
                layer.register_forward_hook(self._thinning(number))

    def begin(self, step: int) -> None:
        """Leave out from now on what a step leaves out."""
        self._step.fill_(seed_of(self._seed, step, DROPOUT))

    def _thinning(self, number: int) -> Any:
        def thinned(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not layer.training:
                return output
            places = torch.arange(output.numel(), device=output.device).view(output.shape)
            # Seeds have 32 bits and places fewer: no two (seed, place) meet, layers are far apart.
            hashes = hashed(places + (self._step << 31) + signed(number * 0x9E3779B97F4A7C15))
            kept = ((hashes >> (64 - BITS)) & ((1 << BITS) - 1)) >= round(self._share * 2**BITS)
            scaled: Tensor = output * kept / (1 - self._share)
            return scaled

        return thinned


def hashed(x: Tensor) -> Tensor:
    """Return int64 numbers (...) well mixed: SplitMix64's finalizer (Steele et al., 2014)."""
    x = (x ^ _shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    # Without the sign, which `>>` alone would draw in.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(number: int) -> int:
    """Return a number of 64 bits as what int64 takes it for; higher bits are dropped."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number
