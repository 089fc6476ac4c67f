"""Prompts to text states: tau (a state per token) for cross-attention, eta (one per prompt) for the start.

The network is transformers' CLIPTextModel and the words go through its CLIP tokenizer: the tower that
Stable Diffusion 2.1 ships for the released weights, a small one of the same kind for the model that ships
here. Both come from local files alone. transformers is imported when a model is loaded, not before.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .graphs import Replays
from .text_files import (
    TEXT_KEYS,
    check_merges,
    check_tokenizer,
    find_text_files,
    read_text_tensors,
    relevant_settings,
    text_settings,
    whole_rows,
)
from .transfer import upload
from .upcast import needs_upcast, upcast_linears
from .weights import build_on_meta, fill

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextStates:
    """What the transformer reads of N prompts of L positions at text width T.

    hidden (N, L, T) float32: tau, the last states after the final LayerNorm, zeros at padding.
    mask (N, L) bool: True where a token stands, False on padding.
    pooled (N, T) float32: eta, the state at the end-of-text token, without projection.
    """

    hidden: Tensor
    mask: Tensor
    pooled: Tensor

    def repeat_each(self, count: int) -> TextStates:
        """Return the states with every prompt `count` times in a row, (N * count, ...)."""
        parts = (self.hidden, self.mask, self.pooled)
        return TextStates(*(part.repeat_interleave(count, dim=0) for part in parts))


@dataclass
class _Asked:
    """Where the token ids (N, L) of recorded work lie, and their mask (N, L)."""

    ids: Tensor
    mask: Tensor

    def forget(self) -> None:
        """Nothing: they are small, and go with their owner."""


@dataclass(frozen=True)
class Words:
    """A tokenizer and how many positions its texts are padded or cut to (77 for CLIP)."""

    tokenizer: PreTrainedTokenizerBase
    positions: int

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids (N, L) int64, padded, and their mask (N, L) bool."""
        rows = [self._token_ids(prompt) for prompt in prompts]
        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [padding] * (self.positions - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(self.positions) < lengths[:, None]

    def measure(self, prompt: str) -> tuple[int, str]:
        """Return how many tokens a prompt's words make, and those words that find no position."""
        ids = self._all_ids(prompt)
        cut = self.tokenizer.decode(ids[self.positions - 1 : -1]) if len(ids) > self.positions else ""
        return len(ids) - 2, cut

    def _all_ids(self, prompt: str) -> list[int]:
        """Return the ids of a whole prompt between those of its start and its end."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt {prompt!r:.80} holds half a character (as a text cut within an emoji does) or a"
                f" byte that is no UTF-8 at its place {error.start + 1}: write it anew"
            ) from None
        return list(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _token_ids(self, prompt: str) -> list[int]:
        # Cut here rather than by the tokenizer, which would not tell what it dropped.
        ids = self._all_ids(prompt)
        if len(ids) <= self.positions:
            return ids
        _, cut = self.measure(prompt)
        log.warning("a prompt is longer than %d tokens; left out: %r", self.positions - 2, cut)
        return [*ids[: self.positions - 1], ids[-1]]


class TextEncoder(nn.Module):
    """A CLIP text model with its tokenizer; knows nothing of guidance or batches of pictures."""

    def __init__(self, model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Return T, the width of a state."""
        return int(self.model.config.hidden_size)

    @property
    def positions(self) -> int:
        """Return L, the number of positions every prompt is padded or cut to (77 for CLIP)."""
        return int(self.model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], replays: Replays[_Asked] | None = None) -> TextStates:
        """Return the states of N prompts; "" is the unconditional one.

        Words beyond the last position are cut off, with a warning that quotes them. The states are plain
        tensors, so that a transformer can be trained on them. replays: where the tower's work on N prompts of
        full length is recorded, and repeated for the next N.
        """
        if isinstance(prompts, str):
            raise ValueError(f"encode takes a sequence of prompts, not one string: [{prompts!r}]")
        if not prompts:
            raise ValueError("encode needs at least one prompt; the empty one is [''].")
        ids, mask = self.tokenize(prompts)
        device = next(self.model.parameters()).device
        # The tower looks back alone (its mask is causal): what stands behind the longest text changes nothing.
        longest = int(mask.sum(dim=1).max())
        ids, mask = upload(ids, device), upload(mask, device)
        if replays is not None and (states := self._repeated(ids, mask, replays)) is not None:
            return states
        found = self.model(input_ids=ids[:, :longest], attention_mask=mask[:, :longest].long())
        hidden = cast(Tensor, found.last_hidden_state).float().masked_fill(~mask[:, :longest, None], 0)
        pooled = cast(Tensor, found.pooler_output)
        padded = F.pad(hidden, (0, 0, 0, self.positions - longest))
        return TextStates(padded, mask, pooled.float())

    def _repeated(self, ids: Tensor, mask: Tensor, replays: Replays[_Asked]) -> TextStates | None:
        """Return the states of token ids (N, L) from a recording; None while another run has the memory."""
        weights = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        shape = ids.shape, torch.is_inference_mode_enabled(), weights
        with replays.opened(shape, ids.device, lambda: _Asked(ids.clone(), mask.clone())) as asked:
            if asked is None:
                return None
            asked.ids.copy_(ids)
            asked.mask.copy_(mask)
            hidden, pooled = replays.run(0, lambda look: self._whole(asked.ids, asked.mask))
            return TextStates(hidden.clone(), mask, pooled.clone())

    def _whole(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states (N, L, T) and pooled states (N, T) of token ids of full length (N, L)."""
        # Without their mask: transformers asks it for values, and the padding is behind all that counts.
        found = self.model(input_ids=ids)
        hidden = cast(Tensor, found.last_hidden_state).float().masked_fill(~mask.unsqueeze(-1), 0)
        return hidden, cast(Tensor, found.pooler_output).float()

    @property
    def words(self) -> Words:
        """Return the tokenizer with its number of positions, apart from the network."""
        return Words(self.tokenizer, self.positions)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids (N, L) int64, padded, and their mask (N, L) bool."""
        return self.words.tokenize(prompts)

    def measure(self, prompt: str) -> tuple[int, str]:
        """Return how many tokens a prompt's words make, and those words that find no position."""
        return self.words.measure(prompt)


def load_text_encoder(
    source: Path,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep_halves: bool = False,
) -> TextEncoder:
    """Load a text encoder from local files.

    source: a folder in Stable Diffusion's layout (text_encoder/ beside tokenizer/), a folder as
    transformers writes it, or one weight file. tokenizer: a folder with vocab.json and merges.txt, or one of
    these files; by default it is looked for in and beside `source`. keep_halves: load onto a CPU, leave
    weights as they lie in their file where it holds halves, and compute in `dtype` all the same (`upcast`),
    there or where the encoder is moved to.
    Raises ValueError naming the file, the key and the remedy.
    """
    weights, words = find_text_files(source, tokenizer)
    tensors = read_text_tensors(weights)
    settings = text_settings(weights, tensors)
    return assemble_text_encoder(
        tensors,
        settings,
        words,
        source=str(weights),
        dtype=dtype,
        device=device,
        keep_halves=keep_halves,
    )


def assemble_text_encoder(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    tokenizer: Path,
    *,
    source: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    keep_halves: bool = False,
) -> TextEncoder:
    """Build a text encoder of a config.json's settings and fill it from named tensors, strictly."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**relevant_settings(settings))
    model = build_on_meta(lambda: CLIPTextModel(config))
    # 4.x wraps the modules in `text_model`; their names inside are those of 5.
    inner = getattr(model, "text_model", model)
    if keep_halves or needs_upcast(dtype, torch.device(device)):
        upcast_linears(model)
    rows = whole_rows(tensors)
    fill(inner, rows, TEXT_KEYS, source=source, dtype=dtype, device=device, keep_halves=keep_halves)
    # Added to those of words, which may have stayed halves: their sum is in the wanted dtype.
    inner.embeddings.position_embedding.to(dtype)
    # A buffer that no file carries, so it is still on meta.
    count = config.max_position_embeddings
    inner.embeddings.position_ids = torch.arange(count, device=device).expand(1, -1)
    words = load_tokenizer(tokenizer)
    if len(words) > config.vocab_size:
        raise ValueError(
            f"{tokenizer}: {len(words)} tokens, but {source} embeds {config.vocab_size}."
            " Give the tokenizer that belongs to these weights"
        )
    return TextEncoder(model.requires_grad_(False).eval(), words)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load CLIP's tokenizer from a folder with vocab.json and merges.txt; ValueError where they make none."""
    import transformers

    check_tokenizer(folder)
    # In 4.x `CLIPTokenizer` is a slow twin that treats typographic quotes and CJK otherwise, depending on
    # whether ftfy is installed. The fast one is what 5 calls CLIPTokenizer: equal ids in every version.
    kind = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
    try:
        check_merges(folder)
        words = kind.from_pretrained(str(folder), local_files_only=True, clean_up_tokenization_spaces=False)
    except Exception as error:  # tokenizers raises plain ones
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        whole = (folder / "tokenizer.json").is_file()  # read in place of the others
        files = "tokenizer.json makes" if whole else "vocab.json and merges.txt make"
        remedy = "Download it again, or remove it" if whole else "Download both again"
        raise ValueError(f"{folder}: its {files} no CLIP tokenizer ({said:.200}). {remedy}") from error
    return cast("PreTrainedTokenizerBase", words)
