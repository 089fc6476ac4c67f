"""This engine beside the official code, on fresh random weights and inputs, float32 on the CPU, batch 1.

Runs where STAR_REFERENCE names a checkout of the official repository.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REFERENCE = os.environ.get("STAR_REFERENCE", "")
COMPARE = Path(__file__).parent / "compare_official.py"

pytestmark = pytest.mark.skipif(
    not (REFERENCE and Path(REFERENCE, "models", "var_drop.py").is_file()),
    reason="STAR_REFERENCE names no checkout of the official repository",
)

SMALL = ("depth-2", "depth-3-sampler", "depth-4")
ALWAYS = ",".join((*SMALL, "replay", "statistics"))
SIZES = (*SMALL, "d16")
SMALLEST_P = 0.001


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return measured(job): what one run of both codes measured. Small jobs share one process."""
    folder = tmp_path_factory.mktemp("official")

    @functools.cache
    def run(jobs: str) -> dict[str, Any]:
        out = folder / f"{jobs}.json"
        environment = os.environ | {"STAR_REFERENCE": REFERENCE, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-W", "ignore", str(COMPARE), jobs, str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return json.loads(out.read_text())

    return lambda job: run("d16" if job == "d16" else ALWAYS)[job]


@pytest.mark.parametrize("size", SIZES)
def test_the_tokenizer_gives_the_official_tokens_and_pictures(size: str, measured: Any):
    result = measured(size)
    assert result["encoder_features"] < 1e-4
    assert result["differing_tokens"] == 0
    assert result["distinct_tokens"] > 10, "a picture of few tokens would prove little"
    assert result["f_hat"] < 1e-4
    assert result["reconstruction"] < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_teacher_forced_logits_are_the_official_ones(size: str, measured: Any):
    result = measured(size)
    assert result["teacher_inputs"] < 1e-4
    assert result["teacher_features"] < 2e-4
    assert result["teacher_logits"] < 1e-3
    assert result["logits_deviation"] > 1, "flat logits would agree by themselves"


@pytest.mark.parametrize("size", SIZES)
def test_greedy_generation_draws_the_official_tokens_and_picture(size: str, measured: Any):
    result = measured(size)
    assert result["greedy_differing_tokens"] == 0, f"smallest margin: {result['greedy_smallest_margin']:.2g}"
    assert result["greedy_distinct_tokens"] > 2
    assert result["greedy_picture"] < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_smooth_generation_draws_the_official_picture_from_the_same_noise(size: str, measured: Any):
    # The temperature falls to 0.0135: where two tokens come close, 1e-5 in a logit shows in a few pixels.
    # How many depends on the processor's rounding: means of 1e-4 to 3.6e-4 were seen.
    result = measured(size)
    assert result["smooth_picture"] < 3e-2
    assert result["smooth_picture_mean"] < 1e-3
    assert result["smooth_contrast"] > 0.05


@pytest.mark.parametrize("version", ["1024", "new"])
def test_the_causal_sampler_follows_the_official_loop_draw_by_draw(version: str, measured: Any):
    # The official run's tokens and orders are put in place of ours; every logit and fixed position is ours.
    result = measured("replay")[version]
    assert result["steps"] > 40
    assert result["logits"] < 1e-3
    assert result["confidence"] < 1e-5
    assert result["differing_positions"] == 0
    assert result["picture"] < 1e-3


def test_the_official_strategy_has_the_official_tokens_and_fill(measured: Any):
    result = measured("statistics")
    assert result["pictures"] >= 200
    for statistic in ("plain_tokens", "refined_tokens", "fill"):
        assert result["official"][statistic] > SMALLEST_P, f"{statistic}: {result['official']}"


def test_the_same_tests_reject_the_plain_confidence_strategy(measured: Any):
    result = measured("statistics")
    assert result["confidence"]["refined_tokens"] < SMALLEST_P
    assert result["confidence"]["fill"] < SMALLEST_P
    # Where nothing is refined the strategies are one: the rejection is about the sampler.
    assert result["confidence"]["plain_tokens"] > SMALLEST_P


def test_the_official_loop_fills_maps_faster_than_its_schedule_and_so_do_we(measured: Any):
    result = measured("statistics")
    scales = zip(
        result["official_fill"], result["official"]["mean_fill"], result["scheduled_fill"], strict=True
    )
    for official, ours, scheduled in scales:
        assert official > scheduled + 0.1
        assert ours == pytest.approx(official, abs=0.03)
    assert result["confidence"]["mean_fill"] == result["scheduled_fill"]
