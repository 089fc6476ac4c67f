"""Drawing a saved PNG again: what its recipe decides, what may still be chosen, what is no recipe."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from star_core.pictures import Recipe, read_recipe, save_png

RECIPE = Recipe("cat", "", 2, 0, "top_k 5", (16, 16), "tiny")


@pytest.fixture
def drawn(tmp_path):
    """A PNG with a recipe of the tiny model."""
    save_png(Image.new("RGB", (16, 16)), tmp_path / "drawn.png", RECIPE)
    return tmp_path / "drawn.png"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("sun",), "prompts"),
        (("--prompts-file", "a.txt"), "--prompts-file"),
        (("--negative", ""), "--negative"),
        (("--seed", 0), "--seed"),
        (("--count", 1), "--count"),
        (("--schedule", "top-k"), "--schedule"),
        (("--size", "16x16"), "--size"),
        (("--dtype", "float32"), "--dtype"),
        (("--int8",), "--int8 or --fp8"),
        (("--fp8",), "--int8 or --fp8"),
        (("--graphs",), "--graphs"),
        (("--packed",), "--packed"),
        (("--size", "16x16", "--seed", 3), "--seed, --size"),
    ],
)
def test_what_a_recipe_decides_is_refused_beside_it(sample, drawn, tmp_path, arguments, named):
    code, _, error = sample("--recipe", drawn, *arguments, "--out", tmp_path / "again.png")
    assert (code, error) == (2, f"star_core: --recipe decides these itself, leave them out: {named}\n")
    assert not (tmp_path / "again.png").exists()


def test_beside_a_recipe_one_still_chooses_how_it_is_computed_and_where_it_goes(sample, drawn, tmp_path):
    chosen = ["--strip", "--low-memory", "--batch", 1, "--folder", tmp_path / "folder"]
    assert sample("--recipe", drawn, *chosen)[0] == 0
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "again-drawn.png",
        "again-drawn-scales.png",
    }
    assert read_recipe(tmp_path / "folder" / "again-drawn.png").seed == RECIPE.seed


def test_nothing_that_exists_is_overwritten_unasked(sample, drawn, tmp_path):
    renamed, folder = tmp_path / "drawn.jpg", tmp_path / "folder"
    renamed.write_bytes(drawn.read_bytes())
    for _ in range(2):
        assert sample("--recipe", renamed, "--folder", folder)[0] == 0
    assert {path.name for path in folder.iterdir()} == {"again-drawn.png", "again-drawn-2.png"}
    (folder / "sun-s0-0-scales.png").write_bytes(b"an earlier strip")
    assert sample("sun", "--strip", "--folder", folder)[0] == 0
    assert (folder / "sun-s0-0-scales.png").read_bytes() == b"an earlier strip"
    assert (folder / "sun-s0-0-2-scales.png").exists()


def test_a_picture_that_cannot_be_written_whole_leaves_the_one_before(sample, drawn, monkeypatch):
    def full(self, file, **options):
        Path(file).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    before = drawn.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        code, _, error = sample("--recipe", drawn, "--out", drawn)
    assert code == 2
    assert "No space left" in error
    assert drawn.read_bytes() == before


def test_a_folder_that_cannot_be_had_is_told_before_anything_is_drawn(sample, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("star_core.sample.load_for", lambda args: pytest.fail("a model was loaded"))
    code, _, error = sample("sun", "--folder", tmp_path / "file")
    assert (code, error.count("\n")) == (2, 1)
    assert f"{tmp_path / 'file'}: can be no folder for pictures" in error


def test_a_recipe_s_picture_has_one_place(sample, drawn, tmp_path):
    code, _, error = sample("--recipe", drawn, "--out", tmp_path / "a.png", "--folder", tmp_path)
    assert code == 2
    assert "--out and --folder exclude each other" in error


@pytest.mark.parametrize(
    ("recipe", "complaint"),
    [
        (Recipe("cat", "", 2, 0, "top_k 5", (16, 16), "huge"), "drawn by huge, this checkpoint is tiny"),
        (Recipe("cat", "", 2, 0, "top_k 5", (20, 20), "tiny"), "tiny cannot draw 20x20"),
        (Recipe("cat", "", 2, 0, "banana", (16, 16), "tiny"), "'banana' is neither a preset"),
        (Recipe("cat", "", 2, 0, "top_k 5", (16, 16), 5), "says model 5, which is not a text"),
    ],
)
def test_a_recipe_that_cannot_be_drawn_is_named(sample, tmp_path, recipe, complaint):
    save_png(Image.new("RGB", (4, 4)), tmp_path / "odd.png", recipe)
    code, _, error = sample("--recipe", tmp_path / "odd.png", "--out", tmp_path / "b.png")
    assert code == 2
    assert error.startswith(f"star_core: {tmp_path / 'odd.png'}: ")
    assert complaint in error
    assert error.count("\n") == 1


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    ("side", "text"),
    [(60_000, b""), (4, chunk(b"zTXt", b"star\0\0" + zlib.compress(b"a" * 5_000_000)))],
    ids=["a picture of 3.6 billion pixels", "a text of 5 MB"],
)
def test_a_picture_that_would_fill_the_memory_is_refused(sample, tmp_path, side, text):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    whole = [b"\x89PNG\r\n\x1a\n", head, text, chunk(b"IDAT", b""), chunk(b"IEND", b"")]
    (tmp_path / "bomb.png").write_bytes(b"".join(whole))
    code, _, error = sample("--recipe", tmp_path / "bomb.png", "--out", tmp_path / "b.png")
    assert code == 2
    assert error.startswith(f"star_core: {tmp_path / 'bomb.png'}: not a picture that can be opened")
    assert error.count("\n") == 1
