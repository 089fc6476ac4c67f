"""The engine's loop under ComfyUI: memory, progress, previews, cancelling, what the last run left."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from . import host, sockets

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..star_core.request import Request, ScaleStep

PREVIEWS = ["auto", "every scale", "off"]


def draw(
    model: sockets.ModelHandle, request: Request, preview: str, node_id: str | None
) -> tuple[ScaleStep, ...]:
    """Return every scale of a request on the CPU, drawing only those that the last run did not leave."""
    import torch

    from ..star_core.generate import generate
    from ..star_core.schedule import sides_text

    previews = _Previews(model.vqvae.patcher.model, preview)
    known = _remembered(model.last, request)
    if len(known) == len(request.maps):
        return known
    model.last.request, model.last.steps = None, ()
    steps: list[ScaleStep] = []
    patchers = [model.patcher, model.vqvae.patcher]
    device = host.load(patchers, _memory(model, request))
    networks, vqvae = (patcher.model for patcher in patchers)
    progress = host.Progress(len(request.maps), node_id)
    shortened = dataclasses.replace(request, prefix=known) if known else request
    run = generate(networks.transformer, networks.causal_sampler, vqvae.quantizer, shortened, device)
    try:
        with host.interruptible(networks, vqvae) as check:
            for step in run:
                check()
                steps.append(step.to(torch.device("cpu")))
                text = f"scale {step.scale + 1}/{len(request.maps)} · {_side(step, sides_text)}"
                progress.advance(step.scale + 1, text, previews.picture(step))
    finally:
        # Closing the generator lets go of the KV cache, whatever ended the loop. The finished scales are
        # good in any case: after Cancel or a full memory the next run goes on from them.
        run.close()
        model.last.request, model.last.steps = request, tuple(steps)
    return tuple(steps)


def _side(step: ScaleStep, sides_text: Any) -> str:
    """Return a token map as people write it, 16x16."""
    side = str(sides_text([step.token_map]))
    return side if "x" in side else f"{side}x{side}"


def _remembered(last: sockets.LastRun, request: Request) -> tuple[ScaleStep, ...]:
    """Return the leading scales that the last run drew just as this request would."""
    from ..star_core.resume import shared_scales

    if last.request is None:
        return ()
    shared = min(shared_scales(last.request, request), len(last.steps))
    # Given scales need no drawing either: an earlier run helps only where it reaches beyond them.
    return last.steps[:shared] if shared > len(request.prefix) else ()


def _memory(model: sockets.ModelHandle, request: Request) -> int:
    """Return how many bytes drawing takes beside the weights."""
    from ..star_core.memory import decoding_bytes, drawing_bytes

    networks, vqvae = model.patcher.model, model.vqvae.patcher.model
    picture = decoding_bytes(
        model.vqvae.config, request.maps[-1], 1, itemsize=vqvae.quant_conv.weight.element_size()
    )
    return picture + drawing_bytes(
        model.config.transformer,
        request.maps,
        len(request.seeds),
        guided=request.schedule.guided,
        itemsize=networks.transformer.dtype.itemsize,
    )


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
        """Return the picture so far, None where it is not wanted or would take longer than drawing did."""
        from ..star_core.pictures import to_images

        now = time.monotonic()
        if not self.ever or not (self.always or now - self.drawn_since >= self.last_took):
            return None
        (image,) = to_images(self.vqvae.pictures(step.f_hat[:1]))
        self.drawn_since = time.monotonic()
        self.last_took = self.drawn_since - now
        return image
