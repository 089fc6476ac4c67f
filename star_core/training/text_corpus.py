"""The distillation's corpus: contents as token ids beside the teacher's embeddings, drawn into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .bpe import END_ID, MAX_TOKENS, WORD_END, read_merges, token_texts, vocabulary
from .minilm import MiniLM, embed_cached
from .packages import asset_path
from .wording import Wording
from .words import gather

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How often each kind of content is drawn, and how many of it there are.
SHARES: Mapping[str, float] = {
    "emoji": 0.4,
    "vocabulary": 0.15,
    "words": 0.15,
    "phrases": 0.2,
    "glosses": 0.1,
}
WORDS, PHRASES, GLOSSES = 24576, 16384, 8192
# One content in so many is never trained on, and measured instead.
HELD_OUT = 50


@dataclass(frozen=True)
class Corpus:
    """Contents as token ids, with the teacher's embedding of each, and which to draw per kind."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    targets: Tensor
    trained: Mapping[str, NDArray[np.int64]]
    held_out: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class Batch:
    """ids (N, L) padded on the right, lengths (N,), the teacher's targets (N, 384), style indices (N,)."""

    ids: Tensor
    lengths: Tensor
    targets: Tensor
    styles: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        ids, lengths = self.ids.to(device), self.lengths.to(device)
        return Batch(ids, lengths, self.targets.to(device), self.styles.to(device))


def draw_batch(corpus: Corpus, wording: Wording, batch: int, *, seed: int, step: int) -> Batch:
    """Return the texts of a training step, which (seed, step) alone decide."""
    rng = np.random.default_rng((seed, step))
    counts = rng.multinomial(batch, list(SHARES.values()))
    pools = corpus.trained.values()
    chosen = np.concatenate([rng.choice(p, n) for p, n in zip(pools, counts, strict=True)])
    # The unconditional prompt is one text among thousands, and half of every guided picture.
    chosen[: max(1, batch // 128)] = 0
    return word(corpus, wording, chosen, rng)


def word(corpus: Corpus, wording: Wording, chosen: NDArray[np.int64], rng: np.random.Generator) -> Batch:
    """Return the chosen contents, each in a wording drawn from `rng`."""
    drawn = [wording.draw(corpus.ids[index], rng) for index in chosen]
    ids, lengths = padded([row for row, _ in drawn])
    styles = torch.tensor([style for _, style in drawn])
    return Batch(ids, lengths, corpus.targets[torch.from_numpy(chosen)], styles)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of ids as one tensor (N, L), L the longest row, and their lengths (N,)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[END_ID] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([len(row) for row in rows])


def gather_corpus(
    packages: Path, tokenizer: PreTrainedTokenizerBase, teacher: MiniLM, cache: Path, seed: int
) -> tuple[Corpus, Tensor]:
    """Return the corpus, and the teacher's embedding (V, 384) of what each token spells.

    The teacher's work is kept in `cache`; its first run takes about 7 minutes on two cores.
    """
    tokens = list(vocabulary(read_merges(asset_path("clip-bpe", packages))))
    spelled = token_texts(tokens)
    whole = {spelled[i]: i for i, token in enumerate(tokens) if token.endswith(WORD_END)}
    contents = gather(
        asset_path("emojibase", packages),
        asset_path("wordnet", packages),
        list(whole),
        words=WORDS,
        phrases=PHRASES,
        glosses=GLOSSES,
        seed=seed,
    )
    rows = embed_cached(teacher, spelled, cache)
    texts = {kind: getattr(contents, kind) for kind in SHARES}
    # Words of one token each were embedded as tokens already.
    targets = [
        rows[[whole[text] for text in part]] if kind == "vocabulary" else embed_cached(teacher, part, cache)
        for kind, part in texts.items()
    ]
    return number(texts, F.normalize(torch.cat(targets), dim=-1), tokenizer), rows


def number(texts: Mapping[str, tuple[str, ...]], targets: Tensor, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Return the contents of every kind, in one numbering, with their token ids."""
    every = tuple(text for part in texts.values() for text in part)
    assert every[0] == "", "the unconditional prompt is content 0"
    ids = tokenizer(list(every))["input_ids"]
    bare = tuple(tuple(row[1:-1][: MAX_TOKENS - 2]) for row in ids)
    trained, held_out, first = {}, {}, 0
    for kind, part in texts.items():
        numbers = np.arange(first, first + len(part))
        aside = numbers % HELD_OUT == HELD_OUT - 1
        trained[kind], held_out[kind] = numbers[~aside], numbers[aside]
        first += len(part)
    return Corpus(every, bare, targets, trained, held_out)
