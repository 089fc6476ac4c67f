"""The options of training stages: what they have in common, and numbers that are refused in plain words."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ..transfer import why_unusable

Number = TypeVar("Number", int, float)


def _number(text: str, kind: Callable[[str], Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None


def at_least(least: int, what: str) -> Callable[[str], int]:
    """Return an option's type: how many of something. Fewer than `least` are an argparse.ArgumentTypeError."""

    def read(text: str) -> int:
        if (number := _number(text, int)) < least:
            raise argparse.ArgumentTypeError(f"{number} is no number of {what}: give {least} or more")
        return number

    return read


def positive_time(text: str) -> float:
    """Return an option's seconds or minutes. Raises argparse.ArgumentTypeError where no time is left."""
    found = _number(text, float)
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text} leaves no time: give more than 0")
    return found


def share(text: str) -> float:
    """Return an option's share. Raises argparse.ArgumentTypeError for one that is not from 0 to below 1."""
    found = _number(text, float)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give 0 to below 1")
    return found


def probability(text: str) -> float:
    """Return an option's probability. Raises argparse.ArgumentTypeError for one that is not from 0 to 1."""
    found = _number(text, float)
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability: give 0 to 1")
    return found


def part(text: str) -> float:
    """Return an option's part of a whole. Raises argparse.ArgumentTypeError for none and for more than all."""
    found = _number(text, float)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no part: give more than 0, 1 at most")
    return found


def non_negative(text: str) -> float:
    """Return an option's factor. Raises argparse.ArgumentTypeError below 0, and for what is not finite."""
    found = _number(text, float)
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is out of range: give a finite number from 0 up")
    return found


def learning_rate(text: str) -> float:
    """Return an option's rate. Raises argparse.ArgumentTypeError for one that nothing is learnt at."""
    found = _number(text, float)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no learning rate: give a finite number above 0")
    return found


def usable_device(text: str) -> str:
    """Return an option's device. Raises argparse.ArgumentTypeError for one that does not compute here."""
    if (reason := why_unusable(text)) is not None:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({reason})")
    return text


def training_seed(text: str) -> int:
    """Return an option's seed. Raises argparse.ArgumentTypeError for one that generators do not take."""
    found = _number(text, int)
    if not 0 <= found < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is no seed: give 0 to {2**32 - 1}")
    return found


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """Add how many processes make captions."""
    parser.add_argument(
        "--workers",
        type=at_least(0, "processes"),
        default=0,
        help="processes that make captions ahead, for a fast GPU",
    )


def add_compile_argument(parser: argparse.ArgumentParser) -> None:
    """Add whether the blocks' operations are fused."""
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="fuse the blocks' operations with torch.compile; on a CPU it needs a C++ compiler",
    )


def add_run_arguments(parser: argparse.ArgumentParser, *, steps: int, batch: int, rate: float) -> None:
    """Add the options that every stage has."""
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and export")
    parser.add_argument(
        "--steps", type=at_least(1, "steps"), default=steps, help="total steps, resumed ones too"
    )
    parser.add_argument("--batch", type=at_least(1, "examples"), default=batch, help="examples of a step")
    parser.add_argument("--rate", type=learning_rate, default=rate, help="peak learning rate")
    parser.add_argument("--seed", type=training_seed, default=0)
    parser.add_argument(
        "--threads", type=at_least(0, "threads"), default=0, help="CPU threads (0: torch's choice)"
    )
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--save-every", type=at_least(1, "steps"), default=200, help="steps between checkpoints"
    )
    parser.add_argument(
        "--log-every", type=at_least(1, "steps"), default=20, help="steps between lines of progress"
    )
    parser.add_argument(
        "--time-limit",
        type=positive_time,
        default=math.inf,
        help="seconds of training after which the run ends, before its steps: for a machine lent for minutes",
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="forward passes under bfloat16 autocast, for processors that have it",
    )


def add_corruption_argument(parser: argparse.ArgumentParser) -> None:
    """Add how many tokens are wrong on the way to a lesson."""
    parser.add_argument(
        "--corruption",
        type=share,
        default=0.0,
        help="largest share of a picture's tokens that are shown wrong, for the next scales to make up for",
    )


def add_plain_captions_argument(parser: argparse.ArgumentParser) -> None:
    """Add how many captions are plain."""
    parser.add_argument(
        "--plain-captions",
        type=probability,
        default=0.0,
        help="share of captions that name style and label alone, as prompts do; the others are reworded at"
        " random, and about four in ten of those name both (one in ten texts is empty, for guidance)",
    )
