"""Regions that others made: a folder of JSON files as those of SA-1B, or of label images.

Folders have no fingerprint. What stands for one is a digest over the names and sizes of all files, and over the bytes
of up to 1,000 of them, spread evenly: all of a small folder, and of one of a data set as much as is read in a second
or two. Regions made with other settings have other sizes nearly everywhere; what goes unnoticed is a file of a larger
folder that is edited without a change of its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from wsss_pipeline.data.image_files import ImageFile, file_status
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import file_digest, read_label_image
from wsss_pipeline.errors import ImageError, RegionError
from wsss_pipeline.files import check_machine, read_bytes
from wsss_pipeline.regions.regions import MAX_REGIONS, SUB_PART, WHOLE, Regions
from wsss_pipeline.regions.superpixels import regions_of_labels
from wsss_pipeline.runtime.output import one_line

MAX_JSON_BYTES = 2**25  # of one image; those of SA-1B take some hundred KB
_LOOKED_INTO = 1000  # files whose bytes enter the identity
_MOST_CHARACTERS = 6  # of a number in a compressed string; larger ones are no run of any image

SUFFIX = ".json"

Number = Annotated[float, Field(allow_inf_nan=False)]


class _Rle(BaseModel):
    size: tuple[int, int]
    counts: str | list[Annotated[int, Field(ge=0, lt=2**31)]]


class _Annotation(BaseModel):
    segmentation: _Rle
    predicted_iou: Number = 1.0
    stability_score: Number = 1.0
    point_coords: list[tuple[Number, Number]] = Field([], max_length=2**16)
    level: int = Field(WHOLE, ge=SUB_PART, le=WHOLE)


class _File(BaseModel):
    annotations: list[_Annotation]


_CONTENT = TypeAdapter(_File | list[_Annotation])


def json_files(folder: Path) -> dict[str, ImageFile]:
    """Image id, the path below the folder without ``.json``, to file; those that begin with a dot are passed over."""
    try:
        found = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() == SUFFIX and path.name[0] != "."
        )
    except OSError as error:
        check_machine(error)
        raise RegionError(f"folder {folder} can't be read: {error.strerror}; check the path") from error
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


class JsonRegions:
    """A ``RegionSource``: JSON files, ``a/b.json`` for the image ``a/b``, as those of SA-1B.

    A file holds ``annotations``, or is a list of them. Of each, ``segmentation`` with ``size`` and the run lengths
    ``counts``, as a list or as COCO's compressed text, is read, and, where they are there, ``predicted_iou``,
    ``stability_score``, the first of ``point_coords``, and ``level`` (0 sub-part, 1 part, 2 whole; whole without it).

    Args:
        folder: searched with all below it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, json_files(folder)
        self.description = f"regions of {len(self._files)} JSON files in {folder}"
        self.identity: dict[str, object] = {"region files": _digest(self._files)}

    def __call__(self, image_id: str, pixels: NDArray[np.uint8]) -> Regions:
        """Regions of an image, uint8 (H, W, 3) RGB; errors as ``RegionSource``."""
        file = _file_of(image_id, self._files, self._folder, SUFFIX)
        size = (pixels.shape[0], pixels.shape[1])
        try:
            found = _CONTENT.validate_json(read_bytes(Path(str(file)), MAX_JSON_BYTES))
            regions = _regions(found.annotations if isinstance(found, _File) else found, size)
        except (OSError, ValueError) as error:
            check_machine(error)
            reason = getattr(error, "strerror", None) or one_line(error)
            if isinstance(error, ValidationError):
                # of several readings of the file the one that went furthest
                first = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
                place = ".".join(str(part) for part in first["loc"][1:])
                reason = one_line(f"{place}: {first['msg']}" if place else first["msg"])
            raise RegionError(
                f"{one_line(file, 200)}: can't be used: {reason[:300]}; write the regions as SA-1B has them, "
                "with run lengths of the image's size"
            ) from error
        regions.check(str(file))
        return regions


def _regions(annotations: list[_Annotation], size: tuple[int, int]) -> Regions:
    """A ValueError where the regions aren't of this size, or too many."""
    if len(annotations) > MAX_REGIONS:
        raise ValueError(f"{len(annotations)} regions, where an image may have {MAX_REGIONS}")
    runs: list[NDArray[np.int32]] = []
    for number, annotation in enumerate(annotations):
        rle = annotation.segmentation
        if rle.size != size:
            raise ValueError(
                f"region {number} is of {rle.size[1]} x {rle.size[0]} pixels, the image has {size[1]} x {size[0]}"
            )
        counts = uncompressed(rle.counts) if isinstance(rle.counts, str) else np.array(rle.counts, np.int64)
        if len(counts) == 0 or counts.min() < 0 or counts.max() > size[0] * size[1]:
            raise ValueError(f"region {number} has runs that don't fit {size[1]} x {size[0]} pixels")
        runs.append(counts.astype(np.int32))
    nowhere = (np.nan, np.nan)
    points = [a.point_coords[0] if a.point_coords else nowhere for a in annotations]
    return Regions(
        size=size,
        counts=np.concatenate([np.zeros(0, np.int32), *runs]),
        lengths=np.array([len(run) for run in runs], np.int32),
        levels=np.array([annotation.level for annotation in annotations], np.uint8),
        iou=np.array([annotation.predicted_iou for annotation in annotations], np.float32),
        stability=np.array([annotation.stability_score for annotation in annotations], np.float32),
        points=np.array(points, np.float32).reshape(-1, 2),
    )


def uncompressed(text: str) -> NDArray[np.int64]:
    """Run lengths out of COCO's compressed text, (R,).

    Its characters, from ``0`` on, hold five bits of a number each, the lowest first, with a sixth bit where the
    number goes on; the fifth bit of the last is the sign. From the fourth on, a number is the difference to the one
    two before it. pycocotools isn't asked: it decodes to masks, whose memory it doesn't clear where runs end early.

    Raises:
        ValueError: no such text.
    """
    if not text.isascii():
        raise ValueError("a compressed text has strange characters")
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    if not len(codes):
        return codes
    goes_on = (codes & 32) > 0
    first = np.concatenate([[0], np.flatnonzero(~goes_on[:-1]) + 1])
    length = np.diff(np.append(first, len(codes)))
    if codes.min() < 0 or codes.max() > 63 or goes_on[-1] or length.max() > _MOST_CHARACTERS:
        raise ValueError("a compressed text is cut off or has strange characters")
    place = np.arange(len(codes)) - np.repeat(first, length)
    numbers = np.add.reduceat((codes & 31) << (5 * place), first)
    is_negative = (codes[first + length - 1] & 16) > 0
    numbers -= is_negative * (1 << (5 * length))
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


class LabelImages:
    """A ``RegionSource``: label images, ``a/b.png`` for the image ``a/b``; the pixels of each value are a region.

    Zero and 255 are values as any other. Palette files give their indices.

    Args:
        folder: searched with all below it.

    Raises:
        ImageError: the folder can't be read, or two files have one image id.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, find_images(folder)
        self.description = f"regions of {len(self._files)} label images in {folder}"
        self.identity: dict[str, object] = {"label images": _digest(self._files)}

    def __call__(self, image_id: str, pixels: NDArray[np.uint8]) -> Regions:
        """Regions of an image, uint8 (H, W, 3) RGB; errors as ``RegionSource``."""
        file = _file_of(image_id, self._files, self._folder, ".png")
        try:
            labels = read_label_image(file)
        except ImageError as error:
            raise RegionError(str(error)) from error
        height, width = pixels.shape[:2]
        if labels.shape != (height, width):
            raise RegionError(
                f"{one_line(file, 200)} has {labels.shape[1]} x {labels.shape[0]} pixels, the image "
                f"{width} x {height}; make its regions anew"
            )
        regions = regions_of_labels(labels)
        if len(regions) > MAX_REGIONS:
            raise RegionError(
                f"{one_line(file, 200)} has {len(regions)} values, at most {MAX_REGIONS} regions are taken; is it a "
                "label image?"
            )
        return regions


def _file_of(image_id: str, files: Mapping[str, ImageFile], folder: Path, suffix: str) -> ImageFile:
    if image_id not in files:
        raise RegionError(
            f"image '{image_id}' has no regions: there is no {one_line(image_id, 200)}{suffix} in {folder}; add it"
        )
    return files[image_id]


def _digest(files: Mapping[str, ImageFile]) -> str:
    """SHA-256 that stands for a folder, as the module says; files that can't be read count by their names alone."""
    digest = hashlib.sha256()
    step = -(-len(files) // _LOOKED_INTO) or 1
    for number, (image_id, file) in enumerate(sorted(files.items())):
        entry = f"{image_id}\n".encode("utf-8", "surrogateescape")
        try:
            entry += f"{file_status(file)[0]}\n".encode()
            if number % step == 0:
                entry += file_digest(file).encode()
        except (OSError, ImageError) as error:
            check_machine(error)
        digest.update(hashlib.sha256(entry).digest())
    return digest.hexdigest()
