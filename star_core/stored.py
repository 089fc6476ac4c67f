"""What a safetensors file says of itself: names, shapes and metadata, and the configuration that they fit.

A converted file carries its configuration in the metadata. Names and shapes alone cannot tell the 256 px and
512 px models apart, nor say the rotary base: a bare state dict needs a preset, and one that the file
contradicts is refused. No torch: no weights are read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open

from .config import PRESETS, StarConfig, TransformerConfig, VQVAEConfig, preset

METADATA_KEY = "star"


class FileHeader:
    """Names, shapes and metadata of one safetensors file. Raises ValueError for a missing or broken one."""

    framework: ClassVar[str] = "np"
    """Whose tensors safetensors would make."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        self.path = path
        # Opened here already so that a broken file is refused before any module is built.
        self._file = self._open()
        self._names = tuple(self._file.keys())
        self.metadata: dict[str, str] = dict(self._file.metadata() or {})

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework=self.framework)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}: not a whole safetensors file ({error!s:.200}). Download it again; an original"
                " .pth needs `python -m star_core convert` first"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._file.get_slice(name).get_shape())


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
    file: FileHeader, preset_name: str | None, overrides: Mapping[str, object] | None = None
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


def stored_vqvae_config(file: FileHeader) -> VQVAEConfig | None:
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
