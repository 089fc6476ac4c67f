"""The public face: load a model, encode text, generate, decode, encode a picture.

Pictures are (B, 3, H, W) float32 in [0, 1]. A batch of prompts is one call; `count` pictures of each prompt
follow each other, so that picture i of a prompt is row prompt * count + i.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .canvas import Canvas
from .causal_sampler import CausalSampler
from .checkpoint import load_networks, load_vqvae, operations_for
from .config import StarConfig, TokenMap, maps_for_size
from .eight_bit import check_eight_bit
from .generate import generate
from .graphs import Replays
from .model_files import find_files
from .packed import check_packing
from .presets import read_schedule
from .request import Options, PromptSpan, Request, ScaleStep
from .schedule import ScaleSchedule
from .streaming import Parts, visiting
from .text_encoder import TextEncoder, TextStates, load_text_encoder
from .text_files import find_text_files
from .transformer import Transformer
from .vqvae import VQVAE

_log = logging.getLogger(__name__)


class Star:
    """A loaded model. Drawing changes nothing in it; only the empty prompt's text states are remembered, and
    which untrained sizes were warned of.

    graphs: scales are recorded as CUDA graphs, and repeated for later pictures of the same size, schedule and
    batch; the memory of the last such shape stays held. Raises ValueError for another device.
    short_of_memory: the text encoder is on the device only while it reads, and pictures are decoded in strips;
    on a GPU weights move while such a model draws, so that one thread at a time may use it.
    """

    def __init__(
        self,
        config: StarConfig,
        transformer: Transformer,
        causal_sampler: CausalSampler | None,
        vqvae: VQVAE,
        text_encoder: TextEncoder,
        device: torch.device,
        *,
        graphs: bool = False,
        short_of_memory: bool = False,
    ) -> None:
        check_graphs(graphs, device)
        if text_encoder.width != config.transformer.text_width:
            raise ValueError(
                f"{config.name} reads text states of width {config.transformer.text_width}, this text"
                f" encoder gives {text_encoder.width}: use the one the checkpoint was trained with"
            )
        self.config = config
        self.transformer = transformer
        self.causal_sampler = causal_sampler
        self.vqvae = vqvae
        self.text_encoder = text_encoder
        self.device = device
        self.short_of_memory = short_of_memory
        self.replays: Replays[Canvas] | None = Replays() if graphs else None
        self.text_replays: Replays[Any] | None = Replays() if graphs else None
        self._empty: TextStates | None = None
        self._told: set[tuple[TokenMap, ...]] = set()

    def encode_text(self, prompts: Sequence[str]) -> TextStates:
        """Return the text states of N prompts: hidden (N, T, D), mask (N, T), pooled (N, D)."""
        with visiting(self.text_encoder, self.device) if self.short_of_memory else contextlib.nullcontext():
            if self.text_replays is None:
                return self.text_encoder.encode(prompts)
            try:
                return self.text_encoder.encode(prompts, self.text_replays)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # What transformers does in there is its own affair, and not always for a graph to hold.
                _log.warning("the text encoder's work cannot be recorded, it is launched each time: %s", error)
                self.text_replays = None
                return self.text_encoder.encode(prompts)

    def maps(self, size: tuple[int, int] | None) -> tuple[TokenMap, ...]:
        """Return the token maps of a size (height, width) in pixels, the trained ones for None.

        Warns of an untrained size, once. Raises ValueError for a size that the model does not have.
        """
        if size is None:
            return self.config.maps
        maps, trained = maps_for_size(self.config, *size)
        if not trained and maps not in self._told:
            self._told.add(maps)
            (height, width), (trained_height, trained_width) = size, self.config.resolution
            _log.warning(
                "%dx%d is an untrained size of %s, expect worse pictures; the trained one is %dx%d",
                *(width, height, self.config.name, trained_width, trained_height),
            )
        return maps

    def schedule(self, choice: ScaleSchedule | str | None, maps: Sequence[TokenMap]) -> ScaleSchedule:
        """Return the schedule that a choice means for these maps, as the model can run it."""
        return schedule_of(self.config, choice, maps, has_sampler=self.causal_sampler is not None)

    def request(
        self,
        prompts: Sequence[str] | Sequence[tuple[int, Sequence[str]]],
        negative: Sequence[str] | str = "",
        options: Options | None = None,
    ) -> Request:
        """Return the generation request of N prompts.

        prompts: N texts; or spans (start scale, N texts), whose first starts at scale 0.
        negative: one text for all or one per prompt; "" is the unconditional text. With paired cross-attention
        (the released models) it acts through the start token and the causal sampler alone.
        """
        options = options or Options()
        spans = _spans(prompts)
        number = len(spans[0][1])
        unconditional = [negative] * number if isinstance(negative, str) else list(negative)
        if any(len(texts) != number for _, texts in spans) or len(unconditional) != number:
            raise ValueError(
                f"as many texts everywhere: {[len(t) for _, t in spans]} prompts,"
                f" {len(unconditional)} negative ones"
            )
        maps = self.maps(options.size)
        away = self._text(unconditional, options.count)
        return Request(
            prompts=tuple(PromptSpan(self._text(texts, options.count), away, start) for start, texts in spans),
            maps=maps,
            schedule=self.schedule(options.schedule, maps),
            seeds=options.seeds(number),
            prefix=options.prefix,
            stop=options.stop,
            kept=options.kept,
        )

    def _text(self, prompts: Sequence[str], count: int) -> TextStates:
        if any(prompts):
            return self.encode_text(prompts).repeat_each(count)
        if self._empty is None:
            self._empty = self.encode_text([""])
        return self._empty.repeat_each(len(prompts) * count)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[tuple[int, Sequence[str]]],
        negative: Sequence[str] | str = "",
        options: Options | None = None,
    ) -> Generator[ScaleStep, None, None]:
        """Yield one step per scale for a batch of prompts; see `request` and `Options`."""
        return self.run(self.request(prompts, negative, options))

    def run(self, request: Request) -> Generator[ScaleStep, None, None]:
        """Yield one step per scale of a request."""
        quantizer = self.vqvae.quantizer
        return generate(self.transformer, self.causal_sampler, quantizer, request, self.device, self.replays)

    def draw(
        self,
        prompts: Sequence[str] | Sequence[tuple[int, Sequence[str]]],
        negative: Sequence[str] | str = "",
        options: Options | None = None,
    ) -> Tensor:
        """Return the finished pictures (B, 3, H, W) in [0, 1]."""
        *_, last = self.generate(prompts, negative, options)
        return self.decode(last.f_hat)

    def decode(self, f_hat: Tensor, *, sliced: bool | None = None) -> Tensor:
        """Return the pictures (B, 3, H, W) in [0, 1] of f_hat (B, D, h, w), of any scale's step.

        sliced: in strips: the same pictures in less memory, and later. None: as the model's memory asks for.
        """
        sliced = self.short_of_memory if sliced is None else sliced
        return self.vqvae.pictures(f_hat.to(self.device), sliced=sliced)

    def encode_image(self, pictures: Tensor) -> tuple[ScaleStep, ...]:
        """Return pictures (B, 3, H, W) in [0, 1] as finished scales, to restart or keep tokens from.

        Raises ValueError for a size that the model does not have.
        """
        return encode_image(self.config, self.vqvae, pictures.to(self.device))


def schedule_of(
    config: StarConfig, choice: ScaleSchedule | str | None, maps: Sequence[TokenMap], *, has_sampler: bool
) -> ScaleSchedule:
    """Return the schedule that a choice means for a model's maps, its own for None, as the model can run it.

    Raises ValueError for one that it cannot run.
    """
    chosen = config.schedule if choice is None else choice
    schedule = read_schedule(chosen, maps) if isinstance(chosen, str) else chosen
    # Checked here already, so that a bad schedule fails before the first scale is drawn.
    return schedule.fit(maps, config.transformer.codebook_size, has_sampler=has_sampler)


def check_graphs(graphs: bool, device: torch.device) -> None:
    """Raise ValueError where graphs are asked for and cannot be had."""
    if graphs and device.type != "cuda":
        raise ValueError(f"graphs are CUDA's, this model is on {device}: leave them out, or use a GPU")


@torch.no_grad()
def encode_image(config: StarConfig, vqvae: VQVAE, pictures: Tensor) -> tuple[ScaleStep, ...]:
    """Return pictures (B, 3, H, W) in [0, 1], on the VQ-VAE's device, as finished scales of a model.

    Raises ValueError for a size that the model does not have.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures are (B, 3, H, W), got {tuple(pictures.shape)}")
    maps, _ = maps_for_size(config, pictures.shape[2], pictures.shape[3])
    features = vqvae.encode(pictures * 2 - 1)
    quantized = vqvae.quantizer.quantize(features, maps)
    return tuple(
        ScaleStep(scale, maps[scale], tokens, f_hat, given=True)
        for scale, (tokens, f_hat) in enumerate(zip(quantized.tokens, quantized.f_hats, strict=True))
    )


def _spans(
    prompts: Sequence[str] | Sequence[tuple[int, Sequence[str]]],
) -> list[tuple[int, list[str]]]:
    if isinstance(prompts, str):
        raise ValueError("prompts is a sequence of texts: write [prompt] for one")
    if not prompts:
        raise ValueError("there is no prompt")
    texts = [p for p in prompts if isinstance(p, str)]
    if len(texts) == len(prompts):
        return [(0, texts)]
    if texts:
        raise ValueError(f"prompts are all texts or all spans (start scale, texts), not both: {prompts!r:.120}")
    found = [(span[0], span[1]) for span in prompts if not isinstance(span, str)]
    for start, spoken in found:
        if isinstance(spoken, str):
            raise ValueError(f"a span holds a sequence of texts: write ({start}, [prompt]) for one")
    return [(start, list(spoken)) for start, spoken in found]


def load(
    source: Path | str | None = None,
    *,
    vqvae: Path | str | None = None,
    text_encoder: Path | str | None = None,
    tokenizer: Path | str | None = None,
    preset: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    text_dtype: torch.dtype = torch.float32,
    eight_bit: str | None = None,
    graphs: bool = False,
    gpu_memory: int | None = None,
    packed: bool = False,
    low_memory: bool = False,
) -> Star:
    """Load a model: a folder with star.safetensors, vqvae.safetensors and text_encoder/, a single
    transformer file beside such files, or the shipped model (None).

    vqvae, text_encoder and tokenizer name files elsewhere. preset is needed only where the transformer's
    file does not say what it is. dtype is that of weights and activations, text_dtype the text encoder's;
    codebook, phis and f_hat are float32 whatever it is.
    eight_bit keeps the weights of transformer and causal sampler in 8 bits, a fast mode that changes the
    picture: "int8" for any device, "fp8" for GPUs with FP8 products (Ada, Hopper and later; elsewhere it is
    slow, which is warned of).
    graphs repeats scales as CUDA graphs, over texts of full length: other rounding, so that in half precision
    a token may change where two are about as likely. gpu_memory: draw a picture of the trained size within so
    many bytes of a GPU, beside the half gigabyte that CUDA keeps for itself: weights that find no room lie in
    the host's memory and are copied when they are needed (`streaming`). The same pictures, later.
    packed lays bfloat16 weights out for a CPU's products, for many pictures: loading reads them all and takes
    longer, each picture is faster; other rounding, so that a token may change where two are about as likely.
    low_memory is for a CPU: pictures are decoded in strips, and in float32 weights whose file has them in half
    precision stay in it and are made wide for each product (`upcast`). The same pictures, later. On a
    CPU a float32 text encoder keeps its half-precision weights so in any case.
    Raises ValueError naming file, key and remedy.
    """
    files = find_files(source, vqvae=vqvae, text_encoder=text_encoder)
    device = torch.device(device)
    if gpu_memory is not None and (device.type != "cuda" or graphs or eight_bit):
        raise ValueError(
            f"gpu_memory is for a GPU, without graphs and 8-bit weights (device {device}, graphs {graphs},"
            f" eight_bit {eight_bit}): leave it out, or them"
        )
    if low_memory and device.type != "cpu":
        remedy = ", or choose gpu_memory" if device.type == "cuda" else ""
        raise ValueError(f"low_memory is for a CPU (device {device}): leave it out{remedy}")
    check_graphs(graphs, device)
    check_eight_bit(eight_bit, device)
    _, words = find_text_files(files.text_encoder, None if tokenizer is None else Path(tokenizer))
    if packed:
        check_packing(dtype, device, eight_bit)
    place = device if gpu_memory is None else torch.device("cpu")
    keep_halves = low_memory and dtype == torch.float32
    layers = operations_for(dtype, device, keep_halves=keep_halves)
    config, networks = load_networks(
        files.star,
        preset_name=preset,
        operations=layers,
        dtype=dtype,
        device=place,
        eight_bit=eight_bit,
        packed=packed,
        keep_halves=keep_halves,
    )
    picture_network = load_vqvae(
        files.vqvae, config.vqvae, operations=layers, dtype=dtype, device=device, keep_halves=keep_halves
    )
    encoder = load_text_encoder(
        files.text_encoder,
        tokenizer=words,
        dtype=text_dtype,
        device=place,
        # No copies of weights that are read once a picture (NOTES.md: 0.1 s for 0.7 GB of SD 2.1's tower).
        keep_halves=device.type == "cpu" and text_dtype == torch.float32,
    )
    if gpu_memory is not None:
        parts = Parts(config, networks.transformer, networks.causal_sampler, picture_network, encoder)
        parts.fit_into(gpu_memory, device)
    return Star(
        config,
        networks.transformer,
        networks.causal_sampler,
        picture_network,
        encoder,
        device,
        graphs=graphs,
        short_of_memory=low_memory or gpu_memory is not None,
    )
