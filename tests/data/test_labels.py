from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from wsss_pipeline.config import LabelFormat
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import LabelError

VOC = load_class_set("voc12")
COCO = load_class_set("coco14")
IMAGES = {name: Path(f"/images/{name}.jpg") for name in ("a", "b/c", "x.y")}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, reason: str, classes: Any = VOC) -> None:
    with pytest.raises(LabelError) as caught:
        read_labels(path, IMAGES, classes)
    message = str(caught.value)
    assert reason in message
    assert path.name in message
    assert message.isprintable()
    assert len(message) < 600


def test_json_keeps_the_order_of_images_and_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path, "l.json", '{"x.y": ["sofa", "cat", "sofa", "airplane"], "b/c.jpg": [], "gone": ["dog"]}'
    )
    labels = read_labels(path, IMAGES, VOC)
    assert list(labels.items()) == [("x.y", ("sofa", "cat", "aeroplane")), ("b/c", ()), ("gone", ("dog",))]


def test_csv_in_all_its_forms(tmp_path: Path) -> None:
    joined = write(tmp_path, "l.csv", "\ufeffimage,labels\r\nb/c.jpg,cat; sofa\r\n\r\na,\r\n")
    assert read_labels(joined, IMAGES, VOC) == {"b/c": ("cat", "sofa"), "a": ()}
    rows = write(tmp_path, "l.csv", 'Image,Label,comment\na,cat,x\n"b/c",dog,\na.JPG,sofa,"y, z"\n')
    assert read_labels(rows, IMAGES, VOC) == {"a": ("cat", "sofa"), "b/c": ("dog",)}
    swapped = write(tmp_path, "l.csv", "labels,image\ntraffic light;stop sign,a\n")
    assert read_labels(swapped, IMAGES, COCO) == {"a": ("traffic light", "stop sign")}


def test_txt_takes_names_and_indices_from_0(tmp_path: Path) -> None:
    path = write(tmp_path, "l.txt", "a.jpg cat\tsofa\n\nb/c 0 79 44\nunlabelled\n")
    rows = write(tmp_path, "rows.txt", "a cat\nb/c dog\na.jpg sofa\na cat\n")
    assert read_labels(rows, IMAGES, COCO) == {"a": ("cat", "sofa"), "b/c": ("dog",)}
    assert read_labels(path, IMAGES, COCO) == {
        "a": ("cat", "sofa"),
        "b/c": ("person", "toothbrush", "spoon"),
        "unlabelled": (),
    }


def test_a_class_called_by_a_number_comes_before_the_index(tmp_path: Path) -> None:
    path = write(tmp_path, "l.txt", "a 1 0\n")
    assert read_labels(path, IMAGES, load_class_set("0,7,1")) == {"a": ("1", "0")}


def test_an_id_that_fits_as_it_stands_keeps_its_ending(tmp_path: Path) -> None:
    path = write(tmp_path, "l.json", '{"a.png": ["cat"], "b.png": ["dog"]}')
    labels = read_labels(path, {"a.png": Path("a.png.jpg"), "b": Path("b.png")}, VOC)
    assert labels == {"a.png": ("cat",), "b": ("dog",)}


def voc_xml(*objects: str) -> str:
    return "<annotation><filename>z.jpg</filename><name>dog</name>" + "".join(objects) + "</annotation>"


def test_voc_folder_takes_top_level_objects_in_order(tmp_path: Path) -> None:
    person = "<object><part><name>head</name></part><name>person</name></object>"
    car = "<object><name> car </name><difficult>1</difficult></object>"
    write(tmp_path, "a.xml", '<?xml version="1.0" encoding="utf-8"?>' + voc_xml(person, car, person))
    write(tmp_path, "b/c.xml", voc_xml())
    write(tmp_path, "._a.xml", b"\x00\x05")
    write(tmp_path, "readme.md", "no labels")
    assert read_labels(tmp_path, IMAGES, VOC) == {"a": ("person", "car"), "b/c": ()}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "isn't safe"),
        ("<!doctype a><annotation/>", "isn't safe"),
        ("<annotation><object>", "not valid XML"),
        ("<html/>", "expected <annotation>"),
        ("", "not valid XML"),
        ("<annotation><object><pose/></object></annotation>", "no <name>"),
        ("<annotation><object><name>persn</name></object></annotation>", "did you mean 'person'"),
        ('<?xml version="1.0" encoding="utf-16"?>'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_bad_voc_files_are_refused(tmp_path: Path, content: str | bytes, reason: str) -> None:
    write(tmp_path, "fine.xml", voc_xml())
    path = write(tmp_path, "wrong.xml", content)
    with pytest.raises(LabelError, match=r"wrong\.xml") as caught:
        read_labels(tmp_path, IMAGES, VOC)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    path.unlink()


def coco_file(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "a.jpg"},
            {"id": 3, "file_name": "b/c.jpg"},
            {"id": 4, "file_name": "d.jpg"},
        ],
        "categories": [
            {"id": 1, "name": "person"},
            {"id": 5, "name": "airplane"},
            {"id": 63},
            {"id": 99, "name": "ufo"},
        ],
        "annotations": [
            {"image_id": 3, "category_id": 63, "iscrowd": 0},
            {"image_id": 7, "category_id": 5, "iscrowd": 1},
            {"image_id": 3, "category_id": 1, "iscrowd": 0},
            {"image_id": 3, "category_id": 63, "iscrowd": 0},
        ],
    }
    return content | changes


def test_coco_instances_by_name_alias_or_id(tmp_path: Path) -> None:
    path = write(tmp_path, "instances.json", json.dumps(coco_file()))
    labels = read_labels(path, IMAGES, COCO)
    assert list(labels.items()) == [("a", ("aeroplane",)), ("b/c", ("sofa", "person")), ("d", ())]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotations": [{"image_id": 7, "category_id": 99}]}, "categories[3]: unknown class 'ufo'"),
        ({"annotations": [{"image_id": 8, "category_id": 1}]}, "annotations[0]: image_id 8"),
        ({"annotations": [{"image_id": 7, "category_id": 2}]}, "category_id 2"),
        ({"annotations": [{"image_id": "7", "category_id": 1}]}, "image_id '7' isn't among"),
        ({"annotations": [[]]}, "annotations[0]: expected an object"),
        ({"annotations": {}}, "'annotations' takes a list"),
        ({"images": [{"id": 1}]}, "'file_name' is None"),
        ({"images": [{"id": 1, "file_name": "../../etc/passwd"}], "annotations": []}, "'..'"),
        ({"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}, "id 1 occurs twice"),
        ({"categories": [{"id": True}]}, "'id' is True"),
    ],
)
def test_bad_coco_files_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    refused(write(tmp_path, "instances.json", json.dumps(coco_file(**changes))), reason, COCO)


def test_a_nameless_category_needs_coco_ids(tmp_path: Path) -> None:
    refused(write(tmp_path, "i.json", json.dumps(coco_file())), "no class of 'voc12' has the coco_id 63")


def test_the_first_folder_names_the_class(tmp_path: Path) -> None:
    images = {name: tmp_path / f"{name}.jpg" for name in ("cat/1", "airplane/2", "cat/more/3")}
    assert read_labels(None, images, VOC) == {
        "cat/1": ("cat",),
        "airplane/2": ("aeroplane",),
        "cat/more/3": ("cat",),
    }
    assert read_labels(None, {}, VOC) == {}


def test_class_folders_need_known_names() -> None:
    with pytest.raises(LabelError, match=r"cats/1\.jpg: unknown class 'cats'; did you mean 'cat'"):
        read_labels(None, {"cats/1": Path("cats/1.jpg")}, VOC)
    with pytest.raises(LabelError, match=r"1\.jpg: lies in no class folder; give --labels"):
        read_labels(None, {"1": Path("1.jpg")}, VOC)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("l.json", '{"a": ["caat"]}', "l.json, image 'a': unknown class 'caat'; did you mean 'cat'"),
        ("l.json", '{"a": 3}', "not a list"),
        ("l.json", '{"a": [3]}', "3 in its list isn't text"),
        ("l.json", '["a"]', "found list"),
        ("l.json", "{}", "holds no image"),
        ("l.json", '{"a": ["cat"], "a": ["dog"]}', "'a' occurs twice"),
        ("l.json", '{"../a": ["cat"]}', "'..'"),
        ("l.json", '{"a\\u0000": ["cat"]}', "control character"),
        ("l.json", '{"a": ["cat"', "not valid JSON"),
        ("l.json", "[" * 100_000, "not valid JSON"),
        ("l.json", "", "not valid JSON"),
        ("l.json", b'{"a": ["caf\xe9"]}', "not UTF-8 text (byte 11)"),
        ("l.json", b'{"a": \x00}', "line 1: NUL"),
        ("l.csv", "image,labels\na,cat;caat\n", "l.csv line 2: unknown class 'caat'"),
        ("l.csv", "a,cat\n", "expected the header image,labels"),
        ("l.csv", "image:labels\na:cat\n", "expected the header image,labels"),
        ("l.csv", "", "expected the header"),
        ("l.csv", "image,labels\n", "holds no image"),
        ("l.csv", "image,labels\na\n", "line 2: 1 cells where the header has 2"),
        ("l.csv", "image,labels\n,cat\n", "line 2: image id '' is empty"),
        ("l.csv", 'image,labels\n"a,cat\n', "not valid CSV"),
        ("l.csv", "image,labels\n/abs/z.jpg,cat\n", "absolute"),
        ("l.csv", b"image,labels\na\x00,cat\n", "line 2: NUL"),
        ("l.txt", "a cat\nb caat\n", "l.txt line 2: unknown class 'caat'"),
        ("l.txt", "a 20\n", "class index 20; the 20 classes of 'voc12' have the indices 0 to 19"),
        ("l.txt", "\n", "holds no image"),
        ("l.txt", b"\xff\xfea\x00", "not UTF-8"),
        ("l.xlsx", "", "labels are read from .json, .csv, .txt or a folder"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    refused(write(tmp_path, name, content), reason)


def test_names_with_spaces_in_txt_bring_the_remedy(tmp_path: Path) -> None:
    refused(
        write(tmp_path, "l.txt", "a traffic light\n"), "names with spaces need a .csv or .json file", COCO
    )


def test_missing_sources_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "gone.json", "can't be read: No such file")
    refused(tmp_path / "gone", "doesn't exist")
    with pytest.raises(LabelError, match=r"x\.\.\.|x \.\.\. x.*can't be read") as caught:
        read_labels(tmp_path / ("x" * 300), IMAGES, VOC)
    assert len(str(caught.value)) < 400
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no .xml files")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt", ".jsonl", ".tsv", ".xml", ".npy"])
@pytest.mark.parametrize("kind", ["FIFO", "device", "sparse"])
def test_label_files_without_end_are_refused_at_once(tmp_path: Path, suffix: str, kind: str) -> None:
    path = endless(tmp_path / f"l{suffix}", kind)
    refused(path, "at most" if kind == "sparse" else "not a plain file")


@pytest.mark.parametrize("kind", ["FIFO", "device", "sparse"])
def test_an_annotation_without_end_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    endless(tmp_path / "a.xml", kind)
    with pytest.raises(LabelError, match=r"a\.xml.*(at most|not a plain file)"):
        read_labels(tmp_path, IMAGES, VOC)


@pytest.mark.parametrize("kind", ["FIFO", "device", "sparse"])
@pytest.mark.parametrize(
    ("name", "form"), [("a.json", "labelme"), ("a.txt", "yolo"), ("cat_train.txt", "voc-lists")]
)
def test_a_file_without_end_among_the_labels_is_refused_at_once(
    tmp_path: Path, kind: str, name: str, form: LabelFormat
) -> None:
    endless(tmp_path / name, kind)
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(LabelError, match=r"holds no \.xml files"):
        read_labels(tmp_path, IMAGES, VOC)
    with pytest.raises(LabelError, match=f"{name}.*(at most|not a plain file)"):
        read_labels(tmp_path, IMAGES, VOC, form)


def endless(path: Path, kind: str) -> Path:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    return path


def test_a_key_that_occurs_twice_among_a_million_is_found_soon(tmp_path: Path) -> None:
    names = [f'"{number}": []' for number in range(100_000)]
    (tmp_path / "l.json").write_text("{" + ",".join([*names, names[-1]]) + "}")
    began = time.process_time()
    refused(tmp_path / "l.json", "key '99999' occurs twice")
    assert time.process_time() - began < 5


def test_csv_lines_end_as_on_any_system(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "l.csv").write_bytes(f'image,x,labels{end}a,"{end}",cat{end}z,,dog'.encode())
        assert read_labels(tmp_path / "l.csv", IMAGES, VOC) == {"a": ("cat",), "z": ("dog",)}


def test_annotations_in_folders_without_end_are_refused(tmp_path: Path) -> None:
    opened = os.open(tmp_path, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=opened)
        inner = os.open("d", os.O_RDONLY, dir_fd=opened)
        os.close(opened)
        opened = inner
    os.close(opened)
    with pytest.raises(LabelError) as caught:
        read_labels(tmp_path, IMAGES, VOC)
    assert len(str(caught.value)) < 400
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own way is too long for it
