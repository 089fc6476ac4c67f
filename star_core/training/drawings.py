"""Which drawings the emoji packages hold, what each one shows, and how one becomes pixels."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .captions import clean_text
from .packages import asset_path
from .splits import families

if TYPE_CHECKING:
    from PIL import Image

Pictures = npt.NDArray[np.uint8]

# Emojibase's groups. Components (2: skin tones and hair alone) and flags (9) are not used.
_GROUPS: Mapping[int, str] = {
    0: "smileys",
    1: "people",
    3: "animals and nature",
    4: "food and drink",
    5: "travel and places",
    6: "activities",
    7: "objects",
    8: "symbols",
}

# style -> (asset of the drawings, asset whose chars.json says which code has which name)
_SVG_STYLES: Mapping[str, tuple[str, str]] = {
    "Noto": ("noto", "noto"),
    "Noto blob": ("noto-v1", "noto"),
    "Twemoji": ("twemoji", "twemoji"),
    "Fluent": ("fluent-emoji", "fluent-emoji-flat"),
    "Fluent flat": ("fluent-emoji-flat", "fluent-emoji-flat"),
    "EmojiOne": ("emojione", "noto"),
    "Firefox": ("fxemoji", "noto"),
}
STYLES = (*_SVG_STYLES, "Fluent 3D")

# Drawings that their package files under a name of something else (an insect shown as bat and ball,
# glasses as a face that wears them), and one that is all but white: (style, code).
_MISNAMED = frozenset(
    {
        ("Noto blob", "1f997"),
        ("EmojiOne", "1f997"),
        ("EmojiOne", "1f199"),
        *(("Firefox", code) for code in ("1f48f", "1f576", "2328", "1f6a7", "1f3b2", "1fa9f")),
        ("Firefox", "1f32b"),
    }
)

# SVGs are drawn larger and scaled down: the renderer leaves the edges of masked and filtered shapes
# (Fluent is made of them) without antialiasing, which shows at 64 px.
_OVERSAMPLING = 2
_SMALLEST_RENDER = 256

_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
)


@dataclass(frozen=True)
class Emoji:
    """One emoji of the vocabulary, whatever its style."""

    code: str
    concept: str
    label: str
    tags: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Drawing:
    """A drawing to render: SVG text, or the path of a picture file."""

    emoji: Emoji
    style: str
    source: str | Path


def _normal_code(code: str) -> str:
    """Return code points in lower case without variation selectors, which packages set at will."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_vocabulary(emojibase: Path) -> dict[str, Emoji]:
    """Return the emoji in use by normalised code, in keyboard order, from emojibase's data.json."""
    entries = json.loads((emojibase / "data.json").read_text(encoding="utf-8"))
    entries = sorted((entry for entry in entries if entry.get("group") in _GROUPS), key=lambda e: e["order"])
    labels = {_normal_code(e["hexcode"]): clean_text(e["label"]) for e in entries}
    family = families(labels)
    vocabulary: dict[str, Emoji] = {}
    for entry, (code, label) in zip(entries, labels.items(), strict=True):
        tags = dict.fromkeys(clean_text(tag) for tag in entry.get("tags", ()))
        vocabulary[code] = Emoji(
            code,
            family[code],
            label,
            tuple(tag for tag in tags if _is_word(tag) and tag != label),
            _GROUPS[entry["group"]],
        )
    return vocabulary


def _is_word(tag: str) -> bool:
    """Say whether a tag can be read aloud: emojibase also lists "!!", "12:30" and "\u266a"."""
    return tag.isascii() and any(c.isalpha() for c in tag)


def find_drawings(vocabulary: Mapping[str, Emoji], packages: Path) -> Iterator[Drawing]:
    """Yield every drawing of a known emoji, style after style."""
    for style, (drawn, named) in _SVG_STYLES.items():
        icons = json.loads((asset_path(drawn, packages) / "icons.json").read_text("utf-8"))
        chars = json.loads((asset_path(named, packages) / "chars.json").read_text("utf-8"))
        for code, name in _icon_names(vocabulary, icons, chars).items():
            svg = _svg(icons, name)
            if svg is not None and (style, code) not in _MISNAMED:
                yield Drawing(vocabulary[code], style, svg)
    files = {_normal_code(f.stem): f for f in asset_path("fluent-emoji-3d", packages).glob("*.webp")}
    for code in vocabulary:
        if code in files:
            yield Drawing(vocabulary[code], "Fluent 3D", files[code])


def _icon_names(
    vocabulary: Mapping[str, Emoji], icons: Mapping[str, Any], chars: Mapping[str, str]
) -> dict[str, str]:
    """Return the icon of each code: by the table of codes, else by a name that spells the label."""
    known = {*icons["icons"], *icons.get("aliases", {})}
    by_code = {_normal_code(code): name for code, name in chars.items() if name in known}
    by_spelling = {_spelling(name): name for name in sorted(known)}
    names: dict[str, str] = {}
    for code, emoji in vocabulary.items():
        name = by_code.get(code) or by_spelling.get(_spelling(emoji.label))
        if name is not None:
            names[code] = name
    return names


def _spelling(name: str) -> str:
    """Return only the letters and digits: fxemoji writes "loveletter" for "love letter"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _svg(icons: Mapping[str, Any], name: str) -> str | None:
    """Return the SVG text of an icon, or None for an alias that turns or mirrors another."""
    alias = icons.get("aliases", {}).get(name)
    if alias is not None:
        return _svg(icons, alias["parent"]) if set(alias) == {"parent"} else None
    icon = icons["icons"][name]
    frame = {"width": icons.get("width", 16), "height": icons.get("height", 16)}
    frame |= {"left": 0, "top": 0}
    return _SVG.format(**{key: icon.get(key, value) for key, value in frame.items()}, body=icon["body"])


def require_renderer() -> None:
    """Raise ValueError with the remedy where the packages that draw are missing."""
    try:
        import PIL  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"drawing emoji needs {error.name}; install it with `pip install resvg_py pillow`"
        ) from error


def render(drawing: Drawing, size: int) -> Pictures:
    """Return the drawing on white, uint8 (size, size, 3)."""
    from PIL import Image

    picture = _open(drawing, size)
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    flat = canvas.convert("RGB")
    if side != size:
        flat = flat.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(flat, dtype=np.uint8)


def _open(drawing: Drawing, size: int) -> Image.Image:
    """Return the drawing as RGBA, larger than `size` pixels where it can be."""
    import resvg_py
    from PIL import Image

    if isinstance(drawing.source, Path):
        file = Image.open(drawing.source)
        with file:
            return file.convert("RGBA")
    try:
        png = resvg_py.svg_to_bytes(
            svg_string=drawing.source,
            width=max(_OVERSAMPLING * size, _SMALLEST_RENDER),
            skip_system_fonts=True,
        )
    except ValueError as error:
        raise ValueError(f"cannot draw {drawing.emoji.label} in {drawing.style}") from error
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
