"""Trains the VQ-VAE: L1, LPIPS and the quantizer's loss, with unused codes seeded anew (paper 3.1)."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from ..config import TokenMap, VQVAEConfig, check_maps, square_maps
from ..evaluation.lpips import load_lpips
from ..quantizer import Quantized
from ..vqvae import VQVAE
from ..weights import build_with, save_vqvae
from .augmentation import augmented
from .emoji import EmojiSet
from .optimizers import adamw, descend
from .options import add_run_arguments, non_negative, part
from .packages import asset_path
from .recorded import RecordedStep, recorder_for
from .run import (
    Average,
    PictureStore,
    Purpose,
    TrainingRun,
    check_same_sides,
    generator_of,
    operations_for,
    precision,
    shuffled_batches,
    use_threads,
)

log = logging.getLogger(__name__)

RESEED_EVERY = 100
RESEED_UNTIL = 0.7
QUANTIZER_WEIGHT = 0.5
LPIPS_FROM = 100
"""The step after which LPIPS looks at the pictures too."""
LOSSES = ("l1", "vq", "lpips")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `train tokenizer` to the command line."""
    add_run_arguments(parser, steps=2400, batch=16, rate=1.5e-3)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--sides", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    parser.add_argument("--channels", type=int, default=32, help="base channels")
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--residual-blocks", type=int, default=1)
    parser.add_argument("--norm-groups", type=int, default=8)
    parser.add_argument("--codebook", type=int, default=2048)
    parser.add_argument("--code-width", type=int, default=32)
    add_perceptual_argument(parser)


def add_perceptual_argument(parser: argparse.ArgumentParser) -> None:
    """Add the weight of LPIPS beside the L1 distance."""
    parser.add_argument(
        "--perceptual", type=non_negative, default=0.3, help="weight of LPIPS beside the L1 distance"
    )
    parser.add_argument(
        "--perceptual-share",
        type=part,
        default=1 / 3,
        help="share of a batch that LPIPS looks at: on a CPU it takes most of a step",
    )


class Tokenizer:
    """The module under training, its losses and the codebook's book-keeping."""

    def __init__(
        self,
        config: VQVAEConfig,
        maps: tuple[TokenMap, ...],
        perceptual: nn.Module,
        autocast: torch.autocast,
        perceptual_weight: float,
        perceptual_share: float,
        operations: ModuleType = nn,
    ) -> None:
        self.vqvae = VQVAE(config, operations=operations)
        # mypy knows no overload of Module.to for memory formats.
        self.vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        nn.init.normal_(self.vqvae.quantizer.codebook.weight, std=0.5)
        self.maps = maps
        self.perceptual = perceptual
        self.autocast = autocast
        self.perceptual_weight = perceptual_weight
        self.perceptual_share = perceptual_share
        self.uses = torch.zeros(config.codebook_size)

    def loss(self, pictures: Tensor, *, perceptual: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss of pictures (B, 3, H, W) and its parts (LOSSES), all on the device."""
        with self.autocast:
            features = self.vqvae.encode(pictures)
        # Nearest codes are found, and f_hat is summed, in float32.
        f_hat, vq, quantized = self.vqvae.quantizer.training_losses(features.float(), self.maps)
        with self.autocast:
            drawn = self.vqvae.decoder(self.vqvae.post_quant_conv(f_hat)).float()
        pixel = (drawn - pictures).abs().mean()
        loss = pixel + QUANTIZER_WEIGHT * vq
        parts = [pixel.detach(), vq.detach()]
        if perceptual:
            few = max(1, int(pictures.shape[0] * self.perceptual_share))
            with self.autocast:
                distance = self.perceptual(drawn[:few].clamp(-1, 1), pictures[:few]).float().mean()
            loss = loss + self.perceptual_weight * distance
            parts.append(distance.detach())
        self._count(quantized)
        return loss, tuple(parts)

    def _count(self, quantized: Quantized) -> None:
        used = torch.cat([tokens.flatten() for tokens in quantized.tokens])
        self.uses = self.uses.to(used.device).index_add_(0, used, torch.ones_like(used, dtype=torch.float32))

    @torch.no_grad()
    def reseed(self, pictures: Tensor, generator: torch.Generator) -> int:
        """Move codes that nothing used onto features and rests of features; return how many."""
        unused = (self.uses == 0).nonzero().flatten()
        self.uses.zero_()
        features = self.vqvae.encode(pictures)
        after = self.vqvae.quantizer.quantize(features, self.maps).f_hats
        rests = torch.cat([features, *(features - f_hat for f_hat in after[:-1])])
        points = rests.permute(0, 2, 3, 1).reshape(-1, rests.shape[1])
        chosen = torch.randint(len(points), (len(unused),), generator=generator)
        weight = self.vqvae.quantizer.codebook.weight
        weight[unused.to(weight.device)] = points[chosen.to(points.device)]
        return len(unused)


@torch.no_grad()
def reconstruct(vqvae: VQVAE, pictures: Tensor, maps: tuple[TokenMap, ...]) -> Tensor:
    """Return pictures (B, 3, H, W) after encoding, quantizing and decoding, in [-1, 1]."""
    return vqvae.decode(vqvae.quantizer.quantize(vqvae.encode(pictures), maps).f_hats[-1])


def psnr(drawn: Tensor, real: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    error = ((drawn - real) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


def make_config(args: argparse.Namespace) -> VQVAEConfig:
    """Return the configuration that a run's options ask for."""
    return VQVAEConfig(
        args.channels,
        tuple(args.multipliers),
        args.residual_blocks,
        args.codebook,
        args.code_width,
        args.norm_groups,
    )


def check_sides(args: argparse.Namespace, config: VQVAEConfig) -> None:
    """Raise ValueError for scales that do not grow to what the encoder makes of a picture."""
    check_maps(square_maps(args.sides))
    if args.sides[-1] * config.downsample != args.size:
        raise ValueError(
            f"--sides {' '.join(map(str, args.sides))}: of pictures of {args.size} px, {config.downsample} to a"
            f" token, the last scale has {args.size / config.downsample:g}"
        )


def resume(args: argparse.Namespace, training: TrainingRun, trainer: Tokenizer) -> None:
    """Go on from a run's checkpoint, where there is one. Raises ValueError for one of other scales."""
    if (state := training.resume()) is None:
        return
    check_same_sides(args, state)
    trainer.uses = state.get("uses", trainer.uses)


def run(args: argparse.Namespace) -> None:
    """Train, resuming where a checkpoint is, and export `vqvae.safetensors`."""
    use_threads(args)
    device = torch.device(args.device)
    torch.default_generator.manual_seed(args.seed)  # a training command owns its process
    config, maps = make_config(args), square_maps(args.sides)
    check_sides(args, config)
    data = EmojiSet.load(args.data, args.size)
    train, held_out = torch.from_numpy(data.indices("train")), torch.from_numpy(data.sample("pairs", 128))
    perceptual = load_lpips(asset_path("lpips", args.packages), "alexnet").to(device)
    weights = args.perceptual, args.perceptual_share
    trainer = Tokenizer(config, maps, perceptual, precision(args), *weights, operations_for(device))
    trainer.vqvae.to(device)
    optimizer = adamw(trainer.vqvae.parameters(), args.rate, device, betas=(0.9, 0.95), decay=0.01)
    training = TrainingRun(args, trainer.vqvae, [optimizer], keep=0.998)
    resume(args, training, trainer)
    pictures_of = PictureStore(data.pictures, device)
    real = pictures_of.take(held_out)

    def save() -> None:
        export(training.average, config, args.run)
        training.save({"sides": args.sides, "uses": trainer.uses})
        averaged = build_with(lambda: VQVAE(config), training.average.state)
        drawn = reconstruct(averaged, real, maps)
        log.info("step %d held-out PSNR %.2f dB", training.step, psnr(drawn, real))

    def learn(pictures: Tensor, *, perceptual: bool) -> tuple[Tensor, ...]:
        """Take in pictures (B, 3, H, W)."""
        loss, parts = trainer.loss(pictures, perceptual=perceptual)
        descend(loss, trainer.vqvae, [optimizer])
        return parts

    learn_step = RecordedStep(learn, recorder_for(device))
    batches = shuffled_batches(len(train), args.batch, args.seed, training.step)
    for step in training.steps(batches, save):
        generator = generator_of(args.seed, step.number, Purpose.PICTURES)
        pictures = augmented(pictures_of.take(train[step.batch]), generator)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        parts = learn_step(pictures, perceptual=step.number > LPIPS_FROM)
        # Early and often, then rarely: a codebook that starts dead stays dead otherwise.
        due = step.number in (10, 30, 60) or (step.number + 1) % RESEED_EVERY == 0
        if due and step.done < RESEED_UNTIL:
            log.info("step %d: %d codes moved", step.number, trainer.reseed(pictures, generator))
        if step.told:
            training.tell(" ".join(f"{k} {v.item():.4g}" for k, v in zip(LOSSES, parts, strict=False)))


def export(average: Average, config: VQVAEConfig, folder: Path) -> None:
    """Write the averaged weights as `vqvae.safetensors`, in float16."""
    averaged = build_with(lambda: VQVAE(config), average.state)
    save_vqvae(folder / "vqvae.safetensors", averaged.half().cpu())
