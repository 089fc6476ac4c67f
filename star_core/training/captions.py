"""The texts that go with a picture: clean labels and tags, the plain caption, random rewordings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .emoji import Record

_REWRITES = (
    (re.compile(r"^(man|woman|person): bald$"), r"bald \1"),
    (re.compile(r"^(man|woman|person): (?!facing)"), r"\1 with "),
    (re.compile(r": facing right$"), " facing right"),
    (re.compile(r"^keycap: \*$"), "keycap asterisk"),
    (re.compile(r"^keycap: #$"), "keycap hash"),
    (re.compile(r"^keycap: "), "keycap "),
    (re.compile(r": "), ", "),
    (re.compile(r"\("), ""),
    (re.compile(r"\)"), ""),
    (re.compile(r"\s+"), " "),
)

_STYLED: tuple[Callable[[str, str], str], ...] = (
    lambda style, subject: f"{style} emoji of {subject}",
    lambda style, subject: f"{style} emoji of {with_article(subject)}",
    lambda style, subject: f"{subject}, {style} emoji",
    lambda style, subject: f"{style} {subject}",
    lambda style, subject: f"{with_article(subject)} in {style} style",
)
_STYLED_WEIGHTS = np.array([0.4, 0.15, 0.2, 0.15, 0.1])

_UNSTYLED: tuple[Callable[[str], str], ...] = (
    lambda subject: subject,
    lambda subject: with_article(subject),
    lambda subject: f"{subject} emoji",
    lambda subject: f"an emoji of {with_article(subject)}",
    lambda subject: f"a picture of {with_article(subject)}",
)
_UNSTYLED_WEIGHTS = np.array([0.5, 0.2, 0.1, 0.1, 0.1])

_STYLE_SHARE = 0.55
_LABEL_SHARE = 0.72
_EXTRA_TAGS_SHARE = 0.25


def clean_text(text: str) -> str:
    """Return a CLDR label or tag in lower-case ASCII, without colons, brackets or curly quotes."""
    text = text.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "")
    decomposed = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in decomposed if not unicodedata.combining(c)).lower()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def with_article(subject: str) -> str:
    """Return `subject` after "a" or "an", or as it is where it looks like a plural or a list."""
    if (subject.endswith("s") and not subject.endswith("ss")) or "," in subject:
        return subject
    return f"{'an' if subject[:1] in 'aeiou' else 'a'} {subject}"


def plain_caption(record: Record) -> str:
    """Return the caption that evaluation uses: "<style> emoji of <label>"."""
    return f"{record.style} emoji of {record.label}"


def random_caption(record: Record, rng: np.random.Generator) -> str:
    """Return one of the many texts that describe the picture of `record`.

    About half name the style and seven in ten the label; the others go by a tag or two.
    """
    subject = _random_subject(record, rng)
    if rng.random() < _STYLE_SHARE:
        form = _STYLED[int(rng.choice(len(_STYLED), p=_STYLED_WEIGHTS))]
        return form(record.style, subject)
    return _UNSTYLED[int(rng.choice(len(_UNSTYLED), p=_UNSTYLED_WEIGHTS))](subject)


def _random_subject(record: Record, rng: np.random.Generator) -> str:
    """Return the label, the label and one or two tags, or one or two tags."""
    tags = [record.tags[i] for i in rng.permutation(len(record.tags))[: int(rng.integers(1, 3))]]
    if not tags or rng.random() < _LABEL_SHARE - _EXTRA_TAGS_SHARE:
        return record.label
    if rng.random() < _EXTRA_TAGS_SHARE / (1 - _LABEL_SHARE + _EXTRA_TAGS_SHARE):
        return ", ".join([record.label, *tags])
    return ", ".join(tags)
