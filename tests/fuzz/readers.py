"""Coverage-guided fuzzing of what reads files that others may have written: ``python -m tests.fuzz.readers``.

    python -m tests.fuzz.readers TARGET[,TARGET...] [-max_total_time=60] [further options of libFuzzer]

TARGET is one of labels, archives, manifest, known, settings and prompts; of several each has a fork of its own, one
after the other. Any exception but the package's own, and any message that isn't short, is a finding.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import pickle
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import atheris
import numpy as np
import torch

with atheris.instrument_imports(include=["wsss_pipeline"]):
    from wsss_pipeline.cache import FinishedImages, MaskSet, MaskWriter, open_mask_set
    from wsss_pipeline.cache.manifest import fingerprint, read_manifest
    from wsss_pipeline.clip.learned_prompts import LearnedPrompts
    from wsss_pipeline.config import LabelFormat, MaskConfig, resolve, user_layers
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.data.image_files import file_status
    from wsss_pipeline.data.image_ids import check_image_id, find_images
    from wsss_pipeline.data.images import file_digest
    from wsss_pipeline.data.labels import read_labels
    from wsss_pipeline.data.masks import PseudoMask
    from wsss_pipeline.errors import CacheError, ConfigError, ImageError, LabelError, WsssError
    from wsss_pipeline.segmentation.train_config import load_train_config
    from wsss_pipeline.stages.chain import load_chain

FOLDERS = ("voc-lists", "yolo")
# what the first byte of fuzzed labels chooses: a file, the path to read, and a form to insist on
PLACES: list[tuple[str, str, LabelFormat | None]] = [
    *(
        (f"l{suffix}", f"l{suffix}", None)
        for suffix in (".json", ".csv", ".txt", ".jsonl", ".tsv", ".xml", ".npy")
    ),
    *(
        (f"{kind}/a{suffix}", kind, None)
        for kind, suffix in (("voc", ".xml"), ("labelme", ".json"), ("yolo", ".txt"))
    ),
    *(("main/cat_train.txt", "main", None), ("data/data.yaml", "data", None)),
    *(("l.data", "l.data", form) for form in get_args(LabelFormat) if form not in FOLDERS),
]
LONGEST_MESSAGE = 1000
FOLDER = Path(tempfile.mkdtemp())
VOC = load_class_set("voc12")
IMAGES = {name: Path(f"{name}.jpg") for name in ("a", "b", "d/c", "2007_000032")}
for folder in ("voc", "labelme", "yolo", "main", "data/labels"):
    (FOLDER / folder).mkdir(parents=True)
(FOLDER / "yolo" / "classes.txt").write_text("cat\nsofa\n")
(FOLDER / "data" / "labels" / "a.txt").write_text("1 0.5 0.5 1 1\n")

MASK_SET = MaskSet(
    name="x",
    determinants={"a": [1, "b"], "c": {"d": None}},
    class_names=("cat", "dog"),
    category_ids={"cat": 17, "dog": 18},
)
SET = open_mask_set(FOLDER / "cache", MASK_SET)
IMAGE = FOLDER / "a.png"
IMAGE.write_bytes(b"only its digest counts")
with MaskWriter(SET) as writer:
    writer.write(
        "a",
        PseudoMask(np.ones((2, 3), np.uint8), np.full((2, 3), 200, np.uint8), ("cat",)),
        image_digest=file_digest(IMAGE),
        seconds=0.0,
    )
    writer.finish(["a"])
(SHARD,) = SET.glob("shard-*.h5")
MANIFEST = json.loads((SET / "manifest.json").read_bytes())
CHECKED = json.loads((SET / "checked.json").read_bytes())
KNOWN = {"images": {"a": [SHARD.name, list(file_status(IMAGE)), ["cat"], False]}}

KINDS = [*(bytes([kind]) for kind in b"0000\0" + b"1234567xgLKSX")]
SEEDS = [random.Random(number).randbytes(16 + 16 * (number % 8)) for number in range(64)]
VECTOR = [0.0] * 7 + [1.0] + [0.0] * 12
OBJECT = np.array({"a": np.array(VECTOR, np.float32), 2007000032: VECTOR, "b": [np.int64(1)]}, dtype=object)
SAVED = io.BytesIO()
np.save(SAVED, OBJECT, allow_pickle=True)
TASK = {"data": {"image": "a.jpg"}, "annotations": [{"result": [{"value": {"rectanglelabels": ["cat"]}}]}]}
MIN = {
    "image": "a.jpg",
    "choice": "cat",
    "label": [{"brushlabels": ["dog"]}],
    "annotation_id": 1,
    "lead_time": 1,
}
LABELS = {
    "l.json": [
        {"a": ["cat", "sofa"], "b": "cat", "c": {"cat": 1}},
        {"a": VECTOR},
        {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 1, "category_id": 2, "segments_info": [{"category_id": 2}]}],
            "categories": [{"id": 2, "name": "cat"}],
        },
        [{"file_name": "a.jpg", "labels": ["cat"]}, {"file_name": "b", "labels": [{"label": "cat"}]}],
        [{"file_name": "a.jpg", "cat": 1, "dog": 0}],
        [TASK],
        [MIN],
        [{"image": "a.jpg", "annotations": [{"label": "cat"}]}],
        {"classes": ["cat", "dog"], "labels": {"a": 1, "b": [{"label": 0}], "c": None}},
        {"samples": [{"filepath": "a.jpg", "x": {"_cls": "Detections", "detections": [{"label": "cat"}]}}]},
    ],
    "l.csv": [
        'image,labels\na,cat;sofa\n"b,c",\n',
        "image,label\na,cat\na,sofa\n",
        "Image Index\tFinding Labels\na\tNo Finding\nb\tcat|dog\n",
        "filename;cat;dog;Unlabeled\na;1;0;0\n",
        'annotation_id,lead_time,image,choice\n1,1,a.jpg,"{""choices"":[""cat""]}"\n',
    ],
    "l.txt": [
        "a cat sofa\nb 7\n",
        f"a {' '.join(str(int(bit)) for bit in VECTOR)}\n",
        "image,tags\na,cat dog\n",
    ],
    "l.jsonl": ['{"image": "a", "objects": {"category": ["cat"]}}\n{"image": "b", "objects": null}\n'],
    "l.tsv": ["path\tclass\na\tcat\n"],
    "l.xml": [
        '<annotations><image id="0" name="a.jpg"><box label="cat"/></image></annotations>',
        "<annotation><object><name>cat</name></object></annotation>",
    ],
    "l.npy": [
        SAVED.getvalue(),
        *(
            SAVED.getvalue()[: SAVED.getvalue().index(b"\n") + 1] + pickle.dumps(OBJECT, protocol=protocol)
            for protocol in (2, 5)
        ),
    ],
    "voc/a.xml": ["<annotation><object><name>cat</name></object></annotation>"],
    "labelme/a.json": [{"shapes": [{"label": "cat"}], "flags": {"dog": True}, "imagePath": "..\\b.jpg"}],
    "yolo/a.txt": ["0 0.5 0.5 1 1\n1 0.1 0.1 0.2 0.2 0.3 0.3\n"],
    "main/cat_train.txt": ["a 1\nb -1\nc  0\n"],
    "data/data.yaml": ["names: [cat, dog]\n", "names: {0: cat, 1: dog}\n"],
}


def label_seeds() -> Iterator[bytes]:
    """Each file as it is, and once more for the forms that are insisted on."""
    for name, contents in LABELS.items():
        for content in contents:
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            found = text if isinstance(text, bytes) else text.encode()
            for number, (place, _, form) in enumerate(PLACES):
                if place == name or form is not None:
                    yield bytes([number]) + found


def labels(content: bytes) -> None:
    """The first byte chooses one of ``PLACES``."""
    name, read, form = PLACES[content[0] % len(PLACES) if content else 0]
    (FOLDER / name).write_bytes(content[1:])
    found: dict[str, tuple[str, ...]] = {}
    with refusing(LabelError):
        found = read_labels(FOLDER / read, IMAGES, VOC, form)
    for image_id, names in found.items():
        check_image_id(image_id, "here")
        assert set(names) <= set(VOC.names)


def archives(content: bytes) -> None:
    """A tar archive as bytes, or of members whose headers are wrong in some places, under a sum that is right."""
    data = atheris.FuzzedDataProvider(content)
    file = FOLDER / "a.tar"
    if data.ConsumeBool():
        file.write_bytes(data.ConsumeBytes(8000))
    else:
        file.write_bytes(b"".join(damaged_member(data) for _ in range(data.ConsumeIntInRange(1, 6))))
    with refusing(ImageError):
        images = find_images(file)
        for image_id, member in images.items():
            check_image_id(image_id, "here")
            with suppress(OSError):
                assert len(member.read_bytes()) == member.size
        with refusing(LabelError):
            read_labels(None, images, VOC)


def damaged_member(data: atheris.FuzzedDataProvider) -> bytes:
    """A header with some bytes replaced, and its content."""
    header = tarfile.TarInfo(data.PickValueInList(["a.png", "a.json", "b.jpg", "b.cls", "c", "pax"]))
    header.size = data.ConsumeIntInRange(0, 1500)
    header.type = data.PickValueInList(KINDS)
    block = bytearray(header.tobuf()[:512])
    for _ in range(data.ConsumeIntInRange(0, 3)):
        at = data.PickValueInList([0, 124, 125, 135, 156, 257, 345, data.ConsumeIntInRange(0, 511)])
        wrong = data.PickValueInList([b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x01", data.ConsumeBytes(12)])
        block[at : at + len(wrong)] = wrong
    if data.ConsumeIntInRange(0, 3):
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
    body = data.PickValueInList(
        [b"", b'["cat"]', b"18 path=x/y.png\n", b"9 size=5\n", data.ConsumeBytes(1500)]
    )
    return bytes(block[:512]) + body + b"\0" * (-len(body) % 512)


def manifest(content: bytes) -> None:
    """A mask set's manifest, as bytes or as one that is wrong in some places, and all that reads it."""
    data = atheris.FuzzedDataProvider(content)
    (SET / "manifest.json").write_bytes(damaged_json(data, MANIFEST))
    with refusing(CacheError):
        read_manifest(SET)
    if data.ConsumeIntInRange(0, 63) == 9:  # it waits for the disk
        with refusing(CacheError):
            open_mask_set(SET.parent, MASK_SET)


def known(content: bytes) -> None:
    """The list of known images and a note of checked shards, as bytes or wrong in some places.

    Whatever the first says, a mask that is there and sound is found.
    """
    data = atheris.FuzzedDataProvider(content)
    (SET / "known-0-of-1.json").write_bytes(damaged_json(data, KNOWN))
    # mostly sound: the other file counts for shards that this one says were checked
    is_sound = data.ConsumeIntInRange(0, 3) > 0
    checked = json.dumps(CHECKED).encode() if is_sound else damaged_json(data, CHECKED)
    (SET / "checked-0-of-1.json").write_bytes(checked)
    images = FinishedImages(SET)
    # where size and times are right, the note is this program's own, and so are the ids in it
    assert images.unfinished(["a"], {"a": IMAGE}, {"a": ("cat",)}) == [] or not is_sound
    images.note("a", (SHARD.name, (1, 2, 3), ("cat",), False))
    images.save()
    images.tidy()


# what the first byte of fuzzed settings chooses: a file, what reads it, and a sound one
SETTINGS: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "classes.yaml",
        lambda path: load_class_set(str(path)),
        "name: x\ntemplate: 'a {}.'\nbackground: [sky]\nclasses:\n- {name: cat, synonyms: [tom], color: [1, 2, 3]}\n",
    ),
    ("classes.json", lambda path: load_class_set(str(path)), '{"names": {"0": "cat", "1": "dog"}}'),
    ("classes.txt", lambda path: load_class_set(str(path)), "background\ncat\n1: dog\n"),
    (
        "labelmap.txt",
        lambda path: load_class_set(str(path)),
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0:a,b:run\n",
    ),
    ("masks.yaml", lambda path: resolve(MaskConfig, user_layers(path, (), {})), "cam: {threshold: 0.4}\n"),
    (
        "train.yaml",
        lambda path: load_train_config(file=path),
        "network: {name: segformer}\noptimisation: {lr: 1e-3, iterations: 5}\nprecision: fp32\n",
    ),
    (
        "chain.yaml",
        lambda path: (chain := load_chain(str(path))) and chain.values(["out=x"]),
        "about: a\ninputs: {out: {about: b, default: 'r/{out}'}}\nstages: {data: demo --out {out}}\n",
    ),
]


def settings_seeds() -> Iterator[bytes]:
    """The sound ones, each before the byte that chooses its reader."""
    for number, (_, _, sound) in enumerate(SETTINGS):
        yield bytes([number]) + sound.encode()


def settings(content: bytes) -> None:
    """The first byte chooses one of ``SETTINGS``."""
    name, read, _ = SETTINGS[content[0] % len(SETTINGS) if content else 0]
    (FOLDER / name).write_bytes(content[1:])
    with refusing(WsssError):
        read(FOLDER / name)


PROMPTS = FOLDER / "prompts.safetensors"
LearnedPrompts(torch.zeros(4, 8), "end", ("cat", "dog"), (("cat",), ("dog", "hound")), ("",), "0" * 64).save(
    PROMPTS
)
LEARNED = PROMPTS.read_bytes()
DESCRIBED = json.loads(LEARNED[8 : 8 + int.from_bytes(LEARNED[:8], "little")])


def prompts(content: bytes) -> None:
    """A file of learned prompts, as bytes or with a header that is wrong in some places."""
    data = atheris.FuzzedDataProvider(content)
    header = damaged_json(data, DESCRIBED)
    PROMPTS.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * 4 * 8))
    with refusing(ConfigError):
        LearnedPrompts.load(PROMPTS)


@contextmanager
def refusing(kind: type[WsssError]) -> Iterator[None]:
    """The package may refuse, in a short message."""
    try:
        yield
    except kind as error:
        if len(str(error)) >= LONGEST_MESSAGE:
            raise AssertionError(f"{len(str(error))} characters") from error


def damaged_json(data: atheris.FuzzedDataProvider, sound: Any) -> bytes:
    """Bytes of any kind, or ``sound`` with other values in up to three places."""
    if data.ConsumeBool():
        return bytes(data.ConsumeBytes(4000))
    value = copy.deepcopy(sound)
    for _ in range(data.ConsumeIntInRange(1, 3)):
        value = replaced(data, value)
    if isinstance(value, dict) and isinstance(value.get("determinants"), dict) and data.ConsumeBool():
        with suppress(CacheError):
            value["fingerprint"] = fingerprint(value["determinants"])
    return json.dumps(value).encode()


def replaced(data: atheris.FuzzedDataProvider, value: Any) -> Any:
    """``value`` with something else for one of its parts, or for all of it."""
    if isinstance(value, dict) and value and data.ConsumeIntInRange(0, 7):
        key = data.PickValueInList(sorted(value, key=str))
        part = replaced(data, value.pop(key))
        return value if not data.ConsumeIntInRange(0, 5) else {**value, key: part}
    if isinstance(value, list) and value and data.ConsumeIntInRange(0, 7):
        place = data.ConsumeIntInRange(0, len(value) - 1)
        return [*value[:place], replaced(data, value[place]), *value[place + 1 :]]
    anything: list[Any] = [
        *(
            None,
            True,
            0,
            -1,
            1.5,
            2**70,
            "",
            "..",
            "a\0b",
            [],
            {},
            [[]],
            {"a": None},
            "x" * 3000,
            float("nan"),
            float("inf"),
        ),
        *("shard-0of1-00001.h5", "../../etc/passwd", data.ConsumeUnicode(20), data.ConsumeInt(8)),
    ]
    return data.PickValueInList(anything)


def main() -> None:
    """Fuzz them until a finding, or libFuzzer's own limit."""
    names = sys.argv.pop(1).split(",")
    for name in names[:-1]:
        child = os.fork()
        if not child:
            names = [name]
            break
        if status := os.waitpid(child, 0)[1]:
            sys.exit(os.waitstatus_to_exitcode(status))
    targets = {"labels": labels, "archives": archives, "manifest": manifest, "known": known}
    targets |= {"settings": settings, "prompts": prompts}
    target = targets[names[-1]]
    corpus = Path(tempfile.mkdtemp())
    seeds = {labels: label_seeds, settings: settings_seeds}
    for number, seed in enumerate(seeds[target]() if target in seeds else SEEDS):
        (corpus / str(number)).write_bytes(seed)
    logging.disable()
    atheris.Setup([*sys.argv, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
