"""The `evaluate` command: tables of a model on held-out data, or the blind sheet of 48 pictures."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..star import load
from ..training.emoji import EmojiSet
from ..training.minilm import load_minilm
from ..training.options import usable_device
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
    parser.add_argument("--device", type=usable_device, default="cpu")
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

    Raises ValueError for a missing model, data set or file and for a schedule that the model cannot draw by,
    before anything is downloaded or computed; and for answers that do not fit.
    """
    if args.answers is not None:
        return marked(args.answers)
    if args.sheet is not None:
        check_place(args.sheet)
        schedule = args.schedules[-1]
        return sheet(_artist(args, [schedule]), args.sheet, schedule=schedule, seed=args.seed)
    extent = Extent(held_out=args.count, training=args.training_count)
    emoji = EmojiSet.load(args.data, args.size)
    artist = None if args.real_only else _artist(args, args.schedules)
    features_of = load_inception(asset_path("inception", args.packages), torch.device(args.device))
    report = measure(
        artist,
        _real_side(args, emoji, extent, features_of),
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
    draw_sheet(pictures).save(file)
    return f"{len(prompts)} pictures drawn by {schedule} with seed {seed}: {file}"


def check_place(file: Path) -> None:
    """Make the sheet's folder. Raises ValueError where no picture can be written there, or by that name."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=file.suffix) as trial:
            Image.new("RGB", (1, 1)).save(trial)
    except OSError as error:
        raise ValueError(f"--sheet {file} cannot be written: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"--sheet {file} names no kind of picture ({error}): give a .png") from None
    if file.is_dir():
        raise ValueError(f"--sheet {file} is a folder: name a file")


def marked(file: Path) -> str:
    """Return a table of a reader's answers to the sheet, and how many are right.

    Raises ValueError for a file that cannot be read as text, and for answers that do not fit.
    """
    prompts = load_prompts()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error.reason}): save it as that") from None
    answers = read_answers(text)
    right = mark(answers, prompts)
    lines = ["| | prompt | answer | right |", "| --- | --- | --- | --- |"]
    for number, (prompt, ok) in enumerate(zip(prompts, right, strict=True), start=1):
        answer = answers.get(number, "-")
        lines.append(f"| {number} | {prompt.prompt} | {answer} | {'yes' if ok else 'no'} |")
    return "\n".join([*lines, "", f"{sum(right)} of {len(prompts)} named right"])


def _artist(args: argparse.Namespace, schedules: Sequence[str]) -> Artist:
    """Return the model that --model names, the shipped one without it, if it can draw by these schedules."""
    star = load(args.model, dtype=getattr(torch, args.dtype), device=args.device, eight_bit=args.eight_bit)
    loaded = [args.dtype] * (args.dtype != "float32") + ([args.eight_bit] if args.eight_bit else [])
    artist = StarArtist(star, args.size, ", ".join([star.config.name, *loaded]))
    for schedule in schedules:
        artist.check(schedule, args.seed)
    return artist


def _real_side(
    args: argparse.Namespace, emoji: EmojiSet, extent: Extent, features_of: FeatureFunction
) -> RealSide:
    """Return the real pictures' side of the measures, with features cached on disk."""
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
