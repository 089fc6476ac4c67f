"""A node pack of one file for the tests' server: it looks at what is alive there, and fakes a full memory.

Nothing else is faked: everything that it counts and times is the pack's own, run by ComfyUI's own server.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
import time
from typing import Any

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
NETWORKS = ("Networks", "VQVAE", "TextEncoder")
PLACES = {"block": ("transformer", "TextBlock", "forward"), "decoder": ("vqvae", "VQVAE", "pictures")}
FAULTS = dict.fromkeys(PLACES, 0)
"""How many of the next passes through a place run out of memory."""
LONGEST = {"seconds": 0.0}
WATCHED = threading.Lock()


def part(name: str) -> Any:
    """Return a module of the pack under the name by which ComfyUI imported the pack."""
    pack = next(key for key in list(sys.modules) if key.endswith(".nodes.host"))
    return importlib.import_module(f"{pack.removesuffix('.nodes.host')}.star_core.{name}")


def watch() -> None:
    """Pass every block and every decoding through here, from the first request on."""
    with WATCHED:
        if getattr(watch, "done", False):
            return
        for place, (module, owner, method) in PLACES.items():
            _watch(getattr(part(module), owner), method, place)
        _watch(part("transformer").SelfBlock, "forward", None)
        watch.done = True  # type: ignore[attr-defined]


def _watch(owner: Any, method: str, place: str | None) -> None:
    original = getattr(owner, method)

    def watched(*arguments: Any, **named: Any) -> Any:
        if place is not None and FAULTS[place]:
            FAULTS[place] -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (made up by the test)")
        began = time.monotonic()
        result = original(*arguments, **named)
        if place != "decoder":
            LONGEST["seconds"] = max(LONGEST["seconds"], time.monotonic() - began)
        return result

    setattr(owner, method, watched)


@PromptServer.instance.routes.get("/star_test/alive")
async def alive(request: web.Request) -> web.Response:
    """Say which of the pack's networks and caches are alive, and how many bytes all tensors hold."""
    if "collect" in request.rel_url.query:
        gc.collect()
    names, storages = dict.fromkeys((*NETWORKS, "LayerCache", "TokensRecord"), 0), {}
    for thing in gc.get_objects():
        kind = type(thing)
        if kind.__name__ in names and ".star_core." in kind.__module__ + ".":
            names[kind.__name__] += 1
        elif kind.__name__ == "TokensRecord":
            names["TokensRecord"] += 1
        elif kind in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            # The server works on meanwhile: a tensor may be half made or half gone.
            with contextlib.suppress(RuntimeError, ReferenceError):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return web.json_response({**names, "bytes": sum(storages.values())})


@PromptServer.instance.routes.post("/star_test/fault")
async def fault(request: web.Request) -> web.Response:
    """Take how many of the next passes through each place are to run out of memory."""
    watch()
    FAULTS.update(await request.json())
    return web.json_response(FAULTS)


@PromptServer.instance.routes.post("/star_test/longest")
async def longest(_: web.Request) -> web.Response:
    """Say how long the longest block took since the last time this was asked."""
    watch()
    seconds, LONGEST["seconds"] = LONGEST["seconds"], 0.0
    return web.json_response({"seconds": seconds})
