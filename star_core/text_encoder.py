"""Prompts to text states: tau (a state per token) for cross-attention, eta (one per prompt) for the start.

The network is transformers' CLIPTextModel and the words go through its CLIP tokenizer: the tower that
Stable Diffusion 2.1 ships for the released weights, a small one of the same kind for the model that ships
here. Both come from local files alone. transformers is imported when a model is loaded, not before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .graphs import Replays
from .key_tables import KeyTable
from .transfer import upload
from .weights import TensorFile, build_on_meta, fill, read_pickle

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# transformers 5 keeps the tensors of CLIPTextModel without the `text_model.` prefix that 4.x and every
# released file have. Both spellings are read; complaints use the second, which files carry.
_PARTS = ("embeddings", "encoder", "final_layer_norm")
TEXT_KEYS = KeyTable(
    pairs={f"{prefix}{part}.*": f"{part}.*" for prefix in ("", "text_model.") for part in _PARTS},
    dropped={
        "*embeddings.position_ids": "0, 1, 2 ..., which the module counts itself",
        "text_projection*": "CLIP's joint space: eta is the state before the projection",
        "logit_scale": "CLIP's contrastive temperature",
        "vision_model.*": "CLIP's picture tower",
        "visual_projection.*": "CLIP's picture tower",
    },
)

_ROWS = "embeddings.token_embedding.weight"
# Heads of 64 everywhere. The activation leaves no trace in a file: OpenAI's towers have the quick
# approximation, OpenCLIP's (SD 2.1's among them) the exact one.
_ACTIVATIONS = {512: "quick_gelu", 768: "quick_gelu", 1024: "gelu", 1280: "gelu"}
_HEAD_WIDTH = 64


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
) -> TextEncoder:
    """Load a text encoder from local files.

    source: a folder in Stable Diffusion's layout (text_encoder/ beside tokenizer/), a folder as
    transformers writes it, or one weight file. tokenizer: a folder with vocab.json and merges.txt, or one of
    these files; by default it is looked for in and beside `source`.
    Raises ValueError naming the file, the key and the remedy.
    """
    weights, words = find_text_files(source, tokenizer)
    tensors = _read(weights)
    settings = _settings(weights, tensors)
    return assemble_text_encoder(tensors, settings, words, source=str(weights), dtype=dtype, device=device)


def assemble_text_encoder(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    tokenizer: Path,
    *,
    source: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Build a text encoder of a config.json's settings and fill it from named tensors, strictly."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**_relevant(settings))
    model = build_on_meta(lambda: CLIPTextModel(config))
    # 4.x wraps the modules in `text_model`; their names inside are those of 5.
    inner = getattr(model, "text_model", model)
    fill(inner, whole_rows(tensors), TEXT_KEYS, source=source, dtype=dtype, device=device)
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

    _check_tokenizer(folder)
    # In 4.x `CLIPTokenizer` is a slow twin that treats typographic quotes and CJK otherwise, depending on
    # whether ftfy is installed. The fast one is what 5 calls CLIPTokenizer: equal ids in every version.
    kind = getattr(transformers, "CLIPTokenizerFast", None) or transformers.CLIPTokenizer
    try:
        words = kind.from_pretrained(str(folder), local_files_only=True, clean_up_tokenization_spaces=False)
    except Exception as error:  # tokenizers raises plain ones
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{folder}: its vocab.json and merges.txt make no CLIP tokenizer ({said:.200}). Download both again"
        ) from error
    return cast("PreTrainedTokenizerBase", words)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (V, T) as int8 (V, T) and a float16 scale per row (V,), for `whole_rows` to undo."""
    # The scale is rounded to float16 first, upwards by an ulp at most, so that 127 steps always reach.
    largest = rows.float().abs().amax(dim=1).clamp_min(1e-4)
    scale = (largest / 127 * (1 + 2**-10)).half()
    steps = (rows.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return steps.to(torch.int8), scale


def whole_rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors with token rows in 8 bits (see `quantize_rows`) multiplied out to float32."""
    for name in (_ROWS, f"text_model.{_ROWS}"):
        if f"{name}.int8" in tensors and f"{name}.scale" in tensors:
            rows = tensors[f"{name}.int8"].float() * tensors[f"{name}.scale"].float()[:, None]
            halves = (f"{name}.int8", f"{name}.scale")
            return {name: rows, **{key: tensors[key] for key in tensors if key not in halves}}
    return tensors


def _weight_file(source: Path) -> Path:
    """Return the weight file that `source` means."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise ValueError(f"{source}: no such file or folder")
    folder = source / "text_encoder" if (source / "text_encoder").is_dir() else source
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others.pop()
    names = ", ".join(path.name for path in others) or "none"
    raise ValueError(
        f"{folder}: no model.safetensors (other safetensors files: {names}). Name the weight file itself"
    )


def find_text_files(source: Path, tokenizer: Path | None) -> tuple[Path, Path]:
    """Return the weight file that `load_text_encoder` reads for these, and the tokenizer's folder.

    Raises ValueError where they are not there: before anything is read, or transformers waited for.
    """
    weights, words = _weight_file(source), _tokenizer_folder(source, tokenizer)
    _check_tokenizer(words)
    return weights, words


def _tokenizer_folder(source: Path, tokenizer: Path | None) -> Path:
    """Return the folder of vocab.json and merges.txt: the one given, or one in or beside `source`."""
    if tokenizer is not None:
        return tokenizer.parent if tokenizer.is_file() else tokenizer
    folder = source.parent if source.is_file() else source
    places = [folder / "tokenizer", folder, folder.parent / "tokenizer"]
    for place in places:
        if (place / "vocab.json").is_file():
            return place
    raise ValueError(
        f"{source}: no tokenizer found (looked for vocab.json in {', '.join(map(str, places))})."
        " Give the folder with vocab.json and merges.txt"
    )


def _check_tokenizer(folder: Path) -> None:
    """Raise ValueError where a tokenizer's files are not in its folder."""
    for name in ("vocab.json", "merges.txt"):
        # Without any merges there would be a tokenizer, of single letters.
        if not (folder / name).is_file() or not (folder / name).stat().st_size:
            raise ValueError(
                f"{folder}: no {name}, or nothing in it. It comes in the folder tokenizer/ of the model"
            )


def _read(path: Path) -> Mapping[str, Tensor]:
    """Return the named tensors of a safetensors file or of a plain pickled state dict."""
    if path.suffix == ".safetensors":
        return TensorFile(path)
    content = read_pickle(path)
    if not isinstance(content, Mapping) or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(f"{path}: not a state dict of tensors. Give model.safetensors instead")
    return cast(Mapping[str, Tensor], content)


def _settings(weights: Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return the settings of the config.json beside the weights, else those that shapes tell."""
    path = weights.parent / "config.json"
    if not path.is_file():
        return infer_settings(tensors, source=str(weights))
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}). Download it again") from error
    # A whole CLIP model's configuration holds the text tower's as a part.
    if isinstance(settings, dict) and isinstance(settings.get("text_config"), dict):
        settings = settings["text_config"]
    if not isinstance(settings, dict) or settings.get("hidden_size") is None:
        raise ValueError(f"{path}: no hidden_size in it, so not a CLIP text model's configuration")
    for complaint in _complaints(_relevant(settings)):
        raise ValueError(f"{path}: {complaint}, as in no CLIP text model. Download it again")
    return settings


def _complaints(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with settings, in the order in which it can be said."""
    from transformers.activations import ACT2FN

    for name, value in settings.items():
        if name == "hidden_act":
            fits = isinstance(value, str) and value in ACT2FN
        elif name == "layer_norm_eps":
            fits = isinstance(value, float) and 0 < value < 1
        else:
            fits = type(value) is int and value >= (0 if name.endswith("_id") else 1)
        if not fits:
            yield f"{name} is {value!r}"
    width, heads = settings["hidden_size"], settings.get("num_attention_heads", 8)
    if width % heads:
        yield f"hidden_size {width} is not split by {heads} heads"


def infer_settings(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
    """Return the settings that the shapes of a CLIP text model tell.

    Raises ValueError where the file is another model's, or its width is no known tower's.
    """
    bare = {name.removeprefix("text_model."): name for name in tensors}
    first = "encoder.layers.0.mlp.fc1.weight"
    rows = f"{_ROWS}.int8" if f"{_ROWS}.int8" in bare else _ROWS
    positions = "embeddings.position_embedding.weight"
    for name in (rows, positions, first):
        if name not in bare:
            raise ValueError(
                f"{source}: no tensor text_model.{name}, so not a CLIP text model in transformers' names"
            )
    vocabulary, width = tensors[bare[rows]].shape
    if width not in _ACTIVATIONS:
        raise ValueError(
            f"{source}: a text model of width {width}; the file does not say its activation. Put its"
            " config.json beside it"
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors[bare[first]].shape[0],
        "max_position_embeddings": tensors[bare[positions]].shape[0],
        "num_hidden_layers": len(set(_layers(bare))),
        "num_attention_heads": width // _HEAD_WIDTH,
        "hidden_act": _ACTIVATIONS[width],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _layers(names: Mapping[str, str]) -> Iterator[str]:
    """Yield the layer number of each name that has one."""
    for name in names:
        if name.startswith("encoder.layers."):
            yield name.split(".")[2]


def _relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that shape the computation, so that old and new versions read the same."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
        "bos_token_id",
        "eos_token_id",
    )
    # attention_dropout and the rest act in training alone; pad_token_id is the tokenizer's to say.
    return {name: settings[name] for name in names if settings.get(name) is not None}
