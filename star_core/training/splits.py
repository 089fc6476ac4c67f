"""Which emoji belong together, and which pictures are kept away from training.

A family is one idea in all its variants: person, man and woman running, whichever way they face.
The unit that is held out is a family in one style group; styles that show the same drawing in
another finish form one group. So a held-out picture never has a near twin among the training ones.

The lists of held-out families live in heldout.json beside this file and do not change with the
data; `draw_heldout` is how they were drawn.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

SPLITS = ("train", "pairs", "concepts")

_HELDOUT_FILE = Path(__file__).with_name("heldout.json")

# Fluent, Fluent flat and Fluent 3D are one drawing in three finishes.
_STYLE_GROUPS = {"Fluent flat": "Fluent", "Fluent 3D": "Fluent"}

_ADULTS = {"1f468", "1f469", "1f9d1"}
_CHILDREN = {"1f466", "1f467", "1f9d2"}
_HAIR = {"1f9b0", "1f9b1", "1f9b2", "1f9b3"}
_GENDER_SIGNS = {"2640", "2642"}
_FACING_RIGHT = {"27a1"}

# Variants that Unicode encodes as separate characters, so that no code structure links them.
_SAME_FAMILY: tuple[frozenset[str], ...] = (
    frozenset({*_ADULTS, "1f9d4", "1f471", "person-hair"}),
    frozenset({"1f9d3", "1f474", "1f475"}),
    frozenset({*_CHILDREN, "1f476"}),
    frozenset({"1f934", "1f478", "1fac5"}),
    frozenset({"1f385", "1f936", "person-1f384"}),
    frozenset({"1f483", "1f57a"}),
    frozenset({"1f930", "1fac3", "1fac4"}),
    frozenset({"1f931", "person-1f37c"}),
    frozenset({"1f46b", "1f46c", "1f46d", "person-1f91d"}),
    frozenset({"1f48f", "1f491", "person-2764"}),
    frozenset({"1f46a", "person-child"}),
)

# Drawings that at least one style repeats, or mirrors, almost pixel for pixel under another code
# (mean difference below 2 of 255 at 16 x 16 pixels). Colour variants, such as hearts and books, are
# different ideas and stay apart.
_NEAR_TWINS: tuple[frozenset[str], ...] = (
    frozenset({"1f431", *(f"1f6{n:x}" for n in range(0x38, 0x41))}),  # cat faces
    frozenset({"1f62f", "1f632", "1f626", "1f627", "1f636", "1f610", "1f615", "1fae4"}),
    frozenset({"1f61b", "1f61c", "1f61d"}),
    frozenset({"1f642", "1f643"}),
    frozenset({"1f608", "1f47f"}),
    frozenset({"1f64d", "1f64e"}),
    frozenset({"1f91a", "270b"}),
    frozenset({"1f4ac", "1f5e8"}),
    frozenset({"2603", "26c4"}),
    frozenset({"1f30d", "1f30e", "1f30f"}),
    frozenset({"1f311", "26ab"}),
    frozenset({"1f315", "1f7e1"}),
    frozenset({"1f3d6", "26f1"}),
    frozenset({"2712", "1f58b"}),
    frozenset({"1f512", "1f513"}),
    frozenset({"1f507", "1f508", "1f509", "1f50a"}),
    frozenset({"1f4b4", "1f4b5", "1f4b6", "1f4b7"}),
    frozenset({"2721", "1f52f"}),
    frozenset({"25fc", "1f532", "1f533"}),
    frozenset({"25b6", "25c0"}),
    frozenset({"23e9", "23ea"}),
    frozenset({"23ed", "23ee"}),
)

_TURNED = re.compile(r"\b(?:left|right|up|down)(?:wards?)?\b|\b(?:waxing|waning|first|last)\b")
_RESIZED = re.compile(r"\b(?:large|medium|medium-small|small)\b(?=.* (?:square|diamond)$)")
_CLOCK_FACE = re.compile(r"o.clock$|-thirty$")


@dataclass(frozen=True)
class Heldout:
    """The held-out families: everywhere (`concepts`), or in one style group (`pairs`)."""

    concepts: frozenset[str]
    pairs: Mapping[str, frozenset[str]]

    def split(self, concept: str, style: str) -> str:
        """Return the split of a picture of the family `concept` in `style`: one of SPLITS."""
        if concept in self.concepts:
            return "concepts"
        if concept in self.pairs.get(style_group(style), frozenset()):
            return "pairs"
        return "train"


@lru_cache(maxsize=1)
def heldout() -> Heldout:
    """Return the committed held-out list."""
    return parse_heldout(_HELDOUT_FILE.read_text(encoding="utf-8"))


def parse_heldout(text: str) -> Heldout:
    """Return the held-out list written as JSON: {"concepts": [...], "pairs": {group: [...]}}."""
    listed = json.loads(text)
    pairs = {group: frozenset(families) for group, families in listed["pairs"].items()}
    return Heldout(frozenset(listed["concepts"]), pairs)


def format_heldout(held: Heldout) -> str:
    """Return `held` as JSON text, sorted, one list per line."""
    rows = [f'"concepts": {json.dumps(sorted(held.concepts))}']
    groups = [f"  {json.dumps(g)}: {json.dumps(sorted(held.pairs[g]))}" for g in sorted(held.pairs)]
    rows.append('"pairs": {\n' + ",\n".join(groups) + "\n}")
    return "{\n" + ",\n".join(rows) + "\n}\n"


def style_group(style: str) -> str:
    """Return the group of styles that share their drawings with `style`."""
    return _STYLE_GROUPS.get(style, style)


def families(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the family of each emoji; a family is called by the label of its first member.

    `labels` maps normalised codes ("1f3c3-200d-2642") to clean labels, in their usual order.
    """
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    for same in (*_SAME_FAMILY, *_NEAR_TWINS):
        first, *others = sorted(same)
        for other in others:
            parents[root(other)] = root(first)
    for code, label in labels.items():
        parents[root(_structure(code))] = root(_drawing(label))
    names: dict[str, str] = {}
    return {code: names.setdefault(root(_structure(code)), label) for code, label in labels.items()}


def _structure(code: str) -> str:
    """Return what is left of a code when gender, hair and direction are taken out of it."""
    parts = code.split("-200d-")
    rest = [p for p in parts[1:] if p not in _GENDER_SIGNS | _FACING_RIGHT]
    if parts[0] not in _ADULTS | _CHILDREN or not rest:
        # A sequence is a variant of its first emoji: black cat, polar bear, phoenix (a bird).
        return parts[0]
    if any(p in _CHILDREN for p in rest):
        return "person-child"
    if any(p in _HAIR for p in rest):
        return "person-hair"
    return f"person-{rest.pop(0)}"


def _drawing(label: str) -> str:
    """Return a label without the words that only mirror, turn or resize the drawing."""
    if _CLOCK_FACE.search(label):
        return "label:clock face"
    for words in (_TURNED, _RESIZED):
        label = words.sub("", label)
    return "label:" + re.sub(r"[\s-]+", " ", label).strip()


def draw_heldout(
    pictures: Iterable[tuple[str, str]],
    *,
    seed: int,
    concept_pictures: int = 560,
    pair_pictures: int = 600,
    largest_family: int = 40,
) -> Heldout:
    """Draw the held-out list from the (concept, style) of every picture.

    Families are taken in a random order: whole ones until `concept_pictures` are held out, then one
    style group of each further one until `pair_pictures` are. A family held out in one style group
    is still shown by another that is not Fluent; families of more than `largest_family` pictures
    would fill a split with one idea and stay in training.
    """
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for concept, style in pictures:
        sizes[concept][style_group(style)] += 1
    rng = np.random.default_rng(seed)
    usable = sorted(c for c, groups in sizes.items() if sum(groups.values()) <= largest_family)
    order = [usable[i] for i in rng.permutation(len(usable))]
    concepts: set[str] = set()
    pairs: dict[str, set[str]] = defaultdict(set)
    wanted = concept_pictures
    while order and wanted > 0:
        concept = order.pop()
        concepts.add(concept)
        wanted -= sum(sizes[concept].values())
    wanted = pair_pictures
    while order and wanted > 0:
        concept = order.pop()
        groups = sorted(sizes[concept])
        chosen = groups[int(rng.integers(len(groups)))]
        if set(groups) - {chosen, "Fluent"}:
            pairs[chosen].add(concept)
            wanted -= sizes[concept][chosen]
    return Heldout(frozenset(concepts), {group: frozenset(c) for group, c in pairs.items()})
