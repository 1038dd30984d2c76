"""What is read is what was written, for any id, size and labels; equal settings, and only those, have one key."""

from __future__ import annotations

import copy
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.properties.test_labels import is_safe
from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, PseudoMask, open_mask_set, verify
from wsss_pipeline.cache.manifest import fingerprint
from wsss_pipeline.cache.records import escape_id

# HDF5 stores names and attributes in 64 KiB headers; ids of up to 1000 characters fit
ids = st.text(min_size=1, max_size=60).filter(is_safe)
CLASSES = (*(f"class-{value}" for value in range(1, 252)), "mon chat", "\N{CAT FACE}", "<b>&amp;'\"")
class_names = st.lists(st.sampled_from(CLASSES), unique=True, max_size=4)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def pseudo_masks(draw: st.DrawFn) -> PseudoMask:
    size = draw(sizes)
    labels = tuple(draw(class_names))
    cams = None
    if draw(st.booleans()):
        values = st.floats(0, 1, width=16)
        cams = draw(arrays.arrays(np.float16, (len(labels), *size), elements=values, fill=values))
    return PseudoMask(
        draw(arrays.arrays(np.uint8, size, elements=st.integers(0, 254))),
        draw(arrays.arrays(np.uint8, size, elements=st.integers(0, 200))),
        labels,
        cams,
    )


@given(st.dictionaries(ids, pseudo_masks(), min_size=1, max_size=5), st.integers(1, 3))
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, PseudoMask], images_per_shard: int
) -> None:
    folder = open_mask_set(
        tmp_path_factory.mktemp("cache"), MaskSet(name="x", determinants={"a": 1}, class_names=CLASSES)
    )
    with MaskWriter(folder, images_per_shard=images_per_shard) as writer:
        for image_id, mask in records.items():
            writer.write(image_id, mask, image_digest="0" * 64, seconds=1.0)
        writer.finish(records)
    assert verify(folder).ok
    with MaskCache.open(folder) as cache:
        assert set(cache) == set(records)
        for image_id, written in records.items():
            found = cache[image_id]
            assert np.array_equal(found.mask, written.mask)
            assert np.array_equal(found.confidence, written.confidence)
            assert found.labels == written.labels
            assert (found.cams is None) == (written.cams is None)
            if found.cams is not None and written.cams is not None:
                assert found.cams.tobytes() == written.cams.tobytes()


@given(ids)
def test_an_escaped_id_is_one_name_and_comes_back(image_id: str) -> None:
    name = escape_id(image_id)
    assert "/" not in name
    assert unquote(name) == image_id


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=10),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
settings_of_masks = st.dictionaries(st.text(max_size=8), values, min_size=1, max_size=5)


def otherwise(value: Any) -> Any:
    """The same meaning, written differently: other order of keys, tuples for lists."""
    if isinstance(value, dict):
        return {key: otherwise(value[key]) for key in reversed(list(value))}
    if isinstance(value, list):
        return tuple(otherwise(item) for item in value)
    return copy.copy(value)


@given(settings_of_masks)
def test_the_same_meaning_has_the_same_key(determinants: dict[str, Any]) -> None:
    assert fingerprint(determinants) == fingerprint(otherwise(determinants))


def kinds(value: Any) -> Any:
    """Tells apart what Python takes for equal: 1, 1.0 and True."""
    if isinstance(value, dict):
        return {key: kinds(item) for key, item in value.items()}
    if isinstance(value, list):
        return [kinds(item) for item in value]
    return type(value).__name__, repr(value)


@given(settings_of_masks, settings_of_masks)
def test_another_meaning_has_another_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (kinds(one) == kinds(other))


@given(settings_of_masks, st.data())
def test_any_change_of_a_leaf_changes_the_key(determinants: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(determinants)))
    changed = {**determinants, key: data.draw(values)}
    assert (fingerprint(changed) == fingerprint(determinants)) == (kinds(changed) == kinds(determinants))
