"""The demo: drawn scenes to disk, then the same stages on them that a user's own images go through."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from wsss_pipeline.cache import MaskCache
from wsss_pipeline.config import CrfConfig, InferenceConfig
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.masks import MaskFolder, MaskSource
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.evaluation.result import Evaluation
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.runtime.device import images_at_a_time
from wsss_pipeline.runtime.output import check_replaceable
from wsss_pipeline.segmentation.train_config import OnlineConfig, load_train_config
from wsss_pipeline.stages.evaluate import evaluate, open_masks
from wsss_pipeline.stages.generate_masks import generate_masks
from wsss_pipeline.stages.preview import PAGE, preview_folder
from wsss_pipeline.stages.train_seg import TrainJob, train_seg

logger = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"
PREVIEW, REPORT = "preview", "report.html"
RECIPE = "demo/frozen-clip"
# what the table calls the pseudo masks -> their settings; the network learns from the last
PSEUDO_MASKS: dict[str, tuple[str, ...]] = {
    "clip-es: CAM": ("method=clip-es", "cam.affinity=false", "crf.backend=none"),
    "clip-es: CAM + CAA": ("method=clip-es", "crf.backend=none"),
    "clip-es: CAM + CAA + CRF": ("method=clip-es",),
    "weclip: CAM + affinity + CRF": ("method=weclip", "refine=crf"),
    "excel: CAM + PAR": ("method=excel",),
}
# Chosen on scenes of another seed than the demo's own, where 1, 1.25 and 1.5 lose.
INFERENCE = InferenceConfig(scales=(0.75, 1.0, 1.25), flip=True)


@dataclass
class DemoReport:
    """What the demo measured, and where to look.

    Attributes:
        scores: figures by what was scored; of a network with and without the CRF.
        folders: paths by what lies there.
    """

    scores: dict[str, Evaluation] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Table and folders as a person reads them."""
        rows = [
            (f"{name} {variant}".rstrip(), values.scores.miou, result)
            for name, result in self.scores.items()
            for variant, values in result.variants.items()
        ]
        width = max(len(name) for name, _, _ in rows)
        left = max(len(name) for name in self.folders)
        return [
            f"{'':{width}}  mIoU %  on",
            *(
                f"{name:{width}}  {100 * miou:6.1f}  {result.images} images of {result.split}"
                for name, miou, result in rows
            ),
            "",
            *(f"{name:{left}}  {path}" for name, path in self.folders.items()),
        ]


SCENES = (200, 100)  # for training and for testing


def draw_scenes(out: Path, seed: int = 0, scenes: tuple[int, int] = SCENES) -> Path:
    """Draws the scenes and lays them out as PASCAL VOC does.

    Args:
        out: folder for the folder of the data set.
        seed: seed.
        scenes: numbers of scenes for training and for testing.

    Raises:
        OutputError: ``out`` can't be written, or holds others' files under the demo's names.
    """
    data = out / "data"
    logger.info("drawing %d training and %d test scenes into %s", *scenes, data)
    write_voc_folder(data, seed, dict(zip((TRAIN, VAL), scenes, strict=True)))
    return data


def run_demo(
    out: Path,
    seed: int = 0,
    recipe: str = RECIPE,
    *,
    upper_bound: bool = False,
    scenes: tuple[int, int] = SCENES,
    overrides: Sequence[str] = (),
) -> DemoReport:
    """Draws the scenes, makes pseudo masks of the training scenes by several methods, trains a network on the last
    ones, and scores all of them; the network on scenes that it hasn't seen, without their labels.

    Running it again on the same folder computes nothing twice.

    Args:
        out: folder for the data set, the cache, the network, the preview and the report.
        seed: seed of the scenes and of the network.
        recipe: settings of the network; one whose masks are made in training takes labels in place of pseudo masks.
        upper_bound: choice to train a network on the ground truth too.
        scenes: numbers of scenes for training and for testing.
        overrides: ``key=value`` settings over those of the recipe.

    Raises:
        OutputError: ``out`` can't be written, or holds others' files under the demo's names.
        TrainingError: ``out`` holds a demo with other settings.
        KeyboardInterrupt: a request to stop came; what was finished is kept.
    """
    for file in (out / PREVIEW / PAGE, out / REPORT):
        check_replaceable(file)
    data = draw_scenes(out, seed, scenes)
    truth = data / "SegmentationClass"
    splits = {name: data / "ImageSets/Segmentation" / f"{name}.txt" for name in (TRAIN, VAL)}
    report = DemoReport(folders={"data set": data})
    images = find_images(data / "JPEGImages")
    for name, settings in PSEUDO_MASKS.items():
        logger.info("pseudo masks of %s", name)
        masks = MaskJob.read(
            voc=data,
            split=TRAIN,
            classes="demo",
            overrides=settings,
            settings={"clip.weights": "demo"},
            cache=out / "cache",
        )
        made = generate_masks(replace(masks, workers=images_at_a_time(), store_cams=True, offline=True))
        if made.interrupted:
            raise KeyboardInterrupt
        pseudo_masks = MaskCache.open(made.path)
        report.scores[f"pseudo masks, {name}"] = evaluate(pseudo_masks, truth, split=splits[TRAIN])
    report.folders["pseudo masks"] = made.path
    seen = preview_folder(pseudo_masks, images, out / PREVIEW)
    if seen.interrupted:
        raise KeyboardInterrupt
    report.folders["preview"] = seen.page
    sources: dict[str, MaskSource] = {"network": pseudo_masks}
    if upper_bound:
        sources["network-on-ground-truth"] = MaskFolder(truth, pseudo_masks.class_names, "ground truth")
    for name, source in sources.items():
        config = load_train_config(recipe, None, overrides, {"seed": seed})
        job = TrainJob(data / "JPEGImages", source, out / name, config, split=splits[TRAIN], workers=1)
        if config.online.method and source is pseudo_masks:
            job = replace(job, masks=None, labels=data / "Annotations", classes="demo", offline=True)
        elif config.online.method:
            job = replace(job, config=config.model_copy(update={"online": OnlineConfig()}), offline=True)
        trained = train_seg(job)
        if trained.interrupted:
            raise KeyboardInterrupt
        report.folders[name] = trained.checkpoint
        page = None
        if source is pseudo_masks:
            page = report.folders["report"] = out / REPORT
        report.scores[name] = evaluate(
            open_masks(checkpoint=trained.checkpoint, images=images, inference=INFERENCE, crf=CrfConfig()),
            truth,
            split=splits[VAL],
            report=page,
            images=images,
            settings={"checkpoint": str(trained.checkpoint), "inference": INFERENCE.model_dump(mode="json")},
        )
    return report
