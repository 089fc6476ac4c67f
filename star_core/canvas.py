"""The state of one batch of pictures while it is drawn: KV cache, text keys, rotations, random numbers.

Rows R are the B conditional ones, then their unconditional twins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor

from .attention import TextKeys
from .config import token_count
from .pruning import run_count
from .request import PromptSpan, Request
from .rope import Rotation
from .sampling import KeptNoise, ScaleNoise, guide
from .schedule import ScaleSchedule
from .transformer import Transformer


class Spoken(NamedTuple):
    """A prompt of a batch on the device: states (B or R, T, D), mask (B or R, T) or None, pooled (R, D)."""

    hidden: Tensor
    mask: Tensor | None
    pooled: Tensor


@dataclass
class Canvas:
    """The state of one batch while it is drawn: rows are B conditional ones, then their twins while any guide.

    `seen` are the last two scales' features, where a later one is pruned. A canvas that `stays` serves one
    request after another from the same memory, for graphs that know no other.
    """

    transformer: Transformer
    request: Request
    schedule: ScaleSchedule
    device: torch.device
    stays: bool = False
    rotation: Rotation = field(init=False)
    heard: dict[int, Spoken] = field(default_factory=dict)
    text_keys: tuple[TextKeys, ...] = ()
    pooled: Tensor = field(init=False)
    seen: dict[int, Tensor] = field(default_factory=dict)
    noises: dict[int, KeptNoise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        maps = self.request.maps
        self.rotation = self.transformer.rotations(maps).to(self.device)
        self.offsets = [token_count(maps[:scale]) for scale in range(len(maps) + 1)]
        run = [run_count(h * w, p.prune) for (h, w), p in zip(maps, self.schedule.scales, strict=True)]
        self.cached = [sum(run[:scale]) for scale in range(len(maps))]
        # The last scale that is drawn stays out: nothing reads it. A canvas that stays may be asked for more.
        last = len(maps) if self.stays else self.request.stop or len(maps)
        self.cache = self.transformer.new_cache(self.rows(0), self.cached[last - 1], self.device)

    def forget(self) -> None:
        """Let go of the large tensors."""
        self.cache.layers = ()
        self.text_keys = ()
        self.heard.clear()
        self.seen.clear()
        self.noises.clear()

    def rows(self, scale: int) -> int:
        """Return how many rows a scale has: twins are left out where no later scale is guided."""
        return len(self.request.seeds) * (2 if scale < self.schedule.guided_scales else 1)

    def prepare(self, scale: int) -> None:
        """Do what the host has to do before a scale: hand over the prompt that starts here, and chance."""
        for span in self.request.prompts:
            if span.start == scale:
                self._hear(span, self.rows(scale))
        if scale in self.noises:
            self.noises[scale].renew(self.request.seeds)

    def noise(self, scale: int) -> ScaleNoise:
        """Return a scale's random numbers, from its first one on."""
        if not self.stays:
            return ScaleNoise(self.request.seeds, scale, self.device)
        noise = self.noises.setdefault(scale, KeptNoise(self.request.seeds, scale, self.device))
        noise.rewind()
        return noise

    def _hear(self, span: PromptSpan, rows: int) -> None:
        """Take over the prompt that `read` is to read at the span's first scale."""
        texts = [span.conditional, span.unconditional][: rows // len(self.request.seeds)]
        pooled = torch.cat([text.pooled for text in texts]).to(self.device)
        if self.transformer.config.cross_attention == "paired":
            texts = texts[:1]
        hidden, mask = torch.cat([t.hidden for t in texts]), torch.cat([t.mask for t in texts])
        shown: Tensor | None = mask
        if not self.stays:
            hidden, shown = _without_padding(hidden, mask)
        shown = shown.to(self.device) if shown is not None else None
        fresh = Spoken(hidden.to(self.device), shown, pooled)
        if self.stays and span.start in self.heard:
            for held, new in zip(self.heard[span.start], fresh, strict=True):
                if held is not None and new is not None:
                    held.copy_(new)
        else:
            self.heard[span.start] = fresh

    @torch.no_grad()
    def read(self, scale: int) -> None:
        """Make of the prompt that starts at this scale what the blocks read from here on."""
        if scale not in self.heard:
            return
        hidden, mask, pooled = self.heard[scale]
        keys = self.transformer.text_keys(hidden, mask)
        if self.stays and self.text_keys:
            self.pooled[: len(pooled)].copy_(pooled)
            for held, fresh in zip(self.text_keys, keys, strict=True):
                held.overwrite(fresh)
        else:
            self.pooled, self.text_keys = pooled.clone(), keys

    def scale_text(self, scale: int) -> tuple[TextKeys, ...]:
        """Return what every block reads of the text at a scale."""
        rows = self.rows(scale)
        return tuple(keys.rows(rows) for keys in self.text_keys)

    def scale_rotation(self, scale: int) -> Rotation:
        return self.rotation.rows(self.offsets[scale], self.offsets[scale + 1])

    def sampler_rotation(self, scale: int) -> Rotation:
        """Return position 0's rotation, then the scale's, for the causal sampler's extra position."""
        positions = torch.arange(self.offsets[scale], self.offsets[scale + 1], device=self.device)
        return self.rotation.select(torch.cat([positions.new_zeros(1), positions]))

    def first_input(self) -> Tensor:
        height, width = self.request.maps[0]
        start = self.transformer.start_token(self.pooled[: self.rows(0)])
        return repeat(start, "r 1 c -> r n c", n=height * width)

    def next_input(self, codes: Tensor, scale: int) -> Tensor:
        x = self.transformer.scale_input(codes, scale)
        return repeat(x, "b n c -> (twins b) n c", twins=self.rows(scale) // len(codes))

    def guided_logits(self, features: Tensor, strength: float) -> Tensor:
        """Return guided logits (B, n, V); twins' logits are computed only where guidance is on."""
        batch = len(self.request.seeds)
        if strength == 0:
            return self.transformer.logits(features[:batch])
        logits = self.transformer.logits(features)
        return guide(logits[:batch], logits[batch:], strength)


def _without_padding(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return text states (B, T, D) and mask (B, T) cut to the longest text, no mask where all are as long.

    Nothing looks at padding: the same pictures, with a fifth of the keys for a short prompt, and the attention
    kernels that take no mask.
    """
    longest = int(mask.any(dim=0).nonzero().max()) + 1
    # In one piece, strides included: of rows with gaps the CPU's products copy the weights, once per block.
    hidden = hidden[:, :longest].clone(memory_format=torch.contiguous_format)
    mask = mask[:, :longest]
    return hidden, None if bool(mask.all()) else mask
