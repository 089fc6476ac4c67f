"""The text encoder's training draws what a seed says, words prompts as people do, and exports what it has."""

import argparse
import copy
import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from star_core.text_encoder import load_text_encoder, load_tokenizer
from star_core.training import minilm, text, text_corpus, wording, words
from star_core.training.bpe import VOCABULARY, read_merges, write_tokenizer
from star_core.training.drawings import STYLES

MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "n o", "t o</w>", "no to</w>", "o f</w>"]
SYNSETS = """  1 This line is the licence's.
00000001 06 n 02 aeroplane 0 jet_plane 0 001 @ 00000002 n 0000 | an aircraft with fixed wings; "it flies"
00000002 05 n 02 true_cat 0 Felis_catus 0 000 | feline mammal usually having thick soft fur, and no roar
00000003 09 n 01 thought 0 000 | the content of cognition
"""
EMOJI = [
    {"label": "red apple", "tags": ["apple", "fruit"]},
    {"label": "man: bald", "tags": ["bald"]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(MERGES, tmp_path_factory.mktemp("words")))


@pytest.fixture
def packages(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(EMOJI))
    (tmp_path / "data.noun").write_text(SYNSETS)
    return tmp_path


def gather(packages, seed=0):
    sizes = {"words": 2, "phrases": 20, "glosses": 5}
    return words.gather(packages, packages, ["jet", "apple", "?!"], **sizes, seed=seed)


def test_contents_are_what_pictures_may_show_once_each(packages):
    found = gather(packages)
    assert found.emoji[0] == ""
    assert {"red apple", "apple", "bald man", "bald"} <= set(found.emoji)
    assert found.vocabulary == ("jet",)  # apple is an emoji's name already, ?! is no word
    assert set(found.words) == {"aeroplane", "jet plane", "true cat"} & set(found.words)
    assert set(found.glosses) == {
        "an aircraft with fixed wings",
        "feline mammal usually having thick soft fur",
    }
    everything = [text for part in vars(found).values() for text in part]
    assert len(everything) == len(set(everything))
    assert found == gather(packages)
    assert found.phrases != gather(packages, seed=1).phrases


@pytest.mark.parametrize("name", ["data.json", "data.noun"])
def test_a_missing_package_file_is_named(packages, name):
    (packages / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        gather(packages)


def test_the_wording_names_every_style_of_the_pictures():
    assert sorted(wording.STYLES) == sorted(STYLES)


def test_tokens_put_together_are_those_of_the_sentence(tokenizer):
    drawer = wording.Wording(tokenizer)
    content = tuple(tokenizer("red cat")["input_ids"][1:-1])
    for style, choices in zip(wording.STYLES, drawer.styled, strict=True):
        for template, (before, after) in zip(wording.STYLED, choices, strict=True):
            sentence = f"{template.before} red cat {template.after}".format(style=style)
            assert [*before, *content, *after] == tokenizer(sentence)["input_ids"][1:-1]


def test_the_empty_prompt_stays_empty_and_names_no_style(tokenizer):
    drawer = wording.Wording(tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert drawer.draw((), rng) == ([VOCABULARY - 2, VOCABULARY - 1], wording.NO_STYLE)


def test_a_long_content_keeps_its_end_of_text(tokenizer):
    ids, _ = wording.Wording(tokenizer).draw((5,) * 90, np.random.default_rng(0))
    assert len(ids) == 77
    assert ids[-1] == VOCABULARY - 1


@pytest.fixture(scope="module")
def corpus(tokenizer):
    texts = {
        kind: tuple(f"{kind} {number}" * (number > 0 or kind != "emoji") for number in range(120))
        for kind in text_corpus.SHARES
    }
    targets = torch.randn(5 * 120, minilm.WIDTH, generator=torch.Generator().manual_seed(0))
    return text_corpus.number(texts, F.normalize(targets, dim=-1), tokenizer)


def test_a_batch_is_decided_by_seed_and_step_and_leaves_out_what_is_measured(corpus, tokenizer):
    drawer = wording.Wording(tokenizer)

    def batch(step):
        return text_corpus.draw_batch(corpus, drawer, 128, seed=3, step=step)

    first = batch(7)
    assert torch.equal(first.ids, batch(7).ids)
    assert not torch.equal(first.targets, batch(8).targets)
    assert first.lengths.min() == 2  # the unconditional prompt is in every batch
    aside = corpus.targets[np.concatenate(list(corpus.held_out.values()))]
    assert (first.targets @ aside.T).max() < 0.99
    assert all(len(part) >= 2 for part in corpus.held_out.values())


@pytest.fixture(scope="module")
def student():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(VOCABULARY, minilm.WIDTH, generator=generator) / minilm.WIDTH**0.5
    before = torch.get_rng_state()
    made = text.new_student(rows, text.principal_directions(rows[:2000]), seed=0)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not ours"
    return made


def test_a_row_does_not_depend_on_its_batch(student):
    ids, lengths = text_corpus.padded([[9, 1, 8], [9, 2, 3, 4, 5, 8], [9, 8], [9, 7, 8]])
    with torch.no_grad():
        pooled, mean = student(ids, lengths)
        for row, length in enumerate(lengths):
            single, single_mean = student(ids[row : row + 1, :length], lengths[row : row + 1])
            torch.testing.assert_close(pooled[row], single.squeeze(0), atol=1e-5, rtol=0)
            torch.testing.assert_close(mean[row], single_mean.squeeze(0), atol=1e-5, rtol=0)


def test_a_few_steps_lower_the_loss_and_reach_the_rows(student, corpus, tokenizer):
    drawer = wording.Wording(tokenizer)
    batch = text_corpus.draw_batch(corpus, drawer, 16, seed=0, step=0)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(2):
        loss = text.loss_of(student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    norm = student.model.get_submodule(
        "text_model.final_layer_norm" if hasattr(student.model, "text_model") else "final_layer_norm"
    )
    assert torch.equal(norm.weight, torch.ones(text.WIDTH))


def test_a_run_trains_under_the_precision_asked_for(student, corpus, tokenizer, tmp_path, monkeypatch):
    seen = []
    whole = text.loss_of

    def loss_of(taught, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return whole(taught, batch)

    monkeypatch.setattr(text, "loss_of", loss_of)
    parser = argparse.ArgumentParser()
    text.add_arguments(parser)
    shared = ["--device", "cpu", "--steps", "1", "--batch", "8"]
    for number, more in enumerate(([], ["--bfloat16"])):
        args = parser.parse_args(["--run", str(tmp_path / str(number)), *shared, *more])
        text.train(copy.deepcopy(student), corpus, wording.Wording(tokenizer), args)
    assert seen == [False, True]


def test_an_export_computes_what_the_student_does(student, tmp_path, tokenizer):
    words_folder = write_tokenizer(MERGES, tmp_path / "words")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "stale").touch()
    text.export(student, words_folder, tmp_path / "export")
    assert not (tmp_path / "export" / "stale").exists()
    encoder = load_text_encoder(tmp_path / "export")
    size = sum(path.stat().st_size for path in (tmp_path / "export").rglob("*.safetensors"))
    assert size < 8.2e6
    ids = encoder.tokenizer("red cat")["input_ids"]
    # This small vocabulary ends elsewhere than CLIP's, so the state is taken by place.
    hidden = encoder.encode(["red cat"]).hidden[0, len(ids) - 1]
    with torch.no_grad():
        pooled, _ = student(torch.tensor([ids]), torch.tensor([len(ids)]))
    assert torch.cosine_similarity(hidden, pooled.squeeze(0), dim=0) > 0.999


def teacher(vocabulary):
    """Return a MiniLM of random weights over a small word list."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    generator = torch.Generator().manual_seed(2)
    shapes = {
        "embeddings.word_embeddings.weight": (len(vocabulary), minilm.WIDTH),
        "embeddings.position_embeddings.weight": (64, minilm.WIDTH),
        "embeddings.token_type_embeddings.weight": (2, minilm.WIDTH),
    }
    for name in minilm.tensor_names():
        inner = 1536 if "intermediate" in name else minilm.WIDTH
        if name not in shapes:
            wide = 1536 if ".output.dense" in name and "attention" not in name else minilm.WIDTH
            matrix = name.endswith("weight") and "LayerNorm" not in name
            shapes[name] = (inner, wide) if matrix else (inner,)
    tensors = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tokens = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, "?"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return minilm.MiniLM(tensors, tokens)


def test_the_teacher_gives_unit_vectors_that_padding_does_not_change():
    encoder = teacher(["?", "red", "cat", "apple"])
    texts = ["red", "cat cat apple red cat apple", "apple cat"]
    together = encoder.embed(texts)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    for row, single in enumerate(texts):
        torch.testing.assert_close(together[row], encoder.embed([single]).squeeze(0), atol=1e-5, rtol=0)


def test_the_teachers_work_is_kept_and_not_done_again(tmp_path):
    encoder = teacher(["?", "red", "cat"])
    texts = ["red", "cat", "red cat"]
    first = minilm.embed_cached(encoder, texts, tmp_path, chunk=2)
    assert len(list(tmp_path.iterdir())) == 2
    encoder.embed = None  # a second look at the same texts must not compute
    assert torch.equal(minilm.embed_cached(encoder, texts, tmp_path, chunk=2), first)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"#version\na b\n")], ids=["foreign", "short"])
def test_a_file_that_is_not_the_merge_list_is_refused(tmp_path, content):
    (tmp_path / "merges.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"merges\.gz: not .*download"):
        read_merges(tmp_path / "merges.gz")
