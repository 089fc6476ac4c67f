"""How many pictures `sample` draws together, and what a model's face says of sizes and prompts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from star_core import free_memory, load
from star_core.config import PRESETS
from star_core.free_memory import free_bytes
from star_core.memory import decoding_bytes, drawing_bytes
from star_core.sample import MOST_TOGETHER, SHARE_OF_FREE, pictures_together
from star_core.star import Star

GB = 10**9


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that are drawn, in their order."""
    sizes = []
    run = Star.run
    monkeypatch.setattr(Star, "run", lambda star, r: sizes.append(len(r.seeds)) or run(star, r))
    return sizes


def draw(sample, folder, *arguments):
    assert sample("cat", "dog", "--count", 9, "--folder", folder, *arguments)[0] == 0
    return {path.name: Image.open(path).tobytes() for path in folder.iterdir()}


def test_pictures_are_drawn_so_many_at_a_time_and_do_not_depend_on_it(sample, tmp_path, batches):
    sixteen = draw(sample, tmp_path / "default")
    assert batches == [16, 2]
    assert draw(sample, tmp_path / "five", "--batch", 5) == sixteen
    assert batches[2:] == [5, 5, 5, 3]
    assert draw(sample, tmp_path / "many", "--batch", 99) == sixteen
    assert batches[6:] == [18]


def test_short_memory_makes_the_batches_small(sample, tmp_path, monkeypatch, batches, checkpoint):
    star = load(checkpoint)
    drawing = drawing_bytes(star.config.transformer, star.config.maps, 1, guided=True, itemsize=4)
    picture = max(drawing, decoding_bytes(star.config.vqvae, star.config.maps[-1], 1, itemsize=4))
    monkeypatch.setattr("star_core.sample.free_bytes", lambda device: int(7.5 * picture / SHARE_OF_FREE))
    draw(sample, tmp_path / "seven")
    assert batches == [7, 7, 4]
    monkeypatch.setattr("star_core.sample.free_bytes", lambda device: 0)
    assert sample("cat", "dog", "--folder", tmp_path)[0] == 0
    assert batches[3:] == [1, 1]


def star_1024(dtype, replays=None):
    config = PRESETS["star-1024-d30-sampler"]
    return SimpleNamespace(config=config, transformer=SimpleNamespace(dtype=dtype), replays=replays)


@pytest.mark.parametrize(("free", "together"), [(None, 1), (0, 1), (8 * GB, 1), (40 * GB, 5), (1000 * GB, 16)])
def test_1024_px_pictures_take_gigabytes_each(free, together):
    star = star_1024(torch.float32)
    assert pictures_together(star, star.config.maps, free) == together


def test_small_pictures_are_drawn_together_where_no_system_says_what_is_free():
    star = load()
    assert pictures_together(star, star.config.maps, None) == MOST_TOGETHER


def test_half_precision_makes_room_and_graphs_take_it():
    maps = star_1024(torch.float32).config.maps
    exact, half = (pictures_together(star_1024(d), maps, 40 * GB) for d in (torch.float32, torch.bfloat16))
    assert exact < half
    assert pictures_together(star_1024(torch.bfloat16, object()), maps, 40 * GB) < half


def test_free_memory_is_known_where_it_can_be(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    free = free_bytes(cpu)
    assert free is None or 10**7 < free < 10**14
    assert free_bytes(torch.device("mps")) is None
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (4 + index, 9))
    assert free_bytes(torch.device("cuda", 1)) == 5
    monkeypatch.setattr(free_memory, "CONTAINERS", ())
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemAvailable:   3 kB\n")
    assert free_bytes(cpu) == 3 * 1024
    (tmp_path / "meminfo").write_text("Odd: 3")
    monkeypatch.setattr("os.sysconf", {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.__getitem__, raising=False)
    assert free_bytes(cpu) == 7 * 4096
    monkeypatch.delattr("os.sysconf")
    assert free_bytes(cpu) is None


@pytest.mark.parametrize(
    ("limit", "free"),
    [("5000", 3300), ("1500", 0), ("max", 10 * 1024), (str(2**63 - 4096), 10 * 1024), (None, 10 * 1024)],
)
def test_a_container_may_take_less_than_the_machine_has(limit, free, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemAvailable: 10 kB\n")
    (tmp_path / "now").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 20\nactive_file 9\ntotal_inactive_file 300\n")
    if limit is not None:
        (tmp_path / "most").write_text(f"{limit}\n")
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(
        free_memory, "CONTAINERS", ((tmp_path / "none", "most", "now"), (tmp_path, "most", "now"))
    )
    assert free_bytes(torch.device("cpu")) == free


def test_an_untrained_size_is_warned_of_once(sample, tmp_path, caplog):
    assert sample("sun", "--size", "32x8", "--count", 3, "--batch", 1, "--folder", tmp_path)[0] == 0
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("32x8 is an untrained size of tiny")
    assert message.endswith("the trained one is 16x16")


def test_the_trained_size_is_not_warned_of(sample, tmp_path, caplog):
    assert sample("sun", "--size", "16x16", "--out", tmp_path / "a.png")[0] == 0
    assert not caplog.records


def test_a_span_of_one_bare_text_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"write \(0, \[prompt\]\) for one"):
        load(checkpoint).request([(0, "a red apple")])


def test_texts_and_spans_do_not_mix(checkpoint):
    with pytest.raises(ValueError, match="all texts or all spans"):
        load(checkpoint).draw([(0, ["a"]), "b"])
