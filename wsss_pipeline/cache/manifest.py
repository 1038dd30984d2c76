"""``manifest.json``: what a mask set, or a set of regions, is, and how complete."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wsss_pipeline.cache.locks import set_lock
from wsss_pipeline.cache.records import Holds, RecordKind, record_kind
from wsss_pipeline.cache.shards import FORMAT_VERSION
from wsss_pipeline.data.classes import MAX_CLASSES
from wsss_pipeline.errors import CacheError, CacheFormatError
from wsss_pipeline.files import check_machine, read_json
from wsss_pipeline.runtime.output import one_line, write_file, writing

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**24
FORMATS: dict[Holds, str] = {"masks": "wsss-pseudo-masks", "regions": "wsss-regions"}
MAX_NAME_LENGTH = 60

# Their versions go into the manifest, where installed.
LIBRARIES = (
    *("wsss-pipeline", "torch", "transformers", "numpy", "h5py", "Pillow"),
    *("opencv-python-headless", "opencv-python", "numba", "pydensecrf2"),
)

logger = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=0, le=2**53)]


def fingerprint(determinants: Mapping[str, Any]) -> str:
    """64 hexadecimal digits that stand for ``determinants``: equal on every machine and in every version.

    SHA-256 of canonical JSON: keys sorted, no white space, ASCII, floats as their shortest exact form. Allowed are
    None, bool, int, finite float, str, and lists, tuples and mappings with text keys of these. 1 and 1.0 differ:
    values come from a typed configuration, where each key has one type. Numpy scalars, paths, sets and the
    like are refused rather than turned into text, for their text form isn't promised to stay the same.

    Raises:
        CacheError: a value has no canonical form; the message names its key.
    """
    _check_canonical(determinants, "determinants")
    text = json.dumps(determinants, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _check_canonical(value: Any, where: str) -> None:
    # Exact types: a subclass may print itself as it likes.
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise CacheError(f"{where}: the key {key!r} isn't text; a fingerprint needs text keys")
            _check_canonical(item, f"{where}.{key}")
    elif kind in (list, tuple):
        for position, item in enumerate(value):
            _check_canonical(item, f"{where}[{position}]")
    elif kind is float:
        if not math.isfinite(value):
            raise CacheError(f"{where}: {value} has no canonical form; a fingerprint needs finite numbers")
    elif value is not None and kind not in (bool, int, str):
        raise CacheError(
            f"{where}: {kind.__name__} has no canonical form; make it a number, text, list or dict"
        )


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class MaskSet(_Stored):
    """What determines a set of masks, or of regions, and what its masks mean.

    Attributes:
        name: the readable part of the folder's name.
        determinants: all that determines the masks and nothing else, see ``fingerprint``.
        class_names: names of mask values 1..C, so without background.
        category_ids: class name to the id it has in the data set, where that isn't the mask value.
        holds: what lies in it; regions have no classes.
    """

    name: str = Field(max_length=1000)
    determinants: dict[str, Any]
    class_names: tuple[str, ...] = Field(strict=False)  # a list in JSON
    category_ids: dict[str, int] | None = None
    holds: Holds = "masks"

    @model_validator(mode="after")
    def _fits_the_determinants(self) -> MaskSet:
        covered = self.determinants.get("classes")
        if isinstance(covered, list) and self.class_names != tuple(
            item.get("name") if isinstance(item, dict) else item for item in covered
        ):
            raise ValueError("class_names aren't the classes that the fingerprint covers")
        if len(set(self.class_names)) < len(self.class_names) or len(self.class_names) > MAX_CLASSES:
            raise ValueError(f"class_names hold a name twice, or more than {MAX_CLASSES}")
        if any(not name.isprintable() or not name.strip() for name in self.class_names):
            raise ValueError("class_names hold one that is no plain text")
        if self.category_ids is not None:
            if self.category_ids.keys() != set(self.class_names):
                raise ValueError("category_ids leave a class out, or name others")
            numbers = self.category_ids.values()
            if len(set(numbers)) < len(numbers) or not all(0 < number < 2**31 for number in numbers):
                raise ValueError("category_ids hold a number twice, or one that is no category's")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the determinants, hexadecimal."""
        return fingerprint(self.determinants)

    @property
    def kind(self) -> RecordKind[Any]:
        """How its records are read and written."""
        return record_kind(self.holds, self.class_names)

    @property
    def folder_name(self) -> str:
        """``<name>-<12 hexadecimal digits>``, the name made safe for a path."""
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-.")[:MAX_NAME_LENGTH]
        return f"{safe or self.holds}-{self.fingerprint[:12]}"


class ShareCompletion(_Stored):
    """How far the run over one share came: images it was to do, and those of them that aren't there."""

    expected: Count
    missing: Count


class Completion(_Stored):
    """How far a mask set is.

    Attributes:
        images: number of images in finished shards.
        shares: shares of the last partition of the work, by ``I/N``.
        complete: all N shares have run to their end, and no image is missing.
    """

    images: Count
    shares: dict[Annotated[str, Field(pattern=r"^\d{1,9}/\d{1,9}$")], ShareCompletion]
    complete: bool

    @classmethod
    def of(cls, images: int, shares: Mapping[str, ShareCompletion], count: int) -> Completion:
        """With those of ``shares`` that are of a partition into ``count``."""
        same = {share: item for share, item in sorted(shares.items()) if share.endswith(f"/{count}")}
        is_complete = len(same) == count and not any(item.missing for item in same.values())
        return cls(images=images, shares=same, complete=is_complete)

    @property
    def failed(self) -> int:
        """Number of images that were tried and aren't there; 0 before all shares have run to their end."""
        is_ended = all(len(self.shares) == int(share.rpartition("/")[2]) for share in self.shares)
        return sum(item.missing for item in self.shares.values()) if is_ended else 0


class Manifest(_Stored):
    """The content of ``manifest.json``; ``created``: ISO 8601, UTC; ``versions``: of the libraries, then."""

    mask_set: MaskSet
    fingerprint: str
    versions: dict[str, Annotated[str, Field(max_length=100)]]
    created: str = Field(max_length=100)
    completion: Completion

    @model_validator(mode="after")
    def _fits_its_fingerprint(self) -> Manifest:
        if self.mask_set.fingerprint != self.fingerprint:
            raise ValueError("the fingerprint isn't that of the determinants")
        return self


def open_mask_set(cache_dir: Path, mask_set: MaskSet) -> Path:
    """The folder of a mask set below ``cache_dir``, made where it isn't there yet.

    Raises:
        CacheFormatError: the folder is there, of another format version or another mask set.
        CacheLockedError: another process doesn't let go of the set's lock.
        OutputError: it can't be made.
    """
    folder = cache_dir / mask_set.folder_name
    with writing(cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    if not _is_made(folder, mask_set):
        # tasks of an array all come at the same moment: one of them makes it
        with set_lock(folder):
            if not _is_made(folder, mask_set, will_mend=True):
                versions = {"python": platform.python_version()}
                for name in LIBRARIES:
                    with suppress(metadata.PackageNotFoundError):
                        versions[name] = metadata.version(name)
                manifest = Manifest(
                    mask_set=mask_set,
                    fingerprint=mask_set.fingerprint,
                    versions=versions,
                    created=datetime.now(UTC).isoformat(timespec="seconds"),
                    completion=Completion.of(0, {}, 1),
                )
                write_manifest(folder, manifest)
    return folder


def _is_made(folder: Path, mask_set: MaskSet, will_mend: bool = False) -> bool:
    """Whether there is a whole manifest, of this mask set."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        manifest = read_manifest(folder)
    except _HalfWrittenError as error:
        if will_mend:
            logger.warning("%s; it is written anew", error)
        return False
    if manifest.fingerprint != mask_set.fingerprint:
        raise CacheFormatError(
            f"{folder} is another mask set, {manifest.fingerprint}; choose another folder to write to"
        )
    return True


def is_mask_set(path: Path) -> bool:
    """Whether ``path`` is the folder of a mask set."""
    return (path / MANIFEST).is_file()


def list_mask_sets(path: Path) -> list[Path]:
    """``path`` itself where it is a mask set, else the mask sets right below it, by name.

    Raises:
        CacheFormatError: ``path`` isn't there, or isn't a folder.
    """
    if not path.is_dir():
        what = "isn't a folder" if path.exists() else "doesn't exist"
        raise CacheFormatError(
            f"cache {path} {what}; name a folder that `wsss generate-masks` or `relabel` wrote"
        )
    if is_mask_set(path):
        return [path]
    return sorted(folder for folder in path.iterdir() if is_mask_set(folder))


def only_mask_set(path: Path, holds: Holds | None = None) -> Path:
    """``path`` itself where it is a mask set, else the one right below it.

    Args:
        path: a set, or a folder that holds sets.
        holds: what the set must hold; others beside it in a folder don't count.

    Raises:
        CacheFormatError: there is none.
        CacheError: there are several; the message lists them.
    """
    found = list_mask_sets(path)
    if holds and len(found) > 1:
        found = [folder for folder in found if read_manifest(folder).mask_set.holds == holds]
        if not found:
            raise CacheFormatError(f"{path} holds several sets, none of {holds}; name another folder")
    if not found:
        raise CacheFormatError(
            f"{path} isn't a cache (no {MANIFEST} in it); name a folder that `wsss generate-masks` or `relabel` wrote"
        )
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        what = "region" if holds == "regions" else "mask"
        raise CacheError(f"{path} holds {len(found)} {what} sets; name one of them, as {path}/NAME: {names}")
    return found[0]


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``.

    Raises:
        CacheFormatError: it is damaged, or written by another format version.
    """
    path = folder / MANIFEST
    try:
        values = read_json(path, MAX_MANIFEST_BYTES)
        version = values["format_version"]
        holds = {name: holds for holds, name in FORMATS.items()}.get(str(values["format"]))
        if holds and version == FORMAT_VERSION and type(version) is int:  # True is 1, too
            return Manifest.model_validate({**values, "mask_set": {**values, "holds": holds}})
    except (OSError, ValueError, LookupError, TypeError, RecursionError, CacheError) as error:
        check_machine(error)
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            reason = one_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")[:200]
        raise _HalfWrittenError(
            f"{path} isn't a whole manifest ({reason}); the same `wsss generate-masks`, `relabel` or "
            "`propose-regions` command as before writes it anew and keeps what is there"
        ) from error
    raise CacheFormatError(
        f"{path} has format version {version!r:.40}, this program reads {FORMAT_VERSION}; use the program "
        "version that wrote it, or make the masks anew in another --cache folder"
    )


class _HalfWrittenError(CacheFormatError):
    """No manifest can be read out of the file, whatever version wrote it."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, replacing the one that is there."""
    values = {
        "format": FORMATS[manifest.mask_set.holds],
        "format_version": FORMAT_VERSION,
        "name": manifest.mask_set.name,
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "class_names": list(manifest.mask_set.class_names),
        "category_ids": manifest.mask_set.category_ids,
        "palette": None,  # part of the format
        "determinants": manifest.mask_set.determinants,
        "versions": manifest.versions,
        "completion": manifest.completion.model_dump(),
    }
    content = (json.dumps(values, indent=2) + "\n").encode("ascii")
    if len(content) > MAX_MANIFEST_BYTES:
        raise CacheError(
            f"{folder / MANIFEST} would have {len(content):,} bytes, and {MAX_MANIFEST_BYTES:,} are read; give the "
            "class set fewer or shorter texts"
        )
    write_file(folder / MANIFEST, content)


def update_completion(folder: Path, change: Callable[[Completion], Completion]) -> Completion:
    """Replace the completion in the manifest by what ``change`` makes of it; the caller holds the set's lock."""
    manifest = read_manifest(folder)
    completion = change(manifest.completion)
    if manifest.completion != completion:
        write_manifest(folder, manifest.model_copy(update={"completion": completion}))
    return completion
