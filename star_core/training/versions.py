"""Which tokens the decoder learns a picture from: its own, and those whose last scales a model has drawn."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import square_maps
from ..star import Star, load
from ..vqvae import VQVAE
from .lessons import run_folder_file
from .redrawn import redraw_last_scales


def load_redrawing(args: argparse.Namespace) -> Star | None:
    """Return the model that is to redraw pictures, None where none was asked for.

    Raises ValueError where it and the options do not fit each other.
    """
    if args.model is None:
        if args.redrawn_pictures is not None:
            raise ValueError("--redrawn-pictures asks for drawn pictures: give the --model that draws them")
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
    """Return the tokens (V, N, L) of pictures with N captions: `own` (N, L), and each redrawn version.

    Where only some pictures are redrawn, the others are in a version as they are or, where it is drawn whole
    and nothing is compared, as one of those that were.
    """
    if star is None:
        return own.unsqueeze(0)
    rows = redrawn_pictures(args, len(own)).to(own.device)
    some = [captions[row] for row in rows.tolist()]
    versions = [own]
    for count in args.redrawn:
        how = {"count": count, "schedule": args.schedule, "seed": args.seed}
        drawn = redraw_last_scales(star, vqvae.quantizer, own[rows], some, **how)
        whole = count == len(args.sides)
        every = drawn[torch.arange(len(own), device=own.device) % len(rows)] if whole else own.clone()
        every[rows] = drawn
        versions.append(every)
    return torch.stack(versions)


def redrawn_pictures(args: argparse.Namespace, count: int) -> Tensor:
    """Return which of `count` pictures are redrawn, in rising order: all, or as many as asked for at random."""
    wanted = min(args.redrawn_pictures or count, count)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
    return drawn[:wanted].sort().values


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
    count = state.get("redrawn_pictures")
    if wanted and count != args.redrawn_pictures:
        raise ValueError(
            f"{count or 'all'} pictures of the run in {args.run} are redrawn, these options ask for"
            f" {args.redrawn_pictures or 'all'}: give the number that it began with, or another --run"
        )
    by = redrawn_by(args)
    if wanted and (began := state.get("redrawn_by", by)) != by:
        raise ValueError(
            f"the pictures of the run in {args.run} were redrawn by {began}, these options ask for {by}: give"
            " those, or another --run"
        )
    return kept


def redrawn_by(args: argparse.Namespace) -> str | None:
    """Return what draws the versions, None for none: the model's bytes, its schedule, the seed."""
    if args.model is None:
        return None
    digest = hashlib.sha256(args.model.read_bytes()).hexdigest()[:12]
    return f"{args.model.name} ({digest}), --schedule {args.schedule!r}, --seed {args.seed}"


def redrawn_scales(args: argparse.Namespace) -> list[int]:
    """Return how many last scales each version beside the pictures' own tokens has redrawn."""
    return [] if args.model is None else list(args.redrawn)


def comparable_versions(args: argparse.Namespace) -> list[bool]:
    """Return for each version whether it can be compared with the picture: one drawn whole cannot."""
    return [True, *(count < len(args.sides) for count in redrawn_scales(args))]


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
