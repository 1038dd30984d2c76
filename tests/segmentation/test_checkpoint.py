"""Checkpoints: whole or the one before, and never a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from wsss_pipeline.errors import CheckpointError
from wsss_pipeline.segmentation.checkpoint import find_checkpoint, load_network, save_network
from wsss_pipeline.segmentation.networks import SegmentationNetwork, build_network
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
