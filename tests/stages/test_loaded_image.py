"""Windows and batches."""

from __future__ import annotations

import numpy as np
import pytest
from wsss_pipeline.stages.loaded_image import LoadedImage, same_size_batches, windows

from wsss_pipeline.data.transforms import ClipInputSize


def image(name: str, width: int, labelled: bool = True) -> LoadedImage:
    pixels = np.zeros((16, width, 3), np.uint8)
    return LoadedImage(
        name, "", (0, 0, 0), (), [1] if labelled else [], pixels, ClipInputSize(width, 16, 1.0)
    )


def names(images: list[LoadedImage]) -> str:
    return "".join(item.image_id for item in images)


@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [
        (1, ["a", "b", "c", "f", "g", "h", "e"]),
        (2, ["ab", "cf", "gh", "e"]),
        (9, ["abcfgh", "e"]),
    ],
)
def test_batches_are_of_one_size_and_never_too_large(batch_size: int, expected: list[str]) -> None:
    images = [image(name, 32, labelled=name != "D") for name in "abcD"]
    images += [image("e", 48), *(image(name, 32) for name in "fgh")]
    assert [names(batch) for batch in same_size_batches(images, batch_size)] == expected


def test_windows_keep_the_order() -> None:
    images = (image(name, 32) for name in "abcde")
    assert [names(window) for window in windows(images, 2)] == ["ab", "cd", "e"]


def test_a_scaled_picture_has_a_smaller_working_size() -> None:
    scaled = LoadedImage(
        "a", "", (0, 0, 0), (), [1], np.zeros((100, 30, 3), np.uint8), ClipInputSize(16, 48, 0.5)
    )
    assert scaled.size == (100, 30)
    assert scaled.working_size == (50, 15)
    assert scaled.working_pixels().shape == (50, 15, 3)
    assert scaled.clip_pixels().shape == (48, 16, 3)
    strip = LoadedImage(
        "a", "", (0, 0, 0), (), [1], np.zeros((1, 30, 3), np.uint8), ClipInputSize(16, 16, 0.1)
    )
    assert strip.working_size == (1, 3)
