"""Each network can learn a few scenes by heart: the whole path from images to masks has no hole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_transformers import network_of, write_model
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.masks import MaskFolder
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.segmentation.train_config import (
    TRANSFORMERS,
    AugmentationConfig,
    NetworkConfig,
    OptimisationConfig,
    TrainConfig,
    WeakClipConfig,
)
from wsss_pipeline.stages.train_seg import TrainJob, train_seg

# network, encoder, learning rate, updates, side of the images, images, images an update; deeplabv2 sees and answers
# at an eighth of the size, so its objects have to be larger for as true an edge
CASES = [
    ("deeplabv3plus", "resnet18", 2e-3, 45, 48, 4, 4),
    ("segformer", "tiny", 3e-3, 110, 64, 4, 4),
    pytest.param("deeplabv2", "resnet10t", 2e-3, 180, 208, 8, 2, marks=pytest.mark.slow),
    pytest.param("weakclip", "demo", 3e-3, 50, 96, 8, 8, marks=pytest.mark.slow),
    *(
        pytest.param(network_of(kind), kind, 3e-3, iterations, 64, 8, 8, marks=pytest.mark.slow)
        for kind, iterations in (("upernet", 130), ("mask2former", 300), ("eomt", 400))
    ),
]


def write_near_views(root: Path, side: int, count: int) -> None:
    """Squares around the largest object of a scene three times as wide."""
    for folder in ("images", "truth"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        scene = draw_scene((12, number), 3 * side, 9 * side // 4)
        largest = 1 + np.argmax(np.bincount(scene.mask.ravel())[1:])
        rows, columns = np.nonzero(scene.mask == largest)
        top, left = (
            int(np.clip(middle - side / 2, 0, end - side))
            for middle, end in zip((rows.mean(), columns.mean()), scene.mask.shape, strict=True)
        )
        cut = slice(top, top + side), slice(left, left + side)
        Image.fromarray(scene.image[cut]).save(root / "images" / f"{number}.png")
        Image.fromarray(scene.mask[cut]).save(root / "truth" / f"{number}.png")


@pytest.mark.parametrize(("name", "encoder", "lr", "iterations", "side", "count", "batch"), CASES)
def test_a_few_scenes_are_learnt_by_heart(
    tmp_path: Path, name: str, encoder: str, lr: float, iterations: int, side: int, count: int, batch: int
) -> None:
    write_near_views(tmp_path, side, count)
    if name in TRANSFORMERS:
        encoder = str(write_model(tmp_path / encoder, encoder))
    images, truth = tmp_path / "images", tmp_path / "truth"
    config = TrainConfig(
        network=NetworkConfig(
            name=name, encoder=encoder, weights="none", weakclip=WeakClipConfig(width=64, channels=32)
        ),
        augmentation=AugmentationConfig(
            crop=side, scale_min=1.0, scale_max=1.0, flip=False, photometric=False
        ),
        optimisation=OptimisationConfig(
            optimizer="adamw",
            lr=lr,
            weight_decay=0.0,
            head_lr_factor=1,
            iterations=iterations,
            batch=batch,
            warm_up=10,
            clip_norm=1,
        ),
        precision="fp32",
        validate_every=iterations,
        save_every=iterations,
    )
    masks = MaskFolder(truth, load_class_set("demo").names)
    result = train_seg(
        TrainJob(images, masks, tmp_path / "run", config, val_gt=truth, device="cpu", workers=0)
    )
    assert result.miou is not None
    assert result.miou > 0.95
