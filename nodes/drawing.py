"""The engine's loop under ComfyUI: memory, progress, previews, cancelling, what the last run left."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

from . import host, sockets

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..star_core.config import TokenMap
    from ..star_core.request import Request, ScaleStep

log = logging.getLogger(__name__)

PREVIEWS = ["auto", "every scale", "off"]


def draw(
    model: sockets.ModelHandle, request: Request, preview: str, node_id: str | None, note: str = ""
) -> tuple[ScaleStep, ...]:
    """Return every scale of a request on the CPU, drawing only those that the node's last run did not leave.

    note: what the node says beside its progress.
    """
    import torch

    from ..star_core.generate import generate

    previews = _Previews(model.vqvae.patcher.model, preview)
    if request.maps != model.config.maps:
        note += " · untrained size"
    progress = host.Progress(len(request.maps), node_id, note)
    last = model.runs.of(node_id)
    known = _remembered(last, request)
    if len(known) == len(request.maps):
        if previews.always:
            _show(model, known, previews, progress)
        return known
    # Known scales count as this request's from now on: a run that ends early must not lose them.
    last.request, last.steps = request, known
    steps: list[ScaleStep] = []
    patchers = [model.patcher, model.vqvae.patcher]
    device = host.load(patchers, _memory(model, request, previews=previews.ever))
    networks, vqvae = (patcher.model for patcher in patchers)
    shortened = dataclasses.replace(request, prefix=known) if known else request
    run = generate(networks.transformer, networks.causal_sampler, vqvae.quantizer, shortened, device)
    try:
        with host.interruptible(networks, vqvae) as check:
            for step in run:
                check()
                steps.append(step.to(torch.device("cpu")))
                _tell(progress, step, previews)
    finally:
        # Closing the generator lets go of the KV cache, whatever ended the loop. The finished scales are
        # good in any case: after Cancel or a full memory the next run goes on from them.
        run.close()
        last.steps = max(known, tuple(steps), key=len)
        model.runs.make_room()
    return tuple(steps)


def _show(
    model: sockets.ModelHandle, steps: tuple[ScaleStep, ...], previews: _Previews, progress: host.Progress
) -> None:
    """Show scales that are drawn already."""
    patcher = model.vqvae.patcher
    device = host.load([patcher], _preview_bytes(model, steps[-1].token_map))
    with host.interruptible(patcher.model) as check:
        for step in steps:
            check()
            _tell(progress, step.to(device), previews)


def _tell(progress: host.Progress, step: ScaleStep, previews: _Previews) -> None:
    """Say that a scale is there, and show it where that is wanted."""
    height, width = step.token_map
    text = f"scale {step.scale + 1}/{progress.total} · {width}x{height}"
    progress.advance(step.scale + 1, text, previews.picture(step))


def _remembered(last: sockets.LastRun, request: Request) -> tuple[ScaleStep, ...]:
    """Return the leading scales that the last run drew just as this request would."""
    from ..star_core.resume import shared_scales

    if last.request is None:
        return ()
    shared = min(shared_scales(last.request, request), len(last.steps))
    # Given scales need no drawing either: an earlier run helps only where it reaches beyond them.
    return last.steps[:shared] if shared > len(request.prefix) else ()


def _memory(model: sockets.ModelHandle, request: Request, *, previews: bool) -> int:
    """Return how many bytes drawing takes beside the weights."""
    from ..star_core.memory import drawing_bytes

    return drawing_bytes(
        model.config.transformer,
        request.maps,
        len(request.seeds),
        guided=request.schedule.guided,
        itemsize=model.patcher.model.transformer.dtype.itemsize,
        between=_preview_bytes(model, request.maps[-1]) if previews else 0,
    )


def _preview_bytes(model: sockets.ModelHandle, token_map: TokenMap) -> int:
    from ..star_core.memory import decoding_bytes

    size = model.vqvae.patcher.model.quant_conv.weight.element_size()
    return decoding_bytes(model.vqvae.config, token_map, 1, itemsize=size)


class _Previews:
    """Decides which scales are worth a picture, and makes it of the batch's first."""

    def __init__(self, vqvae: Any, choice: str) -> None:
        if choice not in PREVIEWS:
            raise ValueError(f"preview is one of {', '.join(PREVIEWS)}, not {choice!r}")
        self.vqvae = vqvae
        self.always = choice == "every scale"
        self.ever = self.always or (choice == "auto" and host.previews_wanted())
        self.drawn_since = time.monotonic()
        self.last_took = 0.0

    def picture(self, step: ScaleStep) -> Image | None:
        """Return the picture so far, None where it is not wanted or would take longer than drawing did.

        Where there is no memory for it, drawing goes on without previews.
        """
        from ..star_core.pictures import to_images

        now = time.monotonic()
        if not self.ever or not (self.always or now - self.drawn_since >= self.last_took):
            return None
        try:
            (image,) = to_images(self.vqvae.pictures(step.f_hat[:1]))
        except Exception as error:
            if not host.out_of_memory(error):
                raise
            log.warning("Scale-wise Sample: out of memory for a preview: drawing goes on without previews")
            self.ever = False
            image = None
        if image is None:  # outside of the handler, whose exception holds what was decoded so far
            host.empty_cache()
            return None
        self.drawn_since = time.monotonic()
        self.last_took = self.drawn_since - now
        return image
