"""Distances between two sets of pictures, by their features: FID and KID.

FID: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017). Biased upward for small
sets, so it is only read beside another of equal size. KID: Binkowski et al., "Demystifying MMD
GANs" (2018): unbiased, zero on average for two samples of one distribution, and so the measure to
quote for a few hundred pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Float64 = NDArray[np.float64]

_HALF_SAMPLES = 100


@dataclass(frozen=True)
class Kid:
    """A kernel distance and its standard error."""

    value: float
    error: float


def fid(x: Array, y: Array) -> float:
    """Return the Frechet distance between gaussians fitted to features x (N, D) and y (M, D).

    With centred features A, B scaled so that the covariances are A'A and B'B, the trace of
    sqrt(A'A B'B) is the sum of the singular values of A B': exact for fewer pictures than
    features too, where the usual matrix square root is of a singular matrix.
    """
    _check(x, y)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    a, b = _covariance_root(x64), _covariance_root(y64)
    shift = np.square(x64.mean(0) - y64.mean(0)).sum()
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(shift + np.square(a).sum() + np.square(b).sum() - 2 * overlap)


def kid(x: Array, y: Array, *, seed: int = 0) -> Kid:
    """Return the kernel distance between features x (N, D) and y (M, D).

    The value is the unbiased estimate over all of them, with the kernel (x.y / D + 1)^3. The error
    is the spread of the estimate over random half samples, which is the standard error of the
    whole one (the delete-half jackknife), and up to twice that where the distance is near zero.
    """
    _check(x, y)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    within_x, within_y, between = _kernel(x64, x64), _kernel(y64, y64), _kernel(x64, y64)
    np.fill_diagonal(within_x, 0.0)
    np.fill_diagonal(within_y, 0.0)
    rng = np.random.default_rng(seed)
    halves = []
    for _ in range(_HALF_SAMPLES):
        i = rng.choice(len(x), max(2, len(x) // 2), replace=False)
        j = rng.choice(len(y), max(2, len(y) // 2), replace=False)
        halves.append(_squared_mmd(within_x[np.ix_(i, i)], within_y[np.ix_(j, j)], between[np.ix_(i, j)]))
    return Kid(_squared_mmd(within_x, within_y, between), float(np.std(halves)))


def kid_floor(features: Array, *, seed: int = 0) -> float:
    """Return the spread of KID between two random halves of one set of features (N, D).

    Over all splits the mean is exactly zero, so the spread is all there is: a distance measured
    with N / 2 pictures and below about twice this cannot be told from none.
    """
    _check(features, features)
    kernel = _kernel(features.astype(np.float64), features.astype(np.float64))
    np.fill_diagonal(kernel, 0.0)
    rng = np.random.default_rng(seed)
    splits = []
    for _ in range(_HALF_SAMPLES):
        i, j = np.array_split(rng.permutation(len(features)), 2)
        splits.append(_squared_mmd(kernel[np.ix_(i, i)], kernel[np.ix_(j, j)], kernel[np.ix_(i, j)]))
    return float(np.std(splits))


def _kernel(x: Float64, y: Float64) -> Float64:
    """Return the (N, M) polynomial kernel of degree 3 that KID is defined with."""
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def _squared_mmd(within_x: Float64, within_y: Float64, between: Float64) -> float:
    """Return the unbiased squared MMD from (N, N), (M, M) and (N, M); zero diagonals."""
    n, m = between.shape
    same = within_x.sum() / (n * (n - 1)) + within_y.sum() / (m * (m - 1))
    return float(same - 2 * between.mean())


def _covariance_root(x: Float64) -> Float64:
    """Return a matrix A of at most D rows with A'A the covariance of features x (N, D)."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def _check(x: Array, y: Array) -> None:
    """Raise ValueError unless both are (N, D) features of one width with at least 4 rows."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 4:
        raise ValueError(
            f"expected two sets of at least 4 feature rows of one width, got shapes {x.shape} and {y.shape}"
        )
