"""Masks that follow from their id, and a way to write some."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from wsss_pipeline.cache import FinishedImages, MaskSet, MaskWriter, PseudoMask

SETTINGS = {"cam": {"threshold": 0.4}, "classes": ["cat", "dog"]}
MASK_SET = MaskSet(name="voc12", determinants=SETTINGS, class_names=("cat", "dog"))


def make_mask(image_id: str, size: tuple[int, int] = (12, 16), *, cams: bool = False) -> PseudoMask:
    """The same mask for the same id, in every process."""
    rng = np.random.default_rng(list(hashlib.sha256(image_id.encode()).digest()))
    labels = ("cat", "dog")[: int(rng.integers(0, 3))]
    return PseudoMask(
        mask=rng.integers(0, len(labels) + 1, size).astype(np.uint8),
        confidence=rng.integers(0, 201, size).astype(np.uint8),
        labels=labels,
        cams=rng.random((len(labels), *size)).astype(np.float16) if cams else None,
    )


def make_digest(image_id: str) -> str:
    return hashlib.sha256(f"bytes of {image_id}".encode()).hexdigest()


def assert_equal(found: PseudoMask, expected: PseudoMask) -> None:
    assert found.mask.dtype == expected.mask.dtype
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.confidence, expected.confidence)
    assert found.labels == expected.labels
    assert (found.cams is None) == (expected.cams is None)
    if found.cams is not None and expected.cams is not None:
        assert found.cams.dtype == np.float16
        np.testing.assert_array_equal(found.cams, expected.cams)


def write_images(folder: Path, image_ids: Iterable[str], *, cams: bool = False, share: str = "0/1") -> None:
    index, count = map(int, share.split("/"))
    ids = list(image_ids)
    with MaskWriter(folder, index, count) as writer:
        for image_id in ids:
            record = make_mask(image_id, cams=cams)
            writer.write(image_id, record, image_digest=make_digest(image_id), seconds=0.5)
        writer.finish(ids)


def is_current(
    finished: MaskWriter | FinishedImages,
    image_id: str,
    file: Path,
    labels: tuple[str, ...],
    **how: bool,
) -> bool:
    """Whether the mask of one image needn't be made."""
    return finished.unfinished([image_id], {image_id: file}, {image_id: labels}, **how) == []


class Images:
    """Image files whose bytes have the digests of ``make_digest``, and their labels, which a test may change."""

    def __init__(self, folder: Path, image_ids: Iterable[str]) -> None:
        folder.mkdir(exist_ok=True)
        self.files = {image_id: folder / f"{image_id}.jpg" for image_id in image_ids}
        self.labels = {image_id: make_mask(image_id).labels for image_id in self.files}
        for image_id, file in self.files.items():
            file.write_bytes(f"bytes of {image_id}".encode())

    def current(self, finished: MaskWriter | FinishedImages, need_cams: bool = False) -> set[str]:
        """Those whose mask needn't be made."""
        ids = list(self.files)
        return {*ids} - {*finished.unfinished(ids, self.files, self.labels, need_cams=need_cams)}


def current(finished: MaskWriter | FinishedImages, folder: Path, image_ids: Iterable[str]) -> set[str]:
    """Those whose mask ``write_images`` made and that needn't be made again; ``folder`` is the mask set's."""
    return Images(folder.parent.parent / "images", image_ids).current(finished)


def start_writer(mode: str, folder: Path, count: int = 0) -> subprocess.Popen[str]:
    """``writer_process.py`` in another process, ready to begin."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("writer_process.py")), mode, str(folder), str(count)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.h5"))


def damage(shard: Path, image_id: str) -> None:
    with h5py.File(shard, "r+") as file:
        file[f"images/{image_id}"].attrs["record_digest"] = "0" * 64


def write_one(folder: Path, image_id: str, like: str) -> None:
    with MaskWriter(folder) as writer:
        writer.write(image_id, make_mask(like), image_digest=make_digest(like), seconds=0.0)
