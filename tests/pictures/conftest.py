"""A mask set made by hand whose images and classes have names that are out to do harm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, PseudoMask, open_mask_set

CAT, DOG = "cat", "</script><b onclick=alert(1)>dog"
# image id to its classes, and the confidence of their pixels in half percents; its own class set's order
PICTURES = {
    "plain": {CAT: 180},
    "a/</script><img src=x onerror=alert(2)>": {CAT: 100, DOG: 160},
    "100%41 #1?x=\"'&amp;": {DOG: 120},
    "\u202egnp.evil": {CAT: 140},
    "twice.jpg": {DOG: 190},
    "space at its end ": {},
}


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images/`` and ``cache/`` of ``PICTURES``; ``absent`` is a label without a pixel of it."""
    folder = tmp_path_factory.mktemp("hostile")
    mask_set = open_mask_set(
        folder / "cache", MaskSet(name="hostile", determinants={"made": "by hand"}, class_names=(CAT, DOG))
    )
    chance = np.random.default_rng(0)
    with MaskWriter(mask_set) as writer:
        for image_id, confidences in {**PICTURES, "absent": {DOG: 0}}.items():
            mask, confidence = np.zeros((30, 40), np.uint8), np.full((30, 40), 200, np.uint8)
            for number, (name, value) in enumerate(confidences.items()):
                if value:
                    region = slice(5, 25), slice(18 * number + 2, 18 * number + 18)
                    mask[region], confidence[region] = (CAT, DOG).index(name) + 1, value
            labels = tuple(confidences)
            writer.write(image_id, PseudoMask(mask, confidence, labels), image_digest="0" * 64, seconds=0.1)
            file = folder / "images" / f"{image_id}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file)
        writer.finish([*PICTURES, "absent"])
    return folder


@pytest.fixture
def masks(hostile: Path) -> MaskCache:
    return MaskCache.open(hostile / "cache")
