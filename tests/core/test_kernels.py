"""The door to the fused kernels: who is served by one, who by the reference, and what happens without Triton.

The kernels themselves are compared with their references in `*kernels_interpreted.py`, by Triton's interpreter,
which has to be chosen before Triton is imported: in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from star_core import kernels
from star_core.graphs import Tape
from star_core.kernels import fused, given_up, references_only
from star_core.sampling import draw

ROOT = Path(__file__).parents[2]


@fused("nothing.doubled")
def doubled(x: Tensor, *, by: str = "reference") -> str:
    return by


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Make CPU tensors a kernel's affair, and a given function the only kernel."""

    def install(function: Callable) -> None:
        monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
        monkeypatch.setattr(kernels, "_named", lambda name: function)
        monkeypatch.setattr(kernels, "_given_up", set())

    return install


def test_a_kernel_takes_a_call_on_its_devices_and_no_other(kernel: Callable, monkeypatch: pytest.MonkeyPatch):
    kernel(lambda x, **options: "kernel")
    assert doubled(torch.ones(2)) == "kernel"
    monkeypatch.setattr(kernels, "DEVICES", ("cuda",))
    assert doubled(torch.ones(2)) == "reference"


def test_a_cpu_has_kernels_of_its_own(kernel: Callable, monkeypatch: pytest.MonkeyPatch):
    kernel(lambda x: "kernel")
    monkeypatch.setattr(kernels, "DEVICES", ("cuda",))
    names = []
    monkeypatch.setattr(kernels, "_named", lambda name: lambda x: names.append(name) or "kernel")
    both = fused("nothing.doubled", on_cpu="nothing.doubled_there")(lambda x: "reference")
    with torch.no_grad():
        assert both(torch.ones(2)) == "kernel"
        assert both(torch.ones(2, device="meta")) == "reference"
        monkeypatch.setattr(kernels, "DEVICES", ("cuda", "cpu"))
        assert both(torch.ones(2)) == "kernel"
    assert names == ["nothing.doubled_there", "nothing.doubled"]


def test_what_only_a_cpu_fuses_a_gpu_leaves_to_the_reference(kernel: Callable):
    kernel(lambda x: "kernel")
    there = fused(on_cpu="nothing.doubled_there")(lambda x: "reference")
    with torch.no_grad():
        assert there(torch.ones(2)) == "kernel"
        assert there(torch.ones(2, device="meta")) == "reference"
    assert there(torch.ones(2)) == "reference", "it works in place: not where gradients are on"


def test_errors_of_a_cpu_s_kernel_are_the_caller_s(monkeypatch: pytest.MonkeyPatch):
    def broken(x: Tensor) -> str:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(kernels, "_named", lambda name: broken)
    there = fused(on_cpu="nothing.doubled_there")(lambda x: "reference")
    with torch.no_grad(), pytest.raises(RuntimeError, match="allocate"):
        there(torch.ones(2))
    assert "nothing.doubled_there" not in given_up()


def test_a_call_without_tensors_by_position_is_the_reference_s(kernel: Callable):
    kernel(lambda x: "kernel")
    assert fused("nothing.doubled")(lambda x: "reference")(x=torch.ones(2)) == "reference"


def test_kernels_can_be_switched_off_for_a_while(kernel: Callable):
    kernel(lambda x: "kernel")
    with references_only():
        with references_only():
            assert doubled(torch.ones(2)) == "reference"
        assert doubled(torch.ones(2)) == "reference"
    assert doubled(torch.ones(2)) == "kernel"


def test_gradients_are_the_reference_s_affair(kernel: Callable):
    kernel(lambda x: "kernel")
    x = torch.ones(2, requires_grad=True)
    assert doubled(x) == "reference"
    with torch.no_grad():
        assert doubled(x) == "kernel"


def test_a_layer_that_learns_is_the_reference_s_affair(kernel: Callable):
    kernel(lambda x, layer: "kernel")

    @fused("nothing.applied")
    def applied(x: Tensor, layer: nn.Module) -> str:
        return "reference"

    layer = nn.Linear(2, 2)
    assert applied(torch.ones(2), layer) == "reference"
    assert applied(torch.ones(2), layer.requires_grad_(False)) == "kernel"


def test_a_tape_sees_every_operation(kernel: Callable):
    kernel(lambda x: "kernel")
    with Tape():
        assert doubled(torch.ones(2)) == "reference"


def test_what_a_kernel_does_not_take_the_reference_does(kernel: Callable):
    kernel(lambda x: None)
    assert doubled(torch.ones(2)) == "reference"
    assert not given_up()


def test_a_kernel_that_cannot_be_built_is_given_up_with_one_warning(
    kernel: Callable, caplog: pytest.LogCaptureFixture
):
    calls = []

    def broken(x: Tensor) -> str:
        calls.append(x)
        raise RuntimeError("no C compiler")

    kernel(broken)
    assert [doubled(torch.ones(2)) for _ in range(3)] == ["reference"] * 3
    assert len(calls) == 1
    assert given_up() == ("nothing.doubled",)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "no C compiler" in warned[0]


@pytest.mark.parametrize("said", ["Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when"])
def test_a_lack_of_memory_that_has_no_class_is_the_reference_s_this_once(kernel: Callable, said: str):
    def hungry(x: Tensor) -> str:
        raise RuntimeError(said)

    kernel(hungry)
    assert doubled(torch.ones(2)) == "reference"
    assert not given_up()


def test_triton_that_finds_no_driver_is_no_reason_to_fail(kernel: Callable):
    def lost(x: Tensor) -> str:
        raise AssertionError("libcuda.so cannot found!")  # Triton's own words, and its own way to say them

    kernel(lost)
    assert doubled(torch.ones(2)) == "reference"
    assert given_up() == ("nothing.doubled",)


def test_a_lack_of_memory_is_no_reason_to_give_a_kernel_up(kernel: Callable):
    def hungry(x: Tensor) -> str:
        raise torch.cuda.OutOfMemoryError("no room")

    kernel(hungry)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        doubled(torch.ones(2))
    assert not given_up()


def test_without_triton_the_references_serve_and_nobody_is_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernels, "_given_up", set())
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "star_core.kernels.sampling", raising=False)
    kernels._named.cache_clear()
    drawn = draw(torch.tensor([[[0.0, 9.0]]]), torch.tensor([[0.5]]), top_k=1, top_p=0.0)
    assert drawn.tokens.tolist() == [[1]]
    assert given_up() == ("sampling.draw",)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def need_triton(least: str, why: str) -> ModuleType:
    """Return Triton; skip the test where there is none, or an older one."""
    triton = pytest.importorskip("triton", reason=f"no Triton {least} or newer here, {why}")
    if Version(triton.__version__) < Version(least):
        pytest.skip(f"Triton {triton.__version__}, not {least} or newer, {why}")
    return triton


INTERPRETED = ("tests/core/kernels_interpreted.py", "tests/core/vqvae_kernels_interpreted.py")


def test_the_kernels_compute_what_their_references_do(tmp_path: Path):
    need_triton("3.2", "whose interpreter knows annotations as texts: the kernels are not compared")
    variables = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *INTERPRETED],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "skipped" not in done.stdout


HEADS = dict.fromkeys(("qkv", "q_bias", "v_bias", "q_out", "k_out", "v_out", "q"), "*bf16")
SUMS = dict.fromkeys(("x", "addend", "total", "normed"), "*bf16")
TYPES = {
    **HEADS,
    **SUMS,
    **dict.fromkeys(("log_scale", "cos", "sin"), "*fp32"),
    **dict.fromkeys(("logits", "uniform", "confidence", "conditional", "unconditional", "guided"), "*fp32"),
    **dict.fromkeys(("sharpness", "dropped", "towards", "away", "eps", "scale"), "fp32"),
    **dict.fromkeys(("x", "out", "weight", "bias", "before", "weights", "taps"), "*bf16"),
    **dict.fromkeys(("moments", "affine", "scores"), "*fp32"),
    "drawn": "*i64",
}
"""What the kernels' arguments are where they are no int32."""
OWN_TYPES = {"rounding._round_rows": {"rows": "*bf16", "rounded": "*fp8e4nv", "scale": "*fp32"}}
BUILDS = {
    "attention._self_heads": {"head_width": 64, "block": 32, "together": 3, "turns_by_row": True},
    "attention._cross_queries": {"head_width": 64, "block": 32},
    "residual._add_then_norm": {"padded": 2048},
    "sampling._draw": {"block": 4096, "by_count": True, "by_mass": True},
    "sampling._guide": {"block": 2048},
    "norms._moments": {"width": 640, "chunk": 128, "block": 32},
    "norms._put_together": {
        "channels": 160,
        "each": 5,
        "fold": 4,
        "lanes": 32,
        "own": 8,
        "block": 64,
        "biased": True,
    },
    "norms._applied": {"width": 640, "channels": 160, "chunk": 128, "block": 32, "activate": True},
    "convolutions._sums": {"width": 640, "channels": 160, "chunk": 128, "block": 32, "onto": True},
    "convolutions._few_channels": {
        **{"channels": 160, "outputs": 3, "columns": 16, "pixels": 128, "depth": 32},
    },
    "wide._softmax": {"block": 4096},
    "rounding._round_rows": {"block": 8192},
}
WHOLE_PICTURES = ("norms._moments", "norms._applied", "convolutions._sums")
"""Kernels whose speed is that of memory: every number of a picture comes in a piece of 16 bytes."""


@pytest.mark.parametrize("name", BUILDS)
def test_the_kernels_compile_for_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # The interpreter runs what no compiler would take; to compile for a GPU, none has to be there.
    triton = need_triton("3.3", "which says in this way what it compiles for: the kernels are not compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = kernels._named(name)
    options = BUILDS[name]
    known = {**TYPES, **OWN_TYPES.get(name, {})}
    types = {
        argument: "constexpr" if argument in options else known.get(argument, "i32")
        for argument in kernel.arg_names
    }
    places = {(kernel.arg_names.index(argument),): value for argument, value in options.items()}
    # PyTorch's allocator begins tensors at multiples of 16, which Triton notices.
    begins = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if types[argument].startswith("*")
    }
    built = triton.compile(
        ASTSource(fn=kernel, signature=types, constexprs=places, attrs=begins),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8, "enable_fp_fusion": False},
    )
    assert "st.global" in built.asm["ptx"]
    if name in WHOLE_PICTURES:
        loads = set(re.findall(r"ld\.global\S*", built.asm["ptx"]))
        assert loads == {"ld.global.v4.b32"}
