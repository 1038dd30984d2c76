"""Each network can learn eight scenes by heart: the whole path from pictures to masks has no hole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.segmentation.mask_sources import GroundTruthMasks
from wsss_pipeline.segmentation.train_config import (
    AugmentationConfig,
    NetworkConfig,
    OptimisationConfig,
    TrainConfig,
)
from wsss_pipeline.stages.train_seg import TrainRequest, train_seg, validation_images

# deeplabv2 keeps the batch norm it is given, which without pre-trained weights normalises nothing: a gentler start
CASES = [
    ("deeplabv3plus", "resnet18", 2e-3, 150),
    ("segformer", "tiny", 3e-3, 300),
    ("deeplabv2", "resnet18", 1e-3, 250),
]


@pytest.mark.parametrize(("name", "encoder", "lr", "iterations"), CASES)
def test_eight_scenes_are_learnt_by_heart(
    tmp_path: Path, name: str, encoder: str, lr: float, iterations: int
) -> None:
    root = tmp_path / "voc"
    write_voc_folder(root, seed=12, scenes={"train": 8}, size=(64, 48))
    images = find_images(root / "JPEGImages")
    source = GroundTruthMasks(root / "SegmentationClass", load_class_set("demo").names)
    config = TrainConfig(
        network=NetworkConfig(name, encoder, "none"),
        augmentation=AugmentationConfig(64, 1.0, 1.0, flip=False, photometric=False),
        optimisation=OptimisationConfig(
            optimizer="adamw",
            lr=lr,
            weight_decay=0.0,
            head_lr_factor=1,
            iterations=iterations,
            batch=8,
            warm_up=10,
            clip_norm=1,
        ),
        validate_every=iterations,
        save_every=iterations,
    )
    validation = validation_images(root / "SegmentationClass", root / "JPEGImages", None)
    torch.manual_seed(0)
    result = train_seg(
        TrainRequest(images, source, config, tmp_path / "run", validation=validation, device="cpu")
    )
    assert result.miou is not None
    assert result.miou > 0.95
