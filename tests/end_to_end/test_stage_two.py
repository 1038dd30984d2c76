"""Stage two through the command line: train, evaluate, predict, export, report."""

from __future__ import annotations

import json
import re
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.end_to_end.conftest import wsss
from tests.forks import ForkServer
from tests.pictures.browser import CHROMIUM, needs_chromium
from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, PseudoMask, open_mask_set
from wsss_pipeline.data.images import read_mask
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.segmentation.checkpoint import load_network

TINY = ("--network", "segformer", "--encoder", "tiny", "--weights", "none", "--crop", 64, "--batch-size", 2)
SOLVER = ("--set", "optimisation.optimizer=adamw", "--set", "optimisation.head_lr_factor=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=3, scenes={"train": 6, "val": 3})
    return folder


def train_arguments(root: Path, out: Path) -> list[object]:
    lists = root / "ImageSets/Segmentation"
    return [
        *("train-seg", "--gt-masks", root / "SegmentationClass", "--classes", "demo", "--workers", 0),
        *("--images", root / "JPEGImages", "--split", lists / "train.txt", "--out", out, "--device", "cpu"),
        *("--val-gt", root / "SegmentationClass", "--val-split", lists / "val.txt", *TINY, *SOLVER),
    ]


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "run"
    result = wsss(*train_arguments(root, out), "--iterations", 6, "--set", "validate_every=3")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out / "best")
    assert "best mIoU" in result.stderr
    assert "6/6 updates" in result.stderr
    return out


def test_a_finished_run_is_not_trained_again(root: Path, run: Path) -> None:
    before = (run / "log.jsonl").read_bytes()
    result = wsss(*train_arguments(root, run), "--iterations", 6, "--set", "validate_every=3")
    assert result.exit_code == 0
    assert (run / "log.jsonl").read_bytes() == before


def test_evaluation_shows_the_variants_side_by_side(root: Path, run: Path, tmp_path: Path) -> None:
    result = wsss(
        *(
            "evaluate",
            "--checkpoint",
            run,
            "--images",
            root / "JPEGImages",
            "--gt",
            root / "SegmentationClass",
        ),
        *("--split", root / "ImageSets/Segmentation/val.txt", "--scales", "0.5,1", "--flip", "--crf"),
        *("--json", tmp_path / "scores.json", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    head = result.stdout.splitlines()[0]
    assert re.fullmatch(r"IoU % +raw +scales 0.5,1 flip +\+CRF", head)
    assert "split val, 3 images (ids " in result.stdout
    values = json.loads((tmp_path / "scores.json").read_text())
    assert list(values["variants"]) == ["raw", "scales 0.5,1 flip", "+CRF"]
    assert values["miou"] == values["variants"]["+CRF"]["miou"]
    assert values["variants"]["raw"]["crf"] == {"backend": "none"}
    assert values["crf"]["image"] == "bgr"
    assert {"per_class_iou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "images"} <= set(
        values
    )


def test_the_networks_masks_score_what_the_network_scores(root: Path, run: Path, tmp_path: Path) -> None:
    images, truth = root / "JPEGImages", root / "SegmentationClass"
    done = wsss(
        "predict", "--checkpoint", run, "--images", images, "--out", tmp_path, "--overlays", "--confidence"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(tmp_path / "masks")
    assert "9 masks written, 0 failed" in done.stderr
    with Image.open(tmp_path / "masks/val_00000.png") as mask:
        assert mask.mode == "P"
        assert mask.size == (160, 120)
    assert read_mask(tmp_path / "confidence/val_00000.png").max() <= 200
    assert (tmp_path / "overlays/val_00000.jpg").is_file()
    scores = []
    for source in (
        ["--predictions", tmp_path / "masks", "--classes", "demo"],
        ["--checkpoint", run, "--images", images],
    ):
        result = wsss("evaluate", *source, "--gt", truth, "--json", "-")
        scores.append(json.loads(result.stdout)["per_class_iou"])
    assert scores[0] == scores[1]
    again = wsss("predict", "--checkpoint", run, "--images", images, "--out", tmp_path)
    assert "0 masks written, 9 were there already" in again.stderr


def test_a_bad_picture_is_skipped_and_counted(root: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.jpg").write_bytes((root / "JPEGImages/val_00000.jpg").read_bytes())
    (tmp_path / "in/bad.jpg").write_bytes(b"no picture")
    result = wsss("predict", "--checkpoint", run, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "1 masks written, 1 failed" in result.stderr
    assert "bad" in result.stderr


class Page(HTMLParser):
    """Collects what a page would load and whether its tags are balanced."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def chromium(page: Path, *arguments: str) -> str:
    """What a headless browser prints."""
    assert CHROMIUM is not None
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1500"]
    done = subprocess.run(
        [*common, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.loads)
    return page


def test_the_report_of_a_network_is_one_self_contained_page(root: Path, run: Path, tmp_path: Path) -> None:
    result = wsss(
        *(
            "evaluate",
            "--checkpoint",
            run,
            "--images",
            root / "JPEGImages",
            "--gt",
            root / "SegmentationClass",
        ),
        *("--report", tmp_path / "report.html"),
    )
    assert result.exit_code == 0, result.output
    page = read_page((tmp_path / "report.html").read_text("utf-8"))
    assert len(page.loads) == 9 * 3, "picture, prediction and ground truth of each image"
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Worst images" in text
    assert "Largest confusions" in text
    assert "starfish" in text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class names and image ids that are HTML, in a cache made by hand."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    names = ("<script>alert(3)</script>", "dog")
    mask_set = open_mask_set(
        folder / "cache", MaskSet(name="hostile", determinants={"made": "by hand"}, class_names=names)
    )
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:20] = 1
    pseudo_mask = PseudoMask(mask, np.full((30, 40), 150, np.uint8), names[:1])
    ids = ("<script>alert(1)<", '"><img src=x onerror=alert(2)>')
    with MaskWriter(mask_set) as writer:
        for image_id in ids:
            writer.write(image_id, pseudo_mask, image_digest="0" * 64, seconds=0.1)
        writer.finish(ids)
    for image_id in ids:
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(images / f"{image_id}.png")
    return folder


def test_a_report_without_ground_truth_escapes_names(hostile: Path) -> None:
    report = hostile / "report.html"
    result = wsss(
        "evaluate", "--cache", hostile / "cache", "--images", hostile / "images", "--report", report
    )
    assert result.exit_code == 0, result.output
    assert "2 images looked at, none scored" in result.stderr
    text = report.read_text("utf-8")
    read_page(text)
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;script&gt;alert(3)" in text
    assert "Lowest mean confidence" in text


@needs_chromium
def test_a_browser_shows_the_report_and_runs_nothing_in_it(hostile: Path, tmp_path: Path) -> None:
    report = tmp_path / "a report.html"
    arguments = ("--cache", hostile / "cache", "--images", hostile / "images", "--report", report)
    assert wsss("evaluate", *arguments).exit_code == 0
    page = read_page(chromium(report, "--dump-dom"))
    assert len(page.loads) == 2 * 2 * 3, "picture, pseudo mask and confidence of each image, in both sections"
    chromium(report, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as shot:
        pixels = np.asarray(shot.convert("RGB"))
    assert pixels.shape == (1500, 1000, 3)
    # the pictures are coloured noise, the rest of the page is nearly grey
    saturated = pixels.max(axis=2).astype(int) - pixels.min(axis=2) > 100
    assert saturated.mean() > 0.005


PREDICT = ["predict", "--images", "{images}", "--out", "o"]
EVALUATE = ["evaluate", "--checkpoint", "{run}", "--gt", "{gt}"]
TRAIN = ["train-seg", "--images", "{images}", "--out", "o"]
ON_TRUTH = [*TRAIN, "--gt-masks", "{gt}"]
SCORE_MASKS = ["evaluate", "--predictions", "{gt}", "--classes", "demo", "--gt", "{gt}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PREDICT, "--checkpoint", "nowhere"], "nowhere holds no checkpoint"),
        ([*PREDICT, "--checkpoint", "{run}", "--scales", "a"], "--scales a:"),
        (EVALUATE, "need --images DIR"),
        ([*EVALUATE, "--images", "{images}", "--classes", "demo"], "--classes doesn't go with --checkpoint"),
        (["evaluate", "--cache", "x"], "--gt is missing"),
        ([*SCORE_MASKS, "--flip"], "--flip goes with --checkpoint"),
        (
            ["export-model", "--checkpoint", "{run}", "--out", "net.bin"],
            "end the name of an ONNX file in .onnx",
        ),
        (TRAIN, "give the masks once"),
        (ON_TRUTH, "--gt-masks needs --classes"),
        ([*TRAIN, "--cache", "nowhere"], "nowhere"),
        ([*ON_TRUTH, "--classes", "demo", "--offline"], "offline"),
        ([*ON_TRUTH, "--classes", "demo", "--recipe", "x"], "unknown recipe 'x'"),
        ([*ON_TRUTH, "--classes", "demo", "--set", "optimisation.lrr=1"], "did you mean 'optimisation.lr'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    root: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"images": root / "JPEGImages", "gt": root / "SegmentationClass", "run": run}
    result = wsss(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_recipes_are_whole() -> None:
    from wsss_pipeline.config import recipe_names
    from wsss_pipeline.segmentation.train_config import load_train_config

    assert set(recipe_names()) >= {
        *("voc12/deeplabv2-imagenet", "voc12/deeplabv2-coco", "coco14/deeplabv2", "voc12/segformer-b2"),
        *("demo/deeplabv3plus", "demo/segformer"),
    }
    for name in recipe_names():
        assert load_train_config(name).version == 1
    published = load_train_config("voc12/deeplabv2-imagenet")
    assert (published.optimisation.lr, published.optimisation.iterations) == (2e-4, 20_000)
    assert published.loss.balanced
    assert load_train_config("voc12/deeplabv2-coco").optimisation.lr == 2.5e-5


def test_a_kill_at_any_moment_loses_no_checkpoint(root: Path, tmp_path: Path, forks: ForkServer) -> None:
    """SIGKILL while checkpoints are written after every update; the run still ends as one that wasn't disturbed."""
    arguments = [*train_arguments(root, tmp_path / "run"), "--iterations", 16, "--set", "save_every=1"]
    log = tmp_path / "run" / "log.jsonl"
    seen = 0
    for extra in (0.0, 0.05):
        process = forks.start(*arguments)
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < seen + 3):
            time.sleep(0.005)
        time.sleep(extra)
        process.kill()
        process.wait()
        seen = len(log.read_text().splitlines())
        assert load_network(tmp_path / "run" / "last").class_names[0] == "ball"
    # forks all: a run is the same to the last bit only in as many threads
    code, _, stderr = forks.run(*arguments)
    assert code == 0, stderr
    assert "going on after update" in stderr
    arguments[: len(arguments) - 4] = train_arguments(root, tmp_path / "other")
    assert forks.run(*arguments)[0] == 0
    one, other = (load_network(tmp_path / name / "last").network.state_dict() for name in ("run", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_pseudo_masks_of_a_cache_are_trained_on(root: Path, tmp_path: Path) -> None:
    """Both stages with the embedded CLIP: images and tags in, a network out."""
    made = wsss(
        *("generate-masks", "--voc", root, "--split", "train", "--classes", "demo", "--clip", "demo"),
        *("--cache", tmp_path / "cache", "--workers", 0, "--offline", "--crf", "none"),
    )
    assert made.exit_code == 0, made.output
    assert len(MaskCache.open(tmp_path / "cache")) == 6
    arguments = [
        "train-seg",
        "--cache",
        tmp_path / "cache",
        "--images",
        root / "JPEGImages",
        "--out",
        tmp_path / "run",
    ]
    refused = wsss(*arguments, *TINY, "--iterations", 2)
    assert refused.exit_code == 2
    assert "3 of the 9 images aren't in the mask set" in refused.stderr
    done = wsss(
        *arguments,
        *TINY,
        *SOLVER,
        "--iterations",
        2,
        "--allow-missing",
        "--min-confidence",
        0.5,
        "--workers",
        0,
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(tmp_path / "run" / "last")
