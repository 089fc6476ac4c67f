"""Trains the VQ-VAE's decoder on, with encoder and codebook frozen.

Tokens stay what they are, so that a transformer trained on them stays valid while its pictures get better. With
`--model` the decoder also learns from tokens that the model has drawn, whose noise it is to see through.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import load_vqvae
from ..config import VQVAEConfig, square_maps
from ..evaluation.lpips import load_lpips
from ..star import Star, load
from ..transfer import upload
from ..vqvae import VQVAE
from .augmentation import pixel_sources
from .captions import plain_caption
from .discriminator import Adversary, adaptive_weight
from .emoji import EmojiSet
from .lessons import all_tokens, encode_all, run_folder_file
from .packages import asset_path
from .recorded import RecordedStep, recorder_for
from .redrawn import redraw_last_scales
from .run import (
    Average,
    Checkpoint,
    PictureStore,
    adamw,
    add_run_arguments,
    operations_for,
    precision,
    rate_at,
    restore,
    set_rate,
    shuffled_batches,
)
from .tokenizer import add_perceptual_argument, export, psnr

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
        "--adversarial",
        type=float,
        default=0.0,
        help="weight of a discriminator's loss, 0 for none: at 1 it moves the decoder's last layer as hard as"
        " L1 and LPIPS do; the shipped model's is 0.4",
    )
    parser.add_argument(
        "--head-start",
        type=int,
        default=200,
        help="first steps (of --steps) in which the discriminator learns and the decoder does not yet follow",
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
        help="how many last scales it redraws: one version of every picture each. A picture drawn whole is not"
        " compared with the real one: the discriminator alone (--adversarial) judges it",
    )


def decoded(
    vqvae: VQVAE, tokens: Tensor, lengths: list[int], sides: list[int], autocast: AbstractContextManager[Any]
) -> Tensor:
    """Return what the decoder makes of tokens (B, L): pictures (B, 3, H, W), not clamped."""
    with torch.no_grad():
        f_hat = vqvae.quantizer.f_hats(tokens.split(lengths, dim=1), square_maps(sides))[-1]
    with autocast:
        pictures: Tensor = vqvae.decoder(vqvae.post_quant_conv(f_hat))
    return pictures.float()


def check_adversary(args: argparse.Namespace) -> None:
    """Raise ValueError for options of the discriminator that do not make sense."""
    if not 0 <= args.adversarial < math.inf:
        raise ValueError(f"--adversarial {args.adversarial:g} is no weight of a loss: give 0 or more")
    if args.adversarial and not 0 <= args.head_start < args.steps:
        raise ValueError(
            f"--head-start {args.head_start}: of {args.steps} steps it can be 0 to {args.steps - 1}"
        )


def load_redrawing(args: argparse.Namespace) -> Star | None:
    """Return the model that is to redraw pictures, None where none was asked for.

    Raises ValueError where it and the options do not fit each other.
    """
    if args.model is None:
        return None
    if wrong := [count for count in args.redrawn if not 0 < count <= len(args.sides)]:
        scales = len(args.sides)
        raise ValueError(f"--redrawn {wrong[0]}: of {scales} scales the last 1 to {scales} can be")
    if len(args.sides) in args.redrawn and not args.adversarial:
        raise ValueError(
            f"--redrawn {len(args.sides)} draws whole pictures, which only a discriminator can judge: give"
            " --adversarial, or redraw fewer scales"
        )
    star = load(
        args.model,
        vqvae=run_folder_file(args.tokenizer_run, "vqvae.safetensors"),
        text_encoder=args.text,
        dtype=torch.bfloat16 if args.bfloat16 else torch.float32,
        device=args.device,
    )
    if star.config.maps != square_maps(args.sides):
        sides = " ".join(str(height) for height, _ in star.config.maps)
        raise ValueError(f"{args.model} draws scales of {sides}: give --sides {sides}, and its tokenizer's run")
    return star


def token_versions(
    args: argparse.Namespace, star: Star | None, vqvae: VQVAE, own: Tensor, captions: Sequence[str]
) -> Tensor:
    """Return the tokens (V, N, L) of pictures with N captions: `own` (N, L), and each redrawn version."""
    if star is None:
        return own.unsqueeze(0)
    how = {"schedule": args.schedule, "seed": args.seed}
    redrawn = [
        redraw_last_scales(star, vqvae.quantizer, own, captions, count=count, **how) for count in args.redrawn
    ]
    return torch.stack([own, *redrawn])


def stored_versions(args: argparse.Namespace, state: Mapping[str, Any], own: Tensor) -> Tensor:
    """Return the token versions (V, N, L) of a checkpoint; runs from before there were any have `own` (N, L).

    Raises ValueError where the options ask for other ones.
    """
    kept: Tensor = state["versions"].to(own.device) if "versions" in state else own.unsqueeze(0)
    wanted = redrawn_scales(args)
    stored = state.get("redrawn", wanted)  # runs from before they were stored have only a number of versions
    if stored != wanted or len(kept) != 1 + len(wanted):
        told = ", ".join(map(str, stored)) if "redrawn" in state else f"{len(kept) - 1} times"
        raise ValueError(
            f"the pictures of the run in {args.run} are redrawn: {told or 'never'}, these options ask for:"
            f" {', '.join(map(str, wanted)) or 'never'}: give the options that it began with, or another --run"
        )
    return kept


def redrawn_scales(args: argparse.Namespace) -> list[int]:
    """Return how many last scales each version beside the pictures' own tokens has redrawn."""
    return [] if args.model is None else list(args.redrawn)


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
        log.info("a discriminator begins now, with a head start of %d steps", adversary.head_start)
    else:
        adversary.resume(stored)


def distances(made: Tensor, real: Tensor, perceptual: nn.Module, share: float) -> tuple[Tensor, Tensor]:
    """Return L1 and LPIPS of drawn and real pictures (B, 3, H, W), LPIPS of the first `share` of them."""
    few = max(1, int(len(real) * share))
    lpips = perceptual(made[:few].clamp(-1, 1), real[:few]).float().mean()
    return (made - real).abs().mean(), lpips


def mixed_versions(comparable: Sequence[bool], compared: int, batch: int, generator: torch.Generator) -> Tensor:
    """Return which version (B,) each picture of a batch is seen in: the first `compared` in one that is to look
    like it, the others in one that is judged alone."""
    kinds = [
        torch.tensor([n for n, same in enumerate(comparable) if same is wanted]) for wanted in (True, False)
    ]
    counts = [compared, batch - compared]
    drawn = [
        kind[torch.randint(len(kind), (count,), generator=generator)]
        for kind, count in zip(kinds, counts, strict=True)
        if count
    ]
    return torch.cat(drawn)


def run(args: argparse.Namespace) -> None:
    """Train, resuming where a checkpoint is, and export `vqvae.safetensors`."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    check_adversary(args)
    star = load_redrawing(args)
    torch.default_generator.manual_seed(args.seed)  # a training command owns its process
    stored = run_folder_file(args.tokenizer_run, "vqvae.safetensors")
    vqvae = load_vqvae(stored, operations=operations_for(device), device=device)
    data = EmojiSet.load(args.data, args.size)
    maps = square_maps(args.sides)
    lengths = [h * w for h, w in maps]
    pictures_of = PictureStore(data.pictures, device)
    train, held_out = torch.from_numpy(data.indices("train")), torch.from_numpy(data.indices("pairs")[:128])
    tokens = all_tokens(encode_all(pictures_of, vqvae), vqvae, maps)
    trained = [*vqvae.decoder.parameters(), *vqvae.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    last_layer = vqvae.decoder.conv_out.weight
    vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    perceptual = load_lpips(asset_path("lpips", args.packages), "alexnet").to(device)
    optimizer = adamw(trained, args.rate, device, betas=(0.9, 0.95), decay=0.01)
    average = Average(vqvae, 0.995)
    adversary = Adversary(perceptual, args.head_start, device) if args.adversarial else None
    checkpoint = Checkpoint(args.run / "checkpoint.pt")
    if state := checkpoint.load():
        restore(vqvae, [optimizer], {**state, "optimizers": [state["optimizer"]]}, args.run)
        average.resume(state["average"], checkpoint.step)
        resume_adversary(args, adversary, state)
    own = tokens[upload(train, device)]
    comparable = [True, *(count < len(maps) for count in redrawn_scales(args))]
    # The same share of every batch, so that all are of one shape, and of each kind at least one.
    compared = math.ceil(args.batch * sum(comparable) / len(comparable))
    compared = max(1, min(compared, args.batch - (not all(comparable))))
    if state is not None:
        versions = stored_versions(args, state, own)
    else:
        captions = [plain_caption(data.records[row]) for row in train.tolist()]
        versions = token_versions(args, star, vqvae, own, captions)
        checkpoint.started = time.monotonic()

    def save() -> None:
        export(average, vqvae.config, args.run)
        checkpoint.save(
            {
                "model": vqvae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state,
                "adversary": None if adversary is None else adversary.state(),
                "versions": versions,
                "redrawn": redrawn_scales(args),
            }
        )
        found = held_out_psnr(average, vqvae.config, tokens[held_out], pictures_of.take(held_out), args.sides)
        log.info("step %d held-out PSNR %.2f dB", checkpoint.step, found)

    if star is not None and state is None:
        save()  # redrawing took a while
    del star

    def learn(real: Tensor, seen: Tensor, *sources: Tensor, ready: bool) -> tuple[Tensor, ...]:
        """Take in pictures (B, 3, H, W) and tokens (B, L), the first `compared` of which are to become them."""
        made = decoded(vqvae, seen, lengths, args.sides, precision(args))
        with precision(args):
            l1, lpips = distances(made[:compared], real[:compared], perceptual, args.perceptual_share)
        (pull,) = torch.autograd.grad(l1 + args.perceptual * lpips, made)
        told_apart = torch.zeros((), device=device)
        if adversary is not None:
            push, told_apart = adversary.step(made, real, (sources[0], sources[1]), ready=ready)
            if push is not None:
                pull = pull + args.adversarial * adaptive_weight(made, pull, push, last_layer) * push
        optimizer.zero_grad()
        made.backward(pull)
        nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        return l1.detach(), lpips.detach(), told_apart

    learn_step = RecordedStep(learn, recorder_for(device))
    for batch in shuffled_batches(len(train), args.batch, args.seed, checkpoint.step):
        step, done = checkpoint.step, checkpoint.done(args)
        if done >= 1:
            break
        set_rate(optimizer, rate_at(step, done, args.rate))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        version = mixed_versions(comparable, compared, len(batch), generator)
        real = pictures_of.take(train[batch])
        seen = versions[upload(version, device), upload(batch, device)]
        sources, ready = [], False
        if adversary is not None:
            drawn = (pixel_sources(len(batch), real.shape[2:], generator) for _ in range(2))
            sources, ready = [upload(each, device) for each in drawn], adversary.ready
            adversary.steps += 1
        losses = learn_step(real, seen, *sources, ready=ready)
        average.update(vqvae)
        checkpoint.step += 1
        if step % args.log_every == 0:
            seconds = checkpoint.total_seconds()
            shown = (loss.item() for loss in losses)
            log.info("step %d %.0f s l1 %.4f lpips %.4f discriminator %.3f", step, seconds, *shown)
        if checkpoint.step % args.save_every == 0:
            save()
    if checkpoint.step > checkpoint.saved:
        save()


@torch.no_grad()
def held_out_psnr(
    average: Average, config: VQVAEConfig, tokens: Tensor, real: Tensor, sides: list[int]
) -> float:
    """Return the averaged decoder's PSNR in dB on pictures (B, 3, H, W) with these tokens (B, L)."""
    averaged = VQVAE(config).to(real.device)
    averaged.load_state_dict(average.state)
    lengths = [side * side for side in sides]
    made = decoded(averaged, tokens, lengths, sides, nullcontext())
    return psnr(made.clamp(-1, 1), real)
