"""A text encoder's files: where they lie, the settings that they tell, their tensors by name.

Folders in Stable Diffusion's layout, as transformers writes them, or single weight files, local ones alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .key_tables import KeyTable
from .model_files import TEXT_FOLDER, TEXT_WEIGHTS
from .weights import TensorFile, read_pickle

# transformers 5 keeps the tensors of CLIPTextModel without the `text_model.` prefix that 4.x and every
# released file have. Both spellings are read; complaints use the second, which files carry.
_PARTS = ("embeddings", "encoder", "final_layer_norm")
TEXT_KEYS = KeyTable(
    pairs={f"{prefix}{part}.*": f"{part}.*" for prefix in ("", "text_model.") for part in _PARTS},
    dropped={
        **dict.fromkeys(
            ("embeddings.position_ids", "*.embeddings.position_ids"),
            "0, 1, 2 ..., which the module counts itself",
        ),
        "text_projection*": "CLIP's joint space: eta is the state before the projection",
        "logit_scale": "CLIP's contrastive temperature",
        "vision_model.*": "CLIP's picture tower",
        "visual_projection.*": "CLIP's picture tower",
    },
)

_ROWS = "embeddings.token_embedding.weight"
# Heads of 64 everywhere. The activation leaves no trace in a file: OpenAI's towers have the quick
# approximation, OpenCLIP's (SD 2.1's among them) the exact one.
_ACTIVATIONS = {512: "quick_gelu", 768: "quick_gelu", 1024: "gelu", 1280: "gelu"}
_HEAD_WIDTH = 64
TOKENIZER_FILES = ("vocab.json", "merges.txt")
_LETTERS = 2 * 256
"""Words that CLIP's byte pair encoding begins with: every byte, within a word and at its end."""


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (V, T) as int8 (V, T) and a float16 scale per row (V,), for `whole_rows` to undo."""
    # The scale is rounded to float16 first, upwards by an ulp at most, so that 127 steps always reach.
    largest = rows.float().abs().amax(dim=1).clamp_min(1e-4)
    scale = (largest / 127 * (1 + 2**-10)).half()
    steps = (rows.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return steps.to(torch.int8), scale


def whole_rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors with token rows in 8 bits (see `quantize_rows`) multiplied out to float32."""
    for name in (_ROWS, f"text_model.{_ROWS}"):
        if f"{name}.int8" in tensors and f"{name}.scale" in tensors:
            rows = tensors[f"{name}.int8"].float() * tensors[f"{name}.scale"].float()[:, None]
            halves = (f"{name}.int8", f"{name}.scale")
            return {name: rows, **{key: tensors[key] for key in tensors if key not in halves}}
    return tensors


def _weight_file(source: Path) -> Path:
    """Return the weight file that `source` means."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"{source}: no such file or folder")
    folder = source / TEXT_FOLDER if (source / TEXT_FOLDER).is_dir() else source
    for name in TEXT_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others.pop()
    names = ", ".join(path.name for path in others) or "none"
    raise ValueError(
        f"{folder}: no model.safetensors (other safetensors files: {names}). Name the weight file itself"
    )


def find_text_files(source: Path, tokenizer: Path | None) -> tuple[Path, Path]:
    """Return the weight file that `load_text_encoder` reads for these, and the tokenizer's folder.

    Raises ValueError where they are not there: before anything is read, or transformers waited for.
    """
    weights, words = _weight_file(source), _tokenizer_folder(source, tokenizer)
    check_tokenizer(words)
    return weights, words


def files_read(weights: Path, tokenizer: Path) -> list[Path]:
    """Return all files that a text encoder is made of: its weights, and what is read beside them."""
    read = [weights, _settings_file(weights), *(tokenizer / name for name in TOKENIZER_FILES)]
    return [path for path in read if path.is_file()]


def _settings_file(weights: Path) -> Path:
    return weights.parent / "config.json"


def _tokenizer_folder(source: Path, tokenizer: Path | None) -> Path:
    """Return the folder of vocab.json and merges.txt: the one given, or one in or beside `source`."""
    if tokenizer is not None:
        return tokenizer.parent if tokenizer.is_file() else tokenizer
    folder = source.parent if source.is_file() else source
    places = [folder / "tokenizer", folder, folder.parent / "tokenizer"]
    for place in places:
        if (place / "vocab.json").is_file():
            return place
    raise ValueError(
        f"{source}: no tokenizer found (looked for vocab.json in {', '.join(map(str, places))})."
        " Put the folder tokenizer/ with vocab.json and merges.txt there, or name its place (tokenizer)"
    )


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError where a tokenizer's files are not in its folder."""
    for name in TOKENIZER_FILES:
        # Without any merges there would be a tokenizer, of single letters.
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            raise ValueError(
                f"{folder}: no {name}, or nothing in it. It comes in the folder tokenizer/ of the model"
            )


def check_merges(folder: Path) -> None:
    """Raise ValueError, in a few words, where merges.txt does not make the words of its folder's vocab.json.

    It is cut off then, or a page that says why there is no file. transformers may take it, and read every
    prompt as other words. A tokenizer.json is read in place of both.
    """
    if (folder / "tokenizer.json").is_file():
        return
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if not isinstance(words, dict):
        raise ValueError("vocab.json holds no words with their numbers")
    head, _, merges = (folder / "merges.txt").read_text(encoding="utf-8").rstrip().partition("\n")
    if not head.startswith("#version"):
        # transformers 4 takes the first line for it, whatever is in there.
        raise ValueError("merges.txt does not begin with #version")
    made = sum(not _is_added(word) for word in words) - _LETTERS
    found = merges.count("\n") + bool(merges)
    if found < made:
        raise ValueError(f"{found} merges do not make {made} words")


def _is_added(word: str) -> bool:
    """Whether a word is made by no merges: the start and the end of a text, and added ones like <cat-toy>."""
    return word.startswith("<") and word.endswith(">") and not word.endswith("</w>")


def read_text_tensors(path: Path) -> Mapping[str, Tensor]:
    """Return the named tensors of a safetensors file or of a plain pickled state dict."""
    if path.suffix == ".safetensors":
        return TensorFile(path)
    content = read_pickle(path)
    if not isinstance(content, Mapping) or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(f"{path}: not a state dict of tensors. Give model.safetensors instead")
    return cast(Mapping[str, Tensor], content)


def text_settings(weights: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return the settings of the config.json beside the weights, else those that shapes tell."""
    path = _settings_file(weights)
    if not path.is_file():
        return infer_settings(tensors, source=str(weights))
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}). Download it again") from error
    # A whole CLIP model's configuration holds the text tower's as a part.
    if isinstance(settings, dict) and isinstance(settings.get("text_config"), dict):
        settings = settings["text_config"]
    if not isinstance(settings, dict) or settings.get("hidden_size") is None:
        raise ValueError(f"{path}: no hidden_size in it, so not a CLIP text model's configuration")
    for complaint in _complaints(relevant_settings(settings)):
        raise ValueError(f"{path}: {complaint}, as in no CLIP text model. Download it again")
    return settings


def _complaints(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with settings, in the order in which it can be said."""
    from transformers.activations import ACT2FN

    for name, value in settings.items():
        if name == "hidden_act":
            fits = isinstance(value, str) and value in ACT2FN
        elif name == "layer_norm_eps":
            fits = isinstance(value, float) and 0 < value < 1
        else:
            fits = type(value) is int and value >= (0 if name.endswith("_id") else 1)
        if not fits:
            yield f"{name} is {value!r}"
    width, heads = settings["hidden_size"], settings.get("num_attention_heads", 8)
    if width % heads:
        yield f"hidden_size {width} is not split by {heads} heads"


def infer_settings(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Return the settings that the shapes of a CLIP text model tell.

    Raises ValueError where the file is another model's, or its width is no known tower's.
    """
    bare = {name.removeprefix("text_model."): name for name in tensors}
    first = "encoder.layers.0.mlp.fc1.weight"
    rows = f"{_ROWS}.int8" if f"{_ROWS}.int8" in bare else _ROWS
    positions = "embeddings.position_embedding.weight"
    for name in (rows, positions, first):
        if name not in bare:
            raise ValueError(
                f"{source}: no tensor text_model.{name}, so not a CLIP text model in transformers' names"
            )
    vocabulary, width = tensors[bare[rows]].shape
    if width not in _ACTIVATIONS:
        raise ValueError(
            f"{source}: a text model of width {width}; the file does not say its activation. Put its"
            " config.json beside it"
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors[bare[first]].shape[0],
        "max_position_embeddings": tensors[bare[positions]].shape[0],
        "num_hidden_layers": len(set(_layers(bare))),
        "num_attention_heads": width // _HEAD_WIDTH,
        "hidden_act": _ACTIVATIONS[width],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _layers(names: Mapping[str, str]) -> Iterator[str]:
    """Yield the layer number of each name that has one."""
    for name in names:
        if name.startswith("encoder.layers."):
            yield name.split(".")[2]


def relevant_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that shape the computation, so that old and new versions read the same."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "bos_token_id",
        "eos_token_id",
    )
    # attention_dropout and the rest act in training alone; pad_token_id is the tokenizer's to say.
    return {name: settings[name] for name in names if settings.get(name) is not None}
