"""R-precision: how often a picture fits its caption better than 99 captions of other things.

There are no CLIP weights to be had, so the scorer is made here, after the DAMSM of AttnGAN (Xu et
al., 2018): a frozen Inception sees the picture, a frozen MiniLM reads the caption, and a small head
on each is trained contrastively on the training split of the real pictures. The pictures of held-out
concepts and (concept, style) pairs are therefore as new to the scorer as to the generator. Its
figures mean something only beside those of the real pictures: that is the ceiling.

Generator and scorer share MiniLM, from which the shipped text encoder is distilled, over the held-out
concepts' names, too. The heads and Inception are never used in training the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from .inception import Features

Indices = NDArray[np.int64]
TextFunction = Callable[[Sequence[str]], Features]

CANDIDATES = 100
SCORER_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Pool:
    """All records a caption can come from: N caption features, and the family of each.

    `families` are integers; captions of one family are never each other's wrong candidates, since
    "man running" and "woman running" may well be drawn alike.
    """

    caption_features: Features
    families: Indices

    def __post_init__(self) -> None:
        """Refuse a pool whose columns differ in length."""
        if len(self.caption_features) != len(self.families):
            raise ValueError(f"{len(self.caption_features)} captions but {len(self.families)} families")


@dataclass(frozen=True)
class RPrecision:
    """Fractions of pictures whose own caption ranks first, and among the first five, of 100."""

    at_1: float
    at_5: float


@dataclass(frozen=True)
class Training:
    """How the scorer's heads are trained."""

    epochs: int = 40
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    hidden: int = 512
    width: int = 256


class Head(nn.Module):
    """Standardises frozen features and maps them to the unit sphere that both heads share."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: Tensor, training: Training, generator: torch.Generator) -> None:
        """Take the statistics of the (N, D) training features and draw the layers' weights."""
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        # Some Inception features are almost always zero; the term keeps them from exploding.
        self.register_buffer("deviation", features.std(0) + 1e-3)
        self.first = _linear(features.shape[1], training.hidden, generator)
        self.second = _linear(training.hidden, training.width, generator)

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """Map (N, D) features to (N, width) unit vectors; `keep` (N, hidden) is dropout's mask."""
        hidden = functional.gelu(self.first((features - self.mean) / self.deviation))
        if keep is not None:
            hidden = hidden * keep
        return functional.normalize(self.second(hidden), dim=1)


@dataclass(frozen=True)
class Scorer:
    """A trained pair of heads."""

    picture_head: Head
    caption_head: Head

    def r_precision(self, picture_features: Features, own: Indices, pool: Pool, *, seed: int) -> RPrecision:
        """Score pictures (N, D) against the caption of record own[i] among 99 of other families.

        The candidates depend on `own`, `pool` and `seed` alone, so real and generated pictures of
        the same captions face the same ones. A tie counts as a miss.
        """
        if len(picture_features) != len(own):
            raise ValueError(f"{len(picture_features)} pictures but {len(own)} captions")
        candidates = torch.from_numpy(draw_candidates(own, pool.families, seed=seed))
        with torch.inference_mode():
            pictures = self.picture_head(_tensor(picture_features))
            captions = self.caption_head(_tensor(pool.caption_features))
            scores = torch.einsum("nd,ncd->nc", pictures, captions[candidates])
        rank = (scores[:, 1:] >= scores[:, :1]).sum(1)
        return RPrecision(at_1=float((rank < 1).float().mean()), at_5=float((rank < 5).float().mean()))


def train_scorer(
    picture_features: Features,
    caption_features: Features,
    *,
    seed: int,
    training: Training | None = None,
) -> Scorer:
    """Train heads on matching rows of picture (N, D) and caption (N, E) features.

    Every other caption of a batch is a wrong one for a picture and the other way round (the
    symmetric cross-entropy of CLIP), with a learned temperature.
    """
    training = training or Training()
    if len(picture_features) != len(caption_features) or len(picture_features) < 2:
        raise ValueError(
            f"the scorer needs matching rows, got {len(picture_features)} pictures "
            f"and {len(caption_features)} captions"
        )
    generator = torch.Generator().manual_seed(seed)
    pictures, captions = _tensor(picture_features), _tensor(caption_features)
    picture_head = Head(pictures, training, generator)
    caption_head = Head(captions, training, generator)
    log_scale = nn.Parameter(torch.tensor(2.5))
    parameters = [*picture_head.parameters(), *caption_head.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    for _ in range(training.epochs):
        for rows in _batches(len(pictures), training.batch, generator):
            seen = picture_head(pictures[rows], _keep(len(rows), training, generator))
            read = caption_head(captions[rows], _keep(len(rows), training, generator))
            loss = _contrastive_loss(log_scale.exp() * seen @ read.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Scorer(picture_head.requires_grad_(False), caption_head.requires_grad_(False))


def draw_candidates(own: Indices, families: Indices, *, seed: int) -> Indices:
    """Return (N, 100) records: own[i] first, then 99 different ones of other families."""
    rng = np.random.default_rng(seed)
    rows = []
    for record in own:
        others = np.flatnonzero(families != families[record])
        if len(others) < CANDIDATES - 1:
            raise ValueError(
                f"R-precision needs {CANDIDATES - 1} captions of other families, there are {len(others)}"
            )
        rows.append(np.append(record, rng.choice(others, CANDIDATES - 1, replace=False)))
    return np.stack(rows)


def wrong_captions(own: Indices, families: Indices, *, seed: int) -> Indices:
    """Return for each record another one of `own` that belongs to another family.

    The records are ordered by family, the families at random, and turned by the size of the
    largest family, so that no family meets itself.
    """
    _, family, sizes = np.unique(families[own], return_inverse=True, return_counts=True)
    order = np.argsort(np.random.default_rng(seed).permutation(len(sizes))[family], kind="stable")
    largest = int(sizes.max())
    if 2 * largest > len(own):
        raise ValueError("more than half of the records are of one family; take more records")
    wrong = np.empty_like(own)
    wrong[order] = own[np.roll(order, largest)]
    return wrong


def _contrastive_loss(logits: Tensor) -> Tensor:
    """Return the symmetric cross-entropy of (B, B) similarities whose diagonal is right."""
    right = torch.arange(len(logits))
    return functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)


def _batches(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return one epoch of shuffled row indices; a last, smaller batch is left out."""
    batches = torch.randperm(count, generator=generator).split(min(size, count))
    return tuple(batch for batch in batches if len(batch) == min(size, count))


def _keep(count: int, training: Training, generator: torch.Generator) -> Tensor:
    """Return a (count, hidden) dropout mask, drawn here because nn.Dropout takes no generator."""
    drawn = torch.rand(count, training.hidden, generator=generator)
    return (drawn >= training.dropout).float() / (1 - training.dropout)


def _linear(width_in: int, width_out: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer with torch's usual initial weights, drawn from `generator`."""
    bound = width_in**-0.5
    layer = nn.Linear(width_in, width_out, device="meta").to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


def _tensor(features: Features) -> Tensor:
    """Return the features as a float32 tensor of their own."""
    return torch.tensor(features, dtype=torch.float32)
