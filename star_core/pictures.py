"""Pictures as files: tensors to images, PNG with the recipe that draws it again, strips of scales."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

RECIPE_KEY = "star"
STRIP_GAP = 4
DTYPES = ("float32", "bfloat16", "float16")
EIGHT_BIT = ("int8", "fp8", None)


@dataclass(frozen=True)
class Recipe:
    """What one picture was drawn from; the same recipe on the same checkpoint draws it again.

    `size` is (height, width) in pixels; `schedule` the text form; `model` the checkpoint's own name; `dtype`,
    `eight_bit`, `graphs` and `packed` how it was loaded. 8-bit products, and pictures by them, differ by kind
    of device.
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
        """Read `to_json`'s text. Raises ValueError where it is none."""
        try:
            record = json.loads(text)
            height, width = record.pop("size")
            # Older pictures say whether their weights were bytes, there was no other kind.
            if record.pop("int8", False):
                record["eight_bit"] = "int8"
            recipe = Recipe(size=(int(height), int(width)), **record)
            known = recipe.dtype in DTYPES and recipe.eight_bit in EIGHT_BIT
            if not known or not all(isinstance(said, bool) for said in (recipe.graphs, recipe.packed)):
                raise ValueError(
                    f"dtype {recipe.dtype!r}, eight_bit {recipe.eight_bit!r}, graphs {recipe.graphs!r},"
                    f" packed {recipe.packed!r}"
                )
            return recipe
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a recipe of a picture ({error!s:.120}): {text:.120}") from error


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


def save_png(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write a PNG that carries its recipe. Raises ValueError where the folder cannot be written."""
    info = PngInfo()
    info.add_itxt(RECIPE_KEY, recipe.to_json())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG", pnginfo=info)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of a PNG that `save_png` wrote. Raises ValueError where there is none."""
    try:
        with Image.open(path) as image:
            text = image.info.get(RECIPE_KEY)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: not a picture that can be opened ({error})") from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: carries no recipe; only a PNG that `sample` wrote does")
    return Recipe.from_json(text)


def strip(images: Sequence[Image.Image]) -> Image.Image:
    """Return images of one size side by side on white, as one image."""
    width, height = images[0].size
    whole = Image.new("RGB", (len(images) * (width + STRIP_GAP) - STRIP_GAP, height), "white")
    for place, image in enumerate(images):
        whole.paste(image, (place * (width + STRIP_GAP), 0))
    return whole
