"""Eight drawn scenes, and jobs that train a tiny network on them: on their masks, or on their labels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wsss_pipeline.clip.sources import ClipFiles, locate_clip
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.pseudo_masks import generator as generator_module
from wsss_pipeline.segmentation.train_config import TrainConfig, load_train_config
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


def changed(config: Any, **values: Any) -> Any:
    """The configuration with other values, written ``section__key`` below a section."""
    for name, value in values.items():
        first, _, rest = name.partition("__")
        new = changed(getattr(config, first), **{rest: value}) if rest else value
        config = config.model_copy(update={first: new})
    return config


SMALL = [
    *("network.frozen.width=32", "network.frozen.depth=1", "augmentation.crop=48"),
    *("optimisation.iterations=6", "optimisation.batch=2", "optimisation.warm_up=2"),
    *("validate_every=3", "save_every=2", "online.gate_from=5"),
]
# without affinity, as the demo has it, there is nothing to gate
OWN = {
    "weclip": [],
    "excel": ["online.guide_from=5", "online.self_affinity_from=6", "online.settings=[excel.affinity=true]"],
}


def online_config(method: str, **values: Any) -> TrainConfig:
    """Crops of 6 x 6 patches; the network helps from update 5 on. A guide is for ExCEL alone."""
    if method != "excel":
        values.pop("online__guide_from", None)
    config: TrainConfig = changed(
        load_train_config(f"{method}/demo", overrides=[*SMALL, *OWN[method]]), **values
    )
    return config


@cache
def loaded_once(files: ClipFiles) -> Clip:
    return load_clip(files, torch.device("cpu"))


@pytest.fixture(scope="session")
def demo_clip() -> Clip:
    """In float32: not the one of ``loaded_once``, which a generator in bfloat16 may have cast."""
    return load_clip(locate_clip(ClipConfig(weights="demo"), offline=True), torch.device("cpu"))


def other_clip(folder: Path, added: float = 0.1) -> Path:
    """A copy of the demo's CLIP, one tensor of which is another."""
    shutil.copytree(str(resources.files("wsss_pipeline") / "demo" / "clip"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("post_layernorm.bias"))
    save_file({**tensors, name: tensors[name] + added}, folder / "model.safetensors")
    return folder


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


@pytest.fixture
def make_online(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A job that makes its targets of image-level labels, in the folder ``tmp_path / out``."""
    monkeypatch.setattr(generator_module, "load_clip", lambda files, device: loaded_once(files))

    def job(out: str, config: TrainConfig, **changes: Any) -> TrainJob:
        settings = {"device": "cpu", "workers": 0, "classes": "demo", "labels": root / "Annotations"}
        settings |= {"images": root / "JPEGImages", "offline": True, **changes}
        return TrainJob(masks=None, out=tmp_path / out, config=config, **settings)

    return job
