"""What the `sample` command does: read its options, draw, write pictures with their recipes."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .config import TokenMap, maps_for_size
from .memory import decoding_bytes, drawing_bytes
from .packed import can_be_packed
from .pictures import Recipe, is_text, read_recipe, save_png, strip, to_images
from .transfer import why_unusable

if TYPE_CHECKING:
    from .request import ScaleStep
    from .star import Star

MOST_TOGETHER = 16
"""Pictures drawn together where memory allows and nothing else is asked for."""
SHARE_OF_FREE = 0.9
"""What pictures may take of free memory; the rest is for what is not reckoned, as libraries' work areas."""

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
        return self.path.with_name(f"{self.path.stem}-scales.png")


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
    path = _png(args.out) if args.out else Path(args.folder or ".") / f"again-{args.recipe.name}"
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


def check_model(plan: SamplePlan) -> None:
    """Hold a plan against what its checkpoint says of itself; reads no weights and imports no transformers.

    Raises ValueError for a recipe of another model, and for a size or schedule that this one does not have.
    """
    from .checkpoint import resolve_config
    from .star import find_files, schedule_of
    from .weights import TensorFile

    args = plan.arguments
    files = find_files(args.checkpoint, vqvae=args.vqvae, text_encoder=args.text_encoder)
    config = resolve_config(TensorFile(files.star), args.preset)
    try:
        if plan.model not in (None, config.name):
            raise ValueError(
                f"the recipe was drawn by {plan.model}, this checkpoint is {config.name}: name the right one"
                " with --checkpoint"
            )
        maps = config.maps
        if plan.size is not None:
            maps, _ = maps_for_size(config, *plan.size)
        schedule_of(config, plan.schedule, maps, has_sampler=config.transformer.has_sampler)
    except ValueError as error:
        if args.recipe is None:
            raise
        raise ValueError(f"{args.recipe}: {error}") from error


def run_sample(plan: SamplePlan) -> Iterator[Path]:
    """Draw a plan's pictures batch by batch; yield each file as it is written."""
    check_model(plan)
    star = load_for(plan.arguments)
    together = _together(star, plan)
    for start in range(0, len(plan.jobs), together):
        yield from _draw_batch(star, plan, plan.jobs[start : start + together])


def _together(star: Star, plan: SamplePlan) -> int:
    if plan.arguments.gpu_memory is not None:
        return 1  # such a limit is reckoned for one picture at a time
    return plan.arguments.batch or pictures_together(star, star.maps(plan.size), free_bytes(star.device))


def pictures_together(star: Star, maps: Sequence[TokenMap], free: int | None) -> int:
    """Return how many pictures to draw together in so much free memory: one at least, `MOST_TOGETHER` at most.

    free: in bytes, None where it is not known.
    """
    if free is None:
        return MOST_TOGETHER
    config, itemsize = star.config, star.transformer.dtype.itemsize
    drawing = drawing_bytes(config.transformer, maps, 1, guided=True, itemsize=itemsize)
    decoding = decoding_bytes(config.vqvae, maps[-1], 1, itemsize=itemsize)
    # What graphs were recorded on stays while pictures are decoded, else it is gone by then.
    picture = max(drawing, decoding) if star.replays is None else drawing + decoding
    return max(1, min(MOST_TOGETHER, int(SHARE_OF_FREE * free) // picture))


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory is free on a GPU or, for a CPU, in the machine; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device.index)
        return free
    return _free_in_the_machine() if device.type == "cpu" else None


def _free_in_the_machine() -> int | None:
    with contextlib.suppress(OSError):
        meminfo = Path("/proc/meminfo").read_text()
        if available := re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE):
            return int(available.group(1)) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


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
            save_png(strip([stage[row] for stage in stages]), job.strip_path)
            yield job.strip_path


def _with_bar(steps: Iterator[ScaleStep], scales: int, quiet: bool) -> Iterator[ScaleStep]:
    bar = tqdm(total=scales, unit="scale", file=sys.stderr, disable=quiet)
    with bar:
        for step in steps:
            height, width = step.token_map
            bar.set_postfix_str(f"{width}x{height}")
            bar.update()
            yield step
