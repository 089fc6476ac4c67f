"""Scales to Images: how the picture grew."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from . import host, sockets
from .decode import images


class StarScalesToImages(io.ComfyNode):
    """Form of `star_core.vqvae.VQVAE.pictures` over every scale."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarScalesToImages",
            display_name="Scales to Images",
            category=sockets.CATEGORY,
            description="The picture after each scale, from coarse to fine, as a batch of images.",
            inputs=[
                sockets.VQVAE.Input("vqvae", tooltip="The VQ-VAE of the Load STAR that the tokens come from."),
                sockets.Tokens.Input("tokens", tooltip="From Scale-wise Sample or VQ Encode."),
            ],
            outputs=[
                io.Image.Output(
                    "IMAGES",
                    display_name="images",
                    tooltip=(
                        "All scales of the first picture, then all of the second, and so on; all of full size."
                    ),
                )
            ],
            hidden=[io.Hidden.unique_id],
            **host.newer(io.Schema, search_aliases=["coarse to fine", "scales", "animate"]),
        )

    @classmethod
    def execute(cls, vqvae: sockets.VQVAEHandle, tokens: sockets.TokensRecord) -> io.NodeOutput:
        import torch

        node_id = cls.hidden.unique_id
        grown = []
        for picture in range(tokens.batch):
            every = torch.cat([step.f_hat[picture : picture + 1] for step in tokens.steps])
            grown.append(images(vqvae, tokens, every, node_id=node_id))
        return io.NodeOutput(torch.cat(grown))
