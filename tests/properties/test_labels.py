"""Whatever labels there are: each form of file says the same, and bytes of any kind are an error or a result."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import IMAGE_SUFFIXES, UNREAD_SUFFIXES, check_image_id
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import LabelError

VOC = load_class_set("voc12")


def is_safe(image_id: str) -> bool:
    try:
        check_image_id(image_id, "here")
    except LabelError:
        return False
    return True


ids = st.text(min_size=1, max_size=40).filter(
    lambda text: (
        is_safe(text)
        and text == text.strip()
        and not text.lower().endswith((*IMAGE_SUFFIXES, *UNREAD_SUFFIXES))
        and "\ufeff" not in text
        and unicodedata.is_normalized("NFC", text)  # the form that an id gets which is no known image's
    )
)
names = st.lists(st.sampled_from(VOC.names), unique=True, max_size=5).map(tuple)
labels = st.dictionaries(ids, names, min_size=1, max_size=8).filter(lambda table: any(table.values()))


@given(labels)
def test_json_and_csv_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, tuple[str, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    (folder / "l.json").write_text(json.dumps(table), "utf-8")
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["image", "labels"])
    rows.writerows([image, ";".join(found)] for image, found in table.items())
    (folder / "l.csv").write_bytes(text.getvalue().encode("utf-8"))
    single = io.StringIO(newline="")
    rows = csv.writer(single)
    rows.writerow(["image", "label"])
    rows.writerows([image, name] for image, found in table.items() for name in found or ("",))
    (folder / "single.csv").write_bytes(single.getvalue().encode("utf-8"))
    for file in ("l.json", "l.csv", "single.csv"):
        assert read_labels(folder / file, {}, VOC) == table


@given(labels)
def test_lines_say_the_same_where_ids_have_no_white_space(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, tuple[str, ...]]
) -> None:
    table = {image: found for image, found in table.items() if len(image.split()) == 1}
    if not any(table.values()):
        return
    file = tmp_path_factory.mktemp("labels") / "l.txt"
    file.write_text("".join(f"{image} {' '.join(found)}\n" for image, found in table.items()), "utf-8")
    assert read_labels(file, {}, VOC) == table


texts = st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))


@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt", ".xml"])
@given(content=st.one_of(st.binary(max_size=300), texts))
def test_any_bytes_are_labels_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    file = folder / f"l{suffix}"
    file.write_bytes(content)
    refusal = ""
    found: dict[str, tuple[str, ...]] = {}
    try:
        found = read_labels(folder if suffix == ".xml" else file, {}, VOC)
    except LabelError as error:
        refusal = str(error)
    assert bool(refusal) != bool(found)
    assert len(refusal) < 600
    assert all(is_safe(image_id) and set(given) <= set(VOC.names) for image_id, given in found.items())


@given(st.text(max_size=60))
def test_an_id_that_is_let_through_stays_below_any_folder(text: str) -> None:
    if is_safe(text):
        root = Path("/somewhere/cache")
        path = Path(f"{root}/{text}.png")
        assert root in path.parents
        assert ".." not in path.parts
        assert "\0" not in text
