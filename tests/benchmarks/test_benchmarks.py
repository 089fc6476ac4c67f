"""The benchmarks' own arithmetic, and their parts on models small enough for a test."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import against_official  # noqa: E402
import everything  # noqa: E402
import fast_modes  # noqa: E402
import load as load_benchmark  # noqa: E402
import low_memory  # noqa: E402
import scaling  # noqa: E402
import workbench  # noqa: E402

from star_core import Options, load  # noqa: E402
from star_core.config import PRESETS, square_maps, token_count  # noqa: E402
from star_core.key_tables import STAR_KEYS  # noqa: E402
from star_core.presets import named_schedule  # noqa: E402
from star_core.star import Star  # noqa: E402

CPU = torch.device("cpu")


def load_shallow(blocks: int = 3, **options: object) -> Star:
    """Return the shipped model with a few of its blocks, which draws in a fraction of the time."""
    star = load(**options)
    star.transformer.blocks = star.transformer.blocks[:blocks]
    return star


@pytest.fixture
def shallow() -> Star:
    return load_shallow()


def test_random_weights_depend_on_name_and_seed_alone():
    one = workbench.value("blocks.0.attn.proj.weight", (8, 4), 0)
    assert torch.equal(one, workbench.value("blocks.0.attn.proj.weight", (8, 4), 0))
    assert not torch.equal(one, workbench.value("blocks.1.attn.proj.weight", (8, 4), 0))
    assert not torch.equal(one, workbench.value("blocks.0.attn.proj.weight", (8, 4), 1))
    assert workbench.value("blocks.0.norm.weight", (1000,), 0).mean() > 0.9
    # A device that is no GPU gets the CPU's numbers, moved.
    assert torch.equal(one, workbench.value("blocks.0.attn.proj.weight", (8, 4), 0, "meta"))


def test_both_engines_get_the_same_weights_by_the_official_names(tiny):
    ours = tiny("paired")
    networks = torch.nn.Module()
    networks.transformer, networks.causal_sampler = ours.transformer, ours.sampler
    workbench.randomise(networks, STAR_KEYS.official, seed=3, dtype=torch.float32, device="cpu")
    official = STAR_KEYS.official("transformer.blocks.0.ffn.expand.weight")
    weight = networks.transformer.blocks[0].ffn.expand.weight
    assert torch.equal(weight, workbench.value(official, weight.shape, 3))


def test_sizes_are_the_released_ones():
    assert set(workbench.SIZES.values()) <= set(PRESETS)
    for depth, sampler in ((16, False), (30, False), (30, True)):
        for pixels, sides in scaling.SIDES.items():
            config = scaling.config_for(depth, pixels, sampler=sampler)
            assert config.resolution == (pixels, pixels)
            assert config.transformer.scales == len(sides)
            assert config.transformer.has_sampler == sampler
    assert scaling.config_for(16, 256, sampler=False).maps == PRESETS["star-256-d16"].maps


def test_a_stopwatch_counts_every_moment_once(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: now[0])
    watch = scaling.Stopwatch(CPU)
    with watch.part("rest"):
        now[0] += 2
        with watch.part("transformer"):
            now[0] += 5
        with watch.part("transformer"), watch.part("sampling"):
            now[0] += 3
        now[0] += 1
    assert {name: seconds for name, seconds in watch.seconds.items() if seconds} == {
        "transformer": 5,
        "sampling": 3,
        "rest": 3,
    }


def test_shares_of_a_picture_add_up_and_the_model_is_left_as_it_was(shallow: Star):
    star = shallow
    found = scaling.measure(star, 1, 1, CPU)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=0.01)
    assert found["shares"]["transformer"] > found["shares"]["sampling"] > 0
    assert len(found["seconds_per_scale"]) == len(star.config.maps)
    assert "features" not in vars(star.transformer)
    assert "encode_text" not in vars(star)
    assert scaling.star_core.generate.draw is scaling.star_core.causal_sampler.draw


def test_reading_the_text_counts_for_no_scale(shallow: Star, monkeypatch: pytest.MonkeyPatch):
    star, now = shallow, [0.0]
    encode = star.text_encoder.encode

    def slow(*arguments: object) -> object:
        now[0] += 10
        return encode(*arguments)

    monkeypatch.setattr(star.text_encoder, "encode", slow)
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: now[0])
    found = scaling.measure(star, 1, 1, CPU)
    assert found["shares"]["text"] == 1
    assert set(found["seconds_per_scale"]) == {0}


def test_the_floor_grows_with_what_there_is_to_do():
    small = scaling.floor_seconds(scaling.config_for(16, 128, sampler=False), 1, 2, 1e12, 1e11)
    large = scaling.floor_seconds(scaling.config_for(16, 256, sampler=False), 1, 2, 1e12, 1e11)
    batch = scaling.floor_seconds(scaling.config_for(16, 256, sampler=False), 4, 2, 1e12, 1e11)
    assert small < large < batch < 4 * large
    # 680 tokens, two rows, 16 blocks: 0.6 TFLOP of products and 0.4 of decoding at least.
    assert token_count(square_maps(scaling.SIDES[256])) == 680
    assert 0.9 < large < 1.3


def test_ratios_compare_rounds_with_each_other():
    runs = {
        name: [{"seconds": s}] * 3 for name, s in zip(against_official.CONTENDERS, (8, 4, 6, 2), strict=True)
    }
    peaks = dict(zip(against_official.CONTENDERS, (40, 40, 30, 10), strict=True))
    found = against_official.ratios(runs, peaks)
    assert found["ours-bfloat16 is faster than official by"] == 4
    assert found["ours-bfloat16 is faster than official-autocast by"] == 2
    assert found["ours-bfloat16 peak of official's"] == 0.25


def test_timings_are_there_after_the_first_round_already():
    runs = {
        name: [{"seconds": s, "peak": 2**30}]
        for name, s in zip(against_official.CONTENDERS, (8, 4, 6, 2), strict=True)
    }
    found = against_official.timings(runs)
    assert found["warm_seconds"]["official"] == 8
    assert found["peak_gib"]["ours-bfloat16"] == 1
    result = {"size": "d16-256", "machine": {}, "cold_seconds": found["warm_seconds"], **found}
    assert "ours-bfloat16 is faster than official by 4" in "\n".join(against_official.lines(result))


def test_pictures_agree_by_their_largest_difference_and_say_how_much_is_equal():
    official = torch.zeros(1, 3, 10, 10)
    near, far = official + 1e-4, official.clone()
    far[..., 0, 0] = 0.5
    found = against_official.agreement({"official": official, "ours-float32": near, "ours-bfloat16": far})
    assert found["agree"]
    assert found["greedy_equal_pixels"] == {"ours-float32": 1.0, "ours-bfloat16": 0.99}
    assert found["greedy_picture_difference"]["ours-bfloat16"] == 0.5
    assert not against_official.agreement({"official": official, "ours-float32": far})["agree"]


def test_a_contender_that_falls_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    worker, picture = tmp_path / "worker.py", tmp_path / "picture"
    torch.save(torch.zeros(1, 3, 2, 2), picture)
    worker.write_text(
        "import json, shutil, sys\n"
        "name = sys.argv[sys.argv.index('--worker') + 1]\n"
        "print(json.dumps({'gpu': 'none'}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    order = json.loads(line)\n"
        "    if name == 'ours-bfloat16' and order['seed'] == 2: sys.exit('no more')\n"
        f"    if order['likeliest']: shutil.copy({str(picture)!r}, order['keep'])\n"
        "    print(json.dumps({'seconds': 1.5, 'peak': 2**30}), flush=True)\n"
    )
    monkeypatch.setattr(against_official, "__file__", str(worker))
    arguments = argparse.Namespace(device="cpu", threads=1, seed=0)
    contenders = against_official.Contenders("d16-256", arguments, tmp_path)
    first, second, last = against_official.compare(contenders, 2)
    all_of_them = set(against_official.contenders_on(torch.device("cpu")))
    assert all_of_them >= set(against_official.CONTENDERS) - {against_official.AUTOCAST}
    assert set(first["warm_seconds"]) == all_of_them
    assert set(second["warm_seconds"]) == all_of_them - {"ours-bfloat16"}
    assert "no more" in last["fallen"]["ours-bfloat16"]
    assert last["agree"]
    assert "ours-bfloat16 fell" in "\n".join(against_official.lines(last))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("products", [True, False])
def test_the_official_autocast_takes_part_where_a_cpu_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch, products: bool, packed: bool
):
    monkeypatch.setattr(against_official, "can_be_packed", lambda dtype, device: packed)
    monkeypatch.setattr(against_official, "needs_upcast", lambda dtype, device: not products)
    found = against_official.contenders_on(CPU)
    assert (against_official.AUTOCAST in found) == products
    assert ("ours-bfloat16" + against_official.PACKED in found) == packed
    assert {"official", "ours-float32", "ours-bfloat16"} <= set(found)


def test_a_fast_mode_that_fails_does_not_stop_the_others(shallow: Star, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fast_modes, "config_of", lambda size: shallow.config)
    monkeypatch.setattr(fast_modes, "build_star", lambda *_: shallow)
    monkeypatch.setattr(fast_modes, "load", lambda **_: shallow)
    monkeypatch.setattr(
        fast_modes,
        "modes",
        lambda sampler: [
            fast_modes.Mode("exact", "official-512", fast_modes.same),
            fast_modes.Mode("broken", "official-512", fast_modes.unguided(1)),
        ],
    )
    original = fast_modes.Star.run

    def run(star: object, request: object) -> object:
        if request.schedule.scales[-1].unguided:
            raise RuntimeError("no such kernel")
        return original(star, request)

    monkeypatch.setattr(fast_modes.Star, "run", run)
    *_, found = fast_modes.time_modes("d16-256", torch.float32, CPU, 2, graphs=False)
    assert found["broken"] == {"error": "no such kernel"}
    assert found["exact"]["faster_by"] == 1
    assert "broken" in "\n".join(fast_modes.lines(found, {}))
    costs = fast_modes.cost_of_modes(1, 1, CPU)
    assert costs == {"broken": {"error": "no such kernel"}}


def test_where_an_exact_mode_fails_those_compared_with_it_say_so(
    shallow: Star, monkeypatch: pytest.MonkeyPatch
):
    def run(star: object, request: object) -> object:
        raise RuntimeError("no kernel at all")

    monkeypatch.setattr(fast_modes, "load", lambda **_: shallow)
    monkeypatch.setattr(fast_modes.Star, "run", run)
    assert fast_modes.cost_of_modes(1, 1, CPU, ["prune 0.5, last scale"]) == {
        "exact": {"error": "no kernel at all"},
        "prune 0.5, last scale": {"error": "exact failed, with which this is compared"},
    }


def test_modes_are_timed_until_the_time_is_up_and_fp8_only_where_there_are_products(
    monkeypatch: pytest.MonkeyPatch,
):
    shipped = load()
    monkeypatch.setattr(fast_modes, "config_of", lambda size: shipped.config)
    monkeypatch.setattr(fast_modes, "build_star", lambda *_: shipped)
    monkeypatch.setattr(fast_modes, "build_networks", lambda *_: two_layers())
    monkeypatch.setattr(fast_modes.Star, "draw", lambda *_, **__: time.sleep(0.001))

    def two_layers() -> torch.nn.Module:
        return torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("transformer", "causal_sampler")})

    def found(**options: object) -> list[dict]:
        return list(fast_modes.time_modes("d16-256", torch.float32, CPU, 2, graphs=False, **options))

    names = ["exact", "int8", "fp8"]
    assert [set(turn) for turn in found(names=names)] == [{"exact", "int8"}] * 2
    assert found(names=names, seconds=0) == [{}]
    assert [set(turn) for turn in found(names=["int8"])] == [{"exact", "int8"}] * 2
    monkeypatch.setattr(fast_modes, "has_products", lambda device: True)
    assert [set(turn) for turn in found(names=names)] == [{*names}] * 2


def test_convolutions_are_exact_only_where_pictures_are_compared():
    before = torch.backends.cudnn.allow_tf32
    with against_official.exact_convolutions():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_loading_is_summed_up_round_by_round():
    found = {
        "bytes, warm": [{"seconds": 2, "peak": 2**30}] * 2,
        "load, warm": [{"seconds": 1, "peak": 2**31}] * 2,
        "bytes, cold": [],
        "load, cold": [],
    }
    result = load_benchmark.summary(found)
    assert result["against_reading"] == {"load, warm": 0.5}
    assert result["peak_gib"] == {"bytes, warm": 1, "load, warm": 2}
    text = "\n".join(load_benchmark.lines({"size": "d16-256", "files_gib": 1.0, **result}))
    assert "load, warm" in text


def test_a_squeezed_model_draws_the_same_picture():
    star = load_shallow(5)  # the room for the largest tensors holds three
    with_room, both = low_memory.compare(star, None, 1, CPU)
    assert set(with_room) == {"with_room"}
    assert both["largest_difference"] == {"f_hat": 0, "picture": 0}
    assert 0 < both["within_cap"]["streamed_blocks"] < len(star.transformer.blocks)
    assert both["within_cap"]["streamed_gb_per_picture"] > 0
    assert not both["raised"]
    assert "within_cap" in "\n".join(low_memory.lines(both))
    json.dumps(both)


def test_a_cap_that_is_too_small_is_raised_until_it_is_not(shallow: Star, monkeypatch: pytest.MonkeyPatch):
    original, failures = low_memory.time_pictures, [0]

    def fails_twice(star: object, rounds: int, device: torch.device) -> dict:
        failures[0] += star.short_of_memory
        if star.short_of_memory and failures[0] < 3:
            raise torch.OutOfMemoryError("full")
        return original(star, rounds, device)

    monkeypatch.setattr(low_memory, "time_pictures", fails_twice)
    *_, both = low_memory.compare(shallow, None, 1, CPU)
    first, second = both["raised"]
    assert second["cap_gb"] - first["cap_gb"] == pytest.approx(0.5)
    assert both["largest_difference"]["picture"] == 0


def test_reading_reads_every_weight_file(tmp_path: Path):
    (tmp_path / "text_encoder").mkdir()
    for name in ("star.safetensors", "text_encoder/model.safetensors"):
        (tmp_path / name).write_bytes(bytes(1000))
    assert [path.name for path in load_benchmark.weight_files(tmp_path)] == [
        "star.safetensors",
        "model.safetensors",
    ]
    load_benchmark.read_bytes(tmp_path)
    load_benchmark.forget(tmp_path)


def test_a_benchmark_that_cannot_run_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("STAR_REFERENCE", raising=False)
    official, load_, scaling_ = (everything.Benchmark(n) for n in ("against_official", "load", "scaling"))
    assert "STAR_REFERENCE" in everything.run(official, 60)["left_out"]
    assert everything.run(load_, 0) == {"left_out": "no time was left"}
    assert everything.run(scaling_, 0.2) == {"left_out": "not done within 0 s"}
    monkeypatch.setattr(everything, "HERE", tmp_path)
    (tmp_path / "load.py").write_text("print('noise'); print('{\"a\": 1}'); raise SystemExit(1)")
    assert everything.run(load_, 60) == {"a": 1, "exit_code": 1}
    (tmp_path / "load.py").write_text("print('{\"a\": 2}', flush=True); import time; time.sleep(60)")
    assert everything.run(load_, 1) == {"a": 2, "unfinished": True}
    (tmp_path / "load.py").write_text("print('noise', flush=True); import time; time.sleep(60)")
    assert everything.run(load_, 1) == {"left_out": "not done within 1 s"}


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("raise SystemExit(3)", 3),
        ("print('noise'); raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ],
)
def test_a_benchmark_that_crashes_without_a_result_is_told_by_the_exit_code(
    script: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(everything, "HERE", tmp_path)
    monkeypatch.delenv("STAR_REFERENCE", raising=False)
    (tmp_path / "load.py").write_text(script)
    (tmp_path / "scaling.py").write_text("print('{\"a\": 1}')")
    monkeypatch.setattr(sys, "argv", ["everything.py", "--only", "load", "scaling", "against_official"])
    assert everything.main() == abs(code)
    results = json.loads(capsys.readouterr().out)
    assert results["load"]["exit_code"] == code
    assert f"exit code {code}" in results["load"]["left_out"]
    assert results["scaling"]["a"] == 1
    # What is missing by design is no failure.
    monkeypatch.setattr(sys, "argv", ["everything.py", "--only", "scaling", "against_official"])
    assert everything.main() == 0


def test_a_benchmark_keeps_to_its_own_limit_and_its_processes_end_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(everything, "HERE", tmp_path)
    (tmp_path / "load.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"child\": %d}' % child.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    found = everything.run(everything.Benchmark("load", seconds=2), 60)
    assert found["unfinished"]
    assert time.monotonic() - began < 30
    assert ends(found["child"], within=10)


def ends(process: int, *, within: float) -> bool:
    """Whether a process is gone within some seconds: a killed one closes its files a moment before it is."""
    end = time.monotonic() + within
    while alive(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def test_every_benchmark_runs_on_either_machine():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"workbench", "everything"}
    assert {b.name for b in everything.ON_A_CPU} == {b.name for b in everything.ON_A_GPU} == scripts


def test_every_fast_mode_is_another_schedule_than_the_exact_one():
    maps = load().config.maps
    for mode in fast_modes.modes(sampler=True):
        changed = mode.change(named_schedule(mode.base, maps))
        exact = named_schedule("official-1024" if "1024" in mode.base else "official-512", maps)
        same = mode.name.startswith("exact") or mode.name == mode.eight_bit
        assert (changed == exact) == same, mode.name


def test_costs_are_measured_against_the_exact_picture(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fast_modes, "load", load_shallow)
    names = ["unguided, last scale", "int8", "half the sampler's steps"]
    costs = fast_modes.cost_of_modes(1, 1, CPU, names)
    assert list(costs) == names
    # The sampler's steps do not touch the transformer's logits; every other mode does.
    assert costs["half the sampler's steps"]["largest_logit_error"] == 0
    assert all(c["mean_logit_error"] > 0 for name, c in costs.items() if name != "half the sampler's steps")
    assert all(0 <= c["equal_tokens"] < 1 and 5 < c["psnr_db"] < 60 for c in costs.values())
    assert "half the sampler's steps" in "\n".join(fast_modes.lines({}, costs))
    json.dumps(costs)


def test_a_mode_that_follows_another_sees_what_it_sees_after_that_one_s_scales(shallow: Star):
    exact, pruned = (
        shallow.request(["cat"], options=Options(seed=1, schedule=s)) for s in ("official-512", "fast")
    )
    with fast_modes.Recorder() as recorder:
        run = recorder.of(shallow, exact)
        followed = recorder.of(shallow, pruned, follow=run)
        assert torch.equal(followed.steps[-1].f_hat, run.steps[-1].f_hat)
        assert not torch.equal(followed.logits[-1], run.logits[-1])
        for scale in (3, 8):
            after = dataclasses.replace(pruned, prefix=run.steps[:scale], stop=scale + 1)
            torch.testing.assert_close(recorder.of(shallow, after).logits[-1], followed.logits[scale])
    assert "recorded" not in fast_modes.star_core.generate._draw_scale.__name__


def test_equal_pictures_have_the_highest_psnr():
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fast_modes.psnr(x, x) == pytest.approx(60)
    assert fast_modes.psnr(x, x + 0.1) == pytest.approx(20, abs=0.1)
