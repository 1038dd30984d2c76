"""evaluate, predict and export-model on small folders, a mask set made by hand and an untrained network."""

from __future__ import annotations

import json
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.end_to_end.conftest import IDS, NAMES, save, write_scored_world, wsss
from wsss_pipeline.cache import MaskSet, MaskWriter, PseudoMask, open_mask_set
from wsss_pipeline.data import images
from wsss_pipeline.segmentation.networks import SegFormer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scored_world(tmp_path_factory.mktemp("root"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file has been read to be decoded."""
    count: Counter[str] = Counter()
    original = images.open_plain

    def counted(path: Path, at_most: int) -> BufferedReader:
        count[str(path)] += 1
        return original(path, at_most)

    monkeypatch.setattr(images, "open_plain", counted)
    return count


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that a network has looked at."""
    seen: list[tuple[int, ...]] = []
    original = SegFormer.logits

    def counted(self: SegFormer, images: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(images.shape))
        return original(self, images)

    monkeypatch.setattr(SegFormer, "logits", counted)
    return seen


def predict(root: Path, out: Path, *further: object) -> Any:
    return wsss(
        *("predict", "--checkpoint", root / "run", "--images", root / "images", "--out", out),
        *("--device", "cpu", *further),
    )


def on_masks(root: Path, *further: object) -> tuple[object, ...]:
    return ("evaluate", "--predictions", root / "masks", "--classes", "cat,dog", *further)


def test_predict_decodes_once_and_looks_no_oftener_than_the_scales_say(
    root: Path, tmp_path: Path, decoded: Counter[str], passes: list[tuple[int, ...]]
) -> None:
    done = predict(root, tmp_path, "--scales", "1.5,2", "--overlays", "--confidence")
    assert done.exit_code == 0, done.output
    assert len(passes) == 2 * len(IDS)
    images = {str(root / "images" / f"{image_id}.png") for image_id in IDS}
    assert {name: count for name, count in decoded.items() if name in images} == dict.fromkeys(images, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"masks", "overlays", "confidence"}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert files == {
        f"{kind}/{image_id}.{suffix}"
        for kind, suffix in (("masks", "png"), ("overlays", "jpg"), ("confidence", "png"))
        for image_id in IDS
    }


def test_predict_does_the_images_of_a_split_and_says_which_are_not_there(root: Path, tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    split.write_text(f"{IDS[1]}.png\nnowhere\n")
    done = predict(root, tmp_path / "out", "--split", split)
    assert done.exit_code == 1, done.output
    assert f"nowhere: {split} names it, but {root / 'images'} has no such image" in done.stderr
    assert [path.stem for path in (tmp_path / "out").rglob("*.*")] == [Path(IDS[1]).name]


def test_evaluate_decodes_once_and_reuses_the_plain_pass(
    root: Path, decoded: Counter[str], passes: list[tuple[int, ...]]
) -> None:
    done = wsss(
        *("evaluate", "--checkpoint", root / "run", "--images", root / "images", "--gt", root / "truth"),
        *("--scales", "1,2", "--flip", "--crf", "--device", "cpu", "--json", "-"),
    )
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["variants"]) == ["raw", "scales 1,2 flip", "+CRF"]
    assert len(passes) == 4 * len(IDS)
    # some masks are looked at before anything is computed, and the size in the header of one image that fits
    expected = {str(root / "images" / f"{image_id}.png"): 1 for image_id in IDS}
    expected[str(root / "images" / f"{IDS[0]}.png")] = 2
    expected |= {str(root / "truth" / f"{image_id}.png"): 2 for image_id in IDS}
    assert {name: count for name, count in decoded.items() if name in expected} == expected


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 8 GB")])
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_memory_that_ran_out_is_one_images_failure(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception
) -> None:
    looks = iter(range(len(IDS) + 2))
    original = SegFormer.logits

    def logits(self: SegFormer, images_seen: torch.Tensor) -> torch.Tensor:
        if next(looks) in (1, 2, 3):  # with smaller tiles as well
            raise error
        return original(self, images_seen)

    monkeypatch.setattr(SegFormer, "logits", logits)
    if command == "predict":
        done = predict(root, tmp_path / "out")
        assert "2 masks written, 1 failed" in done.stderr
    else:
        network = ("--checkpoint", root / "run", "--images", root / "images", "--device", "cpu")
        done = wsss("evaluate", *network, "--gt", root / "truth", "--json", "-")
        assert list(json.loads(done.stdout)["skipped"]) == ["a/two"]
    assert done.exit_code == 1, done.output
    assert "a/two: " in done.stderr
    assert "ran out of memory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_progress_shows_how_long_it_takes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("wsss_pipeline.runtime.progress.SECONDS_BETWEEN_LINES", 0.0)
    done = predict(root, tmp_path) if command == "predict" else wsss(*on_masks(root, "--gt", root / "truth"))
    assert done.exit_code == 0, done.output
    assert "3/3 images" in done.stderr
    assert "ETA 0:00:00" in done.stderr
    assert "ETA" not in done.stdout


def test_a_folder_of_masks_is_scored(root: Path) -> None:
    done = wsss(*on_masks(root, "--gt", root / "truth", "--json", "-"))
    values = json.loads(done.stdout)
    assert values["per_class_iou"] == {"background": 1.0, "cat": (360 - 8) / 360, "dog": None}
    assert values["images"] == 3
    assert values["crf"] is None
    assert "variant" not in values


def test_a_mask_set_of_another_refiner_went_through_no_crf(root: Path, tmp_path: Path) -> None:
    by_par = MaskSet(name="hand", determinants={"par": {"iterations": 20}}, class_names=NAMES)
    with MaskWriter(open_mask_set(tmp_path, by_par)) as writer:
        for image_id in IDS:
            mask = PseudoMask(np.zeros((40, 30), np.uint8), np.full((40, 30), 200, np.uint8), ())
            writer.write(image_id, mask, image_digest="0" * 64, seconds=0.1)
        writer.finish(IDS)
    done = wsss("evaluate", "--cache", tmp_path, "--gt", root / "truth", "--json", "-")
    assert json.loads(done.stdout)["crf"] == {"backend": "none", "instead": "PAR"}


def test_confidence_counts_for_a_mask_set_and_a_network_but_not_for_a_folder(root: Path) -> None:
    truth = ("--gt", root / "truth")
    scored = wsss("evaluate", "--cache", root / "cache", *truth, "--min-confidence", 0.8, "--json", "-")
    values = json.loads(scored.stdout)
    assert values["per_class_iou"] == {"background": 1.0, "cat": 0.0, "dog": None}
    assert values["crf"] == {"backend": "lattice"}
    assert values["ignored_predictions"] == pytest.approx(120 / 1200)
    network = ("evaluate", "--checkpoint", root / "run", "--images", root / "images", "--device", "cpu")
    unsure = json.loads(wsss(*network, *truth, "--min-confidence", 1, "--json", "-").stdout)
    assert unsure["ignored_predictions"] > 0.5
    refused = wsss(*on_masks(root, *truth, "--min-confidence", 0.8))
    assert refused.exit_code == 2
    assert "holds no confidence" in refused.stderr


def test_a_damaged_prediction_is_skipped_and_counted(root: Path, tmp_path: Path) -> None:
    for image_id in IDS:
        save(tmp_path / "masks" / f"{image_id}.png", np.zeros((40, 30), np.uint8))
    (tmp_path / "masks" / "a" / "one.png").write_bytes(b"no image")
    done = wsss(*on_masks(tmp_path, "--gt", root / "truth", "--json", "-"))
    assert done.exit_code == 1, done.output
    values = json.loads(done.stdout)
    assert (values["images"], list(values["skipped"])) == (2, ["a/one"])


def test_masks_of_another_class_set_are_refused(root: Path) -> None:
    refused = wsss("evaluate", "--predictions", root / "masks", "--classes", "cat,", "--gt", root / "truth")
    assert refused.exit_code == 2
    assert "three.png holds values 1, 2, but with 1 classes" in refused.stderr
    refused = wsss("evaluate", "--cache", root / "cache", "--classes", "cat,cow", "--gt", root / "truth")
    assert refused.exit_code == 2
    assert "not those of the cache" in refused.stderr


@pytest.mark.parametrize("classes", [(), ("--classes", "cat,dog")])
def test_a_report_without_ground_truth_where_an_image_has_no_prediction(
    root: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    save(tmp_path / "some" / "a" / "one.png", np.zeros((40, 30), np.uint8))
    report = tmp_path / "report.html"
    done = wsss(
        *("evaluate", "--cache", root / "cache", "--predictions", tmp_path / "some", *classes),
        *("--images", root / "images", "--report", report),
    )
    assert done.exit_code == 0, done.output
    assert "3 images looked at, none scored" in done.stderr
    assert done.stdout.splitlines()[-1] == str(report)
    text = report.read_text("utf-8")
    assert "90.0 % of the pixels agree" in text
    assert text.count('alt="Prediction of a/one"') == 3, "one in each section"
    assert 'alt="Prediction of three"' not in text


def test_a_report_shows_the_pseudo_masks_beside_a_networks(root: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.html"
    done = wsss(
        *("evaluate", "--checkpoint", root / "run", "--images", root / "images", "--gt", root / "truth"),
        *("--cache", root / "cache", "--report", report, "--device", "cpu"),
    )
    assert done.exit_code == 0, done.output
    text = report.read_text("utf-8")
    for title in ("Image", "Pseudo mask", "Confidence", "Prediction", "Ground truth"):
        assert f'alt="{title} of a/one"' in text, title


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--predictions", "{root}/masks", "--images", "{root}/images", "--report", "r.html"],
            "give --cache",
        ),
        (["--cache", "{root}/cache", "--gt", "{root}/truth", "--predictions", "{root}/masks"], "masks once"),
        (["--cache", "{root}/cache", "--gt", "{root}/truth", "--report", "r.html"], "need --images"),
        (["--cache", "{root}/cache", "--gt", "{root}/truth", "--window", "64"], "--window goes with"),
        (["--cache", "{root}/cache", "--gt", "{root}/truth", "--scales", "1,30"], "between 0.05 and 20"),
        (["--cache", "{root}/cache", "--gt", "{root}/truth", "--min-confidence", "2"], "between 0 and 1"),
        (["--cache", "{root}/cache", "--gt", "{root}/truth", "--json", "{root}/file/x"], "be written"),
    ],
)
def test_bad_options_are_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (root / "file").touch()
    result = wsss("evaluate", *(argument.format(root=root) for argument in arguments))
    assert result.exit_code == 2
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in error


@pytest.mark.parametrize("command", ["predict", "report", "preview", "huggingface"])
def test_what_cannot_be_written_is_one_line(root: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    cache = ("--cache", root / "cache", "--images", root / "images")
    result = {
        "predict": lambda: predict(root, out),
        "report": lambda: wsss("evaluate", *cache, "--report", out),
        "preview": lambda: wsss("preview", *cache, "--out", out.with_name("sheet.png")),
        "huggingface": lambda: wsss(
            "export-model",
            "--checkpoint",
            root / "run",
            "--format",
            "huggingface",
            "--out",
            tmp_path / "file",
        ),
    }[command]()
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "can't be written" in error
