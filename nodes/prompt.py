"""Prompt from Scale: one prompt for the coarse scales, another for the fine ones."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from . import host, sockets


class StarPromptFromScale(io.ComfyNode):
    """Form of `star_core.prompts.switch`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarPromptFromScale",
            display_name="Prompt from Scale",
            category=sockets.CATEGORY,
            description=(
                "Changes the prompt on the way: the first one decides the coarse scales (structure), the"
                " later one the scales from start_scale on (detail). Chain it for a third prompt."
            ),
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip=(
                        "The prompt that holds before start_scale. From CLIP Encode (STAR), or from this node."
                    ),
                ),
                io.Conditioning.Input(
                    "later", tooltip="The prompt that holds from start_scale on. From CLIP Encode (STAR)."
                ),
                io.Int.Input(
                    "start_scale",
                    default=4,
                    min=1,
                    max=64,
                    tooltip=(
                        "The first scale that the later prompt decides, counted from 1 as progress shows it"
                        " (scale 4/10). 1 replaces the prompt altogether. Earlier scales stay exactly as they"
                        " were. With paired cross-attention the start token keeps the first prompt."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "CONDITIONING", display_name="conditioning", tooltip="Both prompts with their scales."
                )
            ],
            **host.newer(io.Schema, search_aliases=["prompt schedule", "prompt editing", "prompt per scale"]),
        )

    @classmethod
    def execute(cls, conditioning: list[Any], later: list[Any], start_scale: int) -> io.NodeOutput:
        from ..star_core.prompts import switch

        if start_scale < 1:
            raise ValueError(f"start_scale is {start_scale}: scales are counted from 1")
        before = sockets.prompt_of(conditioning, "conditioning")
        after = sockets.prompt_of(later, "later")
        timeline = switch(before.timeline, after.timeline, start_scale - 1)
        return io.NodeOutput(sockets.conditioning(sockets.Prompt(timeline, before.empty)))
