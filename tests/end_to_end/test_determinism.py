"""Masks are bit-equal whatever the batch size, the workers, the shares, the order of input and the interruptions."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.end_to_end.conftest import mask_set, with_method, wsss
from tests.faults.kills import State, masks
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.methods import method_names
from wsss_pipeline.refine.dense_crf import has_pydensecrf

SCENES = 8
# pydensecrf's labels come from other code; --batch-size means something with it alone where there is no GPU
WAYS: dict[str, tuple[object, ...]] = {
    "no workers": ("--workers", 0),
    "three workers": ("--workers", 3),
    "eight workers": ("--workers", 8),
    "batches": ("--batch-size", 5),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_voc_folder(folder / "voc", seed=6, scenes={"train": SCENES}, size=(80, 64))
    return folder


def generate(root: Path, cache: Path, *further: object) -> None:
    if "--images" not in further:
        further = (*further, "--voc", root / "voc", "--split", "train")
    result = wsss(
        *("generate-masks", "--classes", "demo", "--clip", "demo", "--offline", "--cache", cache, *further)
    )
    assert result.exit_code == 0, result.stderr
    assert mask_set(result).parent == cache


Options = tuple[str, ...]


CASES = list(itertools.product(method_names(), ("fp32", "bf16")))
# what a run is given of the images, and in which order, has nothing to do with precision
each_method = pytest.mark.parametrize(
    "expected", [case for case in CASES if case[1] == "fp32"], ids=" ".join, indirect=True
)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def expected(request: pytest.FixtureRequest, root: Path) -> tuple[Options, State]:
    """Method and precision as options, and what a plain run makes with them."""
    method, precision = request.param
    options, cache = (*with_method(method), "--precision", precision), root / f"{method} {precision}"
    generate(root, cache, *options)
    found = masks(cache)
    assert len(found) == SCENES
    return options, found


@pytest.mark.parametrize("way", WAYS)
def test_workers_and_batches_change_nothing(
    root: Path, tmp_path: Path, expected: tuple[Options, State], way: str
) -> None:
    options, state = expected
    generate(root, tmp_path, *options, *WAYS[way])
    assert masks(tmp_path) == state


@each_method
def test_shares_and_resuming_change_nothing(
    root: Path, tmp_path: Path, expected: tuple[Options, State]
) -> None:
    options, state = expected
    for further in (("--limit", 3), ("--shard", "1/3"), ("--limit", 5), ("--shard", "0/2"), ()):
        generate(root, tmp_path, *options, *further)
    assert masks(tmp_path) == state


@each_method
def test_the_order_of_input_changes_nothing(
    root: Path, tmp_path: Path, expected: tuple[Options, State]
) -> None:
    options, state = expected
    labels = read_labels(root / "voc" / "Annotations", {}, load_class_set("demo"))
    (tmp_path / "labels.json").write_text(json.dumps(dict(reversed(labels.items()))))
    images = tmp_path / "images"
    shutil.copytree(root / "voc" / "JPEGImages", images)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for file in sorted(images.iterdir(), key=lambda path: path.name[::-1]):
            tar.add(file, file.name)
    for number, source in enumerate((images, tmp_path / "images.tar")):
        cache = tmp_path / f"cache-{number}"
        further = ("--images", source, "--labels", tmp_path / "labels.json", *options)
        generate(root, cache, *further)
        assert masks(cache) == state


@pytest.mark.skipif(not has_pydensecrf(), reason="the optional package pydensecrf isn't installed")
def test_batches_before_pydensecrf_change_nothing(
    root: Path, tmp_path: Path, expected: tuple[Options, State]
) -> None:
    options, _ = expected
    found = []
    for size in (1, 3):
        cache = tmp_path / str(size)
        generate(root, cache, *options, "--crf", "pydensecrf", "--batch-size", size)
        found.append(masks(cache))
    assert found[0] == found[1]
