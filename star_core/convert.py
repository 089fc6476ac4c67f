"""Official .pth files to safetensors that say what they are.

The official files are pickles whose transformer lies under ["trainer"]["var_wo_ddp"] beside the optimizer; a
bare state dict is read too. They are opened memory-mapped, and every tensor is written as it is needed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Networks
from .config import PRESETS, StarConfig, TokenMap, VQVAEConfig, preset, square_maps
from .key_tables import STAR_KEYS, VQVAE_KEYS, KeyTable
from .schedule import sides_text
from .stored import METADATA_KEY, transformer_facts, unreleased
from .text_files import TEXT_KEYS
from .vqvae import VQVAE
from .weights import build_on_meta, check_keys, read_pickle, save_tensors, vqvae_record

log = logging.getLogger(__name__)

TRANSFORMER_PATHS = (("trainer", "var_wo_ddp"), ("var_wo_ddp",), ("trainer", "var"))
VQVAE_PATHS = (("trainer", "vae_local"), ("vae_local",))
TEXT_PATHS = (("trainer", "text_enc"), ("text_enc",))
CONFIG_PATHS = (("trainer", "config"), ("config",))
TEXT_PREFIX = "text_encoder."
VQVAE_TOLD_BY = ("encoder.conv_in.weight", "quantize.embedding.weight")
"""The tensors whose shapes say what a VQ-VAE is."""


@dataclass(frozen=True)
class Written:
    """One file that `convert` wrote and what it holds."""

    path: Path
    what: str
    tensors: int


def _find(content: Any, paths: tuple[tuple[str, ...], ...]) -> Any:
    for path in paths:
        found = content
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _tensors(source: Path, what: str, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{source}: its {what} is a {type(found).__name__}, not a state dict")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def convert(
    source: Path,
    out: Path,
    *,
    preset_name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = torch.float16,
) -> list[Written]:
    """Write the parts of an official .pth into folder `out`; return what was written.

    Transformer (and causal sampler), VQ-VAE and text encoder each become a safetensors file where the
    source holds them. dtype None keeps the stored one. Raises ValueError naming file, key and remedy.
    """
    _make_folder(out)
    content = read_pickle(source)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: holds {type(content).__name__}, not a checkpoint's dictionary")
    written = []
    bare = {k.split(".")[0] for k in content if isinstance(k, str)}
    transformer = _find(content, TRANSFORMER_PATHS)
    vqvae = _find(content, VQVAE_PATHS)
    if transformer is None and "word_embed" in bare:
        transformer = content
    if vqvae is None and {"encoder", "decoder", "quantize"} <= bare:
        vqvae = content
    if transformer is not None:
        tensors = _tensors(source, "transformer", transformer)
        config = _config(source, content, tensors, preset_name, overrides)
        written.append(_write_star(source, out, tensors, config, dtype))
    if vqvae is not None:
        written.append(_write_vqvae(source, out, _tensors(source, "VQ-VAE", vqvae), dtype))
    if (text := _find(content, TEXT_PATHS)) is not None:
        written += _write_text(source, out, _tensors(source, "text encoder", text), dtype)
    if not written:
        names = ", ".join(str(key) for key in list(content)[:6])
        raise ValueError(
            f"{source}: no STAR transformer and no VQ-VAE in it (it begins with {names}). Expected"
            " trainer.var_wo_ddp or a bare state dict"
        )
    return written


def _make_folder(out: Path) -> None:
    """Make the folder of the results. Raises ValueError where nothing can be written: reading takes minutes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{out} can be no folder for the results: {error.strerror}") from None


def _config(
    source: Path,
    content: Mapping[Any, Any],
    tensors: Mapping[str, Tensor],
    preset_name: str | None,
    overrides: Mapping[str, Any] | None,
) -> StarConfig:
    facts = transformer_facts({n: tuple(t.shape) for n, t in tensors.items()}, str(source))
    stored = _find(content, CONFIG_PATHS)
    sides = stored.get("patch_nums") if isinstance(stored, Mapping) else None
    maps = None if sides is None else _maps(source, sides)
    fitting = {n: c for n, c in PRESETS.items() if not facts.contradictions(c.transformer)}
    if maps is not None:
        fitting = {n: c for n, c in fitting.items() if c.maps == maps}
    if preset_name is None:
        if not fitting:
            also = "" if maps is None else f"; its scales are {sides_text(maps)}"
            raise ValueError(f"{source} does not say which model it is, and {unreleased(facts)}{also}")
        if len(fitting) != 1:
            raise ValueError(
                f"{source} does not say which model it is: give --preset. By names, shapes and scales"
                f" it can be: {', '.join(fitting)}"
            )
        preset_name = next(iter(fitting))
    config = preset(preset_name, overrides)
    wrong = facts.contradictions(config.transformer)
    if maps is not None and config.maps != maps:
        wrong.append(f"the scales are {[side for side, _ in maps]} in the file")
    if wrong:
        raise ValueError(f"{source} is not {preset_name}: {'; '.join(wrong)}")
    return config


def _maps(source: Path, sides: Any) -> tuple[TokenMap, ...]:
    try:
        return square_maps([int(side) for side in sides])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its scales (patch_nums) are {sides!r:.80}, not sides ({error})") from None


def _cast(source: Path, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype == dtype:
        return tensor.contiguous()
    low, high = tensor.aminmax() if tensor.numel() else (0, 0)
    if max(-low, high) > torch.finfo(dtype).max:
        raise ValueError(f"{source}: {name} has values that {dtype} cannot hold. Give --dtype float32 or keep")
    return tensor.to(dtype).contiguous()


def _kept(
    source: Path, tensors: Mapping[str, Tensor], table: KeyTable, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        if reason := table.reason_dropped(name):
            log.info("%s left out: %s", name, reason)
            continue
        exact = dtype is None or name.endswith("scale_mul_1H11") or name.startswith("quantize.")
        # One tensor at a time leaves the memory-mapped file; together they are half its weights.
        found = _cast(source, name, tensor, None if exact else dtype)
        # safetensors refuses two names of one memory.
        place = found.untyped_storage().data_ptr()
        kept[name] = found.clone() if place in places else found
        places.add(place)
    return kept


def _write_star(
    source: Path,
    out: Path,
    tensors: Mapping[str, Tensor],
    config: StarConfig,
    dtype: torch.dtype | None,
) -> Written:
    check_keys(build_on_meta(lambda: Networks(config.transformer)), tensors, STAR_KEYS, str(source))
    kept = _kept(source, tensors, STAR_KEYS, dtype)
    path = out / "star.safetensors"
    save_tensors(path, kept, {METADATA_KEY: config.to_json()})
    return Written(path, f"transformer of {config.name}", len(kept))


def _write_vqvae(source: Path, out: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Written:
    shapes = {name: tuple(tensors[name].shape) for name in VQVAE_TOLD_BY if name in tensors}
    if len(shapes) < len(VQVAE_TOLD_BY) or [len(shape) for shape in shapes.values()] != [4, 2]:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "none of them"
        raise ValueError(
            f"{source}: its VQ-VAE is to have {' and '.join(VQVAE_TOLD_BY)}, and has {told}. Is this the VQ-VAE"
            " of STAR and VAR?"
        )
    (base_channels, *_), (codebook_size, code_width) = shapes.values()
    config = VQVAEConfig(base_channels, codebook_size=codebook_size, code_width=code_width)
    check_keys(build_on_meta(lambda: VQVAE(config)), tensors, VQVAE_KEYS, str(source))
    kept = _kept(source, tensors, VQVAE_KEYS, dtype)
    path = out / "vqvae.safetensors"
    save_tensors(path, kept, {METADATA_KEY: vqvae_record(config)})
    return Written(path, "VQ-VAE", len(kept))


def _write_text(
    source: Path, out: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[Written]:
    """Write a CLIP text model, and yield it; leave any other out, with a warning."""
    bare = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in tensors.items()}
    wanted = [name for name in bare if not TEXT_KEYS.reason_dropped(name)]
    strange = [name for name in wanted if TEXT_KEYS.ours(name) is None]
    if strange or not wanted:
        log.warning(
            "%s: its text encoder is left out, it is no CLIP text model (%s). Take Stable Diffusion 2.1's",
            source,
            f"{len(strange)} tensors are not known, the first is {strange[0]}" if strange else "it is empty",
        )
        return
    kept = _kept(source, bare, TEXT_KEYS, dtype)
    path = out / "text_encoder.safetensors"
    save_tensors(path, kept, {})
    yield Written(path, "text encoder", len(kept))
