"""The `evaluate` command: tables of a model on held-out data, or the blind sheet of 48 pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..star import load
from ..training.emoji import EmojiSet
from ..training.minilm import load_minilm
from ..training.packages import asset_path
from .artist import StarArtist
from .held_out import Extent, RealSide, load_real_side
from .inception import FeatureCache, FeatureFunction, Features, load_inception
from .lpips import load_lpips
from .measure import Artist, measure
from .sheet import draw_sheet, load_prompts, mark, read_answers

# Top-k alone, smooth sampling, the causal sampler alone, and with the transformer's confidence.
SCHEDULES = ("top-k", "smooth", "sampler", "demo-1024")

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    parser.add_argument("--model", type=Path, help="model folder (default: the shipped model)")
    parser.add_argument("--real-only", action="store_true", help="measure the real pictures alone")
    parser.add_argument(
        "--schedules", nargs="+", default=SCHEDULES, metavar="NAME", help="presets or schedule texts"
    )
    parser.add_argument("--count", type=int, help="pictures of each held-out split (default: all of them)")
    parser.add_argument("--training-count", type=int, help="training pictures for the scorers (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the drawn pictures")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--data", type=Path, default=Path("build/emoji"), help="picture set")
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--cache", type=Path, default=Path("build/eval"), help="features of real pictures")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    eight_bit = parser.add_mutually_exclusive_group()
    for name, what in (("int8", "bytes"), ("fp8", "8-bit floats, for GPUs that multiply them")):
        text = f"8-bit weights, a fast mode: {what}"
        eight_bit.add_argument(f"--{name}", dest="eight_bit", action="store_const", const=name, help=text)
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="draw the 48 fixed prompts by the last schedule"
    )
    parser.add_argument("--answers", type=Path, metavar="FILE", help="mark a reader's answers to the sheet")


def run(args: argparse.Namespace) -> str:
    """Do what the options ask for and return the text to print, the JSON line last.

    Raises ValueError for a missing model, data set or file, and for answers that do not fit.
    """
    if args.answers is not None:
        return marked(args.answers)
    if args.sheet is not None:
        return sheet(_artist(args), args.sheet, schedule=args.schedules[-1], seed=args.seed)
    extent = Extent(held_out=args.count, training=args.training_count)
    artist = None if args.real_only else _artist(args)
    features_of = load_inception(asset_path("inception", args.packages), args.device)
    report = measure(
        artist,
        _real_side(args, extent, features_of),
        schedules=args.schedules,
        features_of=features_of,
        metric=load_lpips(asset_path("lpips", args.packages), "vgg16").to(args.device),
        seed=args.seed,
    )
    return f"{report.markdown()}\n\n{report.json_line()}"


def sheet(artist: Artist, file: Path, *, schedule: str, seed: int) -> str:
    """Draw the fixed prompts, save the numbered sheet, and return a line that says so."""
    prompts = load_prompts()
    pictures = artist.draw([prompt.prompt for prompt in prompts], schedule, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(pictures).save(file)
    return f"{len(prompts)} pictures drawn by {schedule} with seed {seed}: {file}"


def marked(file: Path) -> str:
    """Return a table of a reader's answers to the sheet, and how many are right."""
    prompts = load_prompts()
    try:
        answers = read_answers(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    right = mark(answers, prompts)
    lines = ["| | prompt | answer | right |", "| --- | --- | --- | --- |"]
    for number, (prompt, ok) in enumerate(zip(prompts, right, strict=True), start=1):
        answer = answers.get(number, "-")
        lines.append(f"| {number} | {prompt.prompt} | {answer} | {'yes' if ok else 'no'} |")
    return "\n".join([*lines, "", f"{sum(right)} of {len(prompts)} named right"])


def _artist(args: argparse.Namespace) -> Artist:
    """Return the model that --model names, the shipped one without it."""
    star = load(args.model, dtype=getattr(torch, args.dtype), device=args.device, eight_bit=args.eight_bit)
    loaded = [args.dtype] * (args.dtype != "float32") + ([args.eight_bit] if args.eight_bit else [])
    return StarArtist(star, args.size, ", ".join([star.config.name, *loaded]))


def _real_side(args: argparse.Namespace, extent: Extent, features_of: FeatureFunction) -> RealSide:
    """Return the real pictures' side of the measures, with features cached on disk."""
    emoji = EmojiSet.load(args.data, args.size)
    return load_real_side(
        emoji,
        features_of=FeatureCache(args.cache / "inception", features_of),
        embed=lambda captions: _embed(captions, args.packages),
        cache=args.cache,
        extent=extent,
    )


def _embed(captions: Sequence[str], packages: Path) -> Features:
    """Return the (N, 384) MiniLM embeddings of captions; the model is loaded only for this."""
    _log.info("embedding %d captions", len(captions))
    minilm = load_minilm(asset_path("minilm", packages))
    return np.asarray(minilm.embed(captions).numpy(), dtype=np.float32)
