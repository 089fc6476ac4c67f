"""Puts a model's folder together from the files that the stages wrote, with its name and schedule."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import load_vqvae
from ..config import StarConfig
from ..model_files import SHIPPED, STAR_FILE, VQVAE_FILE
from ..presets import read_schedule
from ..stored import METADATA_KEY, resolve_config
from ..text_encoder import load_text_encoder
from ..weights import TensorFile, save_tensors
from .soup import Soup

log = logging.getLogger(__name__)

TEXT_PARTS = ("text_encoder", "tokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `train model` to the command line."""
    parser.add_argument(
        "--star", type=Path, required=True, help="star.safetensors of the last stage that wrote one"
    )
    parser.add_argument(
        "--mean-with",
        type=Path,
        nargs="+",
        default=[],
        metavar="STAR",
        help="star.safetensors of runs that this one went on from, or that went on from it: the model's"
        " transformer is the mean of theirs and --star's, whose causal sampler stays",
    )
    parser.add_argument("--vqvae", type=Path, required=True, help="vqvae.safetensors with the same codebook")
    parser.add_argument(
        "--text",
        type=Path,
        default=SHIPPED,
        help="folder of text_encoder/ and tokenizer/ (default: the shipped ones)",
    )
    parser.add_argument("--name", help="what the checkpoint is called (default: as it is)")
    parser.add_argument("--schedule", help="its own schedule, by name or text (default: as it is)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")


def run(args: argparse.Namespace) -> str:
    """Write the folder; return a line that says where it is."""
    config = assemble(
        args.star,
        args.vqvae,
        args.text,
        args.out,
        mean_with=args.mean_with,
        name=args.name,
        schedule=args.schedule,
    )
    return f"{args.out}: {config.name}, schedule {config.schedule}"


def text_width(text: Path) -> int:
    """Return how wide the states of a folder's text encoder are. Raises ValueError where a part is missing."""
    for part in TEXT_PARTS:
        if not (text / part).is_dir():
            raise ValueError(f"{text / part} is missing: a model's folder has {' and '.join(TEXT_PARTS)}")
    return load_text_encoder(text).width


def assemble(
    star: Path,
    vqvae: Path,
    text: Path,
    out: Path,
    *,
    mean_with: Sequence[Path] = (),
    name: str | None = None,
    schedule: str | None = None,
) -> StarConfig:
    """Write a model's folder, which `load` reads; return its configuration.

    Its transformer is `star`'s, or the mean of that and of the files' in `mean_with` (see soup.py). Raises
    ValueError where a file is missing or not of this architecture, where the schedule does not fit, and
    where `out` holds something already. Then, as after a kill, nothing is written there.
    """
    file = TensorFile(star)
    config = resolve_config(file, None)
    config = dataclasses.replace(config, name=name or config.name, schedule=schedule or config.schedule)
    read_schedule(config.schedule, config.maps)
    weights = Soup(star, mean_with)
    load_vqvae(vqvae, config.vqvae)
    if (width := text_width(text)) != config.transformer.text_width:
        raise ValueError(f"{text} has states {width} wide, {star} reads {config.transformer.text_width}")
    try:
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds something already: choose a new folder for --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as beside:
            whole = Path(beside, out.name)
            for part in TEXT_PARTS:
                shutil.copytree(text / part, whole / part)
            shutil.copyfile(vqvae, whole / VQVAE_FILE)
            save_tensors(whole / STAR_FILE, weights, {METADATA_KEY: config.to_json()})
            if out.exists():
                out.rmdir()
            os.replace(whole, out)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror}") from error
    log.info("%s: transformer, VQ-VAE and text encoder", out)
    return config
