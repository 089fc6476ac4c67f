"""Registration: which nodes there are. One file per step of the graph; host.py is the door to ComfyUI."""

from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from . import answers, host
from .decode import StarVQDecode
from .encode import StarCLIPEncode
from .grid import StarLabelledGrid
from .load import StarLoad
from .prompt import StarPromptFromScale
from .sample import StarSample
from .scales import StarScalesToImages
from .schedule import StarCausalSampler, StarScaleSchedule
from .vq_encode import StarVQEncode

NODES: list[type[io.ComfyNode]] = [
    StarLoad,
    StarCLIPEncode,
    StarScaleSchedule,
    StarCausalSampler,
    StarSample,
    StarVQDecode,
    StarVQEncode,
    StarScalesToImages,
    StarPromptFromScale,
    StarLabelledGrid,
]


class StarExtension(ComfyExtension):
    """The pack, as ComfyUI sees it."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension; ComfyUI calls this once at its start."""
    host.register_folder()
    answers.register()
    return StarExtension()
