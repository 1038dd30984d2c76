"""evaluate, preview, export-masks, cache, select-prompt and doctor on a cache that generate-masks made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.end_to_end.conftest import LABELS, Run, mask_set, write_labels, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.classes import load_class_set, voc_palette


@pytest.fixture
def masks(generate: Run) -> Path:
    return mask_set(generate("--store-cams"))


@pytest.fixture
def truth(world: Path, masks: Path) -> Path:
    """Ground truth equal to the masks, but for a part of one image: 10 pixels other, 7 ignored."""
    wsss("export-masks", "--cache", masks, "--out", world / "truth", "--format", "png")
    with Image.open(world / "truth" / "camera_gray.png") as image:
        changed = np.array(image)
    changed[0, :10] = 20 - changed[0, :10]
    changed[5, :7] = 255
    Image.fromarray(changed).save(world / "truth" / "camera_gray.png")
    return world / "truth"


class TestEvaluate:
    """mIoU of a cache and of a folder."""

    def test_scores_equal_a_confusion_matrix_by_hand(self, masks: Path, truth: Path) -> None:
        result = wsss("evaluate", "--cache", masks, "--gt", truth, "--json", "-")
        assert result.exit_code == 0
        scores = json.loads(result.stdout)
        matrix = np.zeros((21, 21))
        with MaskCache.open(masks) as cache:
            for name in cache:
                with Image.open(truth / f"{name}.png") as image:
                    expected = np.array(image)
                for actual, value in zip(
                    expected[expected != 255], cache[name].mask[expected != 255], strict=True
                ):
                    matrix[actual, value] += 1
        diagonal = np.diag(matrix)
        iou = diagonal / np.maximum(1, matrix.sum(0) + matrix.sum(1) - diagonal)
        present = matrix.sum(1) > 0
        assert scores["miou"] == pytest.approx(iou[present].mean())
        assert scores["pixel_accuracy"] == pytest.approx(diagonal.sum() / matrix.sum())
        assert scores["mean_accuracy"] == pytest.approx((diagonal[present] / matrix.sum(1)[present]).mean())
        names = ["background", *load_class_set("voc12").names]
        per_class = [scores["per_class_iou"][name] for name in names]
        assert per_class == pytest.approx(
            [value if there else None for value, there in zip(iou, present, strict=True)]
        )
        assert {"frequency_weighted_iou", "images", "split"} <= set(scores)
        assert scores["images"] == len(LABELS)

    def test_a_folder_of_masks_scores_the_same(self, masks: Path, truth: Path, world: Path) -> None:
        wsss("export-masks", "--cache", masks, "--out", world / "voc", "--format", "voc")
        folder = wsss(
            "evaluate", "--predictions", world / "voc", "--classes", "voc12", "--gt", truth, "--json", "-"
        )
        cache = wsss("evaluate", "--cache", masks, "--gt", truth, "--json", "-")
        assert json.loads(folder.stdout)["miou"] == json.loads(cache.stdout)["miou"]

    def test_the_table_says_what_was_measured(self, masks: Path, truth: Path, world: Path) -> None:
        (world / "two.txt").write_text("images/cat.jpg masks/cat.png\ntiny_odd\n")
        result = wsss("evaluate", "--cache", masks, "--gt", truth, "--split", world / "two.txt")
        assert result.exit_code == 0
        assert "split two, 2 images" in result.stdout
        assert "mIoU 100.00 %" in result.stdout
        assert "backend" in result.stdout

    def test_missing_masks_are_an_error_unless_allowed(self, masks: Path, truth: Path, world: Path) -> None:
        shutil.copy(truth / "cat.png", truth / "cat2.png")
        (world / "split.txt").write_text("cat\ncat2\n")
        arguments = ("evaluate", "--cache", masks, "--gt", truth, "--split", world / "split.txt")
        refused = wsss(*arguments)
        assert refused.exit_code == 2
        assert "'cat2'" in refused.stderr
        assert wsss(*arguments, "--allow-missing").exit_code == 0

    def test_one_bad_ground_truth_is_skipped_and_counted(self, masks: Path, truth: Path) -> None:
        (truth / "cat.png").write_bytes(b"")
        result = wsss("evaluate", "--cache", masks, "--gt", truth)
        assert result.exit_code == 1
        assert "4 images" in result.stdout
        assert "could not be scored: 1" in result.stdout

    @pytest.mark.parametrize("value", [21, 100])
    def test_ground_truth_of_other_classes_is_refused(self, masks: Path, truth: Path, value: int) -> None:
        Image.fromarray(np.full((120, 180), value, np.uint8)).save(truth / "cat.png")
        result = wsss("evaluate", "--cache", masks, "--gt", truth)
        assert result.exit_code == 2
        assert str(value) in result.stderr
        assert "cat" in result.stderr

    def test_exactly_one_source(self, masks: Path, truth: Path) -> None:
        assert wsss("evaluate", "--gt", truth).exit_code == 2
        assert wsss("evaluate", "--gt", truth, "--cache", masks, "--predictions", truth).exit_code == 2
        assert "--classes" in wsss("evaluate", "--gt", truth, "--predictions", truth).stderr


def test_preview_draws_a_row_for_each_image(masks: Path, world: Path) -> None:
    out = world / "sheet" / "preview.png"
    result = wsss("preview", "--cache", masks, "--images", world / "images", "--out", out)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == str(out)
    with Image.open(out) as image:
        five = np.array(image.convert("RGB"))
    wsss("preview", "--cache", masks, "--images", world / "images", "--out", out, "--id", "cat")
    with Image.open(out) as image:
        one = np.array(image.convert("RGB"))
    assert five.shape[0] > 3 * one.shape[0]
    assert len(np.unique(one.reshape(-1, 3), axis=0)) > 1000, "a sheet without images"


def test_preview_shows_the_worst_where_asked(masks: Path, world: Path) -> None:
    (values,) = json.loads(wsss("cache", "status", masks, "--quality", "--json").stdout)
    worst = next(iter(values["quality"]["images"]))
    sheets = []
    for name, chosen in (("worst", ("--worst", "--limit", 1)), ("named", ("--id", worst))):
        out = world / f"{name}.png"
        made = wsss("preview", "--cache", masks, "--images", world / "images", "--out", out, *chosen)
        assert made.exit_code == 0, made.stderr
        with Image.open(out) as image:
            sheets.append(np.array(image))
    assert np.array_equal(*sheets)
    refused = wsss("preview", "--cache", masks, "--images", world / "images", "--worst", "--id", worst)
    assert refused.exit_code == 2
    assert "--worst chooses the images, and so does --id" in refused.stderr


def test_preview_marks_what_it_cannot_read_and_refuses_what_makes_no_sense(masks: Path, world: Path) -> None:
    out = world / "preview.png"
    (world / "images" / "cat.png").write_bytes(b"")
    result = wsss("preview", "--cache", masks, "--images", world / "images", "--out", out)
    assert result.exit_code == 0
    assert "cat" in result.stderr
    for arguments in (("--id", "unknown"), ("--out", world / "preview.txt")):
        refused = wsss("preview", "--cache", masks, "--images", world / "images", "--out", out, *arguments)
        assert refused.exit_code == 2


def test_exports(masks: Path, world: Path) -> None:
    with MaskCache.open(masks) as cache:
        record = cache["motorcycle"]
    for kind in ("png", "voc", "npz"):
        result = wsss("export-masks", "--cache", masks, "--out", world / kind, "--format", kind)
        assert result.exit_code == 0
        assert f"{len(LABELS)} masks written" in result.stderr
    with Image.open(world / "png" / "motorcycle.png") as image:
        assert image.mode == "L"
        assert np.array_equal(np.array(image), record.mask)
    with Image.open(world / "voc" / "motorcycle.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.array(image), record.mask)
        assert image.getpalette() == voc_palette().reshape(-1).tolist()
    with np.load(world / "npz" / "motorcycle.npz") as file:
        assert np.array_equal(file["confidence"], record.confidence)
        assert file["cams"].shape == (3, 101, 150)
    wsss("export-masks", "--cache", masks, "--out", world / "sure", "--min-confidence", 0.95)
    with Image.open(world / "sure" / "motorcycle.png") as image:
        assert np.array_equal(np.array(image), record.with_ignore(0.95))
    again = wsss("export-masks", "--cache", masks, "--out", world / "png")
    assert f"0 masks written, {len(LABELS)} were there already" in again.stderr


def test_cache_commands(masks: Path, world: Path, generate: Run) -> None:
    cache = world / "cache"
    assert str(masks) in wsss("cache", "ls", "--cache", cache).stdout
    status = wsss("cache", "status", "--cache", cache).stdout
    assert f"images        {len(LABELS)} (0 without labels)" in status
    (values,) = json.loads(wsss("cache", "status", "--cache", cache, "--json").stdout)
    assert (values["images"], values["complete"]) == (len(LABELS), True)
    assert "quality" not in values
    lines = wsss("cache", "status", "--cache", cache, "--quality").stdout.splitlines()
    assert any("estimated mIoU" in line for line in lines)
    assert "sure of nearly everything" in lines[-1], "its confidence is a CRF's posterior"
    (values,) = json.loads(wsss("cache", "status", "--cache", cache, "--quality", "--json").stdout)
    estimates = [sum(own.values()) / len(own) for own in values["quality"]["images"].values()]
    assert len(estimates) == len(LABELS)
    assert estimates == sorted(estimates)
    assert wsss("cache", "verify", "--cache", cache).exit_code == 0
    generate("--store-cams", "--overwrite")
    assert "5 replaced" in wsss("cache", "gc", "--cache", cache).stdout
    merged = wsss("cache", "merge", masks, "--into", world / "merged")
    assert merged.exit_code == 0
    with MaskCache.open(merged.stdout.splitlines()[-1]) as copy:
        assert set(copy) == set(LABELS)
    (shard,) = masks.glob("shard-*.h5")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    damaged = wsss("cache", "verify", "--cache", cache)
    assert damaged.exit_code == 1
    assert "generate-masks" in damaged.stderr


@pytest.mark.parametrize(
    "command", [("cache", "ls"), ("cache", "verify"), ("export-masks", "--out", "x"), ("cache", "gc")]
)
def test_a_cache_that_is_not_there(command: tuple[str, ...], world: Path) -> None:
    result = wsss(*command, "--cache", world / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def labelled(world: Path, clip: Path) -> tuple[object, ...]:
    return (
        *("--images", world / "images", "--labels", world / "labels.json"),
        *("--classes", "voc12", "--clip", clip),
    )


def test_select_prompt_writes_what_generate_masks_reads(world: Path, clip: Path, generate: Run) -> None:
    arguments = labelled(world, clip)
    out = world / "prompt.yaml"
    templates = ("--template", "a {}.", "--template", "the {}!", "--template", "{}")
    result = wsss("select-prompt", *arguments, *templates, "--out", out, "--json")
    assert result.exit_code == 0
    ranking = json.loads(result.stdout)
    assert ranking["images"] == 3, "images with one class say nothing"
    values = [value for _, value in ranking["ranked"]]
    assert values == sorted(values)
    assert values[0] < values[-1]
    best = ranking["ranked"][0][0]
    assert yaml.safe_load(out.read_text()) == {"templates": [best]}
    assert mask_set(generate("--config", out, "--limit", 1)) == mask_set(
        generate("--template", best, "--limit", 1)
    )
    whole = wsss("select-prompt", *arguments, "--top", 3)
    assert len(whole.stdout.splitlines()) == 4


def test_select_prompt_needs_images_with_two_classes(world: Path, clip: Path) -> None:
    write_labels(world, {"cat": ["cat"]})
    arguments = labelled(world, clip)
    result = wsss("select-prompt", *arguments)
    assert result.exit_code == 2
    assert "two classes" in result.stderr


def test_doctor_looks_and_changes_nothing(world: Path, clip: Path, no_hub: None) -> None:
    before = sorted(world.rglob("*"))
    result = wsss("doctor", "--cache", world / "cache", "--clip", clip)
    assert result.exit_code == 0
    for name in ("python", "torch", "device", "crf", "hdf5", "cache", "clip"):
        assert name in result.stdout
    assert sorted(world.rglob("*")) == before
    absent = wsss("doctor", "--cache", world / "cache")
    assert absent.exit_code == 0
    assert "not on this machine yet" in absent.stdout
    checks = json.loads(wsss("doctor", "--json", "--clip", clip).stdout)
    assert all({"name", "status", "text"} <= set(check) for check in checks)


def test_doctor_says_what_a_clip_computes_with_and_where_that_stands(clip: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(clip, copy)
    values = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (copy / "preprocessor_config.json").write_text(json.dumps(values))
    told = wsss("doctor", "--cache", tmp_path, "--clip", copy, "--set", "clip.activation=gelu").stdout
    assert "gelu, heads 64 wide (text: 64); from clip.activation, config.json" in told
    assert "0.5/0.5/0.5, 0.25/0.25/0.25; from preprocessor_config.json" in told
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "model.pt")
    refused = wsss("doctor", "--cache", tmp_path, "--clip", tmp_path / "model.pt")
    assert refused.exit_code == 1
    assert "fail  clip" in refused.stdout


@pytest.mark.parametrize("is_there", [True, False])
def test_doctor_says_whether_ray_is_there(
    world: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    packages = {"ray": ["ray"]} if is_there else {}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: packages)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.60.0")
    result = wsss("doctor", "--cache", world / "cache", "--clip", clip, "--json")
    assert result.exit_code == 0
    (check,) = [check for check in json.loads(result.stdout) if check["name"] == "ray"]
    if is_there:
        assert (check["status"], check["text"]) == ("ok", "ray 2.60.0")
    else:
        assert check["status"] == "note"
        assert "--engine ray needs: pip install 'wsss-pipeline[ray]'" in check["text"]


def test_doctor_fails_where_nothing_can_be_written(
    world: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("wsss_pipeline.stages.doctor.tempfile.TemporaryDirectory", refuse)
    result = wsss("doctor", "--cache", world / "cache", "--clip", clip)
    assert result.exit_code == 1
    assert "can't be written" in result.stdout
