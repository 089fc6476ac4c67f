"""python -m star_core: sample, inspect, convert, parity, train, evaluate. Printing lives here only.

Heavy imports stand inside the commands, so that help, inspect and errors do not wait for them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .memory import is_out_of_memory

EXIT_USER = 2
EXIT_PARITY = 1
MEMORY_REMEDY = (
    ": draw fewer pictures together (--batch), decode in strips (--low-memory), or keep most weights in the"
    " host's memory (--gpu-memory)"
)

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
    parser.add_argument("--recipe", type=Path, help="a PNG of `sample`: draw it again, by all that it says")
    parser.add_argument(
        "--negative",
        help="text that guidance leads away from (by the released models, with paired cross-attention, through"
        " the start token and the causal sampler alone)",
    )
    parser.add_argument("--seed", type=int, help="decides a picture, with its prompt and index (default: 0)")
    parser.add_argument("--count", type=int, help="pictures per prompt (default: 1)")
    parser.add_argument(
        "--batch",
        type=int,
        help="pictures drawn together (default: 16, or as many as free memory holds; it is"
        " taken to be 4 GB where the system does not say); float32 pictures do not"
        " depend on it",
    )
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
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format (default: float32); in the other two a picture's last bits, and so a token now and"
        " then, depend on how many are drawn with it (--batch); on a CPU without products for them they save"
        " memory, not time",
    )
    eight_bit = parser.add_mutually_exclusive_group()
    eight_bit.add_argument(
        "--int8",
        dest="eight_bit",
        action="store_const",
        const="int8",
        help="fast mode: 8-bit weights, half the memory (another picture, which depends on --batch as in"
        " bfloat16); faster only on CPUs with AVX-512 VNNI and no AMX",
    )
    eight_bit.add_argument(
        "--fp8",
        dest="eight_bit",
        action="store_const",
        const="fp8",
        help="fast mode: the same in 8-bit floats, for GPUs that multiply them (Ada, Hopper and later)",
    )
    parser.add_argument(
        "--graphs",
        action="store_true",
        default=None,
        help="repeat scales as CUDA graphs: for many pictures on a GPU",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        default=None,
        help="lay bfloat16 weights out for a CPU's products: for many pictures on a CPU",
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="the same picture in less memory, slower: it is decoded in strips, and on a CPU, in float32,"
        " weights stay in the half precision that their files have them in",
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
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number * 1e9 < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: give gigabytes, as in 6 or 5.5")
    return number


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="official .pth")
    parser.add_argument("--out", type=Path, required=True, help="folder for the safetensors files")
    parser.add_argument("--preset", help="which released model it is, where the file does not say")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "keep"), default="float16")
    parser.add_argument("--rope-theta", type=float, help="override the preset's rotary base")
    parser.add_argument("--rope-extent", type=float, help="override the preset's rotary extent")


class NobodyReadsError(Exception):
    """Standard output's reader has gone, as `head` does."""


def _say(line: str) -> None:
    try:
        print(_writable(line), flush=True)
    except BrokenPipeError:
        _give_up_output()
        raise NobodyReadsError from None
    except OSError as error:
        _give_up_output()
        raise OSError(error.errno, error.strerror, "standard output") from None


def _writable(line: str) -> str:
    """Return a line with the letters escaped that standard output's encoding lacks, as Windows' often does."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    # Another way with errors is the user's or the system's: in containers names are written as they are.
    errors = getattr(sys.stdout, "errors", None) or "strict"
    return line.encode(encoding, "backslashreplace").decode(encoding) if errors == "strict" else line


def _give_up_output() -> None:
    """What is not written yet would fail once more at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    0 is good, 1 a failed parity, 2 a user's mistake, 130 an interrupt, 141 output that nobody reads any more.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        stage = given[1] if given[:1] == ["train"] and len(given) > 1 else None
        args = build_parser(stage, given[:1] == ["evaluate"]).parse_args(given)
        return _run(args)
    except NobodyReadsError:
        return 141
    except ValueError as error:
        print(f"star_core: {error}", file=sys.stderr)
        return EXIT_USER
    except OSError as error:
        if error.filename is None:
            raise
        print(f"star_core: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return EXIT_USER
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first, _, _ = str(error).partition("\n")
        remedy = MEMORY_REMEDY if given[:1] == ["sample"] else ""
        print(f"star_core: out of memory ({first:.160}){remedy}", file=sys.stderr)
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
        _say(report)
    return 0


def _sample(args: argparse.Namespace) -> int:
    from .sample import run_sample
    from .sample_plan import plan_sample

    for path in run_sample(plan_sample(args)):
        _say(str(path))
    return 0


def _inspect(path: Path | None) -> int:
    from .inspection import describe

    _say("\n".join(describe(path)))
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
        _say(f"{written.path}: {written.what}, {written.tensors} tensors")
    return 0


def _parity(path: Path) -> int:
    from .parity import parity_rows

    rows = parity_rows(path)
    _say(f"{'quantity':26} {'from':8} {'difference':>11} {'tolerance':>10}  verdict")
    failed = 0
    for row in rows:
        verdict = "holds" if row.holds else "FALLS SHORT"
        failed += not row.holds
        _say(f"{row.name:26} {row.source:8} {row.difference:11.3g} {row.tolerance:10.3g}  {verdict}")
    _say(f"{failed} quantities fall short" if failed else "all quantities hold")
    return EXIT_PARITY if failed else 0


def _collect_seldom() -> None:
    """Look for garbage after 100,000 new objects instead of a few hundred: what torch and transformers import,
    a million of them, stays, and to look through it again and again takes a second."""
    gc.set_threshold(100_000, 50, 100)


def _leave(code: int) -> NoReturn:
    """End the process as it is, all that was said written out: taking apart what torch and transformers made of
    it takes Python a second. For commands that have closed their files and started no processes; not under a
    debugger or a profiler, which have their own last words."""
    if sys.flags.interactive or sys.gettrace() or sys.getprofile() or _is_monitored():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where a shell closed it
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


def _is_monitored() -> bool:
    monitoring = getattr(sys, "monitoring", None)  # of Python 3.12 and newer, with room for six tools
    return monitoring is not None and any(monitoring.get_tool(number) for number in range(6))


if __name__ == "__main__":
    if sys.argv[1:2] in (["train"], ["evaluate"]):
        sys.exit(main())
    _collect_seldom()
    _leave(main())
