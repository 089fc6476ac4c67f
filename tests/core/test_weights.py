"""Weight files: strict loading by official names, what a file says of itself, and refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from star_core.__main__ import main
from star_core.checkpoint import Networks, load_networks, load_vqvae, save_networks
from star_core.config import PRESETS, StarConfig, VQVAEConfig
from star_core.key_tables import STAR_KEYS, VQVAE_KEYS, KeyTable
from star_core.stored import resolve_config, transformer_facts
from star_core.vqvae import VQVAE
from star_core.weights import (
    TensorFile,
    build_on_meta,
    check_keys,
    fill,
    kept_dtype,
    read_pickle,
    save_tensors,
    save_vqvae,
)

RELEASED = json.loads((Path(__file__).parents[1] / "fixtures" / "official_state_dicts.json").read_text())
PRESET_OF = {
    "var_d16_256": "star-256-d16",
    "var_d30_256": "star-256-d30",
    "var_d30_512": "star-512-d30",
    "var_d30_1024": "star-1024-d30",
    "var_d30_1024_sampler": "star-1024-d30-sampler",
}
TOKENIZERS = ("vqvae_ch160v4096z32_S10", "vqvae_ch160v4096z32_S14")


def on_meta(name: str) -> dict[str, Tensor]:
    """Return a released state dict without memory."""
    return {key: torch.empty(shape, device="meta") for key, shape in RELEASED[name].items()}


def hollow_file(path: Path, shapes: Mapping[str, list[int]], metadata: dict[str, str] | None = None) -> Path:
    """Write a float16 safetensors file whose values are a hole in the file: any size, no disk, no time."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


# The released state dicts


def test_all_seven_released_state_dicts_are_looked_at():
    assert set(RELEASED) == {*PRESET_OF, *TOKENIZERS}


@pytest.mark.parametrize("name", PRESET_OF)
def test_a_released_transformer_loads_by_name_and_shape(name: str):
    config = PRESETS[PRESET_OF[name]].transformer
    networks = build_on_meta(lambda: Networks(config))
    fill(networks, on_meta(name), STAR_KEYS, source=name, device="meta")
    dropped = [key for key in RELEASED[name] if STAR_KEYS.reason_dropped(key)]
    assert len(networks.state_dict()) + len(dropped) == len(RELEASED[name])
    assert networks.transformer.blocks[-1].ffn.expand.weight.shape == (4 * config.width, config.width)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_released_tokenizer_loads_by_name_and_shape(name: str):
    vqvae = build_on_meta(lambda: VQVAE(VQVAEConfig()))
    fill(vqvae, on_meta(name), VQVAE_KEYS, source=name, device="meta")
    assert len(vqvae.state_dict()) + 1 == len(RELEASED[name])


def test_the_sampler_adds_43_tensors_of_which_three_are_dropped():
    added = set(RELEASED["var_d30_1024_sampler"]) - set(RELEASED["var_d30_1024"])
    assert len(added) == 43
    ours = {key: STAR_KEYS.ours(key) for key in added if not STAR_KEYS.reason_dropped(key)}
    assert len(ours) == 40
    assert all(name is not None and name.startswith("causal_sampler.") for name in ours.values())


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_dropped_is_dropped_for_a_stated_reason(name: str):
    table = VQVAE_KEYS if name in TOKENIZERS else STAR_KEYS
    dropped = {key.split(".")[-1] for key in RELEASED[name] if table.reason_dropped(key)}
    assert dropped == ({"ema_vocab_hit_SV"} if name in TOKENIZERS else {"weight", "zero_k_bias"})
    assert all(len(reason) > 20 for reason in table.dropped.values())


@pytest.mark.parametrize("name", RELEASED)
def test_names_go_there_and_back(name: str):
    table = VQVAE_KEYS if name in TOKENIZERS else STAR_KEYS
    kept = [key for key in RELEASED[name] if not table.reason_dropped(key)]
    ours = [table.ours(key) for key in kept]
    assert len(set(ours)) == len(kept)
    assert [table.official(key) for key in ours if key is not None] == kept


@pytest.mark.parametrize("name", PRESET_OF)
def test_a_bare_released_file_is_what_its_preset_says(name: str, tmp_path: Path):
    file = TensorFile(hollow_file(tmp_path / "bare.safetensors", RELEASED[name]))
    assert resolve_config(file, PRESET_OF[name]) == PRESETS[PRESET_OF[name]]


def test_overrides_change_what_no_file_says(tmp_path: Path):
    file = TensorFile(hollow_file(tmp_path / "bare.safetensors", RELEASED["var_d30_256"]))
    config = resolve_config(file, "star-256-d30", {"rope_theta": 100.0, "rope_extent": 32.0})
    assert (config.transformer.rope_theta, config.transformer.rope_extent) == (100.0, 32.0)


def test_overrides_without_a_preset_are_refused(tmp_path: Path):
    file = TensorFile(hollow_file(tmp_path / "bare.safetensors", RELEASED["var_d30_1024"]))
    with pytest.raises(ValueError, match="rope_theta overrides a preset, and none is named"):
        resolve_config(file, None, {"rope_theta": 100.0})


# A small checkpoint and its files


@pytest.fixture
def files(paired: Any, tmp_path: Path) -> Path:
    """A folder with a tiny checkpoint's two files."""
    networks = Networks(paired.config.transformer)
    networks.transformer.load_state_dict(paired.transformer.state_dict())
    networks.causal_sampler.load_state_dict(paired.sampler.state_dict())
    save_networks(tmp_path / "star.safetensors", paired.config, networks)
    save_vqvae(tmp_path / "vqvae.safetensors", paired.vqvae)
    return tmp_path


@pytest.fixture
def rewrite(files: Path) -> Callable[..., Path]:
    """Return rewrite(file, change, metadata): a copy with changed tensors and metadata."""

    def make(
        name: str,
        change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        tensors = load_file(files / name)
        change(tensors)
        kept = TensorFile(files / name).metadata if metadata is None else metadata
        path = files / f"changed-{name}"
        save_file(tensors, path, kept)
        return path

    return make


def test_nothing_is_drawn_for_a_module_that_is_to_be_filled(monkeypatch: pytest.MonkeyPatch):
    drawn: list[str] = []
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, name=name, **__: drawn.append(name) or self)
    made = build_on_meta(lambda: nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3), nn.Conv2d(1, 2, 3)))
    assert not drawn
    assert {p.device.type for p in made.parameters()} == {"meta"}
    assert [tuple(p.shape) for p in made.parameters()] == [(4, 3), (4,), (5, 3), (2, 1, 3, 3), (2,)]
    nn.Embedding(5, 3)
    assert drawn, "elsewhere layers draw as ever"


def test_what_was_saved_is_loaded_value_for_value(files: Path, paired: Any):
    config, networks = load_networks(files / "star.safetensors")
    assert config == paired.config
    for ours, theirs in ((networks.transformer, paired.transformer), (networks.causal_sampler, paired.sampler)):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
    vqvae = load_vqvae(files / "vqvae.safetensors", config.vqvae)
    for name, tensor in paired.vqvae.state_dict().items():
        assert torch.equal(vqvae.state_dict()[name], tensor), name
    assert not any(p.requires_grad or p.is_meta for module in (networks, vqvae) for p in module.parameters())


def test_a_saved_file_may_be_read_by_whom_any_other_file_may(tmp_path: Path):
    (tmp_path / "any").touch()
    (tmp_path / "weights.part").touch(mode=0o600)  # what a killed save left
    save_tensors(tmp_path / "weights", {"weight": torch.zeros(2)}, {})
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "any").stat().st_mode


def mapped(make: Callable[[], nn.Module], path: Path, table: KeyTable, dtype: torch.dtype) -> set[bool]:
    """Return which of mapped and copied the weights are after a load, but for those that are kept exact."""
    file, module = TensorFile(path), build_on_meta(make)
    names = check_keys(module, file, table, "file")
    state = fill(module, file, table, source="file", dtype=dtype).state_dict()
    large = {o: ours for o, ours in names.items() if state[ours].ndim > 1}
    rounded = {o: ours for o, ours in large.items() if kept_dtype(ours, torch.bfloat16) == torch.bfloat16}
    return {file[official].data_ptr() == state[ours].data_ptr() for official, ours in rounded.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [torch.bfloat16, torch.float32])
def test_a_vqvae_stays_in_its_file_unless_its_convolutions_are_cast(dtype, exact, tmp_path: Path):
    # Codebook and phis are in the file as they were kept, or in the others' format.
    config = VQVAEConfig(base_channels=32, codebook_size=96)
    vqvae = VQVAE(config).bfloat16()
    vqvae.quantizer.to(exact)
    save_vqvae(tmp_path / "vqvae.safetensors", vqvae)
    stays = mapped(lambda: VQVAE(config), tmp_path / "vqvae.safetensors", VQVAE_KEYS, dtype)
    assert stays == {dtype == torch.bfloat16}


@pytest.mark.parametrize("exact", [torch.bfloat16, torch.float32])
def test_a_transformer_stays_in_its_file_whatever_its_log_scales_are(exact, paired: Any, tmp_path: Path):
    networks = Networks(paired.config.transformer).bfloat16()
    for name, parameter in networks.named_parameters():
        if name.endswith("log_scale"):
            parameter.data = parameter.data.to(exact)
    save_networks(tmp_path / "star.safetensors", paired.config, networks)
    stays = mapped(
        lambda: Networks(paired.config.transformer), tmp_path / "star.safetensors", STAR_KEYS, torch.bfloat16
    )
    assert stays == {True}


def test_half_precision_keeps_the_attention_scales_in_float32(files: Path):
    _, networks = load_networks(files / "star.safetensors", dtype=torch.bfloat16)
    for name, parameter in networks.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("log_scale") else torch.bfloat16), name


def test_dropped_keys_may_be_there(rewrite: Callable[..., Path], caplog: pytest.LogCaptureFixture):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["class_emb.weight"] = torch.zeros(3, 3)
        tensors["blocks.0.attn.zero_k_bias"] = torch.zeros(64)

    with caplog.at_level(logging.DEBUG, logger="star_core.weights"):
        load_networks(rewrite("star.safetensors", add))
    assert "class_emb.weight left out: VAR's ImageNet classes" in caplog.text
    assert "blocks.0.attn.zero_k_bias left out: always zero" in caplog.text


# Refusals: one sentence with file, key and remedy


@contextmanager
def refused(path: Path, *parts: str) -> Iterator[None]:
    """Expect a ValueError of one line: the file's name, then the parts in this order."""
    pattern = ".*".join([re.escape(path.name), *parts])
    with pytest.raises(ValueError, match=pattern) as raised:
        yield
    assert "\n" not in str(raised.value)


def test_a_missing_key_is_refused(rewrite: Callable[..., Path]):
    path = rewrite("star.safetensors", lambda tensors: tensors.pop("blocks.1.ffn.fc2.bias"))
    with refused(path, "1 tensors are missing", r"blocks\.1\.ffn\.fc2\.bias", "file"):
        load_networks(path)


def test_a_surplus_key_is_refused(rewrite: Callable[..., Path]):
    path = rewrite("star.safetensors", lambda tensors: tensors.update({"blocks.0.gate": torch.zeros(1)}))
    with refused(path, "1 tensors are not known", r"blocks\.0\.gate", "preset"):
        load_networks(path)


def test_a_block_too_many_contradicts_the_configuration(rewrite: Callable[..., Path]):
    def add(tensors: dict[str, Tensor]) -> None:
        block = {name: t for name, t in tensors.items() if name.startswith("blocks.1.")}
        tensors.update({name.replace("blocks.1.", "blocks.2."): t.clone() for name, t in block.items()})

    path = rewrite("star.safetensors", add)
    with refused(path, "is not tiny", "depth is 3 in the file and 2"):
        load_networks(path)


def test_a_wrong_shape_is_refused(rewrite: Callable[..., Path]):
    path = rewrite("star.safetensors", lambda tensors: tensors.update({"head_logits.bias": torch.zeros(9)}))
    with refused(path, r"head_logits\.bias has shape \(9,\)", r"\(64,\)", "preset"):
        load_networks(path)


def test_two_names_for_one_tensor_are_refused(rewrite: Callable[..., Path]):
    # The second spelling is our own; without the check whichever came last would win.
    name = "decoder.up.0.block.0.{}shortcut.weight"

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name.format("")] = tensors[name.format("nin_")] + 1

    path = rewrite("vqvae.safetensors", add)
    with refused(path, "1 tensors are not known", "shortcut"):
        load_vqvae(path)


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(length: int, files: Path):
    path = files / "cut.safetensors"
    path.write_bytes((files / "star.safetensors").read_bytes()[:length])
    with refused(path, "not a whole safetensors file", "Download it again"):
        load_networks(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors: no such file"):
        load_networks(tmp_path / "nowhere.safetensors")


def test_the_quantizer_stays_in_float32_whatever_the_vqvae_is_in(files: Path, paired: Any):
    vqvae = load_vqvae(files / "vqvae.safetensors", dtype=torch.bfloat16)
    assert vqvae.decoder.conv_in.weight.dtype == torch.bfloat16
    for name, tensor in vqvae.quantizer.state_dict().items():
        assert torch.equal(tensor, paired.quantizer.state_dict()[name])


def test_a_vqvae_given_as_transformer_is_refused(files: Path):
    path = files / "vqvae.safetensors"
    with refused(path, "not a STAR transformer", "word_embed", "own"):
        load_networks(path)


def test_a_transformer_given_as_vqvae_is_refused(files: Path):
    path = files / "star.safetensors"
    with refused(path, "tensors are missing, the first is encoder", "right file"):
        load_vqvae(path)


def test_another_vqvae_than_the_checkpoint_was_trained_with_is_refused(files: Path):
    path = files / "vqvae.safetensors"
    with refused(path, "another VQ-VAE", "base_channels=8"):
        load_vqvae(path, VQVAEConfig())


def test_a_pickle_given_as_safetensors_is_refused_with_the_way_out(tmp_path: Path):
    path = tmp_path / "model.pth"
    torch.save({"word_embed.weight": torch.zeros(2, 2)}, path)
    with refused(path, "not a whole safetensors file", "convert"):
        load_networks(path)


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("var_d16_256", ["star-256-d16"]),
        ("var_d30_256", ["star-256-d30", "star-512-d30"]),
        ("var_d30_512", ["star-256-d30", "star-512-d30"]),
        ("var_d30_1024", ["star-1024-d30"]),
        ("var_d30_1024_sampler", ["star-1024-d30-sampler"]),
    ],
)
def test_a_bare_state_dict_without_preset_is_refused_with_the_presets_that_fit(
    name: str, fitting: list[str], tmp_path: Path
):
    path = hollow_file(tmp_path / "bare.safetensors", RELEASED[name])
    with pytest.raises(ValueError, match="choose a preset") as raised:
        load_networks(path)
    assert "bare.safetensors" in str(raised.value)
    assert str(raised.value).endswith(f": {', '.join(fitting)}")


@pytest.mark.parametrize(
    ("name", "preset", "complaint"),
    [
        ("var_d16_256", "star-256-d30", "depth is 16 in the file and 30 in the preset"),
        ("var_d30_256", "star-1024-d30", "scales is 10 in the file and 14 in the preset"),
        ("var_d30_1024", "star-1024-d30-sampler", "sampler_depth is 0 in the file and 3 in the preset"),
        ("var_d30_1024_sampler", "star-1024-d30", "sampler_depth is 3 in the file and 0 in the preset"),
    ],
)
def test_a_preset_that_the_shapes_contradict_is_refused(name: str, preset: str, complaint: str, tmp_path: Path):
    path = hollow_file(tmp_path / "bare.safetensors", RELEASED[name])
    with refused(path, f"is not {preset}", complaint):
        load_networks(path, preset_name=preset)


def test_the_256_px_configuration_with_a_sampler_is_found_by_its_shapes(tmp_path: Path):
    shapes = dict(RELEASED["var_d30_1024_sampler"])
    shapes |= {name: [10, *shape[1:]] for name, shape in shapes.items() if name.startswith("lvl_embed")}
    path = hollow_file(tmp_path / "bare.safetensors", shapes)
    with pytest.raises(ValueError, match=r"choose a preset.*: star-256-d30-sampler$"):
        load_networks(path)
    config = resolve_config(TensorFile(path), "star-256-d30-sampler")
    assert (config.transformer.rope_theta, config.transformer.rope_extent) == (100, 32)


def test_sizes_that_no_released_model_has_are_told_and_no_preset_is_proposed(rewrite: Callable[..., Path]):
    with pytest.raises(
        ValueError, match="no released one has its sizes .depth 2, width 64.*save_networks"
    ) as said:
        load_networks(rewrite("star.safetensors", metadata={}))
    assert "preset" not in str(said.value)


def test_metadata_that_the_tensors_contradict_is_what_is_blamed(rewrite: Callable[..., Path], paired: Any):
    deeper = dataclasses.replace(paired.config.transformer, depth=3)
    stored = dataclasses.replace(paired.config, transformer=deeper).to_json()
    path = rewrite("star.safetensors", metadata={"star": stored})
    with refused(path, "depth is 2 in the file and 3 in its metadata"):
        load_networks(path)


def test_a_tensor_of_another_shape_is_named_with_it(rewrite: Callable[..., Path]):
    def flatten(tensors: dict[str, Tensor]) -> None:
        tensors["word_embed.weight"] = tensors["word_embed.weight"].flatten()

    path = rewrite("star.safetensors", flatten)
    with refused(path, r"word_embed\.weight \[512\]"):
        load_networks(path)


def test_a_preset_that_the_metadata_contradicts_is_refused(tmp_path: Path):
    # The 256 px and 512 px models have equal names and shapes: only the metadata can tell.
    metadata = {"star": PRESETS["star-512-d30"].to_json()}
    path = hollow_file(tmp_path / "said.safetensors", RELEASED["var_d30_512"], metadata)
    with refused(path, "star-512-d30", "star-256-d30", "leave the preset out"):
        load_networks(path, preset_name="star-256-d30")
    assert resolve_config(TensorFile(path), "star-512-d30") == PRESETS["star-512-d30"]
    assert resolve_config(TensorFile(path), None) == PRESETS["star-512-d30"]


def test_an_unknown_preset_is_refused_with_the_list(tmp_path: Path):
    path = hollow_file(tmp_path / "bare.safetensors", RELEASED["var_d16_256"])
    with pytest.raises(ValueError, match="no preset 'star-d16'.*star-256-d16, star-256-d30"):
        load_networks(path, preset_name="star-d16")


def without(config: StarConfig, field: str) -> str:
    record = json.loads(config.to_json())
    del record[field]
    return json.dumps(record)


@pytest.mark.parametrize("spoil", ["no json", "[]", "maps", "transformer", "vqvae"])
def test_metadata_that_is_no_configuration_is_refused_by_file(
    spoil: str, rewrite: Callable[..., Path], paired: Any
):
    text = without(paired.config, spoil) if spoil.isidentifier() else spoil
    path = rewrite("star.safetensors", metadata={"star": text})
    with refused(path, "not a STAR configuration"):
        load_networks(path)


def test_metadata_with_an_impossible_configuration_is_refused_by_file(
    rewrite: Callable[..., Path], paired: Any
):
    record = json.loads(paired.config.to_json())
    record["maps"] = record["maps"][:-1]
    path = rewrite("star.safetensors", metadata={"star": json.dumps(record)})
    with refused(path, "3 token maps, but the transformer has 4 scales"):
        load_networks(path)


@pytest.mark.parametrize("text", ["no json", "7", '{"vqvae": {"norm_groups": 7}}', '{"vqvae": {"a": 1}}'])
def test_metadata_that_describes_no_vqvae_is_refused_by_file(text: str, rewrite: Callable[..., Path]):
    path = rewrite("vqvae.safetensors", metadata={"star": text})
    with refused(path, "describes no VQ-VAE"):
        load_vqvae(path)


def test_the_command_line_refuses_in_one_line(files: Path, capsys: pytest.CaptureFixture[str]):
    path = files / "cut.safetensors"
    path.write_bytes((files / "star.safetensors").read_bytes()[:-1])
    assert main(["inspect", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "cut.safetensors" in lines[0]


# The key table itself


def test_an_unknown_name_has_no_translation():
    table = KeyTable({"a.#.b": "x.#.y"}, {"gone.*": "a reason"})
    assert table.ours("a.12.b") == "x.12.y"
    assert table.official("x.12.y") == "a.12.b"
    assert table.ours("a.one.b") is None
    assert table.ours("a.1.b.c") is None
    assert table.reason_dropped("gone.away") == "a reason"
    assert table.reason_dropped("gone") is None


def test_the_first_complaint_counts_and_names_both_kinds(paired: Any):
    wanted = build_on_meta(lambda: VQVAE(paired.config.vqvae))
    with pytest.raises(
        ValueError, match="tensors are missing, the first is .*; 1 tensors are not known"
    ) as raised:
        check_keys(wanted, {"foreign": torch.zeros(1)}, VQVAE_KEYS, "here")
    assert str(raised.value).startswith("here: ")


def test_facts_are_read_from_names_and_shapes():
    facts = transformer_facts({n: tuple(s) for n, s in RELEASED["var_d30_1024_sampler"].items()}, "a file")
    assert (facts.depth, facts.width, facts.heads, facts.scales) == (30, 1920, 30, 14)
    assert (facts.text_width, facts.codebook_size, facts.code_width, facts.sampler_depth) == (1024, 4096, 32, 3)


# Pickles


class Intruder:
    """Makes a folder when an unguarded reader opens its pickle."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path: Path):
    path, mark = tmp_path / "model.pth", tmp_path / "mark"
    torch.save({"trainer": {"var_wo_ddp": {}}, "args": Intruder(mark)}, path)
    with refused(path, "asks for .*mkdir", "could run code", "safetensors"):
        read_pickle(path)
    assert not mark.exists()


def test_a_plain_pickle_is_refused_too(tmp_path: Path):
    path, mark = tmp_path / "model.pkl", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Intruder(mark), protocol=2))
    with refused(path):
        read_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize("length", [0, 3, 100, -30])
def test_a_truncated_pickle_is_refused(length: int, tmp_path: Path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(400)}, buffer)
    path = tmp_path / "cut.pth"
    path.write_bytes(buffer.getvalue()[:length])
    with refused(path, "not a whole PyTorch file", "Download it again"):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_web_page_or_a_pointer_given_as_pickle_is_refused(content: bytes, tmp_path: Path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with refused(path, "not a whole PyTorch file", "Download it again"):
        read_pickle(path)


def test_safetensors_given_as_pickle_are_called_what_they_are(files: Path):
    with refused(files / "star.safetensors", "this is a safetensors file"):
        read_pickle(files / "star.safetensors")


def test_an_old_style_pickle_is_read(tmp_path: Path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.arange(6.0)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(path)["a"], torch.arange(6.0))
