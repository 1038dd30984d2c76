from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsss_pipeline.cache.manifest import fingerprint
from wsss_pipeline.errors import CacheError

SETTINGS = {"classes": ["cat", "dög"], "cam": {"threshold": 0.4, "layers": 8}, "tokenizer": None, "on": True}


def test_the_same_settings_give_the_same_fingerprint_for_ever() -> None:
    text = '{"cam":{"layers":8,"threshold":0.4},"classes":["cat","d\\u00f6g"],"on":true,"tokenizer":null}'
    expected = "2b72ed16080a495653adeb63502e0e376e97dff006be4a4946330c0fa211b7b7"
    assert fingerprint(SETTINGS) == hashlib.sha256(text.encode()).hexdigest() == expected


def test_order_of_keys_and_kind_of_sequence_say_nothing() -> None:
    other = {key: SETTINGS[key] for key in reversed(SETTINGS)} | {"classes": ("cat", "dög")}
    assert fingerprint(other) == fingerprint(SETTINGS)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["dög", "cat"]},
        {"cam": {"threshold": np.nextafter(0.4, 1).item(), "layers": 8}},
        {"on": 1},
        {"tokenizer": ""},
        {"more": None},
    ],
)
def test_any_change_gives_another_fingerprint(change: dict[str, Any]) -> None:
    assert fingerprint(SETTINGS | change) != fingerprint(SETTINGS)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), Path("a"), {1, 2}, b"a", np.float64(0.4), np.int64(1), {1: "a"}, object],
)
def test_what_has_no_canonical_form_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(CacheError, match=r"determinants\.cam\[1\]"):
        fingerprint({"cam": [0, value]})
