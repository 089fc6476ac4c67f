"""The measures of star_core.evaluation on synthetic features and pictures; nothing is downloaded."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from star_core.__main__ import main
from star_core.evaluation import run as evaluation
from star_core.evaluation.artist import StarArtist
from star_core.evaluation.distances import fid, kid, kid_floor
from star_core.evaluation.held_out import Extent, HeldOut, RealSide, load_real_side
from star_core.evaluation.inception import SHA256, FeatureCache, load_inception, prepare
from star_core.evaluation.lpips import LPIPS, RECIPES, Layer, Recipe, load_lpips
from star_core.evaluation.measure import measure
from star_core.evaluation.numpy_pickle import read_numpy_pickle, unpickle_numpy
from star_core.evaluation.reconstruction import perceptual, psnr
from star_core.evaluation.rprecision import (
    Pool,
    Training,
    draw_candidates,
    train_scorer,
    wrong_captions,
)
from star_core.evaluation.run import marked
from star_core.evaluation.sheet import PROMPTS_FILE, draw_sheet, load_prompts, mark, read_answers
from star_core.request import Options
from star_core.sampling import PictureSeed
from star_core.star import Star, load
from star_core.training.emoji import EmojiSet, Record
from star_core.training.packages import ASSETS
from star_core.training.splits import heldout


def noise(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def random_pictures(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# FID and KID


def gaussian_with(mean: np.ndarray, covariance: np.ndarray, seed: int, count: int) -> np.ndarray:
    """Samples whose mean and covariance are exactly the given ones."""
    drawn = np.random.default_rng(seed).standard_normal((count, len(mean)))
    drawn -= drawn.mean(0)
    white = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("count", [200, 7])
def test_fid_is_the_closed_form_distance_of_two_gaussians(count: int) -> None:
    # Diagonal covariances commute: |m1 - m2|^2 + sum (sqrt(v1) - sqrt(v2))^2.
    first, second = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    x = gaussian_with(np.zeros(3), np.diag(first), 0, count)
    y = gaussian_with(np.array([1.0, 2.0, 0.0]), np.diag(second), 1, count)
    expected = 5.0 + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert fid(x, y) == pytest.approx(expected, rel=1e-9)


def test_fid_agrees_with_the_eigenvalues_of_the_product_for_fewer_pictures_than_features() -> None:
    x, y = noise(9, 12, seed=0).astype(np.float64), 2 * noise(8, 12, seed=1).astype(np.float64)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariances[0] + covariances[1])
    assert fid(x, y) == pytest.approx(expected - 2 * np.sqrt(eigenvalues).sum(), rel=1e-4)


def test_kid_of_one_distribution_is_zero_within_its_error_and_positive_when_shifted() -> None:
    same = kid(noise(300, seed=0), noise(300, seed=1))
    shifted = kid(noise(300, seed=0), noise(300, seed=1) + 0.5)
    assert abs(same.value) < 3 * same.error
    assert shifted.value > 10 * same.error
    assert shifted.value > 5 * shifted.error


def test_kid_is_unbiased_over_many_small_samples() -> None:
    estimates = [kid(noise(20, 4, seed=2 * i), noise(20, 4, seed=2 * i + 1)).value for i in range(60)]
    assert abs(np.mean(estimates)) < 3 * np.std(estimates) / np.sqrt(len(estimates))
    assert min(estimates) < 0


def test_kid_error_is_the_spread_over_repeated_samples() -> None:
    repeated = [kid(noise(100, seed=2 * i), noise(100, seed=2 * i + 1) + 0.5) for i in range(30)]
    spread = float(np.std([estimate.value for estimate in repeated]))
    assert np.mean([estimate.error for estimate in repeated]) == pytest.approx(spread, rel=0.5)


def test_kid_floor_is_the_spread_between_halves() -> None:
    features = noise(200)
    floor = kid_floor(features)
    assert floor > 0
    assert abs(kid(features[:100], features[100:]).value) < 4 * floor


def test_distances_refuse_features_of_different_width() -> None:
    with pytest.raises(ValueError, match=r"\(10, 16\) and \(10, 15\)"):
        fid(noise(10), noise(10, 15))


# PSNR and LPIPS


def test_psnr_of_a_constant_error_is_its_formula_and_infinite_without_one() -> None:
    original = np.full((2, 4, 4, 3), 100, np.uint8)
    changed = original.copy()
    changed[0] += 5
    assert psnr(changed, original).tolist() == pytest.approx([20 * np.log10(255 / 5), float("inf")])


def small_lpips() -> LPIPS:
    """Two layers of random weights; the real networks are too large to fetch in a test."""
    layers = (Layer(stride=2, compared=True), Layer(pool=2, compared=True))
    recipe = Recipe("tiny.ckpt", "0" * 64, "Tiny", smallest_side=8, layers=layers)
    generator = torch.Generator().manual_seed(0)
    convolutions = [
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3, padding=1),
    ]
    for convolution in convolutions:
        for parameter in convolution.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    weights = [torch.rand(channels, generator=generator) for channels in (6, 8)]
    return LPIPS(recipe, convolutions, weights)


def test_lpips_is_zero_for_equal_pictures_and_grows_with_noise() -> None:
    metric = small_lpips()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    unit = torch.randn(x.shape, generator=generator)
    distances = [metric(x, x + strength * unit).mean().item() for strength in (0, 0.05, 0.2, 0.8)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert metric(x, -x).shape == (2,)


def test_lpips_has_a_finite_gradient_where_no_channel_is_active() -> None:
    # The official square root of a sum of squares gives NaN at such positions.
    metric = small_lpips()
    for convolution in metric.convolutions:
        nn.init.constant_(convolution.bias, -100.0)
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    metric(x, torch.ones(1, 3, 16, 16)).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_lpips_is_the_same_under_autocast() -> None:
    metric = small_lpips()
    x, y = torch.rand(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        inside = metric(x, y)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, metric(x, y))


def test_lpips_of_arrays_is_that_of_tensors() -> None:
    metric = small_lpips()
    x, y = random_pictures(3, 16, seed=0), random_pictures(3, 16, seed=1)
    tensors = [torch.from_numpy(p).permute(0, 3, 1, 2).float() / 127.5 - 1 for p in (x, y)]
    expected = metric(*tensors).numpy()
    np.testing.assert_allclose(perceptual(metric, x, y), expected, rtol=1e-5)


def test_lpips_refuses_pictures_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="at least 8 pixels"):
        small_lpips()(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_the_pinned_hashes_are_those_of_the_package_table() -> None:
    pinned = set(ASSETS["lpips"].files.values()) | set(ASSETS["inception"].files.values())
    assert pinned == {recipe.sha256 for recipe in RECIPES.values()} | {SHA256}


# Pickles


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("__import__('pathlib').Path('harmed').touch()",))


def test_the_unpickler_reads_arrays_written_by_either_numpy() -> None:
    tree = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    new = pickle.dumps(tree, protocol=3)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    for data in (new, old):
        read = unpickle_numpy(data, name="test")
        assert isinstance(read, dict)
        np.testing.assert_array_equal(read["layer"]["kernel"], tree["layer"]["kernel"])


def test_the_unpickler_refuses_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(Malicious()), pickle.dumps({"a": [Malicious()]})):
        with pytest.raises(ValueError, match=r"asks for builtins\.eval"):
            unpickle_numpy(data, name="test")
    hidden = pickle.dumps(np.array([Malicious()], dtype=object))
    with pytest.raises(ValueError, match="asks for"):
        unpickle_numpy(hidden, name="test")
    assert not list(tmp_path.iterdir())


def test_a_file_with_another_hash_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "alexnet.ckpt"
    file.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="expected 443c5bc3"):
        load_lpips(tmp_path, "alexnet")
    with pytest.raises(ValueError, match="cannot read"):
        load_lpips(tmp_path / "absent", "vgg16")
    with pytest.raises(ValueError, match="sha256"):
        load_inception(file)


def test_a_pickle_with_the_pinned_hash_is_read(tmp_path: Path) -> None:
    file = tmp_path / "arrays.ckpt"
    file.write_bytes(pickle.dumps({"a": np.ones(2)}, protocol=3))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    read = read_numpy_pickle(file, sha256=digest)
    assert isinstance(read, dict)
    assert read["a"].tolist() == [1, 1]


# Features


def test_pictures_are_prepared_to_the_networks_range() -> None:
    pictures = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 8, 8, 3)
    prepared = prepare(pictures)
    assert prepared.shape == (2, 3, 299, 299)
    # Bicubic weights sum to one only to rounding.
    assert (prepared[0] + 1).abs().max() < 1e-5
    assert (prepared[1] - 127 / 128).abs().max() < 1e-5


def mean_colours(pictures: np.ndarray) -> np.ndarray:
    return (pictures.reshape(len(pictures), -1, 3).mean(1) / 255).astype(np.float32)


def test_the_feature_cache_computes_a_block_once(tmp_path: Path) -> None:
    computed: list[int] = []

    def features_of(pictures: np.ndarray) -> np.ndarray:
        computed.append(len(pictures))
        return mean_colours(pictures)

    pictures = random_pictures(300, 4)
    cache = FeatureCache(tmp_path, features_of)
    first, second = cache(pictures), cache(pictures)
    assert computed == [256, 44]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, mean_colours(pictures))
    cache(255 - pictures)
    assert computed == [256, 44, 256, 44]


# R-precision

QUICK = Training(epochs=15, batch=64, hidden=64, width=32)


def paired_features(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Captions, and pictures that are a fixed linear map of their captions: matching is possible."""
    captions = noise(count, 24, seed=0)
    return captions @ noise(24, 32, seed=1), captions


def test_a_scorer_that_can_match_is_near_perfect_and_wrong_captions_are_at_chance() -> None:
    pictures, captions = paired_features()
    pool = Pool(captions, np.arange(len(captions)))
    scorer = train_scorer(pictures, captions, seed=0, training=QUICK)
    own = np.arange(100)
    right = scorer.r_precision(pictures[own], own, pool, seed=0)
    assert right.at_1 > 0.95
    assert right.at_5 >= right.at_1
    wrong = wrong_captions(own, pool.families, seed=0)
    assert scorer.r_precision(pictures[own], wrong, pool, seed=0).at_1 < 0.06


def test_a_scorer_of_unrelated_features_is_at_chance() -> None:
    pictures, captions = noise(300, 32, seed=5), noise(300, 24, seed=6)
    scorer = train_scorer(pictures[:100], captions[:100], seed=0, training=QUICK)
    own = np.arange(100, 300)
    result = scorer.r_precision(pictures[own], own, Pool(captions, np.arange(300)), seed=0)
    # 200 pictures at chance 0.01: more than 8 right has a probability below 1e-3.
    assert result.at_1 <= 8 / 200


def test_ties_count_as_misses() -> None:
    pictures, captions = paired_features()
    scorer = train_scorer(pictures, captions, seed=0, training=QUICK)
    alike = Pool(np.repeat(captions[:1], len(captions), axis=0), np.arange(len(captions)))
    assert scorer.r_precision(pictures[:20], np.arange(20), alike, seed=0).at_5 == 0


def test_one_seed_gives_one_scorer_whatever_the_global_generator() -> None:
    pictures, captions = paired_features(100)
    state = torch.get_rng_state()
    first = train_scorer(pictures, captions, seed=3, training=QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = train_scorer(pictures, captions, seed=3, training=QUICK)
    other = train_scorer(pictures, captions, seed=4, training=QUICK)
    weight = first.picture_head.second.weight
    assert torch.allclose(weight, second.picture_head.second.weight, atol=1e-5)
    assert not torch.allclose(weight, other.picture_head.second.weight, atol=1e-2)


def test_candidates_are_99_different_captions_of_other_families() -> None:
    families = np.arange(600) // 3
    candidates = draw_candidates(np.array([0, 7, 300]), families, seed=0)
    assert candidates.shape == (3, 100)
    assert candidates[:, 0].tolist() == [0, 7, 300]
    for row in candidates:
        assert len(set(row.tolist())) == 100
        assert (families[row[1:]] != families[row[0]]).all()
    np.testing.assert_array_equal(candidates, draw_candidates(np.array([0, 7, 300]), families, seed=0))
    with pytest.raises(ValueError, match="99 captions"):
        draw_candidates(np.array([0]), np.arange(50), seed=0)


def test_wrong_captions_are_a_rearrangement_without_the_own_family() -> None:
    own = np.array([5, 1, 2, 8, 9, 3, 0])
    families = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    wrong = wrong_captions(own, families, seed=0)
    assert sorted(wrong.tolist()) == sorted(own.tolist())
    assert (families[wrong] != families[own]).all()
    with pytest.raises(ValueError, match="one family"):
        wrong_captions(np.array([0, 1, 2]), families, seed=0)


# The whole measurement


class Copyist:
    """Draws the real picture where the schedule says so, noise otherwise."""

    name = "copyist"

    def check(self, schedule: str, seed: int) -> None:
        """Draw by any."""

    def __init__(self, by_caption: dict[str, np.ndarray]) -> None:
        self.by_caption = by_caption

    def draw(self, captions: Sequence[str], schedule: str, seed: int) -> np.ndarray:
        if schedule == "perfect":
            return np.stack([self.by_caption[caption] for caption in captions])
        return random_pictures(len(captions), 16, seed)

    def reconstruct(self, pictures: np.ndarray) -> np.ndarray:
        return (pictures // 2 * 2).astype(np.uint8)


def measured_side(count: int = 200, shown: int = 60) -> tuple[RealSide, Copyist]:
    """Pictures of one colour each, captions that tell the colour, one held-out split."""
    colours = np.random.default_rng(0).integers(0, 250, (count, 3), dtype=np.uint8)
    pictures = np.broadcast_to(colours[:, None, None], (count, 16, 16, 3))
    features = mean_colours(pictures)
    pool = Pool(features, np.arange(count))
    scorer = train_scorer(features, pool.caption_features, seed=0, training=QUICK)
    records = np.arange(shown)
    captions = tuple(f"colour {record}" for record in records)
    held_out = HeldOut("pairs", records, captions, pictures[:shown], features[:shown], features[-shown:])
    artist = Copyist(dict(zip(captions, pictures[:shown], strict=True)))
    return RealSide(pool, (scorer, scorer, scorer), (held_out,)), artist


def test_a_report_puts_a_perfect_artist_at_the_ceiling_and_noise_at_chance() -> None:
    real, artist = measured_side()
    report = measure(
        artist,
        real,
        schedules=["perfect", "noise"],
        features_of=mean_colours,
        metric=small_lpips(),
        seed=1,
    )
    rows = {row.pictures: row for row in report.rows}
    assert list(rows) == ["real", "reconstructed", "perfect", "noise"]
    assert rows["perfect"].at_1 == rows["real"].at_1
    assert rows["perfect"].share_of_real == pytest.approx(1)
    assert rows["perfect"].fid == pytest.approx(0, abs=1e-9)
    assert np.mean(rows["noise"].at_1) < 0.2 < np.mean(rows["real"].at_1)
    assert rows["noise"].fid > 0.1
    assert rows["noise"].kid.value > 0 > rows["perfect"].kid.value
    assert report.reconstructions[0].psnr > 45

    assert json.loads(report.json_line())["rows"][2]["pictures"] == "perfect"
    assert "\n" not in report.json_line()
    assert "| pairs | noise | 60 |" in report.markdown()


def test_a_schedule_that_fails_takes_no_row_of_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, artist = measured_side()
    whole = artist.draw

    def draw(captions: Sequence[str], schedule: str, seed: int) -> np.ndarray:
        if schedule == "late":
            raise RuntimeError("out of memory")
        return whole(captions, schedule, seed)

    monkeypatch.setattr(artist, "draw", draw)
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="out of memory"):
        measure(
            artist,
            real,
            schedules=["perfect", "late"],
            features_of=mean_colours,
            metric=small_lpips(),
            seed=1,
        )
    rows = [line for line in caplog.messages if line.startswith("split pairs, pictures ")]
    assert [line.split()[3] for line in rows] == ["real,", "reconstructed,", "perfect,"]
    assert all(", R@1 of 100 0." in line and ", FID " in line for line in rows)
    assert any("PSNR dB" in line for line in caplog.messages)


@pytest.fixture
def pictures_of_64(data: Path, tmp_path: Path) -> Path:
    """A picture set of the shipped model's size."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    small = np.load(data / "pictures-32.npy")
    np.save(folder / "pictures-64.npy", small.repeat(2, axis=1).repeat(2, axis=2))
    (folder / "records-64.json").write_bytes((data / "records-32.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--schedules", "top-k", "typo"], "star-emoji-64.* cannot draw by 'typo': .*neither a preset"),
        (["--schedules", "top-k", "maps 1 2"], "cannot draw by 'maps 1 2'"),
        (["--seed", "-1"], "a seed lies between 0 and"),
        (["--data", "nowhere"], "no 64 px pictures in nowhere"),
        (["--model", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_fetched(
    options: list[str],
    said: str,
    pictures_of_64: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fetched(name: str, folder: Path) -> Path:
        raise AssertionError(f"{name} was fetched")

    monkeypatch.setattr(evaluation, "asset_path", fetched)
    assert main(["evaluate", "--data", str(pictures_of_64), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)


def test_a_model_without_a_causal_sampler_is_not_asked_to_draw_by_it() -> None:
    star = load()
    star.causal_sampler = None
    artist = StarArtist(star, 64)
    artist.check("top-k", 1)
    with pytest.raises(ValueError, match="cannot draw by 'sampler': the schedule uses the causal sampler"):
        artist.check("sampler", 1)


@pytest.mark.parametrize("device", ["nosuch", "meta"])
def test_a_device_that_does_not_compute_here_is_refused(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--device", device])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument --device: {device} cannot be used here" in line


def test_real_pictures_alone_are_measured_without_an_artist() -> None:
    real, _ = measured_side()
    report = measure(None, real, schedules=["perfect"], features_of=mean_colours, metric=None, seed=1)
    assert [row.pictures for row in report.rows] == ["real"]
    assert report.reconstructions == ()


def emoji_set(held_out_colour: int = 0) -> EmojiSet:
    """240 training, 60 pair and 50 concept pictures of one colour each; captions are the labels."""
    splits = ["train"] * 240 + ["pairs"] * 60 + ["concepts"] * 50
    colours = np.random.default_rng(0).integers(0, 250, (len(splits), 3), dtype=np.uint8)
    colours[240:] += np.uint8(held_out_colour)
    records = tuple(
        Record(i, "Noto", f"{i:x}", f"family {i}", f"thing {i}", (), "objects", split)
        for i, split in enumerate(splits)
    )
    return EmojiSet(np.broadcast_to(colours[:, None, None], (len(splits), 8, 8, 3)), records)


def load_side(emoji: EmojiSet, cache: Path, extent: Extent) -> RealSide:
    def embed(captions: Sequence[str]) -> np.ndarray:
        numbers = [int(caption.rpartition(" ")[2]) for caption in captions]
        return noise(400, 24)[numbers]

    return load_real_side(emoji, features_of=mean_colours, embed=embed, cache=cache, extent=extent)


def test_scorers_never_see_held_out_pictures(tmp_path: Path) -> None:
    sides = [load_side(emoji_set(colour), tmp_path, Extent()) for colour in (0, 5)]
    weights = [side.scorers[0].picture_head.second.weight for side in sides]
    assert torch.allclose(*weights, atol=1e-5)
    for side, emoji in zip(sides, (emoji_set(0), emoji_set(5)), strict=True):
        for held_out in side.held_out:
            assert {emoji.records[row].split for row in held_out.records} == {held_out.split}
            assert held_out.captions[0] == f"Noto emoji of thing {held_out.records[0]}"
            np.testing.assert_array_equal(held_out.features, mean_colours(held_out.pictures))
            assert held_out.others.shape == held_out.features.shape
    assert not np.array_equal(sides[0].held_out[0].features, sides[1].held_out[0].features)


def test_a_smaller_extent_is_a_part_of_a_larger_one() -> None:
    emoji = emoji_set()
    whole, part = Extent().rows(emoji, "train"), Extent(training=100).rows(emoji, "train")
    np.testing.assert_array_equal(part, whole[:100])
    assert len(Extent(training=100).rows(emoji, "pairs")) == 60
    with pytest.raises(ValueError, match="at least 100 held-out pictures are needed, got 3"):
        Extent(held_out=3)


def test_a_floor_from_fewer_pictures_than_are_held_out_is_refused(tmp_path: Path) -> None:
    emoji = emoji_set()
    few = EmojiSet(emoji.pictures, tuple(r for r in emoji.records if r.split != "train" or r.index < 55))
    with pytest.raises(ValueError, match="55 training pictures for 60 held-out ones"):
        load_side(few, tmp_path, Extent())


@dataclass(frozen=True)
class StubRequest:
    prompts: tuple[str, ...]
    seeds: tuple[PictureSeed, ...] = ()


class StubStar:
    """Draws each picture in the colour (length of its prompt, seed, index)."""

    def request(self, prompts: list[str], *, options: Options) -> StubRequest:
        assert options.size == (4, 4)
        return StubRequest(tuple(prompts))

    def run(self, request: StubRequest) -> list[SimpleNamespace]:
        colours = [
            (len(prompt), seed.seed, seed.index)
            for prompt, seed in zip(request.prompts, request.seeds, strict=True)
        ]
        f_hat = torch.tensor(colours, dtype=torch.float32)[:, :, None, None]
        return [SimpleNamespace(f_hat=torch.zeros(1)), SimpleNamespace(f_hat=f_hat)]

    def encode_image(self, pictures: torch.Tensor) -> list[SimpleNamespace]:
        return [SimpleNamespace(f_hat=None), SimpleNamespace(f_hat=pictures * 255)]

    def decode(self, f_hat: torch.Tensor) -> torch.Tensor:
        return (f_hat / 255).expand(-1, -1, 4, 4)

    config = SimpleNamespace(name="stub")


def test_a_model_draws_every_caption_with_noise_of_its_own() -> None:
    artist = StarArtist(cast("Star", StubStar()), size=4)
    captions = ["x" * (1 + i % 7) for i in range(40)]
    pictures = artist.draw(captions, "top-k", seed=9)
    assert pictures.shape == (40, 4, 4, 3)
    assert pictures.dtype == np.uint8
    expected = [[len(caption), 9, i] for i, caption in enumerate(captions)]
    assert pictures[:, 0, 0].tolist() == expected


def test_reconstruction_keeps_order_and_rounds_to_the_nearest_level() -> None:
    pictures = random_pictures(40, 4)
    artist = StarArtist(cast("Star", StubStar()), size=4)
    np.testing.assert_array_equal(artist.reconstruct(pictures), pictures)


# The blind sheet


def test_a_readers_answers_are_marked_in_a_table(tmp_path: Path) -> None:
    file = tmp_path / "answers.txt"
    file.write_text(f"1: {load_prompts()[0].answers[0]}\n2: nothing I know\n", encoding="utf-8")
    table = marked(file)
    assert table.endswith("1 of 48 named right")
    assert "| nothing I know | no |" in table
    with pytest.raises(ValueError, match="cannot read"):
        marked(tmp_path / "absent.txt")


def test_answers_may_begin_with_a_mark_of_their_bytes_order_and_are_text(tmp_path: Path) -> None:
    # As Windows' editors save them.
    file = tmp_path / "answers.txt"
    file.write_text(f"1: {load_prompts()[0].answers[0]}\n", encoding="utf-8-sig")
    assert marked(file).endswith("1 of 48 named right")
    file.write_text("1: a caf\u00e9\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"answers\.txt is no text in UTF-8 \(.*\): save it as that"):
        marked(file)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file/sheet.png", "cannot be written"),
        ("sheet.text", "names no kind of picture"),
        ("sheet", "names no kind of picture"),
        ("folder.png", "is a folder"),
    ],
)
def test_a_sheet_that_cannot_be_written_is_refused_before_it_is_drawn(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["evaluate", "--sheet", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--sheet {tmp_path / name} {said}" in line
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_the_48_fixed_prompts_accept_what_they_ask_for() -> None:
    prompts = load_prompts()
    assert len(prompts) == 48
    assert len({prompt.prompt for prompt in prompts}) == 48
    assert {prompt.kind for prompt in prompts} == {"held-out style", "plain", "synonym"}
    answers = {number: prompt.answers[-1] for number, prompt in enumerate(prompts, start=1)}
    assert all(mark(answers, prompts))
    assert not any(mark({}, prompts))
    # Numbers shuffled by one are nearly all wrong: the accepted names tell the prompts apart.
    shifted = {1 + number % 48: answer for number, answer in answers.items()}
    assert sum(mark(shifted, prompts)) <= 2


def test_the_committed_answers_are_those_that_the_notes_count() -> None:
    answers = read_answers(PROMPTS_FILE.with_name("answers.txt").read_text(encoding="utf-8"))
    assert len(answers) == 48
    right = sum(mark(answers, load_prompts()))
    notes = (Path(__file__).parents[2] / "NOTES.md").read_text(encoding="utf-8")
    assert int(re.findall(r"(\d+) named right by a reader", notes)[-1]) == right


def test_the_held_out_prompts_of_the_sheet_are_captions_of_held_out_pairs() -> None:
    for prompt in load_prompts():
        style, _, label = prompt.prompt.partition(" emoji of ")
        if prompt.kind == "held-out style":
            assert heldout().split(label, style) == "pairs", prompt.prompt
        else:
            assert not label


def test_answers_are_read_by_number_and_marked_by_whole_words() -> None:
    prompts = load_prompts()[:1]
    right = prompts[0].answers[0]
    assert read_answers(f"My answers\n 1: {right}\n2) a dog ") == {1: right, 2: "a dog"}
    assert mark({1: f"A small {right.upper()}s, perhaps"}, prompts) == (True,)
    assert mark({1: f"mega{right}"}, prompts) == (False,)
    assert mark({1: f"teapot or {right}"}, prompts) == (False,)
    with pytest.raises(ValueError, match="answered twice"):
        read_answers("1: a\n1: b")
    with pytest.raises(ValueError, match=r"\[2\]"):
        mark({2: "a dog"}, prompts)


def test_a_sheet_shows_every_picture_in_its_place() -> None:
    pictures = np.zeros((10, 64, 64, 3), np.uint8)
    pictures[9] = (255, 0, 0)
    sheet = np.asarray(draw_sheet(pictures))
    assert sheet.shape[1] == 8 * 140 + 12
    rows, columns = np.nonzero((sheet == (255, 0, 0)).all(2))
    assert (columns.min(), columns.max()) == (12 + 140, 12 + 140 + 127)
    assert (rows.min(), rows.max()) == (12 + 162, 12 + 162 + 127)
