"""What the `sample` command does: draw a plan's pictures, and write them with their recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from .config import TokenMap, maps_for_size
from .free_memory import free_bytes
from .memory import decoding_bytes, drawing_bytes
from .pictures import Recipe, make_folder, save_png, strip, to_images
from .sample_plan import Job, SamplePlan, pick_device

if TYPE_CHECKING:
    from .request import ScaleStep
    from .star import Star

MOST_TOGETHER = 16
"""Pictures drawn together where memory allows and nothing else is asked for."""
UNKNOWN_FREE = 4 * 10**9
"""Bytes taken to be free where no system says: a picture of 1024 px takes more than a hundred of 64 px."""
SHARE_OF_FREE = 0.9
"""What pictures may take of free memory; the rest is for what is not reckoned, as libraries' work areas."""


def load_for(args: argparse.Namespace) -> Star:
    """Load the model that the options name."""
    from .star import load

    device = pick_device(args.device)
    return load(
        args.checkpoint,
        vqvae=args.vqvae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        preset=args.preset,
        dtype=getattr(torch, args.dtype),
        device=device,
        eight_bit=args.eight_bit,
        graphs=args.graphs,
        packed=args.packed,
        low_memory=args.low_memory and device.type == "cpu",
        gpu_memory=None if args.gpu_memory is None else int(args.gpu_memory * 1e9),
    )


def check_model(plan: SamplePlan) -> None:
    """Hold a plan against what its checkpoint says of itself; reads no weights and imports no transformers.

    Raises ValueError for a recipe of another model, and for a size or schedule that this one does not have.
    """
    from .model_files import find_files
    from .star import schedule_of
    from .stored import FileHeader, resolve_config

    args = plan.arguments
    files = find_files(args.checkpoint, vqvae=args.vqvae, text_encoder=args.text_encoder)
    config = resolve_config(FileHeader(files.star), args.preset)
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
    for folder in {job.path.parent for job in plan.jobs}:
        make_folder(folder)
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
        free = UNKNOWN_FREE
    config, itemsize = star.config, star.transformer.dtype.itemsize
    drawing = drawing_bytes(config.transformer, maps, 1, guided=True, itemsize=itemsize)
    decoding = decoding_bytes(config.vqvae, maps[-1], 1, itemsize=itemsize)
    # What graphs were recorded on stays while pictures are decoded, else it is gone by then.
    picture = max(drawing, decoding) if star.replays is None else drawing + decoding
    return max(1, min(MOST_TOGETHER, int(SHARE_OF_FREE * free) // picture))


def _draw_batch(star: Star, plan: SamplePlan, jobs: Sequence[Job]) -> Iterator[Path]:
    from .request import Options

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
