"""The training loop through ``train_seg``: it learns, goes on where it stopped, and stops where it must."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from tests.segmentation.conftest import CONFIG, Make, changed
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image, read_mask
from wsss_pipeline.errors import CheckpointError, ConfigError, TrainingError
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.segmentation import trainer as trainer_module
from wsss_pipeline.segmentation.checkpoint import TrainingState, load_network
from wsss_pipeline.segmentation.inference import InferenceConfig, predict_probabilities
from wsss_pipeline.segmentation.networks import SegmentationNetwork
from wsss_pipeline.segmentation.train_config import OptimisationConfig
from wsss_pipeline.segmentation.trainer import schedule
from wsss_pipeline.stages import train_seg as stage
from wsss_pipeline.stages.train_seg import train_seeds, train_seg

ROOT = Path(__file__).parents[2]


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log_of(run)]


class Killed(BaseException):
    """Nothing in the program expects it."""


class DiesAtFive(trainer_module.Progress):
    """A progress during which the process dies, after the log of update 5 and before its checkpoint."""

    def advance(self, *arguments: Any, **named: Any) -> None:
        super().advance(*arguments, **named)
        if self.done == 5:
            raise Killed


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(
    make: Make, monkeypatch: pytest.MonkeyPatch, ema: float
) -> None:
    config = changed(CONFIG, optimisation__ema=ema)
    whole = train_seg(make("whole", config))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "Progress", DiesAtFive)
        with pytest.raises(Killed):
            train_seg(make("parts", config, workers=1))
    parts = train_seg(make("parts", config))
    assert (whole.steps, parts.steps) == (6, 6)
    for name in ("last/model.safetensors", "state/network.safetensors"):
        one, other = (load_file(result.checkpoint.parent / name) for result in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(parts.checkpoint.parent)[-2:] == losses(whole.checkpoint.parent)[-2:]


def test_the_scale_of_fp16s_gradients_goes_on_as_well(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scalers: list[torch.amp.GradScaler] = []

    class InHalfPrecision(Accelerator):
        """Scales gradients as accelerate does it on a GPU."""

        def __init__(self, **named: Any) -> None:
            super().__init__(**named)
            scalers.append(torch.amp.GradScaler("cpu", init_scale=8.0 ** len(scalers), growth_interval=4))
            self.scaler = scalers[-1]

    monkeypatch.setattr(stage, "Accelerator", InHalfPrecision)
    train_seg(make())
    train_seg(make())
    assert [scaler.get_scale() for scaler in scalers] == [2.0, 2.0], "grown once, in the first run"


def test_the_random_numbers_of_the_gpu_go_on_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", kept.append)
    TrainingState(network, None, optimizer, step=3, best_miou=0.5).save(tmp_path / "state")
    state = TrainingState(network, None, optimizer)
    state.load(tmp_path / "state")
    assert (state.step, state.best_miou) == (3, 0.5)
    assert [state.tolist() for state in kept] == [[7]]


def test_a_run_that_has_ended_does_nothing(make: Make) -> None:
    first = train_seg(make())
    before = (first.checkpoint / "model.safetensors").stat().st_mtime_ns
    assert train_seg(make()) == first
    assert (first.checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_validation_keeps_the_best(make: Make, root: Path) -> None:
    result = train_seg(make(val_gt=root / "SegmentationClass"))
    assert result.checkpoint.name == "best"
    assert result.miou is not None
    assert 0 < result.miou < 1
    mious = [line["miou"] for line in log_of(result.checkpoint.parent) if "miou" in line]
    assert len(mious) == 2
    assert result.miou == max(mious)


def test_ground_truth_that_does_not_fit_is_left_out_of_the_validation(
    make: Make, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One wrong value in a folder of so many masks that not all are looked at beforehand."""
    shutil.copytree(root / "SegmentationClass", tmp_path / "truth")
    for number in range(56):
        shutil.copy(
            root / "SegmentationClass" / "train_00000.png", tmp_path / "truth" / f"other_{number}.png"
        )
    Image.new("L", (160, 120), 200).save(tmp_path / "truth" / "train_00001.png")
    result = train_seg(make(val_gt=tmp_path / "truth", config=changed(CONFIG, optimisation__iterations=1)))
    assert result.miou is not None
    assert "train_00001: left out of the validation" in caplog.text


def test_all_processes_validate_with_the_same_statistics_of_batch_norm(
    make: Make, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has those of its own images; what the network's checkpoint holds has to be what was scored."""

    def from_another_process(buffers: list[torch.Tensor]) -> None:
        for buffer in buffers:
            buffer.fill_(7)

    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(trainer_module, "broadcast", from_another_process)
    for ema in (0.0, 0.9):
        config = changed(CONFIG, optimisation__iterations=1, optimisation__ema=ema)
        result = train_seg(make(f"run-{ema}", config=config, val_gt=root / "SegmentationClass"))
        kept = load_file(result.checkpoint / "model.safetensors")
        statistics = [value for name, value in kept.items() if "running_" in name]
        assert statistics
        assert all((value == 7).all() for value in statistics)


def test_progress_says_how_the_training_does(
    make: Make, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Shown(trainer_module.Progress):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named, stream=sys.stderr)

    monkeypatch.setattr(trainer_module, "Progress", Shown)
    train_seg(make(val_gt=root / "SegmentationClass"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "updates," in line]
    assert [line.split()[0] for line in lines] == ["3/6", "6/6"]
    assert all(word in lines[-1] for word in ("loss 2.", "lr ", "images/s", "mIoU "))


def test_other_settings_are_refused_by_name(make: Make, tmp_path: Path) -> None:
    train_seg(make())
    with pytest.raises(TrainingError, match=r"optimisation\.lr: 0\.001, 0\.002.*--overwrite"):
        train_seg(make(config=changed(CONFIG, optimisation__lr=2e-3)))
    (tmp_path / "five.txt").write_text("".join(f"train_0000{number}\n" for number in range(5)))
    shortened = make(split=tmp_path / "five.txt")
    with pytest.raises(TrainingError, match="images: 8, 5"):
        train_seg(shortened)
    assert train_seg(replace(shortened, overwrite=True)).steps == 6


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_something_else_is_left_alone(make: Make, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(TrainingError, match="holds something else"):
        train_seg(make(overwrite=overwrite))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "files",
    [
        {"data.json": ""},
        {"data.json": '{"masks": "x"'},
        {"data.json.tmp": "{"},
        {"data.json": "{}", "config.yaml": "a: ["},
    ],
)
def test_what_a_kill_left_of_a_beginning_is_written_again(
    make: Make, tmp_path: Path, files: dict[str, str]
) -> None:
    (tmp_path / "run").mkdir()
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    assert train_seg(make(config=changed(CONFIG, optimisation__iterations=1))).steps == 1
    assert json.loads((tmp_path / "run" / "data.json").read_text())["images"] == 8


def test_a_run_with_a_checkpoint_that_is_not_known_any_more_is_refused(make: Make, tmp_path: Path) -> None:
    job = make(config=changed(CONFIG, optimisation__iterations=1))
    train_seg(job)
    (tmp_path / "run" / "data.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"data.json can't be read .*--overwrite"):
        train_seg(job)


def test_nan_stops_with_update_images_and_a_checkpoint(make: Make, tmp_path: Path) -> None:
    config = changed(
        CONFIG,
        optimisation__lr=1e30,
        optimisation__warm_up=0,
        optimisation__clip_norm=0.0,
        optimisation__optimizer="sgd",
        optimisation__iterations=50,
    )
    with pytest.raises(TrainingError, match=r"the loss is nan at update \d.*train_0000.*--balanced"):
        train_seg(make(config=config))
    values = json.loads((tmp_path / "run" / "nan" / "config.json").read_text())
    assert len(values["image_ids"]) == 2


def test_seeds_differ_in_their_seed_alone(make: Make) -> None:
    results = train_seeds(make(config=changed(CONFIG, optimisation__iterations=2)), 2)
    assert [result.checkpoint.parent.name for result in results] == ["seed-0", "seed-1"]
    one, two = (losses(result.checkpoint.parent) for result in results)
    assert one != two
    assert "without ground truth there is no mIoU" in stage.spread(results)
    scored = [replace(result, miou=value) for result, value in zip(results, (0.5, 0.6), strict=True)]
    assert stage.spread(scored) == "mIoU 55.00 ± 7.07 (standard deviation) over 2 seeds: 50.00, 60.00"


def test_a_tracker_gets_every_updates_numbers(make: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make(track="tensorboard")
    train_seg(job)
    events = EventAccumulator(str(job.out / "wsss"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(job.out))


def test_an_unknown_tracker_is_named(make: Make) -> None:
    with pytest.raises(ConfigError, match="--track notebook"):
        train_seg(make(track="notebook"))


def test_fp16_on_a_cpu_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="--precision fp16 trains on a GPU only"):
        train_seg(make(config=changed(CONFIG, precision="fp16")))


class Chosen(BaseException):
    """Raised in place of training."""


@pytest.mark.parametrize(("asked", "used", "fails"), [("cuda:1", "cuda", False), ("cuda:1", "cuda:0", True)])
def test_the_gpu_that_was_asked_for_is_the_one_used(
    make: Make, monkeypatch: pytest.MonkeyPatch, asked: str, used: str, fails: bool
) -> None:
    present: list[torch.device] = []

    class Accelerate:
        def __init__(self, **named: Any) -> None:
            assert present == [torch.device(asked)], "set before accelerate takes the present one"
            assert named["mixed_precision"] == "bf16"
            assert not named["cpu"]
            self.device = torch.device(used)

        @property
        def is_main_process(self) -> bool:
            raise Chosen

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", present.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(stage, "Accelerator", Accelerate)
    with pytest.raises(ConfigError if fails else Chosen, match="cuda:0" if fails else None):
        train_seg(make(device=asked, config=changed(CONFIG, precision="auto")))


def test_schedules() -> None:
    poly = OptimisationConfig(iterations=100, power=0.9)
    assert schedule(0, poly) == 1
    assert schedule(50, poly) == pytest.approx(0.5**0.9)
    cosine = OptimisationConfig(iterations=110, schedule="cosine", warm_up=10)
    assert [schedule(step, cosine) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule(60, cosine) == pytest.approx(0.5)
    assert schedule(109, cosine) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def started(start: list[str], root: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    """``train-seg`` in one process or, begun with ``TORCHRUN``, in two."""
    arguments: list[object] = [
        *("train-seg", "--gt-masks", root / "SegmentationClass", "--classes", "demo"),
        *("--images", root / "JPEGImages", "--weights", "none", "--crop", "48", "--precision", "fp32"),
        *("--device", "cpu", "--workers", "0", "--out", out, *more),
    ]
    return subprocess.Popen(
        [*start, "-m", "wsss_pipeline", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
    )


def test_two_processes_are_one_with_twice_the_batch(root: Path, tmp_path: Path) -> None:
    """With frozen batch norm; statistics of a batch would be those of a process's own part of it.

    Seven images are validated on, so that the processes' shares differ: each image counts once. Two seeds, so
    that the processes train together more than once.
    """
    (tmp_path / "seven.txt").write_text("".join(f"train_0000{number}\n" for number in range(7)))
    more: tuple[object, ...] = (
        "--network",
        "deeplabv2",
        "--encoder",
        "resnet18",
        "--iterations",
        2,
        "--lr",
        0.01,
    )
    more += ("--seeds", 2, "--val-gt", root / "SegmentationClass", "--val-split", tmp_path / "seven.txt")
    for start, batch, out in (([sys.executable], 4, "one"), (TORCHRUN, 2, "two")):
        process = started(start, root, tmp_path / out, *more, "--batch-size", batch)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert stdout.splitlines() == [str(tmp_path / out / "seed-1" / "best")]
    for seed in ("seed-0", "seed-1"):
        one, two = (log_of(tmp_path / out / seed) for out in ("one", "two"))
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
        assert one[0]["loss"] != one[1]["loss"]
        assert two[-1]["miou"] == pytest.approx(one[-1]["miou"], abs=1e-4)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the two processes in /proc")
def test_a_signal_to_one_of_two_processes_stops_both(root: Path, tmp_path: Path) -> None:
    """As a scheduler sends it, or a Ctrl-C that reaches them one after the other.

    On the way, both validate the network that one of them writes.
    """
    more = ("--network", "segformer", "--encoder", "tiny", "--batch-size", 1, "--set", "save_every=100000")
    more += ("--val-gt", root / "SegmentationClass", "--set", "validate_every=3")
    process = started(TORCHRUN, root, tmp_path / "run", *more)
    ranks: dict[str, int] = {}
    try:
        log = tmp_path / "run" / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 4:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {_environment(int(child)).get("RANK", ""): int(child) for child in children}
        os.kill(ranks["1"], signal.SIGUSR1)
        _, stderr = process.communicate(timeout=60)
    finally:
        for number in (process.pid, *ranks.values()):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    steps = len(log.read_text().splitlines())
    assert "SIGUSR1: finishing" in stderr
    assert json.loads((tmp_path / "run" / "state" / "progress.json").read_text())["step"] == steps
    assert json.loads((tmp_path / "run" / "last" / "config.json").read_text())["step"] == steps
    assert stderr.count("interrupted; go on with: ") == 1
    best = load_network(tmp_path / "run" / "best")
    assert miou_of(best.network, root) == best.config["miou"]


def miou_of(network: SegmentationNetwork, root: Path) -> float:
    """Of all eight images."""
    matrix = np.zeros((11, 12), np.int64)
    for image_id, file in find_images(root / "JPEGImages").items():
        found = predict_probabilities(network, read_image(file), InferenceConfig())
        truth = read_mask(root / "SegmentationClass" / f"{image_id}.png")
        matrix += confusion_matrix(found.argmax(axis=0).astype(np.uint8), truth, 11)
    return Scores.from_matrix(matrix, [str(value) for value in range(11)]).miou


def _environment(process: int) -> dict[str, str]:
    entries = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries)
