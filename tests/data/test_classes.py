from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from wsss_pipeline.data.classes import (
    DEFAULT_TEMPLATE,
    ClassEntry,
    builtin_class_sets,
    check_template,
    load_class_set,
    voc_palette,
)
from wsss_pipeline.errors import ClassSetError

# Category ids of MS COCO in the order of its classes.
COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def write(folder: Path, text: str) -> str:
    (folder / "set.yaml").write_text(text, "utf-8")
    return str(folder / "set.yaml")


def test_voc_has_the_published_names_prompts_and_background() -> None:
    voc = load_class_set("voc12")
    assert voc.name == "voc12"
    assert voc.templates == ("a clean origami {}.",)
    assert voc.names == (
        *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
        "tvmonitor",
    )
    assert {entry.name: entry.texts() for entry in voc.classes if entry.texts() != (entry.name,)} == {
        "bird": ("bird avian",),
        "chair": ("chair seat",),
        "person": ("person with clothes,people,human",),
        "tvmonitor": ("tvmonitor screen",),
    }
    assert voc.background == (
        *("ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea"),
        *("railway", "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road"),
        *("rock", "street", "valley", "bridge", "sign"),
    )


def test_coco_has_the_published_prompts_and_the_official_ids() -> None:
    coco = load_class_set("coco14")
    assert [entry.coco_id for entry in coco.classes] == COCO_IDS
    assert {entry.name: entry.texts()[0] for entry in coco.classes if entry.texts() != (entry.name,)} == {
        "person": "person with clothes,people,human",
        "bird": "bird avian",
        "backpack": "backpack,bag",
        "umbrella": "umbrella,parasol",
        "handbag": "handbag,purse",
        "tie": "necktie",
        "snowboard": "sknowboard",
        "baseball glove": "glove",
        "spoon": "dessertspoon",
        "chair": "chair seat",
        "tvmonitor": "tvmonitor screen",
        "remote": "remote control",
        "hair drier": "hairdrier,blowdrier",
    }
    assert set(load_class_set("voc12").background) - set(coco.background) == {"keyboard", "sign"}


@pytest.mark.parametrize(
    ("alias", "name", "index"),
    [
        ("airplane", "aeroplane", 5),
        ("motorcycle", "motorbike", 4),
        ("couch", "sofa", 58),
        ("tv", "tvmonitor", 63),
        ("potted plant", "pottedplant", 59),
        ("dining table", "diningtable", 61),
        ("toothbrush", "toothbrush", 80),
    ],
)
def test_official_coco_names_are_aliases(alias: str, name: str, index: int) -> None:
    coco = load_class_set("coco14")
    entry = coco.find(alias)
    assert entry is not None
    assert entry.name == name
    assert coco.index(alias) == coco.index(name) == index


def test_the_overlap_rule_turns_vocs_background_into_cocos(caplog: pytest.LogCaptureFixture) -> None:
    coco = load_class_set("coco14")
    with caplog.at_level(logging.WARNING, "wsss_pipeline.data"):
        named = load_class_set(",".join(coco.names))
    assert named.background == coco.background
    assert "keyboard (class 'keyboard'), sign (class 'stop sign')" in caplog.text


def test_built_in_sets_load_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert builtin_class_sets() == ["coco14", "demo", "voc12"]
    for name in builtin_class_sets():
        load_class_set(name)
    assert not caplog.records


def test_names_on_the_command_line() -> None:
    classes = load_class_set(" cat , traffic light,dog ")
    assert classes.names == ("cat", "traffic light", "dog")
    assert classes.templates == (DEFAULT_TEMPLATE,)
    assert classes.background == load_class_set("voc12").background
    assert [classes.index(name) for name in classes.names] == [1, 2, 3]
    assert classes.name == "cat-traffic-light-dog"
    assert load_class_set("voc,").names == ("voc",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "voc12"),
        ("cat,,dog", "empty"),
        (",", "empty"),
        ("cat,dog,cat", "'cat' occurs twice"),
        ("cat,_background_", "'_background_' is no class: masks have 0 for background"),
        ("voc21", "did you mean 'voc12'"),
        ("coco", "did you mean 'coco14'"),
        ("no/such/file", "no/such/file"),
        ("missing.yaml", "missing.yaml"),
        ("a\nb,c", "control character"),
        (",".join(map(str, range(65_535))), "65,535 classes; a mask holds 65,534"),
    ],
)
def test_bad_names_are_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ClassSetError, match=reason) as caught:
        load_class_set(text)
    assert "\n" not in str(caught.value).replace(text, "")


def test_more_classes_fit_than_a_byte_and_than_a_list_of_texts_holds() -> None:
    assert len(load_class_set(",".join(f"c{i}" for i in range(1203))).classes) == 1203


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    classes = load_class_set(
        write(
            tmp_path,
            "name: farm\ntemplates: ['a photo of a {}.', 'a {} in a field']\nbackground: [meadow, barn]\n"
            "classes:\n"
            "  - cow\n"
            "  - {name: bird, prompt: bird avian}\n"
            "  - {name: person, synonyms: [people, human], fuse: sentence}\n"
            "  - {name: farmer, prompt: farmer with hat, synonyms: [peasant]}\n"
            "  - {name: dog, synonyms: [puppy], fuse: feature, aliases: [hound], coco_id: 18}\n",
        )
    )
    assert classes.name == "farm"
    assert classes.templates == ("a photo of a {}.", "a {} in a field")
    assert classes.background == ("meadow", "barn")
    assert [entry.texts() for entry in classes.classes] == [
        ("cow",),
        ("bird avian",),
        ("person,people,human",),
        ("farmer with hat,peasant",),
        ("dog", "puppy"),
    ]
    assert classes.classes[4] == ClassEntry(
        name="dog", synonyms=("puppy",), fuse="feature", aliases=("hound",), coco_id=18
    )


def test_a_file_without_background_gets_vocs_words_and_an_empty_list_none(tmp_path: Path) -> None:
    without = load_class_set(write(tmp_path, "classes: [tree, cat]\n"))
    assert without.name == "set"
    assert without.background == tuple(word for word in load_class_set("voc12").background if word != "tree")
    assert load_class_set(write(tmp_path, "background: []\nclasses: [tree]\n")).background == ()


def test_background_words_that_are_classes_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "background: [Cat, clothes, people, kitten, parking lot, seat belt, grass]\nclasses:\n"
    text += "  - {name: cat, synonyms: [kitten]}\n  - {name: person, prompt: 'person with clothes,people'}\n"
    text += "  - {name: seat}\n  - {name: parking lot sign}\n"
    classes = load_class_set(write(tmp_path, text))
    assert classes.background == ("seat belt", "grass")
    assert "clothes (class 'person')" in caplog.text


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("clases: [cat]\n", "'clases'; did you mean 'classes'"),
        ("name: x\n", "'classes' is missing"),
        ("classes: []\n", "'classes': an empty list"),
        ("classes: cat\n", "'classes' takes a list"),
        ("cat\n", "expected 'key: value'"),
        ("", "'classes' is missing"),
        ("classes: [cat, dog, cat]\n", "'cat' occurs twice"),
        ("classes: [cat, {name: dog, aliases: [cat]}]\n", "'cat' occurs twice"),
        ("classes: [{name: a, coco_id: 1}, {name: b, coco_id: 1}]\n", "1 occurs twice"),
        ("classes: [{name: a, coco_id: true}]\n", "'coco_id'"),
        (
            "classes: [{name: a, coco_id: 91}]\n",
            "item 1 ('a'): 'coco_id' is 91; it must lie between 1 and 90",
        ),
        ("1: x\nclasses: [cat]\n", "unknown key '1'; known here: name, templates, background, classes"),
        ("classes: [cat, Background]\n", "item 2: 'name': 'Background' is no class"),
        ("classes: [{name: __ignore__}]\n", "'__ignore__' is no class"),
        ("classes: [yes]\n", "item 1: 'name': True isn't text; put it in quotes"),
        ("classes: [{name: 3}]\n", "'name': 3 isn't text"),
        ("classes: [{prompt: cat}]\n", "item 1: 'name' is missing"),
        ("classes: [{name: ' '}]\n", "empty"),
        ("classes: [{name: cat, synonims: [x]}]\n", "'synonims'; did you mean 'synonyms'"),
        ("classes: [{name: cat, synonyms: []}]\n", "'synonyms': an empty list"),
        ("classes: [{name: cat, prompt: }]\n", "'prompt': None isn't text"),
        ("classes: [{name: cat, fuse: mean}]\n", "'fuse' is 'mean'"),
        ("classes: [cat]\nbackground:\n", "'background' takes a list"),
        ("classes: [cat]\nbackground: [sky, sky]\n", "'sky' occurs twice"),
        ("classes: [cat]\ntemplate: a photo\n", "template 'a photo' needs exactly one {}"),
        ("classes: [cat]\ntemplate: 'a {} {}'\n", "exactly one {}"),
        ("classes: [cat]\ntemplates: []\n", "'templates': an empty list"),
        ("classes: [cat]\ntemplate: '{}'\ntemplates: ['{}']\n", "both"),
        ("classes: [cat]\nname: ../up\n", "'name': '../up' can't be the name of a folder"),
        ("classes: [cat\n", "not valid YAML"),
        ("classes: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_files_that_contradict_themselves_name_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ClassSetError) as caught:
        load_class_set(write(tmp_path, text))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "set.yaml"))
    assert key in message
    assert "\n" not in message


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_bytes(b"classes: [caf\xe9]\n")
    with pytest.raises(ClassSetError, match="UTF-8"):
        load_class_set(str(tmp_path / "set.yaml"))
    with pytest.raises(ClassSetError, match="can't be read"):
        load_class_set(f"{tmp_path}/")


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{0}", "{{}}", "a {name} {}", "a } {}"])
def test_templates_need_exactly_one_place(template: str) -> None:
    with pytest.raises(ClassSetError, match="--template: template"):
        check_template(template, "--template")
    assert check_template("a photo of a {}.", "--template") == "a photo of a {}."


def test_nearest_names_are_at_most_three_and_know_aliases() -> None:
    voc = load_class_set("voc12")
    assert voc.nearest("Persn") == ["person"]
    assert voc.nearest("airplanes")[0] == "aeroplane"
    assert voc.nearest("xylophone") == []
    assert len(load_class_set("cat1,cat2,cat3,cat4").nearest("cat")) == 3


def test_an_unknown_name_has_no_index() -> None:
    with pytest.raises(ClassSetError, match="unknown class 'persn'; did you mean 'person'"):
        load_class_set("voc12").index("persn")


def test_palette_is_that_of_voc() -> None:
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    expected = {0: [0, 0, 0], 1: [128, 0, 0], 8: [64, 0, 0], 15: [192, 128, 128], 20: [0, 64, 128]}
    assert {value: palette[value].tolist() for value in expected} == expected
    assert palette[255].tolist() == [224, 224, 192]
    wide = voc_palette(65_536)
    assert (wide[:256] == palette).all()
    assert len({tuple(colour) for colour in wide.tolist()}) == 65_536
