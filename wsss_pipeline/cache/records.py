"""One image's group in a shard: written, read, checked.

``images/<escaped image id>`` holds the datasets ``mask``, ``confidence`` and maybe ``cams``, and attributes.
One of these, ``record_digest``, is the SHA-256 of all that matters in the group, so that damage shows in
whatever part of the file it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np

from wsss_pipeline.cache.fingerprint import canonical_json
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import CacheRecordError

__all__ = [
    "PseudoMask",
    "RecordInfo",
    "check_records",
    "escape_id",
    "read_info",
    "read_labels",
    "read_record",
    "record_digest",
    "stored_digest",
    "unescape_id",
    "write_record",
]

_FILTERS = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": True}


@dataclass(frozen=True)
class RecordInfo:
    """What is known of an image's record without its arrays.

    Attributes:
        labels: the image's class names.
        image_digest: SHA-256 of the image file, hexadecimal.
        seconds: time its mask took.
        scale: side of the picture that CLIP and CRF saw, by that of the image; 1.0 where not scaled.
        width: of the mask.
        height: of the mask.
        has_cams: whether CAMs are stored.
    """

    labels: tuple[str, ...]
    image_digest: str
    seconds: float
    scale: float
    width: int
    height: int
    has_cams: bool


def escape_id(image_id: str) -> str:
    """The image id as the name of a group: ``%`` and ``/`` percent-escaped, as is a lone ``.``.

    Raises:
        CacheRecordError: the id is empty, holds a zero character or isn't valid Unicode.
    """
    try:
        image_id.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CacheRecordError(f"image id {image_id!r} isn't valid Unicode; rename the file") from error
    if not image_id or "\0" in image_id:
        raise CacheRecordError(f"image id {image_id!r} is empty or holds a zero character; rename the file")
    if image_id == ".":  # to HDF5 the group itself
        return "%2E"
    return image_id.replace("%", "%25").replace("/", "%2F")


def unescape_id(name: str) -> str:
    """The image id for the name of a group."""
    return unquote(name, errors="strict")


def write_record(
    images: h5py.Group,
    image_id: str,
    pseudo_mask: PseudoMask,
    *,
    image_digest: str,
    seconds: float,
    scale: float,
) -> None:
    """Add an image's group to ``images``, in place of one that it already has there."""
    name = escape_id(image_id)
    if name in images:
        del images[name]
    group = images.create_group(name)
    try:
        _fill_group(group, image_id, pseudo_mask, image_digest, seconds, scale)
    except BaseException:  # an interrupt as well: half a record must not be finished with the rest
        del images[name]
        raise


def read_record(images: h5py.Group, image_id: str) -> tuple[PseudoMask, RecordInfo]:
    """The record of one image out of a shard's ``images``, every byte of it checked.

    Raises:
        CacheRecordError: it is damaged; the message names the file.
    """
    with _named_damage(images, image_id):
        group = images[escape_id(image_id)]
        info = _info(group)
        cams = group["cams"][()] if info.has_cams else None
        pseudo_mask = PseudoMask(group["mask"][()], group["confidence"][()], info.labels, cams)
        if pseudo_mask.mask.shape != (info.height, info.width):
            raise ValueError("the size doesn't fit the mask")
        if (
            record_digest(image_id, pseudo_mask, info.image_digest, info.scale)
            != group.attrs["record_digest"]
        ):
            raise ValueError("the content doesn't fit its digest")
    return pseudo_mask, info


def read_info(images: h5py.Group, image_id: str) -> RecordInfo:
    """The attributes of one image's record.

    Raises:
        CacheRecordError: they are damaged; the message names the file.
    """
    with _named_damage(images, image_id):
        return _info(images[escape_id(image_id)])


def read_labels(images: h5py.Group, image_id: str) -> tuple[str, ...]:
    """The class names of one image.

    Raises:
        CacheRecordError: they are damaged; the message names the file.
    """
    with _named_damage(images, image_id):
        return _labels(images[escape_id(image_id)])


def stored_digest(images: h5py.Group, image_id: str) -> str:
    """The ``record_digest`` that was written with one image's record.

    Raises:
        CacheRecordError: it is damaged; the message names the file.
    """
    with _named_damage(images, image_id):
        return str(images[escape_id(image_id)].attrs["record_digest"])


def check_records(images: h5py.Group) -> tuple[dict[str, RecordInfo], dict[str, str]]:
    """Read and recompute every record of a shard.

    Returns:
        What is known of each sound record, and for each damaged one the reason, both by image id.
    """
    sound: dict[str, RecordInfo] = {}
    damaged: dict[str, str] = {}
    for name in images:
        image_id = unescape_id(name)
        try:
            _, sound[image_id] = read_record(images, image_id)
        except CacheRecordError as error:
            damaged[image_id] = str(error)
    return sound, damaged


def record_digest(image_id: str, pseudo_mask: PseudoMask, image_digest: str, scale: float) -> str:
    """SHA-256 over id, labels, image digest, scale, and shape, type and bytes of each array.

    It leaves out how long the mask took, so equal masks of equal images have equal digests.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(pseudo_mask).items()}
    header = canonical_json(
        {
            "image_id": image_id,
            "labels": list(pseudo_mask.labels),
            "image_digest": image_digest,
            "scale": float(scale),
            "arrays": [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()],
        }
    )
    digest = hashlib.sha256(header.encode("ascii"))
    for array in arrays.values():
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


@contextmanager
def _named_damage(images: h5py.Group, image_id: str) -> Iterator[None]:
    """Turn what goes wrong inside into a CacheRecordError with id and file."""
    try:
        yield
    except Exception as error:  # flipped bytes make HDF5 and numpy raise almost anything
        reason = " ".join(str(error).split())
        raise CacheRecordError(
            f"the record of image '{image_id}' in {images.file.filename} is damaged ({reason}); "
            "`wsss cache verify` lists all such, and running generate-masks again makes them anew"
        ) from error


def _info(group: h5py.Group) -> RecordInfo:
    attributes = group.attrs
    return RecordInfo(
        labels=_labels(group),
        image_digest=str(attributes["image_digest"]),
        seconds=float(attributes["seconds"]),
        scale=float(attributes["scale"]),
        width=int(attributes["width"]),
        height=int(attributes["height"]),
        has_cams="cams" in group,
    )


def _fill_group(
    group: h5py.Group, image_id: str, pseudo_mask: PseudoMask, image_digest: str, seconds: float, scale: float
) -> None:
    for key, array in _arrays(pseudo_mask).items():
        _write_array(group, key, array)
    height, width = pseudo_mask.mask.shape
    labels = np.array(pseudo_mask.labels, dtype=object)
    group.attrs.create("labels", labels, dtype=h5py.string_dtype("utf-8"))
    group.attrs["image_digest"] = image_digest
    group.attrs["seconds"] = float(seconds)
    group.attrs["scale"] = float(scale)
    group.attrs["width"] = width
    group.attrs["height"] = height
    group.attrs["record_digest"] = record_digest(image_id, pseudo_mask, image_digest, scale)


def _labels(group: h5py.Group) -> tuple[str, ...]:
    return tuple(str(label) for label in group.attrs["labels"])


def _arrays(pseudo_mask: PseudoMask) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {"mask": pseudo_mask.mask, "confidence": pseudo_mask.confidence}
    if pseudo_mask.cams is not None:
        arrays["cams"] = pseudo_mask.cams
    return arrays


def _write_array(group: h5py.Group, name: str, array: np.ndarray[Any, Any]) -> None:
    if array.size == 0:  # CAMs of an image without labels; HDF5 has no chunks of size 0
        group.create_dataset(name, data=array)
        return
    chunk = (1, *array.shape[1:]) if array.ndim == 3 else array.shape
    group.create_dataset(name, data=array, chunks=chunk, **_FILTERS)
