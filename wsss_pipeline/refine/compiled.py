"""Functions as machine code that runs without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles at the first call, and keeps the machine code on disk where some folder can be written."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no folder: neither the package's, nor the user's
        return njit(nogil=True)(function)
