"""What the transformer and the causal sampler are taught with: token maps of pictures and their captions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..config import TokenMap
from ..quantizer import MultiScaleQuantizer
from ..text_encoder import TextEncoder, TextStates
from ..transfer import upload
from ..vqvae import VQVAE
from .captions import plain_caption, random_caption
from .emoji import EmojiSet, Record
from .run import PictureStore

ENCODE_BATCH = 128
PROMPT_DROPOUT = 0.1
LENGTH_STEP = 16
"""Batches of captions are cut to multiples of it: compiled code has one version per length."""
LONGEST_SHIFT = 4
"""Pixels: half a latent cell of the shipped VQ-VAE."""


class Plan(NamedTuple):
    """What a batch is about, made on the CPU: which pictures (B,), in which rendering (B,), and the captions'
    token ids (B, T) with their mask, T the longest rounded up to a multiple of LENGTH_STEP."""

    pictures: Tensor
    variants: Tensor
    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Lesson:
    """One batch: tokens (B, L) of all scales, teacher inputs (B, L - 1, D), the captions' states."""

    tokens: Tensor
    inputs: Tensor
    text: TextStates


class Planner(Dataset[Plan]):
    """Draws captions and renderings. It holds no tensors, so that processes beside the training can run it."""

    def __init__(
        self,
        records: Sequence[Record],
        tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        variants: int,
        seed: int,
    ) -> None:
        self._records = records
        self._tokenize = tokenize
        self._variants = variants
        self._seed = seed

    def __getitem__(self, item: tuple[int, Tensor]) -> Plan:
        """Return the plan of a step with these pictures (B,)."""
        step, pictures = item
        return self.plan(pictures, np.random.default_rng([self._seed, step]))

    def plan(self, pictures: Tensor, rng: np.random.Generator | None) -> Plan:
        """Return the plan of these pictures (B,). Without `rng` each has its plain caption and is not moved,
        and no caption is dropped."""
        captions = [self._caption(index, rng) for index in pictures.tolist()]
        count = len(pictures)
        variants = np.zeros(count, int) if rng is None else rng.integers(self._variants, size=count)
        ids, mask = self._tokenize(captions)
        longest = math.ceil(int(mask.sum(dim=1).max()) / LENGTH_STEP) * LENGTH_STEP
        return Plan(pictures, torch.from_numpy(variants), ids[:, :longest], mask[:, :longest])

    def _caption(self, index: int, rng: np.random.Generator | None) -> str:
        record = self._records[index]
        if rng is None:
            return plain_caption(record)
        return "" if rng.random() < PROMPT_DROPOUT else random_caption(record, rng)

    def plans(self, batches: Iterable[Tensor], first_step: int, workers: int) -> Iterable[Plan]:
        """Return the plans of batches of pictures (B,), the first of which is step `first_step`'s.

        workers: processes that make them ahead, 0 for none. The plans are the same.
        """
        # The batches are its "sampler": an endless one is fine.
        steps = cast(Sampler[Any], enumerate(batches, first_step))
        return DataLoader(self, batch_size=None, sampler=steps, num_workers=workers)


class Lessons:
    """Pictures as tokens, with captions and one of `variants` renderings drawn anew at every visit."""

    def __init__(
        self,
        data: EmojiSet,
        vqvae: VQVAE,
        text_encoder: TextEncoder,
        maps: tuple[TokenMap, ...],
        device: torch.device,
        *,
        variants: int = 1,
        seed: int = 0,
    ) -> None:
        self.data = data
        self.maps = maps
        self.device = device
        self.text_encoder = text_encoder
        self.quantizer: MultiScaleQuantizer = vqvae.quantizer
        self.planner = Planner(data.records, text_encoder.words.tokenize, variants, seed)
        pictures = PictureStore(data.pictures, device)
        mirrorable = torch.tensor([may_be_mirrored(record) for record in data.records])
        found = [encode_all(pictures, vqvae, maps)]
        for variant in range(1, variants):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + variant)
            moved = Moved(mirrorable, generator)
            found.append(encode_all(pictures, vqvae, maps, moved))
        self.tokens = torch.stack(found)
        self._lengths = [h * w for h, w in maps]

    @torch.no_grad()
    def lesson(self, plan: Plan) -> Lesson:
        """Return what a plan is about."""
        plan = Plan(*(upload(part, self.device) for part in plan))
        tokens = self.tokens[plan.variants, plan.pictures]
        inputs = self.quantizer.teacher_inputs(tokens.split(self._lengths, dim=1), self.maps)
        return Lesson(tokens, inputs, self._text(plan))

    def held_out(self, count: int) -> Lesson:
        """Return the first pictures of held-out pairs, not moved, with their plain captions."""
        return self.lesson(self.planner.plan(torch.from_numpy(self.data.indices("pairs")[:count]), None))

    def _text(self, plan: Plan) -> TextStates:
        """Return text states cut to about the longest caption: equal to the padded ones, since CLIP looks back
        only and cross-attention masks the padding."""
        states = self.text_encoder.model(input_ids=plan.ids, attention_mask=plan.mask.long())
        return TextStates(states.last_hidden_state.float(), plan.mask, states.pooler_output.float())


def may_be_mirrored(record: Record) -> bool:
    """Whether a picture is still what its caption says when left and right change places."""
    told_apart = re.search(r"left|right|clock|east|west", record.label)
    return told_apart is None and record.group not in ("symbols", "flags")


class Moved:
    """Mirrors pictures (half of those that may be) and shifts each by whole pixels, on white.

    Whole pixels, so that nothing is blurred; the tokens change all the same, since the token grid stays.
    """

    def __init__(self, mirrorable: Tensor, generator: torch.Generator) -> None:
        count = len(mirrorable)
        self.mirrored = mirrorable & (torch.rand(count, generator=generator) < 0.5)
        self.shifts = torch.randint(-LONGEST_SHIFT, LONGEST_SHIFT + 1, (count, 2), generator=generator)

    def __call__(self, pictures: Tensor, start: int) -> Tensor:
        """Return pictures (B, 3, H, W) in [-1, 1], numbers start.. of the set, moved."""
        moved = torch.ones_like(pictures)
        height, width = pictures.shape[2:]
        for row, picture in enumerate(pictures):
            if self.mirrored[start + row]:
                picture = picture.flip(2)
            down, right = (int(value) for value in self.shifts[start + row])
            target = moved[row, :, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
            target.copy_(
                picture[:, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
            )
        return moved


@torch.no_grad()
def encode_all(
    store: PictureStore, vqvae: VQVAE, maps: tuple[TokenMap, ...], moved: Moved | None = None
) -> Tensor:
    """Return the tokens (N, L) of all pictures, as they are or moved, on their device."""
    found = []
    for start in range(0, len(store), ENCODE_BATCH):
        pictures = store.take(slice(start, start + ENCODE_BATCH))
        if moved is not None:
            pictures = moved(pictures, start)
        quantized = vqvae.quantizer.quantize(vqvae.encode(pictures), maps)
        found.append(torch.cat(quantized.tokens, dim=1))
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
