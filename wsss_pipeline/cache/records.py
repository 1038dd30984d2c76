"""One image's group in a shard: written, read, checked.

``images/<escaped image id>`` holds datasets, of a mask ``mask``, ``confidence`` and maybe ``cams``, and attributes.
One of these, ``record_digest``, is the SHA-256 of all that matters in the group, so that damage shows in
whatever part of the file it lies. Which arrays there are is the affair of a ``RecordKind``.

A file may come from anybody. So an array is read only where it is declared as ``write_record`` declares it, and
inflated here: HDF5 would follow links to other files, and inflate a chunk of kilobytes to gigabytes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

import h5py
import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.images import MAX_DECODED_PIXELS
from wsss_pipeline.data.masks import PseudoMask, mask_type
from wsss_pipeline.errors import CacheFormatError, CacheRecordError
from wsss_pipeline.runtime.output import one_line

MAX_CAM_VALUES = 2**30  # all CAMs of an image, 2 GiB
MAX_ATTRIBUTE_BYTES = 2**16
MAX_LABELS = 4000  # of an image; as an attribute each takes 16 bytes
MAX_TEXT_LENGTH = 4096

_FILTERS = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": True}
_FILTER_CODES = [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_FLETCHER32]
_NOT_DEFLATED = 0b010  # HDF5's note on a chunk that compression would have made larger
_CHECKSUM_BYTES = 4  # behind each chunk; the record's digest says more

Content = TypeVar("Content")
Holds = Literal["masks", "regions"]


@dataclass(frozen=True)
class RecordInfo:
    """What is known of an image's record without its arrays.

    Attributes:
        labels: the image's class names.
        image_digest: digest of the image file, see ``data.images.image_digest``.
        seconds: time its mask took.
        scale: side of the image that CLIP and CRF saw, by that of the file's; 1.0 where not scaled.
        width: width of the mask.
        height: height of the mask.
        has_cams: True where CAMs are stored.
        digest: SHA-256 of all that matters in the record, hexadecimal.
    """

    labels: tuple[str, ...]
    image_digest: str
    seconds: float
    scale: float
    width: int
    height: int
    has_cams: bool
    digest: str


class Parts(NamedTuple):
    """What an image's record is made of.

    Attributes:
        size: (H, W).
        labels: the image's class names, none where it isn't about classes.
        arrays: the datasets by name, in the order in which the digest takes them.
    """

    size: tuple[int, int]
    labels: tuple[str, ...]
    arrays: Mapping[str, NDArray[Any]]


class RecordKind(Protocol[Content]):
    """What the records of a set hold, and how it lies in them.

    Attributes:
        holds: the kind's name.
        class_names: names that labels may have.
        remedy: what fills a set that lacks an image; ``{folder}`` is the folder that holds the set.
    """

    @property
    def holds(self) -> Holds: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def remedy(self) -> str: ...
    def parts(self, content: Content) -> Parts:
        """What is to be stored; a ValueError where that can't be."""

    def layout(self, group: h5py.Group, info: RecordInfo) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each array that the record must have, before any is read; a ValueError if too large."""

    def content(self, info: RecordInfo, arrays: Mapping[str, NDArray[Any]]) -> Content:
        """What was stored; a ValueError or WsssError where it is none."""


@dataclass(frozen=True)
class MaskRecords:
    """A ``RecordKind``: pseudo masks of these classes, values 1..C; of 16 bits where there are more than 254."""

    class_names: tuple[str, ...]
    holds: Literal["masks"] = "masks"
    remedy: str = (
        "`wsss generate-masks` or `relabel`, whichever made it, fills it with --cache {folder} and the options of "
        "the first run"
    )

    def parts(self, content: PseudoMask) -> Parts:
        """Mask, confidence and maybe CAMs; a ValueError for no such class, or too many pixels or labels."""
        mask, labels, cams = content.mask, content.labels, content.cams
        height, width = mask.shape
        kind = np.dtype(mask_type(1 + len(self.class_names)))
        if mask.dtype != kind:
            raise ValueError(f"the mask is {mask.dtype}; of {len(self.class_names)} classes it is {kind}")
        if len(labels) > MAX_LABELS:
            raise ValueError(f"it has {len(labels):,} labels, the limit is {MAX_LABELS:,}")
        _check_size(height, width, 0 if cams is None else len(labels))
        if (largest := mask.max()) > len(self.class_names):
            raise ValueError(f"the mask holds {largest}, which is no class; a low confidence says it instead")
        if unknown := [label for label in labels if label not in self.class_names]:
            raise ValueError(f"its label {unknown[0]!r:.60} is none of the mask set's classes")
        if (longest := max(map(len, labels), default=0)) > MAX_TEXT_LENGTH:
            raise ValueError(f"a label has {longest} characters, the limit is {MAX_TEXT_LENGTH}")
        arrays: dict[str, NDArray[Any]] = {"mask": mask, "confidence": content.confidence}
        return Parts((height, width), labels, arrays if cams is None else {**arrays, "cams": cams})

    def layout(self, group: h5py.Group, info: RecordInfo) -> dict[str, tuple[tuple[int, ...], str]]:
        """As the attributes say."""
        size = (info.height, info.width)
        _check_size(*size, len(info.labels) if info.has_cams else 0)
        cams = {"cams": ((len(info.labels), *size), "<f2")} if info.has_cams else {}
        kind = np.dtype(mask_type(1 + len(self.class_names))).newbyteorder("<").str
        return {"mask": (size, kind), "confidence": (size, "|u1"), **cams}

    def content(self, info: RecordInfo, arrays: Mapping[str, NDArray[Any]]) -> PseudoMask:
        """The pseudo mask; a ValueError or MaskError where the arrays are none."""
        if (largest := arrays["mask"].max()) > len(self.class_names):
            raise ValueError(
                f"the mask holds the value {largest}, and there are {len(self.class_names)} classes"
            )
        return PseudoMask(arrays["mask"], arrays["confidence"], info.labels, arrays.get("cams"))


def record_kind(holds: Holds, class_names: Sequence[str]) -> RecordKind[Any]:
    """The kind of a set's records: masks of these classes, or regions."""
    if holds == "masks":
        return MaskRecords(tuple(class_names))
    # regions stand above the cache, which knows of them by name alone
    kind: RecordKind[Any] = importlib.import_module("wsss_pipeline.regions.store").RegionRecords()
    return kind


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


def image_ids(images: h5py.Group) -> tuple[list[str], list[str]]:
    """The ids of all records of a shard, and the names, for people, of members that can't be any image's.

    Raises:
        CacheFormatError: the names can't be read; the message names the file.
    """
    ids: list[str] = []
    strange: list[str] = []
    try:
        for stored in images.id:  # bytes: one that isn't UTF-8 must not hide the others
            image_id = unquote_to_bytes(stored).decode("utf-8", "surrogateescape")
            with suppress(CacheRecordError):
                if escape_id(image_id).encode() == stored:
                    ids.append(image_id)
                    continue
            strange.append(repr(stored)[2:-1])
    except Exception as error:  # names of damaged groups make HDF5 raise almost anything
        raise CacheFormatError(
            f"{images.file.filename} can't be read ({one_line(error)}); `wsss cache gc` sets it aside"
        ) from error
    return ids, strange


def write_record(
    images: h5py.Group,
    image_id: str,
    content: Content,
    image_digest: str,
    seconds: float,
    scale: float,
    kind: RecordKind[Content],
) -> Parts:
    """Add an image's group to ``images``, in place of one that it already has there; returns what went into it.

    Raises:
        CacheRecordError: the id can't be stored, or the content can't: no such class, too large.
    """
    name = escape_id(image_id)
    try:
        parts = kind.parts(content)
    except ValueError as error:
        raise CacheRecordError(f"image '{image_id}' can't be stored: {error}") from error
    if name in images:
        del images[name]
    group = images.create_group(name)
    try:
        for key, array in parts.arrays.items():
            chunks = (1,) * (array.ndim - 2) + array.shape[-2:]
            # CAMs of an image without labels have no values, and HDF5 no chunks of size 0
            group.create_dataset(key, data=array, **({"chunks": chunks, **_FILTERS} if array.size else {}))
        texts = np.array(parts.labels, dtype=object)
        group.attrs.create("labels", texts, dtype=h5py.string_dtype("utf-8"))
        group.attrs["image_digest"] = image_digest
        group.attrs["seconds"] = float(seconds)
        group.attrs["scale"] = float(scale)
        group.attrs["height"], group.attrs["width"] = parts.size
        group.attrs["record_digest"] = record_digest(image_id, parts, image_digest, scale)
    except BaseException:  # an interrupt as well: half a record must not be finished with the rest
        del images[name]
        raise
    return parts


def read_record(images: h5py.Group, image_id: str, kind: RecordKind[Content]) -> tuple[Content, RecordInfo]:
    """The record of one image out of a shard's ``images``, every byte of it checked.

    Args:
        images: the shard's group.
        image_id: one of its ids.
        kind: what it may be.

    Raises:
        CacheRecordError: it is damaged; the message names the file.
    """
    with _record(images, image_id) as group:
        info = _info(group, kind.class_names)
        layout = kind.layout(group, info)
        arrays = {name: _read_array(group, name, shape, dtype) for name, (shape, dtype) in layout.items()}
        content = kind.content(info, arrays)
        parts = Parts((info.height, info.width), info.labels, arrays)
        if info.digest != record_digest(image_id, parts, info.image_digest, info.scale):
            raise ValueError("the content doesn't fit its digest")
    return content, info


def read_info(images: h5py.Group, image_id: str, kind: RecordKind[Any]) -> RecordInfo:
    """The attributes of one image's record; arguments and errors as for ``read_record``."""
    with _record(images, image_id) as group:
        return _info(group, kind.class_names)


def read_texts(images: h5py.Group, image_id: str, name: str) -> tuple[str, ...]:
    """One attribute of one image's record, ``labels`` or a digest, of up to 4096 characters each.

    Raises:
        CacheRecordError: it is damaged; the message names the file.
    """
    with _record(images, image_id) as group:
        return _texts(group, name)


def check_records(
    images: h5py.Group, kind: RecordKind[Any], only: Collection[str] | None = None, *, arrays: bool = True
) -> tuple[dict[str, RecordInfo], dict[str, str]]:
    """Read and recompute every record of a shard, or those of some ids; without ``arrays`` only read what else is
    known.

    Returns:
        What is known of each sound record, and for each damaged one the reason, both by image id.

    Raises:
        CacheFormatError: as ``image_ids``.
    """
    sound: dict[str, RecordInfo] = {}
    ids, strange = image_ids(images)
    damaged = dict.fromkeys(strange, "its name is no image id")
    for image_id in ids if only is None else set(only).intersection(ids):
        try:
            if arrays:
                _, sound[image_id] = read_record(images, image_id, kind)
            else:
                sound[image_id] = read_info(images, image_id, kind)
        except CacheRecordError as error:
            damaged[image_id] = str(error)
    return sound, damaged


def record_digest(image_id: str, parts: Parts, image_digest: str, scale: float) -> str:
    """SHA-256 over id, labels, image digest, scale, and shape, type and bytes of each array.

    It leaves out how long the record took to make, so equal masks of equal images have equal digests.
    """
    header = {
        "image_id": image_id,
        "labels": parts.labels,
        "image_digest": image_digest,
        "scale": float(scale),
        "arrays": [(name, array.dtype.str, array.shape) for name, array in parts.arrays.items()],
    }
    # the form of ``manifest.fingerprint``
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode("ascii"))
    for array in parts.arrays.values():
        digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.hexdigest()


def own_member(group: h5py.Group, name: str, kind: type[Any]) -> Any:
    """The member of this name, which lies in this file itself.

    Raises:
        ValueError: there is none, it is a link that may lead out of the file, or isn't of this kind.
    """
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"'{name}' is missing, or a link to somewhere else")
    member = group[name]
    if not isinstance(member, kind):
        raise ValueError(f"'{name}' isn't a {kind.__name__.lower()}")
    return member


@contextmanager
def _record(images: h5py.Group, image_id: str) -> Iterator[h5py.Group]:
    """The image's group; what goes wrong with it becomes a CacheRecordError with id and file."""
    try:
        yield own_member(images, escape_id(image_id), h5py.Group)
    except MemoryError:  # no fault of the record's
        raise
    except Exception as error:  # flipped bytes make HDF5 and numpy raise almost anything
        raise CacheRecordError(
            f"the record of image '{image_id}' in {images.file.filename} is damaged ({one_line(error)}); "
            "`wsss cache verify` lists all such, and the command that made them makes them anew"
        ) from error


def _info(group: h5py.Group, class_names: Sequence[str]) -> RecordInfo:
    labels, (image_digest,), (digest,) = (
        _texts(group, name) for name in ("labels", "image_digest", "record_digest")
    )
    seconds, scale = float(group.attrs["seconds"]), float(group.attrs["scale"])
    if unknown := [label for label in labels if label not in class_names]:
        raise ValueError(f"its label {unknown[0]!r:.60} is none of the mask set's classes")
    if not (math.isfinite(seconds) and 0 < scale <= 1):
        raise ValueError(f"{seconds} seconds at scale {scale} are no record of a run")
    return RecordInfo(
        labels=labels,
        image_digest=image_digest,
        seconds=seconds,
        scale=scale,
        width=int(group.attrs["width"]),
        height=int(group.attrs["height"]),
        has_cams="cams" in group,
        digest=digest,
    )


def _texts(group: h5py.Group, name: str) -> tuple[str, ...]:
    declared = group.attrs.get_id(name)
    if declared.get_type().get_size() * math.prod(declared.shape) > MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"attribute '{name}' has more than {MAX_ATTRIBUTE_BYTES} bytes")
    texts = tuple(map(str, np.ravel(np.asarray(group.attrs[name], object))))
    if (longest := max(map(len, texts), default=0)) > MAX_TEXT_LENGTH:
        raise ValueError(f"a text has {longest} characters, the limit is {MAX_TEXT_LENGTH}")
    return texts


def _check_size(height: int, width: int, cams: int) -> None:
    pixels = height * width
    if min(height, width) < 1 or pixels > MAX_DECODED_PIXELS or cams * pixels > MAX_CAM_VALUES:
        raise ValueError(
            f"{width} x {height} pixels with {cams} CAMs; the limits are {MAX_DECODED_PIXELS} pixels and "
            f"{MAX_CAM_VALUES} values of CAMs"
        )


def _read_array(group: h5py.Group, name: str, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
    """An array that is declared as ``write_record`` declares it, inflated to its size and no further."""
    dataset = own_member(group, name, h5py.Dataset)
    declared = dataset.id.get_create_plist()
    if (
        math.prod(shape)
        and (
            declared.get_layout() != h5py.h5d.CHUNKED  # so neither virtual nor in another file
            or dataset.chunks != (1,) * (len(shape) - 2) + shape[-2:]
            or [declared.get_filter(n)[0] for n in range(declared.get_nfilters())] != _FILTER_CODES
        )
    ):
        raise ValueError(f"'{name}' isn't stored in the chunks and with the compression of this cache")
    if dataset.dtype != np.dtype(kind) or dataset.shape != shape:
        raise ValueError(f"'{name}' is {dataset.dtype} {dataset.shape}, not {np.dtype(kind)} {shape}")
    array = np.empty(shape, kind)
    for number, chunk in enumerate(array.reshape(-1, *shape[-2:]) if array.size else ()):
        offset = (number, 0, 0) if len(shape) == 3 else (0,) * len(shape)
        stored = dataset.id.get_chunk_info_by_coord(offset)
        if stored.byte_offset is None or stored.size > 2 * chunk.nbytes + 1024:
            raise ValueError(f"a chunk of '{name}' is missing or has {stored.size} bytes")
        skipped, content = dataset.id.read_direct_chunk(offset)
        content = content[:-_CHECKSUM_BYTES]
        if skipped != _NOT_DEFLATED:
            content = zlib.decompressobj().decompress(content, chunk.nbytes + 1)
        if skipped not in (0, _NOT_DEFLATED) or len(content) != chunk.nbytes:
            raise ValueError(f"a chunk of '{name}' doesn't inflate to {chunk.nbytes} bytes")
        # HDF5 stores the first byte of every value, then the second of every value
        values = np.frombuffer(content, np.uint8).reshape(chunk.itemsize, -1).T.copy()
        chunk[...] = values.view(kind).reshape(chunk.shape)
    return array
