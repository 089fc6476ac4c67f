"""From pictures to a folder that draws: the stages put together, one after the other, by one command."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from star_core.__main__ import main
from star_core.key_tables import SAMPLER_PREFIX, STAR_KEYS
from star_core.model_files import SHIPPED
from star_core.request import Options
from star_core.star import load
from star_core.stored import METADATA_KEY, resolve_config
from star_core.text_encoder import TextEncoder
from star_core.training import all_stages, assemble, causal_sampler, decoder, tokenizer, transformer
from star_core.training.soup import Soup
from star_core.weights import TensorFile, save_tensors

STAGES = (tokenizer, transformer, causal_sampler, decoder)
OPTIONS = {
    "--tokenizer": "--batch 4 --channels 8 --multipliers 1 1 1 --codebook 32 --code-width 4",
    "--transformer": "--batch 4 --depth 1 --width 64 --variants 1",
    "--causal-sampler": "--batch 4 --sampler-depth 1 --variants 1",
    "--decoder": "--batch 4 --head-start 1",
}


@pytest.fixture
def train_all(
    data: Path,
    distance: nn.Module,
    read_once: Callable[..., TextEncoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    for stage in (transformer, causal_sampler, assemble):
        monkeypatch.setattr(stage, "load_text_encoder", read_once)
    for stage in (tokenizer, decoder, all_stages):
        monkeypatch.setattr(stage, "asset_path", lambda name, folder: folder)
    for stage in (tokenizer, decoder):
        monkeypatch.setattr(stage, "load_lpips", lambda path, kind: distance)
    monkeypatch.setattr(decoder, "load_efficientnet", lambda folder: distance)
    # Two steps each: how well they train is other tests' affair.
    monkeypatch.setattr(all_stages, "FOREVER", 2)

    def run(*options: str) -> str:
        parser = argparse.ArgumentParser()
        all_stages.add_arguments(parser)
        given = ["--run", str(tmp_path / "run"), "--data", str(data), "--size", "16", "--device", "cpu"]
        given += ["--sides", "1", "2", "4", "--minutes", "9", "--name", "mine"]
        for name, text in OPTIONS.items():
            given += [name, text]
        return all_stages.run(parser.parse_args([*given, *options]))

    return run


def exported(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were run, in order."""
    names: list[str] = []
    for stage in STAGES:
        whole, name = stage.run, stage.__name__.rpartition(".")[2]
        monkeypatch.setattr(
            stage, "run", lambda args, whole=whole, name=name: (names.append(name), whole(args))
        )
    return names


def test_one_command_trains_a_model_that_draws(train_all: Callable, tmp_path: Path, ran: list[str]):
    said = train_all("--schedule", "top_k 8; guidance 2")
    assert ran == ["tokenizer", "transformer", "causal_sampler", "decoder"]
    model = tmp_path / "run" / "model"
    assert str(model) in said
    star = load(model)
    assert star.config.name == "mine"
    assert star.config.schedule == "top_k 8; guidance 2"
    assert star.config.transformer.has_sampler
    assert star.draw(["a thing"], options=Options(seed=1)).shape == (1, 3, 16, 16)
    before = exported(tmp_path)
    ran.clear()
    assert train_all("--schedule", "top_k 8; guidance 2") == said
    assert not ran, "a stage that has ended is not run again"
    assert exported(tmp_path) == before


def test_another_model_needs_another_run(train_all: Callable, tmp_path: Path, ran: list[str]):
    train_all()
    before, _ = exported(tmp_path), ran.clear()
    for other in (["--minutes", "30"], ["--name", "other"], ["--schedule", "top_k 8"], ["--seed", "1"]):
        with pytest.raises(ValueError, match="begun with other options.*another --run"):
            train_all(*other)
    assert not ran
    assert exported(tmp_path) == before


class Killed(BaseException):
    """As a kill, no handler of errors sees it."""


@pytest.mark.parametrize("moment", ["before a stage", "within", "while exporting", "before the mark", "model"])
def test_a_killed_run_goes_on_where_it_was(
    moment: str, train_all: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before a stage":
            patch.setattr(causal_sampler, "run", killed)
        elif moment == "within":
            patch.setattr(transformer, "loss_of", killed)
        elif moment == "while exporting":
            patch.setattr(
                "star_core.weights.save_file", lambda t, part, m: (part.write_bytes(b"half"), killed())
            )
        elif moment == "before the mark":
            touch = Path.touch
            patch.setattr(Path, "touch", lambda p: killed() if p.name == all_stages.DONE else touch(p))
        else:
            patch.setattr(assemble, "save_tensors", killed)
        with pytest.raises(Killed):
            train_all()
    before = exported(tmp_path / "run")
    assert not any("model" in name and "part" not in name for name in before)
    assert (moment == "while exporting") == (not before)
    train_all()
    after = exported(tmp_path / "run")
    assert {name: after[name] for name in before if "part" not in name} == {
        name: changed for name, changed in before.items() if "part" not in name
    }
    star = load(tmp_path / "run" / "model")
    assert star.config.schedule == "top-k"
    assert star.draw(["a thing"]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--schedule", "top_k 8*2"], "top_k"),
        (["--schedule", "nothing"], "nothing"),
        (["--schedule", "smooth"], "draws smooth"),
        (["--data", "none"], "none"),
        (["--text", "none"], "none"),
        (["--text", str(SHIPPED / "text_encoder")], "tokenizer"),
        (["--device", "bogus"], "--device bogus"),
        (["--minutes", "inf"], "never end"),
        (["--run", str(SHIPPED / "ATTRIBUTION.md")], "can be no folder"),
        (["--transformer", "--batch many"], "--transformer: argument --batch"),
        (["--transformer", "--corruption 2"], "--transformer: argument --corruption"),
        (["--sides", "4"], "2 scales or more"),
        (["--sides", "1", "2", "8"], "--sides 1 2 8: of pictures of 16 px"),
        (["--size", "8"], "no 8 px pictures"),
        (["--tokenizer", "--channels 30"], "30"),
        (["--transformer", "--width 32"], "--width 32: heads have 64 each"),
        (["--decoder", "--batch 20000"], "--decoder: .* pictures do not fill a batch of 20000"),
        (["--decoder", "--headstart 1"], "--decoder: unrecognized arguments"),
        (["--decoder", "--schedule 'top"], "--decoder: No closing quotation"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    options: list[str], said: str, train_all: Callable, tmp_path: Path
):
    with pytest.raises(ValueError, match=said):
        train_all(*options)
    assert not exported(tmp_path)


def test_a_missing_compiler_is_told_before_anything_is_trained(
    train_all: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(function: object) -> object:
        raise RuntimeError("no compiler is found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"compiled here \(no compiler is found\): .*--no-compile"):
        train_all("--transformer", OPTIONS["--transformer"] + " --compile")
    assert not exported(tmp_path)
    train_all("--transformer", OPTIONS["--transformer"] + " --compile --no-compile")


def test_time_is_shared_and_a_gpu_gets_its_batches():
    assert sum(stage.share for stage in all_stages.STAGES) == pytest.approx(1)
    parser = argparse.ArgumentParser()
    all_stages.add_arguments(parser)
    for device, batch, workers in (("cpu", "16", False), ("cuda", "128", True)):
        args = parser.parse_args(["--run", "x", "--minutes", "10", "--device", device])
        plan = {stage.name: options for stage, options in all_stages.plan(args)}
        options = plan["tokenizer"]
        assert options[options.index("--batch") + 1] == batch
        assert options[options.index("--time-limit") + 1] == "180"
        assert ("--workers" in plan["transformer"]) == workers
        options = plan["decoder"]
        assert options[options.index("--matching") + 1] == "0.1"
        assert ("--redrawn-pictures" in options) == (device == "cpu")


def test_a_network_that_cannot_be_had_is_missed_before_anything_is_trained(train_all, ran, monkeypatch):
    def offline(name: str, folder: Path) -> Path:
        raise ValueError(f"no network to fetch {name} by")

    monkeypatch.setattr(all_stages, "asset_path", offline)
    with pytest.raises(ValueError, match="no network to fetch efficientnet by"):
        train_all()
    assert ran == []


@pytest.fixture
def shipped() -> dict[str, Path]:
    return {"--star": SHIPPED / "star.safetensors", "--vqvae": SHIPPED / "vqvae.safetensors"}


def train_model(files: dict[str, Path], out: Path, *options: str) -> int:
    given = [str(part) for pair in files.items() for part in pair]
    return main(["train", "model", *given, "--out", str(out), *options])


def test_a_model_is_put_together_with_a_name_and_a_schedule(
    shipped: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = "top_k 600; top_p 0.5*4 0.1*6; guidance 0 1 2 3*6 1"
    assert train_model(shipped, tmp_path / "m", "--name", "other", "--schedule", own) == 0
    assert "other" in capsys.readouterr().out
    ours, theirs = load(tmp_path / "m"), load()
    assert (ours.config.name, ours.config.schedule) == ("other", own)
    schedule = theirs.config.schedule
    drawn = ours.draw(["a red apple"], options=Options(seed=3, schedule=schedule))
    assert torch.equal(drawn, theirs.draw(["a red apple"], options=Options(seed=3)))


@pytest.mark.parametrize(
    "wrong", ["schedule", "no file", "swapped", "text", "flat text", "full", "a file", "below"]
)
def test_what_does_not_belong_together_is_refused_and_nothing_is_written(
    wrong: str, shipped: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, options, said = tmp_path / "m", [], ""
    if wrong == "schedule":
        options, said = ["--schedule", "top_k 600*2"], "top_k"
    elif wrong == "no file":
        shipped["--vqvae"], said = tmp_path / "none.safetensors", "no such file"
    elif wrong == "swapped":
        shipped["--star"], said = shipped["--vqvae"], "not a STAR transformer"
    elif wrong == "text":
        options, said = ["--text", str(tmp_path)], str(tmp_path)
    elif wrong == "flat text":
        options, said = ["--text", str(SHIPPED / "text_encoder")], "text_encoder"
    elif wrong == "full":
        assemble.assemble(*shipped.values(), SHIPPED, out)
        said = "a new folder"
    else:
        (tmp_path / "file").write_text("")
        out, said = tmp_path / "file" / ("m" if wrong == "below" else ""), "cannot be written"
    before = exported(tmp_path)
    assert train_model(shipped, out, *options) == 2
    assert said in capsys.readouterr().err
    assert exported(tmp_path) == before


def write_other_end(path: Path, factor: float, **sizes: object) -> Path:
    """Write the shipped file as another run's end: its transformer times a factor, its sampler times 7."""
    first = TensorFile(SHIPPED / "star.safetensors")
    config = resolve_config(first, None)
    sampler = {name for name in first if (STAR_KEYS.ours(name) or "").startswith(SAMPLER_PREFIX)}
    tensors = {name: first[name] * (7 if name in sampler else factor) for name in first}
    if sizes.get("sampler_depth") == 0:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in sampler}
    changed = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **sizes))
    save_tensors(path, tensors, {METADATA_KEY: changed.to_json()})
    return path


def test_a_model_can_be_the_mean_of_transformers_that_were_trained_from_one_another(
    shipped: dict[str, Path], tmp_path: Path
):
    bare = write_other_end(tmp_path / "bare", 3, sampler_depth=0)
    whole = write_other_end(tmp_path / "whole", 5)
    assert train_model(shipped, tmp_path / "m", "--mean-with", str(bare), str(whole)) == 0
    first, mean = TensorFile(shipped["--star"]), TensorFile(tmp_path / "m" / "star.safetensors")
    assert list(mean) == list(first)
    others = set(TensorFile(bare))
    assert 0 < len(others) < len(first)
    for name in first:
        assert mean[name].dtype == first[name].dtype
        if name in others:
            torch.testing.assert_close(mean[name].float(), 3 * first[name].float(), rtol=0.01, atol=1e-6)
        else:
            assert torch.equal(mean[name], first[name]), f"{name} is the sampler's"


def test_without_others_a_soup_is_its_file_to_the_bit(tmp_path: Path):
    # A mean of negative zeros is a positive one.
    path = write_other_end(tmp_path / "zeros", -0.0)
    file, soup = TensorFile(path), Soup(path, [])
    assert all(torch.equal(soup[name].view(torch.int16), file[name].view(torch.int16)) for name in file)


@pytest.mark.parametrize("wrong", ["another kind", "no file", "sizes", "gaps", "shape"])
def test_what_has_no_mean_is_refused(
    wrong: str, shipped: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other, said = tmp_path / "other", "has no mean with"
    if wrong == "another kind":
        other, said = shipped["--vqvae"], "not a STAR transformer"
    elif wrong == "no file":
        said = "no such file"
    elif wrong == "sizes":
        write_other_end(other, 1, rope_extent=32.0)
        said = "rope_extent is 32.0 instead of"
    else:
        file = TensorFile(write_other_end(tmp_path / "whole", 1))
        tensors, name = dict(file), "blocks.1.ffn.fc1.weight"
        tensors[name] = tensors[name][:-1].clone()
        if wrong == "gaps":
            del tensors[name]
        save_tensors(other, tensors, file.metadata)
        said = f"{name} is missing or of another shape"
    assert train_model(shipped, tmp_path / "m", "--mean-with", str(other)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
