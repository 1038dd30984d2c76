"""Hostile label files, class names and image ids: one line that says what is wrong, or a result that is safe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import GOLDEN, mask_set, write_labels, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import check_image_id
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.errors import ClassSetError, LabelError, WsssError

VOC = load_class_set("voc12")
LONG = "x" * 10_000_000
LONGISH = LONG[:100_000]

NPY_HEAD = b"\x93NUMPY\x01\x00\x3c\x00{'descr': '|O', 'fortran_order': False, 'shape': (), }"
NPY_HEAD += b" " * (10 + 0x3C - 1 - len(NPY_HEAD)) + b"\n"

# a dict of one vector: a list of twice the same scalar, whose number is such a list, 60 times over
NESTED = b"\x80\x02}X\x01\x00\x00\x00aK\x01"
NESTED += b"".join(b"q%c0cnumpy._core.multiarray\nscalar\nN](h%ch%ce\x86R" % (n, n, n) for n in range(1, 61))
NESTED += b"q\xff0](h\xffh\xffes."

FILES: dict[str, tuple[str, str | bytes]] = {
    "unknown class": ("l.json", '{"a": ["unicorn"]}'),
    "duplicate ids": ("l.json", '{"a": ["cat"], "a": ["dog"]}'),
    "NUL bytes": ("l.csv", b"image,labels\na\x00b,cat\n"),
    "formula": ("l.csv", "image,labels\na,=HYPERLINK(1)\n"),
    "10 MB line": ("l.csv", f"image,labels\n{LONG},cat\n"),
    "10 MB cell": ("l.csv", f"image,labels\na,{LONG}\n"),
    "10 MB txt": ("l.txt", f"a {LONG}\n"),
    "10 MB id in txt": ("l.txt", f"{LONG} cat\n"),
    "10 MB name": ("l.json", json.dumps({"a": [LONG]})),
    "deep JSON": ("l.json", "[" * 200_000 + "]" * 200_000),
    "deep objects": ("l.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "huge number": ("l.json", '{"a": [' + "9" * 100_000 + "]}"),
    "lone surrogate": ("l.json", '{"\\ud800": ["cat"]}'),
    "byte order mark of UTF-16": ("l.csv", "image,labels\na,cat\n".encode("utf-16")),
    "unclosed quote": ("l.csv", 'image,labels\n"a,cat\nb,dog\n'),
    "entities": ("l", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>&b;</annotation>"),
    "billion laughs": ("l", "<!DOCTYPE x [" + "<!ENTITY a 'ha'>" * 3 + "]><annotation>&a;</annotation>"),
    "external entity": ("l", "<!DOCTYPE x SYSTEM 'file:///etc/passwd'><annotation/>"),
    "deep XML": ("l", "<annotation>" + "<object>" * 100_000),
    "long line of JSON lines": ("l.jsonl", '{"image": "a", "label": "' + LONGISH + '"}'),
    "deep JSON lines": ("l.jsonl", '{"image": "a"}\n' + "[" * 200_000),
    "long key": ("l.json", json.dumps([{LONGISH: "a"}])),
    "10 MB header": ("l.csv", f"image,{LONG}\na,cat\n"),
    "10 MB header of classes": ("l.csv", f"image,cat,{LONG}\na,1,0\n"),
    "10 MB of separators": ("l.csv", "image,labels\na," + "|" * 10_000_000 + "x\n"),
    "a million columns": ("l.csv", "image,cat" + ",x" * 1_000_000 + "\na,1" + ",0" * 1_000_000 + "\n"),
    "a line of numbers": ("l.txt", "a" + " 1" * 200_000 + "\n"),
    "numbers that aren't any": ("l.json", '[{"image": "a", "labels": [NaN, Infinity]}]'),
    "huge numbers": ("l.json", '{"a": {"cat": ' + "9" * 4000 + "}}"),
    "long path in LabelMe": (
        "l.json",
        json.dumps({"shapes": [], "imagePath": LONGISH, "flags": {"cat": True}}),
    ),
    "LabelMe that leaves its folder": (
        "l.json",
        json.dumps({"shapes": [{"label": "cat"}], "imagePath": "..", "flags": {}}),
    ),
    "Label Studio with cells that aren't JSON": (
        "l.csv",
        'annotation_id,lead_time,image,label\n1,1,a.jpg,"[{""x"": "\n',
    ),
    "deep cells of Label Studio": (
        "l.csv",
        "annotation_id,lead_time,image,label\n1,1,a.jpg," + "[" * 100_000,
    ),
    "Label Studio without an image": (
        "l.json",
        '[{"data": {"a": "x.jpg", "b": "y.jpg"}, "annotations": []}]',
    ),
    "CVAT with entities": ("l.xml", "<!DOCTYPE x [<!ENTITY a 'ha'>]><annotations>&a;</annotations>"),
    "deep CVAT": ("l.xml", "<annotations>" + "<image>" * 100_000),
    "wide CVAT": ("l.xml", "<annotations>" + "<x/>" * 20_000),
    "CVAT that leaves its folder": ("l.xml", '<annotations><image name="../a"/></annotations>'),
    "10 MB tag": ("l.xml", f"<{LONG}/>"),
    "FiftyOne with other classes": ("l.json", json.dumps({"classes": [LONGISH], "labels": {"a": 0}})),
    "numpy with a huge header": ("l.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{"),
    "numpy with code in its header": ("l.npy", b"\x93NUMPY\x01\x00\x20\x00__import__('os').mkdir('owned')\n"),
    "numpy with nothing behind its header": ("l.npy", NPY_HEAD),
    "numpy with a huge index": ("l.npy", NPY_HEAD + b"\x80\x02}r\xff\xff\xff\xff."),
    "numpy with a huge text": ("l.npy", NPY_HEAD + b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fa."),
    "numpy with a huge array of bytes": (
        "l.npy",
        NPY_HEAD + b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x0f\x00a.",
    ),
    "numpy with a huge frame": ("l.npy", NPY_HEAD + b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0f}."),
    "numpy with a huge number": (
        "l.npy",
        NPY_HEAD + b"\x80\x02}(X\x01\x00\x00\x00a\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20 + b"u.",
    ),
    "numpy that sets attributes": (
        "l.npy",
        NPY_HEAD + b"\x80\x02cnumpy\ndtype\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb.",
    ),
    "numpy with numbers of numbers": ("l.npy", NPY_HEAD + NESTED),
    "numpy with code": ("l.npy", NPY_HEAD + b"cos\nsystem\n(S'touch owned'\ntR."),
    "numpy with an extension": ("l.npy", NPY_HEAD + b"\x80\x02\x82\x01."),
    "numpy with a persistent id": ("l.npy", NPY_HEAD + b"\x80\x02X\x01\x00\x00\x00aQ."),
    "COCO that contradicts itself": (
        "l.json",
        '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "category_id": 1}],'
        ' "categories": [{"id": 1, "name": "cat"}]}',
    ),
    "COCO with booleans": (
        "l.json",
        '{"images": [{"id": true, "file_name": "a.jpg"}], "annotations": [], "categories": []}',
    ),
    "COCO that leaves its folder": (
        "l.json",
        '{"images": [{"id": 1, "file_name": "../../etc/passwd"}], "annotations": [], "categories": []}',
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_label_file_is_refused_in_one_short_line(tmp_path: Path, name: str) -> None:
    file_name, content = FILES[name]
    path = tmp_path / file_name
    if file_name == "l":
        path.mkdir()
        path = path / "a.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(LabelError) as caught:
        read_labels(tmp_path / file_name, {}, VOC)
    message = str(caught.value)
    assert path.name in message
    assert len(message) < 600, f"{len(message)} characters"
    assert not list(Path.cwd().glob("owned"))


UNSAFE_IDS = [
    *("..", "../a", "a/../../b", "/etc/passwd", "//host/share", "C:\\a", "a\\..\\b", "\\\\host\\a", "a\0b"),
    *("a/./b", "a//b", "/", ".", "", " ", "\t", "a\nb", "a\rb", "\x1b[2J", "a\u2028b", "\ud800", "x" * 1001),
]
STRANGE_IDS = [
    *(
        "x" * 300,
        "cafe\u0301",
        "caf\u00e9",
        "\u202egpj.exe",
        "\ufeffa",
        "%2e%2e%2fa",
        "a%00b",
        "~root",
        "-rf",
    ),
    *(
        "$(touch owned)",
        "`id`",
        "a;b|c&d",
        "a'b\"c",
        "<b>",
        "*?[x]",
        "con",
        "nul.txt",
        "a ",
        "\u200b",
        "😀/猫",
    ),
]


@pytest.mark.parametrize("image_id", UNSAFE_IDS)
def test_an_unsafe_id_is_refused(image_id: str) -> None:
    with pytest.raises(LabelError) as caught:
        check_image_id(image_id, "labels.csv line 3")
    assert len(str(caught.value)) < 400


def test_strange_ids_are_names_and_nothing_else(tmp_path: Path, clip: Path) -> None:
    """Unicode forms stay apart, and nothing is interpreted, in the cache and in exported files."""
    images = tmp_path / "images"
    content = (GOLDEN / "images" / "tiny_odd.png").read_bytes()
    usable = [name for name in STRANGE_IDS if len(f"{name}.png".encode()) <= 255]
    for name in usable:
        (images / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (images / f"{name}.png").write_bytes(content)
    write_labels(tmp_path, {name: ["cat"] if name == "~root" else [] for name in STRANGE_IDS})
    result = wsss(
        *("generate-masks", "--images", images, "--labels", tmp_path / "labels.json", "--classes", "voc12"),
        *("--clip", clip, "--cache", tmp_path / "cache", "--workers", 0),
    )
    assert result.exit_code == 1, result.stderr  # the id whose file name is too long has no file
    assert all(line.isprintable() for line in result.stderr.splitlines())
    path = mask_set(result)
    with MaskCache.open(path) as cache:
        assert set(cache) == set(usable)
    exported = wsss("export-masks", "--cache", path, "--out", tmp_path / "out", "--format", "png")
    assert exported.exit_code == 0, exported.stderr
    found = {
        str(file.relative_to(tmp_path / "out").with_suffix("")) for file in (tmp_path / "out").rglob("*.png")
    }
    assert found == set(usable)
    assert not list(Path.cwd().glob("owned"))


HOSTILE_NAMES = [
    *("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "../../etc/passwd", "/abs", "a/b"),
    *(
        "$(touch owned)",
        "; rm -rf ~",
        "%s%n{0}",
        "{{7*7}}",
        "'; DROP TABLE x; --",
        "=1+1",
        "ünïcödé",
        "a" * 60,
    ),
]


def test_hostile_class_names_are_only_text(tmp_path: Path, clip: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "one.png").write_bytes((GOLDEN / "images" / "tiny_odd.png").read_bytes())
    classes = tmp_path / "set.yaml"
    entries = [{"name": name, "prompt": "cat"} for name in HOSTILE_NAMES]
    classes.write_text(json.dumps({"name": "hostile", "template": "a {}.", "classes": entries}))
    write_labels(tmp_path, {"one": HOSTILE_NAMES[:3]})
    result = wsss(
        *("generate-masks", "--images", images, "--labels", tmp_path / "labels.json", "--classes", classes),
        *("--clip", clip, "--cache", tmp_path / "cache", "--workers", 0),
    )
    assert result.exit_code == 0, result.stderr
    path = mask_set(result)
    assert path.parent == tmp_path / "cache"
    truth = tmp_path / "truth"
    exported = wsss("export-masks", "--cache", path, "--out", truth, "--format", "png")
    assert exported.exit_code == 0, exported.stderr
    report = tmp_path / "report.html"
    scored = wsss("evaluate", "--cache", path, "--gt", truth, "--images", images, "--report", report)
    assert scored.exit_code == 0, scored.stderr
    page = report.read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<img src=x" not in page
    assert wsss("preview", "--cache", path, "--images", images, "--out", tmp_path / "p.png").exit_code == 0


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch owned']",
        "!!python/name:os.system",
        "a: &a [*a]",
        "&a [" + "*a, " * 10 + "]",
        "{" * 10_000,
        "name: x\nclasses: [{name: cat}, {name: cat}]",
        "name: ../../x\nclasses: [{name: cat}]",
        "name: x\nclasses: [{name: ''}]",
        'name: x\nclasses: [{name: "a\\nb"}]',
        "- " * 50_000,
        "\x00",
        "name: x\ntemplate: '{0.__class__}'\nclasses: [{name: cat}]",
    ],
)
def test_a_hostile_class_set_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(text)
    with pytest.raises(ClassSetError) as caught:
        load_class_set(str(path))
    assert isinstance(caught.value, WsssError)
    assert len(str(caught.value)) < 600
    assert not Path("owned").exists()
