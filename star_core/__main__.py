"""python -m star_core: sample, inspect, convert, parity, train, evaluate. Printing lives here only.

Heavy imports stand inside the commands, so that help, inspect and errors do not wait for them.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

EXIT_USER = 2
EXIT_PARITY = 1

TRAIN_STAGES = {
    "data": ("emoji", "download and render the emoji pictures"),
    "text": ("text", "distil the CLIP text encoder"),
    "tokenizer": ("tokenizer", "train the VQ-VAE"),
    "decoder": ("decoder", "train the VQ-VAE's decoder on, tokens unchanged"),
    "transformer": ("transformer", "train the scale-wise transformer"),
    "sampler": ("causal_sampler", "train the causal sampler on the frozen transformer"),
    "model": ("assemble", "put a model's folder together from what the stages wrote"),
    "all": ("all_stages", "tokenizer, transformer, sampler, decoder and model in a given time"),
}


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER, f"{self.prog}: {message} (see --help)\n")


def build_parser(stage: str | None, evaluating: bool) -> Parser:
    """Return the command line's parser; options of a training stage are read only when it is asked for."""
    parser = Parser(prog="python -m star_core", description="STAR: text to picture, scale by scale")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    _add_sample(commands.add_parser("sample", help="draw pictures from prompts"))
    inspect = commands.add_parser("inspect", help="say what a checkpoint is")
    inspect.add_argument("file", type=Path, nargs="?", help="file or folder (default: shipped model)")
    _add_convert(commands.add_parser("convert", help="turn an official .pth into safetensors"))
    parity = commands.add_parser("parity", help="recompute a golden file of the official code")
    parity.add_argument("file", type=Path)
    train = commands.add_parser("train", help="train the shipped model again")
    stages = train.add_subparsers(dest="stage", required=True, parser_class=Parser)
    for name, (module, text) in TRAIN_STAGES.items():
        stage_parser = stages.add_parser(name, help=text, description=text)
        if name == stage:
            imported = importlib.import_module(f".training.{module}", __package__)
            imported.add_arguments(stage_parser)
    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on held-out pictures")
    if evaluating:
        importlib.import_module(".evaluation.run", __package__).add_arguments(evaluate)
    return parser


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", help="one or several prompts")
    parser.add_argument("--prompts-file", type=Path, help="a text file, one prompt per line")
    parser.add_argument("--recipe", type=Path, help="a PNG of `sample`: draw it again")
    parser.add_argument("--negative", default="", help="text that guidance leads away from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--schedule", help="preset name, schedule text, or a file with one")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: the trained size)")
    parser.add_argument("--out", type=Path, help="picture to write (one picture only)")
    parser.add_argument("--folder", type=Path, help="folder for pictures (default: the current one)")
    parser.add_argument(
        "--strip", action="store_true", help="also save the picture after each scale, as one image"
    )
    parser.add_argument("--checkpoint", type=Path, help="folder or file (default: shipped model)")
    parser.add_argument("--vqvae", type=Path)
    parser.add_argument("--text-encoder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--preset", help="which released model a bare state dict is")
    parser.add_argument("--device", default="", help="cpu, cuda, mps (default: the fastest there is)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    eight_bit = parser.add_mutually_exclusive_group()
    eight_bit.add_argument(
        "--int8",
        dest="eight_bit",
        action="store_const",
        const="int8",
        help="fast mode: 8-bit weights, half the memory (another picture); on a GPU not faster",
    )
    eight_bit.add_argument(
        "--fp8",
        dest="eight_bit",
        action="store_const",
        const="fp8",
        help="fast mode: the same in 8-bit floats, for GPUs that multiply them (Ada, Hopper and later)",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="repeat scales as CUDA graphs: for many pictures on a GPU"
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="lay bfloat16 weights out for a CPU's products: for many pictures on a CPU",
    )
    parser.add_argument(
        "--low-memory", action="store_true", help="decode in strips: the same picture, less memory, slower"
    )
    parser.add_argument(
        "--gpu-memory",
        type=_gigabytes,
        metavar="GB",
        help="on a GPU: aim at so much for torch's tensors; weights without room are copied when needed (same"
        " picture, slower)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _gigabytes(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory: give gigabytes, as in 6 or 5.5")
    return number


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="official .pth")
    parser.add_argument("--out", type=Path, required=True, help="folder for the safetensors files")
    parser.add_argument("--preset", help="which released model it is, where the file does not say")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "keep"), default="float16")
    parser.add_argument("--rope-theta", type=float, help="override the preset's rotary base")
    parser.add_argument("--rope-extent", type=float, help="override the preset's rotary extent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code (0 good, 1 parity failed, 2 user mistake, 130 interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        stage = given[1] if given[:1] == ["train"] and len(given) > 1 else None
        args = build_parser(stage, given[:1] == ["evaluate"]).parse_args(given)
        return _run(args)
    except ValueError as error:
        print(f"star_core: {error}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("star_core: interrupted", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.command == "sample":
        return _sample(args)
    if args.command == "inspect":
        return _inspect(args.file)
    if args.command == "convert":
        return _convert(args)
    if args.command == "parity":
        return _parity(args.file)
    logging.getLogger().setLevel(logging.INFO)
    name = TRAIN_STAGES[args.stage][0] if args.command == "train" else None
    module = f".training.{name}" if name else ".evaluation.run"
    if report := importlib.import_module(module, __package__).run(args):
        print(report)
    return 0


def _sample(args: argparse.Namespace) -> int:
    from .sample import plan_sample, run_sample

    for path in run_sample(plan_sample(args)):
        print(path)
    return 0


def _inspect(path: Path | None) -> int:
    from .inspection import describe

    print("\n".join(describe(path)))
    return 0


def _convert(args: argparse.Namespace) -> int:
    import torch

    from .convert import convert

    overrides = {
        name: value
        for name, value in (("rope_theta", args.rope_theta), ("rope_extent", args.rope_extent))
        if value is not None
    }
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    for written in convert(args.file, args.out, preset_name=args.preset, overrides=overrides, dtype=dtype):
        print(f"{written.path}: {written.what}, {written.tensors} tensors")
    return 0


def _parity(path: Path) -> int:
    from .parity import parity_rows

    print(f"{'quantity':26} {'from':8} {'difference':>11} {'tolerance':>10}  verdict")
    failed = 0
    for row in parity_rows(path):
        verdict = "holds" if row.holds else "FALLS SHORT"
        failed += not row.holds
        print(
            f"{row.name:26} {row.source:8} {row.difference:11.3g} {row.tolerance:10.3g}  {verdict}",
            flush=True,
        )
    print(f"{failed} quantities fall short" if failed else "all quantities hold")
    return EXIT_PARITY if failed else 0


if __name__ == "__main__":
    sys.exit(main())
