"""Measures an artist, something that draws captions and gives pictures back, on held-out data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from .distances import fid, kid, kid_floor
from .held_out import HeldOut, RealSide
from .inception import FeatureFunction, Features, Pictures
from .lpips import LPIPS
from .reconstruction import perceptual, psnr
from .report import Reconstruction, Report, Row, Seeds, in_words
from .rprecision import SCORER_SEEDS, wrong_captions

REAL = "real"
RECONSTRUCTED = "reconstructed"

_log = logging.getLogger(__name__)


class Artist(Protocol):
    """What is measured. Pictures are uint8 (N, H, W, 3) of the size of the real ones."""

    name: str

    def check(self, schedule: str, seed: int) -> None:
        """Raise ValueError for what `draw` would refuse."""

    def draw(self, captions: Sequence[str], schedule: str, seed: int) -> Pictures:
        """Draw one picture per caption."""

    def reconstruct(self, pictures: Pictures) -> Pictures:
        """Send pictures through the tokenizer and back."""


def measure(
    artist: Artist | None,
    real: RealSide,
    *,
    schedules: Sequence[str],
    features_of: FeatureFunction,
    metric: LPIPS | None,
    seed: int,
) -> Report:
    """Return all figures of an artist, or of the real pictures alone where there is none.

    What is measured is logged at once: a later schedule that fails takes no row with it.
    `metric` is the LPIPS that measures reconstructions, LPIPS-VGG in the published figures.
    """
    rows: list[Row] = []
    reconstructions: list[Reconstruction] = []
    for held_out in real.held_out:
        ceiling = _row(REAL, held_out, held_out.features, held_out.others, real, ceiling=None)
        rows.append(ceiling)
        if artist is None:
            continue
        if metric is not None:
            pictures = artist.reconstruct(held_out.pictures)
            features = features_of(pictures)
            reconstructions.append(_reconstruction(held_out, pictures, features, metric))
            _log.info("reconstructed: %s", in_words(reconstructions[-1]))
            rows.append(_row(RECONSTRUCTED, held_out, features, held_out.features, real, ceiling=ceiling))
        for schedule, features in _drawn(artist, held_out, schedules, features_of, seed):
            rows.append(_row(schedule, held_out, features, held_out.features, real, ceiling=ceiling))
    return Report(
        model=artist.name if artist else "none",
        seed=seed,
        scorer_seeds=SCORER_SEEDS,
        kid_halves={held_out.split: kid_floor(held_out.features) for held_out in real.held_out},
        reconstructions=tuple(reconstructions),
        rows=tuple(rows),
    )


def _drawn(
    artist: Artist,
    held_out: HeldOut,
    schedules: Sequence[str],
    features_of: FeatureFunction,
    seed: int,
) -> Iterator[tuple[str, Features]]:
    """Yield each schedule's name and the (N, D) features of its pictures of the captions."""
    for schedule in schedules:
        _log.info("drawing %d %s by %s", len(held_out.captions), held_out.split, schedule)
        yield schedule, features_of(artist.draw(held_out.captions, schedule, seed))


def _row(
    name: str,
    held_out: HeldOut,
    features: Features,
    reference: Features,
    real: RealSide,
    *,
    ceiling: Row | None,
) -> Row:
    """Return the figures of pictures with (N, D) features, as many as the held-out records.

    FID and KID are taken to `reference`; R-precision is compared with that of `ceiling`.
    """
    at_1, at_5 = _r_precision(features, held_out, real, right=True)
    wrong_at_1, _ = _r_precision(features, held_out, real, right=False)
    best = float(np.mean(ceiling.at_1 if ceiling else at_1))
    row = Row(
        split=held_out.split,
        pictures=name,
        count=len(features),
        at_1=at_1,
        at_5=at_5,
        wrong_at_1=wrong_at_1,
        fid=fid(features, reference),
        kid=kid(features, reference),
        share_of_real=float(np.mean(at_1)) / best if best else float("nan"),
    )
    _log.info("%s", in_words(row))
    return row


def _r_precision(features: Features, held_out: HeldOut, real: RealSide, *, right: bool) -> tuple[Seeds, Seeds]:
    """Return R@1 and R@5 by scorer, against the pictures' own captions or against wrong ones."""
    own = held_out.records
    if not right:
        own = wrong_captions(own, real.pool.families, seed=0)
    results = [
        scorer.r_precision(features, own, real.pool, seed=seed)
        for scorer, seed in zip(real.scorers, SCORER_SEEDS, strict=True)
    ]
    return tuple(r.at_1 for r in results), tuple(r.at_5 for r in results)


def _reconstruction(held_out: HeldOut, pictures: Pictures, features: Features, metric: LPIPS) -> Reconstruction:
    """Return how near reconstructed pictures, with (N, D) features, are to the held-out ones."""
    return Reconstruction(
        split=held_out.split,
        count=len(pictures),
        psnr=float(psnr(pictures, held_out.pictures).mean()),
        lpips=float(perceptual(metric, pictures, held_out.pictures).mean()),
        fid=fid(features, held_out.features),
        kid=kid(features, held_out.features),
    )
