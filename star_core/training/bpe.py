"""CLIP's byte-pair vocabulary, from OpenAI's merge list to the files that transformers reads.

The list (`bpe_simple_vocab_16e6.txt.gz`, MIT) carries more merges than CLIP uses. Token ids follow the
rule of OpenAI's `simple_tokenizer.py`: 256 bytes, the same 256 at the end of a word, one id per
merge in order, start and end of text.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

VOCABULARY = 49408
START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
MAX_TOKENS = 77
START_ID, END_ID = VOCABULARY - 2, VOCABULARY - 1

_MERGES = VOCABULARY - 2 * 256 - 2


def _ordered_bytes() -> list[int]:
    """Return the 256 bytes in CLIP's order of ids: printable Latin-1 first."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return shown + [code for code in range(256) if code not in shown]


def byte_symbols() -> dict[str, int]:
    """Return {symbol: byte} in CLIP's order of ids.

    Printable Latin-1 bytes stand for themselves; the other 68 have symbols from 256 on.
    """
    codes = _ordered_bytes()
    hidden = iter(range(256, 512))
    printable = set(codes[: 256 - 68])
    return {chr(code if code in printable else next(hidden)): code for code in codes}


def read_merges(source: Path) -> list[str]:
    """Return CLIP's 48,894 merges ("left right") from the gzipped list.

    Raises ValueError where the file is not that list.
    """
    try:
        lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not a gzipped text file ({error}); download it again") from error
    merges = lines[1 : 1 + _MERGES]
    if len(merges) < _MERGES or any(len(line.split(" ")) != 2 for line in merges):
        raise ValueError(
            f"{source}: not CLIP's list of at least {_MERGES} merges; download bpe_simple_vocab_16e6.txt.gz"
        )
    return merges


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Return {token: id} of the merges, START and END last."""
    symbols = list(byte_symbols())
    tokens = symbols + [symbol + WORD_END for symbol in symbols]
    tokens += [line.replace(" ", "") for line in merges]
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}


def token_texts(tokens: Iterable[str]) -> list[str]:
    """Return what each token spells, without the mark of a word's end; START and END spell nothing."""
    codes = byte_symbols()
    found = []
    for token in tokens:
        spelled = "" if token in (START, END) else token.removesuffix(WORD_END)
        found.append(bytes(codes[symbol] for symbol in spelled).decode("utf-8", "replace"))
    return found


def write_tokenizer(merges: list[str], folder: Path) -> Path:
    """Write vocab.json, merges.txt and the two configuration files into `folder`; return it.

    Padding is END, as in OpenAI's CLIP; the attention mask tells padding from the real end.
    """
    special = {
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": MAX_TOKENS,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary(merges), indent=None)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config, indent=2)
    _write_json(folder / "special_tokens_map.json", special, indent=2)
    return folder


def _write_json(path: Path, content: object, *, indent: int | None) -> None:
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators)
    path.write_text(text + "\n", encoding="utf-8")
