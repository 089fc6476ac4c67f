"""Dropout while a transformer is trained: a share of what a block's attention and feed-forward add is left out.

The released training leaves out whole branches (DropPath, 0.1 at depth 24), which is next to nothing at a small
depth. The few thousand pictures of the shipped model are learnt by heart without more (NOTES.md).

What is left out is computed from (seed, step, layer, place) by a hash, and no generator is asked: a resumed run
leaves out the same, on a CPU what a GPU does, and a recorded step reads what has changed from a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .run import Purpose, seed_of

BRANCH_ENDS = ("attn.proj", "cross_attn.proj", "ffn.contract")
"""The layers whose output a block adds to what it was given."""
BITS = 24
"""Of a hash, that are compared with the share."""


class Dropout:
    """Leaves out a share of what blocks add, in training mode, and scales up the rest (arXiv 1207.0580)."""

    def __init__(
        self, blocks: Iterable[nn.Module], share: float, seed: int, device: torch.device | None = None
    ) -> None:
        """Take the blocks of a transformer or a causal sampler; a share of 0 leaves them alone.

        Raises ValueError for a share that is none.
        """
        if not 0 <= share < 1:
            raise ValueError(f"{share:g} of what is added cannot be left out: give 0 to below 1")
        self._share = share
        self._seed = seed
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        layers = [layer for block in blocks for name, layer in block.named_modules() if name in BRANCH_ENDS]
        assert layers, f"no layer is called {BRANCH_ENDS}"
        if share > 0:
            for number, layer in enumerate(layers):
                layer.register_forward_hook(self._thinning(number))

    def begin(self, step: int) -> None:
        """Leave out from now on what a step leaves out."""
        self._step.fill_(seed_of(self._seed, step, Purpose.DROPOUT))

    def _thinning(self, number: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        # A tensor: compiled blocks that differ in a number would each be a version of their own.
        offset = torch.tensor(signed(number * 0x9E3779B97F4A7C15), device=self._step.device)

        def thinned(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not layer.training:
                return output
            assert output.numel() < 2**31, "there is a hash for each place"
            places = torch.arange(output.numel(), device=output.device).view(output.shape)
            # Seeds have 32 bits, places fewer: no two (seed, place) meet, and layers are far apart.
            hashes = hashed(places.add_(self._step << 31).add_(offset))
            kept = ((hashes >> (64 - BITS)) & ((1 << BITS) - 1)) >= round(self._share * 2**BITS)
            scaled: Tensor = output * kept / (1 - self._share)
            return scaled

        return thinned


def hashed(x: Tensor) -> Tensor:
    """Mix int64 numbers (...) well, where they lie: SplitMix64's finalizer (Steele et al., 2014)."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shifted(x, 27)).mul_(signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    # Without the sign, which `>>` alone would draw in.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def signed(number: int) -> int:
    """Return a number of 64 bits as what int64 takes it for; higher bits are dropped."""
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number
