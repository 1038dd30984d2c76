"""The training loop through ``train_seg``: it learns, goes on where it stopped, and stops where it must."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from wsss_pipeline.segmentation.mask_sources import GroundTruthMasks

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import ConfigError, TrainingError
from wsss_pipeline.segmentation.train_config import (
    AugmentationConfig,
    NetworkConfig,
    OptimisationConfig,
    TrainConfig,
)
from wsss_pipeline.segmentation.trainer import schedule
from wsss_pipeline.stages import train_seg as stage
from wsss_pipeline.stages.train_seg import TrainRequest, train_seeds, train_seg, validation_images

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    network=NetworkConfig("segformer", "tiny", "none"),
    augmentation=AugmentationConfig(crop=48),
    optimisation=OptimisationConfig(
        optimizer="adamw", lr=1e-3, head_lr_factor=1, iterations=6, batch=2, warm_up=2, clip_norm=1
    ),
    precision="fp32",
    validate_every=3,
    save_every=2,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=3, scenes={"train": 8})
    return folder


Make = Callable[..., TrainRequest]


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Make:
    def request(out: str = "run", config: TrainConfig = CONFIG, **changes: Any) -> TrainRequest:
        source = GroundTruthMasks(root / "SegmentationClass", load_class_set("demo").names)
        images = find_images(root / "JPEGImages")
        return TrainRequest(images, source, config, tmp_path / out, device="cpu", **changes)

    return request


def optimised(**changes: Any) -> TrainConfig:
    return CONFIG.model_copy(update={"optimisation": CONFIG.optimisation.model_copy(update=changes)})


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Nothing in the program expects it."""


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(make: Make, ema: float) -> None:
    config = optimised(ema=ema)
    whole = train_seg(make("whole", config))

    def die_at_five(numbers: dict[str, Any]) -> None:
        if numbers["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        train_seg(make("parts", config, workers=1), die_at_five)
    parts = train_seg(make("parts", config))
    assert (whole.steps, parts.steps) == (6, 6)
    for name in ("last/model.safetensors", "state/network.safetensors"):
        one, other = (load_file(result.checkpoint.parent / name) for result in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(parts.checkpoint.parent)[-2:] == losses(whole.checkpoint.parent)[-2:]


def test_a_run_that_has_ended_does_nothing(make: Make) -> None:
    first = train_seg(make())
    before = (first.checkpoint / "model.safetensors").stat().st_mtime_ns
    again = train_seg(make())
    assert again == first
    assert (first.checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_validation_keeps_the_best(make: Make, root: Path) -> None:
    validation = validation_images(root / "SegmentationClass", root / "JPEGImages", None)
    result = train_seg(make(validation=validation))
    assert result.checkpoint.name == "best"
    assert result.miou is not None
    assert 0 < result.miou < 1
    log = [json.loads(line) for line in (result.checkpoint.parent / "log.jsonl").read_text().splitlines()]
    mious = [line["miou"] for line in log if "miou" in line]
    assert len(mious) == 2
    assert result.miou == max(mious)


def test_other_settings_are_refused_by_name(make: Make) -> None:
    train_seg(make())
    with pytest.raises(TrainingError, match=r"optimisation\.lr: 0\.001, 0\.002.*--overwrite"):
        train_seg(make(config=optimised(lr=2e-3)))
    fewer = make()
    shortened = replace(fewer, images=dict(list(fewer.images.items())[:5]))
    with pytest.raises(TrainingError, match="images: 8, 5"):
        train_seg(shortened)
    assert train_seg(replace(shortened, overwrite=True)).steps == 6


def test_a_folder_with_something_else_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingError, match="holds something else"):
        train_seg(make())


def test_nan_stops_with_update_images_and_a_checkpoint(make: Make, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is nan at update \d.*train_0000.*--balanced"):
        train_seg(make(config=optimised(lr=1e30, warm_up=0, clip_norm=0.0, optimizer="sgd", iterations=50)))
    values = json.loads((tmp_path / "run" / "nan" / "config.json").read_text())
    assert len(values["image_ids"]) == 2


def test_accumulation_is_a_larger_batch(make: Make) -> None:
    """One loss in two parts: the same up to how its mean is taken, since parts count their own pixels."""
    one = train_seg(make("one", optimised(batch=2, accumulate=1, iterations=1)))
    two = train_seg(make("two", optimised(batch=1, accumulate=2, iterations=1)))
    assert losses(two.checkpoint.parent)[0] == pytest.approx(losses(one.checkpoint.parent)[0], rel=0.05)


def test_seeds_differ_in_their_seed_alone(make: Make) -> None:
    results = train_seeds(make(config=optimised(iterations=2)), 2)
    assert [result.checkpoint.parent.name for result in results] == ["seed-0", "seed-1"]
    one, two = (losses(result.checkpoint.parent) for result in results)
    assert one != two
    assert "without ground truth there is no mIoU" in stage.spread(results)
    scored = [replace(result, miou=value) for result, value in zip(results, (0.5, 0.6), strict=True)]
    assert stage.spread(scored) == "mIoU 55.00 ± 7.07 (standard deviation) over 2 seeds: 50.00, 60.00"


def test_a_tracker_gets_every_updates_numbers(make: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    request = make(track="tensorboard")
    train_seg(request)
    events = EventAccumulator(str(request.out / "wsss"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(request.out))


def test_an_unknown_tracker_is_named(make: Make) -> None:
    with pytest.raises(ConfigError, match="--track notebook"):
        train_seg(make(track="notebook"))


def test_schedules() -> None:
    poly = OptimisationConfig(iterations=100, power=0.9)
    assert schedule(0, poly) == 1
    assert schedule(50, poly) == pytest.approx(0.5**0.9)
    cosine = OptimisationConfig(iterations=110, schedule="cosine", warm_up=10)
    assert [schedule(step, cosine) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule(60, cosine) == pytest.approx(0.5)
    assert schedule(109, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


def test_two_processes_are_one_with_twice_the_batch(make: Make, root: Path, tmp_path: Path) -> None:
    """With frozen batch norm; statistics of a batch would be those of a process's own part of it."""
    common = [
        *("train-seg", "--gt-masks", root / "SegmentationClass", "--classes", "demo"),
        *("--images", root / "JPEGImages", "--network", "deeplabv2", "--encoder", "resnet18"),
        *("--weights", "none", "--iterations", "4", "--crop", "48", "--device", "cpu", "--workers", "0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, batch, out in (([sys.executable], 4, "one"), (torchrun, 2, "two")):
        arguments = [*common, "--batch-size", batch, "--out", tmp_path / out]
        command = [*start, "-m", "wsss_pipeline", *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)
    assert one[0] != one[1]
