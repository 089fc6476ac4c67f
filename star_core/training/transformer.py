"""Trains the scale-wise transformer: next-scale cross-entropy under teacher forcing (paper 4.4, 5.1).

Muon for the matrices of the blocks, AdamW for the rest: on two CPU cores every step counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checkpoint import Networks, load_networks, load_vqvae, save_networks
from ..config import StarConfig, TokenMap, TransformerConfig, VQVAEConfig, square_maps, token_count
from ..text_encoder import load_text_encoder
from ..transfer import upload
from ..transformer import Places, Transformer
from ..weights import build_with
from .dropout import Dropout
from .emoji import EmojiSet
from .lessons import (
    Lesson,
    Lessons,
    lessons_for,
    run_folder_file,
    training_plans,
    window_positions,
)
from .optimizers import WEIGHT_DECAY, descend, muon_and_adamw
from .options import (
    add_compile_argument,
    add_corruption_argument,
    add_plain_captions_argument,
    add_run_arguments,
    add_workers_argument,
    at_least,
    non_negative,
    part,
    share,
)
from .recorded import RecordedStep, recorder_for
from .run import (
    Average,
    Purpose,
    TrainingRun,
    check_same_sides,
    compile_blocks,
    generator_of,
    precision,
    use_threads,
)

log = logging.getLogger(__name__)

WHOLE_SHARE = 0.15
"""The last share of the steps trains on whole maps, as the model is used."""
SETTLED_SHARE = 0.35
"""The last share of the steps sees sharp pictures alone, shifted by whole pixels at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `train transformer` to the command line."""
    add_run_arguments(parser, steps=2400, batch=48, rate=2e-3)
    add_workers_argument(parser)
    add_compile_argument(parser)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--sides", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    parser.add_argument("--tokenizer-run", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="folder of the text encoder")
    parser.add_argument(
        "--variants",
        type=at_least(1, "renderings"),
        default=1,
        help="renderings of each picture: as it is, mirrored, six shifted by a pixel at most, then turned and"
        " resized, too; about half are mirrored",
    )
    add_corruption_argument(parser)
    add_plain_captions_argument(parser)
    parser.add_argument(
        "--dropout", type=share, default=0.0, help="share of what each block adds that a step leaves out"
    )
    parser.add_argument(
        "--weight-decay",
        type=non_negative,
        default=WEIGHT_DECAY,
        help="share of itself that a weight loses at a step, times the rate",
    )
    parser.add_argument("--depth", type=int, default=9)
    parser.add_argument("--width", type=int, default=256, help="heads have 64 each")
    parser.add_argument("--name", default="star-emoji-64")
    parser.add_argument(
        "--window", type=part, default=0.6, help="share of each side that the window on the last scales has"
    )
    parser.add_argument(
        "--windowed-scales",
        type=at_least(0, "scales"),
        default=4,
        help="how many last scales are seen through the window, if there are as many",
    )
    parser.add_argument(
        "--start", type=Path, help="star.safetensors to go on from, where the run has no checkpoint yet"
    )


def attention_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of training attention: written out on a CPU, where over so few tokens that is faster
    to train than the fused kernel."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def loss_of(
    transformer: Transformer,
    lesson: Lesson,
    maps: tuple[TokenMap, ...],
    positions: Tensor | None,
    places: Places,
) -> Tensor:
    """Return the cross-entropy in nats, averaged over the batch's tokens (at `positions`)."""
    text = lesson.text
    keys = transformer.text_keys(text.hidden, text.mask)
    features = transformer(lesson.inputs, text.pooled, keys, maps, positions=positions, places=places)
    wanted = lesson.tokens if positions is None else lesson.tokens.index_select(1, positions)
    return F.cross_entropy(transformer.logits(features).flatten(0, 1), wanted.flatten())


@torch.no_grad()
def held_out_loss(transformer: Transformer, lessons: Lessons, count: int = 128) -> list[float]:
    """Return the cross-entropy per scale on held-out pictures with their plain captions."""
    lesson = lessons.held_out(count)
    keys = transformer.text_keys(lesson.text.hidden, lesson.text.mask)
    logits = transformer.logits(transformer(lesson.inputs, lesson.text.pooled, keys, lessons.maps))
    losses = F.cross_entropy(logits.mT, lesson.tokens, reduction="none").mean(dim=0)
    return [float(part.mean()) for part in losses.split([h * w for h, w in lessons.maps])]


def make_config(args: argparse.Namespace, text_width: int, vqvae: VQVAEConfig) -> StarConfig:
    """Return the configuration of the model that is trained. Raises ValueError for what makes none."""
    if args.width < 64 or args.width % 64:
        raise ValueError(f"--width {args.width}: heads have 64 each, give a multiple of it")
    transformer = TransformerConfig(
        depth=args.depth,
        width=args.width,
        heads=args.width // 64,
        scales=len(args.sides),
        text_width=text_width,
        codebook_size=vqvae.codebook_size,
        code_width=vqvae.code_width,
        cross_attention="independent",
    )
    return StarConfig(args.name, transformer, vqvae, square_maps(args.sides), "top-k")


def start_from(transformer: Transformer, path: Path) -> None:
    """Fill a transformer with the weights of an exported file. Raises ValueError for another architecture."""
    config, networks = load_networks(path)
    # The causal sampler is trained afterwards, on the transformer as it then is.
    if dataclasses.replace(config.transformer, sampler_depth=0) != transformer.config:
        raise ValueError(f"{path} holds {config.transformer}, this run trains {transformer.config}")
    transformer.load_state_dict(networks.transformer.state_dict())


def first_transformer(args: argparse.Namespace, config: TransformerConfig) -> Transformer:
    """Return what a new run begins with: fresh weights, or a file's.

    Raises ValueError for a file of another architecture.
    """
    transformer = Transformer(config)
    transformer.initialise(torch.Generator().manual_seed(args.seed))
    if args.start is not None:
        start_from(transformer, args.start)
    return transformer


def window_of(args: argparse.Namespace, lessons: Lessons, step: int, done: float) -> Tensor | None:
    """Return the positions (K,) that a step is about, None where it is about all."""
    if done >= 1 - WHOLE_SHARE:
        return None
    generator = generator_of(args.seed, step, Purpose.WINDOW)
    window = window_positions(lessons.maps, args.windowed_scales, args.window, generator)
    return upload(window, lessons.device)


def run(args: argparse.Namespace) -> None:
    """Train, resuming where a checkpoint is, and export `star.safetensors`."""
    use_threads(args)
    device = torch.device(args.device)
    vqvae_file = run_folder_file(args.tokenizer_run, "vqvae.safetensors")
    text_encoder = load_text_encoder(args.text, device=device)
    config = make_config(args, text_encoder.width, load_vqvae(vqvae_file).config)
    transformer = first_transformer(args, config.transformer).to(device)  # before what takes minutes
    data = EmojiSet.load(args.data, args.size)
    vqvae = load_vqvae(vqvae_file, device=device)
    lessons = lessons_for(args, data, vqvae, text_encoder, config.maps, args.variants)
    length = token_count(config.maps)
    log.info("%d renderings of %d pictures, %d tokens each", *lessons.features.shape[:2], length)
    dropout = Dropout(transformer.blocks, args.dropout, args.seed, device)
    compile_blocks(args, transformer.blocks)
    optimizers = muon_and_adamw(transformer, args, device, decay=args.weight_decay)
    training = TrainingRun(args, transformer, optimizers, keep=0.998)
    if (state := training.resume()) is not None:
        check_same_sides(args, state)
    places = transformer.places(config.maps, device)

    def learn(*batch: Tensor) -> tuple[Tensor, ...]:
        """Take in a lesson's tensors, and the positions (K,) that are seen of it, all where there are none."""
        lesson, rest = Lesson.of(batch)
        window = next(iter(rest), None)
        with precision(args), attention_kernel(device):
            loss = loss_of(transformer, lesson, config.maps, window, places)
        descend(loss, transformer, optimizers)
        return (loss.detach(),)

    def save() -> None:
        averaged = export(training.average, config, args.run)
        training.save({"sides": args.sides})
        losses = held_out_loss(averaged.to(device), lessons)
        mean = np.average(losses, weights=[h * w for h, w in config.maps])
        per_scale = " ".join(f"{value:.2f}" for value in losses)
        log.info("step %d held-out loss %.3f, per scale %s", training.step, mean, per_scale)

    learn_step = RecordedStep(learn, recorder_for(device))
    plans = training_plans(args, lessons, training.step)
    for step in training.steps(plans, save):
        lesson = lessons.lesson(step.batch, step.number, settled=step.done >= 1 - SETTLED_SHARE)
        window = window_of(args, lessons, step.number, step.done)
        seen = [] if window is None else [window]
        dropout.begin(step.number)
        (loss,) = learn_step(*lesson.tensors(), *seen)
        if step.told:
            training.tell(f"loss {loss.item():.3f} ({length if window is None else len(window)} tokens)")


def export(average: Average, config: StarConfig, folder: Path) -> Transformer:
    """Write the averaged weights as `star.safetensors` in float16; return them in float32."""
    named = {f"transformer.{name}": value for name, value in average.state.items()}
    whole = build_with(lambda: Networks(config.transformer), named)
    save_networks(folder / "star.safetensors", config, whole.half().cpu())
    return build_with(lambda: Transformer(config.transformer), average.state)
