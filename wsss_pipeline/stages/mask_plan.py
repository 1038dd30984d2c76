"""What a run of ``generate-masks`` has to do, found out without loading CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsss_pipeline.cache import MaskSet
from wsss_pipeline.clip.sources import ClipFiles, locate_clip
from wsss_pipeline.config import MaskConfig
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.image_files import ImageFile, is_there, place
from wsss_pipeline.refine import choose_backend
from wsss_pipeline.runtime.device import ResolvedPrecision, resolve_device, resolve_precision
from wsss_pipeline.runtime.shard import Shard

# Raise the version when the method computes something else from the same configuration.
METHOD = {"name": "clip-es", "version": 1}


Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class MaskRequest:
    """A run of stage one as the user asked for it.

    ``images``: image id to file. ``labels``: image id to class names in order of appearance; an empty
    tuple means that none of the classes is present. ``limit``: at most so many images of the share.
    ``check_bytes``: read every image whose mask is there, whatever its size and times say. ``engine``: this
    machine, or a Ray cluster, with ``workers`` actors at most (0: as many as there is room for).
    """

    images: Mapping[str, ImageFile]
    labels: Mapping[str, tuple[str, ...]]
    class_set: ClassSet
    config: MaskConfig
    cache_dir: Path
    device: str = "auto"
    shard: Shard = field(default_factory=Shard)
    limit: int | None = None
    batch_size: int = 1
    workers: int = 0
    store_cams: bool = False
    overwrite: bool = False
    check_bytes: bool = False
    offline: bool = False
    engine: Engine = "local"


@dataclass(frozen=True)
class MaskPlan:
    """A request with everything resolved that determines the masks.

    ``config``: templates and CRF backend resolved. ``image_ids``: this run's share, labelled and there.
    ``missing``: labelled ids without a file. ``unlabelled``: images that the labels don't name.
    """

    config: MaskConfig
    class_set: ClassSet
    clip: ClipFiles
    device: str
    precision: ResolvedPrecision
    mask_set: MaskSet
    image_ids: list[str]
    missing: list[str]
    unlabelled: list[str]

    def lines(self) -> list[str]:
        """The choices that decide over the masks, as a person reads them."""
        names, background = self.class_set.names, self.class_set.background
        crf = self.config.crf
        return [
            f"classes ({len(names)}): {', '.join(names)}",
            f"background words ({len(background)}): {', '.join(background) or 'none'}",
            f"templates ({len(self.config.templates)}): {' | '.join(self.config.templates)}",
            f"CLIP: {self.config.clip.weights}, {self.precision} on {self.device}",
            f"CRF: {crf.backend}" + ("" if crf.backend == "none" else f", {crf.image} image"),
        ]


def plan_masks(request: MaskRequest) -> MaskPlan:
    """Resolve a request.

    Raises:
        ConfigError: no such device.
        WeightsError: CLIP can't be found.
        MissingDependencyError: the CRF backend isn't installed.
    """
    class_set = request.class_set
    device = resolve_device(request.device, elsewhere=request.engine == "ray")
    precision = resolve_precision(request.config.clip.precision, device)
    crf = request.config.crf.model_copy(
        update={"backend": choose_backend(request.config.crf.backend)}
    )
    config = request.config.model_copy(
        update={"templates": request.config.templates or class_set.templates, "crf": crf}
    )
    clip = locate_clip(config.clip, offline=request.offline)
    share = request.shard.select(request.labels)[: request.limit]
    there = dict.fromkeys(image_id for image_id in share if _is_there(request.images.get(image_id)))
    return MaskPlan(
        config=config,
        class_set=class_set,
        clip=clip,
        device=str(device),
        precision=precision,
        mask_set=MaskSet(
            name=class_set.name,
            determinants=determinants(config, class_set, clip.digest(), precision),
            class_names=class_set.names,
            category_ids=_category_ids(class_set),
        ),
        image_ids=sorted(there, key=lambda image_id: place(request.images[image_id])),
        missing=[image_id for image_id in share if image_id not in there],
        unlabelled=[image_id for image_id in request.images if image_id not in request.labels],
    )


def determinants(
    config: MaskConfig, class_set: ClassSet, clip_digest: str, precision: ResolvedPrecision
) -> dict[str, Any]:
    """Everything that determines the masks, and nothing else, for the cache's fingerprint.

    Where a choice switches a part off, that part's parameters are left out.
    """
    cam, crf = config.cam.model_dump(), config.crf.model_dump()
    return {
        "method": METHOD,
        "clip": clip_digest,
        "precision": precision,
        "classes": [
            {"name": entry.name, "texts": list(entry.texts()), "fuse": entry.fuse}
            for entry in class_set.classes
        ],
        "background": list(class_set.background),
        "templates": list(config.templates),
        "cam": cam if config.cam.affinity else {"affinity": False},
        "crf": crf if config.crf.backend != "none" else {"backend": "none"},
        "max_pixels": config.max_pixels,
    }


def _category_ids(class_set: ClassSet) -> dict[str, int] | None:
    """Ids that the classes have in COCO, where each has one: COCO's run from 1 to 90 with gaps."""
    ids = {entry.name: entry.coco_id for entry in class_set.classes if entry.coco_id is not None}
    return ids if len(ids) == len(class_set.classes) else None


def _is_there(file: ImageFile | None) -> bool:
    return file is not None and is_there(file)
