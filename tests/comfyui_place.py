"""Where ComfyUI is, for every test that needs the real one.

By COMFYUI_PATH, else in comfy-cli's default workspace; its interpreter by COMFYUI_PYTHON, else in a virtual
environment inside the workspace, else it is the one that runs the tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

MISSING = "no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON) to a checkout, or `comfy install`"


def find_comfyui() -> Path | None:
    """Return ComfyUI's folder, None where there is none. A COMFYUI_PATH that leads nowhere ends the run."""
    named = os.environ.get("COMFYUI_PATH")
    place = Path(named).expanduser() if named else Path.home() / "comfy" / "ComfyUI"
    if named and not (place / "execution.py").is_file():
        raise pytest.UsageError(f"COMFYUI_PATH is {named}, where no ComfyUI is")
    return place if (place / "execution.py").is_file() else None


def find_python(comfyui: Path) -> str:
    """Return the interpreter that has ComfyUI's requirements."""
    if named := os.environ.get("COMFYUI_PYTHON"):
        return named
    inside = [comfyui / e / b for e in (".venv", "venv") for b in ("bin/python", "Scripts/python.exe")]
    return next((str(path) for path in inside if path.is_file()), sys.executable)
