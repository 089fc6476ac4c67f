"""Pictures as files: tensors to images, PNG with the recipe that draws it again, strips of scales."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

RECIPE_KEY = "star"
STRIP_GAP = 4
DTYPES = ("float32", "bfloat16", "float16")
EIGHT_BIT = ("int8", "fp8", None)
LARGEST = 2**64 - 1
"""The largest seed, and index."""
LONGEST_SIDE = 99_999


@dataclass(frozen=True)
class Recipe:
    """What one picture was drawn from; the same recipe on the same checkpoint draws it again.

    `size` is (height, width) in pixels; `schedule` the text form; `model` the checkpoint's own name; `dtype`,
    `eight_bit`, `graphs` and `packed` how it was loaded. 8-bit products, and pictures by them, differ by kind
    of device. It does not hold which others were drawn with the picture: in float32 they do not matter; in
    other formats they move last bits, and drawn again alone the picture is a near one.
    """

    prompt: str
    negative: str
    seed: int
    index: int
    schedule: str
    size: tuple[int, int]
    model: str
    dtype: str = "float32"
    eight_bit: str | None = None
    graphs: bool = False
    packed: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Read `to_json`'s text. Raises ValueError naming the field, and its value, where it is none."""
        try:
            return Recipe(**_checked(_parsed(text)))
        except RecursionError as error:
            raise ValueError(f"not a recipe of a picture (nested too deep): {text!r:.80}") from error


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a recipe of a picture ({error!s:.120}): {text!r:.80}") from error


def _checked(record: object) -> dict[str, Any]:
    """Return a recipe's fields as read from JSON. Raises ValueError for one that is wrong, odd or missing."""
    if not isinstance(record, dict):
        raise ValueError(f"not a recipe of a picture: {record!r:.80}")
    for name, value in record.items():
        if name not in _FIELDS:
            raise ValueError(f"the recipe says {name!r:.40}, which this version does not know")
        kind, fits = _FIELDS[name]
        if not fits(value):
            raise ValueError(f"the recipe says {name} {value!r:.80}, which is not {kind}")
    for field in dataclasses.fields(Recipe):
        if field.name not in record and field.default is dataclasses.MISSING:
            raise ValueError(f"the recipe says no {field.name}")
    fields = {**record, "size": tuple(record["size"])}
    # Older pictures say whether their weights were bytes, there was no other kind.
    if fields.pop("int8", False):
        fields["eight_bit"] = "int8"
    return fields


def is_text(value: object) -> bool:
    """Whether a value is a text that UTF-8 can hold: not so the bytes of a command line that are no UTF-8."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: object) -> bool:
    return _is_whole(value, 0, LARGEST)


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(v, 1, LONGEST_SIDE) for v in value)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


_FIELDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("prompt", "negative", "schedule", "model"), ("a text", is_text)),
    **dict.fromkeys(("seed", "index"), (f"a whole number from 0 to {LARGEST}", _is_number)),
    "size": (f"[height, width] in pixels, each a whole number from 1 to {LONGEST_SIDE}", _is_size),
    "dtype": (f"one of {', '.join(DTYPES)}", lambda value: value in DTYPES),
    "eight_bit": ("int8, fp8 or null", lambda value: value in EIGHT_BIT),
    **dict.fromkeys(("graphs", "packed", "int8"), ("true or false", _is_flag)),
}
"""What a recipe's JSON may hold: for each field what it is, and whether a value is that."""


def to_images(pictures: Tensor) -> list[Image.Image]:
    """Return pictures (B, 3, H, W) in [0, 1] as 8-bit images, rounded to the nearest level."""
    levels = pictures.detach().float().clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in levels]


def from_image(image: Image.Image) -> Tensor:
    """Return an image as a picture (1, 3, H, W) in [0, 1]; transparency is laid on white."""
    whole = image.convert("RGBA")
    white = Image.new("RGBA", whole.size, (255, 255, 255, 255))
    levels = np.asarray(Image.alpha_composite(white, whole).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(levels / 255).permute(2, 0, 1).unsqueeze(0)


def make_folder(folder: Path) -> None:
    """Make a folder of pictures. Raises ValueError where it cannot be had: before hours of drawing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: can be no folder for pictures ({error.strerror})") from error


def save_png(image: Image.Image, path: Path, recipe: Recipe | None = None) -> None:
    """Write a PNG that carries its recipe, where it has one. Raises ValueError where it cannot be written."""
    info = PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, recipe.to_json())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it first: a picture that was there stays until the new one is whole.
        part = path.with_name(f"{path.name}.part")
        image.save(part, format="PNG", pnginfo=info)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a PNG that `save_png` wrote.

    Raises ValueError naming the file where there is none, and what is wrong in one that is damaged.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(RECIPE_KEY)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a picture that can be opened ({error})") from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: carries no recipe; only a PNG that `sample` wrote does")
    try:
        return Recipe.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """Return images of one size side by side on white, as one image."""
    width, height = images[0].size
    whole = Image.new("RGB", (len(images) * (width + STRIP_GAP) - STRIP_GAP, height), "white")
    for place, image in enumerate(images):
        whole.paste(image, (place * (width + STRIP_GAP), 0))
    return whole
