"""A sheet of numbered pictures for a reader who does not know the prompts, and its marking.

The 48 prompts are fixed in prompts.json, each with the names that count as right. The sheet shows
numbers only; the reader writes one line per picture, "7: a red apple", and the lines are marked by
`mark`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .inception import Pictures, check_pictures

PROMPTS_FILE = Path(__file__).with_name("prompts.json")

_COLUMNS = 8
_PICTURE = 128
_MARGIN = 12
_NUMBER = 22
_ARTICLES = frozenset({"a", "an", "the", "some"})


@dataclass(frozen=True)
class Prompt:
    """One prompt of the sheet: its text, its purpose, the names that count as right."""

    prompt: str
    kind: str
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse a prompt that no answer could be right for."""
        if not self.prompt.strip() or not any(_words(answer) for answer in self.answers):
            raise ValueError(f"prompt {self.prompt!r} needs a text and at least one answer")


def load_prompts(file: Path = PROMPTS_FILE) -> tuple[Prompt, ...]:
    """Return the prompts of a JSON list of {"prompt", "kind", "answers"}."""
    entries = json.loads(file.read_text(encoding="utf-8"))
    return tuple(Prompt(e["prompt"], e["kind"], tuple(e["answers"])) for e in entries)


def draw_sheet(pictures: Pictures) -> Image.Image:
    """Return one image of the pictures (N, H, W, 3), enlarged to 128 pixels, numbered from 1."""
    check_pictures(pictures)
    width, height = _PICTURE + _MARGIN, _PICTURE + _MARGIN + _NUMBER
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), "#dddddd")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_NUMBER - 4)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * width, _MARGIN + row * height
        enlarged = Image.fromarray(picture).resize((_PICTURE, _PICTURE), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (left, top))
        pen.text((left, top + _PICTURE), str(index + 1), fill="black", font=font)
    return sheet


def read_answers(text: str) -> dict[int, str]:
    """Return the answers by number from lines like "7: a red apple"; other lines are left out.

    Raises ValueError for a number that is answered twice.
    """
    answers: dict[int, str] = {}
    for number, answer in re.findall(r"^\s*(\d+)\s*[.:)]\s*(\S.*)$", text, flags=re.MULTILINE):
        if int(number) in answers:
            raise ValueError(f"picture {number} is answered twice; keep one answer")
        answers[int(number)] = answer.strip()
    return answers


def mark(answers: Mapping[int, str], prompts: Sequence[Prompt]) -> tuple[bool, ...]:
    """Return for each prompt whether it was named right; no answer is wrong.

    Right means that an accepted name stands in the first alternative of the answer, as whole words
    and whatever the number or article. Someone should still read the list: "not a cat" has a cat.
    """
    surplus = sorted(set(answers) - set(range(1, len(prompts) + 1)))
    if surplus:
        raise ValueError(f"there are {len(prompts)} pictures, but answers to {surplus}")
    return tuple(
        any(_contains(answers.get(number, ""), name) for name in prompt.answers)
        for number, prompt in enumerate(prompts, start=1)
    )


def _contains(answer: str, name: str) -> bool:
    """Return whether the words of `name` stand in a row in the first alternative of `answer`."""
    first = re.split(r"/|;|,|\(|\?|\bor\b", answer.lower())[0]
    words, wanted = _words(first), _words(name)
    starts = range(len(words) - len(wanted) + 1)
    return any(words[start : start + len(wanted)] == wanted for start in starts)


def _words(text: str) -> list[str]:
    """Return the lower-case words without articles and plural endings."""
    words = re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))
    return [_singular(word) for word in words if word not in _ARTICLES]


def _singular(word: str) -> str:
    """Return the word without its plural ending, roughly; used alike on answers and names."""
    for plural, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x")):
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
