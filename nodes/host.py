"""The door to ComfyUI: the one file that touches its folders, memory, progress, interruption and server."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

log = logging.getLogger(__name__)

Answer = Callable[[Mapping[str, str]], dict[str, Any]]
"""From a request's query to what becomes JSON."""

FOLDER = "star"
EXTENSIONS = {".safetensors", ".pth", ".pt", ".ckpt", ".bin"}
PREVIEW_SIDE = 512


def newer(function: Callable[..., Any], **keywords: Any) -> dict[str, Any]:
    """Return those keywords that this version of ComfyUI knows."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in keywords.items() if name in known}


# Folders and files


def register_folder() -> None:
    """Make models/star known, beside folders of extra_model_paths.yaml."""
    import folder_paths

    places, extensions = folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))
    ours = str(Path(folder_paths.models_dir) / FOLDER)
    every = list(places) if ours in places else [*places, ours]
    folder_paths.folder_names_and_paths[FOLDER] = (every, {*extensions, *EXTENSIONS})


def list_files() -> list[str]:
    """Return the files in the star folders by relative name."""
    import folder_paths

    return [str(name) for name in folder_paths.get_filename_list(FOLDER)]


def folders() -> list[str]:
    """Return the folders that files are looked for in."""
    import folder_paths

    return [str(place) for place in folder_paths.get_folder_paths(FOLDER)]


def find_file(name: str) -> Path:
    """Return the path of a listed file. Raises ValueError saying where it was looked for.

    A name that is not listed is refused, whatever it points at: `../` leads nowhere.
    """
    import folder_paths

    listed = {entry.replace("\\", "/"): entry for entry in list_files()}
    entry = listed.get(name.replace("\\", "/"))
    path = None if entry is None else folder_paths.get_full_path(FOLDER, entry)
    if path is None:
        raise ValueError(
            f"no file {name!r} in {' or '.join(folders())}. Put it there (the README's section \"Released"
            ' weights" says where to get it and how to convert it), then press R to refresh the lists'
        )
    return Path(path)


# Memory, devices, dtypes


@cache
def operations() -> Any:
    """Return the layers that ComfyUI can cast, stream and load in part."""
    import comfy.ops

    from ..star_core.upcast import halves_to_upcast

    halves = halves_to_upcast()

    def ours(name: str) -> type[nn.Module]:
        theirs = getattr(comfy.ops.manual_cast, name)
        # Newer versions build layers without weights and let load_state_dict bring them. The engine builds
        # on the meta device and checks every shape first: a class with its own reader is built whole.
        load = theirs._load_from_state_dict
        return type(name, (theirs,), {"_load_from_state_dict": lambda self, *a, **k: load(self, *a, **k)})

    def wide(layer: type[nn.Module]) -> type[nn.Module]:
        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            # ComfyUI casts weights to their input's dtype: a wide one is all that `upcast` asks.
            if x.device.type == "cpu" and x.dtype in halves:
                return layer.forward(self, x.float()).to(x.dtype)
            return layer.forward(self, x)

        return type(layer.__name__, (layer,), {"forward": forward})

    layers = {name: ours(name) for name in ("GroupNorm", "Embedding")}
    layers |= {name: wide(ours(name)) for name in ("Linear", "Conv2d")}
    return type("Operations", (), layers)


def transformer_dtype(precision: str, parameters: int) -> torch.dtype:
    """Return the dtype of transformer and causal sampler: the one chosen, or what suits the device."""
    import comfy.model_management as mm
    import torch

    if precision != "auto":
        chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if precision not in chosen:
            raise ValueError(f"precision is auto, {', '.join(chosen)}, not {precision!r}")
        return chosen[precision]
    device = mm.get_torch_device()
    supported = [torch.bfloat16, torch.float16, torch.float32]
    dtype: torch.dtype = mm.unet_dtype(device=device, model_params=parameters, supported_dtypes=supported)
    # Weights and activations share a dtype here: where the device cannot compute in it (or the user has ComfyUI
    # keep weights in 8 bits), take what it would compute in.
    cast = mm.unet_manual_cast(dtype, device, supported)
    return cast or (dtype if dtype in supported else torch.float32)


def vqvae_dtype() -> torch.dtype:
    """Return the dtype of the VQ-VAE: float32, in which its tokens were defined, unless the user says else."""
    import comfy.model_management as mm

    dtype: torch.dtype = mm.vae_dtype(mm.vae_device(), [])
    return dtype


def compute_device() -> torch.device:
    """Return where transformer and causal sampler compute."""
    import comfy.model_management as mm

    device: torch.device = mm.get_torch_device()
    return device


def text_halves_stay() -> bool:
    """Whether a text encoder's weights may be moved in the half precision of their file: not every other device
    holds bfloat16."""
    import comfy.model_management as mm

    return mm.text_encoder_device().type in ("cpu", "cuda")


def transformer_patcher(model: nn.Module) -> Any:
    """Wrap transformer and sampler so that ComfyUI decides where their weights are."""
    import comfy.model_management as mm

    return _core_patcher()(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def vqvae_patcher(model: nn.Module) -> Any:
    """Wrap a VQ-VAE likewise."""
    import comfy.model_management as mm

    return _core_patcher()(model, load_device=mm.vae_device(), offload_device=mm.vae_offload_device())


def text_patcher(model: nn.Module) -> Any:
    """Wrap the text encoder: transformers' layers, which are moved whole."""
    import comfy.model_management as mm
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(
        model, load_device=mm.text_encoder_device(), offload_device=mm.text_encoder_offload_device()
    )


def _core_patcher() -> Any:
    import comfy.model_patcher

    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def load(patchers: Sequence[Any], memory: int = 0, *, whole: bool = False) -> torch.device:
    """Have weights brought to where they compute, with room for `memory` bytes; return that device."""
    import comfy.model_management as mm

    mm.load_models_gpu(list(patchers), memory_required=memory, force_full_load=whole)
    device: torch.device = patchers[0].load_device
    return device


CPU_BYTES = 2**26
"""Of pictures that a CPU computes together. More are no faster, and Cancel waits for a block of all."""


def load_for_pictures(patcher: Any, picture: int, count: int) -> tuple[torch.device, int]:
    """Have weights brought to where they compute, with room for a picture of so many bytes.

    Return that device and how many of `count` pictures to compute together: as many as fit into its memory, on
    a CPU into `CPU_BYTES`, one at least. Room is made for one alone: for more no other model has to go.
    """
    import comfy.model_management as mm

    device = load([patcher], picture)
    # Newer versions count what other models would give up.
    free = getattr(patcher, "get_free_memory", mm.get_free_memory)(device)
    room = min(int(free), CPU_BYTES) if device.type == "cpu" else int(free)
    return device, max(1, min(count, room // picture))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory is full."""
    import comfy.model_management as mm
    import torch

    from ..star_core.memory import is_out_of_memory

    # Where torch knows no such exception, ComfyUI's name for it is Exception itself.
    known = mm.OOM_EXCEPTION if mm.OOM_EXCEPTION is not Exception else torch.cuda.OutOfMemoryError
    check = getattr(mm, "is_oom", None)
    if isinstance(error, known) or (check is not None and bool(check(error))):
        return True
    # The allocators of CPUs and of Apple's GPUs say it in words alone.
    return isinstance(error, RuntimeError) and is_out_of_memory(error)


def empty_cache() -> None:
    """Give unused memory back to the device."""
    import comfy.model_management as mm

    mm.soft_empty_cache()


def picture_device() -> torch.device:
    """Return where IMAGE tensors live."""
    import comfy.model_management as mm

    device: torch.device = mm.intermediate_device()
    return device


# Interruption, progress, previews


@contextlib.contextmanager
def interruptible(*modules: nn.Module | None) -> Iterator[Callable[[], None]]:
    """Let Cancel act before every block of these modules; yields the check for use between them."""
    import comfy.model_management as mm
    from torch import nn

    def check(*_: Any) -> None:
        mm.throw_exception_if_processing_interrupted()

    lists = [part for m in modules if m is not None for part in m.modules() if isinstance(part, nn.ModuleList)]
    hooks = [block.register_forward_pre_hook(check) for blocks in lists for block in blocks]
    try:
        yield check
    finally:
        for hook in hooks:
            hook.remove()


class Progress:
    """A node's progress bar, its line of text (with a note at its end), and the picture on it."""

    def __init__(self, total: int, node_id: str | None, note: str = "") -> None:
        import comfy.utils

        self.total = total
        self.note = note
        self.node_id = node_id
        self._bar = comfy.utils.ProgressBar(total, **newer(comfy.utils.ProgressBar.__init__, node_id=node_id))

    def advance(self, done: int, text: str, picture: Image | None = None) -> None:
        """Say that `done` steps are finished; `picture` shows the last one."""
        preview = None if picture is None else ("JPEG", picture, PREVIEW_SIDE)
        self._bar.update_absolute(done, self.total, preview)
        say(self.node_id, text + self.note)


def say(node_id: str | None, text: str) -> None:
    """Write a line into a node; without a browser there is nobody to tell."""
    server = _server()
    send = getattr(server, "send_progress_text", None)
    if send is not None and node_id is not None:
        send(text, node_id)


def previews_wanted() -> bool:
    """Whether ComfyUI's preview method is another than none."""
    from comfy.cli_args import LatentPreviewMethod, args

    return bool(args.preview_method != LatentPreviewMethod.NoPreviews)


# Server


def _server() -> Any:
    """Return the running server; None where ComfyUI is used in-process, without one."""
    # Importing `server` would be work of its own; where there is a server, it is imported long since.
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def offer(path: str, answer: Answer) -> None:
    """Let the server answer GET requests for a path; where there is none (in-process use) nobody asks.

    The answer's ValueErrors are told to whoever asked.
    """
    server = _server()
    if getattr(server, "routes", None) is None:
        return

    @server.routes.get(path)  # type: ignore[untyped-decorator]
    async def answered(request: Any) -> Any:
        return await _answered(answer, dict(request.rel_url.query))


async def _answered(answer: Answer, query: Mapping[str, str]) -> Any:
    from aiohttp import web

    try:
        return web.json_response(await asyncio.to_thread(answer, query))
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
