"""Eight drawn scenes, and a job that trains a tiny network on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.segmentation.train_config import TrainConfig
from wsss_pipeline.stages.train_seg import TrainJob

CONFIG = TrainConfig.model_validate(
    {
        "network": {"name": "segformer", "encoder": "tiny", "weights": "none"},
        "augmentation": {"crop": 48},
        "optimisation": {
            "optimizer": "adamw",
            "lr": 1e-3,
            "head_lr_factor": 1.0,
            "iterations": 6,
            "batch": 2,
            "warm_up": 2,
            "clip_norm": 1.0,
        },
        "precision": "fp32",
        "validate_every": 3,
        "save_every": 2,
    }
)

Make = Callable[..., TrainJob]


def changed(config: TrainConfig, **values: Any) -> TrainConfig:
    """The configuration with other values, written ``section__key`` below a section."""
    for name, value in values.items():
        section, _, key = name.rpartition("__")
        new = getattr(config, section).model_copy(update={key: value}) if section else value
        config = config.model_copy(update={section or key: new})
    return config


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=3, scenes={"train": 8})
    return folder


@pytest.fixture
def make(root: Path, tmp_path: Path) -> Make:
    """A job in the folder ``tmp_path / out``."""

    def job(out: str = "run", config: TrainConfig = CONFIG, **changes: Any) -> TrainJob:
        masks = MaskFolder(root / "SegmentationClass", load_class_set("demo").names, "ground truth")
        settings = {"device": "cpu", "workers": 0, **changes}
        return TrainJob(root / "JPEGImages", masks, tmp_path / out, config, **settings)

    return job
