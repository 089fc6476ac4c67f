"""All stages one after the other, each with its share of a time: from pictures to a folder that draws.

For a fast machine that is at hand for minutes, and for a model of one's own by one command. Every stage is the
one that `train STAGE` runs, resumes where it was killed, and is skipped once its time is up.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..star import SHIPPED, STAR_FILE, VQVAE_FILE
from .assemble import assemble
from .run import positive_time

log = logging.getLogger(__name__)

FOREVER = 10**9
"""Steps of a run that its time ends."""
DONE = "done.json"


@dataclass(frozen=True)
class Stage:
    """A stage, its share of the time, and its batches on a CPU and on a GPU."""

    name: str
    share: float
    on_a_cpu: int
    on_a_gpu: int


STAGES = (
    Stage("tokenizer", 0.35, 16, 512),
    Stage("transformer", 0.42, 48, 1024),
    Stage("causal_sampler", 0.08, 24, 512),
    Stage("decoder", 0.15, 16, 128),
)
"""A GPU is bound by launches with the CPU's batches (NOTES.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `train all` to the command line."""
    parser.add_argument("--run", type=Path, required=True, help="folder of all stages' runs, and of the model")
    parser.add_argument(
        "--minutes",
        type=positive_time,
        default=10.0,
        help="of training; what is prepared for it is not counted",
    )
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--sides", type=int, nargs="+", default=[1, 2, 4, 6, 8, 10, 13, 16])
    parser.add_argument("--text", type=Path, default=SHIPPED, help="folder of the text encoder")
    parser.add_argument("--name", default="star-emoji-64")
    parser.add_argument("--schedule", default="top-k", help="the checkpoint's own schedule, by name or text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    for stage in STAGES:
        parser.add_argument(
            f"--{stage.name.replace('_', '-')}",
            default="",
            metavar="OPTIONS",
            help=f"more options of `train {stage.name.removeprefix('causal_')}`, in quotes",
        )


def run(args: argparse.Namespace) -> str:
    """Train what is not trained yet, and put the model together; return how to draw with it."""
    for stage, options in plan(args):
        folder = args.run / stage.name
        mark = folder / DONE
        if mark.exists() and json.loads(mark.read_text()) == options:
            log.info("%s: done before", folder)
            continue
        module = importlib.import_module(f".{stage.name}", __package__)
        parser = argparse.ArgumentParser(prog=f"train all: {stage.name}")
        module.add_arguments(parser)
        log.info("%s %s", stage.name, shlex.join(options))
        module.run(parser.parse_args(options))
        mark.write_text(json.dumps(options))
    out = args.run / "model"
    star, vqvae = args.run / "causal_sampler" / STAR_FILE, args.run / "decoder" / VQVAE_FILE
    if not (out / STAR_FILE).exists():
        assemble(star, vqvae, args.text, out, name=args.name, schedule=args.schedule)
    return f'python -m star_core sample "a red apple" --checkpoint {shlex.quote(str(out))}'


def plan(args: argparse.Namespace) -> Iterator[tuple[Stage, list[str]]]:
    """Yield every stage with its options."""
    gpu = torch.device(args.device).type == "cuda"
    runs = {stage.name: str(args.run / stage.name) for stage in STAGES}
    sides = ["--sides", *map(str, args.sides)]
    packages = ["--packages", str(args.packages)]
    text = ["--text", str(args.text)]
    ahead = ["--workers", str(min(8, os.cpu_count() or 1))] if gpu else []
    tokens = ["--tokenizer-run", runs["tokenizer"]]
    redraw = ["--redrawn", "1", str(len(args.sides)), "--adversarial", "0.4"]
    own = {
        "tokenizer": [*sides, *packages, "--perceptual", "1"],
        "transformer": [*sides, *tokens, *text, *ahead, "--variants", "4", "--name", args.name],
        "causal_sampler": [*tokens, *text, *ahead, "--variants", "4", "--transformer-run", runs["transformer"]],
        "decoder": [
            *(*sides, *tokens, *text, *packages, *redraw, "--perceptual", "1"),
            *("--model", str(Path(runs["causal_sampler"]) / STAR_FILE), "--schedule", args.schedule),
        ],
    }
    for stage in STAGES:
        shared = ["--run", runs[stage.name], "--data", str(args.data), "--size", str(args.size)]
        shared += ["--device", args.device, "--seed", str(args.seed), "--bfloat16"]
        shared += ["--batch", str(stage.on_a_gpu if gpu else stage.on_a_cpu), "--steps", str(FOREVER)]
        shared += ["--time-limit", f"{60 * args.minutes * stage.share:g}"]
        more = shlex.split(getattr(args, stage.name))
        yield stage, [*shared, *own[stage.name], *more]
