"""STAR: scale-wise text-conditioned autoregressive image generation (arXiv 2406.10797).

    star = load()                                   # the shipped model
    pictures = star.draw(["a red apple"], options=Options(seed=1))

Dimension key of the docstrings: B pictures, R rows (B, or 2 B with unconditional twins), S scales, h and w the
sides of a token map, n = h w its tokens, L tokens of all scales, C width, D codebook width, V codebook size,
T text positions. Words: scale, token map, f_hat, codebook, start token, guidance, causal sampler (README).

Names are imported on first use: `import star_core` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import StarConfig as StarConfig
    from .presets import SCHEDULES as SCHEDULES
    from .presets import read_schedule as read_schedule
    from .request import KeptTokens as KeptTokens
    from .request import Options as Options
    from .request import Request as Request
    from .request import ScaleStep as ScaleStep
    from .schedule import ScalePolicy as ScalePolicy
    from .schedule import ScaleSchedule as ScaleSchedule
    from .star import Star as Star
    from .star import load as load
    from .text_encoder import TextStates as TextStates

_HOMES = {
    "KeptTokens": "request",
    "Options": "star",
    "Request": "request",
    "SCHEDULES": "presets",
    "ScalePolicy": "schedule",
    "ScaleSchedule": "schedule",
    "ScaleStep": "request",
    "Star": "star",
    "StarConfig": "config",
    "TextStates": "text_encoder",
    "load": "star",
    "read_schedule": "presets",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"star_core has no {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
