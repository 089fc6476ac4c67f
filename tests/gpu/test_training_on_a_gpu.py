"""Training stages whose steps are CUDA graphs, beside the same ones started kernel by kernel."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from star_core.quantizer import BATCH_OF_PRODUCTS, enlarged
from star_core.star import SHIPPED
from star_core.training import causal_sampler, decoder, tokenizer, transformer
from star_core.training.recorded import UNRECORDED, RecordedStep
from star_core.weights import TensorFile

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
STEPS = 10
LPIPS_FROM = 5


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch, distance: nn.Module) -> None:
    for stage in (tokenizer, decoder):
        monkeypatch.setattr(stage, "asset_path", lambda name, folder: folder)
        monkeypatch.setattr(stage, "load_lpips", lambda path, kind: distance)
    monkeypatch.setattr(tokenizer, "LPIPS_FROM", LPIPS_FROM)


def train(stage: ModuleType, run: Path, data: Path, *options: str) -> Path:
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    shared = ["--run", str(run), "--data", str(data), "--size", "32", "--device", "cuda"]
    shared += ["--steps", str(STEPS), "--batch", "4", "--save-every", "100", "--rate", "1e-3"]
    stage.run(parser.parse_args([*shared, *options]))
    return run


@pytest.mark.parametrize("stage", ["tokenizer", "transformer", "causal_sampler", "decoder"])
def test_recorded_steps_train_as_started_ones(stage, gpu, data, tmp_path, monkeypatch):
    first = train(tokenizer, tmp_path / "tokens", data, *SMALL, *SIDES)
    options = [*SMALL, *SIDES]
    file = "vqvae.safetensors" if stage in ("tokenizer", "decoder") else "star.safetensors"
    module: ModuleType = {
        "tokenizer": tokenizer,
        "transformer": transformer,
        "causal_sampler": causal_sampler,
        "decoder": decoder,
    }[stage]
    text = ["--tokenizer-run", str(first), "--text", str(SHIPPED), "--bfloat16", "--misdrawn", "0.3"]
    small = ["--depth", "1", "--width", "64", "--variants", "3", *SIDES]
    if stage == "transformer":
        options = [*text, *small]
    elif stage == "causal_sampler":
        star = train(transformer, tmp_path / "star", data, *text, *small)
        options = [*text, "--transformer-run", str(star), "--sampler-depth", "1"]
    elif stage == "decoder":
        options = ["--tokenizer-run", str(first), *SIDES, "--adversarial", "0.5", "--head-start", "5"]
    recordings: list[object] = []
    record = RecordedStep._record

    def counted(self: RecordedStep, batch: object, fixed: object) -> object:
        recordings.append(fixed)
        return record(self, batch, fixed)

    with monkeypatch.context() as patch:
        patch.setattr(RecordedStep, "_record", counted)
        recorded = train(module, tmp_path / "recorded", data, *options)
    assert recordings, f"of {STEPS} steps the first {UNRECORDED} of each shape are not recorded"
    with monkeypatch.context() as patch:
        patch.setattr(module, "recorder_for", lambda device: None)
        started = train(module, tmp_path / "started", data, *options)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    ours, theirs = (TensorFile(run / file) for run in (recorded, started))
    assert set(ours) == set(theirs)
    for name in ours:
        a, b = ours[name].float(), theirs[name].float()
        # Sums by atomics come in another order each time, and Adam makes whole steps of small gradients.
        assert (a - b).abs().mean() <= 2e-4 + 0.02 * b.abs().mean(), name
        assert torch.isfinite(a).all(), name


@pytest.mark.parametrize("before", [(1, 1), (3, 5)])
def test_many_maps_are_resized_as_few_are(before, gpu):
    codes = torch.randn(BATCH_OF_PRODUCTS, 8, *before, device=gpu)
    few = torch.cat([enlarged(part, (16, 12)) for part in codes.split(BATCH_OF_PRODUCTS // 2)])
    torch.testing.assert_close(enlarged(codes, (16, 12)), few, atol=1e-5, rtol=1e-5)
