"""Every training stage from pictures to exported files, on a handful of pictures; killed and resumed."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from star_core.__main__ import main
from star_core.causal_sampler import CausalSampler
from star_core.checkpoint import load_networks, load_vqvae
from star_core.config import square_maps, token_count
from star_core.model_files import SHIPPED
from star_core.request import Options, ScaleStep
from star_core.star import load
from star_core.text_encoder import TextEncoder
from star_core.training import causal_sampler, decoder, tokenizer, transformer, versions
from star_core.training import lessons as lessons_module
from star_core.training.augmentation import Motion
from star_core.training.dropout import Dropout
from star_core.training.emoji import EmojiSet
from star_core.training.lessons import Lessons, motion_of
from star_core.training.redrawn import redraw_last_scales
from star_core.training.run import Checkpoint
from star_core.training.self_correction import TokenCorruption
from star_core.transformer import TextBlock
from star_core.weights import TensorFile

SIDES = ["--sides", "1", "2", "4"]
SMALL = ["--channels", "8", "--multipliers", *"111", "--codebook", "32", "--code-width", "4"]
"""A VQ-VAE of four pixels to a token."""


class Killed(BaseException):
    """As a kill, no handler of errors sees it."""


@pytest.fixture(scope="module", autouse=True)
def _text_encoder_read_once(read_once: Callable[..., TextEncoder]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for stage in (transformer, causal_sampler):
            patch.setattr(stage, "load_text_encoder", read_once)
        yield


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch, distance: nn.Module) -> None:
    for stage in (tokenizer, decoder):
        monkeypatch.setattr(stage, "asset_path", lambda name, folder: folder)
        monkeypatch.setattr(stage, "load_lpips", lambda path, kind: distance)


def train(stage: ModuleType, run: Path, data: Path, *options: str, steps: int = 4) -> Path:
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    shared = ["--run", str(run), "--data", str(data), "--size", "16", "--device", "cpu"]
    shared += ["--steps", str(steps), "--batch", "4", "--save-every", "2"]
    stage.run(parser.parse_args([*shared, *options]))
    return run


@pytest.fixture(scope="module")
def tokenizer_run(data: Path, distance: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "asset_path", lambda name, folder: folder)
        patch.setattr(tokenizer, "load_lpips", lambda path, kind: distance)
        return train(tokenizer, tmp_path_factory.mktemp("tokenizer"), data, *SMALL, *SIDES, "--bfloat16")


def transformer_options(tokenizer_run: Path) -> list[str]:
    return [
        "--tokenizer-run",
        str(tokenizer_run),
        "--text",
        str(SHIPPED),
        "--depth",
        "1",
        "--width",
        "64",
        *SIDES,
    ]


@pytest.fixture(scope="module")
def transformer_run(data: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(transformer, tmp_path_factory.mktemp("star"), data, *transformer_options(tokenizer_run))


def killed_after(stage: ModuleType, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    where = stage if hasattr(stage, "shuffled_batches") else lessons_module
    whole = where.shuffled_batches

    def batches(count: int, batch: int, seed: int, first_step: int) -> Iterator[Tensor]:
        for number, indices in enumerate(whole(count, batch, seed, first_step), start=first_step):
            if number == step:
                raise Killed
            yield indices

    monkeypatch.setattr(where, "shuffled_batches", batches)


def assert_same_file(one: Path, other: Path) -> None:
    ours, theirs = TensorFile(one), TensorFile(other)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_killed_transformer_run_ends_as_an_unbroken_one(data, tokenizer_run, tmp_path):
    options = [*transformer_options(tokenizer_run), "--variants", "3", "--corruption", "0.3"]
    options += ["--dropout", "0.2", "--weight-decay", "0.2"]
    whole = train(transformer, tmp_path / "whole", data, *options)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(transformer, 3, patch)
        with pytest.raises(Killed):
            train(transformer, tmp_path / "killed", data, *options)
    killed = train(transformer, tmp_path / "killed", data, *options)
    assert_same_file(killed / "star.safetensors", whole / "star.safetensors")


def test_dropout_and_weight_decay_are_a_run_s_own_a_resumed_one_s_too(data, tokenizer_run, tmp_path):
    options = transformer_options(tokenizer_run)
    begun: list[int] = []

    def weights(name: str, *more: str, steps: int = 3) -> dict[str, Tensor]:
        run = train(transformer, tmp_path / name, data, *options, *more, "--rate", "0.05", steps=steps)
        file = TensorFile(run / "star.safetensors")
        return {tensor: file[tensor].float() for tensor in file}

    def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return max((one[name] - other[name]).abs().max().item() for name in one)

    begin = Dropout.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dropout, "begin", lambda self, step: (begun.append(step), begin(self, step))[1])
        plain = weights("plain")
        assert begun == [0, 1, 2]
        weights("plain", steps=5)
        assert begun == [0, 1, 2, 3, 4]
    assert apart(weights("again"), plain) == 0
    assert apart(weights("thinned", "--dropout", "0.3"), plain) > 0
    assert apart(weights("decayed", "--weight-decay", "2"), plain) > 0
    whole = weights("whole", "--weight-decay", "2", steps=4)
    weights("changed", steps=2)
    assert apart(weights("changed", steps=4), weights("kept", steps=4)) == 0
    weights("turned", steps=2)
    turned = weights("turned", "--weight-decay", "2", steps=4)
    assert apart(turned, weights("kept", steps=4)) > 0
    assert apart(turned, whole) > 0


def test_a_run_of_other_sizes_is_refused(data, tokenizer_run, tmp_path):
    options = transformer_options(tokenizer_run)
    train(transformer, tmp_path, data, *options, steps=1)
    with pytest.raises(ValueError, match="was begun with a network of other sizes"):
        train(transformer, tmp_path, data, *options, "--depth", "2", steps=2)
    small = ["--channels", "8", "--multipliers", "1", "1", "1", "--codebook", "32", "--code-width", "4"]
    train(tokenizer, tmp_path / "tokens", data, *small, *SIDES, steps=1)
    with pytest.raises(ValueError, match="was begun with --sides 1 2 4"):
        train(tokenizer, tmp_path / "tokens", data, *small, "--sides", "1", "3", "4", steps=2)


def test_settled_lessons_keep_pictures_sharp(data, tokenizer_run, read_once):
    pictures = EmojiSet.load(data, 16)
    vqvae, text = load_vqvae(tokenizer_run / "vqvae.safetensors"), read_once(SHIPPED)
    lessons = Lessons(pictures, vqvae, text, square_maps([1, 2, 4]), torch.device("cpu"), variants=10, seed=3)
    assert lessons.features.shape[:2] == (10, len(pictures.records))
    plan = lessons.planner[(0, torch.arange(12))]._replace(variants=torch.arange(12) % 10)
    moved, settled = lessons.lesson(plan), lessons.lesson(plan, settled=True)
    plain = [lessons.lesson(plan._replace(variants=torch.full((12,), v))) for v in range(8)]
    for row in range(12):
        expected = plain[row % 10 % 8].tokens[row]
        assert torch.equal(settled.tokens[row], expected)
        assert torch.equal(moved.tokens[row], expected) or row % 10 > 7
    motions = [motion_of(variant) for variant in range(10)]
    assert motions == [Motion.NONE] * 2 + [Motion.NUDGE] * 6 + [Motion.MOVE] * 2
    # With wrong tokens shown, what is asked for changes, and the inputs with it; a step has its own.
    lessons.corruption = TokenCorruption(vqvae.quantizer, lessons.maps, 0.9)
    wrong = [lessons.lesson(plan, step) for step in (1, 1, 2)]
    assert torch.equal(wrong[0].inputs, wrong[1].inputs)
    assert not torch.equal(wrong[0].inputs, wrong[2].inputs)
    assert not torch.equal(wrong[0].inputs, moved.inputs)
    assert torch.equal(wrong[0].tokens[:, :1], moved.tokens[:, :1]), "nothing is wrong before the first scale"


def test_a_run_goes_on_from_exported_weights(data, tokenizer_run, transformer_run, tmp_path, monkeypatch):
    options = transformer_options(tokenizer_run)
    start = transformer_run / "star.safetensors"
    train(transformer, tmp_path, data, *options, "--start", str(start), "--rate", "1e-9", steps=2)
    _, before = load_networks(start)
    _, after = load_networks(tmp_path / "star.safetensors")
    moved = after.transformer.word_embed.weight - before.transformer.word_embed.weight
    assert moved.abs().max() < 1e-4
    # Before all pictures are encoded, which takes minutes.
    monkeypatch.setattr(transformer, "lessons_for", lambda *args: pytest.fail("encoded first"))
    with pytest.raises(ValueError, match="this run trains"):
        train(transformer, tmp_path / "x", data, *options, "--depth", "2", "--start", str(start))


def test_a_killed_sampler_run_ends_as_an_unbroken_one_and_keeps_the_transformer(
    data, tokenizer_run, transformer_run, tmp_path
):
    options = ["--tokenizer-run", str(tokenizer_run), "--transformer-run", str(transformer_run)]
    options += ["--text", str(SHIPPED), "--sampler-depth", "1", "--bfloat16"]
    whole = train(causal_sampler, tmp_path / "whole", data, *options)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(causal_sampler, 3, patch)
        with pytest.raises(Killed):
            train(causal_sampler, tmp_path / "killed", data, *options)
    killed = train(causal_sampler, tmp_path / "killed", data, *options)
    assert_same_file(killed / "star.safetensors", whole / "star.safetensors")
    config, networks = load_networks(whole / "star.safetensors")
    assert config.transformer.sampler_depth == 1
    frozen = load_networks(transformer_run / "star.safetensors")[1].transformer.state_dict()
    for name, value in networks.transformer.state_dict().items():
        assert torch.equal(value, frozen[name])


def test_a_sampler_run_begins_as_the_transformer(data, tokenizer_run, transformer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), "--transformer-run", str(transformer_run)]
    options += ["--text", str(SHIPPED), "--sampler-depth", "1"]
    run = train(causal_sampler, tmp_path / "run", data, *options, "--rate", "1e-6", steps=1)
    model = load_networks(run / "star.safetensors")[1]
    assert model.causal_sampler is not None
    generator = torch.Generator().manual_seed(0)
    features = 5 * torch.randn(2, 16, 64, generator=generator)
    codes = torch.zeros(2, 16, 4)
    pooled = torch.randn(2, model.transformer.config.text_width, generator=generator)
    rotation = model.transformer.rotations(((1, 1), (4, 4)))
    with torch.no_grad():
        found = model.causal_sampler(codes, features, pooled, 2, rotation)
        wanted = model.transformer.logits(features)
    assert wanted.std() > 0.01
    assert (found - wanted).abs().max() < 0.02 * wanted.std()


@pytest.fixture
def teaching(
    data: Path, tokenizer_run: Path, transformer_run: Path, read_once: Callable[..., TextEncoder]
) -> causal_sampler.SamplerLessons:
    networks = load_networks(transformer_run / "star.safetensors")[1]
    vqvae = load_vqvae(tokenizer_run / "vqvae.safetensors")
    maps = square_maps([1, 2, 4])
    device = torch.device("cpu")
    lessons = Lessons(EmojiSet.load(data, 16), vqvae, read_once(SHIPPED), maps, device)
    return causal_sampler.SamplerLessons(networks.transformer, lessons)


def test_a_sampler_is_told_how_large_features_and_codes_are(teaching):
    lesson = teaching.lessons.plain("train", causal_sampler.FEW)
    features, codes = teaching.deviations()
    refined = teaching.features(lesson).split(teaching.lengths, dim=1)[teaching.first :]
    assert features == pytest.approx(torch.cat(refined, dim=1).std().item())
    tokens = lesson.tokens.split(teaching.lengths, dim=1)[teaching.first :]
    vectors = teaching.lessons.quantizer.codebook.weight[torch.cat(tokens, dim=1)]
    assert codes == pytest.approx(vectors.std().item())
    assert features != pytest.approx(codes, rel=0.1)


def test_pictures_under_several_masks_count_as_each_under_one(teaching):
    sampler = CausalSampler(dataclasses.replace(teaching.transformer.config, sampler_depth=1))
    sampler.initialise(torch.Generator().manual_seed(0))
    lesson = teaching.lessons.held_out(4)
    count = len(lesson.tokens)
    assert not torch.equal(lesson.tokens[0], lesson.tokens[1])
    features = teaching.features(lesson)
    rng = np.random.default_rng(0)
    # As many unknown tokens under one mask as under the other, so that both weigh alike.
    one = [
        torch.from_numpy(rng.permuted(np.arange(n) < n // 2)).expand(count, -1)
        for n in teaching.lengths[teaching.first :]
    ]
    other = [~mask if 2 * int(mask[0].sum()) == mask.shape[1] else mask for mask in one]
    with torch.no_grad():
        apart = [teaching.loss(sampler, lesson, features, known).item() for known in (one, other)]
        both = [torch.cat(masks) for masks in zip(one, other, strict=True)]
        together = teaching.loss(sampler, lesson, features, both).item()
    assert apart[0] != pytest.approx(apart[1], rel=1e-4)
    assert together == pytest.approx(sum(apart) / 2, rel=1e-4)


def test_a_run_without_time_for_a_step_is_saved_all_the_same(data, tokenizer_run, transformer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), "--transformer-run", str(transformer_run)]
    options += ["--text", str(SHIPPED), "--sampler-depth", "1", "--time-limit", "1e-9"]
    run = train(causal_sampler, tmp_path / "run", data, *options)
    assert load_networks(run / "star.safetensors")[1].causal_sampler is not None


def test_a_tokenizer_run_from_before_stages_shared_their_checkpoint_goes_on(data, tokenizer_run, tmp_path):
    state = torch.load(tokenizer_run / "checkpoint.pt", weights_only=True)
    (state["optimizer"],) = state.pop("optimizers")
    torch.save(state, tmp_path / "checkpoint.pt")
    run = train(tokenizer, tmp_path, data, *SMALL, *SIDES, steps=5)
    after = torch.load(run / "checkpoint.pt", weights_only=True)
    assert after["step"] == 5
    assert after["optimizers"][0]["state"][0]["step"] == 5


def test_a_killed_tokenizer_run_ends_as_an_unbroken_one(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "RESEED_EVERY", 3)  # what was used before the kill counts after it
    monkeypatch.setattr(tokenizer, "RESEED_UNTIL", 1.0)
    options = [*SMALL, *SIDES]
    whole = train(tokenizer, tmp_path / "whole", data, *options)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(tokenizer, 3, patch)
        with pytest.raises(Killed):
            train(tokenizer, tmp_path / "killed", data, *options)
    killed = train(tokenizer, tmp_path / "killed", data, *options)
    assert_same_file(killed / "vqvae.safetensors", whole / "vqvae.safetensors")
    shorter = train(tokenizer, tmp_path / "shorter", data, *options, steps=2)
    ours, theirs = (TensorFile(run / "vqvae.safetensors") for run in (whole, shorter))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        (["1", "2"], "--sides 1 2: of pictures of 16 px, 4 to a token, the last scale has 4"),
        (["4"], "at least two scales"),
        (["2", "1", "4"], "2, 2.*1, 1"),
    ],
)
def test_scales_that_do_not_grow_to_the_picture_s_are_refused(data, tmp_path, sides, said):
    with pytest.raises(ValueError, match=said):
        train(tokenizer, tmp_path / "run", data, *SMALL, "--sides", *sides)
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_scales_is_refused_where_shapes_do_not_tell(
    data, tokenizer_run, transformer_run, tmp_path
):
    shutil.copytree(transformer_run, tmp_path / "run")
    options = transformer_options(tokenizer_run)
    others = [*options[: -len(SIDES)], "--sides", "1", "3", "4"]
    with pytest.raises(ValueError, match="was begun with --sides 1 2 4: give those, or another --run"):
        train(transformer, tmp_path / "run", data, *others, steps=6)


def test_a_run_whose_folder_cannot_be_made_is_refused_before_it_is_trained(data, tokenizer_run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"--run {tmp_path / 'file'} can be no folder"):
        train(transformer, tmp_path / "file", data, *transformer_options(tokenizer_run))


def test_the_decoder_stage_moves_the_decoder_alone(data, tokenizer_run, tmp_path):
    train(decoder, tmp_path, data, "--tokenizer-run", str(tokenizer_run), *SIDES, "--bfloat16")
    before = load_vqvae(tokenizer_run / "vqvae.safetensors").state_dict()
    after = load_vqvae(tmp_path / "vqvae.safetensors").state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def assert_same(one: object, other: object, place: str = "") -> None:
    """Compare nested dicts and lists of tensors and numbers."""
    assert type(one) is type(other), place
    if isinstance(one, Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key, value in one.items():
            assert_same(value, other[key], f"{place}/{key}")
    elif isinstance(one, list):
        assert_same(dict(enumerate(one)), dict(enumerate(other)), place)
    else:
        assert one == other, place


def test_a_killed_decoder_run_with_a_discriminator_ends_as_an_unbroken_one(data, tokenizer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES, "--head-start", "1", "--adversarial", "0.5"]
    whole = train(decoder, tmp_path / "whole", data, *options)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(decoder, 3, patch)
        with pytest.raises(Killed):
            train(decoder, tmp_path / "killed", data, *options)
    killed = train(decoder, tmp_path / "killed", data, *options)
    assert_same_file(killed / "vqvae.safetensors", whole / "vqvae.safetensors")
    # The export is rounded to float16: what the run goes on from is not.
    ends = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, killed)]
    for part in ("model", "optimizers", "average", "adversary"):
        assert_same(ends[0][part], ends[1][part], part)
    assert ends[0]["adversary"]["steps"] == 4
    without = train(decoder, tmp_path / "without", data, *options[:-2])
    changed = [
        name
        for name, value in torch.load(without / "checkpoint.pt", weights_only=True)["model"].items()
        if not torch.equal(value, ends[0]["model"][name])
    ]
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    with pytest.raises(ValueError, match="has a discriminator, --adversarial is 0"):
        train(decoder, killed, data, *options[:-2], steps=8)


def test_a_discriminator_may_join_a_run_and_a_patch_discriminator_is_refused(data, tokenizer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES]
    train(decoder, tmp_path, data, *options, steps=2)
    train(decoder, tmp_path, data, *options, "--adversarial", "0.5", "--head-start", "1", steps=4)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["adversary"]["steps"] == 2
    state["judge_optimizer"] = {"state": {0: {"step": torch.ones(())}}}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="patch discriminator"):
        train(decoder, tmp_path, data, *options, "--adversarial", "0.5", steps=1000)


def test_a_run_goes_on_with_the_discriminator_of_another(data, tokenizer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES]
    judged = [*options, "--adversarial", "0.5", "--head-start", "3"]
    first = train(decoder, tmp_path / "first", data, *judged, steps=4) / "checkpoint.pt"
    run = train(decoder, tmp_path / "next", data, *judged, "--judge", str(first), steps=4)
    ends = [torch.load(path, weights_only=True) for path in (first, run / "checkpoint.pt")]
    assert [end["adversary"]["steps"] for end in ends] == [4, 8], "its head start is over"
    one, other = (end["adversary"]["discriminator"] for end in ends)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    without = train(decoder, tmp_path / "without", data, *options, steps=1) / "checkpoint.pt"
    for wrong, asked, said in (
        (without, judged, "holds no discriminator"),
        (tmp_path / "none.pt", judged, "no such file"),
        (first, options, "give --adversarial"),
    ):
        with pytest.raises(ValueError, match=said):
            train(decoder, tmp_path / "wrong", data, *asked, "--judge", str(wrong))
    state = ends[0]
    name, value = state["adversary"]["discriminator"].popitem()
    state["adversary"]["discriminator"][name] = value.new_zeros(*value.shape, 1)
    torch.save(state, tmp_path / "others.pt")
    with pytest.raises(ValueError, match="sees with other networks"):
        train(decoder, tmp_path / "wrong", data, *judged, "--judge", str(tmp_path / "others.pt"), steps=4)


def test_another_run_s_discriminator_may_join_a_run_and_is_not_asked_for_again(data, tokenizer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES]
    judged = [*options, "--adversarial", "0.5"]
    first = train(decoder, tmp_path / "first", data, *judged, "--head-start", "1", steps=3) / "checkpoint.pt"
    run = train(decoder, tmp_path / "run", data, *options, steps=1)
    asked = [*judged, "--judge", str(first)]  # its head start is over, whatever the steps
    train(decoder, run, data, *asked, steps=2)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["adversary"]["steps"] == 4
    first.unlink()
    train(decoder, run, data, *asked, steps=3)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["adversary"]["steps"] == 5


def test_a_sampler_run_may_name_the_checkpoint_s_own_schedule(data, tokenizer_run, transformer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), "--transformer-run", str(transformer_run)]
    options += ["--text", str(SHIPPED), "--sampler-depth", "1"]
    own = "top_k 32*2 1; guidance 2"
    run = train(causal_sampler, tmp_path / "own", data, *options, "--schedule", own, steps=1)
    star = load(run / "star.safetensors", vqvae=tokenizer_run / "vqvae.safetensors", text_encoder=SHIPPED)
    assert star.config.schedule == own
    assert [policy.top_k for policy in star.schedule(None, star.maps(None)).scales] == [32, 32, 1]
    with pytest.raises(ValueError, match="top_k"):
        train(causal_sampler, tmp_path / "wrong", data, *options, "--schedule", "top_k 32*2")
    assert not (tmp_path / "wrong").exists()


def redrawing_options(transformer_run: Path) -> list[str]:
    return ["--model", str(transformer_run / "star.safetensors"), "--text", str(SHIPPED), "--redrawn", "1", "2"]


def test_a_killed_decoder_run_on_drawn_tokens_ends_as_an_unbroken_one(
    data, tokenizer_run, transformer_run, tmp_path
):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES, *redrawing_options(transformer_run)]
    whole = train(decoder, tmp_path / "whole", data, *options)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(decoder, 3, patch)
        with pytest.raises(Killed):
            train(decoder, tmp_path / "killed", data, *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "redraw_last_scales", None)  # the pictures are not drawn a second time
        killed = train(decoder, tmp_path / "killed", data, *options)
    assert_same_file(killed / "vqvae.safetensors", whole / "vqvae.safetensors")
    without = train(decoder, tmp_path / "without", data, *options[: -len(redrawing_options(transformer_run))])
    ours, theirs = (TensorFile(run / "vqvae.safetensors") for run in (whole, without))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    others = options[: -len(redrawing_options(transformer_run))]
    with pytest.raises(ValueError, match=r"redrawn: 1, 2, .* ask for: never"):
        train(decoder, tmp_path / "killed", data, *others, steps=8)
    with pytest.raises(ValueError, match=r"redrawn: 1, 2, .* ask for: 2, 1"):
        train(decoder, tmp_path / "killed", data, *options[:-2], "2", "1", steps=8)
    with pytest.raises(ValueError, match=r"were redrawn by star.safetensors .*'top-k'.* ask for .*'top_k 3'"):
        train(decoder, tmp_path / "killed", data, *options, "--schedule", "top_k 3", steps=8)


def test_a_few_pictures_may_be_redrawn(data, tokenizer_run, transformer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES, *redrawing_options(transformer_run)[:-3]]
    options += ["--redrawn", "1", "3", "--redrawn-pictures", "2", "--adversarial", "0.5"]
    options += ["--head-start", "0"]
    train(decoder, tmp_path, data, *options, steps=1)
    own, last, whole = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["versions"]
    assert len(own) > 4
    changed = (last != own).any(dim=1)
    # Two are drawn anew, and everyone else is as it is, or one of those two.
    assert 0 < changed.sum() <= 2
    assert len(whole.unique(dim=0)) == 2
    seldom = whole[~changed]
    assert not torch.equal(seldom, own[~changed])
    assert all((whole[changed] == row).all(dim=1).any() for row in seldom)
    options[options.index("--redrawn-pictures") + 1] = "3"
    with pytest.raises(ValueError, match="2 pictures of the run .* ask for 3"):
        train(decoder, tmp_path, data, *options, steps=2)


def test_redrawn_pictures_are_asked_for_by_their_own_captions(tmp_path, monkeypatch):
    asked: list[tuple[Tensor, list[str]]] = []

    def drawn(star: object, quantizer: object, tokens: Tensor, captions: list[str], **how: object) -> Tensor:
        asked.append((tokens, captions))
        return tokens + 100

    monkeypatch.setattr(versions, "redraw_last_scales", drawn)
    own = torch.arange(20).view(10, 2)
    args = argparse.Namespace(sides=[1, 1], redrawn=[1, 2], redrawn_pictures=4, schedule="top-k", seed=0)
    model = argparse.Namespace(quantizer=None)
    kept, last, whole = versions.token_versions(args, model, model, own, [f"picture {n}" for n in range(10)])
    assert torch.equal(kept, own)
    (tokens, captions), _ = asked
    assert captions == [f"picture {int(first) // 2}" for first, _ in tokens]
    rows = (tokens[:, 0] // 2).tolist()
    assert len(set(rows)) == 4
    assert torch.equal(last, torch.stack([own[n] + 100 if n in rows else own[n] for n in range(10)]))
    assert torch.equal(whole[rows], own[rows] + 100)
    assert {tuple(row) for row in whole.tolist()} == {tuple(row) for row in (own[rows] + 100).tolist()}
    with pytest.raises(ValueError, match="--redrawn-pictures asks for drawn pictures: give the --model"):
        versions.load_redrawing(argparse.Namespace(model=None, redrawn_pictures=4))


def test_a_decoder_may_be_seen_by_a_second_network(data, tokenizer_run, distance, tmp_path, monkeypatch):
    loaded: list[Path] = []

    class Second:
        """Other channels than the first network's, to tell them apart by."""

        channels = (12, 6)

        def to(self, device: torch.device) -> Second:
            return self

        def features(self, pictures: Tensor) -> Iterator[Tensor]:
            for channels, side in ((12, 2), (6, 8)):
                yield nn.functional.avg_pool2d(pictures, side).repeat(1, channels // 3, 1, 1)

    def second(folder: Path) -> Second:
        loaded.append(folder)
        return Second()

    monkeypatch.setattr(decoder, "load_efficientnet", second)
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES]
    judged = ["--adversarial", "0.5", "--head-start", "1"]
    plain = train(decoder, tmp_path / "plain", data, *options)
    assert not loaded
    runs = [plain]
    for weight in ("0.5", "5"):
        runs.append(train(decoder, tmp_path / weight, data, *options, "--matching", weight))
    assert len(loaded) == 2
    weights = [TensorFile(run / "vqvae.safetensors")["decoder.conv_out.weight"] for run in runs]
    assert not any(torch.equal(weights[one], weights[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    train(decoder, tmp_path / "judged", data, *options, *judged, "--matching", "0.5")
    heads = torch.load(tmp_path / "judged" / "checkpoint.pt", weights_only=True)["adversary"]["discriminator"]
    seen = [heads[name].shape[1] for name in heads if name.endswith(".0.parametrizations.weight.original")]
    assert seen == [*distance.channels, 12, 6]
    with pytest.raises(ValueError, match="other networks .--matching"):
        train(decoder, tmp_path / "judged", data, *options, *judged, steps=6)


@pytest.mark.parametrize("matching", ["0", "0.5"])
def test_pictures_drawn_whole_are_judged_and_not_compared(
    matching, data, tokenizer_run, transformer_run, distance, tmp_path, monkeypatch
):
    monkeypatch.setattr(decoder, "load_efficientnet", lambda folder: distance)
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES, *redrawing_options(transformer_run)[:-3]]
    options += ["--redrawn", "3", "--adversarial", "0.5", "--head-start", "0", "--matching", matching]
    compared: list[int] = []
    gradients: list[Tensor] = []
    measured, drawn = decoder.distances, decoder.decoded

    def counting(made: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        compared.append(len(made))
        return measured(made, *rest)

    def watched(*args: object) -> Tensor:
        pictures = drawn(*args)
        if pictures.requires_grad:
            pictures.register_hook(gradients.append)
        return pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "distances", counting)
        patch.setattr(decoder, "decoded", watched)
        train(decoder, tmp_path / "whole", data, *options, steps=1)
    # Of the four, two show their own tokens: one version of two is drawn whole.
    assert compared == [2]
    distance, push, whole = gradients[0], gradients[1], gradients[-1]
    assert all(one.abs().sum() > 0 for one in distance[:2])
    assert distance[2:].abs().sum() == 0
    assert all(one.abs().sum() > 0 for one in push)
    assert all(one.abs().sum() > 0 for one in whole)


def test_every_version_is_seen_and_those_to_be_compared_come_first():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([versions.mixed_versions([True, True, False], 4, 6, generator) for _ in range(50)])
    assert drawn.shape == (50, 6)
    assert set(drawn[:, :4].flatten().tolist()) == {0, 1}
    assert set(drawn[:, 4:].flatten().tolist()) == {2}
    assert set(versions.mixed_versions([True], 3, 3, generator).tolist()) == {0}


def test_a_decoder_run_from_before_there_were_versions_goes_on(data, tokenizer_run, tmp_path):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES]
    train(decoder, tmp_path, data, *options, steps=2)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["versions"]
    torch.save(state, tmp_path / "checkpoint.pt")
    train(decoder, tmp_path, data, *options, steps=4)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--redrawn", "4"], "--redrawn 4: of 3 scales the last 1 to 3"),
        (["--redrawn", "1", "3"], "--redrawn 3 draws whole pictures.* --adversarial"),
        (["--adversarial", "-1"], "--adversarial -1 is no weight"),
        (["--adversarial", "nan"], "--adversarial nan is no weight"),
        (["--adversarial", "1", "--head-start", "4"], "--head-start 4: of 4 steps it can be 0 to 3"),
        (["--sides", "1", "4"], "--sides 1 2 4"),
    ],
)
def test_a_model_that_does_not_fit_the_options_is_refused_before_it_draws(
    wrong, said, data, tokenizer_run, transformer_run, tmp_path
):
    options = ["--tokenizer-run", str(tokenizer_run), *SIDES, *redrawing_options(transformer_run)]
    if wrong[0] == "--sides":
        wrong = [*wrong, "--redrawn", "1"]
    with pytest.raises(ValueError, match=said):
        train(decoder, tmp_path, data, *options, *wrong)


def test_redrawn_pictures_keep_their_coarse_scales(tokenizer_run, transformer_run):
    star = load(
        transformer_run / "star.safetensors", vqvae=tokenizer_run / "vqvae.safetensors", text_encoder=SHIPPED
    )
    maps = star.maps(None)
    own = torch.randint(32, (3, token_count(maps)), generator=torch.Generator().manual_seed(0))
    captions = ["a red apple", "a dog", "a house"]
    how = {"schedule": "top_k 32; top_p 0", "seed": 5}
    quantizer = star.vqvae.quantizer
    for count in range(1, len(maps) + 1):
        tokens = redraw_last_scales(star, quantizer, own, captions, count=count, **how)
        first = token_count(maps[:-count])
        assert torch.equal(tokens[:, :first], own[:, :first])
        assert not torch.equal(tokens[:, first:], own[:, first:])
    # A picture is drawn from (caption, seed, its number) alone: as the engine draws it.
    f_hats = quantizer.f_hats(own.split([h * w for h, w in maps], dim=1)[:1], maps)
    prefix = (ScaleStep(0, maps[0], own[:, :1], f_hats[0], given=True),)
    options = Options(indices=(0, 1, 2), prefix=prefix, **how)
    expected = torch.cat([step.tokens for step in star.generate(captions, options=options)], dim=1)
    assert torch.equal(redraw_last_scales(star, quantizer, own, captions, count=len(maps) - 1, **how), expected)
    for wrong in (0, len(maps) + 1):
        with pytest.raises(ValueError, match=f"not {wrong}"):
            redraw_last_scales(star, quantizer, own, captions, count=wrong, **how)
    with pytest.raises(ValueError, match="smooth"):
        redraw_last_scales(star, quantizer, own, captions, count=1, schedule="smooth", seed=5)


@pytest.mark.parametrize("stage", [transformer, causal_sampler])
def test_compiled_blocks_are_trained_on(stage, data, tokenizer_run, transformer_run, tmp_path, monkeypatch):
    options = transformer_options(tokenizer_run)
    if stage is causal_sampler:
        options = ["--tokenizer-run", str(tokenizer_run), "--transformer-run", str(transformer_run)]
        options += ["--text", str(SHIPPED), "--sampler-depth", "1"]
    built = []
    original = nn.Module.compile

    def traced(block: nn.Module, **how: object) -> None:
        built.append(type(block).__name__)
        # In one piece, to the graph that a compiler would be given. What comes of it test_dropout.py compares.
        if stage is transformer or not isinstance(block, TextBlock):
            original(block, backend="eager", fullgraph=True, **how)

    monkeypatch.setattr(nn.Module, "compile", traced)
    run = train(stage, tmp_path, data, *options, "--compile")
    assert built == (["TextBlock"] if stage is transformer else ["TextBlock", "SelfBlock"])
    assert (run / "star.safetensors").exists()


def test_a_stage_names_the_one_that_must_run_first(data, tmp_path):
    with pytest.raises(ValueError, match="run the training stage that writes it first"):
        train(transformer, tmp_path, data, *transformer_options(tmp_path / "nothing"))


def test_a_run_ends_when_its_time_is_up_saves_and_goes_on(data, tokenizer_run, tmp_path):
    options = transformer_options(tokenizer_run)
    train(transformer, tmp_path, data, *options, "--time-limit", "0.5", steps=10**6)
    before = Checkpoint(tmp_path / "checkpoint.pt")
    assert before.load() is not None
    assert 0 < before.step < 10**6
    assert (tmp_path / "star.safetensors").exists()
    train(transformer, tmp_path, data, *options, "--time-limit", str(before.seconds + 0.5), steps=10**6)
    after = Checkpoint(tmp_path / "checkpoint.pt")
    after.load()
    assert after.step > before.step


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--steps", "0", "0 is no number of steps"),
        ("--time-limit", "0", "0 leaves no time"),
        ("--time-limit", "nan", "nan leaves no time"),
        ("--time-limit", "long", "long is no number"),
        ("--seed", "-1", "-1 is no seed"),
        ("--seed", str(2**32), "is no seed"),
        ("--seed", "x", "x is no number"),
        ("--corruption", "1", "1 is no share"),
        ("--corruption", "nan", "nan is no share"),
        ("--corruption", "few", "few is no number"),
        ("--dropout", "1", "1 is no share"),
        ("--plain-captions", "1.1", "1.1 is no probability: give 0 to 1"),
        ("--plain-captions", "-0.1", "-0.1 is no probability"),
        ("--plain-captions", "nan", "nan is no probability"),
        ("--weight-decay", "-1", "-1 is out of range: give a finite number from 0 up"),
        ("--weight-decay", "inf", "inf is out of range"),
        ("--windowed-scales", "-1", "-1 is no number of scales"),
        ("--window", "1.3", "1.3 is no part: give more than 0, 1 at most"),
        ("--window", "0", "0 is no part"),
        ("--window", "nan", "nan is no part"),
        ("--windowed-scales", "few", "few is no number"),
        ("--steps", "many", "many is no number"),
        ("--batch", "0", "0 is no number of examples: give 1 or more"),
        ("--batch", "-3", "-3 is no number of examples"),
        ("--save-every", "0", "0 is no number of steps"),
        ("--log-every", "0", "0 is no number of steps"),
        ("--rate", "nan", "nan is no learning rate: give a finite number above 0"),
        ("--rate", "inf", "inf is no learning rate"),
        ("--rate", "-1", "-1 is no learning rate"),
        ("--threads", "-1", "-1 is no number of threads: give 0 or more"),
        ("--workers", "-1", "-1 is no number of processes"),
        ("--variants", "0", "0 is no number of renderings"),
    ],
)
def test_a_number_that_no_run_can_have_is_refused(option, value, said, capsys):
    parser = argparse.ArgumentParser()
    transformer.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--run", "x", "--tokenizer-run", "y", "--text", "z", option, value])
    assert said in capsys.readouterr().err


def test_every_caption_may_be_plain():
    parser = argparse.ArgumentParser()
    transformer.add_arguments(parser)
    given = ["--run", "x", "--tokenizer-run", "y", "--text", "z", "--plain-captions", "1"]
    assert parser.parse_args(given).plain_captions == 1


WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
DEVICES = ["nosuch", "cuda:99", "hpu", "meta", pytest.param("cuda", marks=WITHOUT_CUDA)]


@pytest.mark.parametrize("stage", ["text", "tokenizer", "decoder", "transformer", "sampler"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_does_not_compute_here_is_refused_by_every_stage(stage, device, tmp_path, capsys):
    # Before anything else is looked at: packages are downloaded, pictures are encoded.
    with pytest.raises(SystemExit, match="2"):
        main(["train", stage, "--run", str(tmp_path / "run"), "--device", device])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument --device: {device} cannot be used here (" in line
    assert not (tmp_path / "run").exists()
