"""All stages one after the other, each with its share of a time: from pictures to a folder that draws.

For a fast machine that is at hand for minutes, and for a model of one's own by one command. Every stage is the
one that `train STAGE` runs, resumes where it was killed, and is skipped once it has ended. What is prepared for
a stage is not counted: the decoder's redraws pictures in two ways, minutes on a CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from ..config import square_maps
from ..model_files import SHIPPED, STAR_FILE, VQVAE_FILE, quoted
from ..packed import has_bfloat16_products
from ..presets import read_schedule
from . import tokenizer, transformer
from .assemble import assemble, text_width
from .emoji import EmojiSet
from .options import positive_time, training_seed, usable_device
from .packages import asset_path

log = logging.getLogger(__name__)

FOREVER = 10**9
"""Steps of a run that its time ends."""
BEGUN, DONE = "options.json", "done"
"""What a stage was begun with, and that it has ended."""


@dataclass(frozen=True)
class Stage:
    """A stage, its share of the time, and its batches on a CPU and on a GPU."""

    name: str
    share: float
    on_a_cpu: int
    on_a_gpu: int


STAGES = (
    Stage("tokenizer", 0.30, 16, 128),
    Stage("transformer", 0.50, 48, 256),
    Stage("causal_sampler", 0.08, 24, 128),
    Stage("decoder", 0.12, 16, 128),
)
"""A GPU does next to nothing with the CPU's batches (NOTES.md)."""
CORRUPTION = 0.3
"""The largest share of a picture's tokens that a lesson shows wrong."""
REDRAWN = 2500
"""Pictures redrawn in each way on a CPU: some ten minutes each instead of 18 to 25."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `train all` to the command line."""
    parser.add_argument("--run", type=Path, required=True, help="folder of all stages' runs, and of the model")
    parser.add_argument(
        "--minutes",
        type=positive_time,
        default=10.0,
        help="of training; what is prepared for it (pictures redrawn for the decoder) is not counted",
    )
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--sides", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
    parser.add_argument("--text", type=Path, default=SHIPPED, help="folder of the text encoder")
    parser.add_argument("--name", default="star-emoji-64")
    parser.add_argument("--schedule", default="top-k", help="the checkpoint's own schedule, by name or text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=training_seed, default=0)
    for stage in STAGES:
        parser.add_argument(
            f"--{stage.name.replace('_', '-')}",
            default="",
            metavar="OPTIONS",
            help=f"more options of `train {stage.name.removeprefix('causal_')}`, as in"
            f' --{stage.name.replace("_", "-")}="--batch 64"',
        )


class Options(argparse.ArgumentParser):
    """A stage's options, given in quotes."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


def run(args: argparse.Namespace) -> str:
    """Train what is not trained yet, and put the model together; return how to draw with it.

    Raises ValueError for what does not fit, before anything is trained.
    """
    check(args)
    planned = [(stage.name, options, *_parsed(stage, options)) for stage, options in plan(args)]
    for name, options, _, parsed in planned:
        _check_begun(args.run / name, options)
        if getattr(parsed, "matching", 0):
            asset_path("efficientnet", args.packages)  # what the last stage needs is to be missed at once
    for name, options, module, parsed in planned:
        folder = args.run / name
        if (folder / DONE).exists():
            log.info("%s: done before", folder)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "options.part").write_text(json.dumps(options))
        os.replace(folder / "options.part", folder / BEGUN)
        log.info("%s %s", name, shlex.join(options))
        module.run(parsed)
        (folder / DONE).touch()
    out = args.run / "model"
    if not out.exists():
        star, vqvae = args.run / "causal_sampler" / STAR_FILE, args.run / "decoder" / VQVAE_FILE
        assemble(star, vqvae, args.text, out, name=args.name, schedule=args.schedule)
    return f'python -m star_core sample "a red apple" --checkpoint {quoted(out)}'


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for what a late stage would refuse."""
    if math.isinf(args.minutes):
        raise ValueError("--minutes inf would never end: give a number")
    if len(args.sides) < 2:
        raise ValueError("--sides: a model draws 2 scales or more")
    schedule = read_schedule(args.schedule, square_maps(args.sides))
    if any(policy.smooth for policy in schedule.scales):
        raise ValueError(f"--schedule {args.schedule!r} draws smooth: the decoder learns from drawn tokens")
    width, data = text_width(args.text), EmojiSet.load(args.data, args.size)
    try:
        usable_device(args.device)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--device {error}") from None
    parsed = {stage.name: _parsed(stage, options)[1] for stage, options in plan(args)}
    vqvae = tokenizer.make_config(parsed["tokenizer"])
    tokenizer.check_sides(parsed["tokenizer"], vqvae)
    transformer.make_config(parsed["transformer"], width, vqvae)
    pictures = len(data.indices("train"))
    for name, options in parsed.items():
        if options.batch > pictures:
            raise ValueError(
                f"--{name.replace('_', '-')}: {pictures} pictures do not fill a batch of {options.batch}"
            )
        if getattr(options, "compile", False):
            _check_compiler(args.device)
    try:
        args.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run {args.run} can be no folder: {error.strerror}") from None


def _check_compiler(device: str) -> None:
    """Raise ValueError where torch.compile makes no code for a device: it needs Triton and a C compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # whatever the compilers say
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f'blocks cannot be compiled here ({said}): give --transformer="--no-compile", which takes longer'
        ) from None


def _check_begun(folder: Path, options: list[str]) -> None:
    """Raise ValueError where a stage was begun with other options: what follows it has learnt its tokens."""
    if not (folder / BEGUN).exists():
        return
    begun = json.loads((folder / BEGUN).read_text())
    if begun != options:
        raise ValueError(
            f"{folder} was begun with other options ({shlex.join(begun)}): give those, or another --run"
        )


def _parsed(stage: Stage, options: list[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return a stage's module and its options as it reads them."""
    module = importlib.import_module(f".{stage.name}", __package__)
    parser = Options(prog=f"--{stage.name.replace('_', '-')}", add_help=False)
    module.add_arguments(parser)
    return module, parser.parse_args(options)


def plan(args: argparse.Namespace) -> Iterator[tuple[Stage, list[str]]]:
    """Yield every stage with its options."""
    gpu = torch.device(args.device).type == "cuda"
    runs = {stage.name: str(args.run / stage.name) for stage in STAGES}
    sides = ["--sides", *map(str, args.sides)]
    packages = ["--packages", str(args.packages)]
    text = ["--text", str(args.text)]
    ahead = ["--workers", str(min(8, os.cpu_count() or 1))] if gpu else []
    lpips = ["--perceptual", "1", *(["--perceptual-share", "1"] if gpu else [])]
    corruption = ["--corruption", str(CORRUPTION)]
    # What the sixth model that shipped was made with, and for a CPU what its time and memory allow: two plain
    # renderings and two nudged ones.
    learning = ["--variants", "12", "--rate", "2.5e-3", "--compile"] if gpu else ["--variants", "4"]
    redrawing = ["--rate", "1e-3", "--head-start", "150"] if gpu else ["--redrawn-pictures", str(REDRAWN)]
    tokens = ["--tokenizer-run", runs["tokenizer"]]
    redraw = [
        "--redrawn",
        str(min(2, len(args.sides) - 1)),
        str(len(args.sides)),
        *("--adversarial", "0.4", "--matching", "0.1"),
        *redrawing,
    ]
    own = {
        "tokenizer": [*sides, *packages, *lpips],
        "transformer": [*sides, *tokens, *text, *ahead, *corruption, *learning, "--name", args.name],
        "causal_sampler": [
            *(*tokens, *text, *ahead, *corruption, "--variants", "2", "--masks", "2"),
            *("--transformer-run", runs["transformer"]),
        ],
        "decoder": [
            *(*sides, *tokens, *text, *packages, *redraw, *lpips),
            *("--model", str(Path(runs["causal_sampler"]) / STAR_FILE), "--schedule", args.schedule),
        ],
    }
    for stage in STAGES:
        shared = ["--run", runs[stage.name], "--data", str(args.data), "--size", str(args.size)]
        shared += ["--device", args.device, "--seed", str(args.seed)]
        shared += ["--bfloat16"] if gpu or has_bfloat16_products() else []
        shared += ["--batch", str(stage.on_a_gpu if gpu else stage.on_a_cpu), "--steps", str(FOREVER)]
        shared += ["--time-limit", f"{60 * args.minutes * stage.share:g}"]
        try:
            more = shlex.split(getattr(args, stage.name))
        except ValueError as error:
            raise ValueError(f"--{stage.name.replace('_', '-')}: {error}") from None
        yield stage, [*shared, *own[stage.name], *more]
