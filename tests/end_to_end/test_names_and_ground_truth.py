"""Labels, class lists and ground truth of other tools, through the commands."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import IDS, mask_set, save, write_scored_world, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.images import read_mask
from wsss_pipeline.demo.voc_folder import write_voc_folder

COLORS = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255]], np.uint8)
TRAIN = (
    *("train-seg", "--network", "segformer", "--encoder", "tiny", "--weights", "none", "--crop", 64),
    *("--batch-size", 2, "--iterations", 1, "--device", "cpu", "--workers", 0),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``write_scored_world`` with its ground truth in CVAT's colours, in others, and binary."""
    folder = write_scored_world(tmp_path_factory.mktemp("root"))
    for image_id in IDS:
        mask = read_mask(folder / "truth" / f"{image_id}.png")
        save(folder / "cvat/SegmentationClass" / f"{image_id}.png", COLORS[mask])
        save(folder / "colours" / f"{image_id}.png", COLORS[mask][..., ::-1])
        save(folder / "binary" / f"{image_id}.png", np.where(mask > 0, 255, 0).astype(np.uint8))
    (folder / "cvat/labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\ndog:51,221,255::\nbackground:0,0,0::\ncat:250,50,83::\n"
    )
    (folder / "own.yaml").write_text(
        "classes:\n- {name: cat, color: [83, 50, 250]}\n- {name: dog, color: [255, 221, 51]}\n"
    )
    (folder / "labels.txt").write_text("__ignore__\n_background_\ncat\ndog\n")
    return folder


def scores(*arguments: object) -> dict[str, float | None]:
    result = wsss("evaluate", "--json", "-", *arguments)
    assert result.exit_code == 0, result.stderr
    values: dict[str, float | None] = json.loads(result.stdout)["per_class_iou"]
    return values


def test_coloured_ground_truth_scores_as_its_indices_do(root: Path) -> None:
    right = {"background": 1.0, "cat": (360 - 8) / 360, "dog": None}
    masks = ("--predictions", root / "masks", "--classes")
    assert scores(*masks, root / "labels.txt", "--gt", root / "truth") == right
    assert scores(*masks, "cat,dog", "--gt", root / "cvat/SegmentationClass") == right
    assert scores(*masks, root / "own.yaml", "--gt", root / "colours") == right
    of_network = ("--checkpoint", root / "run", "--images", root / "images", "--device", "cpu")
    assert scores(*of_network, "--gt", root / "cvat/SegmentationClass") == scores(
        *of_network, "--gt", root / "truth"
    )


def test_coloured_ground_truth_trains_and_validates(root: Path, tmp_path: Path) -> None:
    images = ("--images", root / "images")
    for name, classes, truth in (
        ("a", "cat,dog", "cvat/SegmentationClass"),
        ("b", root / "own.yaml", "colours"),
    ):
        trained = wsss(
            *(*TRAIN, *images, "--classes", classes, "--out", tmp_path / name),
            *("--gt-masks", root / truth, "--val-gt", root / truth),
        )
        assert trained.exit_code == 0, trained.stderr
        assert "left out" not in trained.stderr
    logs = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("a", "b")]
    assert logs[0]["loss"] == logs[1]["loss"] > 0
    for classes, reason in (
        ("own.yaml", None),
        ("labels.txt", "this holds colours"),
        (None, "this holds colours"),
    ):
        of_cache = wsss(
            *(*TRAIN, *images, "--cache", root / "cache", "--val-gt", root / "colours", "--overwrite"),
            *(() if classes is None else ("--classes", root / classes)),
            *("--out", tmp_path / "c"),
        )
        assert of_cache.exit_code == (0 if reason is None else 2), of_cache.stderr
        assert reason is None or reason in of_cache.stderr
    other = wsss(
        *(*TRAIN, *images, "--cache", root / "cache", "--val-gt", root / "truth", "--classes", "dog,cat"),
        *("--out", tmp_path / "d"),
    )
    assert other.exit_code == 2
    assert "--classes dog,cat: these aren't the classes to be trained (cat, dog)" in other.stderr


@pytest.mark.parametrize("command", ["evaluate", "train-seg", "validation", "report"])
def test_what_cant_be_ground_truth_is_found_by_all_commands_alike(
    root: Path, tmp_path: Path, command: str
) -> None:
    turned = tmp_path / "turned"
    for image_id in IDS:
        save(turned / f"{image_id}.png", read_mask(root / "truth" / f"{image_id}.png").T.copy())
    images, out = ("--images", root / "images"), ("--out", tmp_path / "run")
    masks = ("--predictions", root / "masks", "--classes", "cat,dog")
    before = {
        "evaluate": ("evaluate", "--checkpoint", root / "run", *images, "--device", "cpu", "--gt"),
        "train-seg": (*TRAIN, *images, *out, "--classes", "cat,dog", "--gt-masks"),
        "validation": (*TRAIN, *images, *out, "--cache", root / "cache", "--val-gt"),
        "report": ("evaluate", *masks, *images, "--report", tmp_path / "r.html", "--gt"),
    }[command]
    for truth, reason in (
        (root / "binary", "hold 0 and 255 only: binary masks? 255 means 'ignore' here, so write objects as"),
        (root / "colours", "none of the masks can be read; the first: "),
        (turned, "the mask of 'a/one' is 40x30, its image 30x40: one of the two was rotated"),
    ):
        result = wsss(*before, truth)
        assert result.exit_code == 2, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"error: ground truth {truth}")
        assert reason in lines[0]
        assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("generate-masks", "--clip", "demo", "--cache", "{out}"),
        ("select-prompt", "--clip", "demo"),
        ("learn-prompts", "--objective", "contrastive", "--clip", "demo", "--out", "{out}"),
        ("train-seg", "--online", "weclip", "--encoder", "demo", "--out", "{out}"),
        ("relabel", "--checkpoint", "{root}/run", "--cache", "{out}"),
    ],
    ids=lambda command: str(command[0]),
)
def test_every_command_that_reads_labels_can_pass_over_other_classes(
    root: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "l.json").write_text('{"three": ["tree"]}')
    line = [text.format(root=root, out=tmp_path / "out") for text in command]
    line += ["--images", str(root / "images"), "--labels", str(tmp_path / "l.json"), "--classes", "cat,dog"]
    plain, ignoring = wsss(*line), wsss(*line, "--other-classes", "ignore")
    assert "unknown class 'tree'" in plain.stderr
    assert (
        "labels: none is a class of 'cat-dog', all are others (tree (1)); check --classes" in ignoring.stderr
    )
    assert plain.exit_code == ignoring.exit_code == 2


def test_labels_of_another_machine_make_the_same_masks(tmp_path: Path) -> None:
    """Addresses, foreign folders, decomposed letters and further classes change nothing but what is told."""
    write_voc_folder(tmp_path, seed=3, scenes={"train": 3}, size=(64, 48))
    images = tmp_path / "JPEGImages"
    decomposed = unicodedata.normalize("NFD", "übung")
    (images / "train_00002.jpg").rename(images / f"{decomposed}.jpg")
    (tmp_path / "plain.json").write_text(
        json.dumps({"train_00000": ["ball"], "train_00001": ["kite", "ball"], decomposed: ["fish"]})
    )
    (tmp_path / "labels.csv").write_text(
        "image,label\nhttps://host/set/train_00000.jpg?key=1,ball\nC:\\set\\train_00001.JPG,kite\n"
        "C:\\set\\train_00001.JPG,tree\nC:\\set\\train_00001.JPG,ball\nübung.jpg,fish\n",
        "utf-8",
    )
    (tmp_path / "classes.txt").write_text("background\nball\nkite\nfish\n")
    common = (
        "--images",
        images,
        "--clip",
        "demo",
        "--offline",
        "--cache",
        tmp_path / "cache",
        "--workers",
        0,
    )
    common = ("generate-masks", *common, "--refine", "none", "--classes", tmp_path / "classes.txt")
    plain = wsss(*common, "--labels", tmp_path / "plain.json")
    assert plain.exit_code == 0, plain.stderr
    with MaskCache.open(mask_set(plain)) as cache:
        assert cache.class_names == ("ball", "kite", "fish")
        assert set(cache) == {"train_00000", "train_00001", decomposed}
    for image_id, name in (("train_00000", "train_00000"), ("train_00002", "übung")):
        mask = np.where(read_mask(tmp_path / f"SegmentationClass/{image_id}.png") > 0, 1, 0).astype(np.uint8)
        save(tmp_path / "truth" / f"{name}.png", mask)
    scored = wsss("evaluate", "--cache", tmp_path / "cache", "--gt", tmp_path / "truth", "--json", "-")
    assert scored.exit_code == 0, scored.stderr
    assert json.loads(scored.stdout)["images"] == 2, "a name in composed letters is that of its image"
    strange = wsss(*common, "--labels", tmp_path / "labels.csv", "--other-classes", "ignore")
    assert strange.exit_code == 0, strange.stderr
    assert "3 masks reused from the cache" in strange.stderr
    assert "'background' passed over" in strange.stderr
    assert "so their objects become background: tree (1)" in strange.stderr
    assert "2 images are named with other folders and were found by file name" in strange.stderr
