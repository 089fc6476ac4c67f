"""Dropout while a transformer is trained: a share of what a block's attention and feed-forward add is left out.

The released training leaves out whole branches (DropPath, 0.1 at depth 24), which is next to nothing at a small
depth. The few thousand pictures of the shipped model are learnt by heart without more (NOTES.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .run import seed_of

DROPOUT = 3
"""What of a step's random numbers are for."""
BRANCH_ENDS = ("attn.proj", "cross_attn.proj", "ffn.contract")
"""The layers whose output a block adds to what it was given."""


class Dropout:
    """Leaves out a share of what blocks add, in training mode, and scales up the rest (arXiv 1207.0580)."""

    def __init__(self, blocks: Iterable[nn.Module], share: float, seed: int) -> None:
        """Take the blocks of a transformer or a causal sampler; a share of 0 leaves them alone."""
        self.share = share
        self._seed = seed
        if share > 0:
            for block in blocks:
                for name, layer in block.named_modules():
                    if name in BRANCH_ENDS:
                        layer.register_forward_hook(self._thinned)

    def begin(self, step: int) -> None:
        """Draw a step's numbers from (seed, step) alone, so that a resumed run leaves out the same."""
        if self.share > 0:
            # A recorded step reads the device's own generator alone; a stage of training has its process.
            torch.manual_seed(seed_of(self._seed, step, DROPOUT))  # noqa: TID251

    def _thinned(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, self.share, layer.training)
