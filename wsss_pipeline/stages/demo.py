"""The demo: drawn scenes to disk, then the same stages on them that a user's own pictures go through."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.evaluation.report import EvaluationResult
from wsss_pipeline.stages.evaluate import evaluate
from wsss_pipeline.stages.generate_masks import generate_masks
from wsss_pipeline.stages.mask_inputs import read_inputs
from wsss_pipeline.stages.mask_plan import MaskRequest
from wsss_pipeline.stages.preview import preview

logger = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"
# what the table calls it -> settings that leave out what comes after
STEPS: dict[str, tuple[str, ...]] = {
    "CAM": ("cam.affinity=false", "crf.backend=none"),
    "CAM + CAA": ("crf.backend=none",),
    "CAM + CAA + CRF": (),
}


@dataclass(frozen=True)
class DemoScore:
    """One line of the demo's table: what was scored, on which images, and its mIoU in [0, 1]."""

    name: str
    split: str
    images: int
    miou: float


@dataclass
class DemoReport:
    """What the demo found, and where to look."""

    scores: list[DemoScore] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str, result: EvaluationResult) -> None:
        """One line more."""
        self.scores.append(DemoScore(name, result.split, result.images, result.scores.miou))

    def lines(self) -> list[str]:
        """Table and places as a person reads them."""
        width = max(len(score.name) for score in self.scores)
        rows = [f"{'':{width}}  mIoU %  on"]
        rows += [
            f"{score.name:{width}}  {100 * score.miou:6.1f}  {score.images} images of {score.split}"
            for score in self.scores
        ]
        places = max(len(name) for name in self.folders)
        return [*rows, "", *(f"{name:{places}}  {path}" for name, path in self.folders.items())]


def run_demo(out: Path, seed: int = 0, scenes: tuple[int, int] = (200, 100)) -> DemoReport:
    """Draws the scenes, makes pseudo masks of the training scenes and scores them.

    Running it again on the same folder computes nothing twice.

    Args:
        out: folder for the data set, the cache and the pictures.
        seed: of the scenes.
        scenes: how many for training, how many for testing.

    Raises:
        ConfigError: ``out`` can't be written.
    """
    data = out / "data"
    report = DemoReport(folders={"data set": data})
    logger.info("drawing %d training and %d test scenes into %s", *scenes, data)
    try:
        write_voc_folder(data, seed, dict(zip((TRAIN, VAL), scenes, strict=True)))
    except OSError as error:
        raise ConfigError(f"the demo's folder {out} can't be written: {error.strerror or error}") from error
    masks = data
    for name, overrides in STEPS.items():
        logger.info("pseudo masks: %s", name)
        masks = _pseudo_masks(data, out / "cache", overrides)
        report.add(f"pseudo masks: {name}", _score(data, TRAIN, cache=masks))
    report.folders["pseudo masks"] = masks
    images = read_inputs(voc=data, split=TRAIN, classes="demo")[1].images
    report.folders["preview"] = preview(masks, images, out / "preview.png")
    return report


def _pseudo_masks(data: Path, cache: Path, overrides: Sequence[str]) -> Path:
    config, inputs = read_inputs(
        voc=data, split=TRAIN, classes="demo", overrides=overrides, flags={"clip.weights": "demo"}
    )
    request = MaskRequest(
        images=inputs.images,
        labels=inputs.labels,
        class_set=inputs.class_set,
        config=config,
        cache_dir=cache,
        workers=1,
        store_cams=True,
        offline=True,
    )
    return generate_masks(request).path


def _score(data: Path, split: str, cache: Path) -> EvaluationResult:
    return evaluate(
        data / "SegmentationClass", cache=cache, split=data / "ImageSets/Segmentation" / f"{split}.txt"
    )
