"""A loaded model as what the measures draw and reconstruct with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..request import Options
from ..sampling import PictureSeed
from ..star import Star
from .inception import Pictures, check_pictures

_BATCH = 32

_log = logging.getLogger(__name__)


class StarArtist:
    """Draws captions and reconstructs pictures with a `Star`, uint8 arrays out and in."""

    def __init__(self, star: Star, size: int, name: str | None = None) -> None:
        """Take the model, the side of its pictures in pixels, and what reports call it (its own name)."""
        self.star = star
        self.size = size
        self.name = name or star.config.name

    def check(self, schedule: str, seed: int) -> None:
        """Raise ValueError for what `draw` would refuse; nothing is drawn."""
        PictureSeed(seed)
        maps = self.star.maps((self.size, self.size))
        try:
            self.star.schedule(schedule, maps)
        except ValueError as error:
            raise ValueError(f"{self.name} cannot draw by {schedule!r}: {error}") from None

    def draw(self, captions: Sequence[str], schedule: str, seed: int) -> Pictures:
        """Return one picture (size, size, 3) per caption, drawn by a preset or a schedule text.

        Picture i has the noise of (seed, i): one index for all would give all of them one noise,
        and their distribution would be narrower than the model's.
        """
        options = Options(seed=seed, schedule=schedule, size=(self.size, self.size))
        drawn: list[Pictures] = []
        for start in range(0, len(captions), _BATCH):
            batch = list(captions[start : start + _BATCH])
            seeds = tuple(PictureSeed(seed, start + row) for row in range(len(batch)))
            request = dataclasses.replace(self.star.request(batch, options=options), seeds=seeds)
            *_, last = self.star.run(request)
            drawn.append(_to_array(self.star.decode(last.f_hat)))
            _log.info("%s: %d of %d pictures", schedule, start + len(batch), len(captions))
        return np.concatenate(drawn)

    def reconstruct(self, pictures: Pictures) -> Pictures:
        """Return pictures (N, H, W, 3) as the tokenizer gives them back from their tokens."""
        check_pictures(pictures)
        blocks = torch.from_numpy(np.array(pictures)).split(_BATCH)
        return np.concatenate([self._reconstruct(block) for block in blocks])

    def _reconstruct(self, block: Tensor) -> Pictures:
        """Return uint8 pictures (B, H, W, 3) after all scales of the tokenizer."""
        channels = rearrange(block, "b h w c -> b c h w").float() / 255
        last = self.star.encode_image(channels)[-1]
        return _to_array(self.star.decode(last.f_hat))


def _to_array(pictures: Tensor) -> Pictures:
    """Return pictures (B, 3, H, W) in [0, 1] as uint8 (B, H, W, 3), rounded to the nearest level."""
    levels = (pictures.float().clamp(0, 1) * 255).round().byte().cpu()
    return np.asarray(rearrange(levels, "b c h w -> b h w c").numpy())
