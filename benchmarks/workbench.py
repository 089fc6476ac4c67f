"""What the benchmarks share: random models of the released sizes, the machine's name, peak memory.

Speed does not depend on what the weights say, so that no download is needed: every tensor follows from its
official name and a seed, and whoever fills the official modules by the same rule has the same model. A GPU
draws its own, two billion in a moment: other numbers than the CPU's, equal on all GPUs of one kind.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import platform
import resource
import shutil
import statistics
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from star_core.checkpoint import Networks, save_networks  # noqa: E402
from star_core.config import PRESETS, StarConfig  # noqa: E402
from star_core.key_tables import STAR_KEYS, VQVAE_KEYS  # noqa: E402
from star_core.model_files import SHIPPED, STAR_FILE, VQVAE_FILE  # noqa: E402
from star_core.star import Star  # noqa: E402
from star_core.text_encoder import TextEncoder, load_tokenizer  # noqa: E402
from star_core.vqvae import VQVAE  # noqa: E402
from star_core.weights import build_on_meta, kept_dtype, save_vqvae  # noqa: E402

SIZES = {
    "d16-256": "star-256-d16",
    "d30-256": "star-256-d30",
    "d30-512": "star-512-d30",
    "d30-1024": "star-1024-d30",
    "d30-1024-sampler": "star-1024-d30-sampler",
}
PROMPT = "a red fox reading a newspaper in the morning light"
SD21_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
"""Stable Diffusion 2.1's text tower (OpenCLIP ViT-H/14), which the released checkpoints read."""
GIB = 2**30


def config_of(size: str) -> StarConfig:
    """Return the released configuration of a benchmark's size."""
    return PRESETS[SIZES[size]]


def value(official: str, shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the parameter with this official name, float32: unit activations, and tokens that differ.

    Drawn where it is to be on a GPU, on the CPU for every other device. A generator per name: neither order
    nor selection of the parameters matters.
    """
    place = torch.device(device) if torch.device(device).type == "cuda" else torch.device("cpu")
    generator = torch.Generator(place).manual_seed(zlib.crc32(official.encode()) + seed)
    x = torch.empty(tuple(shape), device=place).normal_(generator=generator)
    if official.endswith("scale_mul_1H11"):
        return x.mul_(0.3).add_(1.4)
    if x.ndim <= 1:
        return x.mul_(0.1).add_(1.0 if "norm" in official and official.endswith("weight") else 0.0)
    if any(part in official for part in ("pos_start", "lvl_embed", "quantize.embedding")):
        return x.mul_(0.5)
    # The picture so far must weigh more than its prompt, or every position gets the same token.
    gain = 3.0 if official.startswith("head_logits") else 6.0 if "word_embed" in official else 1.0
    return x.mul_(gain / math.sqrt(x[0].numel()))


def randomise(
    module: nn.Module,
    official_name: Callable[[str], str | None],
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Give every parameter of a module its value on a device, one at a time: never two copies of a model."""
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            whole = f"{path}.{name}" if path else name
            official = official_name(whole)
            assert official is not None, f"no official name for {whole}"
            kept = torch.float32 if name == "scale_mul_1H11" else kept_dtype(whole, dtype)
            filled = value(official, parameter.shape, seed, device).to(device=device, dtype=kept)
            setattr(owner, name, nn.Parameter(filled, requires_grad=False))


def build_text_model(seed: int, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Return transformers' CLIPTextModel of Stable Diffusion 2.1's size, with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = build_on_meta(lambda: CLIPTextModel(CLIPTextConfig(**SD21_TEXT)))
    inner = getattr(model, "text_model", model)
    randomise(inner, lambda name: f"text.{name}", seed=seed, dtype=dtype, device=device)
    inner.embeddings.position_ids = torch.arange(SD21_TEXT["max_position_embeddings"], device=device)[None]
    return model.eval()


def tokenizer() -> Any:
    return load_tokenizer(SHIPPED / "tokenizer")


def build_networks(config: StarConfig, seed: int, dtype: torch.dtype, device: torch.device | str) -> Networks:
    networks = build_on_meta(lambda: Networks(config.transformer))
    randomise(networks, STAR_KEYS.official, seed=seed, dtype=dtype, device=device)
    return networks.eval()


def build_vqvae(config: StarConfig, seed: int, dtype: torch.dtype, device: torch.device | str) -> VQVAE:
    vqvae = build_on_meta(lambda: VQVAE(config.vqvae))
    randomise(vqvae, VQVAE_KEYS.official, seed=seed, dtype=dtype, device=device)
    return vqvae.channels_last().eval() if torch.device(device).type == "cuda" else vqvae.eval()  # as loaded


def write_model(
    config: StarConfig, seed: int, dtype: torch.dtype, folder: Path, device: torch.device | str = "cpu"
) -> None:
    """Write the random model as a user has a converted one: three files and the tokenizer's folder.

    device draws the weights.
    """
    save_networks(folder / STAR_FILE, config, build_networks(config, seed, dtype, device))
    save_vqvae(folder / VQVAE_FILE, build_vqvae(config, seed, dtype, device))
    text = folder / "text_encoder"
    text.mkdir()
    model = build_text_model(seed, dtype, device)
    state = {
        f"text_model.{name.removeprefix('text_model.')}": tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    save_file(state, text / "model.safetensors")
    (text / "config.json").write_text(json.dumps(SD21_TEXT))
    shutil.copytree(SHIPPED / "tokenizer", folder / "tokenizer")


def build_star(
    config: StarConfig, seed: int, dtype: torch.dtype, device: torch.device | str, *, graphs: bool = False
) -> Star:
    """Return a model of this configuration with random weights."""
    networks, vqvae = build_networks(config, seed, dtype, device), build_vqvae(config, seed, dtype, device)
    text = TextEncoder(build_text_model(seed, dtype, device), tokenizer())
    return Star(
        config,
        networks.transformer,
        networks.causal_sampler,
        vqvae,
        text,
        torch.device(device),
        graphs=graphs,
    )


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a figure has to name beside batch and seed."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Peak:
    """The most memory held since `reset`: of the process, or on the GPU by its tensors.

    graphs: on the GPU by torch's allocator as a whole, since replayed graphs' scratch memory is no tensor's.
    """

    def __init__(self, device: torch.device, *, graphs: bool = False) -> None:
        self._device, self._cuda, self._graphs = device, device.type == "cuda", graphs

    def reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Linux forgets the process's high-water mark; elsewhere it is that of its whole life.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        if self._cuda:
            if self._graphs:
                return torch.cuda.max_memory_reserved(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def give_back(device: torch.device) -> None:
    """Have a GPU's allocator return what no tensor uses, so that it counts for nobody's peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def middle(numbers: Sequence[float], digits: int = 4) -> float:
    return round(statistics.median(numbers), digits)


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines of aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def report(result: dict[str, Any]) -> None:
    """Print one JSON line: a benchmark ends in it, and a long one prints what it has so far before."""
    print(json.dumps(result, ensure_ascii=False), flush=True)
