"""The fingerprint of a mask set: SHA-256 of canonical JSON of all that determines the masks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from wsss_pipeline.errors import CacheError


def fingerprint(determinants: Mapping[str, Any]) -> str:
    """64 hexadecimal digits that stand for ``determinants``: equal on every machine and in every version.

    Canonical JSON: keys sorted, no white space, ASCII, floats as their shortest exact form. Allowed are None,
    bool, int, finite float, str, and lists, tuples and mappings with text keys of these. 1 and 1.0 differ:
    values come from a typed configuration, where each key has one type. Numpy scalars, paths, sets and the
    like are refused rather than turned into text, for their text form isn't promised to stay the same.

    Raises:
        CacheError: a value has no canonical form; the message names its key.
    """
    return hashlib.sha256(canonical_json(determinants).encode("ascii")).hexdigest()


def canonical_json(value: Any) -> str:
    """The only JSON text for ``value``.

    Raises:
        CacheError: a value has no canonical form.
    """
    _check(value, "determinants")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check(value: Any, where: str) -> None:
    # Exact types: a subclass may print itself as it likes.
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise CacheError(f"{where}: the key {key!r} isn't text; a fingerprint needs text keys")
            _check(item, f"{where}.{key}")
    elif kind in (list, tuple):
        for position, item in enumerate(value):
            _check(item, f"{where}[{position}]")
    elif kind is float:
        if not math.isfinite(value):
            raise CacheError(f"{where}: {value} has no canonical form; a fingerprint needs finite numbers")
    elif value is not None and kind not in (bool, int, str):
        raise CacheError(
            f"{where}: {kind.__name__} has no canonical form; make it a number, text, list or dict"
        )
