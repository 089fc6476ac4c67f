"""A tiny model with random weights, random texts and schedules; which kernels took a call; pictures to train
on, and what stands in for downloads."""

from __future__ import annotations

import functools
import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from star_core import kernels, text_encoder
from star_core.causal_sampler import CausalSampler
from star_core.config import StarConfig, TokenMap, TransformerConfig, VQVAEConfig
from star_core.generate import generate
from star_core.quantizer import MultiScaleQuantizer
from star_core.request import PromptSpan, Request, ScaleStep
from star_core.sampling import PictureSeed
from star_core.schedule import ScalePolicy, ScaleSchedule, Strategy, ramp
from star_core.text_encoder import TextEncoder, TextStates, load_text_encoder
from star_core.training.splits import heldout
from star_core.transformer import Transformer
from star_core.vqvae import VQVAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

settings.register_profile("star", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("star")

if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    # Processes side by side share the cores, with what they start: threads that wait for each other crawl.
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

SHARING = ("e2e", "gpu", "nodes", "server", "workflows")
"""Folders whose tests start a ComfyUI or share a GPU: one after the other."""

LONGEST = (
    "test_kernels.py",
    "test_training_stages.py",
    "test_benchmarks.py",
    "test_shipped_model.py",
    "test_generate.py",
    "test_whole_training.py",
    "test_golden.py",
    "test_cli.py",
)
"""Files that begin first, so that none is left for the end, when the other processes have nothing to do."""


def group_of(nodeid: str) -> str:
    """Return what a test runs in one process with."""
    file = nodeid.partition("::")[0]
    return file if set(SHARING).isdisjoint(Path(file).parts) else "sharing"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Bring what takes longest to the front where processes share the tests: a ComfyUI's, where one is."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        rank = {"sharing": -1} | {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(group_of(item.nodeid), rank.get(item.path.name, len(LONGEST))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Say what runs side by side (pytest -n 2 --dist loadgroup): files, but for those that share something.

    xdist's own groups are lost with pytest 9.2, without a word: they were written into a node's private name.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # files stay in their order: not those with the most tests first
    return Files(config, log)


def pytest_collection_finish() -> None:
    """Nothing that was imported is garbage: to look through it at every few thousand objects takes a twentieth
    of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # what is left at Python's end makes libraries speak of leaks


CPU = torch.device("cpu")
CODEBOOK = 64
CODE_WIDTH = 8
TEXT_WIDTH = 16
TEXT_POSITIONS = 7

MAPS: tuple[TokenMap, ...] = ((1, 1), (2, 3), (3, 4), (4, 6))
"""Rectangular on purpose: what mixes up height and width fails here."""


class PoorDevice(TorchFunctionMode):
    """The device "meta" as one of those that have little: Apple's GPUs lack bicubic interpolation until PyTorch
    2.6 and averages of areas of several sizes, DirectML complex numbers, Intel's and Apple's float64."""

    WIDE = (torch.float64, torch.complex64, torch.complex128)

    def __torch_function__(
        self, func: Callable, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        named = kwargs or {}
        if func is nn.functional.interpolate and args[0].is_meta and not self._interpolates(args[0], **named):
            raise NotImplementedError(f"interpolate by mode {named['mode']}")
        found = func(*args, **named)
        if isinstance(found, Tensor) and found.is_meta and found.dtype in self.WIDE:
            raise NotImplementedError(f"{func}: {found.dtype}")
        return found

    def _interpolates(self, x: Tensor, *, mode: str, size: tuple[int, int], **_: object) -> bool:
        whole = all(before % after == 0 for before, after in zip(x.shape[2:], size, strict=True))
        return mode != "bicubic" and (mode != "area" or whole)


@pytest.fixture(scope="session")
def poor_device() -> type[PoorDevice]:
    return PoorDevice


def random_weights(module: nn.Module, seed: int) -> None:
    """Give a module weights under which activations keep their size and logits spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            x = torch.randn(parameter.shape, generator=generator)
            if name.endswith("log_scale"):
                value = (4 + 0.5 * x.tanh()).log()
            elif parameter.ndim == 1:
                value = 0.1 * x + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif "start_position" in name or "embed.weight" in name or "codebook" in name:
                value = 0.5 * x
            else:
                gain = 3.0 if name.endswith("head.weight") else 1.0
                value = gain / math.sqrt(math.prod(parameter.shape[1:])) * x
            parameter.copy_(value)
    module.requires_grad_(False).eval()


@dataclass(frozen=True, repr=False)
class TinyModel:
    """The modules of a tiny checkpoint with a causal sampler, and the loop over them."""

    config: StarConfig
    transformer: Transformer
    sampler: CausalSampler
    vqvae: VQVAE

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        return self.vqvae.quantizer

    @property
    def maps(self) -> tuple[TokenMap, ...]:
        return self.config.maps

    def run(self, request: Request) -> list[ScaleStep]:
        return list(generate(self.transformer, self.sampler, self.quantizer, request, CPU))


def build_tiny(
    cross_attention: str = "paired", maps: tuple[TokenMap, ...] = MAPS, operations: object = nn
) -> TinyModel:
    config = StarConfig(
        name="tiny",
        transformer=TransformerConfig(
            depth=2,
            width=64,
            heads=2,
            scales=len(maps),
            text_width=TEXT_WIDTH,
            codebook_size=CODEBOOK,
            code_width=CODE_WIDTH,
            cross_attention=cross_attention,
            sampler_depth=2,
        ),
        vqvae=VQVAEConfig(
            base_channels=8,
            channel_multipliers=(1, 2, 2),
            residual_blocks=1,
            codebook_size=CODEBOOK,
            code_width=CODE_WIDTH,
            norm_groups=4,
        ),
        maps=maps,
        schedule="top-k",
    )
    transformer = Transformer(config.transformer, operations=operations)
    sampler = CausalSampler(config.transformer, operations=operations)
    vqvae = VQVAE(config.vqvae, operations=operations)
    for seed, module in enumerate((transformer, sampler, vqvae)):
        random_weights(module, seed)
    return TinyModel(config, transformer, sampler, vqvae)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TinyModel]:
    """Build a tiny model; weights depend on nothing but the shapes."""
    return build_tiny


@pytest.fixture(scope="session", params=["paired", "independent"])
def model(request: pytest.FixtureRequest) -> TinyModel:
    """A tiny model of either cross-attention. Tests never change it."""
    return build_tiny(request.param)


@pytest.fixture(scope="session")
def paired() -> TinyModel:
    return build_tiny("paired")


def random_texts(*names: int) -> TextStates:
    """Return the states of one made-up prompt per name; equal names have equal states."""
    rows = []
    for name in names:
        generator = torch.Generator().manual_seed(1000 + name)
        length = 2 + name % (TEXT_POSITIONS - 2)
        rows.append(
            (
                torch.randn(TEXT_POSITIONS, TEXT_WIDTH, generator=generator),
                torch.arange(TEXT_POSITIONS) < length,
                torch.randn(TEXT_WIDTH, generator=generator),
            )
        )
    hidden, mask, pooled = (torch.stack(column) for column in zip(*rows, strict=True))
    return TextStates(hidden, mask, pooled)


@pytest.fixture(scope="session")
def texts() -> Callable[..., TextStates]:
    return random_texts


def plain_schedule(scales: int = len(MAPS), guidance: float = 3.0) -> ScaleSchedule:
    return ScaleSchedule(
        tuple(ScalePolicy(top_k=24, top_p=0.9, guidance=t) for t in ramp(guidance, scales)), guidance
    )


def smooth_schedule(scales: int = len(MAPS), guidance: float = 3.0) -> ScaleSchedule:
    return ScaleSchedule(tuple(ScalePolicy(guidance=t, smooth=True) for t in ramp(guidance, scales)), guidance)


def sampler_schedule(
    strategy: Strategy, scales: int = len(MAPS), guidance: float = 3.0, refined: int = 2
) -> ScaleSchedule:
    """Refine the last `refined` scales in five steps: two by the transformer, two in random order."""
    policies = [
        ScalePolicy(
            top_k=24,
            top_p=0.9,
            guidance=t,
            steps=5 if scale >= scales - refined else 0,
            transformer_steps=2,
            random_steps=2,
        )
        for scale, t in enumerate(ramp(guidance, scales))
    ]
    return ScaleSchedule(tuple(policies), guidance, strategy)


SCHEDULES: dict[str, Callable[..., ScaleSchedule]] = {
    "plain": plain_schedule,
    "smooth": smooth_schedule,
    "official": lambda **options: sampler_schedule("official", **options),
    "confidence": lambda **options: sampler_schedule("confidence", **options),
    "masked": lambda **options: sampler_schedule("masked", **options),
}


@pytest.fixture(scope="session")
def make_schedule() -> Callable[..., ScaleSchedule]:
    """Return make_schedule(kind, scales=, guidance=) for a kind of `schedule_kind`."""
    return lambda kind, **options: SCHEDULES[kind](**options)


@pytest.fixture(params=["plain", "smooth", "official", "masked"])
def schedule_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def schedule(schedule_kind: str) -> ScaleSchedule:
    """A schedule for the tiny model of every kind in turn: plain, smooth, and the sampler with and without
    the transformer's confidence."""
    return SCHEDULES[schedule_kind]()


UNCONDITIONAL = 99
"""The name of the made-up text that guidance leads away from."""


@pytest.fixture(scope="session")
def ask() -> Callable[..., Request]:
    """Return ask(names, schedule, ...): the request of one picture per made-up prompt."""

    def make(
        names: Sequence[int],
        schedule: ScaleSchedule,
        *,
        seeds: Sequence[PictureSeed] | None = None,
        maps: tuple[TokenMap, ...] = MAPS,
        unconditional: TextStates | None = None,
        **options: object,
    ) -> Request:
        away = random_texts(*[UNCONDITIONAL] * len(names)) if unconditional is None else unconditional
        return Request(
            prompts=(PromptSpan(random_texts(*names), away),),
            maps=maps,
            schedule=schedule,
            seeds=tuple(seeds or [PictureSeed(5)] * len(names)),
            **options,
        )

    return make


def random_tokens(maps: Sequence[TokenMap], batch: int, seed: int) -> tuple[Tensor, ...]:
    """Return tokens (B, h * w) of every scale."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(CODEBOOK, (batch, h * w), generator=generator) for h, w in maps)


@pytest.fixture(scope="session")
def tokens() -> Callable[..., tuple[Tensor, ...]]:
    return random_tokens


@pytest.fixture(scope="session")
def weigh() -> Callable[[nn.Module, int], None]:
    """Return what gives a module random weights that keep activations' size."""
    return random_weights


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were asked and took the call, in order."""
    names: list[str] = []
    named = kernels._named

    def watched(name: str) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            made = named(name)(*args, **kwargs)
            names.extend([name] if made is not None else [])
            return made

        return run

    monkeypatch.setattr(kernels, "_named", watched)
    return names


TRAINED, HELD_OUT = 12, 3


class Distance(nn.Module):
    """Stands in for LPIPS, whose weights are a download: the stages need its call, and maps to judge by."""

    channels = (3,)

    def features(self, pictures: Tensor) -> Iterator[Tensor]:
        yield torch.nn.functional.avg_pool2d(pictures, 4)

    def forward(self, drawn: Tensor, real: Tensor) -> Tensor:
        return (drawn - real).square().mean(dim=(1, 2, 3))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture set of 16 px, and the same of 32: coloured squares, three of them in a held-out pair."""
    folder = tmp_path_factory.mktemp("data")
    style, families = next(iter(heldout().pairs.items()))
    concepts = ["a trained family"] * TRAINED + [sorted(families)[0]] * HELD_OUT
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (len(concepts), 1, 1, 3), dtype=np.uint8)
    rows = [
        {
            "style": style,
            "code": f"{i:x}",
            "concept": c,
            "label": f"thing {i}",
            "tags": ["square"],
            "group": "x",
        }
        for i, c in enumerate(concepts)
    ]
    for side in (16, 32):
        np.save(folder / f"pictures-{side}.npy", np.broadcast_to(colours, (len(concepts), side, side, 3)))
        (folder / f"records-{side}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def distance() -> nn.Module:
    return Distance()


@pytest.fixture(scope="session", autouse=True)
def _tokenizers_read_once() -> Iterator[None]:
    """Make the tokenizer of the same files once, a third of what a load takes. Nobody may change it."""
    load = text_encoder.load_tokenizer

    @functools.cache
    def made(folder: Path, files: tuple[tuple[str, int, int], ...]) -> PreTrainedTokenizerBase:
        return load(folder)

    def as_it_stands(folder: Path) -> PreTrainedTokenizerBase:
        found = sorted(folder.iterdir())
        return made(folder, tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in found))

    text_encoder.load_tokenizer = as_it_stands
    yield
    text_encoder.load_tokenizer = load


@pytest.fixture(scope="session")
def read_once() -> Callable[..., TextEncoder]:
    """Return `load_text_encoder` that reads the same files once: training changes nothing in a text encoder."""
    return functools.cache(load_text_encoder)
