"""Official .pth files to safetensors: values, what the file does not say, memory, refusals."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from star_core import convert as conversion
from star_core.__main__ import main
from star_core.checkpoint import Networks, load_networks, load_vqvae
from star_core.config import PRESETS, SCALES_256, SCALES_512, StarConfig, VQVAEConfig, preset
from star_core.convert import convert
from star_core.key_tables import STAR_KEYS, VQVAE_KEYS
from star_core.text_files import TEXT_KEYS
from star_core.vqvae import VQVAE
from star_core.weights import TensorFile, official_state

ROOT = Path(__file__).parents[2]
RELEASED = json.loads((ROOT / "tests" / "fixtures" / "official_state_dicts.json").read_text())
PRESET = "star-256-d16"
SMALL = {"depth": 2, "width": 64, "heads": 2, "text_width": 24, "sampler_depth": 1}
"""What makes the preset small enough for a test; the codebook stays the released one."""


def filled(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def transformer() -> dict[str, Tensor]:
    """A small transformer's official state dict, the entries that nothing reads included."""
    state = official_state(filled(Networks(preset(PRESET, SMALL).transformer), 1), STAR_KEYS)
    unread = {"class_emb.weight": torch.ones(5, 64), "blocks.0.attn.zero_k_bias": torch.zeros(64)}
    return state | unread


@pytest.fixture(scope="module")
def vqvae() -> dict[str, Tensor]:
    config = VQVAEConfig(base_channels=32, codebook_size=96)
    state = official_state(filled(VQVAE(config), 2), VQVAE_KEYS)
    return state | {"quantize.ema_vocab_hit_SV": torch.zeros(10, 96)}


@pytest.fixture(scope="module")
def text_encoder() -> dict[str, Tensor]:
    """A few entries of the official text model's state dict."""
    prefix = "text_encoder.text_model."
    generator = torch.Generator().manual_seed(3)
    return {
        f"{prefix}embeddings.position_ids": torch.arange(77).unsqueeze(0),
        f"{prefix}embeddings.token_embedding.weight": torch.randn(50, 24, generator=generator),
        f"{prefix}encoder.layers.0.self_attn.k_proj.bias": torch.randn(24, generator=generator),
        f"{prefix}final_layer_norm.weight": torch.randn(24, generator=generator),
    }


def checkpoint(transformer: Any, sides: Any = SCALES_256, **trainer: Any) -> dict[str, Any]:
    """Return what the official trainer saves."""
    optimizer = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(9)}}, "param_groups": [{"lr": 1e-4}]}}
    config = {"patch_nums": sides, "resos": tuple(16 * side for side in sides), "label_smooth": 0.0}
    return {
        "epoch": 2,
        "iter": 6000,
        "trainer": {"config": config, "var_wo_ddp": transformer, "var_opt": optimizer, **trainer},
    }


def saved(content: Any, folder: Path, name: str = "official.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def rounded(name: str, tensor: Tensor) -> Tensor:
    exact = name.endswith("scale_mul_1H11") or name.startswith("quantize.")
    return tensor if exact else tensor.half()


def assert_same(path: Path, expected: dict[str, Tensor]) -> None:
    file = TensorFile(path)
    assert set(file) == set(expected)
    for name, tensor in expected.items():
        assert file[name].dtype == tensor.dtype, name
        assert torch.equal(file[name], tensor), name


# What is written


def test_every_part_that_is_found_is_written_in_half_precision(
    transformer: dict[str, Tensor], vqvae: dict[str, Tensor], text_encoder: dict[str, Tensor], tmp_path: Path
):
    content = checkpoint(transformer, vae_local=vqvae) | {"text_enc": text_encoder}
    out = tmp_path / "out"
    written = convert(saved(content, tmp_path), out, preset_name=PRESET, overrides=SMALL)
    assert [w.path.name for w in written] == [
        "star.safetensors",
        "vqvae.safetensors",
        "text_encoder.safetensors",
    ]
    kept = {n: rounded(n, t) for n, t in transformer.items() if not STAR_KEYS.reason_dropped(n)}
    assert len(kept) == len(transformer) - 2
    assert_same(written[0].path, kept)
    assert_same(written[1].path, {n: rounded(n, t) for n, t in vqvae.items() if "ema_vocab" not in n})
    floats = {n: t.half() for n, t in text_encoder.items() if t.is_floating_point()}
    assert_same(written[2].path, {n.removeprefix("text_encoder."): t for n, t in floats.items()})
    assert [w.tensors for w in written] == [len(TensorFile(w.path)) for w in written]


def test_what_was_written_loads_and_says_what_it_is(
    transformer: dict[str, Tensor], vqvae: dict[str, Tensor], tmp_path: Path
):
    source = saved(checkpoint(transformer, vae_local=vqvae), tmp_path)
    convert(source, tmp_path, preset_name=PRESET, overrides=SMALL | {"rope_theta": 100.0, "rope_extent": 32.0})
    config, networks = load_networks(tmp_path / "star.safetensors")
    assert config == preset(PRESET, SMALL | {"rope_theta": 100.0, "rope_extent": 32.0})
    assert (config.transformer.rope_theta, config.transformer.cross_attention) == (100.0, "paired")
    assert torch.equal(networks.transformer.head.weight, transformer["head_logits.weight"].half().float())
    loaded = load_vqvae(tmp_path / "vqvae.safetensors")
    assert loaded.config == VQVAEConfig(base_channels=32, codebook_size=96)
    # Tokens are the nearest codes: rounded ones would be another codebook.
    assert torch.equal(loaded.quantizer.codebook.weight, vqvae["quantize.embedding.weight"])
    assert torch.equal(loaded.quant_conv.weight, vqvae["quant_conv.weight"].half().float())


def test_the_text_encoders_names_are_those_that_the_text_loader_knows(
    transformer: dict[str, Tensor], text_encoder: dict[str, Tensor], tmp_path: Path
):
    source = saved(checkpoint(transformer, text_enc=text_encoder), tmp_path)
    *_, written = convert(source, tmp_path, preset_name=PRESET, overrides=SMALL)
    assert written.what == "text encoder"
    assert all(TEXT_KEYS.ours(name) is not None for name in TensorFile(written.path))


@pytest.mark.parametrize(
    "foreign",
    [
        {"a": torch.ones(2), "b": torch.ones(2)},
        {"text_encoder.logit_scale": torch.ones(())},
        {"tokenizer": "x"},
    ],
)
def test_a_text_encoder_that_is_none_is_left_out_with_a_warning(
    foreign: dict[str, Any], vqvae: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    # It was written as "text encoder, 2 tensors" once.
    path = saved({"trainer": {"vae_local": vqvae, "text_enc": foreign}}, tmp_path)
    assert [w.what for w in convert(path, tmp_path)] == ["VQ-VAE"]
    (line,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "official.pth: its text encoder is left out, it is no CLIP text model" in line
    assert not (tmp_path / "text_encoder.safetensors").exists()
    with refused(saved({"trainer": {"text_enc": foreign}}, tmp_path), "no STAR transformer and no VQ-VAE"):
        convert(path, tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_tied_and_empty_tensors_are_written_too(
    dtype: torch.dtype | None, text_encoder: dict[str, Tensor], tmp_path: Path
):
    bias = text_encoder["text_encoder.text_model.final_layer_norm.weight"].half()
    tied = {f"text_encoder.text_model.final_layer_norm.{leaf}": bias for leaf in ("weight", "bias")}
    empty = {"text_encoder.text_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(0)}
    (written,) = convert(saved({"text_enc": text_encoder | tied | empty}, tmp_path), tmp_path, dtype=dtype)
    file = TensorFile(written.path)
    assert all(torch.equal(file[name.removeprefix("text_encoder.")], bias.to(dtype)) for name in tied)
    assert file["text_model.encoder.layers.0.mlp.fc1.bias"].shape == (0,)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_another_dtype_can_be_asked_for(dtype: torch.dtype | None, vqvae: dict[str, Tensor], tmp_path: Path):
    convert(saved(vqvae, tmp_path), tmp_path, dtype=dtype)
    expected = {
        n: t if n.startswith("quantize.") else t.to(dtype or t.dtype)
        for n, t in vqvae.items()
        if "ema_vocab" not in n
    }
    assert_same(tmp_path / "vqvae.safetensors", expected)


def test_a_bare_state_dict_needs_the_preset_alone(transformer: dict[str, Tensor], tmp_path: Path):
    written = convert(saved(transformer, tmp_path), tmp_path, preset_name=PRESET, overrides=SMALL)
    assert [w.what for w in written] == ["transformer of star-256-d16"]


def test_an_old_style_pickle_converts_too(vqvae: dict[str, Tensor], tmp_path: Path):
    path = tmp_path / "old.pth"
    torch.save(vqvae, path, _use_new_zipfile_serialization=False)
    assert [w.what for w in convert(path, tmp_path)] == ["VQ-VAE"]


# What the file says of itself and what the caller says


def flat(name: str) -> dict[str, Tensor]:
    """Return a released state dict whose tensors are one repeated number: four bytes each in a file."""
    return {key: torch.zeros(()).expand(shape) for key, shape in RELEASED[name].items()}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[StarConfig]:
    """Write nothing; collect the configuration that a transformer would be written with."""
    configs: list[StarConfig] = []

    def collect(source: Path, out: Path, tensors: Any, config: StarConfig, dtype: Any) -> conversion.Written:
        configs.append(config)
        return conversion.Written(out, config.name, len(tensors))

    monkeypatch.setattr(conversion, "_write_star", collect)
    return configs


@pytest.mark.parametrize(("sides", "name"), [(SCALES_256, "star-256-d30"), (SCALES_512, "star-512-d30")])
def test_the_stored_scales_tell_models_of_equal_shapes_apart(
    sides: tuple[int, ...], name: str, chosen: list[StarConfig], tmp_path: Path
):
    convert(saved(checkpoint(flat("var_d30_512"), sides), tmp_path), tmp_path)
    convert(saved(checkpoint(flat("var_d30_512"), list(sides)), tmp_path), tmp_path, preset_name=name)
    assert chosen == [PRESETS[name]] * 2


@pytest.mark.parametrize("name", ["var_d16_256", "var_d30_1024", "var_d30_1024_sampler"])
def test_shapes_that_only_one_preset_has_need_no_preset(name: str, chosen: list[StarConfig], tmp_path: Path):
    convert(saved(flat(name), tmp_path), tmp_path)
    assert [config.transformer.depth for config in chosen] == [16 if "d16" in name else 30]
    assert [config.transformer.has_sampler for config in chosen] == ["sampler" in name]


def refused(path: Path, *parts: str) -> Any:
    """Expect a ValueError that names the file, then the parts in this order."""
    return pytest.raises(ValueError, match=".*".join([path.name, *parts]))


def test_a_bare_state_dict_that_fits_two_presets_is_refused_with_both(tmp_path: Path):
    path = saved(flat("var_d30_256"), tmp_path)
    with refused(path, "give --preset", "star-256-d30, star-512-d30$"):
        convert(path, tmp_path)


def test_stored_scales_that_contradict_the_preset_are_refused(tmp_path: Path):
    path = saved(checkpoint(flat("var_d30_512"), SCALES_512), tmp_path)
    with refused(path, "is not star-256-d30", r"scales are \[1, 2, 3, 4, 6, 9, 13, 18, 24, 32\] in the file"):
        convert(path, tmp_path, preset_name="star-256-d30")
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "a refusal writes nothing"


def test_shapes_that_contradict_the_preset_are_refused(tmp_path: Path):
    path = saved(checkpoint(flat("var_d16_256")), tmp_path)
    with refused(path, "is not star-256-d30", "depth is 16 in the file and 30 in the preset"):
        convert(path, tmp_path, preset_name="star-256-d30")


def test_scales_that_no_released_model_has_are_refused(tmp_path: Path):
    path = saved(checkpoint(flat("var_d16_256"), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)), tmp_path)
    with refused(path, "no released one has its sizes", "depth 16", "scales are 1 2 3 4 5 6 7 8 9 10"):
        convert(path, tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2], "holds list, not a checkpoint"),
        ({"model": {"weight": 1}}, "no STAR transformer and no VQ-VAE"),
        ({"trainer": {"var_wo_ddp": 3}}, "its transformer is a int, not a state dict"),
        (
            {"trainer": {"vae_local": {"encoder.conv_in.bias": torch.zeros(2)}}},
            "its VQ-VAE is to have encoder.conv_in.weight and .*has none of them",
        ),
        (
            {
                "vae_local": {
                    "encoder.conv_in.weight": torch.zeros(9, 3, 3, 3),
                    "quantize.embedding.weight": torch.zeros(9),
                }
            },
            r"and has .*, quantize\.embedding\.weight \[9\]",
        ),
    ],
)
def test_a_foreign_pickle_is_refused(content: Any, complaint: str, tmp_path: Path):
    path = saved(content, tmp_path)
    with refused(path, complaint):
        convert(path, tmp_path)


@pytest.mark.parametrize("sides", [5, ["a"], [None]])
def test_scales_that_are_no_numbers_are_refused(sides: Any, tmp_path: Path):
    content = checkpoint(flat("var_d16_256"))
    content["trainer"]["config"]["patch_nums"] = sides
    path = saved(content, tmp_path)
    with refused(path, r"its scales \(patch_nums\) are ", "not sides"):
        convert(path, tmp_path)


@pytest.mark.parametrize("place", ["bom.txt", "bom.txt/x"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_read(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "bom.txt").touch()
    path = tmp_path / "broken.pth"
    path.write_bytes(b"not whole")
    assert main(["convert", str(path), "--out", str(tmp_path / place)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / place} can be no folder for the results" in line


def test_missing_and_surplus_keys_are_refused(transformer: dict[str, Tensor], tmp_path: Path):
    less = {name: t for name, t in transformer.items() if name != "head_logits.bias"}
    more = transformer | {"pos_1LC": torch.zeros(1, 680, 64)}
    for state, complaint in ((less, r"missing.*head_logits\.bias"), (more, "not known.*pos_1LC")):
        path = saved(checkpoint(state), tmp_path)
        with refused(path, complaint):
            convert(path, tmp_path, preset_name=PRESET, overrides=SMALL)


def test_values_that_half_precision_cannot_hold_are_refused_with_the_way_out(
    vqvae: dict[str, Tensor], tmp_path: Path
):
    large = vqvae | {"quant_conv.bias": torch.full((32,), 7e4)}
    path = saved(large, tmp_path)
    with refused(path, r"quant_conv\.bias", "torch.float16 cannot hold", "--dtype float32"):
        convert(path, tmp_path)
    convert(path, tmp_path, dtype=torch.bfloat16)


def test_the_command_writes_and_refuses(
    vqvae: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = saved(vqvae, tmp_path)
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "vqvae.safetensors: VQ-VAE, 323 tensors" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-1000])
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "official.pth" in error


# A file of the d16 model's size, and the memory that it takes


class FullSize:
    """Values for every tensor of the d16 model, cut from one block; half precision holds them exactly."""

    def __init__(self) -> None:
        self.shapes = RELEASED["var_d16_256"]
        numbers = torch.randint(-64, 65, (6_000_000,), generator=torch.Generator().manual_seed(0))
        self.block = numbers / 32

    def tensor(self, name: str) -> Tensor:
        size = math.prod(self.shapes[name])
        start = zlib.crc32(name.encode()) % (len(self.block) - size)
        return self.block[start : start + size].view(self.shapes[name])


@contextmanager
def no_checksums() -> Iterator[None]:
    """Leave out, where torch can (2.6), what takes half the time of writing a large file, and nobody reads."""
    if not hasattr(torch.serialization, "set_crc32_options"):
        yield
        return
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


STATUS = Path("/proc/self/status")
# Not resource.getrusage: its peak is inherited from the process that starts this one.
MEASURED = """
import re, sys
from pathlib import Path
import torch
from star_core.convert import convert
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, in memory where there is room: a disk takes longer than all that is tested."""
    memory = Path("/dev/shm")
    if not (os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 8e9):
        memory = tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def full_size(roomy: Path) -> tuple[Path, FullSize, int]:
    """An official file of the d16 model, 1.1 GB in float32, beside a third as much of optimizer state."""
    model = FullSize()
    path = roomy / "full.pth"
    weights = {name: model.tensor(name).clone() for name in model.shapes}
    size = sum(tensor.nbytes for tensor in weights.values())
    content = checkpoint(weights)
    content["trainer"]["var_opt"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(size // 12)
    with no_checksums():
        torch.save(content, path)
    return path, model, size


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc, which this system lacks")
def test_a_d16_file_goes_round_in_little_memory(full_size: tuple[Path, FullSize, int], roomy: Path):
    path, model, weights = full_size
    assert path.stat().st_size > 1.3 * weights > 1.4e9
    command = [sys.executable, "-c", MEASURED, str(path), str(roomy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # The weights as they are mapped, their halves, and little else: the optimizer is never touched. A 20 GB
    # file of the d30 model with its sampler, 7.3 GB of weights, 1.8 GB of VQ-VAE and text encoder, takes
    # 1.5 times as much at most: 14 GB, of which the mapped part can be taken back at any time. safetensors
    # before 0.8 copies the halves to write them: 18 GB.
    parts = 1.5 if Version(version("safetensors")) >= Version("0.8") else 2.0
    assert int(done.stdout) < parts * weights + 2.5e8
    config, networks = load_networks(roomy / "star.safetensors", dtype=torch.float16)
    assert config == PRESETS["star-256-d16"]
    loaded = networks.state_dict()
    kept = {n: STAR_KEYS.ours(n) for n in model.shapes if not STAR_KEYS.reason_dropped(n)}
    assert len(kept) == len(loaded)
    for official, ours in kept.items():
        assert torch.equal(loaded[ours].float(), model.tensor(official)), official
