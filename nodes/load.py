"""Load STAR: weights from models/star, or the model that ships with the pack."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any

from comfy_api.v0_0_2 import io

from . import host, sockets

SHIPPED_MODEL = "shipped model"
AUTOMATIC = "automatic"
FROM_FILE = "from the file"
PRECISIONS = ["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
ORIGINAL = {".pth", ".pt", ".ckpt", ".bin"}


class StarLoad(io.ComfyNode):
    """Form of `star_core.checkpoint.load_networks`, `load_vqvae` and `load_text_encoder`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        from ..star_core.config import PRESETS

        files = host.list_files()
        return io.Schema(
            node_id="StarLoad",
            display_name="Load STAR",
            category=sockets.CATEGORY,
            description=(
                "Loads a STAR model: the scale-wise transformer with its causal sampler, the VQ-VAE, and the"
                ' text encoder. "shipped model" is a small emoji model that comes with the pack and needs no'
                " download; other checkpoints lie in models/star. ComfyUI decides where the weights are kept."
            ),
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[SHIPPED_MODEL, *_of_kind(files, "star")],
                    default=SHIPPED_MODEL,
                    tooltip=(
                        "The transformer's file: the shipped model, or a converted .safetensors file in"
                        " models/star (sub-folders are listed). An original .pth must be converted once with"
                        " python -m star_core convert."
                    ),
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=[AUTOMATIC, *_of_kind(files, "text encoder")],
                    default=AUTOMATIC,
                    tooltip=(
                        "The CLIP text model that the checkpoint was trained with. automatic: text_encoder/ and"
                        " tokenizer/ beside the checkpoint, as Stable Diffusion 2.1 lays them out. A file of"
                        " another width is refused."
                    ),
                ),
                io.Combo.Input(
                    "vqvae",
                    options=[AUTOMATIC, *_of_kind(files, "vqvae")],
                    default=AUTOMATIC,
                    tooltip=(
                        "The VQ-VAE whose codebook the transformer speaks. automatic: vqvae.safetensors"
                        " beside the checkpoint. Another codebook gives noise; one of another size is"
                        " refused."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=PRECISIONS,
                    default="auto",
                    tooltip=(
                        "Number format of transformer and causal sampler. auto asks ComfyUI what the device"
                        " computes best in. int8 and fp8 are 8-bit weights: half the memory of bfloat16"
                        " and another picture. int8 is faster only on CPUs with AVX-512 VNNI and no AMX; fp8 is"
                        " for NVIDIA's Ada, Hopper and later GPUs, and slow on every other device. The VQ-VAE"
                        " stays in float32 unless ComfyUI was started with --fp16-vae or --bf16-vae; the text"
                        " encoder computes in float32."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=[FROM_FILE, *PRESETS],
                    default=FROM_FILE,
                    tooltip=(
                        "Which released model the file is. Converted files say it themselves; choose one only"
                        " where the file does not. A preset that the file contradicts is refused."
                    ),
                    **host.newer(io.Combo.Input.__init__, advanced=True),
                ),
            ],
            outputs=[
                sockets.Model.Output(
                    "MODEL",
                    display_name="model",
                    tooltip="Transformer and causal sampler, for Scale-wise Sample and VQ Encode.",
                ),
                sockets.TextEncoder.Output(
                    "TEXT_ENCODER", display_name="text_encoder", tooltip="For CLIP Encode (STAR)."
                ),
                sockets.VQVAE.Output(
                    "VQVAE", display_name="vqvae", tooltip="For VQ Decode, VQ Encode and Scales to Images."
                ),
            ],
            **host.newer(
                io.Schema,
                search_aliases=[
                    "star checkpoint",
                    "load autoregressive model",
                    "VAR",
                    "scale-wise",
                    "checkpoint",
                ],
            ),
        )

    @classmethod
    def validate_inputs(
        cls, checkpoint: str = SHIPPED_MODEL, text_encoder: str = AUTOMATIC, vqvae: str = AUTOMATIC
    ) -> bool | str:
        for name in (checkpoint, text_encoder, vqvae):
            if name not in (SHIPPED_MODEL, AUTOMATIC, None):
                try:
                    host.find_file(name)
                except ValueError as error:
                    return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: str | None, text_encoder: str | None, vqvae: str | None, **_: Any
    ) -> str:
        if checkpoint is None or text_encoder is None or vqvae is None:
            return "a choice comes over a link: which one, its own node tells"
        try:
            places = _files_read(_files(checkpoint, text_encoder, vqvae))
            state = " ".join(f"{p}:{p.stat().st_mtime_ns}:{p.stat().st_size}" for p in places)
        except ValueError as error:
            state = str(error)
        # ComfyUI writes this into every saved picture: paths of the user's machine do not belong there.
        return hashlib.sha256(state.encode()).hexdigest()

    @classmethod
    def execute(
        cls, checkpoint: str, text_encoder: str, vqvae: str, precision: str, preset: str
    ) -> io.NodeOutput:
        from ..star_core.checkpoint import load_vqvae
        from ..star_core.stored import FileHeader, resolve_config
        from ..star_core.text_encoder import load_text_encoder

        name = preset_name(preset)
        config = resolve_config(FileHeader(checkpoint_path(checkpoint)), name)
        files = _files(checkpoint, text_encoder, vqvae)
        transformer = _transformer(files.star, name, precision)
        codec = load_vqvae(files.vqvae, config.vqvae, operations=host.operations(), dtype=host.vqvae_dtype())
        encoder = load_text_encoder(files.text_encoder, keep_halves=host.text_halves_stay())
        _check_width(config, encoder.width, files.text_encoder)
        codec_handle = sockets.VQVAEHandle(config.vqvae, host.vqvae_patcher(codec))
        return io.NodeOutput(
            sockets.ModelHandle(config, transformer, codec_handle),
            sockets.TextEncoderHandle(host.text_patcher(encoder)),
            codec_handle,
        )


def preset_name(choice: str) -> str | None:
    """Return the preset that a choice names, None where the file is to say it."""
    return None if choice in ("", FROM_FILE) else choice


def checkpoint_path(choice: str) -> Path:
    """Return the transformer's file of a choice. Raises ValueError for a missing or original one."""
    from ..star_core.model_files import SHIPPED, STAR_FILE

    return SHIPPED / STAR_FILE if choice == SHIPPED_MODEL else _converted(host.find_file(choice))


def _files(checkpoint: str, text_encoder: str, vqvae: str) -> Any:
    from ..star_core.model_files import find_files

    star = checkpoint_path(checkpoint)
    codec = None if vqvae == AUTOMATIC else _converted(host.find_file(vqvae))
    text = None if text_encoder == AUTOMATIC else host.find_file(text_encoder)
    files = find_files(star, vqvae=codec, text_encoder=text)
    _files_read(files)  # a missing one is told before gigabytes are read
    return files


def _files_read(files: Any) -> list[Path]:
    """Return all files that a model is made of. Raises ValueError where the text encoder lacks one."""
    from ..star_core.text_files import files_read, find_text_files

    return [files.star, files.vqvae, *files_read(*find_text_files(files.text_encoder, None))]


def _transformer(file: Path, preset: str | None, precision: str) -> Any:
    """Return transformer and causal sampler in a precision, wrapped for ComfyUI."""
    from ..star_core.checkpoint import load_networks
    from ..star_core.eight_bit import FORMATS, check_eight_bit

    eight_bit = precision if precision in FORMATS else None
    check_eight_bit(eight_bit, host.compute_device())
    dtype = host.transformer_dtype("auto" if eight_bit else precision, file.stat().st_size // 2)
    _, networks = load_networks(
        file, preset_name=preset, operations=host.operations(), dtype=dtype, eight_bit=eight_bit
    )
    return host.transformer_patcher(networks)


def _converted(path: Path) -> Path:
    """Refuse an original checkpoint, with the command that converts it."""
    if path.suffix.lower() not in ORIGINAL:
        return path
    from ..star_core.model_files import quoted

    out = path.parent / path.stem
    raise ValueError(
        f"{path.name} is an original PyTorch file, which is not opened here (a pickle can run code). Convert"
        f" it once, in the folder of this pack: python -m star_core convert {quoted(path)} --out {quoted(out)}"
        " (add --preset where it asks for one), then choose the .safetensors file"
    )


def _check_width(config: Any, width: int, place: Path) -> None:
    wanted = config.transformer.text_width
    if width != wanted:
        raise ValueError(
            f"{config.name} reads text states of width {wanted}, the text encoder at {place} gives {width}:"
            " choose the one that the checkpoint was trained with"
        )


def _of_kind(files: list[str], wanted: str) -> list[str]:
    """Return the files that may be of a kind; names tell it only where they follow the usual layout."""
    return [name for name in files if _kind(name) in (wanted, None)]


def _kind(name: str) -> str | None:
    path = PurePosixPath(name.replace("\\", "/").lower())
    if any("text_encoder" in part for part in path.parts):
        return "text encoder"
    if "vae" in path.stem:
        return "vqvae"
    return "star" if path.stem.startswith("star") else None
