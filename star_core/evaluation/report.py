"""The figures of one evaluation, as a table for readers and as one JSON line for programs."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from .distances import Kid

Seeds = tuple[float, ...]

_RECONSTRUCTION_HEADER = ("split", "N", "PSNR dB", "LPIPS-VGG", "rFID", "rKID x 1000")
_ROW_HEADER = (
    *("split", "pictures", "N", "R@1 of 100", "of real", "R@5", "wrong captions R@1"),
    *("FID", "KID x 1000"),
)


@dataclass(frozen=True)
class Reconstruction:
    """How well the tokenizer gives back the held-out pictures of one split."""

    split: str
    count: int
    psnr: float
    lpips: float
    fid: float
    kid: Kid


@dataclass(frozen=True)
class Row:
    """One set of pictures of one split: R-precision by scorer seed, and distances to the real ones.

    `wrong_at_1` scores each picture against another record's caption. For real pictures the
    distances are to as many training pictures.
    """

    split: str
    pictures: str
    count: int
    at_1: Seeds
    at_5: Seeds
    wrong_at_1: Seeds
    fid: float
    kid: Kid
    share_of_real: float


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation; `kid_halves` is the spread of KID between real halves."""

    model: str
    seed: int
    scorer_seeds: tuple[int, ...]
    kid_halves: dict[str, float]
    reconstructions: tuple[Reconstruction, ...]
    rows: tuple[Row, ...]

    def json_line(self) -> str:
        """Return every figure as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def markdown(self) -> str:
        """Return the tables, with a line that says what the columns mean."""
        parts = []
        if self.reconstructions:
            lines = [_reconstruction_cells(figures) for figures in self.reconstructions]
            parts.append(_table(_RECONSTRUCTION_HEADER, lines))
        parts.append(_table(_ROW_HEADER, [_row_cells(row) for row in self.rows]))
        spread = ", ".join(f"{1e3 * v:.2f} on {split}" for split, v in self.kid_halves.items())
        parts.append(
            f"Model {self.model}, seed {self.seed}; R-precision is the mean and range of "
            f"{len(self.scorer_seeds)} scorers. Real pictures are the ceiling of R-precision; "
            "their FID and KID are to as many training pictures, the floor at this N. "
            f"Spread of KID x 1000 between halves of the real pictures: {spread}."
        )
        return "\n\n".join(parts)


def in_words(figures: Reconstruction | Row) -> str:
    """Return what a line of the tables holds, each cell behind the name of its column."""
    if isinstance(figures, Row):
        named = zip(_ROW_HEADER, _row_cells(figures), strict=True)
    else:
        named = zip(_RECONSTRUCTION_HEADER, _reconstruction_cells(figures), strict=True)
    return ", ".join(f"{name} {cell}" for name, cell in named)


def _reconstruction_cells(figures: Reconstruction) -> tuple[str, ...]:
    """Return the cells of one line of the tokenizer's table."""
    return (
        figures.split,
        str(figures.count),
        f"{figures.psnr:.2f}",
        f"{figures.lpips:.4f}",
        f"{figures.fid:.1f}",
        _kid_cell(figures.kid),
    )


def _row_cells(row: Row) -> tuple[str, ...]:
    """Return the cells of one line of the generator's table."""
    return (
        row.split,
        row.pictures,
        str(row.count),
        _seeds_cell(row.at_1),
        f"{row.share_of_real:.2f}",
        _seeds_cell(row.at_5),
        _seeds_cell(row.wrong_at_1),
        f"{row.fid:.1f}",
        _kid_cell(row.kid),
    )


def _seeds_cell(values: Seeds) -> str:
    """Return the mean of several seeds and their range."""
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _kid_cell(distance: Kid) -> str:
    """Return a kernel distance and its standard error in thousandths."""
    return f"{1e3 * distance.value:.2f} ± {1e3 * distance.error:.2f}"


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Return a markdown table."""
    rule = tuple("---" for _ in header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
