"""``wsss propose-regions``: what determines regions, when they are made again, and how the command ends."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from wsss_pipeline.cache import MaskWriter, status, verify
from wsss_pipeline.cli import main
from wsss_pipeline.config import fields, resolve
from wsss_pipeline.data.images import read_image
from wsss_pipeline.pseudo_masks.report import MISSING
from wsss_pipeline.regions.proposals import PRESETS, ProposalConfig, propose
from wsss_pipeline.regions.sam import load_predictor
from wsss_pipeline.regions.sources import open_regions
from wsss_pipeline.stages import propose_regions as stage
from wsss_pipeline.stages.propose_regions import ProposeJob, Proposer, propose_regions

SAM = Path(__file__).parent.parent / "golden" / "fma" / "sam_tiny"
PICTURE = SAM.parent / "sam_tiny.npz"
IDS = ["a/one", "a/two", "three"]
CPU = torch.device("cpu")
# the tiny model is unsure of most that it sees
SETTINGS = {"points": [6], "iou_threshold": 0.5, "stability_threshold": 0.3}
CONFIG = resolve(ProposalConfig, [("test", SETTINGS)])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``images/`` of three pictures, in the current folder."""
    monkeypatch.chdir(tmp_path)
    image = np.load(PICTURE)["image"]
    for number, image_id in enumerate(IDS):
        file = tmp_path / "images" / f"{image_id}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(image, 20 * number, axis=1)).save(file)
    return tmp_path


def wsss(*arguments: str, sam: Path | str = SAM) -> Result:
    given = ("propose-regions", "--sam", str(sam), "--images", "images", "--out", "out", "--device", "cpu")
    sets = (part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}"))
    return CliRunner().invoke(main, [*given, *sets, *arguments])


def job(**further: Any) -> ProposeJob:
    layers = [("test", SETTINGS)]
    return ProposeJob.read(str(SAM), Path("images"), Path("out"), layers=layers, device="cpu", **further)


def test_the_set_holds_what_is_proposed(world: Path) -> None:
    result = wsss()
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.splitlines()[-1])
    assert path.parent == Path("out")
    assert path.name.startswith("regions-")
    assert "3 images' regions computed" in result.stderr
    regions, predictor = open_regions("out"), load_predictor(str(SAM), CPU, offline=True)
    for image_id in IDS:
        pixels = read_image(world / "images" / f"{image_id}.png")
        expected, found = propose(pixels, predictor, CONFIG), regions(image_id, pixels)
        assert len(found) > 1
        for name in ("counts", "lengths", "levels", "iou", "stability", "points"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert status(path).complete
    again = wsss("--json", "--points-per-batch", "5")
    assert again.stdout.splitlines()[-1] == str(path)
    summary = json.loads(again.stdout.splitlines()[0])
    assert (summary["computed"], summary["reused"], summary["holds"]) == (0, 3, "regions")


def test_twelve_bits_with_their_range_give_the_regions_of_eight(world: Path) -> None:
    file = Path("images/three.png")
    pixels = read_image(file)
    twelve = np.rint(pixels[..., ::-1] * (4095 / 255)).astype(np.uint16)
    assert cv2.imwrite(str(file), twelve)
    Path("split.txt").write_text("three\n")
    result = wsss("--pixel-range", "0:4095", "--split", "split.txt")
    assert result.exit_code == 0, result.output
    regions = open_regions(Path(result.stdout.splitlines()[-1]))("three", pixels)
    expected = propose(pixels, load_predictor(str(SAM), CPU, offline=True), CONFIG)
    np.testing.assert_array_equal(regions.counts, expected.counts)
    assert "pixel_range" not in json.dumps(job().maker().mask_set.determinants)


def test_changed_images_are_done_again_and_all_with_overwrite(world: Path) -> None:
    assert propose_regions(replace(job(), limit=2)).computed == 2
    assert propose_regions(job()).computed == 1
    shutil.copy("images/a/one.png", "images/three.png")
    report = propose_regions(job())
    assert (report.computed, report.reused) == (1, 2)
    assert propose_regions(replace(job(), overwrite=True)).computed == 3
    assert verify(report.path).ok


def test_shares_and_a_split_choose_the_images(world: Path) -> None:
    assert wsss("--shard", "0/2").exit_code == 0
    assert 0 < len(open_regions("out")) < 3  # type: ignore[arg-type]
    assert wsss("--shard", "1/2").exit_code == 0
    assert sorted(open_regions("out")) == sorted(IDS)  # type: ignore[call-overload]
    Path("split.txt").write_text("images/three.jpg\ngone\n")
    report = propose_regions(replace(job(split=Path("split.txt")), cache_dir=Path("other")))
    assert (report.computed, report.failed) == (1, {"gone": MISSING})


def test_a_bad_image_is_reported_skipped_and_counted(world: Path) -> None:
    Path("images/three.png").write_bytes(b"no image")
    result = wsss("--json")
    assert result.exit_code == 1
    summary = json.loads(result.stdout.splitlines()[0])
    assert summary["failed"].keys() == {"three"}
    assert summary["computed"] == 2
    assert "1 of 3 images failed:" in result.stderr


def test_an_image_for_which_memory_runs_out_is_skipped(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, calls = Proposer.generate, []

    def starved(self: Proposer, batch: Any, with_cams: bool) -> Any:
        calls.append((threading.current_thread(), torch.get_num_threads()))
        if len(calls) == 2:
            raise MemoryError
        return generate(self, batch, with_cams)

    monkeypatch.setattr(Proposer, "generate", starved)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report = propose_regions(job())
    finally:
        torch.set_num_threads(before)
    assert (report.computed, list(report.failed)) == (2, ["a/two"])
    assert "--points-per-batch" in report.failed["a/two"]
    assert set(calls) == {(threading.main_thread(), 2)}, (
        "a predictor looks at one image at a time, with all cores"
    )


def test_a_signal_finishes_the_image_and_says_how_to_go_on(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, asked = MaskWriter.write, list[bool]()

    def interrupted(*arguments: Any, **attributes: Any) -> None:
        write(*arguments, **attributes)
        if not asked:
            asked.append(True)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MaskWriter, "write", interrupted)
        patch.setattr(sys, "argv", ["wsss", "propose-regions", "--sam", "x"])
        result = wsss()
    assert result.exit_code == 130
    assert "interrupted; go on with: wsss propose-regions --sam x" in result.stderr
    summary = json.loads(wsss("--json").stdout.splitlines()[0])
    assert (summary["reused"], summary["computed"]) == (2, 1)  # one was ready when the other was written


def test_what_would_be_done_is_said_and_not_done(world: Path) -> None:
    Path("images/bad.png").write_bytes(b"no image")
    result = wsss("--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "images: 4, 0 of them in the cache, 4 to compute" in lines
    assert "can't be used: 1" in lines
    assert any(line.startswith("region set: out/regions-") for line in lines)
    assert not any("class" in line for line in lines)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--preset", "nonsense"), "known are fma, fast"),
        (("--set", "pionts=3"), "did you mean 'points'"),
        (("--set", "iou_threshold=-1"), "must lie between"),
        (("--shard", "2/2"), "--shard"),
        (("--sam", "nowhere/at/all"), "nowhere/at/all"),
        (("--images", "nowhere"), "nowhere"),
        (("--out", "images"), "--out"),
        (("--device", "cuda:99"), "cuda:99"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(world: Path, arguments: tuple[str, ...], why: str) -> None:
    result = wsss(*arguments)
    assert result.exit_code == 2
    assert why in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert "Traceback" not in result.output


def test_options_reach_the_sam(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, device: torch.device, *, offline: bool) -> Any:
        asked.update(name=name, device=device, offline=offline)
        return load_predictor(name, device, offline=offline)

    def look(*arguments: Any, points_per_batch: int) -> Any:
        asked["points_per_batch"] = points_per_batch
        return propose(*arguments, points_per_batch=points_per_batch)

    monkeypatch.setattr(stage, "load_predictor", load)
    monkeypatch.setattr(stage, "propose", look)
    assert wsss("--offline", "--points-per-batch", "7", "--limit", "1").exit_code == 0
    assert asked == {"name": str(SAM), "device": CPU, "offline": True, "points_per_batch": 7}
    Path("settings.yaml").write_text("border: 3")
    given = ("propose-regions", "--sam", str(SAM), "--images", "images", "--out", "out", "--dry-run")
    for further, line in {
        (): "points: 32 x 32 and 16 x 16 on the image and each crop",
        ("--preset", "fast"): "points: 16 x 16 on the image;",
        ("--config", "settings.yaml", "--set", "iou_threshold=0.5"): "predicted IoU above 0.5",
    }.items():
        assert line in CliRunner().invoke(main, [*given, *further]).stdout


class Scene:
    """A predictor of the same answers for all; ``digest`` is what tells it from others."""

    description, points_per_batch = "scene", 16

    def __init__(self, digest: str = "0" * 64) -> None:
        self.digest = digest

    encode = predict = enlarge = None  # type: ignore[assignment]


def fingerprint(config: ProposalConfig, digest: str = "0" * 64) -> str:
    return Proposer(Scene(digest), config, CPU).mask_set.fingerprint  # type: ignore[arg-type]


OTHER = {
    "points": [32],
    "level": "area",
    "iou_bonus": [0, 0, 0],
    "nms_bonus": [0, 0, 0],
    "part_filter": False,
    "smallest_area": 0,
    "border": 3,
    "images.pixel_range": [0, 4095],
}


@pytest.mark.parametrize("key", [key for key, _, _ in fields(ProposalConfig)])
def test_every_setting_is_in_the_fingerprint(key: str) -> None:
    changed = resolve(ProposalConfig, [("test", {key: OTHER.get(key, 0.5)})])
    assert fingerprint(changed) != fingerprint(ProposalConfig())


def test_the_fingerprint_is_of_weights_and_of_what_has_an_effect() -> None:
    assert fingerprint(CONFIG, "1" * 64) != fingerprint(CONFIG)
    assert fingerprint(CONFIG.model_copy(update={"overlap": 0.5})) == fingerprint(CONFIG)
    free = CONFIG.model_copy(update={"part_filter": False})
    assert fingerprint(free.model_copy(update={"part_overlap": 0.5})) == fingerprint(free)
    fast, published = (resolve(ProposalConfig, [("preset", PRESETS[name])]) for name in ("fast", "fma"))
    assert published == ProposalConfig()
    assert fingerprint(fast) != fingerprint(published)


def test_the_preset_named_is_the_one_used(world: Path) -> None:
    assert job(preset="fast").maker().mask_set == job().maker().mask_set, (
        "the user's points win over the preset's"
    )
    preset = ProposeJob.read(str(SAM), Path("images"), Path("out"), preset="fast", device="cpu")
    expected = resolve(ProposalConfig, [("preset", PRESETS["fast"])])
    assert preset.maker().mask_set.determinants["proposals"] == expected.model_dump(
        mode="json", exclude={"images"} | ({"overlap"} if len(expected.points) == 1 else set())
    )
