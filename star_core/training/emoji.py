"""The training pictures: emoji in eight styles, drawn at one size on white, with their records.

`build` renders the pinned packages into a folder once; `EmojiSet.load` opens that folder. Skin
tones are left out, because captions would hardly tell them apart at this size, and so are flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .drawings import (
    STYLES,
    Emoji,
    Pictures,
    find_drawings,
    read_vocabulary,
    render,
    require_renderer,
)
from .options import at_least
from .packages import asset_path
from .splits import SPLITS, Heldout, heldout

SMALLEST = 8
"""Pixels of a side that a picture is drawn with at least."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What is known of one picture; `index` is its row in `EmojiSet.pictures`.

    `code` is the emoji's code points ("1f3c3-200d-2642"), `concept` its family, `group` the part of
    the emoji keyboard it is from, `split` one of "train", "pairs", "concepts".
    """

    index: int
    style: str
    code: str
    concept: str
    label: str
    tags: tuple[str, ...]
    group: str
    split: str


@dataclass(frozen=True)
class EmojiSet:
    """Pictures, uint8 (N, size, size, 3), and one record for each."""

    pictures: Pictures
    records: tuple[Record, ...]

    @classmethod
    def load(cls, folder: Path, size: int) -> EmojiSet:
        """Open what `build(folder, size)` wrote; the pictures stay on disk until they are read."""
        pictures_file, records_file = _files(folder, size)
        if not records_file.is_file():
            raise ValueError(
                f"no {size} px pictures in {folder}; draw them with "
                f"`python -m star_core train data --folder {folder} --size {size}`"
            )
        pictures = np.load(pictures_file, mmap_mode="r")
        rows = json.loads(records_file.read_text(encoding="utf-8"))
        if len(rows) != len(pictures):
            raise ValueError(
                f"{records_file} has {len(rows)} records for {len(pictures)} pictures; "
                f"remove {folder} and draw the pictures again"
            )
        return cls(pictures, tuple(_record(index, row) for index, row in enumerate(rows)))

    def indices(self, split: str) -> npt.NDArray[np.int64]:
        """Return the rows of the pictures in `split`: "train", "pairs" or "concepts"."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        return np.array([r.index for r in self.records if r.split == split], dtype=np.int64)

    def sample(self, split: str, count: int) -> npt.NDArray[np.int64]:
        """Return `count` rows of a split at random, the same ones every time: files go style by style."""
        return np.random.default_rng(0).permutation(self.indices(split))[:count]


def build(folder: Path, size: int, *, packages: Path, workers: int = 2) -> None:
    """Draw every style at `size` x `size` pixels into `folder`; minutes on two cores.

    Packages are downloaded into `packages` where they are missing. The records are written last, so
    an interrupted build is never taken for a finished one.
    """
    if size < SMALLEST:
        raise ValueError(f"size is {size} pixels; draw at {SMALLEST} or more, 64 for the shipped model")
    require_renderer()
    vocabulary = read_vocabulary(asset_path("emojibase", packages))
    _require_known(heldout(), vocabulary)
    drawings = list(find_drawings(vocabulary, packages))
    folder.mkdir(parents=True, exist_ok=True)
    pictures_file, records_file = _files(folder, size)
    # Drawn beside and then renamed: a training run may have the old pictures open.
    unfinished = pictures_file.with_suffix(".part")
    pictures = np.lib.format.open_memmap(
        unfinished, mode="w+", dtype=np.uint8, shape=(len(drawings), size, size, 3)
    )
    # Spawned, not forked: the caller may have started threads, which a fork would freeze.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        rendered = pool.map(partial(render, size=size), drawings, chunksize=64)
        for index, picture in enumerate(rendered):
            pictures[index] = picture
    pictures.flush()
    records_file.unlink(missing_ok=True)
    unfinished.replace(pictures_file)
    rows = [{"style": d.style, **dataclasses.asdict(d.emoji)} for d in drawings]
    part = records_file.with_suffix(".part")
    part.write_text(json.dumps(rows, separators=(",", ":")), encoding="utf-8")
    part.replace(records_file)
    _log.info("%d pictures of %d px in %s", len(drawings), size, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m star_core train data`."""
    parser.add_argument("--folder", type=Path, default=Path("build/emoji"), help="where they go")
    parser.add_argument("--packages", type=Path, default=Path("build/packages"))
    parser.add_argument("--size", type=at_least(SMALLEST, "pixels"), default=64, help="pixels per side")
    parser.add_argument("--workers", type=at_least(1, "processes"), default=2, help="processes that draw")


def run(args: argparse.Namespace) -> None:
    """Draw the pictures and log how many each style and split has."""
    build(args.folder, args.size, packages=args.packages, workers=args.workers)
    records = EmojiSet.load(args.folder, args.size).records
    counts = Counter((record.style, record.split) for record in records)
    for style in STYLES:
        parts = ", ".join(f"{split} {counts[style, split]}" for split in SPLITS)
        _log.info("%-12s %s", style, parts)


def _files(folder: Path, size: int) -> tuple[Path, Path]:
    """Return the files of the pictures and of their records."""
    return folder / f"pictures-{size}.npy", folder / f"records-{size}.json"


def _record(index: int, row: Mapping[str, Any]) -> Record:
    """Return a stored row as a Record; the split comes from the held-out list, never from disk."""
    return Record(
        index=index,
        style=row["style"],
        code=row["code"],
        concept=row["concept"],
        label=row["label"],
        tags=tuple(row["tags"]),
        group=row["group"],
        split=heldout().split(row["concept"], row["style"]),
    )


def _require_known(held: Heldout, vocabulary: Mapping[str, Emoji]) -> None:
    """Raise ValueError if a held-out family has lost its name, for it would then be trained on."""
    known = {emoji.concept for emoji in vocabulary.values()}
    lost = held.concepts.union(*held.pairs.values()) - known
    if lost:
        raise ValueError(
            f"heldout.json lists families that the emoji do not have: {', '.join(sorted(lost))}; "
            "restore the pinned emojibase, or draw the list again with splits.draw_heldout"
        )
