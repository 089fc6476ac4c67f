"""Late-scale token pruning: the transformer runs over a part of a map, the rest is restored.

A fast mode after FastVAR (arXiv 2503.23367, section 3), not part of STAR's paper: on late scales most tokens
repeat what the scale before already said. Tokens are ranked by how far their input lies from the map's mean,
the low frequency; the farthest are run, and the others' features are those of the scale before, enlarged.
Unlike FastVAR, which ranks and restores layer by layer, a token is run through all blocks or none, which needs
no copy of every layer's output; features are enlarged bilinearly.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .config import TokenMap


def run_count(tokens: int, share: float) -> int:
    """Return how many of a map's tokens are run where `share` of them is pruned; at least one."""
    return max(1, tokens - int(tokens * share))


def worth_running(x: Tensor, share: float, known: Tensor | None = None) -> Tensor:
    """Return the positions (R, m), rising, of the inputs (R, n, C) that differ most from their row's mean.

    known (R, n): tokens that are kept, whose logits nobody reads: they come last.
    """
    detail = (x.float() - x.float().mean(dim=1, keepdim=True)).norm(dim=-1)
    if known is not None:
        detail = detail.masked_fill(known, -1.0)
    chosen = detail.topk(run_count(x.shape[1], share), dim=1).indices
    rising: Tensor = chosen.sort(dim=1).values
    return rising


def take(x: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens (R, m, C) of x (R, n, C) at positions (R, m)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def restore(
    run: Tensor, positions: Tensor, earlier: Tensor, earlier_map: TokenMap, token_map: TokenMap
) -> Tensor:
    """Return features (R, n, C): run ones (R, m, C) at their positions, the earlier scale's enlarged elsewhere.

    earlier (R, n0, C) are the features of the scale before.
    """
    height, width = earlier_map
    grid = rearrange(earlier.float(), "r (h w) c -> r c h w", h=height, w=width)
    enlarged = F.interpolate(grid, size=token_map, mode="bilinear", align_corners=False)
    features = rearrange(enlarged, "r c h w -> r (h w) c").to(run.dtype)
    return features.scatter(1, positions.unsqueeze(-1).expand_as(run), run)
