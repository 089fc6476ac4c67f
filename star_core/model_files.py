"""Which files make a model: transformer, VQ-VAE and text encoder, by their names in its folder. No torch."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

SHIPPED = Path(__file__).parent / "demo"
STAR_FILE = "star.safetensors"
VQVAE_FILE = "vqvae.safetensors"
TEXT_FOLDER = "text_encoder"
TEXT_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What a folder that transformers has written holds."""


def quoted(path: Path) -> str:
    """Return a path as a command line takes it: Windows' knows no single quotes."""
    return f'"{path}"' if os.name == "nt" else shlex.quote(str(path))


@dataclass(frozen=True)
class Files:
    """Where a model's parts lie: transformer file, VQ-VAE file, text encoder file or folder."""

    star: Path
    vqvae: Path
    text_encoder: Path


def find_files(
    source: Path | str | None = None,
    *,
    vqvae: Path | str | None = None,
    text_encoder: Path | str | None = None,
) -> Files:
    """Return the files of a model: see `load`. Raises ValueError naming the one that is missing."""
    place = SHIPPED if source is None else Path(source)
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder")
    folder = place if place.is_dir() else place.parent
    star_file = folder / STAR_FILE if place.is_dir() else place
    if not star_file.is_file():
        raise ValueError(f"{star_file}: no such file")
    return Files(
        star_file,
        _beside(vqvae, folder / VQVAE_FILE, "VQ-VAE", "vqvae"),
        _beside(text_encoder, _text_place(folder), "text encoder", "text_encoder"),
    )


def _text_place(folder: Path) -> Path:
    """Return where a model's folder has its text encoder: in one file, in itself as transformers writes one, or
    in text_encoder/ (tokenizer/ is beside it), as Stable Diffusion 2.1's does."""
    single = folder / "text_encoder.safetensors"
    if single.is_file():
        return single
    written = any((folder / name).is_file() for name in TEXT_WEIGHTS)
    return folder if written else folder / TEXT_FOLDER


def _beside(given: Path | str | None, default: Path, what: str, option: str) -> Path:
    place = default if given is None else Path(given)
    if not place.exists():
        raise ValueError(f"{place}: no {what} there. Put it there, or name another place ({option})")
    return place
