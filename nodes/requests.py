"""From a node's inputs to the engine's Request, with every refusal that needs the graph's words."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from . import sockets
from .schedule import whole

if TYPE_CHECKING:
    from torch import Tensor

    from ..star_core.config import StarConfig, TokenMap
    from ..star_core.request import KeptTokens, PromptSpan, Request, ScaleStep
    from ..star_core.schedule_parts import SamplerPart

log = logging.getLogger(__name__)


def maps_for(
    config: StarConfig, width: int, height: int, start: sockets.TokensRecord | None
) -> tuple[TokenMap, ...]:
    """Return the token maps of a size in pixels; 0 is the start tokens' size, else the trained one.

    Raises ValueError for a size that the model does not draw, and for start tokens of another model's scales.
    """
    from ..star_core.config import maps_for_size

    if (width == 0) != (height == 0):
        raise ValueError(f"width {width} and height {height}: give both, or 0 for both")
    if start is not None:
        _check_scales(config, start.maps)
    if width == 0:
        return config.maps if start is None else start.maps
    maps, _ = maps_for_size(config, height, width)
    return maps


def _check_scales(config: StarConfig, maps: tuple[TokenMap, ...]) -> None:
    """Refuse start tokens whose maps the model never draws, at their size or any other."""
    from ..star_core.config import maps_for_size
    from ..star_core.schedule import sides_text

    height, width = (side * config.vqvae.downsample for side in maps[-1])
    try:
        wanted, _ = maps_for_size(config, height, width)
        drawn = f"draws {sides_text(wanted)}"
    except ValueError as error:
        wanted, drawn = (), f"has none for their size. {error}"
    if wanted != maps:
        raise ValueError(
            f"start_tokens have the token maps {sides_text(maps)} of another model, {config.name} {drawn}:"
            ' decode them with their own model\'s vqvae, and encode the picture with "VQ Encode" and this model'
        )


def request_for(
    model: sockets.ModelHandle,
    maps: tuple[TokenMap, ...],
    prompts: tuple[list[Any], list[Any] | None],
    forms: tuple[sockets.ScheduleText | None, SamplerPart | None],
    seed: int,
    batch: int,
    start: tuple[sockets.TokensRecord | None, int, Tensor | None],
) -> Request:
    """Return the request of a batch of pictures. start: tokens, how many of their scales, mask."""
    from ..star_core.request import Request
    from ..star_core.sampling import PictureSeed

    if batch < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch}")
    steps = _start_steps(model, maps, start, batch)
    return Request(
        prompts=_spans(model.config, prompts, batch),
        maps=maps,
        schedule=whole(model, maps, *forms),
        seeds=tuple(PictureSeed(seed, index) for index in range(batch)),
        prefix=steps[: start[1]],
        kept=_kept(steps, start[2], batch),
    )


def _spans(
    config: StarConfig, prompts: tuple[list[Any], list[Any] | None], batch: int
) -> tuple[PromptSpan, ...]:
    from ..star_core.prompts import spans

    positive = sockets.prompt_of(prompts[0], "positive")
    away = sockets.prompt_of(prompts[1], "negative").timeline if prompts[1] else ((0, positive.empty),)
    for name, timeline in (("positive", positive.timeline), ("negative", away)):
        _check_prompt(config, name, timeline)
    return spans(positive.timeline, away, batch)


def _check_prompt(config: StarConfig, name: str, timeline: Any) -> None:
    wanted, scales = config.transformer.text_width, len(config.maps)
    for start, states in timeline:
        width = states.hidden.shape[-1]
        if width != wanted:
            raise ValueError(
                f"{name} was encoded by another model's text encoder: {config.name} reads states of width"
                f" {wanted}, these have {width}. Use the text encoder of the same Load STAR"
            )
        if start >= scales:
            raise ValueError(
                f"{name} changes at scale {start + 1}, but {config.name} has {scales} scales: lower"
                " start_scale of"
                ' "Prompt from Scale"'
            )


def _start_steps(
    model: sockets.ModelHandle,
    maps: tuple[TokenMap, ...],
    start: tuple[sockets.TokensRecord | None, int, Tensor | None],
    batch: int,
) -> tuple[ScaleStep, ...]:
    """Return the start picture's scales for a batch, none where there is none."""
    from ..star_core.schedule import sides_text

    tokens, scale, mask = start
    if tokens is None:
        if scale or mask is not None:
            what = f"start_scale is {scale}" if scale else "a mask is connected"
            raise ValueError(f'{what}, but there are no start_tokens: connect "VQ Encode", or another sample')
        return ()
    if not 0 <= scale <= len(maps):  # ComfyUI checks the limits of a widget, not what a link brings
        raise ValueError(f"start_scale is {scale}, but {model.config.name} has {len(maps)} scales")
    if tokens.maps != maps:
        raise ValueError(
            f"start_tokens have the token maps {sides_text(tokens.maps)}, the picture to draw has"
            f" {sides_text(maps)}: set width and height to 0 to take the start picture's size"
        )
    _check_codebook(tokens, model.config.vqvae)
    if tokens.batch not in (1, batch):
        raise ValueError(
            f"start_tokens hold {tokens.batch} pictures for a batch of {batch}: give one, or {batch}"
        )
    return tokens.steps if tokens.batch == batch else tuple(step.repeated(batch) for step in tokens.steps)


def _check_codebook(tokens: sockets.TokensRecord, config: Any) -> None:
    """Refuse tokens of another VQ-VAE's codebook, as far as sizes tell."""
    if tokens.vqvae != config:
        raise ValueError("the tokens belong to another VQ-VAE: use the vqvae of the Load STAR they come from")


def _kept(steps: tuple[ScaleStep, ...], mask: Tensor | None, batch: int) -> KeptTokens | None:
    from ..star_core.inpainting import keep_outside

    if mask is None:
        return None
    masks = mask if mask.ndim == 3 else mask.reshape(-1, *mask.shape[-2:])
    if len(masks) not in (1, batch):
        raise ValueError(f"{len(masks)} masks for a batch of {batch} pictures: give one, or {batch}")
    return keep_outside(steps, masks.expand(batch, -1, -1))


def mask_note(model: sockets.ModelHandle, request: Request, mask: Tensor) -> str:
    """Return what a node says of a mask that may not be what was meant, "" of any other."""
    assert request.kept is not None, "a mask keeps something"
    idle = int(request.kept.masks[-1].all(dim=1).sum())
    if idle == len(request.seeds):
        return " · no token's cell is half white: nothing is drawn anew"
    if idle:
        return f" · ⚠ the masks of {idle} of {len(request.seeds)} pictures have nothing drawn anew"
    height, width = mask.shape[-2:]
    rows, columns = request.maps[-1]
    wider = width * rows / (height * columns)
    # How many of the stretched mask's cells lie, on each side, outside of a picture that was cropped.
    lost = (1 - min(wider, 1 / wider)) / 2 * (columns if wider > 1 else rows)
    if lost <= 1 or bool((mask == mask.flatten()[0]).all()):
        return ""
    step = model.config.vqvae.downsample
    sizes = f"mask of {width}x{height} stretched over {columns * step}x{rows * step}"
    log.warning("Scale-wise Sample: %s. Where the picture was cropped, crop its mask alike", sizes)
    return f" · ⚠ {sizes}"
