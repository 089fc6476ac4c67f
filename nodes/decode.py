"""VQ Decode: tokens to pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from comfy_api.v0_0_2 import io

from . import host, sockets

if TYPE_CHECKING:
    from torch import Tensor

    from ..star_core.config import TokenMap

log = logging.getLogger(__name__)


class StarVQDecode(io.ComfyNode):
    """Form of `star_core.vqvae.VQVAE.pictures`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarVQDecode",
            display_name="VQ Decode",
            category=sockets.CATEGORY,
            description=(
                "Decodes tokens to pictures with the VQ-VAE, all scales or the first ones only. Where memory is"
                " short it decodes one picture at a time, then in strips (the same picture, slower), then in"
                " tiles (a near one), each with a warning."
            ),
            inputs=[
                sockets.VQVAE.Input("vqvae", tooltip="The VQ-VAE of the Load STAR that the tokens come from."),
                sockets.Tokens.Input("tokens", tooltip="From Scale-wise Sample or VQ Encode."),
                io.Int.Input(
                    "last_scale",
                    default=0,
                    min=0,
                    max=64,
                    tooltip=(
                        "How many scales the picture shows: 3 is the picture after three scales, 0 after all."
                        " More than there are is refused."
                    ),
                ),
                io.Boolean.Input(
                    "tiled",
                    default=False,
                    tooltip=(
                        "Always decode in overlapping tiles of 32 cells, to save memory. The picture is near,"
                        " not equal to, the whole one. Maps of up to 32 cells a side are decoded whole."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output("IMAGE", display_name="image", tooltip="One picture per batch entry, in order.")
            ],
            hidden=[io.Hidden.unique_id],
            **host.newer(io.Schema, search_aliases=["vae decode", "star decode", "tokens to image"]),
        )

    @classmethod
    def execute(
        cls, vqvae: sockets.VQVAEHandle, tokens: sockets.TokensRecord, last_scale: int, tiled: bool
    ) -> io.NodeOutput:
        if not 0 <= last_scale <= len(tokens.steps):  # a link may bring anything
            raise ValueError(
                f"last_scale is {last_scale}, but there are {len(tokens.steps)} scales: 0 shows all"
            )
        f_hat = tokens.steps[last_scale - 1].f_hat
        return io.NodeOutput(images(vqvae, tokens, f_hat, tiled=tiled, node_id=cls.hidden.unique_id))


def images(
    vqvae: sockets.VQVAEHandle,
    tokens: sockets.TokensRecord,
    f_hat: Tensor,
    *,
    tiled: bool = False,
    node_id: str | None = None,
) -> Tensor:
    """Return f_hat (B, D, h, w) of some tokens as IMAGE, by the largest pieces that fit into memory."""
    from ..star_core.tiles import tile_of

    if tokens.vqvae != vqvae.config:
        raise ValueError("the tokens belong to another VQ-VAE: use the vqvae of the Load STAR they come from")
    piece = tile_of(tokens.maps[-1]) if tiled else tokens.maps[-1]
    device, together = host.load_for_pictures(vqvae.patcher, picture_bytes(vqvae, piece), len(f_hat))
    network = vqvae.patcher.model
    ways: list[tuple[str, Callable[..., Tensor]]] = [("in tiles", _by_tiles)]
    if not tiled:
        smaller = [("one by one", _wholly)] if together > 1 else []
        ways = [("whole", partial(_wholly, together=together)), *smaller, ("in strips", _by_strips), *ways]
    with host.interruptible(network):
        for (name, way), (following, _) in zip(ways, [*ways[1:], ("", None)], strict=True):
            decoded = _attempt(way, network, f_hat, device, last=not following)
            if decoded is not None:
                return decoded
            warning = f"out of memory decoding {name}: trying {following}"
            log.warning("decoding tokens: %s", warning)
            host.say(node_id, f"⚠ {warning}")
            host.empty_cache()
    raise AssertionError("the last way either decodes or raises")


def _attempt(
    way: Callable[..., Tensor], network: Any, f_hat: Tensor, device: Any, *, last: bool
) -> Tensor | None:
    """Return the pictures, None where memory ran out and there is another way."""
    try:
        return way(network, f_hat, device)
    except Exception as error:
        if last or not host.out_of_memory(error):
            raise
        return None


def _wholly(network: Any, f_hat: Tensor, device: Any, together: int = 1) -> Tensor:
    import torch

    return torch.cat([_as_image(network.pictures(some.to(device))) for some in f_hat.split(together)])


def _by_strips(network: Any, f_hat: Tensor, device: Any) -> Tensor:
    import torch

    return torch.cat([_as_image(network.pictures(one.to(device), sliced=True)) for one in f_hat.split(1)])


def _by_tiles(network: Any, f_hat: Tensor, device: Any) -> Tensor:
    import torch

    from ..star_core.tiles import decode_in_tiles

    return torch.cat([_as_image(decode_in_tiles(network, one.to(device))) for one in f_hat.split(1)])


def _as_image(pictures: Tensor) -> Tensor:
    """Return pictures (B, 3, H, W) as IMAGE (B, H, W, 3) where ComfyUI keeps images."""
    return pictures.movedim(1, -1).float().to(host.picture_device())


def picture_bytes(vqvae: sockets.VQVAEHandle, token_map: TokenMap) -> int:
    """Return what decoding or encoding one picture takes beside the weights."""
    from ..star_core.memory import decoding_bytes

    size = vqvae.patcher.model.quant_conv.weight.element_size()
    return decoding_bytes(vqvae.config, token_map, 1, itemsize=size)
