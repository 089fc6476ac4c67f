"""VQ Encode: pictures to tokens, to vary them or to redraw a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.v0_0_2 import io

from . import host, sockets
from .decode import picture_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..star_core.config import StarConfig


class StarVQEncode(io.ComfyNode):
    """Form of `star_core.star.encode_image`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarVQEncode",
            display_name="VQ Encode",
            category=sockets.CATEGORY,
            description=(
                "Encodes pictures to the token maps of every scale, to be start tokens of Scale-wise Sample:"
                " for variations, image to image and inpainting."
            ),
            inputs=[
                sockets.Model.Input(
                    "model", tooltip="The model that will go on from the tokens: it has the sides."
                ),
                sockets.VQVAE.Input("vqvae", tooltip="The VQ-VAE of the same Load STAR."),
                io.Image.Input(
                    "image",
                    tooltip=(
                        "One or more pictures of a size that the model draws; other sizes are refused with"
                        " the list."
                        ' Use core\'s "Upscale Image" with crop center before it; a mask for it needs'
                        " the same crop."
                    ),
                ),
            ],
            outputs=[
                sockets.Tokens.Output(
                    "TOKENS",
                    display_name="tokens",
                    tooltip="For Scale-wise Sample's start_tokens, or VQ Decode.",
                )
            ],
            **host.newer(io.Schema, search_aliases=["vae encode", "star encode", "image to tokens", "img2img"]),
        )

    @classmethod
    def execute(cls, model: sockets.ModelHandle, vqvae: sockets.VQVAEHandle, image: Tensor) -> io.NodeOutput:
        import torch

        from ..star_core.request import joined
        from ..star_core.star import encode_image

        if model.config.vqvae != vqvae.config:
            raise ValueError("model and vqvae do not belong together: take both from one Load STAR")
        maps = _maps(model.config, image)
        network = vqvae.patcher.model
        device, together = host.load_for_pictures(vqvae.patcher, picture_bytes(vqvae, maps[-1]), len(image))
        encoded = []
        with host.interruptible(network):
            for some in image[..., :3].movedim(-1, 1).split(together):
                steps = encode_image(model.config, network, some.to(device))
                encoded.append([step.to(torch.device("cpu")) for step in steps])
        return io.NodeOutput(sockets.TokensRecord(maps, joined(encoded), vqvae.config))


def _maps(config: StarConfig, image: Tensor) -> tuple[tuple[int, int], ...]:
    from ..star_core.config import maps_for_size

    height, width = image.shape[1:3]
    try:
        maps, _ = maps_for_size(config, height, width)
    except ValueError as error:
        raise ValueError(
            f'the image has {width}x{height} pixels. {error}. Resize it first, with core\'s "Upscale Image"'
            " (ImageScale) and crop center, and a mask for it alike"
        ) from error
    return maps
