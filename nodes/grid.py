"""Labelled Grid: pictures side by side with a line of text under each."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import TYPE_CHECKING, Any

from comfy_api.v0_0_2 import io

from . import host, sockets

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

log = logging.getLogger(__name__)

WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "YuGothM.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "arial.ttf",
)
NO_LETTER = "\U0010ffff"
GAP = 8
LINE = 1.4
"""Height of a line of text relative to its size."""


class StarLabelledGrid(io.ComfyNode):
    """Lays out pictures; no model has a part in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StarLabelledGrid",
            display_name="Labelled Grid",
            category=sockets.CATEGORY,
            description="Lays a batch of pictures out in a grid, each with its label under it.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures, row by row. At least one."),
                io.String.Input(
                    "labels",
                    multiline=True,
                    default="",
                    tooltip=(
                        "One line per picture, in order. Missing lines leave a picture without a label; more"
                        " lines than pictures are refused. Long labels are broken into lines."
                    ),
                ),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many pictures stand in a row. 0 makes the grid nearly square.",
                ),
            ],
            outputs=[io.Image.Output("IMAGE", display_name="image", tooltip="The whole grid as one image.")],
            **host.newer(io.Schema, search_aliases=["image grid", "contact sheet", "compare", "xy plot"]),
        )

    @classmethod
    def execute(cls, images: Tensor, labels: str, columns: int) -> io.NodeOutput:
        from ..star_core.pictures import from_image, to_images

        lines = labels.rstrip("\n").split("\n")
        if columns < 0:
            raise ValueError(f"columns is {columns}: give how many pictures stand in a row, or 0")
        if len(lines) > len(images):
            raise ValueError(f"{len(lines)} labels for {len(images)} pictures: write one line per picture")
        pictures = to_images(images[..., :3].movedim(-1, 1))
        texts = [*lines, *[""] * (len(pictures) - len(lines))]
        grid = from_image(lay_out(pictures, texts, columns or math.ceil(math.sqrt(len(pictures)))))
        return io.NodeOutput(grid.movedim(1, -1).to(host.picture_device()))


def lay_out(pictures: list[Image], labels: list[str], columns: int) -> Image:
    """Return pictures of one size in rows on white, each label under its picture."""
    import PIL.Image
    from PIL import ImageDraw

    width, height = pictures[0].size
    size = max(11, min(28, width // 14))
    font = _font("".join(labels), size)
    broken = [_broken(label, font, width) for label in labels]
    band = math.ceil(max(len(lines) for lines in broken) * size * LINE)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    whole = PIL.Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + band + GAP) + GAP), "white")
    draw = ImageDraw.Draw(whole)
    for place, (picture, lines) in enumerate(zip(pictures, broken, strict=True)):
        left = GAP + (place % columns) * (width + GAP)
        top = GAP + (place // columns) * (height + band + GAP)
        whole.paste(picture, (left, top))
        for line, text in enumerate(lines):
            draw.text((left, top + height + line * size * LINE), text, fill="black", font=font)
    return whole


def _font(text: str, size: int) -> object:
    """Return PIL's own font, or where it lacks letters the system's usual one that lacks the fewest."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    lacking = _lacking(text, font)
    for name in WIDE_FONTS:
        if not lacking:
            break
        with contextlib.suppress(OSError):
            other = ImageFont.truetype(name, size)
            if len(less := _lacking(text, other)) < len(lacking):
                font, lacking = other, less
    if lacking:
        letters, fonts = "".join(sorted(lacking)), ", ".join(WIDE_FONTS)
        log.warning(
            "Labelled Grid: boxes stand for %.40s: none of these fonts is here and has all: %s", letters, fonts
        )
    return font


def _lacking(text: str, font: Any) -> set[str]:
    """Return the letters beyond ASCII that a font draws as it draws what is no letter at all."""
    nothing = bytes(font.getmask(NO_LETTER))
    wide = {letter for letter in text if not letter.isascii() and letter.isprintable()}
    return {letter for letter in wide if bytes(font.getmask(letter)) == nothing}


def _broken(label: str, font: object, width: int) -> list[str]:
    """Return a label as lines that fit a width, broken between words, and within a word that is wider."""
    lines: list[str] = []
    for word in label.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _length(longer, font) <= width:
            lines[-1] = longer
        else:
            lines += _pieces(word, font, width)
    return lines


def _pieces(word: str, font: object, width: int) -> list[str]:
    """Return a word in pieces that fit a width, of one letter at least: Chinese is written without spaces."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and _length(pieces[-1] + letter, font) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _length(text: str, font: object) -> float:
    length: float = font.getlength(text)  # type: ignore[attr-defined]  # PIL's fonts share no base class
    return length
