"""Class-agnostic regions: images -> a region set in the cache's files, which every method can refine with.

The loop, its resuming and its faults are those of ``generate_masks``; what makes the regions is a SAM.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wsss_pipeline.cache import MaskSet
from wsss_pipeline.config import Layer, resolve
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.transforms import Prepared
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.pseudo_masks.job import Job, check_work
from wsss_pipeline.pseudo_masks.maker import LabelledImage
from wsss_pipeline.pseudo_masks.report import MaskReport
from wsss_pipeline.pseudo_masks.run import run_share
from wsss_pipeline.regions.proposals import PRESETS, Predictor, ProposalConfig, propose
from wsss_pipeline.regions.regions import Regions
from wsss_pipeline.regions.sam import load_predictor
from wsss_pipeline.runtime.device import resolve_device

NAME = "regions"  # of the region sets
VERSION = 1  # to be raised when the same settings give other regions
DEFAULT_PRESET = "fma"


@dataclass(frozen=True)
class Proposed:
    """The regions of an image, with the seconds that they took."""

    regions: Regions
    seconds: float

    def wait(self) -> tuple[Regions, float, float]:
        """The regions, the seconds in the SAM, and none in a refiner."""
        return self.regions, self.seconds, 0.0


class Proposer:
    """A ``MaskMaker`` of regions: a SAM's proposals. It looks at one image at a time, with all cores of a CPU.

    Args:
        predictor: SAM, on the device.
        config: settings.
        device: place of the SAM.
        points_per_batch: number of points asked for together; 0 is the predictor's own.
    """

    model = "SAM"
    in_threads = False
    if_too_large = "take a smaller SAM, or lower --points-per-batch"

    def __init__(
        self, predictor: Predictor, config: ProposalConfig, device: torch.device, points_per_batch: int = 0
    ) -> None:
        self.device, self.pixel_range = device, config.images.pixel_range
        self._predictor, self._config, self._points_per_batch = predictor, config, points_per_batch
        # without crops nothing overlaps, without the filter nothing is covered
        unused: set[str] = {"overlap"} if len(config.points) == 1 else set()
        unused |= set() if config.part_filter else {"part_overlap"}
        unused |= {"images"} if self.pixel_range is None else set()
        self.mask_set = MaskSet(
            name=NAME,
            determinants={
                "propose-regions": {"version": VERSION},
                "sam": predictor.digest,
                "precision": "fp32",
                "proposals": config.model_dump(mode="json", exclude=unused),
            },
            class_names=(),
            holds="regions",
        )

    def lines(self) -> list[str]:
        """The choices that decide over the regions, as a person reads them."""
        config, grids = self._config, " and ".join(f"{side} x {side}" for side in self._config.points)
        return [
            f"SAM: {self._predictor.description}, fp32 on {self.device}",
            f"points: {grids} on {'the image' if len(config.points) == 1 else 'the image and each crop'}; "
            f"predicted IoU above {config.iou_threshold:g}, stability from {config.stability_threshold:g}",
        ]

    def load(self) -> None:
        """Nothing: the SAM's weights are in the fingerprint, so it is there already."""

    def prepare(
        self, pixels: NDArray[np.uint8], labels: Sequence[str] | None, image_id: str = ""
    ) -> LabelledImage:
        """An image, uint8 (H, W, 3) RGB; regions have no classes."""
        return LabelledImage(pixels, None, [], Prepared(torch.from_numpy(pixels).permute(2, 0, 1)))

    def generate(self, batch: Sequence[LabelledImage], with_cams: bool) -> list[Proposed]:
        """Regions, one image after another.

        Raises:
            MemoryError, RuntimeError: memory ran out.
        """
        found = []
        for image in batch:
            start = time.monotonic()
            regions = propose(
                image.pixels, self._predictor, self._config, points_per_batch=self._points_per_batch
            )
            found.append(Proposed(regions, time.monotonic() - start))
        return found


@dataclass(frozen=True)
class ProposeJob(Job):
    """Images for a SAM to look at; ``dataclasses.replace`` sets how the work is divided.

    Attributes:
        proposer: maker of the regions.
    """

    proposer: Proposer

    def maker(self) -> Proposer:
        """The SAM."""
        return self.proposer

    @classmethod
    def read(
        cls,
        sam: str,
        images: Path,
        out: Path,
        *,
        preset: str | None = None,
        layers: Iterable[Layer] = (),
        split: Path | None = None,
        device: str = "auto",
        offline: bool = False,
        points_per_batch: int = 0,
        image_suffix: str | None = None,
    ) -> ProposeJob:
        """A job out of paths: the images listed, the SAM loaded.

        Args:
            sam: hub id or folder.
            images: folder, searched with all below it, or WebDataset archives.
            out: folder that holds region sets.
            preset: name of published settings; ``fma`` where None.
            layers: settings of the user's, later ones winning.
            split: text file of the ids of the images to do; all of them, where None.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            offline: fetch nothing.
            points_per_batch: number of points asked for together; 0 is the SAM's own.
            image_suffix: choice of the files, see ``find_images``.

        Raises:
            ConfigError: no such preset or device, settings out of range.
            ImageError, LabelError: from listing the images, reading the split.
            WeightsError: no SAM.
        """
        preset = preset or DEFAULT_PRESET
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset:.60}: unknown; known are {', '.join(PRESETS)}")
        config = resolve(ProposalConfig, [(f"preset {preset}", PRESETS[preset]), *layers])
        where = resolve_device(device)
        files = find_images(images, image_suffix, option="--image-suffix")
        wanted = list(files) if split is None else read_split(split, files)
        check_work(files, dict.fromkeys(wanted), files.unread)
        predictor = load_predictor(sam, where, offline=offline)
        inputs = {"--images": images, "--split": split}
        if Path(sam).exists():
            inputs["--sam"] = Path(sam)
        return cls(
            {image_id: files[image_id] for image_id in wanted if image_id in files},
            dict.fromkeys(wanted),
            Proposer(predictor, config, where, points_per_batch),
            cache_dir=out,
            inputs={option: path for option, path in inputs.items() if path is not None},
            cache_option="--out",
            unread=files.unread,
        )


def propose_regions(job: ProposeJob) -> MaskReport:
    """Make the regions that the set doesn't hold yet.

    Raises:
        WsssError: nothing can be computed at all; never for one image.
    """
    return run_share(job)
