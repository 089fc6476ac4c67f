"""What a `sample` call is to do: its options checked, its prompts read, a file for each picture."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .packed import can_be_packed
from .pictures import is_text, read_recipe
from .transfer import why_unusable

DEFAULTS = {"negative": "", "seed": 0, "count": 1, "dtype": "float32", "graphs": False, "packed": False}
"""Options that a recipe decides too: None where they are not given, else one could not tell."""

OF_A_RECIPE = {
    **{name: f"--{name}" for name in ("negative", "seed", "count", "schedule", "size", "dtype")},
    **{"prompts": "prompts", "prompts_file": "--prompts-file", "eight_bit": "--int8 or --fp8"},
    **{"graphs": "--graphs", "packed": "--packed"},
}
"""What a recipe decides, and how it is written on the command line."""


@dataclass(frozen=True)
class Job:
    """One picture to draw and where it goes."""

    prompt: str
    index: int
    path: Path

    @property
    def strip_path(self) -> Path:
        """Where the strip of its scales goes."""
        return strip_path(self.path)


def strip_path(path: Path) -> Path:
    """Return where the strip of a picture's scales goes: beside it."""
    return path.with_name(f"{path.stem}-scales.png")


@dataclass(frozen=True)
class SamplePlan:
    """Checked options of one `sample` call."""

    jobs: tuple[Job, ...]
    negative: str
    seed: int
    schedule: str | None
    size: tuple[int, int] | None
    strip: bool
    quiet: bool
    arguments: argparse.Namespace
    model: str | None = None


def plan_sample(args: argparse.Namespace) -> SamplePlan:
    """Check the options. Raises ValueError in one line for a mistake, before any model is loaded."""
    if args.out is not None and args.folder is not None:
        raise ValueError("--out and --folder exclude each other")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.gpu_memory is not None and (args.batch or 1) > 1:
        raise ValueError("--gpu-memory is reckoned for one picture at a time: leave --batch out")
    plan = _plan_from_prompts(_filled(args, DEFAULTS)) if args.recipe is None else _plan_from_recipe(args)
    for path in [path for job in plan.jobs for path in (job.path, *([job.strip_path] if plan.strip else []))]:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, a picture cannot be written there")
    return plan


def _filled(args: argparse.Namespace, values: Mapping[str, object]) -> argparse.Namespace:
    """Return the options with these values where nothing was given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**vars(args), **values, **given})


def _plan_from_prompts(args: argparse.Namespace) -> SamplePlan:
    prompts = [*args.prompts, *_prompts_of(args.prompts_file)]
    if not prompts:
        raise ValueError('nothing to draw: write a prompt, as in sample "a red apple"')
    for text in (*prompts, args.negative):
        if not is_text(text):
            raise ValueError(f"{text!r:.80} is no text: some of its bytes are not UTF-8")
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    number = len(prompts) * args.count
    if args.out is not None and number > 1:
        raise ValueError(f"--out is for one picture, this makes {number}: use --folder")
    places = [(prompt, index) for prompt in prompts for index in range(args.count)]
    stems = [f"{_words_of(prompt)}-s{args.seed}-{index}" for prompt, index in places]
    paths = [_png(args.out)] if args.out is not None else _free_paths(args.folder or Path(), stems)
    jobs = tuple(Job(p, i, path) for (p, i), path in zip(places, paths, strict=True))
    return SamplePlan(
        jobs,
        args.negative,
        _seed(args.seed),
        _schedule_text(args.schedule),
        _size(args.size),
        args.strip,
        args.quiet,
        args,
    )


def _plan_from_recipe(args: argparse.Namespace) -> SamplePlan:
    given = [option for name, option in OF_A_RECIPE.items() if getattr(args, name) not in (None, [])]
    if given:
        raise ValueError(f"--recipe decides these itself, leave them out: {', '.join(given)}")
    recipe = read_recipe(args.recipe)
    # Graphs and packed weights are only a matter of rounding: where they cannot be had the picture is drawn as
    # near as can be.
    device = pick_device(args.device)
    graphs = recipe.graphs and args.gpu_memory is None and device.type == "cuda"
    packed = recipe.packed and can_be_packed(getattr(torch, recipe.dtype), device)
    loaded = {"dtype": recipe.dtype, "eight_bit": recipe.eight_bit, "graphs": graphs, "packed": packed}
    stems = [f"again-{args.recipe.stem}"]
    (path,) = [_png(args.out)] if args.out else _free_paths(Path(args.folder or "."), stems)
    return SamplePlan(
        (Job(recipe.prompt, recipe.index, path),),
        recipe.negative,
        recipe.seed,
        recipe.schedule,
        recipe.size,
        args.strip,
        args.quiet,
        _filled(args, loaded),
        recipe.model,
    )


def _prompts_of(path: Path | None) -> list[str]:
    # Lines end at \n alone: a form feed, or what Unicode calls a line separator, may stand in a prompt.
    lines = [] if path is None else _text_of(path).split("\n")
    return [line.strip() for line in lines if line.strip()]


def _text_of(path: Path) -> str:
    """Return a file's text without a byte order mark. Raises ValueError naming a file that is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as .png, which carries the recipe")
    return path


def _words_of(prompt: str) -> str:
    """Return a prompt as the beginning of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"


def _free_paths(folder: Path, stems: Sequence[str]) -> list[Path]:
    """Return a free name per picture, numbered where it must be; nothing that exists is overwritten."""
    taken: set[Path] = set()
    paths = []
    for stem in stems:
        path, number = folder / f"{stem}.png", 2
        while path in taken or path.exists() or strip_path(path).exists():
            path, number = folder / f"{stem}-{number}.png", number + 1
        taken.add(path)
        paths.append(path)
    return paths


def _seed(seed: int) -> int:
    from .sampling import MAX_SEED

    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"--seed lies between 0 and {MAX_SEED}, got {seed}")
    return seed


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ValueError(f"--size is written as 64x64 (width x height), got {text!r}")
    return int(match.group(2)), int(match.group(1))


def _schedule_text(choice: str | None) -> str | None:
    if choice is None:
        return None
    # os.path's, which a text too long for a name does not trouble.
    return _text_of(Path(choice)) if os.path.isfile(choice) else choice


def pick_device(name: str) -> torch.device:
    """Return the named device, or the fastest one there is. Raises ValueError for one that is not there."""
    if not name:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if (reason := why_unusable(name)) is not None:
        raise ValueError(f"device {name!r} cannot be used here ({reason})")
    return torch.device(name)
