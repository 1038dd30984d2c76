"""What is installed, what would be used, what is missing: looked at, never changed."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from wsss_pipeline.clip.sources import DEMO_CLIP, locate_clip
from wsss_pipeline.config import ClipConfig, CrfConfig
from wsss_pipeline.data.transforms import CLIP_STATISTICS
from wsss_pipeline.errors import WsssError
from wsss_pipeline.refine import DenseCrf

Status = Literal["ok", "note", "fail"]

LIBRARIES = (
    *("torch", "torchvision", "transformers", "segmentation-models-pytorch", "accelerate", "numpy", "numba"),
    *("h5py", "opencv-python-headless", "Pillow", "click"),
)
# extra of this package, what it installs, and for what
EXTRAS = (
    ("crf", "pydensecrf", "--crf pydensecrf (slower than lattice; Python 3.11 or 3.12, C++ compiler)"),
    ("export", "pycocotools", "export-masks --format coco"),
    ("export", "onnxruntime", "export-model"),
    ("ray", "ray", "generate-masks --engine ray"),
    ("regions", "skimage", "superpixels (slic) as regions"),
)
LITTLE_SPACE = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``fail`` stops generate-masks, ``note`` is worth knowing."""

    name: str
    status: Status
    text: str


def doctor(cache_dir: Path, clip: ClipConfig) -> list[Check]:
    """Look at this machine. Never raises: what goes wrong in a check is its result."""
    looks: dict[str, Callable[[], Iterator[Check]]] = {
        "versions": _versions,
        "device": _device,
        "extras": _extras,
        "cache": lambda: _cache(cache_dir),
        "clip": lambda: _clip(clip),
    }
    checks: list[Check] = []
    for name, look in looks.items():
        try:
            checks += look()
        except Exception as error:  # a broken installation can raise anything; the doctor still has to answer
            checks.append(Check(name, "fail", " ".join(f"{type(error).__name__}: {error}".split())))
    return checks


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for library in LIBRARIES:
        try:
            yield Check("library", "ok", f"{library} {metadata.version(library)}")
        except metadata.PackageNotFoundError:
            yield Check("library", "note", f"{library} isn't installed under this name")


def _device() -> Iterator[Check]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield Check("device", "ok", f"cuda:{index} {properties.name}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        yield Check("device", "ok", f"cpu, {os.cpu_count()} cores, torch uses {threads} threads")


def _extras() -> Iterator[Check]:
    yield Check("crf", "ok", f"--crf auto takes {DenseCrf(CrfConfig()).config.backend}")
    distributions = metadata.packages_distributions()
    for name, package, what in EXTRAS:
        if package in distributions:
            yield Check(name, "ok", f"{package} {metadata.version(distributions[package][0])}")
        else:
            needs = f"{what} needs: pip install 'wsss-pipeline[{name}]'"
            yield Check(name, "note", f"{package} isn't installed; {needs}")


def _cache(cache_dir: Path) -> Iterator[Check]:
    """Write, rename and read an HDF5 file where masks are to go, or in the nearest folder that exists."""
    import h5py

    folder = next(path for path in (cache_dir.absolute(), *cache_dir.absolute().parents) if path.is_dir())
    yield Check("hdf5", "ok", f"h5py {h5py.version.version} with HDF5 {h5py.version.hdf5_version}")
    try:
        with tempfile.TemporaryDirectory(prefix=".wsss-doctor-", dir=folder) as trial:
            first, second = Path(trial) / "first.h5", Path(trial) / "second.h5"
            with h5py.File(first, "w") as file:
                file["value"] = 42
            first.rename(second)
            with h5py.File(second) as file:
                if file["value"][()] != 42:
                    raise OSError("what was written isn't what is read")
    except OSError as error:
        yield Check("cache", "fail", f"{folder} can't be written: {error}; choose another --cache")
        return
    free = shutil.disk_usage(folder).free
    status: Status = "note" if free < LITTLE_SPACE else "ok"
    yield Check("cache", status, f"{folder} can be written, {free / 2**30:.1f} GiB free")


def _clip(clip: ClipConfig) -> Iterator[Check]:
    try:
        files = locate_clip(clip, offline=True)
    except WsssError as error:
        if clip.weights == DEMO_CLIP or Path(clip.weights).expanduser().exists():
            yield Check("clip", "fail", str(error))
        else:
            yield Check("clip", "note", f"not on this machine yet: {error}")
        return
    size = sum(path.stat().st_size for path in files.weights) / 2**20
    text = f"{clip.weights}: {files.weights[0]}, {size:.0f} MiB; words from {files.tokenizer}"
    yield Check("clip", "ok", text)
    (image, words), (image_heads, text_heads) = files.form
    activation = image if image == words else f"{image} (text: {words})"
    heads = f"heads {image_heads} wide (text: {text_heads})"
    yield Check("clip", "ok", f"{activation}, {heads}; from {files.form_origin}")
    mean, std = files.own_statistics or CLIP_STATISTICS
    numbers = ", ".join("/".join(f"{number:.4g}" for number in row) for row in (mean, std))
    yield Check("clip", "ok", f"pixels' mean and deviation {numbers}; from {files.statistics_origin}")
