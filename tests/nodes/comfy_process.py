"""ComfyUI without HTTP, as a process that answers one JSON line per JSON line: what the node tests talk to.

Runs under ComfyUI's own interpreter: python comfy_process.py COMFYUI PACK MODELS SCRATCH
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import sys
import traceback
import weakref
from pathlib import Path

COMFYUI, PACK, MODELS, SCRATCH = (str(Path(a).resolve()) for a in sys.argv[1:5])
# ComfyUI logs to stdout: what it says goes to stderr, so that answers stand alone.
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
sys.path[0] = COMFYUI
os.chdir(COMFYUI)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import LatentPreviewMethod, args  # noqa: E402

args.cpu = True
args.base_directory = SCRATCH

import comfy.model_management as mm  # noqa: E402
import comfy.utils  # noqa: E402
import comfyui_version  # noqa: E402
import execution  # noqa: E402
import folder_paths  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import nodes  # noqa: E402

folder_paths.folder_names_and_paths["star"] = ([MODELS], set())
folder_paths.set_temp_directory(SCRATCH)
folder_paths.set_output_directory(SCRATCH)

SEEN: dict[str, object] = {}


class Probe:
    """An output node that keeps what it is given."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "test", "keep", True, ()

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"value": (Anything("*"),)}, "hidden": {"unique_id": "UNIQUE_ID"}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):  # noqa: N802
        return True

    @classmethod
    def IS_CHANGED(cls, value):  # noqa: N802
        return float("nan")

    def keep(self, value, unique_id):
        SEEN[unique_id] = value
        return {}


class Anything(str):
    __slots__ = ()

    def __ne__(self, other):
        return False

    def __eq__(self, other):
        return True

    def __hash__(self):
        return hash("*")


class Source:
    """A node that gives an array as a tensor: pictures and masks without files."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "give", (Anything("*"),)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"path": ("STRING", {"default": ""})}}

    def give(self, path):
        return (torch.from_numpy(np.load(path)),)


class Text:
    """A node that gives a text over a link."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "give", (Anything("*"),)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"text": ("STRING", {"default": ""})}}

    def give(self, text):
        return (text,)


class Number(Text):
    """A node that gives a whole number over a link, where ComfyUI checks no limits."""

    def give(self, text):
        return (int(text),)


class Conditioning:
    """What core's text encoder gives, without its model."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "give", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def give(self):
        return ([[torch.zeros(1, 77, 128), {"pooled_output": torch.zeros(1, 128)}]],)


class Server:
    """What PromptExecutor and the nodes need of PromptServer."""

    client_id = "test"
    last_node_id = None
    last_prompt_id = None
    sockets_metadata: dict = {}

    def __init__(self):
        self.texts = []
        self.previews = []

    def send_sync(self, event, data, sid=None):
        pass

    def send_progress_text(self, text, node_id, sid=None):
        self.texts.append([str(node_id), text])


class Module:
    """Stands in for ComfyUI's module `server`, which only its HTTP server imports."""

    class PromptServer:
        instance = Server()


async def load():
    await nodes.init_public_apis()
    # The one file of ComfyUI's extra nodes that our workflows use; all of them take half a minute.
    masks = str(Path(COMFYUI, "comfy_extras", "nodes_mask.py"))
    assert await nodes.load_custom_node(masks, module_parent="comfy_extras"), "ComfyUI did not load its masks"
    return await nodes.load_custom_node(PACK, module_parent="custom_nodes")


assert asyncio.run(load()), "ComfyUI did not load the pack"
nodes.NODE_CLASS_MAPPINGS["TestProbe"] = Probe
nodes.NODE_CLASS_MAPPINGS["TestSource"] = Source
nodes.NODE_CLASS_MAPPINGS["TestText"] = Text
nodes.NODE_CLASS_MAPPINGS["TestNumber"] = Number
nodes.NODE_CLASS_MAPPINGS["TestConditioning"] = Conditioning
sys.modules["server"] = Module
SERVER = Module.PromptServer.instance
_settings = {"cache_type": execution.CacheType.CLASSIC, "cache_args": {"lru": 0, "ram": 0, "ram_inactive": 0}}
_known = inspect.signature(execution.PromptExecutor.__init__).parameters
EXECUTOR = execution.PromptExecutor(SERVER, **{k: v for k, v in _settings.items() if k in _known})
PACKAGE = next(name for name, module in sys.modules.items() if name.endswith("nodes.host"))[
    : -len(".nodes.host")
]


def part(name):
    """Return a module of the pack as ComfyUI loaded it."""
    __import__(f"{PACKAGE}.{name}")
    return sys.modules[f"{PACKAGE}.{name}"]


class Faults:
    """Counts what the engine does, and makes it fail where a test wants it to."""

    def __init__(self):
        self.count = dict.fromkeys(("blocks", "drawn", "decoded", "encoded", "strips"), 0)
        self.wanted = {}
        transformer, vqvae = part("star_core.transformer"), part("star_core.vqvae")
        self._watch(transformer.TextBlock, "forward", "blocks", self._at_block)
        self._watch(transformer.Transformer, "logits", "drawn", lambda *a, **k: None)
        self._watch(vqvae.VQVAE, "pictures", "decoded", self._at_decoding)
        self._watch(vqvae.VQVAE, "encode", "encoded", lambda *a, **k: None)
        self._watch(vqvae.ResidualBlock, "_in_strips", "strips", lambda *a, **k: None)

    def _watch(self, owner, method, what, fault):
        original = getattr(owner, method)

        def watched(module, *a, **k):
            self.count[what] += 1
            fault(*a, **k)
            return original(module, *a, **k)

        setattr(owner, method, watched)

    def _at_block(self, *_, **__):
        if self.count["blocks"] == self.wanted.get("interrupt_at_block"):
            mm.interrupt_current_processing(True)
        if self.count["blocks"] == self.wanted.get("oom_at_block"):
            raise torch.cuda.OutOfMemoryError("made up")
        if self.count["blocks"] == self.wanted.get("error_at_block"):
            raise RuntimeError("made up")

    def _at_decoding(self, f_hat, sliced=False):
        full = self.wanted.get("only_in_strips") and not sliced
        full = full or f_hat.shape[0] > self.wanted.get("largest_batch", 1 << 30)
        if full or f_hat.shape[-1] > self.wanted.get("largest_side", 1 << 30):
            words = self.wanted.get("out_of_memory_in_words")
            raise RuntimeError(words) if words else torch.cuda.OutOfMemoryError("made up")


FAULTS = Faults()


def describe(value, where):
    """Return a value as JSON; tensors go to files."""
    if torch.is_tensor(value):
        path = f"{SCRATCH}/{where}.npy"
        np.save(path, value.float().cpu().numpy())
        return {"array": path, "dtype": str(value.dtype), "device": str(value.device)}
    if type(value).__name__ == "TokensRecord":
        return {
            "maps": [list(m) for m in value.maps],
            "tokens": [step.tokens.tolist() for step in value.steps],
            "given": [step.given for step in value.steps],
            "f_hats": [describe(step.f_hat, f"{where}-{step.scale}") for step in value.steps],
        }
    if type(value).__name__ == "ModelHandle":
        return {"dtype": str(value.patcher.model.transformer.dtype), "patchers": 2}
    if type(value).__name__ == "TextEncoderHandle":
        return {"dtypes": sorted({str(p.dtype) for p in value.patcher.model.parameters()})}
    return {"type": type(value).__name__, "text": str(value)[:300]}


def watch_instances(owner):
    """Return a set of the living instances of a class."""
    alive, original = weakref.WeakSet(), owner.__init__

    def watched(self, *a, **k):
        alive.add(self)
        original(self, *a, **k)

    owner.__init__ = watched
    return alive


CACHES = watch_instances(part("star_core.attention").LayerCache)
NETWORKS = watch_instances(part("star_core.checkpoint").Networks)


def hooks():
    """Return how many hooks are left on the blocks of the living networks."""
    blocks = [b for n in NETWORKS for m in n.modules() if isinstance(m, torch.nn.ModuleList) for b in m]
    assert blocks, "no network is alive"
    return sum(len(block._forward_pre_hooks) for block in blocks)


def preview_hook(value, total, preview, node_id=None):
    # ComfyUI's own hook looks for an interruption here; without one of ours nothing else would.
    SERVER.previews.append([value, total, None if preview is None else list(preview[1].size)])


comfy.utils.set_progress_bar_global_hook(preview_hook)


get_free_memory = mm.get_free_memory
load_models_gpu = mm.load_models_gpu
ROOM: list[int] = []


def load_models(patchers, *a, memory_required=0, **k):
    """Load as ComfyUI does, and note how much room is asked for."""
    ROOM.append(memory_required)
    return load_models_gpu(patchers, *a, memory_required=memory_required, **k)


mm.load_models_gpu = load_models


def run(request):
    """Run a prompt; say what came out of it, what was computed, and what the user would read."""
    SEEN.clear()
    SERVER.texts.clear()
    SERVER.previews.clear()
    FAULTS.wanted = request.get("faults", {})
    FAULTS.count = dict.fromkeys(FAULTS.count, 0)
    ROOM.clear()
    part("nodes.sockets").BYTES_REMEMBERED = FAULTS.wanted.get("bytes_remembered", 1 << 29)
    part("star_core.tiles").TILE = FAULTS.wanted.get("tile", 32)
    part("star_core.slices").STRIP["cpu"] = FAULTS.wanted.get("strip", 1 << 21)
    mm.get_free_memory = lambda *a, **k: FAULTS.wanted.get("free_memory") or get_free_memory(*a, **k)
    args.preview_method = LatentPreviewMethod(request.get("preview_method", "none"))
    prompt, outputs = request["prompt"], request["outputs"]
    check = execution.validate_prompt
    arguments = ("test", prompt, None)[: len(inspect.signature(check).parameters)]
    valid = asyncio.run(check(*arguments))
    if not valid[0]:
        return {"valid": False, "errors": json.dumps([valid[1], valid[3]], default=str, ensure_ascii=False)}
    # Newer versions take the preview method from the prompt, older ones from the command line.
    EXECUTOR.execute(prompt, "test", {"preview_method": args.preview_method.value}, outputs)
    kinds = dict(EXECUTOR.status_messages)
    error = kinds.get("execution_error", {})
    return {
        "valid": True,
        "ok": EXECUTOR.success,
        "interrupted": "execution_interrupted" in kinds,
        "error": error.get("exception_message", ""),
        "error_node": error.get("node_id"),
        "error_type": error.get("exception_type", ""),
        "seen": {node: describe(value, node) for node, value in SEEN.items()},
        "count": dict(FAULTS.count),
        "room": list(ROOM),
        "texts": list(SERVER.texts),
        "previews": list(SERVER.previews),
        "hooks": hooks() if request.get("inspect") else None,
        "caches": (gc.collect(), len(CACHES))[1] if request.get("inspect") else None,
    }


def object_info(_):
    """Return what /object_info says of our nodes."""
    ours = {k: v for k, v in nodes.NODE_CLASS_MAPPINGS.items() if k.startswith("Star")}
    return {
        name: {
            "input": node.INPUT_TYPES(),
            "output": node.RETURN_TYPES,
            "output_name": node.RETURN_NAMES,
            "output_tooltips": getattr(node, "OUTPUT_TOOLTIPS", None),
            "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name),
            "description": node.DESCRIPTION,
            "category": node.CATEGORY,
            "bases": [base.__name__ for base in node.GET_BASE_CLASS().__bases__]
            if hasattr(node, "GET_BASE_CLASS")
            else [],
        }
        for name, node in ours.items()
    }


def free(_):
    """Do what POST /free does: drop every model and every cached output."""
    before = len(NETWORKS)
    EXECUTOR.reset()
    mm.unload_all_models()
    gc.collect()
    mm.soft_empty_cache()
    return {"before": before, "after": len(NETWORKS), "loaded": len(mm.current_loaded_models)}


def answer(request):
    """Ask what an HTTP route answers."""
    return getattr(part("nodes.answers"), request["name"])(request["query"])


def build_lazily(_):
    """Load a checkpoint as where ComfyUI's dynamic memory lets layers begin without weights."""
    memory = sys.modules.get("comfy.memory_management")
    before = getattr(memory, "aimdo_enabled", None)
    if memory is not None:
        memory.aimdo_enabled = True
    try:
        load = part("star_core.checkpoint").load_networks
        _, networks = load(
            Path(MODELS) / "tiny" / "star.safetensors", operations=part("nodes.host").operations()
        )
    finally:
        if memory is not None:
            memory.aimdo_enabled = before
    return {"parameters": sum(1 for _ in networks.parameters())}


def multiplied(request):
    """Return in which dtypes layers for ComfyUI multiply bfloat16 where a CPU has products for it, or not."""
    upcast, operations = part("star_core.upcast"), part("nodes.host").operations
    before, seen = upcast.multiplies, []
    upcast.multiplies = lambda half: request["products"]
    operations.cache_clear()
    layers = operations()
    functions = torch.nn.functional
    originals = {name: getattr(functions, name) for name in ("linear", "conv2d")}

    def counted(name):
        return lambda x, weight, *rest, **more: (
            seen.append([str(x.dtype), str(weight.dtype)]) or originals[name](x, weight, *rest, **more)
        )

    try:
        for name in originals:
            setattr(functions, name, counted(name))
        rows = layers.Linear(8, 4).bfloat16()(torch.ones(2, 8).bfloat16())
        picture = layers.Conv2d(3, 4, 3).bfloat16()(torch.ones(1, 3, 5, 5).bfloat16())
    finally:
        upcast.multiplies = before
        operations.cache_clear()
        for name, original in originals.items():
            setattr(functions, name, original)
    return {"seen": seen, "made": [str(rows.dtype), str(picture.dtype)]}


def dtype_with_8_bit_weights(_):
    """Return in what a transformer is loaded by `auto` where the user has ComfyUI keep weights in 8 bits, on a
    device that computes in bfloat16."""
    args.fp8_e4m3fn_unet = True
    before, mm.should_use_bf16 = mm.should_use_bf16, lambda *_, **__: True
    try:
        return {"dtype": str(part("nodes.host").transformer_dtype("auto", 10**9))}
    finally:
        args.fp8_e4m3fn_unet, mm.should_use_bf16 = False, before


class Font:
    """A font that has some letters, and draws all others alike."""

    def __init__(self, name, letters):
        self.name, self.letters = name, letters

    def getmask(self, letter):
        return b"drawn " + letter.encode() if letter in self.letters else b"box"


def font_of(request):
    """Return which of some fonts, by the letters they have, labels are written in."""
    from PIL import ImageFont

    grid, fonts = part("nodes.grid"), request["fonts"]
    originals = ImageFont.load_default, ImageFont.truetype, grid.WIDE_FONTS, grid.log.warning
    said = []

    def truetype(name, size):
        if name not in fonts:
            raise OSError("cannot open resource")
        return Font(name, fonts[name])

    ImageFont.load_default = lambda size: Font("own", "é")
    ImageFont.truetype, grid.WIDE_FONTS = truetype, ("none", *fonts)
    grid.log.warning = lambda line, *rest: said.append(line % rest)
    try:
        return {"font": grid._font(request["text"], 20).name, "said": said}
    finally:
        ImageFont.load_default, ImageFont.truetype, grid.WIDE_FONTS, grid.log.warning = originals


def version(_):
    return {"version": comfyui_version.__version__}


DEEDS = {
    "run": run,
    "object_info": object_info,
    "free": free,
    "answer": answer,
    "build_lazily": build_lazily,
    "multiplied": multiplied,
    "dtype_with_8_bit_weights": dtype_with_8_bit_weights,
    "font_of": font_of,
    "version": version,
}

for line in sys.stdin:
    asked = json.loads(line)
    try:
        reply = DEEDS[asked.pop("do")](asked)
    except Exception as error:
        reply = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    ANSWERS.write(json.dumps(reply, default=str) + "\n")
    ANSWERS.flush()
