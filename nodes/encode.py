"""CLIP Encode (STAR): a prompt to what the transformer reads of it."""

from __future__ import annotations

import logging

from comfy_api.v0_0_2 import io

from . import host, sockets

log = logging.getLogger(__name__)


class StarCLIPEncode(io.ComfyNode):
    """Form of `star_core.text_encoder.TextEncoder.encode`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarCLIPEncode",
            display_name="CLIP Encode (STAR)",
            category=sockets.CATEGORY,
            description=(
                "Encodes a prompt as STAR was trained to read it: the last layer's states, the unprojected"
                " state at the end of the text, and the mask of the words. Core's CLIP Text Encode gives"
                " others, which Scale-wise Sample refuses."
            ),
            inputs=[
                sockets.TextEncoder.Input("text_encoder", tooltip="The text encoder of Load STAR."),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip=(
                        "The prompt. Up to 75 tokens are read (77 with start and end); what lies beyond is"
                        " left out with a warning on the node. An empty prompt is the unconditional one."
                        " Weights such as (word:1.2) are read as plain text."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "CONDITIONING",
                    display_name="conditioning",
                    tooltip=(
                        "For Scale-wise Sample (positive or negative) and Prompt from Scale. No other sampler."
                    ),
                )
            ],
            hidden=[io.Hidden.unique_id],
            **host.newer(
                io.Schema, search_aliases=["star prompt", "text encode", "clip text encode", "positive"]
            ),
        )

    @classmethod
    def execute(cls, text_encoder: sockets.TextEncoderHandle, text: str) -> io.NodeOutput:
        from ..star_core.text_encoder import TextStates

        host.load([text_encoder.patcher], whole=True)
        encoder = text_encoder.patcher.model
        both = encoder.encode([text, ""])
        states, empty = (
            TextStates(both.hidden[i : i + 1].cpu(), both.mask[i : i + 1].cpu(), both.pooled[i : i + 1].cpu())
            for i in range(2)
        )
        _report(cls.hidden.unique_id, *encoder.measure(text), room=encoder.positions - 2)
        return io.NodeOutput(sockets.conditioning(sockets.Prompt(((0, states),), empty)))


def _report(node_id: str | None, tokens: int, cut: str, *, room: int) -> None:
    """Write onto the node how long the prompt is, and what of it was left out."""
    line = f"{tokens} of {room} tokens"
    host.say(node_id, f"⚠ {line}; left out: {cut}" if cut else line)
