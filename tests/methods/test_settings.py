"""The fingerprint changes exactly when masks do: a row at least for every setting of every method.

A row holds another value of a setting and what comes of it. The mask, confidence and class activation maps of a small
drawn scene, made with the embedded CLIP, are compared with those that the defaults give. A new setting, or a new
method, without a row fails.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.methods import toy_method
from wsss_pipeline.cache.manifest import fingerprint
from wsss_pipeline.clip.learned_prompts import (
    LearnedPrompts,
    initial_context,
    text_tower_digest,
)
from wsss_pipeline.clip.sources import ClipFiles, locate_clip
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig, fields
from wsss_pipeline.data.classes import ClassEntry, ClassSet, load_class_set
from wsss_pipeline.data.images import as_pixels
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.methods import load_method, method_names, preset_names
from wsss_pipeline.pseudo_masks import generator as module
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.refine.dense_crf import has_pydensecrf
from wsss_pipeline.regions.regions import run_lengths
from wsss_pipeline.segmentation.checkpoint import save_network
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig

TOY = toy_method.__name__
SCENE = draw_scene((77, 3))  # three classes
# the file, since a built-in class set would bring the method's preset of its name
DEMO = str(resources.files("wsss_pipeline.data") / "class_sets" / "demo.yaml")
IMAGE, LABELS = np.ascontiguousarray(SCENE.image[20:100, 20:132]), SCENE.labels

IMAGE_ID = "scene"

# a run of a network on the demo's CLIP, of seeded weights; see ``network``
NETWORK = "{network}"

CHANGES = "other masks, other fingerprint"
SAME = "equal masks, equal fingerprint"
ROUNDING = "another fingerprint, and masks that differ by rounding if at all"


@dataclass(frozen=True)
class Row:
    """Another value of a setting.

    Attributes:
        value: a value, or a function that makes it in a folder.
        outcome: one of the three above.
        given: settings under which that is so.
    """

    value: Any
    outcome: str
    given: Mapping[str, Any] = field(default_factory=dict)


def clip_folder(change: Callable[[Path], None]) -> Callable[[Path], str]:
    """A copy of the embedded CLIP, changed."""

    def make(folder: Path) -> str:
        source = Path(str(resources.files("wsss_pipeline") / "demo" / "clip"))
        shutil.copytree(source, folder / "clip")
        change(folder / "clip")
        return str(folder / "clip")

    return make


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("post_layernorm.bias"))
    save_file({**tensors, name: tensors[name] + 0.1}, folder / "model.safetensors")


def other_vocabulary(folder: Path) -> None:
    """The tokens of two words change places."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    one, other = "ball</w>", "grass</w>"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content), "utf-8")


def pixels(mean: list[float]) -> Callable[[Path], None]:
    """A preprocessor's file with this mean, and else what OpenAI's has."""

    def change(folder: Path) -> None:
        values = {"image_mean": mean, "image_std": [0.26862954, 0.26130258, 0.27577711]}
        (folder / "preprocessor_config.json").write_text(json.dumps(values))

    return change


def nothing(folder: Path) -> None:
    (folder / "README.md").write_text("another place, the same bytes\n")


def class_set(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], str]:
    """A YAML file of the demo's class set, changed."""

    def make(folder: Path) -> str:
        values = yaml.safe_load(Path(DEMO).read_text("utf-8"))
        change(values)
        (folder / "classes.yaml").write_text(yaml.safe_dump(values))
        return str(folder / "classes.yaml")

    return make


def of_class(name: str, /, **keys: Any) -> Callable[[Path], str]:
    return class_set(
        lambda values: next(entry for entry in values["classes"] if entry["name"] == name).update(keys)
    )


def attribute_file(change: Callable[[list[str]], list[str]]) -> Callable[[Path], str]:
    """The demo's sentences in a file of their own, changed."""

    def make(folder: Path) -> str:
        own = resources.files("wsss_pipeline.data") / "attributes" / "demo.json"
        content = {name: change(sentences) for name, sentences in json.loads(own.read_text("utf-8")).items()}
        (folder / "attributes.json").write_text(json.dumps(content))
        return str(folder / "attributes.json")

    return make


CRF = {"refine": "crf", "crf.backend": "lattice"}
PAR = {"refine": "par"}
UNREFINED = {"refine": "none"}
VOTE = {"refine": "vote", "vote.regions": "slic"}


def regions(columns: int = 40) -> Callable[[Path], str]:
    """A folder of regions of the scene: its upper half, and of its lower half the first columns."""

    def make(folder: Path) -> str:
        masks = np.zeros((2, *IMAGE.shape[:2]), bool)
        masks[0, :40], masks[1, 40:, :columns] = True, True
        (folder / "regions").mkdir()
        content = [
            {"segmentation": {"size": list(mask.shape), "counts": run_lengths(mask).tolist()}}
            for mask in masks
        ]
        (folder / "regions" / f"{IMAGE_ID}.json").write_text(json.dumps({"annotations": content}))
        return str(folder / "regions")

    return make


# a folder of them; see ``regions``
REGIONS = "{regions}"
PARTLY = {"refine": "vote", "vote.regions": REGIONS}


def network(bias: float = 0.0, certain: int | None = None) -> Callable[[Path], str]:
    """A run's folder, a bias of its decoder changed by so much; it may be certain of a class, whatever it sees."""

    def make(folder: Path) -> str:
        chosen = {"first_block": 2, "last_block": 3, "width": 16, "heads": 2, "depth": 1}
        config = NetworkConfig.model_validate({"name": "frozen-clip", "encoder": "demo", "frozen": chosen})
        torch.manual_seed(0)
        built = build_network(config, 11, clip=loaded(locate_clip(ClipConfig(weights="demo"), offline=True)))
        with torch.no_grad():
            built.get_parameter("model.fusion.fuse.bias")[0] += bias
            if certain is not None:
                built.get_parameter("model.decoder.classify.bias")[certain] += 100
        save_network(built, folder / "last", config, load_class_set("demo").names)
        return str(folder)

    return make


def prompts(background: bool = True, add: float = 0.0) -> Callable[[Path], str]:
    """A file of prompts for the demo's classes, of a seeded context, to which so much is added."""

    def make(folder: Path) -> str:
        classes, clip = load_class_set("demo"), loaded(locate_clip(ClipConfig(weights="demo"), offline=True))
        words = classes.background if background else ("",) * 3
        shape = (4, 128) if background else (len(classes.names) + 3, 4, 128)
        context = initial_context(shape, 0.3, "7") + add
        texts = tuple(entry.texts() for entry in classes.classes)
        made = LearnedPrompts(context, "end", classes.names, texts, words, text_tower_digest(clip))
        made.save(folder / "prompts.safetensors")
        return str(folder / "prompts.safetensors")

    return make


PATCHES = {"excel.affinity": False}
GUIDED = {"excel.checkpoint": NETWORK}
GATED = {"weclip.checkpoint": NETWORK}
WEIGHED = {**GATED, "weclip.prior": True}
UNSPREAD = {"fma.affinity": "none"}
# a file of prompts; see ``prompts``
LEARNED = {"prompts": "{prompts}"}
PROMPTS = {
    "prompts": [
        Row(prompts(), CHANGES),
        Row(prompts(), SAME, LEARNED),  # in another folder
        Row(prompts(add=0.1), CHANGES, LEARNED),
        Row(prompts(background=False), CHANGES, LEARNED),
    ],
    "templates": [Row(("a drawing of the {}",), SAME, LEARNED)],
}
# 320 pixels are many of the demo CLIP's patches
# and the regions that vote in fma have to come from somewhere
SMALL: dict[str, dict[str, Any]] = {"excel": {"excel.side": 128}, "fma": {"vote.regions": "slic"}}

# settings that every method has
COMMON: dict[str, list[Row]] = {
    "method": [Row(TOY, CHANGES)],
    "classes": [Row(class_set(lambda values: values["classes"].reverse()), CHANGES)],
    "images.pixel_range": [Row("0:40000", CHANGES), Row((0, 65535), ROUNDING)],
    "templates": [Row(("a drawing of the {}",), CHANGES), Row(("a photo of a {}.",), SAME)],
    "clip.weights": [
        Row(clip_folder(other_weights), CHANGES),
        Row(clip_folder(nothing), SAME),
    ],
    "clip.tokenizer": [Row(clip_folder(other_vocabulary), CHANGES), Row(clip_folder(nothing), SAME)],
    "clip.activation": [Row("gelu", CHANGES), Row("quick_gelu", SAME)],
    "clip.head_width": [Row(64, CHANGES), Row(32, SAME)],
    "clip.text_head_width": [Row(64, CHANGES), Row(32, SAME)],
    "clip.precision": [Row("bf16", CHANGES)],
    "refine": [
        Row("none", CHANGES, CRF),
        Row("crf", CHANGES, UNREFINED),
        Row("par", CHANGES, UNREFINED),
        Row("par", CHANGES, CRF),
    ],
    "crf.backend": [
        Row("auto", SAME, CRF),
        Row("pydensecrf", ROUNDING, CRF),
        Row("none", SAME, PAR),
    ],
    "crf.image": [Row("reference", CHANGES, CRF), Row("reference", SAME, UNREFINED)],
    "crf.half_scores": [Row(False, ROUNDING, CRF), Row(False, SAME, UNREFINED)],
    "crf.iterations": [Row(2, CHANGES, CRF), Row(2, SAME, UNREFINED), Row(2, SAME, PAR)],
    "crf.gaussian_sxy": [Row(3.0, CHANGES, CRF), Row(1, SAME, CRF), Row(3.0, SAME, UNREFINED)],
    "crf.gaussian_weight": [Row(6.0, CHANGES, CRF), Row(6.0, SAME, UNREFINED)],
    "crf.bilateral_sxy": [Row(20.0, CHANGES, CRF), Row(20.0, SAME, UNREFINED)],
    "crf.bilateral_srgb": [Row(9.0, CHANGES, CRF), Row(9.0, SAME, UNREFINED)],
    "crf.bilateral_weight": [Row(8.0, CHANGES, CRF), Row(8.0, SAME, UNREFINED)],
    "par.iterations": [Row(2, CHANGES, PAR), Row(2, SAME, CRF), Row(2, SAME, UNREFINED)],
    "par.dilations": [
        Row((1, 2, 4), CHANGES, PAR),
        Row([1, 2, 4, 8, 12, 24], SAME, PAR),
        Row((1, 2, 4), SAME, CRF),
    ],
    "par.width": [Row(0.6, CHANGES, PAR), Row(0.6, SAME, CRF)],
    "par.distance_weight": [Row(0.5, CHANGES, PAR), Row(0.5, SAME, CRF)],
    "vote.regions": [
        Row(regions(), CHANGES, VOTE),
        Row(regions(), SAME, PARTLY),  # in another folder
        Row(regions(columns=60), CHANGES, PARTLY),
    ],
    "vote.background_power": [Row(9.0, CHANGES, VOTE), Row(9.0, SAME, CRF)],
    "vote.uncovered": [Row("crf", CHANGES, PARTLY), Row("crf", SAME, CRF)],
    "slic.segments": [Row(30, CHANGES, VOTE), Row(30, SAME, PARTLY), Row(30, SAME, CRF)],
    "slic.compactness": [Row(0.5, CHANGES, VOTE), Row(0.5, SAME, CRF)],
    "slic.sigma": [Row(4.0, CHANGES, VOTE), Row(4.0, SAME, CRF)],
    "confidence": [
        Row("margin", CHANGES),
        Row("posterior", CHANGES, UNREFINED),
        Row("posterior", CHANGES, {**VOTE, "max_pixels": 5000}),
    ],
    "max_pixels": [Row(5000, CHANGES)],
}

# by method: settings of its own, and what comes of the others for it alone
OWN: dict[str, dict[str, list[Row]]] = {
    "clip-es": {
        "clip.weights": [
            Row(clip_folder(pixels([0.5, 0.5, 0.5])), CHANGES),
            Row(clip_folder(pixels([0.48145466, 0.4578275, 0.40821073])), SAME),
        ],
        "crf.backend": [Row("none", CHANGES)],
        "cam.affinity": [Row(False, CHANGES)],
        "cam.affinity_layers": [Row(2, CHANGES), Row(2, SAME, {"cam.affinity": False})],
        "cam.affinity_iterations": [Row(3, CHANGES), Row(3, SAME, {"cam.affinity": False})],
        "cam.sinkhorn_rounds": [Row(1, CHANGES), Row(1, SAME, {"cam.affinity": False})],
        "cam.threshold": [Row(0.8, CHANGES), Row(0.8, SAME, {"cam.affinity": False})],
        **PROMPTS,
    },
    "excel": {
        "crf.backend": [Row("none", SAME)],
        "excel.size": [Row("native", CHANGES)],
        "excel.side": [Row(96, CHANGES), Row(96, SAME, {"excel.size": "native"})],
        "excel.refine_on": [Row("image", CHANGES), Row("image", SAME, {"excel.size": "native"})],
        "excel.calibrated_blocks": [Row(1, CHANGES), Row(0, CHANGES)],
        "excel.attributes": [
            Row("none", CHANGES),
            Row(attribute_file(lambda sentences: sentences), SAME),
            Row(attribute_file(lambda sentences: sentences[::2]), CHANGES),
        ],
        "excel.clusters": [Row(5, CHANGES), Row(5, SAME, {"excel.attributes": "none"})],
        "excel.affinity": [Row(False, CHANGES)],
        "excel.affinity_layers": [Row(2, CHANGES), Row(2, SAME, PATCHES)],
        "excel.affinity_iterations": [Row(3, CHANGES), Row(3, SAME, PATCHES)],
        "excel.sinkhorn_rounds": [Row(1, CHANGES), Row(1, SAME, PATCHES)],
        "excel.threshold": [Row(0.2, CHANGES), Row(0.2, SAME, PATCHES)],
        "excel.checkpoint": [
            Row(network(), CHANGES),
            Row(network(), CHANGES, PATCHES),
            Row(network(), SAME, GUIDED),  # in another folder
            Row(network(bias=0.5), CHANGES, GUIDED),
        ],
        "excel.mirrored": [Row(False, CHANGES, GUIDED), Row(False, SAME)],
    },
    "weclip": {
        "crf.backend": [Row("none", SAME)],
        "weclip.affinity_layers": [Row(2, CHANGES), Row(2, SAME, GATED)],
        "weclip.gated_layers": [Row(2, CHANGES, GATED), Row(2, SAME)],
        "weclip.affinity_iterations": [Row(3, CHANGES), Row(3, CHANGES, GATED)],
        "weclip.sinkhorn_rounds": [Row(1, CHANGES), Row(1, CHANGES, GATED)],
        "weclip.boxes": [Row(False, CHANGES), Row(False, CHANGES, GATED)],
        "weclip.threshold": [
            Row(0.8, CHANGES),
            Row(0.8, CHANGES, GATED),
            Row(0.8, SAME, {"weclip.boxes": False}),
        ],
        "weclip.prior": [Row(True, CHANGES, GATED), Row(True, SAME)],
        "weclip.left_out": [Row(1, CHANGES), Row(1, CHANGES, GATED)],
        "weclip.checkpoint": [
            Row(network(), CHANGES),
            Row(network(), SAME, GATED),  # in another folder
            Row(network(bias=0.5), CHANGES, GATED),
            Row(network(bias=0.5), CHANGES, WEIGHED),
        ],
        **PROMPTS,
    },
    "fma": {
        "crf.backend": [Row("none", SAME)],
        "fma.affinity": [Row("score", CHANGES), Row("none", CHANGES)],
        "fma.affinity_layers": [Row(2, CHANGES), Row(2, SAME, UNSPREAD)],
        "fma.affinity_iterations": [Row(3, CHANGES), Row(3, SAME, UNSPREAD)],
        "fma.sinkhorn_rounds": [Row(3, CHANGES), Row(3, SAME, UNSPREAD)],
        "fma.threshold": [Row(0.8, CHANGES), Row(0.8, SAME, UNSPREAD)],
        **PROMPTS,
    },
    TOY: {"crf.backend": [Row("none", SAME)], "sharpness": [Row(10.0, CHANGES)]},
}

# parts of a class set; the image's classes are starfish, mushroom and ball
CLASS_SETS: dict[str, list[Row]] = {
    "name": [Row(class_set(lambda values: values.update(name="other")), SAME)],
    "templates": [Row(class_set(lambda values: values.update(template="the {}")), CHANGES)],
    "background": [Row(class_set(lambda values: values.update(background=["wood", "snow"])), CHANGES)],
    "classes": [Row(class_set(lambda values: values["classes"].pop(1)), CHANGES)],
    "classes.name": [Row(of_class("kite", name="bird", prompt="kite"), ROUNDING)],
    "classes.prompt": [
        Row(of_class("ball", prompt="car"), CHANGES),
        Row(of_class("ball", prompt="ball"), SAME),
    ],
    "classes.synonyms": [Row(of_class("ball", synonyms=["red"]), CHANGES)],
    "classes.fuse": [Row(of_class("mushroom", synonyms=["cup"], fuse="feature"), CHANGES)],
    "classes.aliases": [Row(of_class("ball", aliases=["sphere"]), SAME)],
    "classes.attributes": [Row(of_class("ball", attributes=["It is round."]), SAME)],
    "classes.coco_id": [Row(of_class("ball", coco_id=37), SAME)],
    "classes.color": [Row(of_class("ball", color=[200, 10, 10]), SAME)],
}


@pytest.fixture(autouse=True)
def clip_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and copying take longer than a mask."""
    monkeypatch.setattr(module, "load_clip", lambda files, device: loaded(files))


@cache
def image_file() -> Path:
    """The scene in 16 bits, which are taken for what they were before."""
    folder = TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "scene.png"
    assert cv2.imwrite(str(path), IMAGE[..., ::-1].astype(np.uint16) * 257)
    assert np.array_equal(as_pixels(path), IMAGE)
    return path


@cache
def loaded(files: ClipFiles) -> Clip:
    return load_clip(files, torch.device("cpu"))


def made(method: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Fingerprint of the mask set, and digest of what the scene's mask holds."""
    base = {"clip.weights": "demo", "clip.precision": "fp32", "classes": DEMO, "method": method}
    base |= SMALL.get(settings.get("method", method), {})
    generator = MaskGenerator(settings={**base, **settings}, device="cpu", offline=True)
    if generator.precision != "fp32":  # which casts the weights in place
        generator.loaded_clip = load_clip(generator.clip, generator.device)
    found = generator(image_file(), LABELS, IMAGE_ID)
    assert found.cams is not None
    content = hashlib.sha256(found.mask.tobytes() + found.confidence.tobytes() + found.cams.tobytes())
    return generator.mask_set.fingerprint, content.hexdigest()


@cache
def unchanged(method: str, given: tuple[tuple[str, Any], ...]) -> tuple[str, str]:
    return made(method, dict(given))


def is_shown_by(method: str, key: str) -> bool:
    """Readers, refiners and the form of CLIP know no method: what their settings do is shown with one alone."""
    of_none = ("images.", "crf.", "par.", "vote.", "slic.")
    of_none += ("clip.activation", "clip.head_width", "clip.text_head_width")
    return method == method_names()[0] or not key.startswith(of_none)


def rows() -> list[Any]:
    listed = [
        pytest.param(method, key, row, id=f"{method}-{key}-{number}")
        for method in [*method_names(), TOY]
        for key in {**COMMON, **OWN.get(method, {})}
        for number, row in enumerate(
            [*(COMMON.get(key, []) if is_shown_by(method, key) else []), *OWN.get(method, {}).get(key, [])]
        )
        if row.value != method
    ]
    return listed + [
        pytest.param(method_names()[0], "classes", row, id=f"class set-{key}-{number}")
        for key, of_key in CLASS_SETS.items()
        for number, row in enumerate(of_key)
    ]


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return network()(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def region_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return regions()(tmp_path_factory.mktemp("regions"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prompts()(tmp_path_factory.mktemp("prompts"))


@pytest.mark.parametrize(("method", "key", "row"), rows())
def test_the_fingerprint_changes_with_the_masks_and_only_then(
    method: str,
    key: str,
    row: Row,
    tmp_path: Path,
    network_folder: str,
    region_folder: str,
    prompts_file: str,
) -> None:
    if row.value == "pydensecrf" and not has_pydensecrf():
        pytest.skip("the optional package pydensecrf isn't installed")
    value = row.value(tmp_path) if callable(row.value) else row.value
    made_before = {NETWORK: network_folder, REGIONS: region_folder, LEARNED["prompts"]: prompts_file}
    given = {name: made_before.get(str(value), value) for name, value in row.given.items()}
    before, masks_before = unchanged(method, tuple(given.items()))
    after, masks = made(method, {**given, key: value})
    assert (after == before) == (row.outcome == SAME), "the fingerprint"
    if row.outcome != ROUNDING:
        assert (masks == masks_before) == (row.outcome == SAME), "the masks"


@pytest.mark.parametrize("method", [*method_names(), TOY])
def test_every_setting_has_a_row(method: str) -> None:
    keys = {key for key, _, _ in fields(load_method(method).Config)}
    assert keys == COMMON.keys() | OWN[method].keys()


def test_every_part_of_a_class_set_has_a_row() -> None:
    entries = {f"classes.{name}" for name in ClassEntry.model_fields}
    assert ClassSet.model_fields.keys() | entries == CLASS_SETS.keys()


@pytest.mark.parametrize("method", [*method_names(), TOY])
def test_determinants_are_canonical_json_and_what_a_manifest_gives_back(method: str) -> None:
    settings = {"clip.weights": "demo", "classes": "demo", "method": method, "clip.precision": "fp32"}
    settings["confidence"] = "posterior"
    mask_set = MaskGenerator(settings=settings, device="cpu", offline=True).mask_set
    text = json.dumps(mask_set.determinants, sort_keys=True, allow_nan=False)
    assert "confidence" not in mask_set.determinants, (
        "sets of before there was a choice keep their fingerprint"
    )
    assert json.loads(text) == mask_set.determinants, "no tuples, no keys that aren't texts"
    assert fingerprint(json.loads(text)) == mask_set.fingerprint
    assert mask_set.determinants["method"] == {
        "name": load_method(method).name,
        "version": load_method(method).version,
    }


# fingerprints, the CLIP left out: with other numbers in a preset, other defaults, or another version of a method, all
# masks made before are made anew
PRESETS = {
    "clip-es/coco14": "7badeb5b1f5a",
    "clip-es/demo": "aa3780e58445",
    "clip-es/voc12": "99c5726514f9",
    "excel/coco14": "1599e90c359d",
    "excel/demo": "dd0b4ee5411d",
    "excel/voc12": "879120b56354",
    "fma/coco14": "d8f6b04dff96",
    "fma/coco14-coarse": "01e9219aaf96",
    "fma/demo": "0c38757c36d1",
    "fma/voc12": "271b1ca3ecee",
    "fma/voc12-coarse": "f4a4dbc0a3a5",
    "weclip/coco14": "a18cf5d62ca1",
    "weclip/demo": "d707580a5006",
    "weclip/plus-coco14": "a18cf5d62ca1",
    "weclip/plus-voc12": "28251caf6da0",
    "weclip/voc12": "104024ef7e07",
}


@pytest.mark.parametrize("preset", preset_names())
def test_mask_sets_of_earlier_versions_are_found_again(preset: str) -> None:
    given = {"clip.weights": "demo", "clip.precision": "fp32"}
    given |= {"vote.regions": "slic"} if preset.startswith("fma/") else {}
    determinants = MaskGenerator(
        preset=preset, settings=given, device="cpu", offline=True
    ).mask_set.determinants
    assert (
        fingerprint({key: value for key, value in determinants.items() if key != "clip"})[:12]
        == PRESETS[preset]
    )


def test_mask_sets_of_a_network_are_found_again(network_folder: str) -> None:
    found = {}
    for method in ("excel", "weclip"):
        given = {"clip.weights": "demo", "clip.precision": "fp32", "classes": DEMO, "method": method}
        given |= {f"{method}.checkpoint": network_folder}
        determinants = MaskGenerator(settings=given, device="cpu", offline=True).mask_set.determinants
        assert len(str(determinants["network"])) == 64
        kept = {key: value for key, value in determinants.items() if key not in ("clip", "network")}
        found[method] = fingerprint(kept)[:12]
    assert found == {"excel": "fb7f163adebf", "weclip": "b0c276c67d27"}


def raw_maps(method: str, image: np.ndarray, settings: Mapping[str, Any]) -> torch.Tensor:
    """Class activation maps (K, h, w) of the scene's labels."""
    base = {"clip.weights": "demo", "clip.precision": "fp32", "classes": DEMO, "method": method}
    made = MaskGenerator(settings={**base, **SMALL.get(method, {}), **settings}, device="cpu", offline=True)
    prepared = made.prepare(image, LABELS)
    with torch.no_grad():
        (maps,) = made.method.scores(prepared.prepared.pixels[None], [prepared.classes])
    return maps


def test_a_mirrored_image_has_mirrored_maps_where_both_are_seen(network_folder: str) -> None:
    settings = {"excel.checkpoint": network_folder, "excel.affinity": False}
    for seen in (True, False):
        maps, mirrored = (
            raw_maps("excel", image, {**settings, "excel.mirrored": seen})
            for image in (IMAGE, IMAGE[:, ::-1])
        )
        assert ((mirrored.flip(-1) - maps).abs().max() < 1e-4) == seen


def test_a_prior_leaves_the_maps_of_classes_that_the_network_sees_at_a_place(tmp_path: Path) -> None:
    settings = {
        "weclip.checkpoint": network(certain=load_class_set("demo").names.index(LABELS[1]) + 1)(tmp_path)
    }
    plain, weighed = (
        raw_maps("weclip", IMAGE, {**settings, "weclip.prior": prior}) for prior in (False, True)
    )
    torch.testing.assert_close(weighed[1], plain[1], rtol=1e-3, atol=1e-6)
    assert weighed[[0, 2]].abs().max() < 1e-3 * plain[[0, 2]].abs().max()
