"""The demo's scenes on disk, read back by the readers that a user's data goes through."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.images import read_image, read_mask
from wsss_pipeline.data.shortcuts import voc_inputs
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.demo.voc_folder import write_voc_folder


def test_the_folder_reads_like_pascal_voc(tmp_path: Path) -> None:
    write_voc_folder(tmp_path, seed=7, scenes={"train": 3, "val": 2})
    train = voc_inputs(tmp_path, "train", load_class_set("demo"))
    val = voc_inputs(tmp_path, "val", load_class_set("demo"))
    assert list(train.images) == ["train_00000", "train_00001", "train_00002"]
    assert len(val.images) == 2
    for number, (split, inputs) in enumerate({"train": train, "val": val}.items()):
        for index, (image_id, file) in enumerate(inputs.images.items()):
            scene = draw_scene((7, number, index))
            assert image_id.startswith(split)
            assert inputs.labels[image_id] == scene.labels
            assert inputs.ground_truth is not None
            assert np.array_equal(read_mask(inputs.ground_truth / f"{image_id}.png"), scene.mask)
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
