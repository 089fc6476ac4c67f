"""Lessons with wrong tokens in them: a drawn scale has some, and the next ones are to make up for them.

Under teacher forcing a transformer sees right tokens alone. Here each picture's f_hat takes over wrong ones,
and what is left of the picture after them is what the next scales are asked for (Infinity's bitwise
self-correction, arXiv 2412.04431, section 3.4, for tokens of a codebook).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import TokenMap, token_count
from ..quantizer import MultiScaleQuantizer

NEIGHBOURS = 16
"""Codes nearest to the right one, of which a near miss takes any."""
NEAR_SHARE = 0.5
"""Of the wrong tokens: near misses. The others are another picture's at this place."""


class TokenCorruption:
    """Makes tokens wrong. Of each picture another share, from none up to `most`."""

    def __init__(self, quantizer: MultiScaleQuantizer, maps: Sequence[TokenMap], most: float) -> None:
        """Raises ValueError for a share that is none."""
        if not 0 <= most < 1:
            raise ValueError(f"{most:g} of the tokens cannot be wrong: give 0 to below 1")
        self.most = most
        self._lengths = [h * w for h, w in maps]
        self._tokens = token_count(maps)
        with torch.no_grad():
            codes = quantizer.codebook_vectors(quantizer.codebook.weight.device)
            count = min(NEIGHBOURS + 1, len(codes))
            # The nearest of all is the code itself.
            self._neighbours = torch.cdist(codes, codes).topk(count, largest=False).indices[:, 1:]

    def chances(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return a number (B, L) per token, on the CPU, below 0 where it is to be wrong.

        It is a random one in [0, 1) over the picture's share, less 1.
        """
        shares = torch.rand(batch, 1, generator=generator) * self.most
        drawn = torch.rand(batch, self._tokens, generator=generator)
        return drawn / shares.clamp_min(1e-6) - 1

    def of(self, chances: Tensor) -> Callable[[int, Tensor], Tensor]:
        """Return what `MultiScaleQuantizer.quantize` asks for the tokens it shows, of chances (B, L)."""
        by_scale = chances.split(self._lengths, dim=1)

        def shown(scale: int, tokens: Tensor) -> Tensor:
            chance = by_scale[scale]
            # Evenly in [0, 1) among the near misses, which are the ones below NEAR_SHARE - 1.
            which = ((chance + 1) / NEAR_SHARE).clamp(0, 1 - 1e-6) * self._neighbours.shape[1]
            near = self._neighbours[tokens].gather(2, which.long().unsqueeze(2)).squeeze(2)
            others = tokens.roll(1, dims=0)
            wrong = torch.where(chance < NEAR_SHARE - 1, near, others)
            return torch.where(chance < 0, wrong, tokens)

        return shown
