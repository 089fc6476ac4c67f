"""What people write around a content: "Fluent 3D emoji of ...", "a photo of a ...".

Drawn anew at every training step. The teacher embeds the content alone, the style is learnt apart, and the
rest of the wording should change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .bpe import END_ID, MAX_TOKENS, START_ID

# The styles of `drawings.py`. Their order decides what a seed draws, and so the shipped weights.
STYLES = (
    "Noto",
    "Noto blob",
    "Twemoji",
    "Fluent",
    "Fluent flat",
    "Fluent 3D",
    "EmojiOne",
    "Firefox",
)


@dataclass(frozen=True)
class Template:
    """Wording around a content; `{style}` stands where a style's name goes, if it names one."""

    before: str
    after: str = ""


# The first of each kind is the commonest, see `Wording.draw`.
STYLED = (
    Template("{style} emoji of"),
    Template("{style} emoji of a"),
    Template("a {style} emoji of"),
    Template("{style}"),
    Template("", ", {style} emoji"),
    Template("{style} emoji ,"),
    Template("{style} style"),
    Template("", "emoji , {style}"),
    Template("", ", {style}"),
    Template("", ", {style} style"),
    Template("", "in {style} style"),
    Template("a", "in {style} style"),
    Template("an emoji of", "in {style} style"),
    Template("", "{style} emoji"),
    Template("", "emoji {style}"),
)
PLAIN = (
    Template(""),
    Template("emoji of"),
    Template("", "emoji"),
    Template("a"),
    Template("an"),
    Template("the"),
    Template("an emoji of"),
    Template("an emoji of a"),
    Template("a photo of"),
    Template("a photo of a"),
    Template("a picture of"),
    Template("a picture of a"),
    Template("an image of"),
    Template("a drawing of a"),
    Template("an icon of"),
    Template("a cute"),
    Template("", "icon"),
    Template("", "picture"),
    Template("draw a"),
)
NO_STYLE = len(STYLES)


class Wording:
    """Wraps contents into templates, on token ids: CLIP's tokens never cross a space."""

    def __init__(self, tokenizer: Any) -> None:
        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text)["input_ids"][1:-1])

        def both(template: Template, style: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
            before = ids(template.before.format(style=style))
            return before, ids(template.after.format(style=style))

        self.styled = [[both(template, style) for template in STYLED] for style in STYLES]
        self.plain = [both(template, "") for template in PLAIN]

    def draw(self, content: tuple[int, ...], rng: np.random.Generator) -> tuple[list[int], int]:
        """Return the ids of the content in some wording, and the index of the style it names."""
        style = int(rng.integers(len(STYLES))) if content and rng.random() < 0.5 else NO_STYLE
        choices = self.plain if style == NO_STYLE else self.styled[style]
        # The empty prompt stays empty; the bare forms are the commonest among the others too.
        common = not content or rng.random() < 0.4
        before, after = choices[0 if common else int(rng.integers(len(choices)))]
        return [START_ID, *before, *content, *after][: MAX_TOKENS - 1] + [END_ID], style
