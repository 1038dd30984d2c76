"""An exported network is checked before its file gets its name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsss_pipeline.errors import CheckpointError
from wsss_pipeline.segmentation.checkpoint import save_network
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
