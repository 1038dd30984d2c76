"""``manifest.json``: what a mask set is, and how complete."""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from wsss_pipeline.cache.fingerprint import fingerprint
from wsss_pipeline.cache.locks import set_lock
from wsss_pipeline.cache.shards import FORMAT_VERSION
from wsss_pipeline.errors import CacheError, CacheFormatError
from wsss_pipeline.runtime.output import one_line, write_file, writing

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**24
FORMAT = "wsss-pseudo-masks"
MAX_NAME_LENGTH = 60

# Their versions go into the manifest, where installed.
LIBRARIES = (
    *("wsss-pipeline", "torch", "transformers", "numpy", "h5py", "Pillow"),
    *("opencv-python-headless", "opencv-python", "numba", "pydensecrf2"),
)

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskSet:
    """What determines a mask set, and what its masks mean.

    Attributes:
        name: the readable part of the folder's name.
        determinants: all that determines the masks and nothing else, see ``fingerprint``.
        class_names: names of mask values 1..C, so without background.
        category_ids: class name to the id it has in the data set, where that isn't the mask value.
    """

    name: str
    determinants: Mapping[str, Any]
    class_names: tuple[str, ...]
    category_ids: Mapping[str, int] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the determinants, hexadecimal."""
        return fingerprint(self.determinants)

    @property
    def folder_name(self) -> str:
        """``<name>-<12 hexadecimal digits>``, the name made safe for a path."""
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-.")[:MAX_NAME_LENGTH]
        return f"{safe or 'masks'}-{self.fingerprint[:12]}"


@dataclass(frozen=True)
class ShareCompletion:
    """How far the run over one share came: images it was to do, and those of them that aren't there."""

    expected: int
    missing: int


@dataclass(frozen=True)
class Completion:
    """How far a mask set is.

    Attributes:
        images: number of images in finished shards.
        shares: of the last partition of the work, by ``I/N``.
        complete: all N shares have run to their end, and no image is missing.
    """

    images: int = 0
    shares: Mapping[str, ShareCompletion] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``; ``created``: ISO 8601, UTC; ``versions``: of the libraries, then."""

    mask_set: MaskSet
    fingerprint: str
    versions: Mapping[str, str]
    created: str
    completion: Completion


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
                created = datetime.now(UTC).isoformat(timespec="seconds")
                versions = {"python": platform.python_version()}
                for name in LIBRARIES:
                    with suppress(metadata.PackageNotFoundError):
                        versions[name] = metadata.version(name)
                new = Manifest(mask_set, mask_set.fingerprint, versions, created, Completion())
                write_manifest(folder, new)
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
            f"{folder} is another mask set, {manifest.fingerprint}; choose another --cache"
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
            f"cache {path} {what}; name a folder that `wsss generate-masks --cache DIR` wrote"
        )
    if is_mask_set(path):
        return [path]
    return sorted(folder for folder in path.iterdir() if is_mask_set(folder))


def only_mask_set(path: Path) -> Path:
    """``path`` itself where it is a mask set, else the one right below it.

    Raises:
        CacheFormatError: there is none.
        CacheError: there are several; the message lists them.
    """
    found = list_mask_sets(path)
    if not found:
        raise CacheFormatError(
            f"{path} isn't a cache (no {MANIFEST} in it); name a folder that `wsss generate-masks` wrote"
        )
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise CacheError(f"{path} holds {len(found)} mask sets; name one of them, as {path}/NAME: {names}")
    return found[0]


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``.

    Raises:
        CacheFormatError: it is damaged, or written by another format version.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
        values = json.loads(path.read_text("utf-8"))
        version, form = values["format_version"], values["format"]
        if form == FORMAT and version == FORMAT_VERSION:
            return _from_json(values)
    except (*_UNREADABLE, CacheError) as error:
        raise _HalfWrittenError(
            f"{path} isn't a whole manifest ({type(error).__name__}: {one_line(error)[:200]}); the same `wsss "
            "generate-masks` command as before writes it anew and keeps the masks"
        ) from error
    raise CacheFormatError(
        f"{path} has format version {version!r:.40}, this program reads {FORMAT_VERSION}; use the program "
        "version that wrote it, or make the masks anew in another --cache folder"
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, replacing the one that is there.

    Raises:
        OutputError: disk full, read-only, ...
    """
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": manifest.mask_set.name,
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
        "class_names": list(manifest.mask_set.class_names),
        "category_ids": manifest.mask_set.category_ids and dict(manifest.mask_set.category_ids),
        "palette": None,  # part of the format
        "determinants": manifest.mask_set.determinants,
        "versions": dict(manifest.versions),
        "completion": asdict(manifest.completion),
    }
    write_file(folder / MANIFEST, (json.dumps(values, indent=2) + "\n").encode("ascii"))


def update_completion(folder: Path, completion: Completion) -> None:
    """Replace the completion in the manifest; the caller holds the set's lock.

    Raises:
        CacheFormatError: the manifest can't be read.
        OutputError: disk full, read-only, ...
    """
    manifest = read_manifest(folder)
    if manifest.completion != completion:
        write_manifest(folder, replace(manifest, completion=completion))


class _HalfWrittenError(CacheFormatError):
    """No manifest can be read out of the file, whatever version wrote it."""


def _from_json(values: Mapping[str, Any]) -> Manifest:
    category_ids = values["category_ids"]
    mask_set = MaskSet(
        name=str(values["name"]),
        determinants=dict(values["determinants"]),
        class_names=tuple(str(name) for name in values["class_names"]),
        category_ids=None
        if category_ids is None
        else {str(name): int(number) for name, number in category_ids.items()},
    )
    if mask_set.fingerprint != values["fingerprint"]:
        raise ValueError("the fingerprint isn't that of the determinants")
    covered = mask_set.determinants.get("classes")
    if isinstance(covered, list) and mask_set.class_names != tuple(
        item["name"] if isinstance(item, dict) else item for item in covered
    ):
        raise ValueError("class_names aren't the classes that the fingerprint covers")
    if mask_set.category_ids is not None and not set(mask_set.class_names) <= set(mask_set.category_ids):
        raise ValueError("category_ids leave a class out")
    completion = values["completion"]
    shares = {
        share: ShareCompletion(int(item["expected"]), int(item["missing"]))
        for share, item in completion["shares"].items()
    }
    if not all(re.fullmatch(r"\d{1,9}/\d{1,9}", share) for share in shares):
        raise ValueError("a share of the work isn't I/N")
    return Manifest(
        mask_set=mask_set,
        fingerprint=str(values["fingerprint"]),
        versions={str(name): str(version) for name, version in values["versions"].items()},
        created=str(values["created"]),
        completion=Completion(int(completion["images"]), shares, bool(completion["complete"])),
    )
