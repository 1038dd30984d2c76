"""An exported network is checked before its file gets its name."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.tiny_transformers import network_of, write_model
from wsss_pipeline.errors import CheckpointError, ConfigError, OutputError
from wsss_pipeline.segmentation.checkpoint import load_network, save_network
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig
from wsss_pipeline.stages.export_model import export_model


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_form_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    config = NetworkConfig(name="segformer", encoder="tiny", weights="none")
    save_network(build_network(config, 3), tmp_path / "run" / "best", config, ["cat", "dog"])
    program = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), model_proto=SimpleNamespace(SerializeToString=lambda: b"")
    )

    class Session:
        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def run(self, names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:  # type: ignore[type-arg]
            count, _, height, width = inputs["images"].shape
            return [np.full((count, 3, height, width), wrong, np.float32)]

    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: program)
    monkeypatch.setattr(runtime, "InferenceSession", Session)
    with pytest.raises(CheckpointError, match="nothing was written"):
        export_model(tmp_path / "run", tmp_path / "net.onnx", "onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = NetworkConfig(name="segformer", encoder="tiny", weights="none")
    save_network(build_network(config, 3), tmp_path / "run" / "best", config, ["cat", "dög"])
    return tmp_path / "run"


def test_transformers_reads_the_folder(run: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, SegformerForSemanticSegmentation

    out = export_model(run, tmp_path / "hf", "huggingface")
    assert export_model(run, out, "huggingface") == out, "what it wrote itself is replaced"
    model = SegformerForSemanticSegmentation.from_pretrained(out).eval()
    assert model.config.id2label == {0: "background", 1: "cat", 2: "dög"}
    assert model.config.architectures == ["SegformerForSemanticSegmentation"]
    processor = AutoImageProcessor.from_pretrained(out)
    assert processor.do_resize is False
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    network = load_network(run).network
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).logits, network.logits(pixels))


def test_a_full_disk_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_model(run, tmp_path / "hf", "huggingface")
    assert not list((tmp_path / "hf").iterdir())


@pytest.mark.parametrize("kind", ["mask2former", "eomt"])
def test_what_has_no_form_there_is_one_line(tmp_path: Path, kind: str) -> None:
    config = NetworkConfig(name=network_of(kind), encoder=str(write_model(tmp_path, kind)), weights="none")
    save_network(build_network(config, 3), tmp_path / "run" / "best", config, ["cat", "dog"])
    with pytest.raises(ConfigError, match=f"{kind} has no ONNX form"):
        export_model(tmp_path / "run", tmp_path / "net.onnx", "onnx")
    with pytest.raises(ConfigError, match="to load a folder of it with"):
        export_model(tmp_path / "run", tmp_path / "hf", "huggingface")


def test_what_torch_says_of_a_form_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a condition\non the data")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(CheckpointError, match="any size: a condition on the data; nothing was written"):
        export_model(run, tmp_path / "net.onnx", "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["upernet", "beit", "dpt", "mobilenet_v2"])
def test_models_of_transformers_have_a_form(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnxruntime")
    config = NetworkConfig(name="hf", encoder=str(write_model(tmp_path, kind)), weights="none")
    save_network(build_network(config, 3), tmp_path / "run" / "best", config, ["cat", "dog"])
    assert export_model(tmp_path / "run", tmp_path / "net.onnx", "onnx").exists()
