"""Images as label files of other tools name them."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path

import pytest

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.label_readers.label_table import LabelTable
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import LabelError
from wsss_pipeline.pseudo_masks.job import MaskJob

CLASSES = load_class_set("cat,dog,café")
DECOMPOSED = unicodedata.normalize("NFD", "übung")


def named(text: str, *images: str) -> str:
    """The id that a text of a label file comes to."""
    table = LabelTable(images, CLASSES)
    image_id = table.add_image(text, "labels.csv line 2")
    assert list(table.labels()) == [image_id]
    return image_id


@pytest.mark.parametrize(
    ("text", "image_id"),
    [
        ("images\\sub\\a.jpg", "sub/a"),
        ("sub\\a.jpg", "sub/a"),
        ("./sub/a.jpg", "sub/a"),
        (".\\sub\\a", "sub/a"),
        ("images/1/b.jpg", "b"),
        ("b.jpg", "b"),
        ("deep.jpg", "x/y/deep"),
        ("y/deep.jpg", "x/y/deep"),
        ("https://host.example/bucket/sub/a.jpg", "sub/a"),
        ("https://host.example/b.jpg?X-Signature=abc%2Fdef#top", "b"),
        (f"https://host.example/b.jpg?X-Signature={'a' * 3000}", "b"),
        ("s3://bucket/some/b.png", "b"),
        ("file:///home/x/b.png", "b"),
        ("https://host.example/my%20photo.jpg", "my photo"),
        ("my%20photo.jpg", "my photo"),
        ("my%20set/my%20photo.jpg", "my photo"),
        ("x%2Fy%2Fdeep.jpg", "x/y/deep"),
        ("/data/upload/3/8f3c2b1a-b.jpg", "b"),
        ("/data/upload/3/8f3c2b1a-deep.jpg", "x/y/deep"),
        ("images/1/8f3c2b1a-deep.jpg", "x/y/deep"),
        ("8f3c2b1a-my%20photo.jpg", "my photo"),
        ("/data/local-files/?d=set/sub/a.jpg", "sub/a"),
        ("/data/local-files/?d=set%5Csub%5Ca.jpg", "sub/a"),
        ("C:\\Users\\x\\images\\b.jpg", "b"),
        ("\\\\server\\share\\b.JPG", "b"),
        ("/home/x/images/sub/a.jpg", "sub/a"),
        ("übung.jpg", DECOMPOSED),
        ("https://host.example/%C3%BCbung.jpg", DECOMPOSED),
        (unicodedata.normalize("NFD", "größe"), "größe"),
        ("c.d", "c.d"),
        ("images/c.d.jpg", "c.d"),
        ("images/c.d", "c.d"),
        # no known image: an id of its own
        ("val/b.jpg", "b"),
        ("x/a.jpg", "x/a"),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFD", "é")),
        ("images\\z.jpg", "images/z"),
        ("https://host.example/p/z.jpg", "p/z"),
        ("cab00000-", "cab00000-"),
    ],
)
def test_a_name_comes_to_the_image_it_means(text: str, image_id: str) -> None:
    assert named(text, "sub/a", "b", "x/y/deep", "my photo", DECOMPOSED, "größe", "c.d") == image_id


def test_an_id_as_it_stands_always_wins() -> None:
    composed = unicodedata.normalize("NFC", DECOMPOSED)
    images = ("a", "b/a", "8f3c2b1a-a", "my%20photo", "my photo", composed, DECOMPOSED)
    for image_id in images:
        assert named(f"{image_id}.jpg", *images) == image_id


def test_most_shared_folders_win() -> None:
    assert named("set/train/a.jpg", "a", "train/a") == "train/a"
    assert named("set/a.jpg", "a", "train/a") == "a"
    assert named("set/a.jpg", "a", "x/set/a") == "x/set/a"
    assert named("train\\a.jpg", "train/a", "x/train/a") == "train/a"


@pytest.mark.parametrize("text", ["a.jpg", "/data/upload/1/8f3c2b1a-a.jpg", "https://host/a.jpg"])
def test_a_name_that_can_mean_two_images_is_refused(text: str) -> None:
    with pytest.raises(LabelError) as caught:
        named(text, "cat/a", "dog/a")
    assert str(caught.value).startswith("labels.csv line 2: ")
    assert "can mean 'cat/a' or 'dog/a'; write the path below the image folder" in str(caught.value)


def test_another_folders_image_isnt_taken() -> None:
    assert named("cat/1.jpg", "dog/1") == "cat/1"


@pytest.mark.parametrize(
    ("first", "second"),
    [("images/1/a.jpg", "images/2/a.jpg"), ("a", "images/1/a.jpg"), ("images/1/a.jpg", "a.jpg")],
)
def test_two_paths_that_come_to_mean_one_image_are_refused(tmp_path: Path, first: str, second: str) -> None:
    file = tmp_path / "l.csv"
    file.write_text(f"image,label\n{first},cat\n{first},dog\n{second},dog\n")
    with pytest.raises(LabelError, match=r"l.csv line 4: '.*a' and '.*a' come to mean one image, 'a'; write"):
        read_labels(file, {"a": Path("a.jpg")}, CLASSES)
    file.write_text(f"image,label\n{first},cat\n{first},dog\n")
    assert read_labels(file, {"a": Path("a.jpg")}, CLASSES) == {"a": ("cat", "dog")}


def test_the_same_path_in_two_spellings_adds_up(tmp_path: Path) -> None:
    file = tmp_path / "l.csv"
    file.write_text("image,label\nimages\\a.jpg,cat\nimages/a.jpg,dog\n./images/a,cat\n")
    assert read_labels(file, {"a": Path("a.jpg")}, CLASSES) == {"a": ("cat", "dog")}


def test_a_missing_image_among_absolute_paths_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "l.csv"
    file.write_text("image,label\nC:\\set\\gone.jpg,dog\nC:\\set\\a.jpg,cat\n")
    assert read_labels(file, {"a": Path("a.jpg")}, CLASSES) == {"set/gone": ("dog",), "a": ("cat",)}
    with pytest.raises(LabelError, match=r"l.csv line 2: image id 'C:/set/gone' is an absolute path"):
        read_labels(file, {"b": Path("b.jpg")}, CLASSES)


def test_images_found_by_file_name_are_told_once_with_examples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "l.json"
    file.write_text(json.dumps({f"images/1/{i}.jpg": ["cat"] for i in range(5)} | {"x\\y.jpg": ["dog"]}))
    labels = read_labels(file, {str(i): Path(f"{i}.jpg") for i in range(5)} | {"x/y": Path("y.jpg")}, CLASSES)
    assert labels == {str(i): ("cat",) for i in range(5)} | {"x/y": ("dog",)}
    assert caplog.messages == [
        "labels: 5 images are named with other folders and were found by file name: 'images/1/0' is '0', "
        "'images/1/1' is '1', 'images/1/2' is '2' and 2 more"
    ]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "../a.jpg",
            "..\\images\\a.jpg",
            "https://host/x/../../a.jpg",
            "https://host/%2e%2e/a.jpg",
            "x/%2e%2e/../a.jpg",
            "/etc/a",
        ),
        *(
            "/data/local-files/?d=../../z.jpg",
            "C:\\z.jpg",
            "a" * 20_000,
            "https://host/",
            "https://",
            "file:///",
        ),
        *("https://host/%00z.jpg", "x\\\\z.jpg", "x/\x1bz"),
    ],
)
def test_what_leads_out_of_the_folder_is_no_image(text: str) -> None:
    with pytest.raises(LabelError) as caught:
        named(text, "b" if text == "/etc/a" else "a")
    assert str(caught.value).startswith("labels.csv line 2: image id ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_many_images_of_one_file_name_are_found_in_no_time() -> None:
    table = LabelTable({f"scene/{i}/rgb": None for i in range(10_000)}, CLASSES)
    start = time.process_time()
    for i in range(10_000):
        assert table.add_image(f"set\\scene\\{i}\\rgb.jpg", "l.csv") == f"scene/{i}/rgb"
        assert table.add_image(f"gone/{i}/rgb.png", "l.csv") == f"gone/{i}/rgb"
    assert time.process_time() - start < 5  # each beside each would take minutes


def test_class_names_match_in_any_unicode_form(tmp_path: Path) -> None:
    file = tmp_path / "l.json"
    file.write_text(json.dumps({"a": [unicodedata.normalize("NFD", "café")]}))
    assert read_labels(file, {}, CLASSES) == {"a": ("café",)}
    decomposed = load_class_set(unicodedata.normalize("NFD", "café,dog"))
    assert read_labels(file, {}, decomposed) == {"a": (decomposed.names[0],)}
    file.write_text('{"a": ["café"]}')
    assert read_labels(file, {}, decomposed) == {"a": (decomposed.names[0],)}
    file.write_text(json.dumps({"a": [unicodedata.normalize("NFD", "cafés")]}))
    with pytest.raises(LabelError, match="did you mean 'café'"):
        read_labels(file, {}, CLASSES)


OTHERS = '{"a": ["cat", "tree"], "b": ["tree", "rock"], "c": []}'


def test_other_classes_are_an_error_or_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "l.json"
    file.write_text(OTHERS)
    with pytest.raises(
        LabelError, match=r"unknown class 'tree'.*to leave such labels out, add --other-classes"
    ):
        read_labels(file, {}, CLASSES)
    assert read_labels(file, {}, CLASSES, other_classes="ignore") == {"a": ("cat",), "b": (), "c": ()}
    assert caplog.messages == [
        "labels outside the class set 'cat-dog-caf' are passed over, so their objects become background: "
        "tree (2), rock (1)"
    ]


def test_other_classes_alone_say_that_the_class_set_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "l.json"
    file.write_text('{"a": ["tree"], "b": []}')
    with pytest.raises(LabelError, match=r"none is a class of 'cat-dog-caf', all are others \(tree \(1\)\)"):
        read_labels(file, {}, CLASSES, other_classes="ignore")


def test_class_indices_dont_go_with_a_part_of_the_classes(tmp_path: Path) -> None:
    file = tmp_path / "l.txt"
    file.write_text("a 0\n")
    with pytest.raises(LabelError, match="line 1: class index 0: with --other-classes ignore labels must be"):
        read_labels(file, {}, CLASSES, other_classes="ignore")


def test_coco_categories_outside_the_classes_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "l.json"
    categories = [{"id": 1, "name": "tree"}, {"id": 2, "name": "dog"}]
    annotations = [{"image_id": 5, "category_id": 1}, {"image_id": 5, "category_id": 2}]
    images = [{"id": 5, "file_name": "images\\1\\a.jpg"}]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    assert read_labels(file, {"a": Path("a.jpg")}, CLASSES, other_classes="ignore") == {"a": ("dog",)}


FORMS: dict[str, dict[str, str]] = {
    "l.csv": {"l.csv": "filename,cat,dog,tree\na.jpg,1,0,1\nb.jpg,0,1,0\n"},
    "l.jsonl": {
        "l.jsonl": '{"file_name": "a.jpg", "labels": ["cat", "tree"]}\n{"file_name": "b.jpg", "labels": ["dog"]}\n'
    },
    "xml": {
        f"xml/{name}.xml": f"<annotation><object><name>{label}</name></object>{more}</annotation>"
        for name, label, more in (
            ("a", "cat", "<object><name>tree</name></object>"),
            ("b", "dog", ""),
        )
    },
    "yolo": {"yolo/classes.txt": "tree\ncat\ndog\n", "yolo/a.txt": "0 .5 .5 .1 .1\n1 .5 .5 .1 .1\n"}
    | {"yolo/b.txt": "2 .5 .5 .1 .1\n"},
    "lists": {
        "lists/cat_train.txt": "a  1\nb -1\n",
        "lists/dog_train.txt": "a -1\nb  1\n",
        "lists/tree_train.txt": "a  1\nb -1\n",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_other_classes_are_passed_over_in_every_form(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    for name, text in FORMS[form].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    images = {name: Path(f"{name}.jpg") for name in ("a", "b")}
    labels = read_labels(tmp_path / form, images, CLASSES, other_classes="ignore")
    assert labels == {"a": ("cat",), "b": ("dog",)}
    told = (
        "tree" if form == "l.csv" else "tree (1)"
    )  # of a column that is none of the classes nothing more is read
    assert caplog.messages[0].endswith(f"so their objects become background: {told}")


def test_data_sets_can_pass_over_other_classes(tmp_path: Path) -> None:
    write_voc_folder(tmp_path / "voc", seed=3, scenes={"train": 4}, size=(64, 48))
    annotations = tmp_path / "voc/Annotations"
    whole = MaskJob.read(voc=tmp_path / "voc", split="train", classes="demo").labels
    name = whole["train_00000"][0]
    part = {image_id: tuple(known for known in names if known == name) for image_id, names in whole.items()}
    given = {"split": "train", "classes": f"{name},", "other_classes": "ignore"}
    assert MaskJob.read(voc=tmp_path / "voc", **given).labels == part
    annotations.rename(tmp_path / "gone")
    (tmp_path / "voc/labels.json").write_text(json.dumps(whole))
    assert MaskJob.read(voc=tmp_path / "voc", **given).labels == part
    numbers = {known: number for number, known in enumerate(load_class_set("demo").names)}
    coco = {
        "images": [{"id": i, "file_name": f"{image_id}.jpg"} for i, image_id in enumerate(whole)],
        "annotations": [
            {"image_id": i, "category_id": numbers[known]}
            for i, names in enumerate(whole.values())
            for known in names
        ],
        "categories": [{"id": number, "name": known} for known, number in numbers.items()],
    }
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/instances_train.json").write_text(json.dumps(coco))
    (tmp_path / "voc/JPEGImages").rename(tmp_path / "coco/train")
    assert MaskJob.read(coco=tmp_path / "coco", **given).labels == part
