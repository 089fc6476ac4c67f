"""The official code and this engine on the same random weights, in turn, from the prompt to the pixels.

    STAR_REFERENCE=path/to/STAR-T2I python benchmarks/against_official.py

Every contender is a process of its own (the official builder patches torch for the whole process): `official`
is the code as its sample.py runs it (on a GPU under float16 autocast), `official-autocast` the same at its
best, bfloat16 autocast around everything and every weight cast once per picture (not on a CPU that multiplies
no bfloat16, where a picture takes many minutes), `ours-float32` and `ours-bfloat16` are this engine with
weights in that precision, on a GPU also with CUDA graphs, on a CPU with bfloat16 products also with packed
weights. They take turns, so that a machine's moods reach all of them. At the end the pictures of the likeliest
tokens are compared: where the float32 ones differ, the timings mean nothing and the exit code is 1 (a position
where two tokens are equally likely is enough: see the share of equal pixels). A contender that falls is named
with its last words, the others go on. Prints what it has as one JSON line after every round.

On a CPU this engine loads its weights from files, as a user's process does. On a GPU, which is paid by the
second, they are made there, only the float32 pictures are compared, and meanwhile the next size is built.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from workbench import (
    GIB,
    PROMPT,
    ROOT,
    SIZES,
    Peak,
    build_star,
    build_text_model,
    config_of,
    give_back,
    machine,
    middle,
    randomise,
    report,
    settle,
    table,
    tokenizer,
    write_model,
)

from star_core.config import StarConfig, token_count
from star_core.packed import can_be_packed
from star_core.request import Options
from star_core.schedule import ScalePolicy, ScaleSchedule, ramp
from star_core.star import Star, load
from star_core.upcast import needs_upcast

GUIDANCE = 4.0
TOP_K, TOP_P = 4096, 0.8
AUTOCAST = "official-autocast"
CONTENDERS = ("official", AUTOCAST, "ours-float32", "ours-bfloat16")
GRAPHS, PACKED = "-graphs", "-packed"
ON_A_GPU = (*CONTENDERS, "ours-bfloat16" + GRAPHS)
ALL = (*ON_A_GPU, "ours-bfloat16" + PACKED)
TOLERANCE = 1e-3
"""Between two float32 pictures in [0, 1] of the same tokens."""
COMPARED_ON_A_GPU = ("official", "ours-float32")
BYTES_PER_PARAMETER = 4
PATIENCE_FLOP = 30e12
"""What a CPU is asked for at most per picture, some five minutes on a few cores."""


Answer = TypeVar("Answer")
Drawer = Callable[[str, int, bool], Tensor]
"""Prompt, seed and whether to take the likeliest tokens -> picture (1, 3, H, W) in [0, 1]."""


def contenders_on(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return ON_A_GPU
    names = [*CONTENDERS, *(["ours-bfloat16" + PACKED] if can_be_packed(torch.bfloat16, device) else [])]
    return tuple(name for name in names if name != AUTOCAST or not needs_upcast(torch.bfloat16, device))


# The contenders, each in its own process


def official_drawer(config: StarConfig, seed: int, device: torch.device, autocast: bool) -> Drawer:
    """Build the official model with the benchmark's weights. STAR_REFERENCE names its checkout."""
    # Before the stubs of packages that transformers would find and trust.
    text_model, words = build_text_model(seed, torch.float32, device), tokenizer()
    sys.path[:0] = [str(ROOT / "tests" / "parity"), os.environ["STAR_REFERENCE"]]
    cuda_autocast = torch.cuda.amp.autocast
    import official_pair

    official_pair.stub_unused_packages()
    if device.type == "cuda":
        torch.cuda.amp.autocast = cuda_autocast
    sampler = config.transformer.has_sampler
    size = official_pair.Size(
        config.transformer.depth,
        tuple(side for side, _ in config.maps),
        config.transformer.codebook_size,
        config.transformer.text_width,
        config.vqvae.base_channels,
        sampler_from=9 if sampler else None,
    )
    vae, var = official_pair.build_official(size)
    for module in (vae, var):
        randomise(module, lambda name: name, seed=seed, dtype=torch.float32, device=device)
        module.to(device)
    # As sample.py has it. Of such weights alone autocast keeps the cast ones for a picture, outside inference
    # mode: sample.py is inside, and casts them all at every scale.
    var.requires_grad_(True)

    def precision() -> AbstractContextManager[Any]:
        if autocast:
            return torch.autocast(device.type, dtype=torch.bfloat16)
        # sample.py: float16 autocast for CUDA, which leaves a CPU in float32.
        return torch.autocast("cuda", dtype=torch.float16) if device.type == "cuda" else nullcontext()

    @torch.no_grad()
    @torch.inference_mode(not autocast)
    def draw(prompt: str, picture_seed: int, likeliest: bool) -> Tensor:
        # extract_text_features of models/text_encoder.py, prompt and empty prompt at once, every time.
        inputs = words([prompt, ""], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"].to(device)
        # Pictures are compared in float32: sample.py's float16 would flip tokens of random weights.
        exact = likeliest and not autocast
        with precision() if autocast else nullcontext():
            found = text_model(input_ids=inputs["input_ids"].to(device), attention_mask=mask)
        with nullcontext() if exact else precision():
            picture: Tensor = var.autoregressive_infer_cfg(
                B=1,
                label_B=None,
                encoder_hidden_states=found.last_hidden_state,
                encoder_attention_mask=mask,
                encoder_pool_feat=found.pooler_output,
                g_seed=picture_seed,
                cfg=GUIDANCE,
                top_k=1 if likeliest else TOP_K,
                top_p=TOP_P,
                w_mask=sampler and not likeliest,
                sample_version="1024" if sampler else "new",
            )
        return picture

    return draw


def our_drawer(
    config: StarConfig, seed: int, device: torch.device, dtype: torch.dtype, *, graphs: bool, packed: bool
) -> Drawer:
    """Return our model with the benchmark's weights: from files in this precision as a user has them.

    On a GPU they are drawn there: nothing of the files stays behind once a model is loaded.
    """
    star = (
        build_star(config, seed, dtype, device, graphs=graphs)
        if device.type == "cuda"
        else star_from_files(config, seed, device, dtype, packed=packed)
    )
    policies = tuple(ScalePolicy(top_k=1, top_p=TOP_P, guidance=t) for t in ramp(GUIDANCE, len(config.maps)))
    likeliest_schedule = ScaleSchedule(policies, GUIDANCE, maps=config.maps)

    def draw(prompt: str, picture_seed: int, likeliest: bool) -> Tensor:
        schedule = likeliest_schedule if likeliest else None
        return star.draw([prompt], options=Options(seed=picture_seed, schedule=schedule))

    return draw


def star_from_files(
    config: StarConfig, seed: int, device: torch.device, dtype: torch.dtype, *, packed: bool
) -> Star:
    """Write the random model and load it."""
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what making random weights leaves behind is not this contender's.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_model, args=(config, seed, dtype, Path(folder))
        )
        writer.start()
        writer.join()
        # The files stay mapped until the process ends, whatever happens to their names.
        return load(Path(folder), dtype=dtype, text_dtype=dtype, device=device, packed=packed)


def build(contender: str, config: StarConfig, seed: int, device: torch.device) -> Drawer:
    if contender.startswith("official"):
        return official_drawer(config, seed, device, contender == AUTOCAST)
    dtype = getattr(torch, contender.removeprefix("ours-").removesuffix(GRAPHS).removesuffix(PACKED))
    ways = {"graphs": contender.endswith(GRAPHS), "packed": contender.endswith(PACKED)}
    return our_drawer(config, seed, device, dtype, **ways)


def serve(arguments: argparse.Namespace) -> None:
    """Build one contender, then draw what the lines of stdin ask for; answer each in one line."""
    device = torch.device(arguments.device)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the official code prints
    torch.set_num_threads(arguments.threads)
    draw = build(arguments.worker, config_of(arguments.size), arguments.seed, device)
    give_back(device)
    peak = Peak(device, graphs=arguments.worker.endswith(GRAPHS))
    answers.write(json.dumps(machine(device)) + "\n")
    answers.flush()
    for line in sys.stdin:
        order = json.loads(line)
        peak.reset()
        settle(device)
        with exact_convolutions() if order["likeliest"] else nullcontext():
            began = time.perf_counter()
            picture = draw(order["prompt"], order["seed"], order["likeliest"])
            settle(device)
            seconds = time.perf_counter() - began
        if order["likeliest"]:
            torch.save(picture.float().cpu(), order["keep"])
            give_back(device)  # float32 throughout takes the most, and the others follow
        answers.write(json.dumps({"seconds": seconds, "peak": peak.read()}) + "\n")
        answers.flush()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Keep cuDNN from rounding float32 to 10 bits, as it does unasked: tokens are compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# The referee


class FallenError(Exception):
    """A contender's process ended."""


class Contender:
    """A process that draws on demand."""

    def __init__(self, name: str, size: str, arguments: argparse.Namespace, folder: Path) -> None:
        self.name = name
        self._kept = folder / f"{size}-{name}.pt"
        command = [sys.executable, __file__, "--worker", name, "--size", size]
        command += ["--device", arguments.device, "--threads", str(arguments.threads)]
        command += ["--seed", str(arguments.seed)]
        self._log = folder / f"{size}-{name}.log"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )

    def wait_until_built(self) -> dict[str, Any]:
        """Return the machine as the process sees it."""
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FallenError(self._log.read_text()[-2000:])
        return dict(json.loads(line))

    def draw(self, seed: int) -> dict[str, Any]:
        """Return seconds and peak bytes of a picture."""
        return self._order(seed, likeliest=False)

    def draw_likeliest(self) -> Tensor:
        """Return the picture of the likeliest tokens."""
        self._order(0, likeliest=True)
        picture: Tensor = torch.load(self._kept, weights_only=True)
        return picture

    def _order(self, seed: int, *, likeliest: bool) -> dict[str, Any]:
        order = {"prompt": PROMPT, "seed": seed, "likeliest": likeliest, "keep": str(self._kept)}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait(timeout=60)


def flop_of(config: StarConfig) -> float:
    """Return roughly what one guided picture takes: every weight twice per token and row, and the decoder."""
    t = config.transformer
    weights = t.depth * 15 * t.width**2 + t.width * t.codebook_size
    pixels = config.resolution[0] * config.resolution[1]
    # official-star.md section 7: 6.46 TFLOP for a decoded megapixel.
    return 2 * 2 * weights * token_count(config.maps) + 6.46e12 * pixels / 2**20


def weight_bytes(config: StarConfig) -> int:
    """Return roughly the bytes of one float32 model with its text encoder."""
    t = config.transformer
    parameters = (t.depth + t.sampler_depth) * 17 * t.width**2 + 110_000_000 + 340_000_000
    return parameters * BYTES_PER_PARAMETER


def too_large(config: StarConfig, device: torch.device) -> str | None:
    """Return why a size is left out here, or None. Held at once: 1 + 1 + 1 + 1/2 + 1/2."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        held = 4 * weight_bytes(config) + 12 * GIB
        return f"{held / GIB:.0f} GiB of GPU memory" if held > free else None
    held = 4 * weight_bytes(config)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if held > free:
        return f"{held / GIB:.0f} GiB of memory, {free / GIB:.0f} are free"
    if flop_of(config) > PATIENCE_FLOP:
        return f"{flop_of(config) / 1e12:.0f} TFLOP a picture"
    return None


class Contenders:
    """All contenders of one size, built side by side from the moment on that this is made."""

    def __init__(self, size: str, arguments: argparse.Namespace, folder: Path) -> None:
        self.size = size
        self.device = torch.device(arguments.device)
        names = contenders_on(self.device)
        self.all = [Contender(name, size, arguments, folder) for name in names]
        self.fallen: dict[str, str] = {}

    def each(self, act: Callable[[Contender], Answer]) -> dict[str, Answer]:
        """Return what every contender makes of an order; who falls is out."""
        found = {}
        for contender in list(self.all):
            try:
                found[contender.name] = act(contender)
            except FallenError as error:
                self.fallen[contender.name] = str(error)
                self.all.remove(contender)
                contender.close()
        return found

    def keep_compared(self) -> None:
        """Close those whose pictures are not compared: on a GPU the next ones need their memory."""
        kept = COMPARED_ON_A_GPU if self.device.type == "cuda" else ALL
        for contender in self.all:
            if contender.name not in kept:
                contender.close()
        self.all = [contender for contender in self.all if contender.name in kept]

    def close(self) -> None:
        for contender in self.all:
            contender.close()


def compare(
    contenders: Contenders, rounds: int, after_timing: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Let all contenders draw in turn; yield what is measured so far, the timings first; close them."""
    try:
        machines = contenders.each(Contender.wait_until_built)
        facts = {"size": contenders.size, "machine": next(iter(machines.values()), None)}
        first = contenders.each(lambda contender: contender.draw(0))
        cold = {name: round(answer["seconds"], 3) for name, answer in first.items()}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in first}
        for turn in range(rounds):
            answers = contenders.each(lambda contender, seed=1 + turn: contender.draw(seed))
            runs = {name: [*runs[name], answer] for name, answer in answers.items()}
            timed = {**facts, "cold_seconds": cold, **timings(runs), "agree": None}
            yield {**timed, "fallen": contenders.fallen}
        contenders.keep_compared()
        after_timing()
        pictures = contenders.each(Contender.draw_likeliest)
    finally:
        contenders.close()
    yield {**timed, **agreement(pictures), "fallen": contenders.fallen}


def timings(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians, peaks and ratios of the rounds so far."""
    peaks = {name: max(run["peak"] for run in some) for name, some in runs.items()}
    return {
        "warm_seconds": {name: middle([run["seconds"] for run in some]) for name, some in runs.items()},
        "all_seconds": {name: [round(run["seconds"], 3) for run in some] for name, some in runs.items()},
        "peak_gib": {name: round(peak / GIB, 2) for name, peak in peaks.items()},
        "ratios": ratios(runs, peaks),
    }


def agreement(pictures: dict[str, Tensor]) -> dict[str, Any]:
    """Return how far the pictures of the likeliest tokens are from the official ones."""
    if "official" not in pictures:
        return {}
    distances = {
        name: (picture - pictures["official"]).abs().amax(dim=1)
        for name, picture in pictures.items()
        if name != "official"
    }
    return {
        "greedy_picture_difference": {name: round(float(d.max()), 6) for name, d in distances.items()},
        "greedy_equal_pixels": {
            name: round(float((d <= TOLERANCE).float().mean()), 4) for name, d in distances.items()
        },
        "agree": "ours-float32" in distances and bool(distances["ours-float32"].max() <= TOLERANCE),
    }


def ratios(runs: dict[str, list[dict[str, Any]]], peaks: dict[str, int]) -> dict[str, float]:
    """Return how many times as fast, and how much of the memory: medians of the rounds' own ratios."""

    def faster(ours: str, theirs: str) -> float:
        return middle(
            [b["seconds"] / a["seconds"] for a, b in zip(runs[ours], runs[theirs], strict=True)], digits=2
        )

    found = {}
    for ours in (name for name in runs if name.startswith("ours")):
        for theirs in (name for name in runs if name.startswith("official")):
            found[f"{ours} is faster than {theirs} by"] = faster(ours, theirs)
    for ours in ("ours-bfloat16", "ours-bfloat16" + PACKED, "ours-float32"):
        if ours in peaks and "official" in peaks:
            found[f"{ours} peak of official's"] = round(peaks[ours] / peaks["official"], 2)
    return found


def lines(result: dict[str, Any]) -> Iterator[str]:
    rows = [["", "cold s", "warm s", "peak GiB", "greedy picture differs by"]]
    for name in result["warm_seconds"]:
        difference = result.get("greedy_picture_difference", {}).get(name)
        rows.append(
            [
                name,
                f"{result['cold_seconds'][name]:.2f}",
                f"{result['warm_seconds'][name]:.2f}",
                f"{result['peak_gib'][name]:.2f}",
                "" if difference is None else f"{difference:.1e}",
            ]
        )
    yield f"{result['size']}, batch 1, seeds 1.., {result['machine']}"
    yield from table(rows)
    for name, ratio in result["ratios"].items():
        yield f"{name} {ratio}"
    for name, words in result.get("fallen", {}).items():
        yield f"{name} fell: {words}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worker", choices=ALL, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "STAR_REFERENCE" not in os.environ:
        parser.error("STAR_REFERENCE must name a checkout of Davinci-XLab/STAR-T2I")
    if arguments.worker:
        serve(arguments)
        return 0
    return referee(arguments)


def referee(arguments: argparse.Namespace) -> int:
    """Compare size after size; return 0 where all float32 pictures agree."""
    device = torch.device(arguments.device)
    reasons = {size: too_large(config_of(size), device) for size in arguments.sizes}
    left_out = {size: reason for size, reason in reasons.items() if reason}
    for size, reason in left_out.items():
        print(f"{size}: left out, it needs {reason}", file=sys.stderr)
    if AUTOCAST not in contenders_on(device):
        print(f"{AUTOCAST}: left out, this processor multiplies no bfloat16", file=sys.stderr)
    sizes = [size for size in arguments.sizes if size not in left_out]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        built: dict[str, Contenders] = {}

        def start(size: str) -> Contenders:
            if size not in built:
                built[size] = Contenders(size, arguments, Path(folder))
                opened.callback(built[size].close)
            return built[size]

        for size, following in zip(sizes, [*sizes[1:], None], strict=True):

            def build_ahead(following: str | None = following) -> None:
                if following is not None and device.type == "cuda":
                    start(following)

            for result in compare(start(size), arguments.rounds, build_ahead):
                so_far = [*results, result]
                report({"benchmark": "against_official", "results": so_far, "left_out": left_out})
            print("\n".join(lines(result)), file=sys.stderr)
            results.append(result)
    report({"benchmark": "against_official", "results": results, "left_out": left_out})
    return 0 if all(result["agree"] and not result["fallen"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
