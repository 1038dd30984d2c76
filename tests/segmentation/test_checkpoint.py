"""Checkpoints: whole or the one before, and never a pickle."""

from __future__ import annotations

import json
import os
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SegformerConfig

from wsss_pipeline.errors import CheckpointError, OutputError
from wsss_pipeline.segmentation.checkpoint import TrainingState, find_checkpoint, load_network, save_network
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig

CONFIG = NetworkConfig(name="segformer", encoder="tiny", weights="imagenet")
NAMES = ("cat", "dog")


def make(seed: int = 0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return build_network(CONFIG, 3)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_network(make(), tmp_path / "last", CONFIG, NAMES, {"step": 7})
    return tmp_path / "last"


def test_what_is_loaded_is_what_was_saved(saved: Path) -> None:
    loaded = load_network(saved)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.network(images), make().eval()(images))
    assert not loaded.network.training
    assert loaded.class_names == NAMES
    assert loaded.config["step"] == 7
    assert loaded.config["id2label"] == {"0": "background", "1": "cat", "2": "dog"}
    assert [path.name for path in saved.parent.iterdir()] == ["last"]


def test_the_statistics_of_the_images_are_the_networks_own(tmp_path: Path) -> None:
    network = make()
    network.image_mean, network.image_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    save_network(network, tmp_path / "last", CONFIG, NAMES)
    loaded = load_network(tmp_path).network
    assert (loaded.image_mean, loaded.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert make().image_mean == (0.485, 0.456, 0.406)


def test_a_run_gives_its_best_network_else_its_last(saved: Path) -> None:
    assert find_checkpoint(saved.parent) == saved
    save_network(make(1), saved.parent / "best", CONFIG, NAMES)
    assert find_checkpoint(saved.parent).name == "best"


def test_a_checkpoint_is_found_from_inside_its_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    assert load_network(Path()).class_names == NAMES
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_network(Path("/"))


@pytest.mark.parametrize("moment", ["before the new one", "between the two", "before the old one goes"])
def test_a_kill_while_writing_leaves_a_whole_checkpoint(saved: Path, moment: str) -> None:
    previous, partial = saved.with_name(".last.previous"), saved.with_name(".last.partial")
    if moment == "before the new one":
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"half")
    elif moment == "between the two":
        saved.rename(previous)
        partial.mkdir()
    else:
        save_network(make(1), previous, CONFIG, NAMES)
    assert load_network(saved).config["step"] == 7
    save_network(make(2), saved, CONFIG, NAMES, {"step": 8})
    assert load_network(saved).config["step"] == 8
    assert [path.name for path in saved.parent.iterdir()] == ["last"]


def damage(saved: Path, kind: str) -> None:
    weights, config = saved / "model.safetensors", saved / "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "not JSON":
        config.write_text("{")
    elif kind == "foreign":
        config.write_text(json.dumps({"model_type": "segformer"}))
    elif kind == "no statistics":
        values = json.loads(config.read_text())
        values["image_std"] = [0.2, 0.2, 0.0]
        config.write_text(json.dumps(values))
    elif kind == "other classes":
        values = json.loads(config.read_text())
        values["id2label"]["3"] = "cow"
        config.write_text(json.dumps(values))
    else:
        config.unlink()


@pytest.mark.parametrize(
    "kind", ["truncated", "no weights", "not JSON", "foreign", "no statistics", "other classes", "empty"]
)
def test_a_damaged_checkpoint_is_one_line(saved: Path, kind: str) -> None:
    damage(saved, kind)
    with pytest.raises(CheckpointError) as caught:
        load_network(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


def values_of(saved: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((saved / "config.json").read_text())
    return found


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number for the encoder": lambda values: values["network"].update(encoder=3),
    "null for the encoder": lambda values: values["network"].update(encoder=None),
    "a list for the encoder": lambda values: values["network"].update(encoder=["tiny"]),
    "an unknown encoder": lambda values: values["network"].update(encoder="nothing"),
    "an encoder of a hub": lambda values: values["network"].update(name="unet", encoder="tu-hf_hub:a/b"),
    "an encoder of a folder": lambda values: values["network"].update(
        name="unet", encoder="tu-local-dir:/etc"
    ),
    "a path for the encoder": lambda values: values["network"].update(
        name="deeplabv2", encoder="/etc/passwd"
    ),
    "a hub's id for the encoder": lambda values: values["network"].update(encoder="owner/model"),
    "a long encoder": lambda values: values["network"].update(encoder="x" * 3000),
    "a long encoder of another": lambda values: values["network"].update(name="unet", encoder="x" * 3000),
    "a long network": lambda values: values["network"].update(name="x" * 3000),
    "a number for the network": lambda values: values["network"].update(name=3),
    "a network that isn't": lambda values: values["network"].update(name="__class__"),
    "a key too many": lambda values: values["network"].update(auto_map="x"),
    "a list for the network": lambda values: values.update(network=[]),
    "no classes": lambda values: values.update(id2label={}),
    "a million classes": lambda values: values.update(id2label={str(n): f"{n}" for n in range(1_000_000)}),
    "classes with gaps": lambda values: values.update(id2label={"0": "a", "2": "b", "3": "c"}),
    "a list of classes": lambda values: values.update(id2label=["a", "b", "c"]),
    "numbers for classes": lambda values: values.update(id2label={"0": 1, "1": 2, "2": 3}),
    "an escape code": lambda values: values["id2label"].update({"1": "\x1b]0;owned\x07"}),
    "text for the mean": lambda values: values.update(image_mean="abc"),
    "two means": lambda values: values.update(image_mean=[0.1, 0.2]),
    "an infinite mean": lambda values: values.update(image_mean=[0.1, 0.2, float("inf")]),
    "a negative deviation": lambda values: values.update(image_std=[0.1, 0.2, -0.1]),
    "four means": lambda values: values.update(image_mean=[0.5] * 4),
    "four deviations": lambda values: values.update(image_std=[0.5] * 4),
    "no mean": lambda values: values.pop("image_mean"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_configuration_is_one_line(saved: Path, kind: str) -> None:
    values = values_of(saved)
    HOSTILE[kind](values)
    (saved / "config.json").write_text(json.dumps(values))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_network(saved)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert str(saved) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000, "kilobytes"


@pytest.mark.parametrize("content", ["[" * 200_000, "null", "3", "[]", '{"model_type": NaN}', "\xff", ""])
def test_what_is_no_configuration_is_one_line(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content, "latin-1")
    with pytest.raises(CheckpointError) as caught:
        load_network(saved)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "device", "huge"])
def test_what_is_no_file_is_not_waited_for(saved: Path, name: str, kind: str) -> None:
    (saved / name).unlink()
    if kind == "pipe":
        os.mkfifo(saved / name)
    elif kind == "huge":
        with (saved / name).open("wb") as file:
            file.truncate(2**43)  # takes no disk
    else:
        (saved / name).symlink_to("/dev/zero" if kind == "zeros" else "/dev/tty")
    started = time.monotonic()
    with pytest.raises(CheckpointError):
        load_network(saved)
    assert time.monotonic() - started < 10


def test_tensors_of_another_shape_are_not_read(saved: Path) -> None:
    """A header may speak of any size, and a sparse file have it."""
    state = load_file(saved / "model.safetensors")
    name, value = next(iter(state.items()))
    header = json.dumps({name: {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36 - 2**20]}})
    with (saved / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2**36 - 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="doesn't fit or is damaged"):
        load_network(saved)
    save_file({**state, name: torch.zeros(1, *value.shape)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="has shape"):
        load_network(saved)
    save_file({**state, "more": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing or too many, such as more"):
        load_network(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"


@pytest.mark.parametrize("key", ["depths", "hidden_sizes", "decoder_hidden_size", "num_encoder_blocks"])
@pytest.mark.parametrize("number", [10**6, -1, 2.5, "4", None])
def test_an_encoder_beyond_reason_is_not_built(saved: Path, tmp_path: Path, key: str, number: object) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    published = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], decoder_hidden_size=8
    ).to_dict()
    value = [number] * 4 if isinstance(published[key], list) else number
    (folder / "config.json").write_text(json.dumps({**published, key: value, "auto_map": {"x": "y--z.Z"}}))
    values = values_of(saved)
    values["network"]["encoder"] = str(folder)
    (saved / "config.json").write_text(json.dumps(values))
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=key):
        load_network(saved)
    assert time.monotonic() - started < 10


def test_looking_for_a_checkpoint_changes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder beside it that has the name of one in the making may be anybody's."""
    for folder in (saved, saved.parent):
        other = folder.with_name(f".{folder.name}.previous")
        other.mkdir()
        (other / "thesis.tex").write_text("years of work")
    load_network(saved)
    load_network(saved.parent)
    monkeypatch.chdir(saved.parent)
    load_network(Path())
    assert (saved.with_name(".last.previous") / "thesis.tex").exists()
    assert (saved.parent.with_name(f".{saved.parent.name}.previous") / "thesis.tex").exists()
    with pytest.raises(OutputError, match=r"holds what this program didn't write \(thesis.tex\)"):
        save_network(make(), saved, CONFIG, NAMES)
    assert (saved.with_name(".last.previous") / "thesis.tex").exists()


@pytest.fixture
def state(tmp_path: Path) -> tuple[TrainingState, Path]:
    network = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    network(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    found = TrainingState(network, None, optimizer, None, 7, 0.5)
    found.save(tmp_path / "state")
    return found, tmp_path / "state"


@pytest.mark.parametrize(
    "content",
    [
        '{"step": -5, "best_miou": "x"}',
        '{"step": 3, "best_miou": "x"}',
        '{"step": 2, "best_miou": NaN}',
        '{"step": 2.5, "best_miou": null}',
        '{"step": true, "best_miou": null}',
        '{"step": 2, "best_miou": 7}',
        '{"step": 99999999999999, "best_miou": null}',
        '{"best_miou": null}',
        "[]",
        "null",
        "[" * 200_000,
        "",
    ],
)
def test_progress_that_is_none_is_one_line(state: tuple[TrainingState, Path], content: str) -> None:
    training, folder = state
    (folder / "progress.json").write_text(content)
    with pytest.raises(CheckpointError, match="start anew with --overwrite") as caught:
        training.load(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_an_optimiser_of_another_network_or_compressed_is_refused(state: tuple[TrainingState, Path]) -> None:
    training, folder = state
    whole = (folder / "optimizer.pt").read_bytes()
    values = torch.load(folder / "optimizer.pt", weights_only=True)
    values["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 3)
    torch.save(values, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"has shape \(3, 3\)"):
        training.load(folder)
    with zipfile.ZipFile(folder / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    with pytest.raises(CheckpointError, match="would unpack to far more than its size"):
        training.load(folder)
    (folder / "optimizer.pt").write_bytes(whole)
    training.load(folder)
    assert (training.step, training.best_miou) == (7, 0.5)
