"""The texts that the shipped text encoder learns from: what emoji are called, WordNet, and phrases.

A text here is content alone ("jet plane"); what people write around it is in `wording.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .captions import clean_text

# fmt: off
_ADJECTIVES = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey",
    "golden", "silver", "big", "small", "tiny", "huge", "old", "young", "new", "happy", "sad",
    "angry", "crying", "laughing", "smiling", "sleeping", "funny", "cute", "scary", "round",
    "square", "long", "short", "open", "closed", "broken", "shiny", "wooden", "metal", "hot",
    "cold", "flying", "running", "swimming", "wild", "baby",
)
# fmt: on
_JOINS = ("and", "with", "on", "in", "holding", "next to", "without", "for", "under", "wearing")

# WordNet's lexicographer files of nouns that have a look: animal, artifact, body, food, object, person,
# phenomenon, plant, shape, substance.
_PICTURABLE = frozenset({5, 6, 8, 13, 17, 18, 19, 20, 25, 27})
_PLAIN_WORD = re.compile(r"[a-z][a-z' -]*")


@dataclass(frozen=True)
class Contents:
    """The distinct contents of each kind; no text stands in two of them."""

    emoji: tuple[str, ...]
    vocabulary: tuple[str, ...]
    words: tuple[str, ...]
    phrases: tuple[str, ...]
    glosses: tuple[str, ...]


def gather(
    emojibase: Path,
    wordnet: Path,
    vocabulary: Sequence[str],
    *,
    words: int,
    phrases: int,
    glosses: int,
    seed: int,
) -> Contents:
    """Read the two packages and draw that many words, phrases and glosses with `seed`.

    `emojibase` holds data.json, `wordnet` is the folder dict, `vocabulary` the whole words that are one
    token each. Raises ValueError where a file is missing.
    """
    rng = np.random.default_rng(seed)
    names = emoji_names(emojibase)
    synsets = list(_synsets(wordnet))
    nouns = sorted({word for synset in synsets for word in synset.words})
    # "" is the unconditional prompt; it counts as an emoji's name so that it is always there.
    taken: set[str] = set()
    emoji = _unseen(["", *names, *_keyword_lists(emojibase, rng)], taken)
    known = _unseen([word for word in vocabulary if _PLAIN_WORD.fullmatch(word)], taken)
    things = _chosen(_unseen(nouns, taken), words, rng)
    joined = _unseen(_phrases(names, nouns, phrases, rng), taken)
    told = _chosen(_unseen([s.gloss for s in synsets if s.gloss], taken), glosses, rng)
    return Contents(emoji, known, things, joined, told)


def _chosen(texts: Sequence[str], count: int, rng: np.random.Generator) -> tuple[str, ...]:
    """Return `count` of the texts (all of them if they are fewer), drawn without replacement."""
    return tuple(texts[index] for index in rng.permutation(len(texts))[:count])


def emoji_names(emojibase: Path) -> list[str]:
    """Return every label and keyword of emojibase, once each."""
    found: dict[str, None] = {}
    for record in _emoji_records(emojibase):
        for text in _called(record):
            found[text] = None
    return list(found)


def _emoji_records(emojibase: Path) -> list[dict[str, object]]:
    path = emojibase / "data.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. The asset `emojibase` holds it")
    records: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def _called(record: dict[str, object]) -> list[str]:
    """Return the label and the keywords of a record, spelled as captions spell them."""
    tags = record.get("tags", ())
    assert isinstance(tags, list | tuple), "emojibase's tags are a list"
    return [clean_text(str(text)) for text in (record["label"], *tags)]


def _keyword_lists(emojibase: Path, rng: np.random.Generator) -> Iterator[str]:
    """Yield lists as captions have them: label and keywords, or keywords alone, in any order."""
    for record in _emoji_records(emojibase):
        label, *tags = _called(record)
        for _ in range(4):
            count = min(int(rng.integers(1, 5)), len(tags))
            parts = [tags[index] for index in rng.permutation(len(tags))[:count]]
            if rng.random() < 0.75:
                parts.insert(int(rng.integers(len(parts) + 1)) if rng.random() < 0.5 else 0, label)
            yield (", " if rng.random() < 0.7 else " ").join(parts)


@dataclass(frozen=True)
class _Synset:
    words: tuple[str, ...]
    gloss: str


def _synsets(wordnet: Path) -> Iterator[_Synset]:
    """Yield WordNet's picturable nouns (format: wndb(5WN)): lower-case words, a short gloss or none."""
    path = wordnet / "data.noun"
    if not path.is_file():
        raise ValueError(f"{path}: no such file. The asset `wordnet` holds it")
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence at the head of the file
        fields, _, gloss = line.partition(" | ")
        parts = fields.split(" ")
        if int(parts[1]) in _PICTURABLE:
            spelled = (parts[4 + 2 * index] for index in range(int(parts[3], 16)))
            words = (word.replace("_", " ") for word in spelled)
            yield _Synset(tuple(w for w in words if _PLAIN_WORD.fullmatch(w)), _short(gloss))


def _short(gloss: str) -> str:
    """Return a gloss's first clause if it is a short one, else nothing."""
    clause = re.split(r"[;:(]|, ", gloss)[0].strip()
    return clause if 2 <= len(clause.split()) <= 9 else ""


def _phrases(names: list[str], nouns: list[str], count: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield `count` phrases of two things, or of a thing and one or two adjectives."""
    short = [name for name in names if len(name.split()) <= 2]

    def thing() -> str:
        source = short if rng.random() < 0.6 else nouns
        return source[int(rng.integers(len(source)))]

    for _ in range(count):
        kind = rng.random()
        adjective = _ADJECTIVES[int(rng.integers(len(_ADJECTIVES)))]
        if kind < 0.6:
            yield f"{adjective} {thing()}"
        elif kind < 0.7:
            other = _ADJECTIVES[int(rng.integers(len(_ADJECTIVES)))]
            yield f"{other} {adjective} {thing()}"
        else:
            yield f"{thing()} {_JOINS[int(rng.integers(len(_JOINS)))]} {thing()}"


def _unseen(texts: Iterator[str] | list[str], taken: set[str]) -> tuple[str, ...]:
    """Return the texts that are not in `taken` yet, once each, and note them there."""
    found = [text for text in dict.fromkeys(texts) if text not in taken]
    taken.update(found)
    return tuple(found)
