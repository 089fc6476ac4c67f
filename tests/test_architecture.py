"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "star_core"
NODES = sorted((ROOT / "nodes").glob("*.py"))
FILES = sorted(CORE.rglob("*.py"))
ENGINE = sorted(CORE.glob("*.py"))

ALLOWED = {
    "config": set(),
    "schedule": {"config"},
    "schedule_text": {"config", "schedule"},
    "presets": {"config", "schedule", "schedule_text"},
    "schedule_parts": {"config", "presets", "schedule", "schedule_text"},
    "memory": {"config"},
    "tiles": {"config", "vqvae"},
    "prompts": {"request", "text_encoder"},
    "inpainting": {"config", "quantizer", "request"},
    "resume": {"request", "schedule"},
    "pruning": {"config"},
    "slices": set(),
    "transfer": set(),
    "rope": {"config", "transfer"},
    "kernels/__init__": set(),
    "kernels/attention": {"attention", "rope"},
    "kernels/products": set(),
    "kernels/cpu": {"attention", "packed", "rope", "transformer", "upcast"},
    "kernels/residual": {"transformer"},
    "kernels/sampling": {"sampling"},
    "kernels/channels": set(),
    "kernels/norms": {"kernels.channels"},
    "kernels/convolutions": {"kernels.channels"},
    "kernels/wide": set(),
    "kernels/rounding": {"fp8"},
    "fp8": {"kernels", "upcast"},
    "int8": set(),
    "packed": set(),
    "upcast": set(),
    "eight_bit": {"fp8", "int8"},
    "sampling": {"kernels", "transfer"},
    "attention": {"kernels", "rope"},
    "quantizer": {"config"},
    "vqvae": {"config", "kernels", "memory", "quantizer", "slices"},
    "transformer": {"attention", "config", "kernels", "rope", "transfer"},
    "causal_sampler": {"config", "rope", "sampling", "schedule", "transfer", "transformer"},
    "key_tables": set(),
    "stored": {"config"},
    "weights": {"config", "key_tables", "packed", "stored", "upcast", "vqvae"},
    "text_files": {"key_tables", "model_files", "weights"},
    "text_encoder": {"graphs", "text_files", "transfer", "upcast", "weights"},
    "model_files": set(),
    "pictures": set(),
    "graphs": set(),
    "request": {"config", "sampling", "schedule", "text_encoder"},
    "canvas": {"attention", "config", "pruning", "request", "rope", "sampling", "schedule", "transformer"},
    "generate": {
        "canvas",
        "causal_sampler",
        "config",
        "graphs",
        "pruning",
        "quantizer",
        "request",
        "sampling",
        "schedule",
        "transfer",
        "transformer",
    },
}
"""What the lower rooms may import of ours. Those above them (loading, the face, commands) may import any."""

NO_TORCH = (
    *("config", "schedule", "schedule_text", "schedule_parts", "presets", "memory", "key_tables"),
    *("model_files", "stored", "inspection", "__init__", "__main__"),
)
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "execution"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def statements(node: ast.AST, *, at_import: bool = False) -> Iterator[ast.AST]:
    """Yield nodes below; with `at_import` only those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if at_import and (deferred or typing_only):
            continue
        yield child
        yield from statements(child, at_import=at_import)


def foreign(path: Path, *, at_import: bool = False) -> set[str]:
    """Return the top-level names of absolute imports."""
    names = set()
    for node in statements(tree(path), at_import=at_import):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def own(path: Path) -> set[str]:
    """Return the modules of star_core that a file imports, as dotted names inside star_core."""
    package = path.relative_to(CORE).parts[:-1]
    names = set()
    for node in statements(tree(path)):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        above = len(package) - (node.level - 1)
        assert above >= 0, f"{path} imports from outside star_core"
        base = list(package[:above])
        if node.module:
            names.add(".".join([*base, node.module]))
        else:
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def sentence(path: Path) -> str:
    return str(path.relative_to(CORE))


@pytest.mark.parametrize("name", ALLOWED)
def test_a_lower_room_imports_only_what_the_design_allows(name: str):
    assert own(CORE / f"{name}.py") <= ALLOWED[name]


@pytest.mark.parametrize("path", ENGINE, ids=sentence)
def test_the_engine_imports_neither_training_nor_evaluation(path: Path):
    if path.stem == "__main__":
        return
    rooms = {name.split(".")[0] for name in own(path)}
    assert not rooms & {"training", "evaluation", "__main__"}


@pytest.mark.parametrize("path", FILES, ids=sentence)
def test_imports_inside_star_core_are_relative_and_know_no_comfyui(path: Path):
    assert "star_core" not in foreign(path)
    assert not foreign(path) & HOST


@pytest.mark.parametrize("path", FILES, ids=sentence)
def test_transformers_is_imported_lazily(path: Path):
    assert "transformers" not in foreign(path, at_import=True)


@pytest.mark.parametrize("path", FILES, ids=sentence)
def test_only_the_kernels_behind_their_door_import_triton(path: Path):
    behind = path.parent.name == "kernels" and path.stem != "__init__"
    assert behind or "triton" not in foreign(path)


@pytest.mark.parametrize("name", NO_TORCH)
def test_plain_data_and_the_command_line_do_not_import_torch(name: str):
    assert "torch" not in foreign(CORE / f"{name}.py", at_import=True)


HEAVY = {"torch", "transformers", "safetensors", "PIL", "numpy", "einops"}


def node_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", NODES, ids=node_name)
def test_only_the_host_file_reaches_into_comfyui(path: Path):
    allowed = HOST if path.name == "host.py" else {"comfy_api"}
    assert foreign(path) & HOST <= allowed


@pytest.mark.parametrize("path", [ROOT / "__init__.py", *NODES], ids=node_name)
def test_the_pack_imports_relatively_and_lightly(path: Path):
    # ComfyUI loads the pack by path, under a name that may hold a hyphen; a slow or failing import of ours
    # would slow or fail its start.
    assert not foreign(path) & {"star_core", "nodes"}
    assert not foreign(path, at_import=True) & (HEAVY | HOST - {"comfy_api"})
    for node in statements(tree(path), at_import=True):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            pytest.fail(f"{path.name} imports the engine when it is imported: line {node.lineno}")


LAYOUT = {"torch.cat", "torch.device"}
"""What nodes may ask of torch: putting pictures together, naming a device."""


@pytest.mark.parametrize("path", NODES, ids=node_name)
def test_nodes_hold_no_tensor_maths(path: Path):
    used = {name for name in called(path) if name.startswith(("torch.", "np.", "F."))}
    assert used <= LAYOUT
    products = [n for n in statements(tree(path)) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult)]
    assert not products


def test_a_node_s_class_is_its_id_and_the_manager_finds_it():
    # ComfyUI-Manager reads sources: a class on io.ComfyNode with a literal node_id.
    found = {}
    for path in NODES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == [
                "io.ComfyNode"
            ]:
                ids = re.findall(r"io\.Schema\(\s*node_id='(\w+)'", ast.unparse(node))
                found[node.name] = ids
                execute = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "execute")
                assert len(execute.body) <= 16, f"{node.name}.execute is no thin form"
    assert len(found) == 10
    assert all(ids == [name] for name, ids in found.items())


def called(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in statements(tree(path)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", FILES, ids=sentence)
def test_only_the_command_line_prints_and_only_weights_opens_pickles(path: Path):
    calls = called(path)
    assert path.name == "__main__.py" or "print" not in calls
    assert path.name == "weights.py" or not calls & {"torch.load", "pickle.load", "pickle.loads"}


@pytest.mark.parametrize("path", FILES, ids=sentence)
def test_nothing_touches_the_state_of_the_process(path: Path):
    forbidden = {
        "torch.manual_seed",
        "torch.set_default_dtype",
        "torch.set_default_device",
        "torch.set_grad_enabled",
        "np.random.seed",
        "random.seed",
        "eval",
        "exec",
        "os.putenv",
    }
    assert not called(path) & forbidden
    for node in statements(tree(path)):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = node.targets if not isinstance(node, ast.AugAssign) else [node.target]
            assert not any(ast.unparse(t).startswith("os.environ") for t in targets)


def test_importing_the_engine_leaves_transformers_unloaded_and_the_random_state_alone():
    modules = ", ".join(
        f"star_core.{path.stem}" for path in ENGINE if path.stem not in ("__init__", "__main__")
    )
    program = (
        "import os, sys, random, torch\n"
        "def state(): return (dict(os.environ), random.getstate(), torch.get_rng_state().tolist(),"
        " torch.get_default_dtype(), torch.is_grad_enabled(), list(sys.path))\n"
        "before = state()\n"
        f"import {modules}\n"
        "assert state() == before, 'an import changed the process'\n"
        "assert 'transformers' not in sys.modules, 'transformers was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_importing_star_core_alone_does_not_load_torch():
    program = "import sys, star_core; assert 'torch' not in sys.modules; star_core.ScaleSchedule"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_of_the_front_door_can_be_had():
    import star_core

    assert all(getattr(star_core, name) is not None for name in star_core.__all__)
    with pytest.raises(AttributeError, match="no 'Sta'"):
        _ = star_core.Sta


def test_tests_that_share_something_run_in_one_process_and_others_by_their_files():
    from tests.conftest import group_of

    assert group_of("tests/nodes/test_a.py::test_x[1]") == group_of("tests/e2e/test_b.py::test_y") == "sharing"
    assert group_of("tests/core/test_a.py::test_x[e2e::y]") == "tests/core/test_a.py"
    assert group_of("tests/test_architecture.py::test_z") == "tests/test_architecture.py"
