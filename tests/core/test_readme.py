"""The README's file guide is true: every file of the packages and benchmarks has its line."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"- `(?P<path>[^`]+)`: (?P<text>\S.*)")


def guide() -> list[tuple[str, str]]:
    """Return the (path, text) pairs of the README's section "File guide"."""
    whole = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## File guide\s*$(.*?)(?=^## |\Z)", whole, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section 'File guide'"
    items = [line for line in section.group(1).splitlines() if line.lstrip().startswith("- ")]
    found = [LINE.fullmatch(line.strip()) for line in items]
    wrong = [line for line, match in zip(items, found, strict=True) if match is None]
    assert not wrong, f"lines of the file guide read - `path`: text, not {wrong}"
    return [(match["path"], match["text"]) for match in found if match]


def files() -> set[str]:
    """Return the files of these folders; what the shipped model consists of stands under one folder."""
    rooms = ("star_core", "nodes", "benchmarks")
    every = (path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file())
    kept = (path.relative_to(ROOT) for path in every if "__pycache__" not in path.parts)
    return {path.as_posix() for path in kept if path.parts[1] != "demo"}


def test_every_file_is_named_once():
    named = Counter(path for path, _ in guide())
    assert not [path for path, times in named.items() if times > 1]
    assert not files() - set(named), "these files have no line in the file guide"


def test_every_line_names_a_file_that_is_there():
    assert not [path for path, _ in guide() if not (ROOT / path).exists()]


@pytest.mark.parametrize("folder", ["star_core/demo"])
def test_the_shipped_model_has_its_line(folder: str):
    assert any(path.rstrip("/") == folder or path.startswith(f"{folder}/") for path, _ in guide())
