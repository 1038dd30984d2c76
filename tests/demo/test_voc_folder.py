"""The demo's scenes on disk, read back by the readers that a user's data goes through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.datasets import voc_inputs
from wsss_pipeline.data.images import read_image, read_mask
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import OutputError
from wsss_pipeline.stages.demo import run_demo


def test_the_folder_reads_like_pascal_voc(tmp_path: Path) -> None:
    write_voc_folder(tmp_path, seed=7, scenes={"train": 3, "val": 2})
    expected = {"train": ["train_00000", "train_00001", "train_00002"], "val": ["val_00000", "val_00001"]}
    for number, (split, ids) in enumerate(expected.items()):
        images, labels = voc_inputs(tmp_path, split, load_class_set("demo"))
        assert list(images) == ids
        for index, (image_id, file) in enumerate(images.items()):
            scene = draw_scene((7, number, index))
            assert labels[image_id] == scene.labels
            mask = read_mask(tmp_path / "SegmentationClass" / f"{image_id}.png")
            assert np.array_equal(mask, scene.mask)
            difference = read_image(file).astype(int) - scene.image
            assert np.abs(difference).mean() < 4, "JPEG, but the same image"


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    write_voc_folder(tmp_path, 1, {"train": 2})
    before = content()
    write_voc_folder(tmp_path, 1, {"train": 2})
    assert content() == before
    assert len(before) == 7


@pytest.mark.parametrize(
    "file",
    [
        "data/JPEGImages/train_00001.jpg",
        "data/ImageSets/Segmentation/val.txt",
        "preview/index.html",
        "report.html",
    ],
)
def test_others_files_are_not_written_over(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("precious")
    with pytest.raises(OutputError, match=f"{file} is there already"):
        run_demo(tmp_path, scenes=(2, 1))
    assert (tmp_path / file).read_text() == "precious"
    assert not (tmp_path / "cache").exists()


def test_another_seed_is_refused_where_scenes_are(tmp_path: Path) -> None:
    write_voc_folder(tmp_path, 1, {"train": 2})
    before = (tmp_path / "JPEGImages/train_00000.jpg").read_bytes()
    with pytest.raises(OutputError, match="train_00000"):
        write_voc_folder(tmp_path, 2, {"train": 2})
    assert (tmp_path / "JPEGImages/train_00000.jpg").read_bytes() == before
