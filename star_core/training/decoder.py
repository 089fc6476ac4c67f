"""Trains the VQ-VAE's decoder on, with encoder and codebook frozen.

Tokens stay what they are, so that a transformer trained on them stays valid while its pictures get better. With
`--model` the decoder also learns from tokens that the model has drawn, whose noise it is to see through.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_vqvae
from ..config import VQVAEConfig, square_maps
from ..evaluation.lpips import LPIPS, load_lpips
from ..transfer import upload
from ..vqvae import VQVAE
from ..weights import build_with, read_pickle
from .augmentation import pixel_sources
from .captions import plain_caption
from .discriminator import Adversary, FeatureNetwork, adaptive_weight, feature_distance
from .efficientnet import EfficientNet, load_efficientnet
from .emoji import EmojiSet
from .lessons import all_tokens, encode_all, run_folder_file
from .optimizers import LARGEST_GRADIENT, adamw
from .options import add_run_arguments, at_least, non_negative
from .packages import asset_path
from .recorded import RecordedStep, recorder_for
from .run import (
    Average,
    PictureStore,
    TrainingRun,
    check_same_sides,
    operations_for,
    precision,
    shuffled_batches,
    use_threads,
)
from .tokenizer import add_perceptual_argument, export, psnr
from .versions import (
    comparable_versions,
    load_redrawing,
    mixed_versions,
    redrawn_by,
    redrawn_scales,
    stored_versions,
    token_versions,
)

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `train decoder` to the command line."""
    add_run_arguments(parser, steps=1500, batch=16, rate=1.5e-3)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--sides", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    parser.add_argument("--tokenizer-run", type=Path, required=True)
    add_perceptual_argument(parser)
    parser.add_argument(
        "--matching",
        type=non_negative,
        default=0.0,
        help="weight of a feature matching loss: how far EfficientNet-Lite0's features of drawn and real"
        " pictures are apart; above 0 the discriminator sees them, too; the shipped model's is 0.1",
    )
    parser.add_argument(
        "--adversarial",
        type=float,
        default=0.0,
        help="weight of a discriminator's loss, 0 for none: at 1 it moves the decoder's last layer as hard as"
        " the distances do (L1, LPIPS, --matching); the shipped model's is 0.4",
    )
    parser.add_argument(
        "--head-start",
        type=int,
        default=200,
        help="first steps (of --steps) in which the discriminator learns and the decoder does not yet follow",
    )
    parser.add_argument(
        "--judge",
        type=Path,
        help="checkpoint.pt of another decoder's run, whose discriminator goes on where this run has none yet:"
        " it can tell drawn pictures already",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a star.safetensors that redraws the pictures' last scales: the decoder learns from both",
    )
    parser.add_argument("--text", type=Path, default=Path("star_core/demo"), help="folder of its text encoder")
    parser.add_argument("--schedule", default="top-k", help="how the model redraws")
    parser.add_argument(
        "--redrawn",
        type=int,
        nargs="+",
        default=[1, 2],
        metavar="SCALES",
        help="how many last scales it redraws: one version each. A picture drawn whole is not"
        " compared with the real one: the discriminator alone (--adversarial) judges it",
    )
    parser.add_argument(
        "--redrawn-pictures",
        type=at_least(1, "pictures"),
        help="how many of the training pictures, taken at random, it redraws for each version (default: all,"
        " 18 to 25 minutes a version on two cores); the others keep their own tokens in it or, where it is"
        " drawn whole, are left out of it",
    )


def decoded(
    vqvae: VQVAE, tokens: Tensor, sides: Sequence[int], autocast: AbstractContextManager[Any]
) -> Tensor:
    """Return what the decoder makes of tokens (B, L): pictures (B, 3, H, W), not clamped."""
    lengths = [side * side for side in sides]
    with torch.no_grad():
        f_hat = vqvae.quantizer.f_hats(tokens.split(lengths, dim=1), square_maps(sides))[-1]
    with autocast:
        pictures: Tensor = vqvae.decoder(vqvae.post_quant_conv(f_hat))
    return pictures.float()


def check_adversary(args: argparse.Namespace) -> None:
    """Raise ValueError for options of the discriminator that do not make sense."""
    if not 0 <= args.adversarial < math.inf:
        raise ValueError(f"--adversarial {args.adversarial:g} is no weight of a loss: give 0 or more")
    if args.adversarial and args.judge is None and not 0 <= args.head_start < args.steps:
        raise ValueError(
            f"--head-start {args.head_start}: of {args.steps} steps it can be 0 to {args.steps - 1}"
        )
    if args.judge is not None and not args.adversarial:
        raise ValueError(f"--judge {args.judge} is a discriminator's: give --adversarial, or leave it out")
    if args.judge is not None and not (args.run / "checkpoint.pt").exists():
        read_judge(args.judge)  # not first when pictures are encoded


def read_judge(path: Path) -> Mapping[str, Any]:
    """Return the discriminator of another run's checkpoint. Raises ValueError for a file that holds none."""
    state = read_pickle(path)
    stored: Mapping[str, Any] | None = state.get("adversary") if isinstance(state, Mapping) else None
    if stored is None:
        raise ValueError(f"--judge {path} holds no discriminator: give a checkpoint.pt with one")
    return stored


def begin_adversary(args: argparse.Namespace, adversary: Adversary) -> None:
    """Begin a discriminator, or go on with another run's where one is asked for.

    Raises ValueError for a file that holds none, or one that sees with other networks.
    """
    if args.judge is None:
        log.info("a discriminator begins now, with a head start of %d steps", adversary.head_start)
        return
    stored = read_judge(args.judge)
    if not same_shapes(adversary.discriminator.state_dict(), stored["discriminator"]):
        raise ValueError(
            f"the discriminator in {args.judge} sees with other networks: give its --matching, above 0 or 0"
        )
    adversary.resume(stored)
    log.info("a discriminator of %d steps goes on", adversary.steps)


def same_shapes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same names and shapes."""
    shapes = [{name: value.shape for name, value in state.items()} for state in (one, other)]
    return shapes[0] == shapes[1]


def resume_adversary(args: argparse.Namespace, adversary: Adversary | None, state: Mapping[str, Any]) -> None:
    """Go on with a checkpoint's discriminator, or begin one where there was none.

    Raises ValueError where the checkpoint's would be lost.
    """
    again = "give the options that the run began with, or another --run"
    stored = state.get("adversary")
    if stored is not None and adversary is None:
        raise ValueError(f"the run in {args.run} has a discriminator, --adversarial is 0: {again}")
    if "judge_optimizer" in state and state["judge_optimizer"]["state"]:
        raise ValueError(f"the run in {args.run} has a patch discriminator, which is no more: {again}")
    if adversary is None:
        return
    if stored is None:
        begin_adversary(args, adversary)
    elif not same_shapes(adversary.discriminator.state_dict(), stored["discriminator"]):
        raise ValueError(
            f"the discriminator of the run in {args.run} sees with other networks (--matching): {again}"
        )
    else:
        adversary.resume(stored)


def distances(made: Tensor, real: Tensor, perceptual: nn.Module, share: float) -> tuple[Tensor, Tensor]:
    """Return L1 and LPIPS of drawn and real pictures (B, 3, H, W), LPIPS of the first `share` of them."""
    few = max(1, int(len(real) * share))
    lpips = perceptual(made[:few].clamp(-1, 1), real[:few]).float().mean()
    return (made - real).abs().mean(), lpips


class Decoding:
    """The decoder under training: what moves it on a batch, and the discriminator that judges it."""

    def __init__(
        self,
        args: argparse.Namespace,
        vqvae: VQVAE,
        perceptual: LPIPS,
        comparable: Sequence[bool],
        efficientnet: EfficientNet | None = None,
    ) -> None:
        """comparable: whether each version of a picture is to look like it (see `comparable_versions`)."""
        device = torch.device(args.device)
        self._args = args
        self._vqvae = vqvae
        self._perceptual = perceptual
        self._efficientnet = efficientnet
        self._no_loss = torch.zeros((), device=device)
        self._weights = [*vqvae.decoder.parameters(), *vqvae.post_quant_conv.parameters()]
        for parameter in self._weights:
            parameter.requires_grad_(True)
        self.optimizer = adamw(self._weights, args.rate, device, betas=(0.9, 0.95), decay=0.01)
        networks: list[FeatureNetwork] = [perceptual] if efficientnet is None else [perceptual, efficientnet]
        self.adversary = Adversary(networks, args.head_start, device) if args.adversarial else None
        self.comparable = comparable
        # The same share of every batch, so that all are of one shape, and of each kind at least one.
        compared = math.ceil(args.batch * sum(comparable) / len(comparable))
        self.compared = max(1, min(compared, args.batch - (not all(comparable))))

    def learn(self, real: Tensor, seen: Tensor, *sources: Tensor, ready: bool) -> tuple[Tensor, ...]:
        """Take in pictures (B, 3, H, W) and tokens (B, L), the first `compared` of which are to become them."""
        args, few = self._args, self.compared
        made = decoded(self._vqvae, seen, args.sides, precision(args))
        with precision(args):
            l1, lpips = distances(made[:few], real[:few], self._perceptual, args.perceptual_share)
        matched = self._no_loss
        if self._efficientnet is not None:
            matched = feature_distance(self._efficientnet, made[:few], real[:few])
        (pull,) = torch.autograd.grad(l1 + args.perceptual * lpips + args.matching * matched, made)
        told_apart = self._no_loss
        if self.adversary is not None:
            push, told_apart = self.adversary.step(made, real, (sources[0], sources[1]), ready=ready)
            if push is not None:
                last_layer = self._vqvae.decoder.conv_out.weight
                pull = pull + args.adversarial * adaptive_weight(made, pull, push, last_layer) * push
        self.optimizer.zero_grad()
        made.backward(pull)
        nn.utils.clip_grad_norm_(self._weights, LARGEST_GRADIENT)
        self.optimizer.step()
        return l1.detach(), lpips.detach(), matched.detach(), told_apart


def run(args: argparse.Namespace) -> None:
    """Train, resuming where a checkpoint is, and export `vqvae.safetensors`."""
    use_threads(args)
    device = torch.device(args.device)
    check_adversary(args)
    star = load_redrawing(args)
    torch.default_generator.manual_seed(args.seed)  # a training command owns its process
    stored = run_folder_file(args.tokenizer_run, "vqvae.safetensors")
    vqvae = load_vqvae(stored, operations=operations_for(device), device=device)
    data, maps = EmojiSet.load(args.data, args.size), square_maps(args.sides)
    pictures_of = PictureStore(data.pictures, device)
    train, held_out = torch.from_numpy(data.indices("train")), torch.from_numpy(data.sample("pairs", 128))
    tokens = all_tokens(encode_all(pictures_of, vqvae), vqvae, maps)
    vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    perceptual = load_lpips(asset_path("lpips", args.packages), "alexnet").to(device)
    efficientnet = None
    if args.matching:
        efficientnet = load_efficientnet(asset_path("efficientnet", args.packages)).to(device)
    decoding = Decoding(args, vqvae, perceptual, comparable_versions(args), efficientnet)
    adversary = decoding.adversary
    training = TrainingRun(args, vqvae, [decoding.optimizer], keep=0.995)
    own = tokens[upload(train, device)]
    if (state := training.resume()) is not None:
        resume_adversary(args, adversary, state)
        check_same_sides(args, state)
        versions = stored_versions(args, state, own)
    else:
        if adversary is not None:
            begin_adversary(args, adversary)
        captions = [plain_caption(data.records[row]) for row in train.tolist()]
        versions = token_versions(args, star, vqvae, own, captions)
        training.start_clock()

    def save() -> None:
        export(training.average, vqvae.config, args.run)
        judge = None if adversary is None else adversary.state()
        drawn = {
            "versions": versions,
            "redrawn": redrawn_scales(args),
            "redrawn_pictures": args.redrawn_pictures,
            "redrawn_by": redrawn_by(args),
            "sides": args.sides,
        }
        training.save({"adversary": judge, **drawn})
        real = pictures_of.take(held_out)
        found = held_out_psnr(training.average, vqvae.config, tokens[held_out], real, args.sides)
        log.info("step %d held-out PSNR %.2f dB", training.step, found)

    if star is not None and state is None:
        save()  # redrawing took a while
    del star
    learn_step = RecordedStep(decoding.learn, recorder_for(device))
    batches = shuffled_batches(len(train), args.batch, args.seed, training.step)
    for step in training.steps(batches, save):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step.number)
        count = len(step.batch)
        version = mixed_versions(decoding.comparable, decoding.compared, count, generator)
        real = pictures_of.take(train[step.batch])
        seen = versions[upload(version, device), upload(step.batch, device)]
        sources, ready = [], False
        if adversary is not None:
            drawn = (pixel_sources(count, real.shape[2:], generator) for _ in range(2))
            sources, ready = [upload(each, device) for each in drawn], adversary.ready
            adversary.steps += 1
        l1, lpips, matched, told_apart = learn_step(real, seen, *sources, ready=ready)
        if step.told:
            distances_told = f"l1 {l1.item():.4f} lpips {lpips.item():.4f} matching {matched.item():.4f}"
            training.tell(f"{distances_told} discriminator {told_apart.item():.3f}")


@torch.no_grad()
def held_out_psnr(
    average: Average, config: VQVAEConfig, tokens: Tensor, real: Tensor, sides: list[int]
) -> float:
    """Return the averaged decoder's PSNR in dB on pictures (B, 3, H, W) with these tokens (B, L)."""
    averaged = build_with(lambda: VQVAE(config), average.state)
    made = decoded(averaged, tokens, sides, nullcontext())
    return psnr(made.clamp(-1, 1), real)
