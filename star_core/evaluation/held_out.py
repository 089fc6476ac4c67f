"""The real side of every measure: held-out pictures, their features, and the trained scorers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..training.captions import plain_caption
from ..training.emoji import EmojiSet
from .cache import stored
from .inception import FeatureFunction, Features, Pictures
from .rprecision import SCORER_SEEDS, Indices, Pool, Scorer, TextFunction, train_scorer

SPLITS = ("pairs", "concepts")
_FEWEST = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """N held-out records of one split: indices, captions, pictures (N, H, W, 3), features (N, D).

    `others` (N, D) are features of as many training pictures: the distance to them is what real
    pictures score against real pictures, their different subjects included.
    """

    split: str
    records: Indices
    captions: tuple[str, ...]
    pictures: Pictures
    features: Features
    others: Features


@dataclass(frozen=True)
class RealSide:
    """Everything that is measured against: the caption pool, the scorers and the held-out sets."""

    pool: Pool
    scorers: tuple[Scorer, ...]
    held_out: tuple[HeldOut, ...]


@dataclass(frozen=True)
class Extent:
    """How many pictures are looked at; None is all of them.

    `held_out` is per split, `training` what the scorers learn from and the real floor is drawn
    from. Records are taken in a random order that `seed` fixes, so a smaller extent is a part of a
    larger one.
    """

    held_out: int | None = None
    training: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse extents that no distance can be estimated from."""
        for name, count in (("held-out", self.held_out), ("training", self.training)):
            if count is not None and count < _FEWEST:
                raise ValueError(f"at least {_FEWEST} {name} pictures are needed, got {count}")

    def rows(self, emoji: EmojiSet, split: str) -> Indices:
        """Return the records of a split that are looked at."""
        count = self.training if split == "train" else self.held_out
        return np.random.default_rng(self.seed).permutation(emoji.indices(split))[:count]


def load_real_side(
    emoji: EmojiSet,
    *,
    features_of: FeatureFunction,
    embed: TextFunction,
    cache: Path,
    extent: Extent,
) -> RealSide:
    """Return the real side of a picture set, with the scorers trained.

    The first call computes the features of all pictures in the extent (two to four minutes for
    1,000 on two CPU cores) and of all captions; later ones read them from `cache`.
    """
    captions = [plain_caption(record) for record in emoji.records]
    pool = Pool(_caption_features(captions, embed, cache), _families(emoji))
    rows = {split: extent.rows(emoji, split) for split in (*SPLITS, "train")}
    features = {split: features_of(emoji.pictures[of]) for split, of in rows.items()}
    train, train_features = rows["train"], features["train"]
    if len(train) < (most := max(len(rows[split]) for split in SPLITS)):
        raise ValueError(
            f"{len(train)} training pictures for {most} held-out ones: the floor needs as many, give a larger"
            " --training-count, or a smaller --count"
        )
    _log.info("training %d scorers on %d pictures", len(SCORER_SEEDS), len(train))
    scorers = tuple(
        train_scorer(train_features, pool.caption_features[train], seed=seed) for seed in SCORER_SEEDS
    )
    held_out = (
        HeldOut(
            split=split,
            records=rows[split],
            captions=tuple(captions[row] for row in rows[split]),
            pictures=np.asarray(emoji.pictures[rows[split]]),
            features=features[split],
            others=train_features[: len(rows[split])],
        )
        for split in SPLITS
    )
    return RealSide(pool, scorers, tuple(held_out))


def _caption_features(captions: Sequence[str], embed: TextFunction, cache: Path) -> Features:
    """Return the (N, E) sentence embeddings of the captions, from the cache where they are."""
    key = hashlib.sha256("\n".join(captions).encode()).hexdigest()[:32]
    return stored(cache / "captions" / f"{key}.npy", lambda: embed(captions))


def _families(emoji: EmojiSet) -> Indices:
    """Return the (N,) number of each record's concept family."""
    concepts = [record.concept for record in emoji.records]
    return np.unique(concepts, return_inverse=True)[1].astype(np.int64)
