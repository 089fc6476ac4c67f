"""Prompts become the same states whatever the file's spelling, the batch, or transformers' version."""

import json
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from star_core import star
from star_core.model_files import SHIPPED
from star_core.text_encoder import load_text_encoder, load_tokenizer
from star_core.text_files import quantize_rows, whole_rows
from star_core.training.bpe import END, START, token_texts, vocabulary, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "a p", "ap p", "l e</w>", "app le</w>", "p h"]
SETTINGS = {
    "model_type": "clip_text_model",
    "vocab_size": 512 + len(MERGES) + 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 512 + len(MERGES),
    "eos_token_id": 512 + len(MERGES) + 1,
}
PROMPTS = ["a red apple", "", "Cat, with a red CAT?"]
ROWS = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(MERGES, tmp_path_factory.mktemp("words") / "tokenizer")


def random_tensors(settings, prefix="text_model."):
    """Return a random text model's tensors under the names that released files have."""
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    shapes = {
        "embeddings.token_embedding.weight": (settings["vocab_size"], width),
        "embeddings.position_embedding.weight": (settings["max_position_embeddings"], width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for layer in range(settings["num_hidden_layers"]):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{name}.self_attn.{part}.weight"] = (width, width)
            shapes[f"{name}.self_attn.{part}.bias"] = (width,)
        for part in ("layer_norm1", "layer_norm2"):
            shapes[f"{name}.{part}.weight"] = shapes[f"{name}.{part}.bias"] = (width,)
        shapes |= {f"{name}.mlp.fc1.weight": (inner, width), f"{name}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{name}.mlp.fc2.weight": (width, inner), f"{name}.mlp.fc2.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_folder(folder, tokenizer, *, tensors=None, settings=SETTINGS):
    """Write a model in Stable Diffusion's layout."""
    home = folder / "text_encoder"
    home.mkdir(parents=True)
    save_file(tensors or random_tensors(settings), home / "model.safetensors")
    (home / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer").symlink_to(tokenizer)
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer):
    return write_folder(tmp_path / "model", tokenizer)


@pytest.fixture
def encoder(folder):
    return load_text_encoder(folder)


def equal(states, others):
    return all(torch.equal(getattr(states, n), getattr(others, n)) for n in ("hidden", "mask", "pooled"))


def test_states_have_the_documented_shapes_and_the_mask_marks_real_tokens(encoder):
    states = encoder.encode(PROMPTS)
    assert states.hidden.shape == (3, 77, 64)
    assert states.hidden.dtype == states.pooled.dtype == torch.float32
    assert encoder.width == 64
    # START a red apple END; START END; START cat , with(4 letters) a red cat ! END
    assert states.mask.sum(1).tolist() == [5, 2, 12]
    assert not (states.mask[:, :-1] < states.mask[:, 1:]).any()


def test_pooled_is_the_state_of_the_first_end_of_text(encoder):
    states = encoder.encode(PROMPTS)
    last = states.mask.sum(1) - 1
    assert torch.equal(states.pooled, states.hidden[torch.arange(3), last])


def test_a_prompt_does_not_depend_on_its_neighbours(encoder):
    batch = encoder.encode(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        single = encoder.encode([prompt])
        torch.testing.assert_close(batch.hidden[index], single.hidden.squeeze(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.pooled[index], single.pooled.squeeze(0), atol=1e-5, rtol=0)


def test_real_tokens_do_not_see_the_padding(folder, encoder):
    # Another padding token, as SD 2.1 has, changes padded positions and nothing else.
    words = folder / "words"
    write_tokenizer(MERGES, words)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((words / name).read_text())
        (words / name).write_text(json.dumps(content | {"pad_token": "!"}))
    other = load_text_encoder(folder, words)
    ids, mask = other.tokenize(["a cat"])
    assert ids[~mask].unique().tolist() == [0]
    ours, theirs = encoder.encode(PROMPTS), other.encode(PROMPTS)
    assert torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.hidden[ours.mask], theirs.hidden[theirs.mask])
    assert torch.equal(ours.pooled, theirs.pooled)


@pytest.mark.parametrize("end", [2, SETTINGS["eos_token_id"]], ids=["legacy", "new"])
def test_both_rules_for_the_end_of_text_find_it(tmp_path, tokenizer, encoder, end):
    # Configurations older than transformers 4.31 (SD 2.1's) say 2, which means: the highest id.
    settings = SETTINGS | {"eos_token_id": end}
    other = load_text_encoder(write_folder(tmp_path / "other", tokenizer, settings=settings))
    assert equal(encoder.encode(PROMPTS), other.encode(PROMPTS))


def test_a_long_prompt_is_cut_with_a_warning_that_quotes_what_is_lost(encoder, caplog):
    with caplog.at_level(logging.WARNING, "star_core.text_encoder"):
        states = encoder.encode(["red " * 75 + "apple cat"])
    assert "'apple cat'" in caplog.text
    assert states.mask.all()
    ids, _ = encoder.tokenize(["red " * 75 + "apple cat"])
    assert ids[0, -1] == SETTINGS["eos_token_id"]


@pytest.mark.parametrize("prompts", ["a cat", []], ids=["string", "nothing"])
def test_prompts_that_are_no_list_are_refused(encoder, prompts):
    with pytest.raises(ValueError, match="encode"):
        encoder.encode(prompts)


def test_a_file_without_the_prefix_gives_the_same_states(tmp_path, tokenizer, encoder):
    bare = random_tensors(SETTINGS, prefix="")
    other = load_text_encoder(write_folder(tmp_path / "bare", tokenizer, tensors=bare))
    assert equal(encoder.encode(PROMPTS), other.encode(PROMPTS))


def test_known_extras_are_left_out(tmp_path, tokenizer, encoder):
    extras = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.ones(8, 64),
        "logit_scale": torch.ones(()),
        "vision_model.embeddings.class_embedding": torch.ones(4),
        "visual_projection.weight": torch.ones(4, 4),
    }
    tensors = random_tensors(SETTINGS) | extras
    other = load_text_encoder(write_folder(tmp_path / "extras", tokenizer, tensors=tensors))
    assert equal(encoder.encode(PROMPTS), other.encode(PROMPTS))
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    other = load_text_encoder(write_folder(tmp_path / "bare extras", tokenizer, tensors=bare))
    assert equal(encoder.encode(PROMPTS), other.encode(PROMPTS))


def test_a_folder_as_transformers_writes_it_loads(tmp_path, tokenizer, encoder):
    encoder.model.save_pretrained(tmp_path / "saved")
    encoder.tokenizer.save_pretrained(tmp_path / "saved")
    for name in ("vocab.json", "merges.txt"):  # version 5 saves tokenizer.json alone
        (tmp_path / "saved" / name).write_bytes((tokenizer / name).read_bytes())
    other = load_text_encoder(tmp_path / "saved")
    assert equal(encoder.encode(PROMPTS), other.encode(PROMPTS))


def test_a_pickled_state_dict_loads(tmp_path, folder, tokenizer, encoder):
    home = folder / "text_encoder"
    torch.save(load_file(home / "model.safetensors"), home / "pytorch_model.bin")
    (home / "model.safetensors").unlink()
    assert equal(encoder.encode(PROMPTS), load_text_encoder(folder).encode(PROMPTS))


def test_one_file_and_a_vocabulary_suffice_where_shapes_tell_the_rest(tmp_path, tokenizer):
    settings = SETTINGS | {"hidden_size": 512, "num_attention_heads": 8, "hidden_act": "quick_gelu"}
    folder = write_folder(tmp_path / "model", tokenizer, settings=settings)
    lone = tmp_path / "text.safetensors"
    lone.write_bytes((folder / "text_encoder" / "model.safetensors").read_bytes())
    other = load_text_encoder(lone, tokenizer / "vocab.json")
    assert equal(load_text_encoder(folder).encode(PROMPTS), other.encode(PROMPTS))


def test_half_precision_is_chosen_at_the_edge(folder, encoder):
    half = load_text_encoder(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    states = half.encode(PROMPTS)
    assert states.hidden.dtype == torch.float32
    likeness = torch.cosine_similarity(states.pooled, encoder.encode(PROMPTS).pooled)
    assert likeness.min() > 0.99


def test_token_rows_in_eight_bits_come_back_within_half_a_step():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(50, 64, generator=generator) * torch.logspace(-3, 1, 50)[:, None]
    rows[3] = 0
    steps, scale = quantize_rows(rows)
    assert steps.dtype == torch.int8
    assert scale.dtype == torch.float16
    whole = whole_rows({f"{ROWS}.int8": steps, f"{ROWS}.scale": scale, "other": rows})
    assert set(whole) == {ROWS, "other"}
    assert ((whole[ROWS] - rows).abs() <= 0.502 * scale.float()[:, None]).all()
    # Storing once more changes nothing, so a converted file does not wear away.
    again, _ = quantize_rows(whole[ROWS])
    assert (again - steps).abs().max() <= 1


def test_a_file_with_rows_in_eight_bits_loads(tmp_path, tokenizer, encoder):
    tensors = random_tensors(SETTINGS)
    rows = tensors.pop(ROWS)
    tensors[f"{ROWS}.int8"], tensors[f"{ROWS}.scale"] = quantize_rows(rows)
    other = load_text_encoder(write_folder(tmp_path / "small", tokenizer, tensors=tensors))
    states = other.encode(PROMPTS)
    assert torch.cosine_similarity(states.pooled, encoder.encode(PROMPTS).pooled).min() > 0.999
    assert other.model.get_input_embeddings().weight.dtype == torch.float32


def missing_key(folder):
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    del tensors["text_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(tensors, folder / "text_encoder" / "model.safetensors")


def surplus_key(folder):
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    tensors["text_model.encoder.layers.2.mlp.fc2.bias"] = torch.ones(64)
    save_file(tensors, folder / "text_encoder" / "model.safetensors")


def wrong_shape(folder):
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    tensors["text_model.final_layer_norm.bias"] = torch.ones(65)
    save_file(tensors, folder / "text_encoder" / "model.safetensors")


def truncated(folder):
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()


def no_words(folder):
    (folder / "tokenizer").unlink()


def broken_config(folder):
    (folder / "text_encoder" / "config.json").write_text("{")


def foreign_config(folder):
    (folder / "text_encoder" / "config.json").write_text('{"model_type": "t5"}')


def unknown_width(folder):
    (folder / "text_encoder" / "config.json").unlink()


def words_with(name, content):
    """Return what gives a model's folder a tokenizer of its own, with other content in one file."""

    def damage(folder):
        whole = (folder / "tokenizer").resolve()
        (folder / "tokenizer").unlink()
        shutil.copytree(whole, folder / "tokenizer")
        path = folder / "tokenizer" / name
        path.write_bytes(content(path.read_bytes() if path.exists() else b""))

    return damage


def settings_with(**changed):
    """Return what changes a model's config.json."""
    return lambda folder: (folder / "text_encoder" / "config.json").write_text(json.dumps(SETTINGS | changed))


NO_TOKENIZER = r"vocab\.json and merges\.txt make no CLIP tokenizer \(.+\)\. Download both again"


@pytest.mark.parametrize("change", ["added word", "windows"])
def test_a_tokenizer_of_a_user_s_own_is_taken(folder, encoder, change):
    if change == "added word":
        words_with("vocab.json", lambda text: json.dumps(json.loads(text) | {"<cat-toy>": 523}).encode())(
            folder
        )
    else:
        words_with("merges.txt", lambda text: text.rstrip().replace(b"\n", b"\r\n"))(folder)
    words = load_tokenizer(folder / "tokenizer")
    assert words(PROMPTS)["input_ids"] == encoder.tokenizer(PROMPTS)["input_ids"]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (words_with("vocab.json", lambda text: text[: len(text) // 2]), NO_TOKENIZER),
        (words_with("vocab.json", lambda text: b'["a", "b"]'), NO_TOKENIZER),
        (words_with("vocab.json", lambda text: b'{"a": {"b": 1}}'), NO_TOKENIZER),
        (words_with("vocab.json", lambda text: b"null"), "vocab.json holds no words with their numbers"),
        (words_with("tokenizer.json", lambda text: b"<html>"), r"tokenizer\.json makes no CLIP.*or remove it"),
        (words_with("merges.txt", lambda text: bytes(range(256))), NO_TOKENIZER),
        (words_with("merges.txt", lambda text: b"<!DOCTYPE html>\n"), NO_TOKENIZER),
        (
            words_with("merges.txt", lambda text: text[: text.rstrip().rindex(b"\n")]),
            r"\(8 merges do not make 9 words",
        ),
        (words_with("merges.txt", lambda text: text[text.index(b"\n") + 1 :]), "does not begin with #version"),
        (words_with("merges.txt", lambda text: b""), "no merges.txt, or nothing in it"),
        (settings_with(hidden_act="foo"), r"config\.json: hidden_act is 'foo'.*Download it again"),
        (settings_with(hidden_act=["gelu"]), r"config\.json: hidden_act is \['gelu'\]"),
        (settings_with(hidden_size="128"), r"config\.json: hidden_size is '128'"),
        (settings_with(hidden_size=None), "config.json: no hidden_size"),
        (settings_with(num_attention_heads=7), r"config\.json: hidden_size 64 is not split by 7 heads"),
        (settings_with(num_hidden_layers=0), r"config\.json: num_hidden_layers is 0"),
        (settings_with(layer_norm_eps="tiny"), r"config\.json: layer_norm_eps is 'tiny'"),
        (settings_with(eos_token_id=-1), r"config\.json: eos_token_id is -1"),
        (missing_key, r"missing.*text_model\.encoder\.layers\.1\.mlp\.fc2\.bias"),
        (surplus_key, r"not known.*text_model\.encoder\.layers\.2\.mlp\.fc2\.bias"),
        (wrong_shape, r"text_model\.final_layer_norm\.bias has shape \(65,\).*\(64,\)"),
        (truncated, "not a whole safetensors file.*Download it again"),
        (no_weights, "no model.safetensors"),
        (no_words, "no tokenizer found.*vocab.json"),
        (broken_config, "config.json: not JSON"),
        (foreign_config, "config.json: no hidden_size"),
        (unknown_width, "width 64.*config.json"),
    ],
)
def test_damage_is_refused_with_file_and_remedy(folder, damage, complaint):
    damage(folder)
    with pytest.raises(ValueError, match=complaint) as refusal:
        load_text_encoder(folder)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "lost", ["tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/model.safetensors"]
)
def test_a_missing_text_file_is_told_before_the_model_s_weights_are_read(lost, tmp_path, monkeypatch):
    for name in ("star.safetensors", "vqvae.safetensors"):
        shutil.copy(SHIPPED / name, tmp_path)
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(SHIPPED / name, tmp_path / name)
    (tmp_path / lost).unlink()
    monkeypatch.setattr(star, "load_networks", lambda *args, **options: pytest.fail("gigabytes were read"))
    with pytest.raises(ValueError, match=re.escape(Path(lost).name)):
        star.load(tmp_path)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(folder, tmp_path):
    other = write_tokenizer([*MERGES, "a b", "b a"], tmp_path / "larger")
    with pytest.raises(ValueError, match="523 tokens.*tokenizer|525 tokens"):
        load_text_encoder(folder, other)


def test_another_models_file_is_refused(tmp_path, tokenizer):
    save_file({"blocks.0.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    # Nobody's file but the shipped one has rows in 8 bits: they are no remedy.
    with pytest.raises(ValueError, match=rf"no tensor {ROWS}, so not a CLIP text model"):
        load_text_encoder(tmp_path / "other.safetensors", tokenizer)


def test_a_configuration_may_begin_with_a_mark_of_its_bytes_order(folder, encoder):
    path = folder / "text_encoder" / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert equal(encoder.encode(PROMPTS), load_text_encoder(folder).encode(PROMPTS))


def test_half_a_character_in_a_prompt_is_refused(encoder):
    words = encoder.words
    for ask in (lambda text: encoder.encode(["whole", text]), words.measure):
        with pytest.raises(ValueError, match=r"half a character.* at its place 3: write it anew"):
            ask("a \ud83d car")


def test_the_vocabulary_follows_the_order_of_bytes_and_merges(tokenizer):
    ids = vocabulary(MERGES)
    # The first and last ids of CLIP's own vocabulary, whatever merges stand between.
    assert (ids["!"], ids["~"], ids["!</w>"], ids["ca"]) == (0, 93, 256, 512)
    assert (ids[START], ids[END]) == (len(ids) - 2, len(ids) - 1)
    assert token_texts(["Ã©</w>", "cat</w>", END]) == ["é", "cat", ""]
    words = load_tokenizer(tokenizer)
    assert words("Cat\n apple")["input_ids"] == [ids[t] for t in (START, "cat</w>", "apple</w>", END)]


STATES_IN_ANOTHER_PYTHON = """
import json, sys
from pathlib import Path
import transformers
from safetensors.torch import save_file
from star_core.text_encoder import load_text_encoder
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
prompts = json.loads(sys.argv[3])
encoder = load_text_encoder(folder)
ids, _ = encoder.tokenize(prompts)
states = encoder.encode(prompts)
found = {"ids": ids, "hidden": states.hidden, "mask": states.mask, "pooled": states.pooled}
save_file({k: v.contiguous() for k, v in found.items()}, out, {"version": transformers.__version__})
"""
ODD_PROMPTS = [
    *PROMPTS,
    "it's a cat\u2019s 3D apple; 100% red!!!",
    "  Caf\u00e9 e\u0301clair\t\u00df \u4e2d\u6587 \U0001f34e &amp; <b>",
    "<|endoftext|> cat",
    "red " * 80,
]


def test_another_transformers_gives_the_same_ids_and_states(folder, tmp_path):
    other = os.environ.get("STAR_OTHER_PYTHON")
    if not other:
        pytest.skip("STAR_OTHER_PYTHON names no interpreter with another transformers version")
    shipped = ROOT / "star_core" / "demo"
    sources = [folder, *([shipped] if (shipped / "text_encoder").is_dir() else [])]
    for number, source in enumerate(sources):
        out = tmp_path / f"{number}.safetensors"
        arguments = [str(source), str(out), json.dumps(ODD_PROMPTS)]
        command = [other, "-c", STATES_IN_ANOTHER_PYTHON, *arguments]
        subprocess.run(command, cwd=ROOT, check=True)
        theirs = load_file(out)
        encoder = load_text_encoder(source)
        ours = encoder.encode(ODD_PROMPTS)
        assert torch.equal(encoder.tokenize(ODD_PROMPTS)[0], theirs["ids"])
        assert torch.equal(ours.mask, theirs["mask"])
        # Old and new versions may order the attention's sums differently; masked rows included.
        torch.testing.assert_close(ours.hidden, theirs["hidden"], atol=2e-5, rtol=0)
        torch.testing.assert_close(ours.pooled, theirs["pooled"], atol=2e-5, rtol=0)
