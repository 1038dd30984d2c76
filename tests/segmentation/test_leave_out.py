"""Images that are left out of the training by a list, as the page of ``wsss preview`` saves it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.end_to_end.conftest import wsss
from tests.segmentation.conftest import CONFIG, Make, changed
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.errors import LabelError, TrainingError
from wsss_pipeline.evaluation.result import id_digest
from wsss_pipeline.stages.train_seg import train_seg

IDS = [f"train_0000{number}" for number in range(8)]
SHORT = changed(CONFIG, optimisation__iterations=1, optimisation__warm_up=0)


def test_listed_images_are_not_trained_on_and_a_continued_run_is_held_to_it(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rejected = tmp_path / "rejected.txt"
    rejected.write_text("train_00002\nimages/train_00005.jpg\nno/such/image\n")
    (tmp_path / "seven.txt").write_text(
        "\n".join(f"JPEGImages/{i}.jpg SegmentationClass/{i}.png" for i in IDS[:7])
    )
    job = make(config=SHORT, split=tmp_path / "seven.txt", leave_out=rejected)
    with caplog.at_level(logging.INFO):
        train_seg(job)
    expected = [IDS[number] for number in (0, 1, 3, 4, 6)]
    data = json.loads((job.out / "data.json").read_text())
    assert (data["images"], data["ids"]) == (5, id_digest(expected))
    assert f"5 images (ids {id_digest(expected)})" in caplog.text, "what the network is given"
    assert "left out: 2 of 7 images" in caplog.text
    (warning,) = [record.message for record in caplog.records if "aren't among" in record.message]
    assert "names 1 ids" in warning
    assert "no/such/image" in warning
    rejected.write_text("train_00005\ntrain_00002\n")  # the same images in other words
    assert train_seg(job).steps == 1
    rejected.write_text("train_00002\n")
    with pytest.raises(TrainingError, match="images: 5, 6"):
        train_seg(job)


def test_an_image_beyond_the_split_isn_t_taken_for_its_namesake_in_it(
    make: Make, root: Path, tmp_path: Path
) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for below in ("", "other"):
        for folder, source, suffix in ((images, "JPEGImages", "jpg"), (masks, "SegmentationClass", "png")):
            (folder / below).mkdir(parents=True, exist_ok=True)
            for image_id in IDS[:3]:
                (folder / below / f"{image_id}.{suffix}").symlink_to(root / source / f"{image_id}.{suffix}")
    (tmp_path / "three.txt").write_text("\n".join(IDS[:3]))
    (tmp_path / "rejected.txt").write_text(f"other/{IDS[0]}\n")
    job = make(config=SHORT, split=tmp_path / "three.txt", leave_out=tmp_path / "rejected.txt")
    job = replace(job, images=images, masks=MaskFolder(masks, load_class_set("demo").names, "ground truth"))
    train_seg(job)
    assert json.loads((job.out / "data.json").read_text())["ids"] == id_digest(IDS[:3])


def test_a_list_of_all_images_or_of_none_is_refused(make: Make, tmp_path: Path) -> None:
    rejected = tmp_path / "rejected.txt"
    rejected.write_text("\n".join(IDS))
    with pytest.raises(TrainingError, match="names all 8 images"):
        train_seg(make(leave_out=rejected))
    rejected.write_text("\n")
    with pytest.raises(LabelError, match="holds no image id"):
        train_seg(make(leave_out=rejected))
    assert not (tmp_path / "run").exists()


def test_an_image_without_a_mask_is_no_hindrance_once_it_is_left_out(root: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for image_id in IDS[1:]:
        (masks / f"{image_id}.png").symlink_to(root / "SegmentationClass" / f"{image_id}.png")
    arguments = (
        *("train-seg", "--gt-masks", masks, "--classes", "demo", "--images", root / "JPEGImages"),
        *("--out", tmp_path / "run", "--network", "segformer", "--encoder", "tiny", "--weights", "none"),
        *("--crop", 48, "--batch-size", 2, "--iterations", 1, "--device", "cpu", "--workers", 0),
    )
    refused = wsss(*arguments)
    assert refused.exit_code == 2
    assert IDS[0] in refused.stderr
    (tmp_path / "rejected.txt").write_text(f"{IDS[0]}\n")
    result = wsss(*arguments, "--leave-out", tmp_path / "rejected.txt")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "data.json").read_text())["images"] == 7
