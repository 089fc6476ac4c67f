"""What the transformer and the causal sampler are taught with: token maps of pictures and their captions."""

from __future__ import annotations

import argparse
import math
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
from .augmentation import Motion, Moved, may_be_mirrored
from .captions import plain_caption, random_caption
from .emoji import EmojiSet, Record
from .run import PictureStore, Purpose, generator_of, shuffled_batches
from .self_correction import TokenCorruption

ENCODE_BATCH = 256
PROMPT_DROPOUT = 0.1
PLAIN_VARIANTS = 2
"""The first renderings, which are not moved: as it is, and mirrored."""
SETTLED_VARIANTS = 8
"""The first renderings, all sharp: after the plain ones some that are shifted by whole pixels. All others are
shifted, turned and resized, which blurs them a little."""
LENGTH_STEP = 32
"""Batches of captions are cut to multiples of it: compiled and recorded code has one version per length."""


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

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of it, for a recorded step."""
        return self.tokens, self.inputs, self.text.hidden, self.text.mask, self.text.pooled

    @classmethod
    def of(cls, batch: Sequence[Tensor]) -> tuple[Lesson, Sequence[Tensor]]:
        """Return the lesson of `tensors()`, and what comes after them."""
        tokens, inputs, hidden, mask, pooled, *more = batch
        return cls(tokens, inputs, TextStates(hidden, mask, pooled)), more


class Planner(Dataset[Plan]):
    """Draws captions and renderings. It holds no tensors, so that processes beside the training can run it."""

    def __init__(
        self,
        records: Sequence[Record],
        tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        variants: int,
        seed: int,
        plain: float = 0.0,
    ) -> None:
        """plain: of the captions that are not dropped, the share that is the plain one in any case."""
        self._records = records
        self._tokenize = tokenize
        self._variants = variants
        self._seed = seed
        self._plain = plain

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
        if rng.random() < PROMPT_DROPOUT:
            return ""
        # Not asked where the answer is known: a run without plain ones draws what it always has.
        if self._plain > 0 and rng.random() < self._plain:
            return plain_caption(record)
        return random_caption(record, rng)

    def plans(self, batches: Iterable[Tensor], first_step: int, workers: int) -> Iterable[Plan]:
        """Return the plans of batches of pictures (B,), the first of which is step `first_step`'s.

        workers: processes that make them ahead, 0 for none. The plans are the same.
        """
        # The batches are its "sampler": an endless one is fine.
        steps = cast(Sampler[Any], enumerate(batches, first_step))
        return DataLoader(self, batch_size=None, sampler=steps, num_workers=workers)


class Lessons:
    """Pictures as token maps, with captions and one of `variants` renderings drawn anew at every visit.

    The first rendering is the picture as it is, the second is mirrored, the next ones are nudged and all others
    moved (`motion_of`).
    """

    def __init__(
        self,
        data: EmojiSet,
        vqvae: VQVAE,
        text_encoder: TextEncoder,
        maps: tuple[TokenMap, ...],
        device: torch.device,
        *,
        variants: int = 1,
        corruption: float = 0.0,
        plain: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.data = data
        self.maps = maps
        self.device = device
        self.text_encoder = text_encoder
        self.quantizer: MultiScaleQuantizer = vqvae.quantizer
        self.planner = Planner(data.records, text_encoder.words.tokenize, variants, seed, plain)
        self.corruption = TokenCorruption(self.quantizer, maps, corruption)
        self._seed = seed
        pictures = PictureStore(data.pictures, device)
        mirrorable = torch.tensor([may_be_mirrored(record) for record in data.records])
        found = [encode_all(pictures, vqvae)]
        for variant in range(1, variants):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + variant)
            found.append(encode_all(pictures, vqvae, Moved(mirrorable, generator, motion_of(variant))))
        self.features = torch.stack(found)

    @torch.no_grad()
    def lesson(self, plan: Plan, step: int | None = None, *, settled: bool = False) -> Lesson:
        """Return what a plan is about; with wrong tokens on the way there where a step is given.

        settled: in the renderings that stay sharp alone.
        """
        chances = None
        if step is not None and self.corruption.most > 0:
            generator = generator_of(self._seed, step, Purpose.CORRUPTION)
            chances = upload(self.corruption.chances(len(plan.pictures), generator), self.device)
        plan = Plan(*(upload(part, self.device) for part in plan))
        variants = plan.variants % SETTLED_VARIANTS if settled else plan.variants
        features = self.features[variants, plan.pictures].float()
        shown = None if chances is None else self.corruption.of(chances)
        quantized = self.quantizer.quantize(features, self.maps, shown)
        inputs = self.quantizer.next_inputs(quantized.f_hats[:-1], self.maps)
        return Lesson(torch.cat(quantized.tokens, dim=1), inputs, self._text(plan))

    def held_out(self, count: int) -> Lesson:
        """Return some pictures of held-out pairs, not moved, with their plain captions."""
        return self.plain("pairs", count)

    def plain(self, split: str, count: int) -> Lesson:
        """Return some pictures of a split, the same ones every time, not moved, with their plain captions."""
        return self.lesson(self.planner.plan(torch.from_numpy(self.data.sample(split, count)), None))

    def _text(self, plan: Plan) -> TextStates:
        """Return text states cut to about the longest caption: equal to the padded ones, since CLIP looks back
        only and cross-attention masks the padding."""
        # Without the mask, whose look for padding makes the host wait; CLIP ends a text by its last token.
        states = self.text_encoder.model(input_ids=plan.ids)
        return TextStates(states.last_hidden_state.float(), plan.mask, states.pooler_output.float())


def motion_of(variant: int) -> Motion:
    """Return how the pictures of a rendering are moved."""
    if variant < PLAIN_VARIANTS:
        return Motion.NONE
    return Motion.NUDGE if variant < SETTLED_VARIANTS else Motion.MOVE


def lessons_for(
    args: argparse.Namespace,
    data: EmojiSet,
    vqvae: VQVAE,
    text_encoder: TextEncoder,
    maps: tuple[TokenMap, ...],
    variants: int,
) -> Lessons:
    """Return the lessons that a stage's options ask for."""
    return Lessons(
        data,
        vqvae,
        text_encoder,
        maps,
        torch.device(args.device),
        variants=variants,
        corruption=args.corruption,
        plain=args.plain_captions,
        seed=args.seed,
    )


def training_plans(args: argparse.Namespace, lessons: Lessons, first_step: int) -> Iterable[Plan]:
    """Return the plans of all steps from `first_step` on, over the training pictures epoch by epoch."""
    train = torch.from_numpy(lessons.data.indices("train"))
    batches = (train[batch] for batch in shuffled_batches(len(train), args.batch, args.seed, first_step))
    return lessons.planner.plans(batches, first_step, args.workers)


@torch.no_grad()
def encode_all(store: PictureStore, vqvae: VQVAE, moved: Moved | None = None) -> Tensor:
    """Return the features (N, D, h, w) of all pictures, as they are or moved, in float16 on their device."""
    found = []
    for start in range(0, len(store), ENCODE_BATCH):
        pictures = store.take(slice(start, start + ENCODE_BATCH))
        if moved is not None:
            pictures = moved(pictures, start)
        found.append(vqvae.encode(pictures).half())
    return torch.cat(found)


@torch.no_grad()
def all_tokens(features: Tensor, vqvae: VQVAE, maps: tuple[TokenMap, ...]) -> Tensor:
    """Return the tokens (N, L) of features (N, D, h, w)."""
    found = (vqvae.quantizer.quantize(few.float(), maps).tokens for few in features.split(ENCODE_BATCH))
    return torch.cat([torch.cat(tokens, dim=1) for tokens in found])


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
