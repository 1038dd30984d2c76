"""Label files as other tools write them: read as what they say, whatever their names, or refused."""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from wsss_pipeline.config import LabelFormat
from wsss_pipeline.data.classes import ClassSet, load_class_set
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import ConfigError, LabelError

PETS = load_class_set("cat,dog,tall tree")
IMAGES = {name: Path(f"/images/{name}.jpg") for name in ("a", "b", "c")}
LABELS = {"a": ("cat", "tall tree"), "b": ("dog",), "c": ()}


def npy(labels: dict[Any, Any], protocol: int | None = None) -> bytes:
    """What ``np.save`` writes; with another protocol what other versions of numpy write."""
    file = io.BytesIO()
    np.save(file, labels, allow_pickle=True)  # type: ignore[arg-type]
    if protocol is None:
        return file.getvalue()
    head = file.getvalue().index(b"\n") + 1
    return file.getvalue()[:head] + pickle.dumps(np.array(labels, dtype=object), protocol=protocol)


VECTORS = {"a": [1, 0, 1], "b": [0, 1, 0], "c": [0, 0, 0]}
ONEHOT = npy({key: np.array(value, np.float32) for key, value in VECTORS.items()})

VOC_XML = "<annotation><filename>{0}.jpg</filename>{1}</annotation>"
OBJECT = "<object><name>{}</name><bndbox><xmin>1</xmin></bndbox></object>"

CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><id>4</id><labels><label><name>dog</name></label><label><name>other</name></label></labels></task></meta>
  <image id="0" name="a.jpg" width="4" height="3">
    <box label="cat" source="manual" occluded="0" xtl="1.0" ytl="1.0" xbr="2.0" ybr="2.0" z_order="0">
      <attribute name="fur">long</attribute>
    </box>
    <polygon label="tall tree" source="manual" occluded="0" points="1.0,1.0;2.0,1.0;1.0,2.0" z_order="0"></polygon>
    <mask label="cat" source="semi-auto" occluded="0" rle="3, 4" left="1" top="1" width="2" height="2"></mask>
  </image>
  <image id="1" name="b.jpg" width="4" height="3"><tag label="dog" source="manual"></tag></image>
  <image id="2" name="c.jpg" width="4" height="3"></image>
</annotations>"""

COCO = {
    "info": {"description": "pets"},
    "images": [{"id": n, "file_name": f"{n}.jpg", "width": 4, "height": 3} for n in "abc"],
    "categories": [{"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "tall tree"}],
    "annotations": [
        {"id": 1, "image_id": "a", "category_id": 5, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
        {"id": 2, "image_id": "a", "category_id": 9, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
        {"id": 3, "image_id": "b", "category_id": 7, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
    ],
}
PANOPTIC = COCO | {
    "annotations": [
        {
            "image_id": "a",
            "file_name": "a.png",
            "segments_info": [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 9}],
        },
        {"image_id": "b", "file_name": "b.png", "segments_info": [{"id": 3, "category_id": 7, "iscrowd": 0}]},
    ],
}


def labelme(image: str, flags: dict[str, bool], *labels: str) -> str:
    shapes = [
        {
            "label": label,
            "points": [[1.0, 1.0], [2.0, 2.0]],
            "group_id": None,
            "shape_type": "rectangle",
            "flags": {},
        }
        for label in labels
    ]
    return json.dumps(
        {
            "version": "5.4.1",
            "flags": flags,
            "shapes": shapes,
            "imagePath": image,
            "imageData": None,
            "imageHeight": 3,
            "imageWidth": 4,
        }
    )


def result(kind: str, *labels: str) -> dict[str, Any]:
    value = {"x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0, "rotation": 0, kind: list(labels)}
    return {
        "id": "Dx",
        "from_name": "label",
        "to_name": "image",
        "type": kind,
        "value": value,
        "origin": "manual",
    }


def task(number: int, image: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": number,
        "data": {"image": image},
        "annotations": list(annotations),
        "project": 1,
        "predictions": [{"result": [result("rectanglelabels", "no class")]}],
    }


TASKS = [
    task(
        1,
        "a.jpg",
        {"id": 1, "was_cancelled": False, "result": [result("rectanglelabels", "cat"), {"type": "relation"}]},
        {"id": 2, "was_cancelled": False, "result": [result("brushlabels", "tall tree")]},
        {"id": 3, "was_cancelled": True, "result": [result("choices", "dog")]},
    ),
    task(2, "b.jpg", {"id": 4, "was_cancelled": False, "result": [result("choices", "dog")]}),
    task(3, "c.jpg", {"id": 5, "was_cancelled": False, "result": []}),
]
OWN = {"annotator": 1, "annotation_id": 1, "created_at": "2026", "updated_at": "2026", "lead_time": 1.5}
JSON_MIN = [
    {
        "image": "a.jpg",
        "id": 1,
        "label": [{"x": 1.0, "rectanglelabels": ["cat"], "original_width": 4}],
        **OWN,
    },
    {"image": "a.jpg", "id": 1, "label": [{"points": [[1, 2]], "polygonlabels": ["tall tree"]}], **OWN},
    {"image": "b.jpg", "id": 2, "choice": "dog", **OWN},
    {"image": "c.jpg", "id": 3, **OWN},
]
LABEL_STUDIO_CSV = """annotation_id,annotator,choice,created_at,id,image,lead_time,updated_at
1,1,"{""choices"":[""cat"",""tall tree""]}",2026,1,a.jpg,1.5,2026
2,1,dog,2026,2,b.jpg,1.5,2026
3,1,,2026,3,c.jpg,1.5,2026
"""

DETECTIONS = {
    "_cls": "Detections",
    "detections": [{"_cls": "Detection", "label": n} for n in ("cat", "tall tree")],
}
SAMPLES = {
    "samples": [
        {
            "filepath": "a.jpg",
            "tags": ["train"],
            "metadata": None,
            "_media_type": "image",
            "ground_truth": DETECTIONS,
        },
        {
            "filepath": "b.jpg",
            "tags": [],
            "ground_truth": {"_cls": "Detections", "detections": [{"label": "dog"}]},
        },
        {"filepath": "c.jpg", "tags": [], "ground_truth": None},
    ]
}
YAML = "path: ../pets\ntrain: train/images\nnc: 3\nnames: ['dog', 'cat', 'tall tree']\n"
YOLO = {"a.txt": "1 0.5 0.5 0.25 0.25\n2 0.1 0.1 0.2 0.1 0.2 0.2\n", "b.txt": "0 0.5 0.5 1 1\n", "c.txt": ""}

# name of the form, files, and the one to read
CASES: dict[str, tuple[LabelFormat, dict[str, str | bytes], str]] = {
    "names by id": ("json", {"l.json": json.dumps({k: list(v) for k, v in LABELS.items()})}, "l.json"),
    "one name": ("json", {"l.json": '{"a": ["cat", "tall tree"], "b": "dog", "c": []}'}, "l.json"),
    "counts by name": (
        "json",
        {"l.json": '{"a": {"cat": 1, "dog": 0, "tall tree": true}, "b": {"dog": 1}, "c": {}}'},
        "l.json",
    ),
    "vectors by id": ("json-onehot", {"l.json": json.dumps(VECTORS)}, "l.json"),
    "names and indices in text": ("txt", {"l.txt": "a 0 2\nb.jpg dog\nc\n"}, "l.txt"),
    "vectors in text": ("txt-onehot", {"l.txt": "a 1 0 1\nb.jpg 0 1 0\nc 0 0 0\n"}, "l.txt"),
    "numpy": ("npy", {"cls_labels_onehot.npy": ONEHOT}, "cls_labels_onehot.npy"),
    "metadata.jsonl": (
        "records",
        {
            "metadata.jsonl": '{"file_name": "a.jpg", "objects": {"bbox": [], "category": ["cat", "tall tree"]}}\n'
            '{"file_name": "b.jpg", "objects": {"bbox": [], "category": ["dog"]}}\n'
            '{"file_name": "c.jpg", "objects": {"bbox": [], "category": []}}\n'
        },
        "metadata.jsonl",
    ),
    "JSON lines under .json": (
        "records",
        {
            "l.json": '{"image": "a", "labels": ["cat", "tall tree"]}\n{"image": "b", "labels": "dog"}\n'
            '{"image": "c", "labels": null}'
        },
        "l.json",
    ),
    "records": (
        "records",
        {
            "l.json": json.dumps(
                [{"path": f"{k}.jpg", "classes": [{"label": n} for n in v]} for k, v in LABELS.items()]
            )
        },
        "l.json",
    ),
    "vectors in records": (
        "records",
        {"l.json": json.dumps([{"image": k, "labels": v} for k, v in VECTORS.items()])},
        "l.json",
    ),
    "one-hot records": (
        "records-onehot",
        {
            "l.json": json.dumps(
                [{"id": k, **dict(zip(PETS.names, v, strict=True)), "n": 3} for k, v in VECTORS.items()]
            )
        },
        "l.json",
    ),
    "semicolons between cells": (
        "csv",
        {"l.csv": 'filename;tags\na.jpg;cat,tall tree\nb.jpg;dog\n"c.jpg";\n'},
        "l.csv",
    ),
    "tabs": (
        "csv",
        {"l.tsv": "Path\tClass Name\na.jpg\tcat\na.jpg\ttall tree\nb.jpg\tdog\nc.jpg\t\n"},
        "l.tsv",
    ),
    "CSV under .txt": (
        "csv",
        {"l.txt": 'image_path,categories\na.jpg,"cat, tall tree"\nb.jpg,dog\nc.jpg,\n'},
        "l.txt",
    ),
    "NIH": (
        "csv",
        {
            "Data_Entry.csv": "Image Index,Finding Labels,Follow-up #,Patient ID\na.jpg,cat|tall tree,0,1\n"
            "b.jpg,dog,0,1\nc.jpg,No Finding,1,2\n"
        },
        "Data_Entry.csv",
    ),
    "lists as pandas prints them": (
        "csv",
        {"l.csv": "file,labels\na,\"['cat', 'tall tree']\"\nb,['dog']\nc,[]\n"},
        "l.csv",
    ),
    "Roboflow": (
        "csv-onehot",
        {
            "_classes.csv": "filename, cat, dog, tall tree, Unlabeled\na.jpg, 1, 0, 1, 0\nb.jpg, 0, 1, 0, 0\n"
            "c.jpg, 0, 0, 0, 1\n"
        },
        "_classes.csv",
    ),
    "Kaggle": (
        "csv-onehot",
        {
            "train.csv": "image_id,dog,cat,tall tree,width\na,0,1.0,1.0,640\nb,1,0.0,0.0,640\nc,0,0.0,0.0,640\n"
        },
        "train.csv",
    ),
    "COCO with text ids": ("coco", {"l.json": json.dumps(COCO)}, "l.json"),
    "COCO panoptic": ("coco", {"l.json": json.dumps(PANOPTIC)}, "l.json"),
    "LabelMe": (
        "labelme",
        {
            "m/a.json": labelme("..\\images\\a.jpg", {"cat": True, "dog": False}, "tall tree", "__ignore__"),
            "m/b.json": labelme("b.jpg", {}, "dog", "dog"),
            "m/c.json": labelme("IMG_0003.jpg", {}, "_background_"),
        },
        "m",
    ),
    "Label Studio": ("label-studio", {"l.json": json.dumps(TASKS)}, "l.json"),
    "Label Studio JSON-MIN": ("label-studio", {"l.json": json.dumps(JSON_MIN)}, "l.json"),
    "Label Studio CSV": ("label-studio", {"l.csv": LABEL_STUDIO_CSV}, "l.csv"),
    "CVAT": ("cvat", {"annotations.xml": CVAT}, "annotations.xml"),
    "Create ML": (
        "createml",
        {
            "l.json": json.dumps(
                [
                    {
                        "image": f"{k}.jpg",
                        "annotations": [{"label": n, "coordinates": {"x": 1, "y": 1}} for n in v],
                    }
                    for k, v in LABELS.items()
                ]
            )
        },
        "l.json",
    ),
    "FiftyOne classification": (
        "fiftyone",
        {
            "labels.json": json.dumps(
                {"classes": ["cat", "dog", "tall tree"], "labels": {"a": [0, 2], "b": 1, "c": None}}
            )
        },
        "labels.json",
    ),
    "FiftyOne detection": (
        "fiftyone",
        {
            "labels.json": json.dumps(
                {
                    "classes": ["cat", "dog"],
                    "labels": {
                        "a": [{"label": 0}, {"label": "tall tree", "bounding_box": [0, 0, 1, 1]}],
                        "b": [{"label": 1}],
                        "c": [],
                    },
                }
            )
        },
        "labels.json",
    ),
    "FiftyOne samples": ("fiftyone", {"samples.json": json.dumps(SAMPLES)}, "samples.json"),
    "YOLO": ("yolo", {f"d/labels/{k}": v for k, v in YOLO.items()} | {"d/data.yaml": YAML}, "d/labels"),
    "Darknet": (
        "yolo",
        {f"d/{k}": v for k, v in YOLO.items()} | {"d/classes.txt": "dog\ncat\ntall tree\n"},
        "d",
    ),
    "VOC": (
        "voc-xml",
        {f"d/{k}.xml": VOC_XML.format(k, "".join(map(OBJECT.format, v))) for k, v in LABELS.items()},
        "d",
    ),
    "VOC's lists": (
        "voc-lists",
        {
            "Main/cat_train.txt": "a  1\nb -1\nc -1\n",
            "Main/dog_train.txt": "a -1\nb  0\nc -1\n",
            "Main/tall tree_train.txt": "a  1\nb -1\nc -1\n",
            "Main/train.txt": "a\nb\nc\n",
        },
        "Main",
    ),
}


def written(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", CASES)
def test_a_form_is_recognised_or_insisted_on(tmp_path: Path, case: str) -> None:
    form, files, name = CASES[case]
    written(tmp_path, files)
    assert read_labels(tmp_path / name, IMAGES, PETS) == LABELS
    assert read_labels(tmp_path / name, IMAGES, PETS, form) == LABELS


def test_no_form_is_left_out() -> None:
    assert {form for form, _, _ in CASES.values()} == set(get_args(LabelFormat))


def refusal(path: Path, classes: ClassSet = PETS, form: LabelFormat | None = None) -> str:
    with pytest.raises(LabelError) as caught:
        read_labels(path, IMAGES, classes, form)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("files", "name", "reasons"),
    [
        ({"l.txt": "a 0 1\nb 1 0\n"}, "l.txt", ["txt or txt-onehot", "--labels-format"]),
        ({"l.json": '{"a": [0, 1], "b": [1, 0]}'}, "l.json", ["json or json-onehot", "--labels-format"]),
        ({"l.csv": "image,label,cat,dog\na,cat,1,0\n"}, "l.csv", ["csv or csv-onehot", "--labels-format"]),
        ({"l.csv": "id,filename,label\n1,a.jpg,cat\n"}, "l.csv", ["'id' and 'filename'", "the image"]),
        ({"l.csv": "image,class,labels\na,cat,dog\n"}, "l.csv", ["'class' and 'labels'"]),
        ({"l.json": '[{"image": "a", "labels": [0, 1]}]'}, "l.json", ["may be indices of classes"]),
        (
            {"d/a.xml": VOC_XML.format("a", OBJECT.format("cat")), "d/b.json": labelme("b.jpg", {}, "dog")},
            "d",
            ["voc-xml or labelme"],
        ),
    ],
)
def test_where_two_readings_are_possible_both_are_named(
    tmp_path: Path, files: dict[str, str | bytes], name: str, reasons: list[str]
) -> None:
    written(tmp_path, files)
    message = refusal(tmp_path / name, load_class_set("cat,dog"))
    assert all(reason in message for reason in reasons), message


def test_images_may_be_called_like_classes(tmp_path: Path) -> None:
    written(tmp_path, {"l.json": '{"cat": ["dog"], "dog": []}', "l.csv": "image,labels\ncat,dog\n"})
    assert read_labels(tmp_path / "l.json", {}, PETS) == {"cat": ("dog",), "dog": ()}
    assert read_labels(tmp_path / "l.csv", {}, PETS) == {"cat": ("dog",)}
    written(tmp_path, {"l.json": '{"cat": ["dgo"], "dog": ["cta"]}'})
    with pytest.raises(LabelError, match="unknown class 'dgo'"):
        read_labels(tmp_path / "l.json", {"cat": Path("cat.jpg")}, PETS)


def test_images_of_yolo_lie_beside_the_labels_or_are_given_alone(tmp_path: Path) -> None:
    files = {f"train/labels/{name}": content for name, content in YOLO.items()}
    written(tmp_path, files | {"data.yaml": YAML, "README.roboflow.txt": "hello"})
    assert read_labels(tmp_path, IMAGES, PETS) == LABELS
    whole = {f"train/images/{name}": Path(f"{name}.jpg") for name in LABELS}
    assert read_labels(tmp_path, whole, PETS) == {
        f"train/images/{name}": names for name, names in LABELS.items()
    }
    written(tmp_path, {"valid/labels/a.txt": "0 0.5 0.5 1 1\n"})
    with pytest.raises(LabelError, match="image 'a' has two records"):
        read_labels(tmp_path, IMAGES, PETS)
    assert read_labels(tmp_path, whole, PETS)["valid/images/a"] == ("dog",)


def test_other_files_in_a_folder_are_no_labels(tmp_path: Path) -> None:
    _, files, _ = CASES["VOC"]
    others = {"d/notes.txt": b"caf\xe9", "d/coco.json": b"{", "d/a.txt": b"\0", "d/b.json": b"[1]"}
    written(tmp_path, {**files, **others})
    assert read_labels(tmp_path / "d", IMAGES, PETS) == LABELS


@pytest.mark.parametrize(
    "written",
    [
        "/data/upload/7/8f3c2b1a-{}.jpg",
        "/data/local-files/?d=pets%5C{}.jpg",
        "https://host/pets/{}.jpg?sign=1",
        "C:\\pets\\{}.jpg",
        "s3://bucket/pets/{}.jpg",
    ],
)
@pytest.mark.parametrize(
    "case", ["Label Studio", "Label Studio JSON-MIN", "Label Studio CSV", "COCO with text ids"]
)
def test_images_are_found_by_how_tools_write_them(tmp_path: Path, case: str, written: str) -> None:
    form, files, name = CASES[case]
    content = str(files[name])
    for image in LABELS:
        there = written.format(image)
        content = content.replace(f"{image}.jpg", json.dumps(there)[1:-1] if name.endswith("json") else there)
    (tmp_path / name).write_text(content)
    assert read_labels(tmp_path / name, IMAGES, PETS) == LABELS
    assert read_labels(tmp_path / name, IMAGES, PETS, form=form) == LABELS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "ImageID,Source,LabelName,Confidence\na,crowd,cat,1\na,crowd,dog,0\nb,crowd,dog,1\n"),
        ("l.jsonl", '{"image": "a", "label": "cat", "score": 1.0}\n{"image": "a", "label": "dog", "score": 0}\n'
         '{"image": "b", "label": "dog", "score": 1}\n'),
    ],
)  # fmt: skip
def test_a_label_that_was_looked_for_in_vain_does_not_count(tmp_path: Path, name: str, text: str) -> None:
    written(tmp_path, {name: text})
    assert read_labels(tmp_path / name, IMAGES, PETS) == {"a": ("cat",), "b": ("dog",)}


def test_a_spreadsheet_may_be_told_its_separator(tmp_path: Path) -> None:
    written(tmp_path, {"l.csv": "sep=;\nimage;labels\na.jpg;cat,dog\nb.jpg;dog\n"})
    assert read_labels(tmp_path / "l.csv", IMAGES, PETS) == {"a": ("cat", "dog"), "b": ("dog",)}


def test_suffixes_of_label_files_in_capitals(tmp_path: Path) -> None:
    written(tmp_path, {"v/a.XML": VOC_XML.format("a", "<object><name>cat</name></object>")})
    written(
        tmp_path, {"y/a.TXT": "1 0.5 0.5 1 1\n", "y/data.yaml": YAML, "l/a.JSON": labelme("a.jpg", {}, "cat")}
    )
    for folder in "vyl":
        assert read_labels(tmp_path / folder, IMAGES, PETS) == {"a": ("cat",)}


def test_insisting_chooses_one_of_two_readings(tmp_path: Path) -> None:
    written(tmp_path, {"l.txt": "a 0 1\nb 1 0\n", "l.csv": "image,label,cat,dog\na,cat,0,1\n"})
    two = load_class_set("cat,dog")
    assert read_labels(tmp_path / "l.txt", IMAGES, two, "txt") == {"a": ("cat", "dog"), "b": ("dog", "cat")}
    assert read_labels(tmp_path / "l.txt", IMAGES, two, "txt-onehot") == {"a": ("dog",), "b": ("cat",)}
    assert read_labels(tmp_path / "l.csv", IMAGES, two, "csv") == {"a": ("cat",)}
    assert read_labels(tmp_path / "l.csv", IMAGES, two, "csv-onehot") == {"a": ("dog",)}


@pytest.mark.parametrize(
    ("files", "name", "reason"),
    [
        ({"train.txt": "a.jpg\nb.jpg\n"}, "train.txt", "names 2 images and no class of any"),
        ({"l.json": '{"a": []}'}, "l.json", "no class of any"),
        ({"l.csv": "image,labels\na,\n"}, "l.csv", "no class of any"),
        ({"d/a.xml": VOC_XML.format("a", "")}, "d", "no class of any"),
        ({"l.npy": npy({"a": np.zeros(3)})}, "l.npy", "no class of any"),
        (
            {"l.npy": npy({"a": np.zeros(4)})},
            "l.npy",
            "4 numbers for the 3 classes of 'cat-dog-tall-tree': the first or",
        ),
        ({"l.npy": npy({"a": np.zeros(20)})}, "l.npy", "20 numbers for the 3 classes"),
        ({"l.npy": npy({"a": np.full(3, 0.5)})}, "l.npy", "0.5 among its numbers"),
        ({"l.npy": npy({"a": [0] * 20_000})}, "l.npy", "20,000 values"),
        ({"l.npy": npy({"a": np.zeros(20_000)})}, "l.npy", "isn't a vector of labels"),
        ({"l.npy": npy({"a": np.zeros((3, 1))})}, "l.npy", "isn't a vector of labels"),
        ({"l.npy": npy({"a": np.array(["x"] * 3)})}, "l.npy", "'x' among its numbers"),
        ({"l.npy": npy({2**70: np.zeros(3)})}, "l.npy", "more than 64 bits"),
        ({"l.npy": npy(np.zeros((5, 3)))}, "l.npy", "without image ids"),  # type: ignore[arg-type]
        ({"l.txt": "a 0 1 0 0\nb 0 0 0 1\n"}, "l.txt", "4 numbers for the 3 classes"),
        ({"cat_train.txt": "a -1\nb  1\n"}, "cat_train.txt", "ImageSets/Main"),
        ({"l.json": '{"cat": ["a.jpg"], "dog": ["b.jpg"]}'}, "l.json", "each key is a class"),
        ({"l.json": '{"a": [3]}'}, "l.json", "3 in its list isn't text"),
        ({"l.txt": "a.jpg,cat\nb.jpg,dog\n"}, "l.txt", "line 1: 'a.jpg,cat' has commas"),
        ({"l.csv": "version https://git-lfs.github.com/spec/v1\noid x\n"}, "l.csv", "git lfs pull"),
        ({"l.json": '{"a": {"cat": 0.7}}'}, "l.json", "'cat' is 0.7"),
        ({"l.json": '[{"file_name": "a.jpg", "label": 3}]'}, "l.json", "labels are 3"),
        ({"l.json": '[{"file_name": "a.jpg", "text": "a cat"}]'}, "l.json", "expected records like"),
        ({"l.json": '[{"image": "a", "label": "cat"}, {"image": "b"}]'}, "l.json", "record 2: no 'label'"),
        ({"l.csv": "filename,cat,dog,bird\na,1,0,0\nb,0,0,1\n"}, "l.csv", "unknown class 'bird'"),
        ({"l.csv": "filename,cat,dog\na,0.7,0.3\n"}, "l.csv", "line 2: 'cat' is '0.7'; it takes 0 or 1"),
        ({"l.csv": "filename,cat,dog\na,1\n"}, "l.csv", "line 2: 2 cells where the header has 3"),
        ({"l.csv": "image,tags\na,cat big\n"}, "l.csv", "unknown class 'cat big'"),
        ({"l.csv": "a.jpg,cat\n"}, "l.csv", "expected the header image,labels"),
        ({"l.json": json.dumps(COCO | {"annotations": None})}, "l.json", "'annotations' takes a list"),
        (
            {"l.json": json.dumps({"images": [], "categories": []})},
            "l.json",
            "'annotations' takes a list, not nothing",
        ),
        (
            {"l.json": json.dumps([{"id": 1, "data": {"image": "a.jpg"}, "annotations": [7]}])},
            "l.json",
            "without 'result'",
        ),
        (
            {"l.json": json.dumps({"samples": [{"filepath": "a", "x": DETECTIONS, "y": DETECTIONS}]})},
            "l.json",
            "'x' and 'y'",
        ),
        ({"l.json": json.dumps({"classes": ["cat"], "labels": {"a": 1}})}, "l.json", "class 1 isn't among"),
        (
            {"l.json": '[{"image": "a.jpg", "annotations": [{"coordinates": {}}]}]'},
            "l.json",
            "'label' is None",
        ),
        ({"l.xml": "<annotations><track id='0' label='cat'/></annotations>"}, "l.xml", "tracks of a video"),
        ({"l.xml": "<!DOCTYPE a><annotations/>"}, "l.xml", "isn't safe"),
        ({"d/annotations.xml": CVAT}, "d", "give CVAT's file itself"),
        ({"d/_annotations.coco.json": json.dumps(COCO)}, "d", "no .xml files of VOC, .json of LabelMe"),
        ({"d/a.json": labelme("a.jpg", {}, "cat"), "d/b.json": "{}"}, "d", "b.json: not a file of LabelMe's"),
        ({"d/a.txt": "0 0.5 0.5 1 1\n"}, "d", "no data.yaml, classes.txt or obj.names"),
        ({"d/a.txt": "3 0.5 0.5 1 1\n", "d/data.yaml": YAML}, "d", "class number 3"),
        (
            {"d/a.txt": "0 0.5 0.5 1 1\n0 cat\n", "d/data.yaml": YAML},
            "d",
            "a.txt line 2: expected a class number",
        ),
        (
            {"d/cat_train.txt": "a 1\n", "d/cat_val.txt": "a -1\n"},
            "d",
            "is present in one and absent in the other",
        ),
        ({"d/notes.txt": "hello\n"}, "d", "name a folder of labels or a label file"),
        ({"l.csv": "ImageID,Label,Confidence\na,cat,0.7\n"}, "l.csv", "line 2: 'Confidence' is '0.7'; keep"),
        ({"l.json": '[{"image": "a", "label": "cat", "score": 0.7}]'}, "l.json", "'score' is '0.7'"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, files: dict[str, str | bytes], name: str, reason: str
) -> None:
    written(tmp_path, files)
    assert reason in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "once", "again", "other"),
    [
        ("l.csv", "image,labels\na,cat;dog\n", "a.jpg,dog;cat\n", "a,dog\n"),
        ("l.txt", "a cat dog\n", "a.jpg dog cat\n", "a dog\n"),
        ("l.jsonl", '{"image": "a", "labels": ["cat", "dog"]}\n', '{"image": "a.jpg", "labels": ["dog", "cat"]}\n',
         '{"image": "a", "labels": []}\n'),
        ("l.csv", "image,cat,dog\na,1,1\n", "a.jpg,1,1\n", "a,0,1\n"),
    ],
)  # fmt: skip
def test_a_second_record_of_an_image_says_the_same_or_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, once: str, again: str, other: str
) -> None:
    caplog.set_level(logging.WARNING)
    written(tmp_path, {name: once + again * 30})
    assert read_labels(tmp_path / name, IMAGES, PETS) == {"a": ("cat", "dog")}
    messages = [record.message for record in caplog.records]
    first = len(once.splitlines())
    assert f"line {first + 1}" in messages[0].replace("record", "line")
    assert f"line {first};" in messages[0].replace("record", "line")
    assert len(messages) == 21
    assert messages[-1] == "and 10 more records of images that have one already"
    written(tmp_path, {name: once + other})
    message = refusal(tmp_path / name).replace("record ", "line ")
    assert f"line {first} and " in message
    assert f"line {first + 1}: image 'a' has two" in message


def test_entries_of_one_image_under_two_names_contradict_each_other(tmp_path: Path) -> None:
    written(tmp_path, {"l.json": '{"a": ["cat"], "a.jpg": ["dog"]}'})
    assert "image 'a' has two records, cat and dog" in refusal(tmp_path / "l.json")
    twins = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}]}
    annotations = {"annotations": [{"image_id": 1, "category_id": 5}, {"image_id": 2, "category_id": 7}]}
    written(tmp_path, {"l.json": json.dumps(COCO | twins | annotations)})
    assert "images[0] and" in refusal(tmp_path / "l.json")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8, np.int64, np.bool_])
def test_numpy_files_of_any_version_are_read(tmp_path: Path, protocol: int, core: bytes, kind: type) -> None:
    labels = {"a": np.array([1, 0, 1], kind), np.str_("b"): np.array([0, 1, 0], ">f4"), "c": [0, 0, 0]}
    content = npy(labels, protocol)
    if protocol < 4:  # later ones hold lengths
        content = content.replace(b"numpy._core", core)
    written(tmp_path, {"l.npy": content})
    assert read_labels(tmp_path / "l.npy", IMAGES, PETS) == LABELS


def test_numbers_for_ids_are_matched_where_one_image_has_them(tmp_path: Path) -> None:
    images = {
        name: Path(f"{name}.jpg") for name in ("2007_000032", "COCO_train2014_000000000009", "x/000000123")
    }
    vector = np.array([1, 0, 0], np.float32)
    written(tmp_path, {"l.npy": npy({2007000032: vector, 9: vector, np.int64(123): vector, 77: vector})})
    assert list(read_labels(tmp_path / "l.npy", images, PETS)) == [*images, "77"]
    twins = {name: Path(f"{name}.jpg") for name in ("train_0009", "val_0009")}
    written(tmp_path, {"l.npy": npy({9: vector})})
    with pytest.raises(LabelError, match="may be 'train_0009' or 'val_0009'"):
        read_labels(tmp_path / "l.npy", twins, PETS)


class _Runs:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_in_a_numpy_file_runs(tmp_path: Path, protocol: int) -> None:
    import os

    owned = tmp_path / "owned"
    for call in (_Runs(os.mkdir, str(owned)), _Runs(eval, f"__import__('os').mkdir({str(owned)!r})")):
        written(tmp_path, {"l.npy": npy({"a": call}, protocol)})
        assert "which labels never need" in refusal(tmp_path / "l.npy")
    assert not owned.exists()


def test_insisting_on_a_form_that_a_file_never_has(tmp_path: Path) -> None:
    written(tmp_path, {"l.json": "{}", "d/a.xml": ""})
    assert "is never in the form csv" in refusal(tmp_path / "l.json", form="csv")
    assert "a folder is never in the form coco" in refusal(tmp_path / "d", form="coco")
    with pytest.raises(ConfigError, match="no labels format 'xls'"):
        read_labels(tmp_path / "l.json", IMAGES, PETS, "xls")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="goes with --labels"):
        read_labels(None, IMAGES, PETS, "csv")
