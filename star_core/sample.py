"""What the `sample` command does: read its options, draw, write pictures with their recipes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .packed import can_be_packed
from .pictures import Recipe, read_recipe, save_png, strip, to_images

if TYPE_CHECKING:
    from .request import ScaleStep
    from .star import Star

PICTURES_PER_BATCH = 16


@dataclass(frozen=True)
class Job:
    """One picture to draw and where it goes."""

    prompt: str
    index: int
    path: Path


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
    if args.recipe is not None:
        return _plan_from_recipe(args)
    prompts = [*args.prompts, *_prompts_of(args.prompts_file)]
    if not prompts:
        raise ValueError('nothing to draw: write a prompt, as in sample "a red apple"')
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    number = len(prompts) * args.count
    if args.out is not None and number > 1:
        raise ValueError(f"--out is for one picture, this makes {number}: use --folder")
    if args.out is not None and args.folder is not None:
        raise ValueError("--out and --folder exclude each other")
    places = [(prompt, index) for prompt in prompts for index in range(args.count)]
    paths = [_png(args.out)] if args.out is not None else _paths(args.folder or Path(), places, args.seed)
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
    if args.prompts or args.prompts_file or args.count != 1:
        raise ValueError("--recipe brings its own prompt and seed: leave prompts and --count out")
    recipe = read_recipe(args.recipe)
    # Graphs and packed weights are only a matter of rounding: where they cannot be had the picture is drawn as
    # near as can be.
    device = pick_device(args.device)
    graphs = recipe.graphs and args.gpu_memory is None and device.type == "cuda"
    packed = recipe.packed and can_be_packed(getattr(torch, recipe.dtype), device)
    loaded = {"dtype": recipe.dtype, "eight_bit": recipe.eight_bit, "graphs": graphs, "packed": packed}
    args = argparse.Namespace(**{**vars(args), **loaded})
    path = _png(args.out) if args.out else Path(args.folder or ".") / f"again-{args.recipe.name}"
    return SamplePlan(
        (Job(recipe.prompt, recipe.index, path),),
        recipe.negative,
        recipe.seed,
        recipe.schedule,
        recipe.size,
        args.strip,
        args.quiet,
        args,
        recipe.model,
    )


def _prompts_of(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as .png, which carries the recipe")
    return path


def _paths(folder: Path, places: Sequence[tuple[str, int]], seed: int) -> list[Path]:
    """Return a free, readable name per picture; nothing that exists is overwritten."""
    taken: set[Path] = set()
    paths = []
    for prompt, index in places:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "picture"
        stem = f"{words}-s{seed}-{index}"
        path, number = folder / f"{stem}.png", 2
        while path in taken or path.exists():
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
    if "\n" not in choice and len(choice) < 200 and Path(choice).is_file():
        return Path(choice).read_text(encoding="utf-8")
    return choice


def pick_device(name: str) -> torch.device:
    """Return the named device, or the fastest one there is. Raises ValueError for one that is not there."""
    if not name:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({first:.120})") from error
    return device


def load_for(args: argparse.Namespace) -> Star:
    """Load the model that the options name."""
    from .star import load

    return load(
        args.checkpoint,
        vqvae=args.vqvae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        preset=args.preset,
        dtype=getattr(torch, args.dtype),
        device=pick_device(args.device),
        eight_bit=args.eight_bit,
        graphs=args.graphs,
        packed=args.packed,
        gpu_memory=None if args.gpu_memory is None else int(args.gpu_memory * 1e9),
    )


def run_sample(plan: SamplePlan) -> Iterator[Path]:
    """Draw a plan's pictures batch by batch; yield each file as it is written."""
    star = load_for(plan.arguments)
    if plan.model is not None and plan.model != star.config.name:
        raise ValueError(
            f"the recipe was drawn by {plan.model}, this checkpoint is {star.config.name}: name the"
            " right one with --checkpoint"
        )
    # A limit of memory is reckoned for one picture at a time.
    together = PICTURES_PER_BATCH if plan.arguments.gpu_memory is None else 1
    for start in range(0, len(plan.jobs), together):
        yield from _draw_batch(star, plan, plan.jobs[start : start + together])


def _draw_batch(star: Star, plan: SamplePlan, jobs: Sequence[Job]) -> Iterator[Path]:
    from .star import Options

    options = Options(
        seed=plan.seed,
        indices=tuple(job.index for job in jobs),
        schedule=plan.schedule,
        size=plan.size,
    )
    request = star.request([job.prompt for job in jobs], plan.negative, options)
    steps = list(_with_bar(star.run(request), len(request.maps), plan.quiet))
    images = to_images(star.decode(steps[-1].f_hat, sliced=plan.arguments.low_memory or None))
    text = request.schedule.to_text()
    height, width = images[0].height, images[0].width
    for job, image in zip(jobs, images, strict=True):
        recipe = Recipe(
            job.prompt,
            plan.negative,
            plan.seed,
            job.index,
            text,
            (height, width),
            star.config.name,
            plan.arguments.dtype,
            plan.arguments.eight_bit,
            plan.arguments.graphs,
            plan.arguments.packed,
        )
        save_png(image, job.path, recipe)
        yield job.path
    if plan.strip:
        stages = [
            to_images(star.decode(step.f_hat, sliced=plan.arguments.low_memory or None)) for step in steps
        ]
        for row, job in enumerate(jobs):
            path = job.path.with_name(f"{job.path.stem}-scales.png")
            strip([stage[row] for stage in stages]).save(path)
            yield path


def _with_bar(steps: Iterator[ScaleStep], scales: int, quiet: bool) -> Iterator[ScaleStep]:
    bar = tqdm(total=scales, unit="scale", file=sys.stderr, disable=quiet)
    with bar:
        for step in steps:
            height, width = step.token_map
            bar.set_postfix_str(f"{width}x{height}")
            bar.update()
            yield step
