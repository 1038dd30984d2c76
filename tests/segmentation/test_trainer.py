"""The training loop through ``train_seg``: it learns, goes on where it stopped, and stops where it must."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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

from tests.end_to_end.conftest import wsss
from tests.forks import TORCHRUN, ForkServer
from tests.segmentation.conftest import CONFIG, Make, changed
from tests.tiny_transformers import network_of, write_model
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_mask
from wsss_pipeline.data.masks import MaskFolder, PseudoMask
from wsss_pipeline.errors import CheckpointError, ConfigError, MaskError, OutputError, TrainingError
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.segmentation import trainer as trainer_module
from wsss_pipeline.segmentation.checkpoint import TrainingState, load_network
from wsss_pipeline.segmentation.inference import Segmenter
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.train_config import NetworkConfig, OptimisationConfig, TrainConfig
from wsss_pipeline.segmentation.trainer import schedule
from wsss_pipeline.stages import train_seg as stage
from wsss_pipeline.stages.train_seg import TrainJob, train_seeds, train_seg

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


@pytest.fixture
def config_with(tmp_path: Path) -> Callable[[str], TrainConfig]:
    """The configuration with a tiny network: SegFormer's, or a type of transformers', of fresh weights."""

    def config(kind: str) -> TrainConfig:
        if kind == "tiny":
            return CONFIG
        folder = str(write_model(tmp_path / kind, kind))
        network = NetworkConfig(name=network_of(kind), encoder=folder, weights="none")
        changed_config: TrainConfig = changed(CONFIG, network=network)
        return changed_config

    return config


@pytest.mark.parametrize(
    ("kind", "ema"),
    [
        *(("tiny", 0.0), ("tiny", 0.9), ("mask2former", 0.0), ("eomt", 0.9)),
        pytest.param("upernet", 0.0, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    config_with: Callable[[str], TrainConfig],
    kind: str,
    ema: float,
) -> None:
    config = changed(config_with(kind), optimisation__ema=ema)
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


def test_a_run_goes_on_where_an_updates_images_are_divided_in_another_way(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    next_batch = trainer_module.next_batch

    def recorded(batches: Any) -> Any:
        batch = next_batch(batches)
        seen[-1] += batch["image_id"]
        return batch

    def images_of(job: TrainJob) -> list[set[str]]:
        seen.clear()
        updates = trainer_module.Trainer._update

        def update(self: Any, *arguments: Any) -> Any:
            seen.append([])
            return updates(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module, "next_batch", recorded)
            patch.setattr(trainer_module.Trainer, "_update", update)
            train_seg(job)
        return [set(images) for images in seen]

    config = changed(CONFIG, optimisation__batch=3)
    expected = images_of(make("whole", config))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "Progress", DiesAtFive)
        with pytest.raises(Killed):
            train_seg(make("parts", config))
    divided = changed(CONFIG, optimisation__batch=1, optimisation__accumulate=3)
    assert images_of(make("parts", divided)) == expected[4:]
    assert len(expected[4]) == 3

    path = make("parts").out / "data.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(TrainingError, match=r"processes: 2, 1.*6 images: --accumulate 2 goes on with them"):
        train_seg(make("parts", config))
    with pytest.raises(TrainingError, match=r"processes: 2, 1.*or --overwrite$"):
        train_seg(make("parts", changed(CONFIG, optimisation__batch=4)))
    assert train_seg(make("parts", changed(config, optimisation__accumulate=2))).steps == 6


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
        {"data.json": '{\n  "masks": "x"'},
        {"data.json.tmp": "{"},
        {"data.json.0123456789abcdef.tmp": "{"},
        {"data.json": "{", "config.yaml": "version: 1\nnetw"},
        {"config.yaml": ""},
        {"config.yaml": "# wsss-pipeline: settings of this run\nversion: 1\nseed: 7\n"},
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


def test_whatever_a_full_disk_cut_the_same_command_goes_on(make: Make, tmp_path: Path) -> None:
    job = make(config=changed(CONFIG, optimisation__iterations=1))
    train_seg(job)
    whole = {name: (job.out / name).read_bytes() for name in ("config.yaml", "data.json")}
    for name, content in whole.items():
        for tenth in range(10):
            out = tmp_path / f"{name} {tenth}"
            out.mkdir()
            for other in whole:
                (out / other).write_bytes(whole[other])
            (out / name).write_bytes(content[: len(content) * tenth // 10])
            with stage._run_folder(replace(job, out=out), job.masks, ["a"], Accelerator(cpu=True)):
                assert "images" in json.loads((out / "data.json").read_text())
            assert (out / "config.yaml").read_bytes() == whole["config.yaml"]


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "theirs: 1\n"},
        {"data.json": "[1, 2]"},
        {"log.jsonl": '{"mine": 1}\n'},
        {"config.yaml": "theirs: 1\n", "data.json": "{}"},
        {"data.json": "null", "last/config.json": "{}"},
        {"last/model.safetensors": "theirs"},
        {"photo.jpg": "theirs", "config.yaml": ""},
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_only_has_the_names_of_a_run_is_left_alone(
    make: Make, tmp_path: Path, files: dict[str, str], overwrite: bool
) -> None:
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(TrainingError, match="holds something else than a run"):
        train_seg(make(overwrite=overwrite))
    assert {name: (tmp_path / "run" / name).read_text() for name in files} == files


def test_overwrite_removes_a_runs_files_and_no_others(make: Make) -> None:
    job = make(config=changed(CONFIG, optimisation__iterations=1))
    train_seg(job)
    (job.out / "thesis.tex").write_text("years of work")
    (job.out / "wsss").mkdir()
    (job.out / "wsss" / "events").write_text("a tracker's")
    again = replace(job, config=changed(job.config, seed=1), overwrite=True)
    assert train_seg(again).steps == 1
    assert "seed: 1\n" in (job.out / "config.yaml").read_text()
    assert len((job.out / "log.jsonl").read_text().splitlines()) == 1
    assert (job.out / "thesis.tex").read_text() == "years of work"
    assert (job.out / "wsss" / "events").read_text() == "a tracker's"
    (job.out / "last" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"last holds what this program didn't write \(notes.txt\)"):
        train_seg(again)
    assert (job.out / "last" / "model.safetensors").exists()


def test_an_input_is_no_place_for_a_run(make: Make, root: Path, tmp_path: Path) -> None:
    def state() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    before = state()
    (tmp_path / "link").symlink_to(root)
    for out in (
        root,
        root / "JPEGImages",
        root / "JPEGImages" / "run",
        root / "SegmentationClass",
        tmp_path / "link",
    ):
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match="that is only read"):
                train_seg(replace(make(), out=out, overwrite=overwrite))
    assert state() == before


def test_links_in_a_run_lead_nowhere(make: Make, tmp_path: Path) -> None:
    job = make(config=changed(CONFIG, optimisation__iterations=2))
    train_seg(job)
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("config.yaml", "data.json", "log.jsonl", "last", "state"):
        kept = tmp_path / "kept"
        (job.out / name).rename(kept)
        target = victim / name
        shutil.copytree(kept, target) if kept.is_dir() else shutil.copy(kept, target)
        (job.out / name).symlink_to(target)
        longer = replace(job, config=changed(job.config, optimisation__iterations=3), overwrite=True)
        with pytest.raises((OutputError, TrainingError)):
            train_seg(longer)
        (job.out / name).unlink()
        kept.rename(job.out / name)
    assert len((victim / "log.jsonl").read_text().splitlines()) == 2
    assert (victim / "last" / "model.safetensors").exists()
    assert train_seg(job).steps == 2


def test_a_folder_that_is_trained_into_is_one_runs_alone(make: Make) -> None:
    job = make()
    with stage._run_folder(job, job.masks, [], Accelerator(cpu=True)):
        code = f"from filelock import FileLock; FileLock({str(job.out / 'run.lock')!r}).acquire(timeout=0)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        with pytest.raises(
            TrainingError, match=rf"trained into by process {os.getpid()} on \S+; wait for it"
        ):
            train_seg(job)
    assert train_seg(job).steps == 6


class Half(MaskFolder):
    """Ground truth of which some can't be used."""

    bad: tuple[str, ...] = ()

    def __getitem__(self, image_id: str) -> PseudoMask:
        if image_id.endswith(self.bad):
            raise MaskError("it is damaged")
        return super().__getitem__(image_id)


def half(job: TrainJob, *bad: str) -> TrainJob:
    masks = Half(job.masks.path, job.masks.class_names)  # type: ignore[attr-defined]
    masks.bad = bad
    return replace(job, masks=masks)


def test_a_training_that_sees_too_little_stops(make: Make) -> None:
    with pytest.raises(TrainingError, match=r"2 of 2 samples couldn't be used"):
        train_seg(
            half(
                make("a", config=changed(CONFIG, optimisation__iterations=1)),
                "0",
                "1",
                "2",
                "3",
                "4",
                "5",
                "6",
                "7",
            )
        )
    with pytest.raises(TrainingError, match=r"4 of 8 samples .*--set max_unusable"):
        train_seg(half(make("b"), "0", "1", "2", "3"))
    allowed = changed(CONFIG, max_unusable=1.0)
    assert train_seg(half(make("c", config=allowed), "0", "1", "2", "3")).steps == 6
    for iterations, updates in ((6, 6), (40, 10)):
        config = changed(allowed, optimisation__iterations=iterations)
        with pytest.raises(TrainingError, match=f"the last {updates} updates had no sample"):
            train_seg(half(make(f"d{iterations}", config=config), *"01234567"))


class Vague(MaskFolder):
    """Ground truth, certain of the background alone, or not even of that."""

    least = 200

    def __getitem__(self, image_id: str) -> PseudoMask:
        mask = super().__getitem__(image_id).mask
        return PseudoMask(mask, np.where(mask == 0, np.uint8(self.least), np.uint8(120)))


def test_a_threshold_that_leaves_no_objects_is_warned_of(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    job = make(config=changed(CONFIG, loss__min_confidence=0.95, optimisation__iterations=1))
    with caplog.at_level("INFO"):
        train_seg(job)
        assert "100% of the background and 100% of the objects' pixels count" in caplog.text
        assert "lower --min-confidence" not in caplog.text
        vague = Vague(job.masks.path, job.masks.class_names)  # type: ignore[attr-defined]
        train_seg(replace(job, masks=vague, out=job.out.with_name("vague")))
    assert "100% of the background and 0% of the objects' pixels count" in caplog.text
    assert "lower --min-confidence" in caplog.text
    caplog.clear()
    lower = changed(job.config, loss__min_confidence=0.6)
    train_seg(replace(job, masks=vague, config=lower, out=job.out.with_name("lower")))
    assert "lower --min-confidence" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *(("mit-b0", "fp32"), ("mit-b0", "bf16"), ("mask2former", "bf16")),
        *(pytest.param(kind, "bf16", marks=pytest.mark.slow) for kind in ("upernet", "eomt")),
    ],
)
def test_a_sample_that_cannot_be_used_changes_nothing_else(
    make: Make,
    config_with: Callable[[str], TrainConfig],
    kind: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No batch norm sees a blank picture, and the gradient of a fresh SegFormer, of many layer norms, is finite."""
    network = NetworkConfig(name="segformer", encoder=kind, weights="none")
    if kind != "mit-b0":
        network = config_with(kind).network
    config = changed(
        CONFIG, network=network, max_unusable=1.0, precision=precision, optimisation__clip_norm=0.0
    )
    forward, batches = trainer_module._TrainingForward.forward, list[torch.Tensor]()

    def recorded(self: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        batches.append(images.clone())
        return forward(self, images)

    monkeypatch.setattr(trainer_module._TrainingForward, "forward", recorded)
    run = train_seg(half(make(config=config), "0", "1", "2")).checkpoint
    damaged = [line["damaged"] for line in log_of(run.parent)]
    assert 1 in damaged
    for images, count in zip(batches, damaged, strict=True):
        assert torch.equal(images[0], images[1]) == (count == 1)
        assert images.std() > 0.1
    assert all(value.isfinite().all() for value in load_file(run / "model.safetensors").values())


def test_losses_know_the_crops_and_which_of_them_are_copies(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(CONFIG, max_unusable=1.0, loss__seeding=1.0, loss__boundary=1.0, loss__grid=8)
    weighted, batches = trainer_module.weighted_losses, list[Any]()

    def recorded(*arguments: Any) -> dict[str, torch.Tensor]:
        batches.append(arguments)
        return weighted(*arguments)

    monkeypatch.setattr(trainer_module, "weighted_losses", recorded)
    run = train_seg(half(make(config=config), "0", "1", "2")).checkpoint
    lines = log_of(run.parent)
    assert {1, 0} <= {line["damaged"] for line in lines}
    for (outputs, target, *_, pictures), line in zip(batches, lines, strict=True):
        assert (~pictures.counted).sum() == line["damaged"]
        assert (target[~pictures.counted] == 255).all()
        assert pictures.pixels.shape == (2, 3, 48, 48)
        assert pictures.present.shape == (2, outputs["logits"].shape[1])
        assert line["loss"] == pytest.approx(
            line["loss_segmentation"] + line["loss_seeding"] + line["loss_boundary"]
        )


def test_a_run_with_a_checkpoint_that_is_not_known_any_more_is_refused(make: Make, tmp_path: Path) -> None:
    job = make(config=changed(CONFIG, optimisation__iterations=1))
    train_seg(job)
    (tmp_path / "run" / "data.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"data.json can't be read .*--overwrite"):
        train_seg(job)


@pytest.mark.parametrize("kind", ["tiny", "upernet", "mask2former", "eomt"])
def test_nan_stops_with_update_images_and_a_checkpoint(
    make: Make, tmp_path: Path, config_with: Callable[[str], TrainConfig], kind: str
) -> None:
    config = changed(
        config_with(kind),
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


def train_arguments(root: Path, out: Path, *more: object) -> list[str]:
    arguments = [
        *("train-seg", "--gt-masks", root / "SegmentationClass", "--classes", "demo"),
        *("--images", root / "JPEGImages", "--weights", "none", "--crop", "48", "--precision", "fp32"),
        *("--device", "cpu", "--workers", "0", "--out", out, *more),
    ]
    return list(map(str, arguments))


def in_two_processes(root: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    """``train-seg`` as torchrun begins it."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "-m", "wsss_pipeline", *train_arguments(root, out, *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
    )


@pytest.mark.parametrize(
    ("name", "encoder", "changes"),
    [
        ("deeplabv2", "resnet18", {}),
        # UperNet has batch norm in its head
        *(
            pytest.param(network_of(kind), kind, changes, marks=pytest.mark.slow)
            for kind, changes in (
                ("dpt", {"use_batch_norm_in_fusion_residual": False, "use_auxiliary_head": False}),
                ("mask2former", {}),
                ("eomt", {}),
            )
        ),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(
    root: Path, tmp_path: Path, forks: ForkServer, name: str, encoder: str, changes: dict[str, Any]
) -> None:
    """With frozen batch norm, or without any; statistics of a batch would be those of a process's own part of it.

    Seven images are validated on, so that the processes' shares differ: each image counts once. Two seeds, so
    that the processes train together more than once.
    """
    (tmp_path / "seven.txt").write_text("".join(f"images/train_0000{number}.jpg\n" for number in range(7)))
    if name != "deeplabv2":
        encoder = str(write_model(tmp_path / encoder, encoder, **changes))
    more: tuple[object, ...] = ("--network", name, "--encoder", encoder, "--iterations", 2, "--lr", 0.01)
    if name == "deeplabv2":
        more += ("--set", "loss.seeding=1", "--set", "loss.boundary=1", "--set", "loss.grid=16")
    if name == "mask2former":
        # its norms over four cells make gradients of 600,000, after which rounding shows
        more += ("--set", "optimisation.clip_norm=1")
    more += ("--seeds", 2, "--val-gt", root / "SegmentationClass", "--val-split", tmp_path / "seven.txt")
    alone = wsss(*train_arguments(root, tmp_path / "one", *more, "--batch-size", 4))
    codes, stdout, stderr = forks.run_two(*train_arguments(root, tmp_path / "two", *more, "--batch-size", 2))
    assert (alone.exit_code, codes) == (0, [0, 0]), alone.stderr + stderr
    for out, said in (("one", alone.stdout), ("two", stdout)):
        assert said.splitlines() == [str(tmp_path / out / "seed-1" / "best")]
    for seed in ("seed-0", "seed-1"):
        one, two = (log_of(tmp_path / out / seed) for out in ("one", "two"))
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
        assert one[0]["loss"] != one[1]["loss"]
        assert two[-1]["miou"] == pytest.approx(one[-1]["miou"], abs=1e-4)


@pytest.mark.slow
def test_what_two_processes_began_one_ends(root: Path, tmp_path: Path) -> None:
    more = ("--network", "deeplabv2", "--encoder", "resnet18", "--lr", 1e-4, "--iterations", 12)
    alone = wsss(*train_arguments(root, tmp_path / "alone", *more, "--batch-size", 4))
    process = in_two_processes(root, tmp_path / "run", *more, "--batch-size", 2)
    log = tmp_path / "run" / "log.jsonl"
    try:
        while not log.exists() or len(log.read_text().splitlines()) < 2:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGUSR1)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "interrupted; go on with: " in stderr
    half = len(log_of(tmp_path / "run"))
    assert 2 <= half < 12
    refused = wsss(*train_arguments(root, tmp_path / "run", *more, "--batch-size", 2))
    assert refused.exit_code == 2
    assert "its updates have 4 images: --accumulate 2 goes on with them" in refused.stderr
    rest = wsss(*train_arguments(root, tmp_path / "run", *more, "--batch-size", 4))
    assert (alone.exit_code, rest.exit_code) == (0, 0), rest.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["frozen", "published"])
def test_two_processes_train_weakclip(root: Path, tmp_path: Path, forks: ForkServer, form: str) -> None:
    """Every weight has a gradient, or the second update would fail; batch norm's statistics are each one's own."""
    settings = {"clip": form, "width": 32, "channels": 32}
    more: list[object] = ["--network", "weakclip", "--encoder", "demo", "--iterations", 3, "--batch-size", 2]
    for key, value in settings.items():
        more += ["--set", f"network.weakclip.{key}={value}"]
    codes, _, stderr = forks.run_two(*train_arguments(root, tmp_path / "run", *more))
    assert codes == [0, 0], stderr
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the two processes in /proc")
def test_a_signal_to_one_of_two_processes_stops_both(root: Path, tmp_path: Path) -> None:
    """As a scheduler sends it, or a Ctrl-C that reaches them one after the other.

    On the way, both validate the network that one of them writes.
    """
    more = ("--network", "segformer", "--encoder", "tiny", "--batch-size", 1, "--set", "save_every=100000")
    more += ("--val-gt", root / "SegmentationClass", "--set", "validate_every=3")
    process = in_two_processes(root, tmp_path / "run", *more)
    ranks: dict[str, int] = {}
    try:
        log = tmp_path / "run" / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 4:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        environments = {int(child): _environment(int(child)) for child in children}
        assert all(set(TORCHRUN) <= environment.keys() for environment in environments.values())
        ranks = {environment["RANK"]: child for child, environment in environments.items()}
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
    segmenter = Segmenter(network, [])
    for image_id, file in find_images(root / "JPEGImages").items():
        truth = read_mask(root / "SegmentationClass" / f"{image_id}.png")
        matrix += confusion_matrix(segmenter(file).mask, truth, 11)
    return Scores.from_matrix(matrix, [str(value) for value in range(11)]).miou


def _environment(process: int) -> dict[str, str]:
    entries = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.partition("=")[::2] for entry in entries)


def test_a_threshold_that_no_pixel_reaches_stops_the_training(make: Make) -> None:
    job = make(
        "a", config=changed(CONFIG, optimisation__iterations=40, loss__min_confidence=0.65, save_every=100)
    )
    vague = Vague(job.masks.path, job.masks.class_names)  # type: ignore[attr-defined]
    vague.least = 120
    job = replace(job, masks=vague)
    with pytest.raises(TrainingError, match=r"the last 10 updates had no pixel .*--min-confidence 0\.65 "):
        train_seg(job)
    lower = changed(job.config, loss__min_confidence=0.6, optimisation__iterations=1)
    assert train_seg(replace(job, config=lower)).steps == 1, "in the same folder: nothing was learnt"
    short = changed(job.config, optimisation__iterations=6)
    with pytest.raises(TrainingError, match=r"the last 6 updates had no pixel"):
        train_seg(replace(job, config=short, out=job.out.with_name("short")))


def test_what_was_learnt_before_the_masks_gave_out_is_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(CONFIG, optimisation__iterations=40, save_every=1000)
    job = make("a", config=config)
    updates: list[int] = []
    original = trainer_module.confidence_weights

    def weights(confidence: torch.Tensor, kind: Any, least: float) -> torch.Tensor:
        """One update without any pixel, one with, then none any more."""
        updates.append(len(updates) + 1)
        return original(confidence, kind, least) * (updates[-1] == 2)

    monkeypatch.setattr(trainer_module, "confidence_weights", weights)
    with pytest.raises(TrainingError, match="the last 10 updates had no pixel"):
        train_seg(job)
    assert json.loads((job.out / "state/progress.json").read_text())["step"] == 12
    assert load_network(job.out).config["step"] == 12


class Full(MaskFolder):
    """Masks whose samples find no room in shared memory, as torch 2 says it."""

    def __getitem__(self, image_id: str) -> PseudoMask:
        if torch.utils.data.get_worker_info() is not None:
            raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1_2_0>: {NO_SPACE}")
        return super().__getitem__(image_id)


NO_SPACE = "No space left on device (28)"


def test_full_shared_memory_is_one_line_and_leaves_no_process_behind(make: Make) -> None:
    job = make(workers=1)
    full = Full(job.masks.path, job.masks.class_names)  # type: ignore[attr-defined]
    with pytest.raises(
        TrainingError, match=r"^shared memory \(/dev/shm\) is full: .*--workers 0.*--shm-size"
    ):
        train_seg(replace(job, masks=full))
    assert not multiprocessing.active_children(), "the interpreter would wait for them without end"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"unable to write to file </torch_1_2_0>: {NO_SPACE}"), "is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "fewer --workers"),
        (OSError("Caught OSError\nTraceback\nOSError: [Errno 24] Too many open files"), "ulimit -n"),
        (
            RuntimeError("unable to open shared memory object </torch_1> in read-write mode"),
            "fewer --workers",
        ),
        (RuntimeError("shapes differ"), None),
    ],
)
def test_what_other_processes_die_of_is_one_line(error: Exception, reason: str | None) -> None:
    def batches() -> Iterator[Any]:
        raise error
        yield

    with pytest.raises(type(error) if reason is None else TrainingError, match=reason) as caught:
        trainer_module.next_batch(batches())
    assert reason is None or "\n" not in str(caught.value)
