"""The command line, on a tiny checkpoint that the tests write themselves."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from star_core import eight_bit, slices, star, vqvae
from star_core.__main__ import _say, main
from star_core.model_files import quoted
from star_core.packed import has_bfloat16_products
from star_core.pictures import Recipe, read_recipe, save_png

ROOT = Path(__file__).parents[2]


def pixels(path):
    return list(Image.open(path).convert("RGB").tobytes())


def test_a_prompt_becomes_a_picture_of_the_trained_size(sample, tmp_path):
    code, out, _ = sample("a red apple", "--seed", 1, "--out", tmp_path / "a.png")
    assert code == 0
    assert out.strip() == str(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (16, 16)


def test_the_same_seed_draws_the_same_picture_and_another_seed_another(sample, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert sample("cat", "--seed", seed, "--out", tmp_path / f"{name}.png")[0] == 0
    assert pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")
    assert pixels(tmp_path / "a.png") != pixels(tmp_path / "c.png")


def test_a_picture_is_drawn_again_from_its_own_recipe(sample, tmp_path):
    folder = tmp_path / "many"
    assert (
        sample("cat", "dog", "--count", 2, "--seed", 9, "--schedule", "demo-1024", "--folder", folder)[0] == 0
    )
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 4
    for picture in pictures:
        again = tmp_path / "again.png"
        assert sample("--recipe", picture, "--out", again)[0] == 0
        assert pixels(again) == pixels(picture)
        assert read_recipe(again) == read_recipe(picture)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_8_bit_weights_are_loaded_and_the_recipe_knows(sample, tmp_path, monkeypatch, name):
    loads, load = [], star.load
    monkeypatch.setattr(star, "load", lambda *a, **k: loads.append(load(*a, **k)) or loads[-1])
    paths = {kind: tmp_path / f"{kind}.png" for kind in ("exact", "small", "again")}
    assert sample("cat", "--seed", 2, "--out", paths["exact"])[0] == 0
    assert sample("cat", "--seed", 2, f"--{name}", "--out", paths["small"])[0] == 0
    assert sample("--recipe", paths["small"], "--out", paths["again"])[0] == 0
    assert pixels(paths["again"]) == pixels(paths["small"])
    assert read_recipe(paths["small"]).eight_bit == name
    assert read_recipe(paths["again"]).eight_bit == name
    assert read_recipe(paths["exact"]).eight_bit is None
    rounded = [isinstance(each.transformer.word_embed, eight_bit.FORMATS[name]) for each in loads]
    assert rounded == [False, True, True]


def test_int8_and_fp8_exclude_each_other(sample, capsys):
    with pytest.raises(SystemExit, match="2"):
        sample("cat", "--int8", "--fp8")
    assert "--fp8: not allowed with argument --int8" in capsys.readouterr().err


@pytest.mark.parametrize("bytes_", [True, False])
def test_an_older_recipe_says_whether_weights_were_bytes(sample, tmp_path, bytes_):
    recipe = dataclasses.asdict(Recipe("cat", "", 2, 0, "top_k 5", (16, 16), "tiny"))
    del recipe["eight_bit"]
    older = Recipe.from_json(json.dumps({**recipe, "int8": bytes_}))
    assert older.eight_bit == ("int8" if bytes_ else None)
    save_png(Image.new("RGB", (16, 16)), tmp_path / "older.png", older)
    assert sample("--recipe", tmp_path / "older.png", "--out", tmp_path / "again.png")[0] == 0
    assert read_recipe(tmp_path / "again.png").eight_bit == older.eight_bit


def test_low_memory_draws_the_same_picture_in_strips(sample, tmp_path, monkeypatch):
    whole, sliced = tmp_path / "whole.png", tmp_path / "sliced.png"
    loads, load = [], star.load
    monkeypatch.setattr(star, "load", lambda *a, **k: loads.append(k["low_memory"]) or load(*a, **k))
    assert sample("cat", "--seed", 2, "--out", whole)[0] == 0
    monkeypatch.setitem(slices.STRIP, "cpu", 64)
    taken = []
    original = slices.norm_silu_conv
    monkeypatch.setattr(vqvae, "norm_silu_conv", lambda *a, **k: taken.append(1) or original(*a, **k))
    assert sample("cat", "--seed", 2, "--low-memory", "--out", sliced)[0] == 0
    assert taken
    assert loads == [False, True]
    assert max(abs(a - b) for a, b in zip(pixels(whole), pixels(sliced), strict=True)) <= 1


def test_a_limit_of_gpu_memory_wants_a_gpu(sample, tmp_path):
    code, _, error = sample("cat", "--device", "cpu", "--gpu-memory", 6, "--out", tmp_path / "a.png")
    assert code == 2
    assert "gpu_memory is for a GPU" in error


@pytest.mark.parametrize("amount", ["nan", "inf", "0", "-3", "abc", "1e305"])
def test_an_amount_of_memory_that_is_none_is_refused(amount, tmp_path):
    command = [sys.executable, "-m", "star_core", "sample", "cat", "--gpu-memory", amount]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "a.png")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "give gigabytes" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_with_a_precision_that_is_none_is_refused(sample, tmp_path):
    path = tmp_path / "odd.png"
    save_png(Image.new("RGB", (4, 4)), path, Recipe("a", "", 1, 0, "top-k", (16, 16), "tiny", "load"))
    code, _, error = sample("--recipe", path, "--out", tmp_path / "b.png")
    assert code == 2
    assert "dtype 'load'" in error


def test_packed_weights_are_refused_or_part_of_the_recipe(sample, tmp_path, monkeypatch):
    code, _, error = sample("apple", "--packed", "--device", "cpu", "--out", tmp_path / "a.png")
    assert code == 2
    assert "choose --dtype bfloat16" in error
    if not has_bfloat16_products():
        pytest.skip("this processor multiplies no bfloat16: packed weights are not run")
    bfloat16 = ["--dtype", "bfloat16", "--device", "cpu"]
    assert sample("apple", *bfloat16, "--packed", "--out", tmp_path / "a.png")[0] == 0
    assert read_recipe(tmp_path / "a.png").packed
    assert sample("--recipe", tmp_path / "a.png", "--device", "cpu", "--out", tmp_path / "b.png")[0] == 0
    assert read_recipe(tmp_path / "b.png") == read_recipe(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    # On a processor that cannot it is drawn as near as can be.
    monkeypatch.setattr("star_core.packed.has_bfloat16_products", lambda: False)
    assert sample("--recipe", tmp_path / "a.png", "--device", "cpu", "--out", tmp_path / "c.png")[0] == 0
    assert not read_recipe(tmp_path / "c.png").packed


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is drawn with graphs again")
def test_a_picture_drawn_with_graphs_is_drawn_again_without_a_gpu(sample, tmp_path):
    assert sample("cat", "--seed", 2, "--out", tmp_path / "a.png")[0] == 0
    recipe = dataclasses.replace(read_recipe(tmp_path / "a.png"), graphs=True)
    save_png(Image.open(tmp_path / "a.png"), tmp_path / "graphs.png", recipe)
    assert sample("--recipe", tmp_path / "graphs.png", "--out", tmp_path / "b.png")[0] == 0
    assert pixels(tmp_path / "b.png") == pixels(tmp_path / "a.png")
    assert not read_recipe(tmp_path / "b.png").graphs


def test_prompts_come_from_a_file_too(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("sun\n\nmoon\n", encoding="utf-8")
    code, out, _ = sample("--prompts-file", tmp_path / "prompts.txt", "--folder", tmp_path / "out")
    assert code == 0
    assert [Path(line).name for line in out.splitlines()] == ["sun-s0-0.png", "moon-s0-0.png"]


def test_a_byte_order_mark_is_no_part_of_a_prompt_or_a_schedule(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffsun\r\n", encoding="utf-8", newline="")
    (tmp_path / "schedule.txt").write_text("\ufefftop_k 5", encoding="utf-8")
    files = ["--prompts-file", tmp_path / "prompts.txt", "--schedule", tmp_path / "schedule.txt"]
    assert sample(*files, "--out", tmp_path / "marked.png")[0] == 0
    assert sample("sun", "--schedule", "top_k 5", "--out", tmp_path / "plain.png")[0] == 0
    assert read_recipe(tmp_path / "marked.png") == read_recipe(tmp_path / "plain.png")


def test_a_line_of_prompts_ends_at_a_line_feed_alone(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\u2028sun\nblue\x0cmoon\n", encoding="utf-8")
    assert sample("--prompts-file", tmp_path / "prompts.txt", "--folder", tmp_path)[0] == 0
    prompts = {read_recipe(path).prompt for path in tmp_path.glob("*.png")}
    assert prompts == {"red\u2028sun", "blue\x0cmoon"}


@pytest.mark.parametrize("option", ["--prompts-file", "--schedule"])
@pytest.mark.parametrize("content", [b"caf\xe9", "sun".encode("utf-16")])
def test_a_file_that_is_no_utf_8_is_named(sample, tmp_path, option, content):
    (tmp_path / "odd.txt").write_bytes(content)
    code, _, error = sample("sun", option, tmp_path / "odd.txt", "--folder", tmp_path)
    assert code == 2
    assert error.startswith(f"star_core: {tmp_path / 'odd.txt'}: cannot be read as UTF-8 text")
    assert error.count("\n") == 1


def test_a_folder_in_a_picture_s_place_is_refused_before_drawing(sample, tmp_path):
    (tmp_path / "a-scales.png").mkdir()
    for arguments in (("--out", tmp_path / "a-scales.png"), ("--out", tmp_path / "a.png", "--strip")):
        code, _, error = sample("sun", *arguments)
        assert code == 2
        assert "a-scales.png: is a folder" in error
    assert not (tmp_path / "a.png").exists()


def test_nothing_that_exists_is_overwritten_in_a_folder(sample, tmp_path):
    for _ in range(2):
        assert sample("sun", "--folder", tmp_path)[0] == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["sun-s0-0-2.png", "sun-s0-0.png"]


def test_a_strip_shows_the_picture_after_each_scale(sample, tmp_path):
    assert sample("sun", "--strip", "--out", tmp_path / "sun.png")[0] == 0
    strip = Image.open(tmp_path / "sun-scales.png")
    assert strip.size == (3 * 16 + 2 * 4, 16)
    last = strip.crop((40, 0, 56, 16)).convert("RGB")
    assert list(last.tobytes()) == pixels(tmp_path / "sun.png")


def test_another_aspect_ratio_has_its_own_maps(sample, tmp_path):
    assert sample("sun", "--size", "32x8", "--out", tmp_path / "wide.png")[0] == 0
    assert Image.open(tmp_path / "wide.png").size == (32, 8)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to draw"),
        (("sun", "--size", "64"), "--size is written as"),
        (("sun", "--size", "640x480"), "cannot draw 640x480"),
        (("sun", "--count", "0"), "--count must be at least 1"),
        (("sun", "--seed", "-1"), "--seed lies between"),
        (("sun", "moon", "--out", "x.png"), "--out is for one picture"),
        (("sun", "--out", "x.jpg"), "written as .png"),
        (("sun", "--schedule", "top_k banana"), "'banana' is not a whole number"),
        (("sun", "--schedule", "banana"), "neither a preset"),
        (("sun", "--schedule", "maps 1 2 3 4; top_k 5"), "the schedule has 4 scales"),
        (("sun", "--schedule", "é" * 190), "neither a preset"),
        (("sun", "--device", "abacus"), "cannot be used here"),
        (("sun", "--device", "meta"), "'meta' cannot be used here"),
        (("sun", "--device", "hpu"), "cannot be used here"),
        (("caf\udce9",), r"'caf\udce9' is no text"),
        (("sun", "--negative", "caf\udce9"), r"'caf\udce9' is no text"),
        (("sun", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("sun", "--batch", "2", "--gpu-memory", "5"), "leave --batch out"),
        (("sun", "--out", "a.png", "--folder", "b"), "--out and --folder exclude each other"),
        (("sun", "--folder", "a" * 300), "File name too long"),
        (("sun", "--preset", "star-256-d16"), "contradicts"),
        (("--recipe", "nothing.png"), "not a picture that can be opened"),
        (("--prompts-file", "nothing.txt"), "cannot be read"),
        (("sun", "--vqvae", "nothing.safetensors"), "no VQ-VAE there"),
    ],
)
def test_a_mistake_is_one_message_with_exit_code_2_and_no_picture(
    checkpoint, capsys, tmp_path, monkeypatch, arguments, complaint
):
    monkeypatch.chdir(tmp_path)
    options = ["--checkpoint", str(checkpoint), "--quiet"]
    if "--device" not in arguments:
        options += ["--device", "cpu"]
    assert main(["sample", *arguments, *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def failing(error):
    def run(plan):
        raise error

    return run


def test_an_error_of_a_named_file_is_one_line(sample, monkeypatch):
    refused = PermissionError(13, "Permission denied", "/secret/star.safetensors")
    monkeypatch.setattr("star_core.sample.run_sample", failing(refused))
    code, _, error = sample("sun")
    assert (code, error) == (2, "star_core: /secret/star.safetensors: Permission denied\n")
    monkeypatch.setattr("star_core.sample.run_sample", failing(OSError("no file's")))
    with pytest.raises(OSError, match="no file's"):
        sample("sun")


@pytest.mark.parametrize(
    "full",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAdvice, a page of it."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_too_little_memory_is_one_line_with_the_remedy(sample, monkeypatch, full):
    monkeypatch.setattr("star_core.sample.run_sample", failing(full))
    code, _, error = sample("sun")
    assert code == 2
    assert error.startswith("star_core: out of memory")
    assert error.count("\n") == 1
    assert all(option in error for option in ("--batch", "--low-memory", "--gpu-memory"))


def test_a_mistake_of_ours_keeps_its_traceback(sample, monkeypatch):
    monkeypatch.setattr("star_core.sample.run_sample", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        sample("sun")


def test_a_missing_checkpoint_is_named(capsys):
    assert main(["sample", "sun", "--checkpoint", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


def test_inspect_says_what_every_file_of_a_folder_is(checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "tiny: 16x16 pixels" in out
    assert "VQ-VAE" in out
    assert "CLIP text encoder" in out


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x"])
def test_inspect_says_that_a_file_is_not_there(name, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / name)]) == 2
    assert f"{tmp_path / name}: no such file or folder" in capsys.readouterr().err


def test_a_command_s_path_is_quoted_as_the_system_s_shell_takes_it(monkeypatch):
    plain, spaced = Path("a/b.pth"), Path("a folder/it's.pth")
    assert (quoted(plain), quoted(spaced)) == ("a/b.pth", "'a folder/it'\"'\"'s.pth'")
    with monkeypatch.context() as patch:
        patch.setattr("os.name", "nt")
        assert quoted(spaced) == f'"{spaced}"'


def test_inspect_sends_a_pickle_to_convert(tmp_path, capsys):
    pickled = tmp_path / "var" / "d16 256.pth"
    pickled.parent.mkdir()
    pickled.write_bytes(b"x")
    for place in (pickled, pickled.parent, tmp_path):
        assert main(["inspect", str(place)]) == 2
        error = capsys.readouterr().err
        assert str(place) in error
        assert f"python -m star_core convert {quoted(pickled)} --out FOLDER" in error
    pickled.unlink()
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"star_core: {tmp_path}: no safetensors file in it\n"


def test_parity_prints_a_row_per_quantity_and_exits_0(capsys):
    assert main(["parity", str(ROOT / "tests" / "fixtures" / "public.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "greedy_tokens" in out
    assert "all quantities hold" in out


def test_help_says_how_far_a_negative_prompt_reaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["sample", "--help"])
    assert "the start token and the causal sampler alone" in " ".join(capsys.readouterr().out.split())


def test_help_inspect_and_mistakes_do_not_wait_for_torch_or_transformers():
    script = (
        "import sys; from star_core.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('MODULES', [m for m in ('transformers', 'torch') if m in sys.modules])"
    )
    for arguments in (["--help"], ["sample", "--nonsense"], ["inspect"], ["inspect", "nowhere"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "MODULES []", arguments


def test_mistakes_about_the_model_do_not_wait_for_transformers(checkpoint, tmp_path):
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", Recipe("a", "", 1, 0, "top-k", (16, 16), "huge"))
    mistakes = {
        "cannot draw 63x63": ["sun", "--size", "63x63"],
        "neither a preset": ["sun", "--schedule", "nosuch"],
        "2 values for 3 scales": ["sun", "--schedule", "top_k 5 5"],
        "drawn by huge": ["--recipe", str(tmp_path / "a.png")],
        "graphs are CUDA's": ["sun", "--graphs"],
        "no vocab.json": ["sun", "--tokenizer", str(tmp_path)],
        "no tokenizer found": ["sun", "--text-encoder", str(tmp_path / "lonely.safetensors")],
    }
    shutil.copy(checkpoint / "text_encoder" / "model.safetensors", tmp_path / "lonely.safetensors")
    script = (
        "import json, sys; from star_core.__main__ import main\n"
        "for line in json.loads(sys.argv[1]): assert main(line) == 2\n"
        "assert 'transformers' not in sys.modules\n"
    )
    common = ["--checkpoint", str(checkpoint), "--device", "cpu", "--folder", str(tmp_path / "none")]
    lines = json.dumps([["sample", *mistake, *common] for mistake in mistakes.values()])
    done = subprocess.run(
        [sys.executable, "-c", script, lines], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(complaint in done.stderr for complaint in mistakes), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_any_more_ends_in_silence(unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "star_core", "inspect"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, env=environment)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_what_standard_output_s_encoding_lacks_is_escaped(sample, tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), "cp1252")
    folder = tmp_path / "\u56fe"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert sample("cat", "--count", 2, "--batch", 2, "--folder", folder)[0] == 0
    assert output.buffer.getvalue().count(b"\\u56fe") == 2
    # Where the system writes a file name's own bytes, they stay them.
    with monkeypatch.context() as patch:
        kept = io.TextIOWrapper(io.BytesIO(), "ascii", errors="surrogateescape")
        patch.setattr(sys, "stdout", kept)
        _say("caf\udce9")
    assert kept.buffer.getvalue() == b"caf\xe9\n"
    assert len(list(folder.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's redirection")
def test_a_process_without_standard_output_does_its_work():
    ended = subprocess.run(
        f'"{sys.executable}" -m star_core inspect >&-', cwd=ROOT, shell=True, stderr=subprocess.PIPE
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("command", "code", "said", "farewell"),
    [
        ("inspect", 0, "star-emoji", False),
        ("parity nowhere", 2, "star_core: nowhere", False),
        ("train model --star nowhere --vqvae nowhere --out nowhere", 2, "star_core: nowhere", True),
    ],
)
def test_a_command_that_is_done_does_not_wait_for_python_to_take_itself_apart(command, code, said, farewell):
    program = (
        "import atexit, gc, runpy, sys\n"
        "atexit.register(print, 'farewell')\n"
        "gc.callbacks.append(lambda phase, _: phase == 'stop' and print('collected', file=sys.stderr))\n"
        f"sys.argv = ['star_core', *{command.split()!r}]\n"
        "runpy.run_module('star_core', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert ("farewell" in done.stdout) == farewell
    # torch is no garbage: looked through at every few hundred objects, it is so some hundred times.
    assert (done.stderr.count("collected") > 100) == farewell


def test_a_profiler_has_the_last_word():
    command = [sys.executable, "-m", "cProfile", "-m", "star_core", "inspect"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "function calls" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_finds_no_room_is_told_in_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "star_core", "inspect"]
        ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (2, "star_core: standard output: No space left on device\n")
