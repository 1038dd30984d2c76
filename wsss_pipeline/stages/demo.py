"""The demo: drawn scenes to disk, then the same stages on them that a user's own pictures go through."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.masks import MaskFolder, MaskSource
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.evaluation.report import EvaluationResult
from wsss_pipeline.runtime.device import images_at_a_time
from wsss_pipeline.segmentation.train_config import load_train_config
from wsss_pipeline.stages.evaluate import evaluate
from wsss_pipeline.stages.evaluate_network import evaluate_network, load_network_masks
from wsss_pipeline.stages.evaluation_report import ReportImages, report_with_truth
from wsss_pipeline.stages.generate_masks import generate_masks
from wsss_pipeline.stages.mask_inputs import read_inputs
from wsss_pipeline.stages.mask_plan import MaskRequest
from wsss_pipeline.stages.preview import preview
from wsss_pipeline.stages.train_seg import TrainJob, train_seg

logger = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"
RECIPE = "demo/deeplabv3plus"
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


def run_demo(
    out: Path,
    seed: int = 0,
    recipe: str = RECIPE,
    *,
    upper_bound: bool = False,
    scenes: tuple[int, int] = (200, 100),
    overrides: Sequence[str] = (),
) -> DemoReport:
    """Draws the scenes, makes pseudo masks of the training scenes, trains a network on them, scores both.

    Running it again on the same folder computes nothing twice.

    Args:
        out: folder for the data set, the cache, the network and the pictures.
        seed: of the scenes and of the network.
        recipe: of the network.
        upper_bound: also train a network on the ground truth.
        scenes: how many for training, how many for testing.
        overrides: ``key=value`` settings over those of the recipe.

    Raises:
        ConfigError: ``out`` can't be written.
        TrainingError: ``out`` holds a demo with other settings.
    """
    data = out / "data"
    report = DemoReport(folders={"data set": data})
    logger.info("drawing %d training and %d test scenes into %s", *scenes, data)
    try:
        write_voc_folder(data, seed, dict(zip((TRAIN, VAL), scenes, strict=True)))
    except OSError as error:
        raise ConfigError(f"the demo's folder {out} can't be written: {error.strerror or error}") from error
    masks = data
    for name, settings in STEPS.items():
        logger.info("pseudo masks: %s", name)
        masks = _pseudo_masks(data, out / "cache", settings)
        result = evaluate(data / "SegmentationClass", cache=masks, split=_split(data, TRAIN))
        report.add(f"pseudo masks: {name}", result)
    report.folders["pseudo masks"] = masks
    images = find_images(data / "JPEGImages")
    report.folders["preview"] = preview(masks, images, out / "preview.png")
    sources: dict[str, MaskSource] = {"network": MaskCache.open(masks)}
    if upper_bound:
        names = sources["network"].class_names
        sources["network-on-ground-truth"] = MaskFolder(data / "SegmentationClass", names, "ground truth")
    for name, source in sources.items():
        config = load_train_config(recipe, None, overrides, {"seed": seed})
        job = TrainJob(data / "JPEGImages", source, out / name, config, _split(data, TRAIN), workers=1)
        report.folders[name] = train_seg(job).checkpoint
        _score_network(report, name, data, out)
    return report


def _split(data: Path, name: str) -> Path:
    return data / "ImageSets/Segmentation" / f"{name}.txt"


def _score_network(report: DemoReport, name: str, data: Path, out: Path) -> None:
    """On the test scenes, with a report for the one trained on pseudo masks."""
    masks = load_network_masks(report.folders[name], data / "JPEGImages")
    truth = find_images(data / "SegmentationClass")
    images = ReportImages(masks.images, masks.class_names, None, masks.mask, truth)
    result = evaluate_network(
        masks, data / "SegmentationClass", split=_split(data, VAL), on_image=images.add
    ).last
    report.add(f"{name}, unseen images", result)
    if name == "network":
        report.folders["report"] = out / "report.html"
        report_with_truth(out / "report.html", result, images, {"checkpoint": str(report.folders[name])})


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
        workers=images_at_a_time(),
        store_cams=True,
        offline=True,
    )
    return generate_masks(request).path
