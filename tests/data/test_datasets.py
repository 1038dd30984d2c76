from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.datasets import coco_inputs, read_split, voc_inputs
from wsss_pipeline.errors import ImageError, LabelError


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    for image_id in ("2007_1", "2007_2", "2007_3"):
        write(root / "JPEGImages" / f"{image_id}.jpg")
    write(root / "ImageSets" / "Segmentation" / "train.txt", "2007_2\n2007_1\n")
    write(root / "ImageSets" / "Segmentation" / "train_aug.txt", "2007_3\n2007_9\n")
    write(root / "ImageSets" / "Main" / "trainval.txt", "2007_1\n")
    write(root / "ImageSets" / "Main" / "cat_trainval.txt", "2007_1 -1\n")
    write(root / "ImageSets" / "Main" / "train_trainval.txt", "2007_1 -1\n")
    write(root / "labels.json", json.dumps({"2007_1": ["cat"], "2007_2": ["dog"], "2007_3": ["cow"]}))
    return root


def annotate(root: Path, image_id: str, name: str) -> None:
    write(
        root / "Annotations" / f"{image_id}.xml",
        f"<annotation><object><name>{name}</name></object></annotation>",
    )


def test_voc_with_labels_in_json(voc: Path) -> None:
    images, labels = voc_inputs(voc, "train")
    assert list(images.items()) == [
        (image_id, voc / "JPEGImages" / f"{image_id}.jpg") for image_id in ("2007_2", "2007_1")
    ]
    assert labels == {"2007_1": ("cat",), "2007_2": ("dog",)}


def test_voc_annotations_come_before_json(voc: Path) -> None:
    annotate(voc, "2007_1", "sofa")
    annotate(voc, "2007_3", "not a class, and not in the split")
    assert voc_inputs(voc, "train")[1] == {"2007_1": ("sofa",)}


def test_voc_keeps_an_id_without_an_image(voc: Path) -> None:
    assert voc_inputs(voc, "train_aug")[0]["2007_9"] == voc / "JPEGImages" / "2007_9.jpg"


def test_voc_with_classes_of_ones_own(voc: Path) -> None:
    write(voc / "labels.json", '{"2007_1": ["ape"]}')
    assert voc_inputs(voc, "trainval", load_class_set("ape,man"))[1] == {"2007_1": ("ape",)}


def test_an_unknown_voc_split_lists_those_that_exist(voc: Path) -> None:
    with pytest.raises(LabelError, match=r"tarin\.txt; there are: train, train_aug, trainval$"):
        voc_inputs(voc, "tarin")


def test_wrong_roots_are_told_apart(voc: Path) -> None:
    with pytest.raises(LabelError, match=r"did you mean .*VOC2012\?"):
        voc_inputs(voc.parent, "train")
    with pytest.raises(LabelError, match="check the folder"):
        voc_inputs(voc / "JPEGImages", "train")
    (voc / "labels.json").unlink()
    with pytest.raises(LabelError, match=r"no labels for this split.*Annotations.*labels\.json"):
        voc_inputs(voc, "train")


def test_lists_of_the_classes_will_do_for_labels(voc: Path) -> None:
    (voc / "labels.json").unlink()
    write(voc / "ImageSets" / "Main" / "cat_trainval.txt", "2007_1  1\n2007_9 -1\n")
    assert voc_inputs(voc, "trainval")[1] == {"2007_1": ("cat",)}


def test_voc_without_images_is_an_error(voc: Path) -> None:
    (voc / "JPEGImages").rename(voc / "Images")
    with pytest.raises(ImageError, match="JPEGImages"):
        voc_inputs(voc, "train")


@pytest.mark.parametrize("split", ["../train", "", "a/b", "..", "train.txt\n"])
def test_a_split_is_a_plain_name(voc: Path, split: str) -> None:
    for inputs in (voc_inputs, coco_inputs):
        with pytest.raises(LabelError, match="split"):
            inputs(voc, split)


@pytest.mark.parametrize("folder", ["train2014", "images/train2014"])
def test_coco(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "COCO_1.jpg")
    write(tmp_path / folder / "COCO_2.jpg")
    content = {
        "images": [{"id": 1, "file_name": "COCO_1.jpg"}],
        "categories": [{"id": 63, "name": "couch"}],
        "annotations": [{"image_id": 1, "category_id": 63}],
    }
    write(tmp_path / "annotations" / "instances_train2014.json", json.dumps(content))
    images, labels = coco_inputs(tmp_path, "train2014")
    assert images == {name: tmp_path / folder / f"{name}.jpg" for name in ("COCO_1", "COCO_2")}
    assert labels == {"COCO_1": ("sofa",)}
    with pytest.raises(LabelError, match=r"instances_val2014\.json; there are: train2014"):
        coco_inputs(tmp_path, "val2014")


def test_coco_without_images_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "annotations" / "instances_val2014.json", "{}")
    with pytest.raises(LabelError, match="no images for split 'val2014'"):
        coco_inputs(tmp_path, "val2014")


def test_split_lists_keep_their_order(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", "\ufeffb\r\n\r\n a/c.jpg \nb\nwith space\n")
    assert read_split(path) == ["b", "a/c", "with space"]


@pytest.mark.parametrize(
    "text",
    [
        "images/a.jpg masks/a.png\nimages/with space.jpg masks/with space.png\nimages/d/c.jpg masks/d/c.png\n",
        "images/a.jpg,masks/a.png\nimages/with space.jpg, masks/with space.png\nimages/d/c.jpg,masks/d/c.png\n",
        "./a.jpg\n./with space.jpg\n././d/c.jpg\n",
        "C:\\data\\images\\a.jpg\r\nC:\\data\\images\\with space.jpg\r\nC:\\data\\images\\d\\c.jpg\r\n",
        "/home/x/images/a.jpg\nhttps://host/with%20space.jpg?x=1\n/home/x/d/c.jpg\n",
        '["a.jpg", "with space", "images/d/c.jpg"]',
    ],
)
def test_split_lists_of_other_tools(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "s.txt", text)
    assert read_split(path, {"a", "with space", "d/c", "c"}) == ["a", "with space", "d/c"]


def test_the_list_of_one_class_is_no_split(tmp_path: Path) -> None:
    path = write(tmp_path / "cat_train.txt", "a -1\nb  1\n")
    with pytest.raises(LabelError, match=r"line 1: -1 and 1 are how VOC lists the images of one class"):
        read_split(path, {"a", "b"})
    assert read_split(path, {"a -1", "b  1", "a"}) == ["a -1", "b  1"]


def test_a_known_id_is_no_pair_of_paths(tmp_path: Path) -> None:
    path = write(tmp_path / "s.txt", "a.jpg b.png.png\nimages/a.jpg masks/a.png\n")
    assert read_split(path, {"a", "a.jpg b.png"}) == ["a.jpg b.png", "a"]


def test_paths_in_split_lists_that_are_taken_for_shorter_ones_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "s.txt", "a\n" + "".join(f"images/{n}.jpg\n" for n in range(30)) + "gone/x.jpg\n")
    assert read_split(path, {"a", *map(str, range(30))}) == ["a", *map(str, range(30)), "gone/x"]
    messages = [record.message for record in caplog.records]
    assert messages[0].endswith("s.txt line 2: 'images/0' is taken for '0'")
    assert messages[-1] == "and 10 more lines with folders that the images don't lie in"
    write(tmp_path / "s.txt", "train/a.jpg\nval/a.jpg\n")
    with pytest.raises(LabelError, match=r"line 2: 'train/a' and 'val/a' come to mean one image, 'a'"):
        read_split(path, {"a"})


def test_long_lines_in_split_lists_are_refused_at_once(tmp_path: Path) -> None:
    for text in (".jpg " * 1_000_000, "a/" * 1_000_000):
        with pytest.raises(LabelError, match="longer than 1000"):
            read_split(write(tmp_path / "s.txt", text), {"a"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('["a", 3]', "each a text"),
        ('["a"', "not valid JSON"),
        ("", "no image id"),
        ("a\n../b\n", r"line 2"),
        ("/images/a.jpg /x.png\n", "absolute"),
    ],
)
def test_bad_split_lists_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(LabelError, match=rf"s\.txt.*{reason}"):
        read_split(write(tmp_path / "s.txt", text))
    with pytest.raises(LabelError, match="gone"):
        read_split(tmp_path / "gone.txt")


def test_augmented_lists_as_other_code_bases_write_them(tmp_path: Path) -> None:
    file = tmp_path / "train_aug.txt"
    file.write_text("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n2007_000039\n")
    assert read_split(file) == ["2007_000032", "2007_000039"]


def test_a_pipe_among_voc_annotations_is_refused(voc: Path) -> None:
    (voc / "Annotations").mkdir(exist_ok=True)
    image_id = next(iter(voc_inputs(voc, "train")[0]))
    os.mkfifo(voc / "Annotations" / f"{image_id}.xml")
    with pytest.raises(LabelError, match=rf"{image_id}\.xml.*not a plain file"):
        voc_inputs(voc, "train")
