"""Class lists of other tools as ``--classes``."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.errors import ClassSetError

LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nball:250,50,83::\nkite:51,221,255:tail:fly\n"


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.txt", "ball\nkite\n"),
        ("obj.names", "ball\r\nkite"),
        ("labels.txt", "__ignore__\n_background_\nball\nkite\n"),
        ("labels.txt", "\ufeffBackground\n\nball\n  kite  \n\n"),
        ("classes", "ball\nkite\n"),
        ("data.yaml", "path: x\ntrain: images\nnc: 2\nnames: [ball, kite]\n"),
        ("data.yaml", "names:\n  1: kite\n  0: ball\nroboflow: {}\n"),
        ("data.yml", "names: {0: background, 1: ball, 2: kite}"),
        ("list.yaml", "- ball\n- kite\n"),
        ("labelmap.txt", LABELMAP),
        ("labelmap.txt", "ball:::\nkite:::\nbackground:::\n"),
        ("l.json", '["ball", "kite"]'),
        ("l.json", '{"1": "kite", "0": "ball"}'),
        ("l.json", '{"1": "ball", "2": "kite"}'),
        ("l.json", '{"0": "_background_", "1": "ball", "2": "kite"}'),
        ("l.json", '{"ball": 0, "kite": 1}'),
        ("l.json", '{"id2label": {"0": "background", "1": "ball", "2": "kite"}}'),
        ("l.json", '{"categories": [{"id": 7, "name": "kite"}, {"id": 3, "name": "ball"}], "images": []}'),
        ("l.json", '{"name": "own", "classes": ["ball", {"name": "kite", "prompt": "a kite"}]}'),
    ],
)
def test_lists_of_other_tools(file: str, content: str, caplog: pytest.LogCaptureFixture) -> None:
    Path(file).write_text(content, "utf-8")
    classes = load_class_set(file)
    assert classes.names == ("ball", "kite")
    assert classes == load_class_set(f"./{file}") == load_class_set(str(Path(file).absolute()))
    assert (": no class, masks have 0 for background" in caplog.text) == ("ground" in content)


def test_a_labelmap_brings_its_colours() -> None:
    Path("labelmap.txt").write_text(LABELMAP)
    assert load_class_set("labelmap.txt").colors == {(0, 0, 0): 0, (250, 50, 83): 1, (51, 221, 255): 2}
    assert load_class_set("ball,kite").colors == {}


def test_a_class_set_with_colours() -> None:
    Path("s.yaml").write_text("classes: [ball, {name: kite, color: [0, 0, 255]}]\n")
    assert load_class_set("s.yaml").colors == {(0, 0, 0): 0, (0, 0, 255): 2}


def test_what_is_a_file_and_what_a_list_of_names() -> None:
    assert load_class_set("tv/monitor,ball").names == ("tv/monitor", "ball")
    assert load_class_set("tv/monitor,").names == ("tv/monitor",)
    assert load_class_set("tv\\monitor,ball").names == ("tv\\monitor", "ball")
    with pytest.raises(ClassSetError, match=r"^tv/monitor can't be read"):
        load_class_set("tv/monitor")
    with pytest.raises(ClassSetError, match=r"^classes.txt can't be read as UTF-8 text: No such file"):
        load_class_set("classes.txt")
    Path("ball").mkdir()
    assert load_class_set("ball").names == ("ball",)
    Path("kite").write_text("cat\n")
    assert load_class_set("kite").names == ("cat",)
    assert load_class_set("kite,").names == ("kite",)
    Path("a,b.txt").write_text("cat\n")
    assert load_class_set("a,b.txt").names == ("cat",)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("c.txt", "", "c.txt: holds no class name"),
        ("c.txt", "__ignore__\n_background_\n", "holds no class name"),
        ("c.txt", "ball\nbackground\nkite\n", "item 2: 'name': 'background' is no class"),
        ("c.txt", "ball\nkite\nball\n", "'ball' occurs twice"),
        ("c.txt", "# animals\nball\n", "c.txt line 1: '# animals' isn't a name; a list has no comments"),
        ("c.txt", "0 ball\n1 kite\n", "each line begins with a number, like '0 ball'; write names alone"),
        ("c.txt", "0: ball\n1: kite\n", "each line begins with a number"),
        ("c.txt", "ball,kite\n", "one line with commas; write one name a line"),
        ("c.txt", "ball\x1b[2J\nkite\n", "line 1: 'ball\\x1b[2J' holds a control character"),
        ("c.txt", b"caf\xe9\n", "UTF-8"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nball\n", "line 2: 'ball' isn't 'name:r,g,b:parts"),
        ("labelmap.txt", "ball:1,2,3::\nkite:1,2,3::\n", "line 2: 'kite' has the colour 1,2,3 of 'ball'"),
        ("labelmap.txt", "ball:1,2,300::\n", "line 1: colour 1,2,300 goes beyond 255"),
        ("l.csv", "image,labels\n", "not from '.csv'"),
        ("l.json", "{", "not valid JSON"),
        ("l.json", "3", "expected a list of names, found int"),
        ("l.json", '{"0": "ball", "2": "kite"}', "the index 1 has no name; mask values have no gaps"),
        ("l.json", '{"2": "ball", "3": "kite"}', "expected names by index"),
        ("l.json", '{"a": ["cat"]}', "expected names by index"),
        ("l.json", "{}", "expected names by index"),
        ("l.json", "[1, 2]", "item 1: 'name': 1 isn't text"),
        ("l.json", '{"categories": [{"id": "x", "name": "ball"}]}', "each of 'categories' takes an 'id'"),
        ("l.json", "[" * 200_000, "nested too deep"),
        ("d.yaml", "names: 3\n", "expected a list of names, found int"),
        ("d.yaml", "names: [ball, ball]\n", "'ball' occurs twice"),
        ("d.yaml", "classes: [{name: a, color: [1, 2]}]", "'color'"),
        ("d.yaml", "classes: [{name: a, color: [1, 2, 256]}]", "'color'"),
        ("d.yaml", "classes: [{name: a, color: [0, 0, 0]}]", "black is the colour of the background"),
        ("d.yaml", "classes: [{name: a, color: [1, 2, 3]}, {name: b, color: [1, 2, 3]}]", "occurs twice"),
    ],
)
def test_a_list_that_cant_be_one_is_refused_in_one_line(file: str, content: str | bytes, reason: str) -> None:
    Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ClassSetError) as caught:
        load_class_set(file)
    message = str(caught.value)
    assert reason in message
    assert file in message
    assert message.isprintable()
    assert len(message) < 600


def test_unicode_forms_of_one_name_are_one_name() -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    Path("c.json").write_text(json.dumps({"classes": ["café", {"name": "bar", "aliases": [decomposed]}]}))
    with pytest.raises(ClassSetError, match="occurs twice"):
        load_class_set("c.json")
    assert load_class_set(decomposed + ",bar").index("café") == 1
    assert load_class_set("café,bar").canonical(decomposed) == "café"
    with pytest.raises(ClassSetError, match="did you mean 'café'"):
        load_class_set("café,bar").index(decomposed + "s")
