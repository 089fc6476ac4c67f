"""Training pictures whose fine scales (or all) a model has drawn: the tokens that a decoder meets in use.

A decoder that has only seen own tokens takes every drawn one at its word, and shows the noise in them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantizer import MultiScaleQuantizer
from ..request import Options, ScaleStep
from ..star import Star

BATCH, BATCH_ON_A_GPU = 64, 512
"""Pictures drawn at once."""

log = logging.getLogger(__name__)


@torch.no_grad()
def redraw_last_scales(
    star: Star,
    quantizer: MultiScaleQuantizer,
    tokens: Tensor,
    captions: Sequence[str],
    *,
    count: int,
    schedule: str,
    seed: int,
) -> Tensor:
    """Return tokens (N, L) of pictures with N captions: the last `count` scales drawn, the others their own.

    tokens are the pictures' own (N, L), in the quantizer's codes. Raises ValueError for a schedule that draws
    smooth, whose tokens are not what is decoded, and for a count outside 1 to the number of scales.
    """
    maps = star.maps(None)
    given = len(maps) - count
    if not 0 <= given < len(maps):
        raise ValueError(f"of {len(maps)} scales the last 1 to {len(maps)} can be redrawn, not {count}")
    if any(policy.smooth for policy in star.schedule(schedule, maps).scales[given:]):
        raise ValueError(f"{schedule!r} draws smooth: a decoder needs a schedule that draws tokens")
    lengths = [h * w for h, w in maps[:given]]
    found = []
    batch = BATCH_ON_A_GPU if tokens.device.type == "cuda" else BATCH
    for start in range(0, len(tokens), batch):
        rows = range(start, min(start + batch, len(tokens)))
        own = tokens[rows.start : rows.stop, : sum(lengths)].split(lengths, dim=1)
        f_hats = quantizer.f_hats(own, maps) if given else ()
        prefix = tuple(
            ScaleStep(scale, maps[scale], part.long(), f_hat, given=True)
            for scale, (part, f_hat) in enumerate(zip(own, f_hats, strict=True))
        )
        options = Options(seed=seed, indices=tuple(rows), schedule=schedule, prefix=prefix)
        steps = star.generate([captions[row] for row in rows], options=options)
        found.append(torch.cat([step.tokens for step in steps], dim=1))
        log.info("%d of %d pictures redrawn from scale %d on", rows.stop, len(tokens), given)
    return torch.cat(found)
