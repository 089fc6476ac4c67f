"""Says what a checkpoint is, from names, shapes and metadata; reads no weights. No torch."""

from __future__ import annotations

import math
from pathlib import Path

from .config import PRESETS, token_count
from .model_files import SHIPPED, quoted
from .schedule import sides_text
from .stored import METADATA_KEY, FileHeader, resolve_config, stored_vqvae_config, transformer_facts

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def describe(path: Path | None) -> list[str]:
    """Return lines about a file, or about every weight file of a folder (None: the shipped model).

    Raises ValueError for a file that cannot be read or is no part of STAR.
    """
    place = SHIPPED if path is None else path
    if place.is_dir():
        files = sorted(place.rglob("*.safetensors"))
        if not files:
            pickled = min((file for file in place.rglob("*") if file.suffix in PICKLES), default=None)
            remedy = f". {_to_convert(pickled)}" if pickled else ""
            raise ValueError(f"{place}: no safetensors file in it{remedy}")
        return [line for file in files for line in describe(file)]
    if not place.is_file():
        raise ValueError(f"{place}: no such file or folder")
    if place.suffix in PICKLES:
        raise ValueError(f"{place}: a pickle. {_to_convert(place)}")
    return _describe_file(FileHeader(place))


def _to_convert(pickled: Path) -> str:
    return f"Convert it first: `python -m star_core convert {quoted(pickled)} --out FOLDER`"


def _describe_file(file: FileHeader) -> list[str]:
    count = sum(math.prod(file.shape(name)) for name in file)
    head = f"{file.path} ({count / 1e6:.1f} M values, {file.path.stat().st_size / 1e6:.1f} MB)"
    names = set(file)
    if "word_embed.weight" in names:
        return [head, *_transformer_lines(file)]
    if "quantize.embedding.weight" in names:
        config = stored_vqvae_config(file)
        return [head, f"  VQ-VAE: {config or 'no configuration in the file, as released: ch 160'}"]
    if any("token_embedding.weight" in name for name in names):
        return [head, "  CLIP text encoder"]
    raise ValueError(f"{file.path}: no part of STAR (its first tensor is {min(names, default='?')})")


def _transformer_lines(file: FileHeader) -> list[str]:
    facts = transformer_facts({name: file.shape(name) for name in file}, str(file.path))
    if METADATA_KEY not in file.metadata:
        fitting = [n for n, c in PRESETS.items() if not facts.contradictions(c.transformer)]
        return [
            "  STAR transformer, bare: it does not say which model it is",
            f"  presets that fit by names and shapes: {', '.join(fitting) or 'none'}",
        ]
    config = resolve_config(file, None)
    net = config.transformer
    height, width = config.resolution
    sampler = f"causal sampler of {net.sampler_depth} blocks" if net.has_sampler else "no sampler"
    return [
        f"  {config.name}: {width}x{height} pixels, depth {net.depth}, width {net.width}, {sampler}",
        f"  scales {sides_text(config.maps)} ({token_count(config.maps)} tokens), codebook"
        f" {net.codebook_size} x {net.code_width}, text width {net.text_width}",
        f"  {net.cross_attention} cross-attention, RoPE theta {net.rope_theta:g} extent"
        f" {net.rope_extent:g}, schedule {config.schedule}",
    ]
