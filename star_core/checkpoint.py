"""What a weight file holds: facts read from names and shapes, the configuration they fit, loading.

A converted file carries its configuration in the metadata. Names and shapes alone cannot tell the 256 px and
512 px models apart, nor say the rotary base: a bare state dict needs a preset, and one that the file
contradicts is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from . import upcast
from .causal_sampler import CausalSampler
from .config import PRESETS, StarConfig, TransformerConfig, VQVAEConfig, preset
from .eight_bit import quantize_linears
from .key_tables import STAR_KEYS, VQVAE_KEYS
from .transformer import Transformer
from .vqvae import VQVAE
from .weights import (
    METADATA_KEY,
    TensorFile,
    build_on_meta,
    fill,
    official_state,
    save_tensors,
)

TOLD_BY = (
    "word_embed.weight",
    "blocks.0.attn.scale_mul_1H11",
    "lvl_embed.weight",
    "encoder_proj.weight",
    "head_logits.weight",
)
"""The tensors whose shapes say what a transformer is."""


@dataclass(frozen=True)
class Facts:
    """What names and shapes say about a transformer file."""

    depth: int
    width: int
    heads: int
    scales: int
    text_width: int
    codebook_size: int
    code_width: int
    sampler_depth: int

    def contradictions(self, config: TransformerConfig, said_by: str = "the preset") -> list[str]:
        """Return a phrase for every field in which the tensors and what somebody says of them differ."""
        return [
            f"{field.name} is {getattr(self, field.name)} in the file and"
            f" {getattr(config, field.name)} in {said_by}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(config, field.name)
        ]


def transformer_facts(shapes: Mapping[str, tuple[int, ...]], source: str) -> Facts:
    """Read the facts from official names and shapes. Raises ValueError for another model's file."""
    try:
        width, code_width = shapes["word_embed.weight"]
        return Facts(
            depth=_blocks(shapes, "blocks"),
            width=width,
            heads=shapes["blocks.0.attn.scale_mul_1H11"][1],
            scales=shapes["lvl_embed.weight"][0],
            text_width=shapes["encoder_proj.weight"][1],
            codebook_size=shapes["head_logits.weight"][0],
            code_width=code_width,
            sampler_depth=_blocks(shapes, "feat_extract_blocks"),
        )
    except KeyError as error:
        first = next(iter(shapes), "nothing")
        raise ValueError(
            f"{source}: not a STAR transformer, it has no {error!s:.60} (its first tensor is"
            f" {first}). Give the transformer's file here; the VQ-VAE and the text encoder have their"
            " own places"
        ) from error
    except (ValueError, IndexError) as error:
        odd = ", ".join(f"{name} {list(shapes[name])}" for name in TOLD_BY if name in shapes)
        raise ValueError(
            f"{source}: not a STAR transformer, its tensors have other shapes than one's: {odd}"
        ) from error


def _blocks(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    numbers = [
        int(match.group(1)) for name in shapes if (match := re.match(rf"{prefix}\.(\d+)\.attn\.q_bias$", name))
    ]
    return max(numbers, default=-1) + 1


def resolve_config(
    file: TensorFile, preset_name: str | None, overrides: Mapping[str, object] | None = None
) -> StarConfig:
    """Return the configuration of a transformer file, from its metadata or from a preset.

    Raises ValueError where neither says it, or where preset, metadata and tensors contradict each other.
    """
    facts = transformer_facts({name: file.shape(name) for name in file}, str(file.path))
    if overrides and preset_name is None:
        raise ValueError(
            f"{', '.join(overrides)} overrides a preset, and none is named: name it, or leave it out"
        )
    stored = file.metadata.get(METADATA_KEY)
    if stored is not None:
        config = _stored_config(file.path, stored)
        if preset_name is not None and preset(preset_name, overrides) != config:
            raise ValueError(
                f"{file.path} says of itself that it is {config.name}, which preset {preset_name}"
                " contradicts: leave the preset out"
            )
    elif preset_name is None:
        fitting = [n for n, c in PRESETS.items() if not facts.contradictions(c.transformer)]
        if not fitting:
            raise ValueError(f"{file.path} does not say which model it is, and {unreleased(facts)}")
        raise ValueError(
            f"{file.path} does not say which model it is: choose a preset. By names and shapes it can"
            f" be: {', '.join(fitting)}"
        )
    else:
        config = preset(preset_name, overrides)
    wrong = facts.contradictions(config.transformer, "its metadata" if stored is not None else "the preset")
    if wrong:
        raise ValueError(f"{file.path} is not {config.name}: {'; '.join(wrong)}")
    return config


def unreleased(facts: Facts) -> str:
    """Say that no released model has these facts, and that no preset can help."""
    told = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(facts).items())
    return (
        f"no released one has its sizes ({told}): whoever trained it has to save it with its configuration"
        " (`save_networks`)"
    )


def _stored_config(path: Path, stored: str) -> StarConfig:
    try:
        return StarConfig.from_json(stored)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata is damaged: {error}. Convert the original again") from error


class Networks(nn.Module):
    """Transformer and, where the checkpoint has one, causal sampler: what one file fills."""

    def __init__(self, config: TransformerConfig, *, operations: ModuleType = nn) -> None:
        super().__init__()
        self.transformer = Transformer(config, operations=operations)
        self.causal_sampler = CausalSampler(config, operations=operations) if config.has_sampler else None


def operations_for(dtype: torch.dtype, device: torch.device, *, keep_halves: bool = False) -> ModuleType:
    """Return the layers of a model of this dtype that computes on this device: torch.nn, or `upcast`."""
    return upcast if keep_halves or upcast.needs_upcast(dtype, device) else nn


def load_networks(
    path: Path,
    *,
    preset_name: str | None = None,
    overrides: Mapping[str, object] | None = None,
    operations: ModuleType = nn,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    eight_bit: str | None = None,
    packed: bool = False,
    keep_halves: bool = False,
) -> tuple[StarConfig, Networks]:
    """Load transformer and causal sampler from a safetensors file, strictly.

    eight_bit: keep the linear layers' weights in 8 bits, "int8" or "fp8" (`eight_bit`), a fast mode that
    changes the picture. packed: lay them out for a CPU's bfloat16 products (`packed`). keep_halves: leave
    weights in their file where it holds halves, for `operations` that read them (`upcast`).
    Raises ValueError naming file, key and remedy.
    """
    file = TensorFile(path)
    config = resolve_config(file, preset_name, overrides)
    networks = build_on_meta(lambda: Networks(config.transformer, operations=operations))
    # Rounded before it moves: the device never holds the whole weights.
    first = "cpu" if eight_bit else device
    fill(
        networks,
        file,
        STAR_KEYS,
        source=str(path),
        dtype=dtype,
        device=first,
        packing=packed,
        keep_halves=keep_halves,
    )
    if eight_bit:
        quantize_linears(networks, eight_bit)
        for parameter in networks.parameters():
            # One that lies in the file would keep mapped, and counted, all that was read of it.
            parameter.data = parameter.data.clone()
        networks.to(device)
    return config, networks


def load_vqvae(
    path: Path,
    config: VQVAEConfig | None = None,
    *,
    operations: ModuleType = nn,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep_halves: bool = False,
) -> VQVAE:
    """Load a VQ-VAE from a safetensors file; `config` must agree with what the file says of itself.

    keep_halves: as in `load_networks`.
    """
    file = TensorFile(path)
    stored = stored_vqvae_config(file)
    if config is not None and stored is not None and stored != config:
        raise ValueError(
            f"{path} holds another VQ-VAE than the checkpoint was trained with: {stored} instead of {config}"
        )
    chosen = config or stored or VQVAEConfig()
    vqvae = build_on_meta(lambda: VQVAE(chosen, operations=operations))
    fill(vqvae, file, VQVAE_KEYS, source=str(path), dtype=dtype, device=device, keep_halves=keep_halves)
    # A host's layers are the host's: it may keep and stream their weights as plain rows of numbers.
    return vqvae.channels_last() if operations is nn and torch.device(device).type == "cuda" else vqvae


def stored_vqvae_config(file: TensorFile) -> VQVAEConfig | None:
    """Return the VQ-VAE configuration of a file's metadata, None where it has none."""
    stored = file.metadata.get(METADATA_KEY)
    if stored is None:
        return None
    try:
        return VQVAEConfig(**json.loads(stored)["vqvae"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file.path}: its metadata describes no VQ-VAE ({error!s:.200}). Convert the original again"
        ) from error


def save_networks(path: Path, config: StarConfig, networks: Networks) -> None:
    """Write transformer and causal sampler with the whole configuration in the metadata."""
    tensors: dict[str, Tensor] = official_state(networks, STAR_KEYS)
    save_tensors(path, tensors, {METADATA_KEY: config.to_json()})
