"""What the transformer and the causal sampler are taught with: token maps of pictures and their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import TokenMap
from ..quantizer import MultiScaleQuantizer
from ..text_encoder import TextEncoder, TextStates
from ..vqvae import VQVAE
from .captions import plain_caption, random_caption
from .emoji import EmojiSet
from .run import pictures_to_tensor

ENCODE_BATCH = 128
PROMPT_DROPOUT = 0.1


@dataclass(frozen=True)
class Lesson:
    """One batch: tokens (B, L) of all scales, teacher inputs (B, L - 1, D), the captions' states."""

    tokens: Tensor
    inputs: Tensor
    text: TextStates


class Lessons:
    """Pictures as tokens, with captions drawn anew at every visit."""

    def __init__(
        self,
        data: EmojiSet,
        vqvae: VQVAE,
        text_encoder: TextEncoder,
        maps: tuple[TokenMap, ...],
        device: torch.device,
    ) -> None:
        self.data = data
        self.maps = maps
        self.device = device
        self.text_encoder = text_encoder
        self.quantizer: MultiScaleQuantizer = vqvae.quantizer
        self.tokens = encode_all(data, vqvae, maps, device)
        self._lengths = [h * w for h, w in maps]

    @torch.no_grad()
    def lesson(self, indices: Sequence[int], rng: np.random.Generator | None) -> Lesson:
        """Return the lesson of these pictures; without `rng` each has its plain caption, none is dropped."""
        captions = [self._caption(index, rng) for index in indices]
        tokens = self.tokens[torch.as_tensor(np.asarray(indices))].to(self.device)
        inputs = self.quantizer.teacher_inputs(tokens.split(self._lengths, dim=1), self.maps)
        return Lesson(tokens, inputs, short_states(self.text_encoder, captions))

    def _caption(self, index: int, rng: np.random.Generator | None) -> str:
        record = self.data.records[index]
        if rng is None:
            return plain_caption(record)
        return "" if rng.random() < PROMPT_DROPOUT else random_caption(record, rng)


@torch.no_grad()
def short_states(text_encoder: TextEncoder, captions: Sequence[str]) -> TextStates:
    """Return text states cut to the longest caption: equal to the padded ones, since CLIP looks back only
    and cross-attention masks the padding."""
    ids, mask = text_encoder.tokenize(captions)
    longest = int(mask.sum(dim=1).max())
    device = next(text_encoder.parameters()).device
    ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
    states = text_encoder.model(input_ids=ids, attention_mask=mask.long())
    return TextStates(states.last_hidden_state.float(), mask, states.pooler_output.float())


@torch.no_grad()
def encode_all(data: EmojiSet, vqvae: VQVAE, maps: tuple[TokenMap, ...], device: torch.device) -> Tensor:
    """Return the tokens (N, L) of all pictures, int16 to save memory where the codebook allows."""
    found = []
    for start in range(0, len(data.pictures), ENCODE_BATCH):
        pictures = pictures_to_tensor(data.pictures[start : start + ENCODE_BATCH], device)
        quantized = vqvae.quantizer.quantize(vqvae.encode(pictures), maps)
        found.append(torch.cat(quantized.tokens, dim=1).cpu())
    return torch.cat(found)


def window_positions(
    maps: Sequence[TokenMap], windowed: int, share: float, generator: torch.Generator
) -> Tensor:
    """Return the positions (K,) to train on: all tokens of early scales, and of the last `windowed` scales
    those in a random window of `share` of each side, the same place of the picture on all of them
    (paper 4.4; the released code drops random last-scale tokens instead).
    """
    place = torch.rand(2, generator=generator)
    chosen, offset = [], 0
    for scale, (height, width) in enumerate(maps):
        grid = torch.arange(height * width).view(height, width) + offset
        offset += height * width
        if scale >= len(maps) - windowed:
            rows, columns = (max(1, round(side * share)) for side in (height, width))
            top = int(place[0] * (height - rows + 1))
            left = int(place[1] * (width - columns + 1))
            grid = grid[top : top + rows, left : left + columns]
        chosen.append(grid.flatten())
    return torch.cat(chosen)


def run_folder_file(folder: Path, name: str) -> Path:
    """Return a file of an earlier stage's run. Raises ValueError naming the stage to run first."""
    path = folder / name
    if not path.exists():
        raise ValueError(f"{path} is missing: run the training stage that writes it first")
    return path
