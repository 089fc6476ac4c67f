"""The training data: families, splits, captions and pinned packages, without a download."""

import dataclasses
import fnmatch
import io
import json
import re
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from star_core.__main__ import main
from star_core.training import drawings, emoji, packages
from star_core.training.captions import (
    clean_text,
    random_caption,
    with_article,
)
from star_core.training.drawings import STYLES, Drawing, Emoji
from star_core.training.emoji import EmojiSet, Record, _require_known
from star_core.training.packages import ASSETS, Asset, asset_path, unpack
from star_core.training.splits import (
    SPLITS,
    draw_heldout,
    families,
    format_heldout,
    heldout,
    parse_heldout,
    style_group,
)

FLUENT = ("Fluent", "Fluent flat", "Fluent 3D")


def record(**changes: object) -> Record:
    plain = Record(
        index=0,
        style="Noto",
        code="1f98a",
        concept="fox",
        label="fox",
        tags=("animal", "face"),
        group="animals and nature",
        split="train",
    )
    return dataclasses.replace(plain, **changes)


# Families


def test_gender_direction_and_person_variants_are_one_family():
    family = families(
        {
            "1f3c3": "person running",
            "1f3c3-200d-2642": "man running",
            "1f3c3-200d-2640-200d-27a1": "woman running facing right",
            "1f6b6": "person walking",
        }
    )
    assert family["1f3c3-200d-2642"] == family["1f3c3-200d-2640-200d-27a1"] == "person running"
    assert family["1f6b6"] == "person walking"


def test_an_astronaut_goes_with_astronauts_and_not_with_people_or_rockets():
    family = families(
        {
            "1f468": "man",
            "1f680": "rocket",
            "1f9d1-200d-1f680": "astronaut",
            "1f469-200d-1f680": "woman astronaut",
            "1f9d1-200d-1f393": "student",
        }
    )
    assert family["1f469-200d-1f680"] == "astronaut"
    assert len(set(family.values())) == 4


def test_mirrored_turned_and_resized_drawings_are_one_family_but_colours_are_not():
    family = families(
        {
            "1f91b": "left-facing fist",
            "1f91c": "right-facing fist",
            "2b1b": "black large square",
            "25aa": "black small square",
            "1f550": "one o'clock",
            "1f55c": "one-thirty",
            "1f499": "blue heart",
            "1f49a": "green heart",
        }
    )
    assert family["1f91c"] == "left-facing fist"
    assert family["25aa"] == "black large square"
    assert family["1f55c"] == "one o'clock"
    assert family["1f499"] != family["1f49a"]


# Splits


def synthetic_pictures() -> list[tuple[str, str]]:
    """300 families; every third lacks all styles but Fluent's, every seventh has two members."""
    pictures: list[tuple[str, str]] = []
    for n in range(300):
        styles = FLUENT if n % 3 == 0 else STYLES
        pictures += [(f"family {n}", style) for style in styles for _ in range(1 + (n % 7 == 0))]
    return pictures


def test_drawing_the_heldout_list_depends_on_the_seed_alone():
    pictures = synthetic_pictures()
    again = draw_heldout(reversed(pictures), seed=1, concept_pictures=100, pair_pictures=100)
    assert draw_heldout(pictures, seed=1, concept_pictures=100, pair_pictures=100) == again
    assert draw_heldout(pictures, seed=2, concept_pictures=100, pair_pictures=100) != again


def test_no_family_straddles_a_split_within_a_style_group():
    pictures = synthetic_pictures()
    held = draw_heldout(pictures, seed=0, concept_pictures=100, pair_pictures=100)
    splits: dict[tuple[str, str], set[str]] = {}
    for concept, style in pictures:
        splits.setdefault((concept, style_group(style)), set()).add(held.split(concept, style))
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == set(SPLITS)


def test_a_family_held_out_in_one_style_is_still_trained_on_in_a_style_that_is_not_fluent():
    pictures = synthetic_pictures()
    held = draw_heldout(pictures, seed=0, concept_pictures=50, pair_pictures=200)
    paired = {c for c, style in pictures if held.split(c, style) == "pairs"}
    assert paired
    for concept in paired:
        trained = {s for c, s in pictures if c == concept and held.split(c, s) == "train"}
        assert trained - set(FLUENT)


def test_the_wanted_numbers_of_pictures_are_held_out_and_large_families_are_spared():
    pictures = [*synthetic_pictures(), *[("arrow", "Noto")] * 50]
    held = draw_heldout(pictures, seed=0, concept_pictures=100, pair_pictures=100, largest_family=16)
    counts = Counter(held.split(*picture) for picture in pictures)
    assert 100 <= counts["concepts"] < 116
    assert 100 <= counts["pairs"] < 106
    assert held.split("arrow", "Noto") == "train"


def test_the_committed_list_is_consistent_and_survives_its_own_text_form():
    held = heldout()
    paired = [family for families in held.pairs.values() for family in families]
    assert len(held.concepts) >= 60
    assert len(paired) == len(set(paired))
    assert held.concepts.isdisjoint(paired)
    assert set(held.pairs) <= {style_group(style) for style in STYLES}
    assert parse_heldout(format_heldout(held)) == held


def test_the_three_fluent_finishes_are_held_out_together():
    held = heldout()
    family = min(held.pairs["Fluent"])
    assert {held.split(family, style) for style in FLUENT} == {"pairs"}
    assert held.split(family, "Noto") == "train"


def test_a_heldout_family_that_lost_its_name_is_refused():
    fox = Emoji("1f98a", "fox", "fox", (), "animals and nature")
    with pytest.raises(ValueError, match="families that the emoji do not have"):
        _require_known(heldout(), {fox.code: fox})


# Captions


@pytest.mark.parametrize(
    ("label", "clean"),
    [
        ("man: bald", "bald man"),
        ("person: blond hair", "person with blond hair"),
        ("person running: facing right", "person running facing right"),
        ("keycap: #", "keycap hash"),
        ("keycap: 7", "keycap 7"),
        ("kiss: woman, man", "kiss, woman, man"),
        ("A button (blood type)", "a button blood type"),
        ("Japanese \u201chere\u201d button", "japanese here button"),
        ("pi\u00f1ata", "pinata"),
        ("one o\u2019clock", "one o'clock"),
    ],
)
def test_labels_are_lower_case_ascii_without_colons(label: str, clean: str):
    assert clean_text(label) == clean


def test_articles_go_with_single_things():
    assert with_article("apple") == "an apple"
    assert with_article("fox") == "a fox"
    assert with_article("eyes") == "eyes"
    assert with_article("dress") == "a dress"


def test_random_captions_depend_on_the_generator_alone():
    first = [random_caption(record(), np.random.default_rng(3)) for _ in range(2)]
    rng = np.random.default_rng(3)
    assert first[0] == first[1] == random_caption(record(), rng)
    assert len({random_caption(record(), rng) for _ in range(200)}) > 30


def test_about_half_of_random_captions_name_the_style_and_most_the_label():
    rng = np.random.default_rng(0)
    captions = [random_caption(record(), rng) for _ in range(2000)]
    assert 0.5 < np.mean(["Noto" in caption for caption in captions]) < 0.6
    assert 0.66 < np.mean(["fox" in caption for caption in captions]) < 0.76


def test_an_emoji_without_tags_is_always_called_by_its_label():
    rng = np.random.default_rng(0)
    assert all("fox" in random_caption(record(tags=()), rng) for _ in range(100))


# Pictures


def write_set(folder: Path, concepts: list[str], style: str, pictures: int) -> None:
    np.save(folder / "pictures-8.npy", np.zeros((pictures, 8, 8, 3), np.uint8))
    row = {"style": style, "code": "0", "label": "x", "tags": ["y"], "group": "objects"}
    rows = [{**row, "concept": concept} for concept in concepts]
    (folder / "records-8.json").write_text(json.dumps(rows))


def test_a_loaded_set_takes_its_splits_from_the_heldout_list(tmp_path: Path):
    held = heldout()
    write_set(tmp_path, ["free", min(held.pairs["Noto"]), min(held.concepts)], "Noto", 3)
    loaded = EmojiSet.load(tmp_path, 8)
    assert [r.split for r in loaded.records] == ["train", "pairs", "concepts"]
    assert [loaded.indices(split).tolist() for split in SPLITS] == [[0], [1], [2]]
    assert loaded.records[1].tags == ("y",)


def test_a_sample_of_a_split_is_the_same_every_time_and_of_all_its_pictures(tmp_path: Path):
    write_set(tmp_path, ["free"] * 200, "Noto", 200)
    loaded = EmojiSet.load(tmp_path, 8)
    some = loaded.sample("train", 50)
    assert len(set(some.tolist())) == 50
    assert some.max() > 150, "files go style by style: the first rows are of one"
    assert np.array_equal(loaded.sample("train", 50), some)
    assert np.array_equal(loaded.sample("train", 20), some[:20])


def test_a_missing_or_torn_set_or_unknown_split_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ValueError, match="train data --folder"):
        EmojiSet.load(tmp_path, 8)
    write_set(tmp_path, ["free"], "Noto", 2)
    with pytest.raises(ValueError, match="1 records for 2 pictures"):
        EmojiSet.load(tmp_path, 8)
    write_set(tmp_path, ["free"], "Noto", 1)
    with pytest.raises(ValueError, match="'test'; choose one of train"):
        EmojiSet.load(tmp_path, 8).indices("test")


def test_icons_are_found_by_code_then_by_spelling_and_mirrored_aliases_are_left_out():
    def called(code: str, label: str) -> Emoji:
        return Emoji(code, label, label, (), "objects")

    vocabulary = {e.code: e for e in (called("1", "love letter"), called("2", "ox"), called("3", "ax"))}
    icons = {
        "width": 10,
        "height": 20,
        "icons": {"loveletter": {"body": "<g/>"}, "bull": {"body": "<b/>", "width": 5}},
        "aliases": {"ax": {"parent": "bull", "hFlip": True}, "old": {"parent": "bull"}},
    }
    names = drawings._icon_names(vocabulary, icons, {"2-FE0F": "bull", "9": "elsewhere"})
    assert names == {"1": "loveletter", "2": "bull", "3": "ax"}
    assert drawings._svg(icons, "ax") is None
    svg = drawings._svg(icons, "old")
    assert svg is not None
    assert 'viewBox="0 0 5 20"><b/>' in svg


def test_a_drawing_comes_out_centred_on_white_at_the_size_asked_for():
    pytest.importorskip("resvg_py")
    svg = drawings._svg({"width": 10, "height": 20, "icons": {"a": {"body": '<path d="M0 0h10v20H0z"/>'}}}, "a")
    assert svg is not None
    fox = Emoji("1f98a", "fox", "fox", (), "animals and nature")
    picture = drawings.render(Drawing(fox, "Noto", svg), 16)
    assert picture.shape == (16, 16, 3)
    assert picture.dtype == np.uint8
    # Lanczos rings a little beside the edge.
    assert picture[:, :3].min() > 250
    assert picture[:, 6:10].max() < 5


def test_a_built_set_loads_with_its_pictures_and_records_in_order(tmp_path: Path, monkeypatch):
    pytest.importorskip("resvg_py")
    body = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><path d="M0 0h4v4H0z"{}/></svg>'
    fox = Emoji("1f98a", "fox", "fox", ("animal",), "animals and nature")
    drawn = [
        Drawing(fox, "Noto", body.format("")),
        Drawing(fox, "Twemoji", body.format(' fill="red"')),
    ]
    monkeypatch.setattr(emoji, "asset_path", lambda name, folder: folder)
    monkeypatch.setattr(emoji, "read_vocabulary", lambda folder: {fox.code: fox})
    monkeypatch.setattr(emoji, "_require_known", lambda held, vocabulary: None)
    monkeypatch.setattr(emoji, "find_drawings", lambda vocabulary, packages: iter(drawn))
    emoji.build(tmp_path, 8, packages=tmp_path, workers=1)
    built = EmojiSet.load(tmp_path, 8)
    assert built.pictures[:, 4, 4].tolist() == [[0, 0, 0], [255, 0, 0]]
    assert [r.style for r in built.records] == ["Noto", "Twemoji"]
    assert built.records[1].tags == ("animal",)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["pictures-8.npy", "records-8.json"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--workers", "0", "0 is no number of processes: give 1"), ("--size", "7", "7 is no number of pixels")],
)
def test_a_number_that_draws_nothing_is_refused_before_a_download(option, value, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "data", option, value])
    assert said in capsys.readouterr().err


# Packages


def make_tgz(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo(link)
            info.type = tarfile.SYMTYPE
            info.linkname = "/etc/passwd"
            tar.addfile(info)
    return path


def test_only_the_named_members_are_unpacked(tmp_path: Path):
    members = {"package/icons.json": b"{}", "package/index.js": b"run()"}
    archive = make_tgz(tmp_path / "a.tgz", members, link="package/other")
    assert unpack(archive, tmp_path / "a", ("package/*.json",)) == [tmp_path / "a/package/icons.json"]
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        wheel.writestr("code.py", "run()")
        wheel.writestr("data/words.txt", "fox")
    assert unpack(tmp_path / "b.whl", tmp_path / "b", ("data/*",)) == [tmp_path / "b/data/words.txt"]


@pytest.mark.parametrize("name", ["package/../../out.json", "/package/out.json"])
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str):
    archive = make_tgz(tmp_path / "a.tgz", {name: b"{}"})
    with pytest.raises(ValueError, match="unsafe member"):
        unpack(archive, tmp_path / "a", ("*.json",))
    assert not list(tmp_path.glob("**/out.json"))


def test_links_are_refused(tmp_path: Path):
    archive = make_tgz(tmp_path / "a.tgz", {}, link="package/icons.json")
    with pytest.raises(ValueError, match="not a plain file"):
        unpack(archive, tmp_path / "a", ("package/*",))


def test_an_asset_on_disk_is_handed_out_only_with_its_pinned_bytes(tmp_path: Path, monkeypatch):
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes
    asset = Asset("npm", "a", "1", "0" * 64, "MIT", "package", ("*",), {"package/a.bin": digest})
    monkeypatch.setattr(packages, "ASSETS", {"a": asset})
    file = tmp_path / "a-1" / "package" / "a.bin"
    file.parent.mkdir(parents=True)
    file.touch()
    assert asset_path("a", tmp_path) == file.parent
    file.write_bytes(b"changed")
    # The folder to remove is the one whose absence brings the download: what is inside it is not looked for.
    again = f"remove {tmp_path / 'a-1'} and run again"
    with pytest.raises(ValueError, match=f"expected e3b0c44.*{re.escape(again)}"):
        asset_path("a", tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=f"is missing; {re.escape(again)}"):
        asset_path("a", tmp_path)
    with pytest.raises(ValueError, match="unknown asset 'b'"):
        asset_path("b", tmp_path)


def test_a_failing_registry_client_is_reported_with_its_words(tmp_path: Path):
    with pytest.raises(ValueError, match=r"(?s)failed with status 3.*no such package"):
        packages._download(["sh", "-c", "echo no such package >&2; exit 3"], tmp_path, "0" * 64)


def test_every_asset_unpacks_the_file_or_folder_that_it_hands_out_and_the_files_it_pins():
    for name, asset in ASSETS.items():
        for wanted in (asset.root, *asset.files):
            inside = (fnmatch.fnmatchcase(wanted, keep) for keep in asset.keep)
            assert any(inside) or any(keep.startswith(f"{wanted}/") for keep in asset.keep), name
