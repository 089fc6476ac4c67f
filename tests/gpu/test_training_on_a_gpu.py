"""Training stages whose steps are CUDA graphs, beside the same ones started kernel by kernel."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from star_core.model_files import SHIPPED
from star_core.quantizer import enlarged
from star_core.training import causal_sampler, decoder, tokenizer, transformer
from star_core.training.recorded import UNRECORDED, RecordedStep
from star_core.training.run import Average

SIDES = ["--sides", "1", "2", "4"]
SMALL = [
    "--channels",
    "8",
    "--multipliers",
    "1",
    "1",
    "1",
    "1",
    "--codebook",
    "32",
    "--code-width",
    "4",
    "--bfloat16",
]
STEPS = 12
LPIPS_FROM = 5
STAGES: dict[str, ModuleType] = {
    "tokenizer": tokenizer,
    "transformer": transformer,
    "causal_sampler": causal_sampler,
    "decoder": decoder,
}
NEAR = 0.25
"""How far recorded weights may end from started ones, as a share of how far both moved. A step that does
nothing once it is recorded ends 0.45 away or more; figures tell one that repeats a batch (on a CPU)."""


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch, distance: nn.Module) -> None:
    for stage in (tokenizer, decoder):
        monkeypatch.setattr(stage, "asset_path", lambda name, folder: folder)
        monkeypatch.setattr(stage, "load_lpips", lambda path, kind: distance)
    monkeypatch.setattr(tokenizer, "LPIPS_FROM", LPIPS_FROM)


class Trained:
    """A stage's run: its weights before and after, and what each step said."""

    def __init__(self, stage: ModuleType, run: Path, data: Path, device: str, *options: str) -> None:
        self.run = run
        self.figures: list[list[float]] = []
        parser = argparse.ArgumentParser()
        stage.add_arguments(parser)
        shared = ["--run", str(run), "--data", str(data), "--size", "32", "--device", device]
        shared += ["--steps", str(STEPS), "--batch", "6", "--save-every", "100", "--rate", "3e-3"]
        average, call = Average, RecordedStep.__call__

        def begun(network: nn.Module, keep: float) -> object:
            made = average(network, keep)
            self.before = {name: value.cpu().clone() for name, value in made.state.items()}
            return made

        def watched(step: RecordedStep, *batch: Tensor, **fixed: object) -> tuple[Tensor, ...]:
            figures = call(step, *batch, **fixed)
            self.figures.append([float(figure) for figure in figures])
            return figures

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("star_core.training.run.Average", begun)
            # No warm-up, under which ten steps would hardly move anything.
            patch.setattr("star_core.training.run.rate_at", lambda step, done, peak: peak)
            patch.setattr(RecordedStep, "__call__", watched)
            stage.run(parser.parse_args([*shared, *options]))
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        self.after = state["model"]

    def distance(self, other: dict[str, Tensor]) -> float:
        """Return how far the weights ended from others, in all."""
        apart = [(self.after[name].float() - value.float()).square().sum() for name, value in other.items()]
        return float(torch.stack(apart).sum().sqrt())


def options_of(stage: str, device: str, data: Path, folder: Path) -> list[str]:
    """Return a stage's options, and train what comes before it."""
    if stage == "tokenizer":
        return [*SMALL, *SIDES]
    first = Trained(tokenizer, folder / "tokens", data, device, *SMALL, *SIDES).run
    if stage == "decoder":
        return ["--tokenizer-run", str(first), *SIDES, "--adversarial", "0.5", "--head-start", "5"]
    text = ["--tokenizer-run", str(first), "--text", str(SHIPPED), "--bfloat16", "--corruption", "0.3"]
    small = ["--depth", "1", "--width", "64", "--variants", "3", *SIDES]
    if stage == "transformer":
        return [*text, *small, "--dropout", "0.1"]
    star = Trained(transformer, folder / "star", data, device, *text, *small).run
    return [*text, "--transformer-run", str(star), "--sampler-depth", "1"]


def assert_alike(ours: Trained, theirs: Trained) -> None:
    moved = theirs.distance(theirs.before)
    assert moved > 0
    assert ours.distance(theirs.after) <= NEAR * moved
    for step, (one, other) in enumerate(zip(ours.figures, theirs.figures, strict=True)):
        assert one == pytest.approx(other, rel=0.1, abs=0.02), f"step {step}"


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_steps_train_as_started_ones(stage, gpu, data, tmp_path, monkeypatch):
    options = options_of(stage, "cuda", data, tmp_path)
    recordings: list[object] = []
    record = RecordedStep._record

    def counted(self: RecordedStep, batch: object, fixed: object) -> object:
        recordings.append(fixed)
        return record(self, batch, fixed)

    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "_record", counted)
        recorded = Trained(STAGES[stage], tmp_path / "recorded", data, "cuda", *options)
    assert recordings, f"of {STEPS} steps the first {UNRECORDED} of each shape are not recorded"
    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage], "recorder_for", lambda device: None)
        started = Trained(STAGES[stage], tmp_path / "started", data, "cuda", *options)
    assert_alike(recorded, started)


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_run_goes_on_on_the_other_kind_of_device(stage, gpu, data, tmp_path):
    options = options_of(stage, "cpu", data, tmp_path)
    run = Trained(STAGES[stage], tmp_path / "run", data, "cpu", *options).run
    parser = argparse.ArgumentParser()
    STAGES[stage].add_arguments(parser)
    for number, device in enumerate(("cuda", "cpu"), start=1):
        more = ["--run", str(run), "--data", str(data), "--size", "32", "--batch", "6", "--device", device]
        STAGES[stage].run(parser.parse_args([*more, "--steps", str(STEPS * (1 + number)), *options]))
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        assert state["step"] == STEPS * (1 + number)
        assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize("before", [(1, 1), (3, 5)])
def test_maps_are_resized_as_on_a_cpu(before, gpu):
    codes = torch.randn(5, 8, *before)
    ours = enlarged(codes.to(gpu), (16, 12)).cpu()
    torch.testing.assert_close(ours, enlarged(codes, (16, 12)), atol=1e-5, rtol=1e-5)
