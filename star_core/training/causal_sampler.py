"""Trains the causal sampler on a frozen transformer: cross-entropy on a scale's unknown tokens (paper 4.3).

Where the released training differs from how its head is used, this one follows the use: every scale is seen
alone with its start position (not all refined scales under one mask), the empty map is among the lessons,
there is no extra class for known tokens, and no DropPath. It begins as the transformer it refines: what it has
to learn is what known tokens add.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..causal_sampler import CausalSampler
from ..checkpoint import Networks, load_networks, load_vqvae, save_networks
from ..config import StarConfig
from ..presets import read_schedule, sampler_start
from ..text_encoder import load_text_encoder
from ..transfer import upload
from ..transformer import Transformer
from ..weights import build_with
from .emoji import EmojiSet
from .lessons import SETTLED_VARIANTS, Lesson, Lessons, lessons_for, run_folder_file, training_plans
from .optimizers import descend, muon_and_adamw
from .options import (
    add_compile_argument,
    add_corruption_argument,
    add_plain_captions_argument,
    add_run_arguments,
    add_workers_argument,
    at_least,
)
from .recorded import RecordedStep, recorder_for
from .run import Average, TrainingRun, compile_blocks, precision, use_threads
from .transformer import attention_kernel

log = logging.getLogger(__name__)

IGNORED = -100
FEW = 32
"""Pictures that tell how large features and codes are."""
EMPTY_SHARE = 0.15
"""How often a lesson's map is empty, as inference begins: the arccos share alone is rarely below 0.1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `train sampler` to the command line."""
    add_run_arguments(parser, steps=600, batch=48, rate=2e-3)
    add_workers_argument(parser)
    add_compile_argument(parser)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--tokenizer-run", type=Path, required=True)
    parser.add_argument("--transformer-run", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="folder of the text encoder")
    parser.add_argument(
        "--variants",
        type=at_least(1, "renderings"),
        default=1,
        help=f"renderings of each picture: as it is, mirrored, six shifted by a pixel at most; more than"
        f" {SETTLED_VARIANTS} count as {SETTLED_VARIANTS}",
    )
    add_corruption_argument(parser)
    add_plain_captions_argument(parser)
    parser.add_argument(
        "--masks",
        type=at_least(1, "masks"),
        default=2,
        help="how often a step shows each picture, under another mask: the transformer's features are most of"
        " its work, and are the same",
    )
    parser.add_argument("--sampler-depth", type=at_least(1, "blocks"), default=2)
    parser.add_argument(
        "--schedule", help="the checkpoint's own schedule, by name or text (default: the transformer's)"
    )


def known_mask(batch: int, tokens: int, rng: np.random.Generator) -> Tensor:
    """Return which tokens (B, n) a lesson shows: an arccos-distributed share per row, or none at all."""
    share = np.arccos(rng.random((batch, 1))) / (math.pi / 2)
    share[rng.random((batch, 1)) < EMPTY_SHARE] = 0.0
    return torch.from_numpy(rng.random((batch, tokens)) < share)


class SamplerLessons:
    """The frozen transformer's features of the refined scales, for any batch."""

    def __init__(self, transformer: Transformer, lessons: Lessons) -> None:
        self.transformer = transformer
        self.lessons = lessons
        self.first = sampler_start(len(lessons.maps))
        self.lengths = [h * w for h, w in lessons.maps]
        self.places = transformer.places(lessons.maps, lessons.device)

    @torch.no_grad()
    def features(self, lesson: Lesson) -> Tensor:
        """Return the last block's output (B, L, C) under teacher forcing."""
        keys = self.transformer.text_keys(lesson.text.hidden, lesson.text.mask)
        found: Tensor = self.transformer(
            lesson.inputs, lesson.text.pooled, keys, self.lessons.maps, places=self.places
        )
        return found

    def deviations(self) -> tuple[float, float]:
        """Return the standard deviations of features and codes on the refined scales of training pictures."""
        lesson = self.lessons.plain("train", FEW)
        begin = sum(self.lengths[: self.first])
        codes = self.lessons.quantizer.codebook(lesson.tokens[:, begin:])
        return self.features(lesson)[:, begin:].std().item(), codes.std().item()

    def known(self, batch: int, rng: np.random.Generator) -> list[Tensor]:
        """Return which tokens (B, n) of each refined scale a lesson shows, on the lessons' device."""
        shown = [known_mask(batch, length, rng) for length in self.lengths[self.first :]]
        return [upload(mask, self.lessons.device) for mask in shown]

    def loss(self, sampler: CausalSampler, lesson: Lesson, features: Tensor, known: Sequence[Tensor]) -> Tensor:
        """Return the cross-entropy in nats on the unknown tokens of all refined scales.

        known: (m B, n) of each refined scale; more rows than the lesson's show it again, under other masks.
        """
        (rows,) = {len(shown) for shown in known}
        times, rest = divmod(rows, len(features))
        assert rest == 0, "every picture is shown as often as any other"
        pooled = lesson.text.pooled.repeat(times, 1)
        parts = features.repeat(times, 1, 1).split(self.lengths, dim=1)
        tokens = lesson.tokens.repeat(times, 1).split(self.lengths, dim=1)
        total: Tensor = features.new_zeros(())
        for scale, shown in enumerate(known, start=self.first):
            logits = self.logits(sampler, tokens[scale], shown, parts[scale], pooled, scale)
            wanted = tokens[scale].masked_fill(shown, IGNORED)
            total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        return total / len(known)

    def logits(
        self,
        sampler: CausalSampler,
        tokens: Tensor,
        known: Tensor,
        features: Tensor,
        pooled: Tensor,
        scale: int,
    ) -> Tensor:
        """Return the sampler's logits (B, n, V) for a scale of which some tokens are known."""
        codes = self.lessons.quantizer.lookup(tokens, self.lessons.maps[scale])
        shown = rearrange(codes, "b d h w -> b (h w) d") * known.unsqueeze(-1)
        start = sum(self.lengths[:scale])
        positions = torch.arange(start, start + self.lengths[scale], device=features.device)
        rotation = self.places.rotation.select(torch.cat([positions.new_zeros(1), positions]))
        found: Tensor = sampler(shown, features, pooled, scale, rotation)
        return found


def run(args: argparse.Namespace) -> None:
    """Train, resuming where a checkpoint is, and export transformer and sampler as `star.safetensors`."""
    use_threads(args)
    device = torch.device(args.device)
    base, networks = load_networks(run_folder_file(args.transformer_run, "star.safetensors"), device=device)
    config = make_config(args, base)  # a wrong schedule is refused before anything is trained
    data = EmojiSet.load(args.data, args.size)
    vqvae = load_vqvae(run_folder_file(args.tokenizer_run, "vqvae.safetensors"), device=device)
    text_encoder = load_text_encoder(args.text, device=device)
    lessons = lessons_for(args, data, vqvae, text_encoder, config.maps, min(args.variants, SETTLED_VARIANTS))
    teaching = SamplerLessons(networks.transformer, lessons)
    sampler = CausalSampler(config.transformer)
    sampler.initialise(torch.Generator().manual_seed(args.seed))
    sampler.to(device).begin_as(networks.transformer, *teaching.deviations())
    optimizers = muon_and_adamw(sampler, args, device)
    training = TrainingRun(args, sampler, optimizers, keep=0.998)
    if training.resume() is None:
        log.info("held-out loss %.3f, the transformer's", held_out_loss(teaching, sampler))
        training.start_clock()
    # Not before: pictures looked at in other batches are versions of compiled blocks, too.
    compile_blocks(args, [*networks.transformer.blocks, *sampler.blocks])

    def save() -> None:
        averaged = export(training.average, config, networks.transformer, args.run).to(device)
        training.save()
        log.info("step %d held-out loss %.3f", training.step, held_out_loss(teaching, averaged))

    def learn(*batch: Tensor) -> tuple[Tensor, ...]:
        """Take in a lesson's tensors, and which tokens of each refined scale are known."""
        lesson, known = Lesson.of(batch)
        with precision(args):
            features = teaching.features(lesson)
            with attention_kernel(device):
                loss = teaching.loss(sampler, lesson, features, known)
        descend(loss, sampler, optimizers)
        return (loss.detach(),)

    learn_step = RecordedStep(learn, recorder_for(device))
    for step in training.steps(training_plans(args, lessons, training.step), save):
        plan = step.batch
        lesson = lessons.lesson(plan, step.number, settled=True)
        rng = np.random.default_rng([args.seed, step.number, 1])
        known = teaching.known(args.masks * len(plan.pictures), rng)
        (loss,) = learn_step(*lesson.tensors(), *known)
        if step.told:
            training.tell(f"loss {loss.item():.3f}")


def make_config(args: argparse.Namespace, base: StarConfig) -> StarConfig:
    """Return the configuration of a transformer's file with a sampler beside it.

    Raises ValueError for a schedule that does not fit the model.
    """
    if args.schedule is not None:
        read_schedule(args.schedule, base.maps)
    return dataclasses.replace(
        base,
        transformer=dataclasses.replace(base.transformer, sampler_depth=args.sampler_depth),
        schedule=args.schedule or base.schedule,
    )


@torch.no_grad()
def held_out_loss(teaching: SamplerLessons, sampler: CausalSampler, count: int = 128) -> float:
    """Return the loss on held-out pictures with their plain captions, under fixed masks."""
    lesson = teaching.lessons.held_out(count)
    known = teaching.known(len(lesson.tokens), np.random.default_rng(0))
    return teaching.loss(sampler, lesson, teaching.features(lesson), known).item()


def export(average: Average, config: StarConfig, transformer: Transformer, folder: Path) -> CausalSampler:
    """Write transformer and averaged sampler as one file in float16; return the sampler in float32."""
    both = {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
    both |= {f"causal_sampler.{name}": value for name, value in average.state.items()}
    whole = build_with(lambda: Networks(config.transformer), both)
    save_networks(folder / "star.safetensors", config, whole.half().cpu())
    return build_with(lambda: CausalSampler(config.transformer), average.state)
