"""The pack as the Comfy Registry gets it: metadata, requirements, what the archive holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def comfy_cli() -> str | None:
    """Return the comfy-cli beside COMFYUI_PYTHON, beside this interpreter, or on the PATH."""
    places = [Path(python).parent for python in (os.environ.get("COMFYUI_PYTHON"), sys.executable) if python]
    return shutil.which("comfy", path=os.pathsep.join(map(str, places))) or shutil.which("comfy")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone: packing writes into the folder it packs."""
    if comfy_cli() is None:
        pytest.skip("no comfy-cli: install it, or set COMFYUI_PYTHON to an environment that has it")
    folder = tmp_path_factory.mktemp("clone") / "pack"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("build", ".venv", "*_cache", ".hypothesis"))
    return folder


def comfy(folder: Path, *words: str) -> str:
    command = [str(comfy_cli()), "--skip-prompt", "--no-enable-telemetry", "node", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_validation_finds_nothing(clone: Path):
    said = comfy(clone, "validate").strip().splitlines()
    assert len(said) == 3, said
    assert "All validation checks passed" in said[2]


def test_the_archive_has_the_pack_and_its_help_but_no_tests(clone: Path):
    comfy(clone, "pack")
    with zipfile.ZipFile(clone / "node.zip") as archive:
        names = set(archive.namelist())
    assert not {name for name in names if name.split("/")[0] in ("tests", ".ci", "benchmarks", "build")}
    wanted = {"__init__.py", "nodes/sample.py", "star_core/star.py", "star_core/demo/star.safetensors"}
    wanted |= {"web/docs/StarSample.md", "web/js/schedule_editor.js", "locales/zh/nodeDefs.json", "README.md"}
    assert wanted <= names


def test_no_ignore_line_drops_the_help_pages():
    lines = (ROOT / ".comfyignore").read_text().split()
    assert not [line for line in lines if "md" in line or line.startswith("*")]


def test_requirements_are_lower_bounds_and_agree_with_the_metadata():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in lines)
    metadata = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)\]", metadata, re.DOTALL | re.MULTILINE)
    assert listed is not None
    assert re.findall(r'"(.*?)"', listed.group(1)) == lines
