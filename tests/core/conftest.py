"""What the files share that Triton's interpreter runs, in a process of their own (`test_kernels.py`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
FOR_GOOD = SimpleNamespace(restore=lambda: None)


@pytest.fixture(scope="session", autouse=INTERPRETING)
def _language_interpreted_for_good() -> None:
    """Exchange Triton's language once. The interpreter looks all of it through for every call of a helper,
    which takes it as long as the kernels do."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return  # who needs it says so
    exchange = getattr(interpreter, "_patch_lang", None)
    if exchange is None:
        return  # another Triton, which may take its time
    exchanged = set()

    def once(function: Callable) -> SimpleNamespace:
        if function.__module__ not in exchanged:  # what is exchanged is what the module knows the language by
            exchange(function)
            exchanged.add(function.__module__)
        return FOR_GOOD

    interpreter._patch_lang = once
