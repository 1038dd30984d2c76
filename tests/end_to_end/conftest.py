"""A small world for the commands: the golden pictures, a CLIP around the golden vision tower, a runner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from tests.tiny_clip import write_golden_clip
from wsss_pipeline.cache import MaskSet, MaskWriter, PseudoMask, open_mask_set
from wsss_pipeline.cli import main
from wsss_pipeline.methods import method_names
from wsss_pipeline.segmentation.checkpoint import save_network
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig

GOLDEN = Path(__file__).parent.parent / "golden"
LABELS = {name: entry["labels"] for name, entry in json.loads((GOLDEN / "labels.json").read_text()).items()}

# of ``write_scored_world``
NAMES = ("cat", "dog")
IDS = ("a/one", "a/two", "three")

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden_clip(tmp_path_factory.mktemp("clip"), GOLDEN)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with ``images/``, ``labels.json`` and nothing in ``cache/`` yet."""
    shutil.copytree(GOLDEN / "images", tmp_path / "images")
    write_labels(tmp_path, LABELS)
    return tmp_path


@pytest.fixture
def generate(world: Path, clip: Path) -> Run:
    """``wsss generate-masks`` on the world, with further arguments."""

    def run(*arguments: object, cache: str = "cache") -> Result:
        return wsss(*generate_arguments(world, clip, cache), *arguments)

    return run


def generate_arguments(world: Path, clip: Path, cache: str = "cache") -> list[object]:
    return [
        *("generate-masks", "--images", world / "images", "--labels", world / "labels.json"),
        *("--classes", "voc12", "--clip", clip, "--cache", world / cache, "--workers", 0),
    ]


def with_method(method: str) -> tuple[str, ...]:
    """Options of a method, with what it can't do without, and no larger input than it needs."""
    further = {"fma": ("--regions", "slic"), "excel": ("--set", "excel.side=128")}
    return ("--method", method, *further.get(method, ()))


def wsss(*arguments: object) -> Result:
    """One command in this process; a traceback is never what a user should get."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def for_each_method(check: Callable[[str], None], methods: Sequence[str] = method_names()) -> None:
    """Check several methods in one test, where what they need takes long to start; each that fails is named."""
    failures = []
    for method in methods:
        try:
            check(method)
        except Exception as error:
            error.add_note(f"with the method {method}")
            failures.append((method, error))
    if failures:
        names, errors = zip(*failures, strict=True)
        raise ExceptionGroup(f"with {', '.join(names)}", errors)


def write_labels(world: Path, labels: dict[str, list[str]]) -> None:
    (world / "labels.json").write_text(json.dumps(labels))


def mask_set(result: Result) -> Path:
    """The folder on the last line of stdout."""
    return Path(result.stdout.splitlines()[-1])


def write_scored_world(folder: Path) -> Path:
    """``images/``, ``truth/``, ``masks/`` (equal, but for 8 of 120 pixels of one), ``cache/`` and ``run/``."""
    rng = np.random.default_rng(0)
    mask_set = open_mask_set(
        folder / "cache",
        MaskSet(name="hand", determinants={"crf": {"backend": "lattice"}}, class_names=NAMES),
    )
    with MaskWriter(mask_set) as writer:
        for image_id in IDS:
            mask = np.zeros((40, 30), np.uint8)
            mask[4:14, 2:14] = 1
            confidence = np.where(mask == 1, 150, 200).astype(np.uint8)
            writer.write(image_id, PseudoMask(mask, confidence, ("cat",)), image_digest="0" * 64, seconds=0.1)
            save(folder / "truth" / f"{image_id}.png", mask)
            if image_id == "three":
                mask[4, 2:10] = 2
            save(folder / "masks" / f"{image_id}.png", mask)
            save(folder / "images" / f"{image_id}.png", rng.integers(0, 255, (40, 30, 3), dtype=np.uint8))
        writer.finish(IDS)
    config = NetworkConfig(name="segformer", encoder="tiny", weights="none")
    torch.manual_seed(0)
    save_network(build_network(config, 3), folder / "run" / "best", config, NAMES)
    return folder


def save(file: Path, pixels: NDArray[np.uint8]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
