"""Scale-wise Sample: draw the token maps, coarse to fine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.v0_0_2 import io

from . import drawing, host, sockets
from .requests import maps_for, mask_note, request_for

if TYPE_CHECKING:
    from torch import Tensor

    from ..star_core.schedule_parts import SamplerPart

MAX_BATCH = 256
MAX_SIDE = 8192


class StarSample(io.ComfyNode):
    """Form of `star_core.request.Request`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarSample",
            display_name="Scale-wise Sample",
            category=sockets.CATEGORY,
            description=(
                "Draws pictures scale by scale: one pass per token map, from the whole picture's gist to its"
                " detail. With start tokens it varies a picture (start_scale) or redraws a part of it (mask)."
                " Scales that a changed setting does not reach are taken over from the last run."
            ),
            inputs=[
                sockets.Model.Input("model", tooltip="The model of Load STAR."),
                io.Conditioning.Input(
                    "positive", tooltip="What to draw. From CLIP Encode (STAR) or Prompt from Scale."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip=(
                        "Decides all randomness; each scale has its own numbers. In float32 picture i of a"
                        " batch depends on the seed and i alone, not on its size; in other precisions another"
                        " size may change a token here and there."
                    ),
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=MAX_BATCH,
                    tooltip="How many pictures of the prompt are drawn together.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    tooltip=(
                        "Width in pixels. 0 (with height 0) is the trained size, or the start tokens' size"
                        " where they are connected. Other sizes of the same area work to a degree; one that"
                        " the model does not have is refused with the list."
                    ),
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=MAX_SIDE, tooltip="Height in pixels; 0 as for width."
                ),
                io.Int.Input(
                    "start_scale",
                    default=0,
                    min=0,
                    max=64,
                    tooltip=(
                        "How many coarse scales are taken from start_tokens; drawing goes on after them. 0"
                        " takes none. The more, the closer to the start picture."
                    ),
                ),
                io.Combo.Input(
                    "preview",
                    options=drawing.PREVIEWS,
                    default="auto",
                    tooltip=(
                        "The picture so far on the node. auto follows ComfyUI's preview method (none shows"
                        " nothing) and skips scales where decoding would take longer than drawing. every"
                        " scale always shows it. off only shows progress."
                    ),
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "What guidance leads away from; the empty prompt where nothing is connected. In a"
                        " model with paired cross-attention (the released ones) it acts through the start"
                        " token and the causal sampler alone. Without guidance in the schedule it does nothing."
                    ),
                ),
                sockets.Schedule.Input(
                    "schedule",
                    optional=True,
                    tooltip=(
                        "How every scale is drawn, from Scale Schedule. Without it the checkpoint's own"
                        " schedule holds. One for other scales is refused by name."
                    ),
                ),
                sockets.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip=(
                        "Where the causal sampler refines, from Causal Sampler. Without it no scale is refined,"
                        " except that with neither schedule nor sampler connected the checkpoint's own schedule"
                        " holds as a whole."
                    ),
                ),
                sockets.Tokens.Input(
                    "start_tokens",
                    optional=True,
                    tooltip=(
                        "A picture to begin with, from VQ Encode or another Scale-wise Sample: start_scale"
                        " takes its coarse scales, mask keeps its tokens. One picture serves the whole batch."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "White is drawn anew, black keeps the start tokens at every scale. A token is drawn"
                        " anew where at least half of its cell is white. Any size: the mask is stretched over"
                        " the picture; if the picture was cropped, crop the mask alike. One mask serves the"
                        " whole batch."
                    ),
                ),
            ],
            outputs=[
                sockets.Tokens.Output(
                    "TOKENS",
                    display_name="tokens",
                    tooltip=(
                        "The token maps of every scale, for VQ Decode, Scales to Images, or as start tokens."
                    ),
                )
            ],
            hidden=[io.Hidden.unique_id],
            **host.newer(
                io.Schema,
                search_aliases=["star sampler", "KSampler", "text to image", "inpaint", "variation", "img2img"],
            ),
        )

    @classmethod
    def execute(
        cls,
        model: sockets.ModelHandle,
        positive: list[Any],
        seed: int,
        batch_size: int,
        width: int,
        height: int,
        start_scale: int,
        preview: str,
        negative: list[Any] | None = None,
        schedule: sockets.ScheduleText | None = None,
        sampler: SamplerPart | None = None,
        start_tokens: sockets.TokensRecord | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        maps = maps_for(model.config, width, height, start_tokens)
        prompts = (positive, negative)
        start = (start_tokens, start_scale, mask)
        request = request_for(model, maps, prompts, (schedule, sampler), seed, batch_size, start)
        note = "" if mask is None else mask_note(model, request, mask)
        steps = drawing.draw(model, request, preview, cls.hidden.unique_id, note)
        return io.NodeOutput(sockets.TokensRecord(maps, steps, model.config.vqvae))
