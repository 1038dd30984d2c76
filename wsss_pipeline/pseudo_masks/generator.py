"""One image or a batch, all the way from pixels to pseudo masks. The commands and the library run this object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.cache import MaskSet
from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import MaskConfig, PromptedMaskConfig
from wsss_pipeline.data.classes import ClassSet, check_template, load_class_set
from wsss_pipeline.data.images import AnyImage, as_pixels
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.data.transforms import resize
from wsss_pipeline.errors import ConfigError, ImageError
from wsss_pipeline.methods import Method, load_mask_config, load_method
from wsss_pipeline.pseudo_masks.maker import Generated, LabelledImage
from wsss_pipeline.refine import RegionVote, label, label_confidences, load_refiner
from wsss_pipeline.runtime.device import mark, resolve_device, resolve_precision


class MaskGenerator:
    """Makes pseudo masks of images out of the classes that are present in them: a ``MaskMaker``.

    Resolves its settings at once; CLIP is loaded when the first mask is asked for.

    Args:
        classes: built-in class set, YAML file or names with commas between, as ``--classes`` has it, or a list of
            names, or a class set.
        method: name of a method, or module path of one's own.
        clip: hub id or folder of Hugging Face or OpenCLIP, file of weights, or ``demo``.
        preset: published settings, such as ``clip-es/voc12``.
        settings: dotted key to value, such as ``{"cam.threshold": 0.5}``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        offline: fetch nothing.
        config: all settings, resolved, in place of the five before them.
        elsewhere: another machine will run it, so that the device needn't be here.

    Raises:
        ConfigError, ClassSetError: settings or classes that can't be used.
        WeightsError: CLIP can't be found.
        MissingDependencyError: the refiner needs an optional package.
    """

    model = "CLIP"
    if_too_large = "lower --max-pixels, --workers or --batch-size"

    def __init__(
        self,
        classes: str | Sequence[str] | ClassSet = "",
        *,
        method: str | None = None,
        clip: str | None = None,
        preset: str | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "auto",
        offline: bool = False,
        config: MaskConfig | None = None,
        elsewhere: bool = False,
    ) -> None:
        class_set = classes if isinstance(classes, ClassSet) else None
        if config is None:
            names = classes if isinstance(classes, str) else None
            if names is None and not isinstance(classes, ClassSet):
                names = ",".join(classes) + ","
            flags = {"method": method, "classes": names or None, "clip.weights": clip, **(settings or {})}
            config = load_mask_config(preset, flags=flags)
        for template in config.templates:
            check_template(template, "template")
        if class_set is None:
            if not config.classes:
                raise ConfigError(
                    "no classes given; use --classes cat,dog, --classes FILE.yaml or --preset NAME"
                )
            class_set = load_class_set(config.classes)
        self.class_set, self.pixel_range = class_set, config.images.pixel_range
        self.config = config.model_copy(update={"templates": config.templates or class_set.templates})
        self._method_type = load_method(config.method)
        self.refiner = load_refiner(config, self._method_type.refiner)
        self.device = resolve_device(device, elsewhere)
        self.in_threads = self.device.type == "cpu"
        self.precision = resolve_precision(config.clip.precision, self.device)
        self.clip = locate_clip(config.clip, offline=offline)

    @cached_property
    def loaded_clip(self) -> Clip:
        """CLIP on the device; WeightsError where it can't be loaded."""
        return load_clip(self.clip, self.device)

    @cached_property
    def method(self) -> Method:
        """The method with CLIP loaded and the classes embedded; errors as of ``loaded_clip``."""
        return self._method_type(self.config, self.loaded_clip, self.class_set, self.precision)

    @cached_property
    def mask_set(self) -> MaskSet:
        """What the masks are and all that determines them; reads the weights for their digest."""
        classes = self.class_set.classes
        of_classes: Any = getattr(self._method_type, "class_determinants", lambda *_: {})
        category_ids = {entry.name: entry.coco_id for entry in classes if entry.coco_id is not None}
        return MaskSet(
            name=self.class_set.name,
            determinants={
                "method": {"name": self._method_type.name, "version": self._method_type.version},
                **self.clip.determinants,
                "precision": self.precision,
                "classes": [
                    {"name": entry.name, "texts": list(entry.texts()), "fuse": entry.fuse}
                    for entry in classes
                ],
                "background": list(self.class_set.background),
                "templates": list(self.config.templates),
                "max_pixels": self.config.max_pixels,
                # where it is given: mask sets from before keep their fingerprint
                **({"pixel_range": list(self.pixel_range)} if self.pixel_range else {}),
                **self._method_type.determinants(self.config),
                **of_classes(self.config, self.class_set),
                **self.refiner.determinants(),
                # it came later: what was made before keeps its fingerprint
                **({} if self.config.confidence == "posterior" else {"confidence": self.config.confidence}),
            },
            class_names=self.class_set.names,
            # COCO's category ids run from 1 to 90 with gaps; of use where each class has one
            category_ids=category_ids if len(category_ids) == len(classes) else None,
        )

    def lines(self) -> list[str]:
        """The choices that decide over the masks, as a person reads them."""
        names, background = self.class_set.names, self.class_set.background
        texts = [
            f"background words ({len(background)}): {', '.join(background) or 'none'}",
            f"templates ({len(self.config.templates)}): {' | '.join(self.config.templates)}",
        ]
        if isinstance(self.config, PromptedMaskConfig) and self.config.prompts:
            texts = [f"prompts: learned, {self.config.prompts}"]
        return [
            f"classes ({len(names)}): {', '.join(names)}",
            *texts,
            f"method: {self._method_type.name}; CLIP: {self.config.clip.weights}, {self.precision} on {self.device}",
            f"confidence: {self.config.confidence}",
            self.refiner.description,
        ]

    def __call__(self, image: AnyImage, labels: Sequence[str], image_id: str = "") -> PseudoMask:
        """The pseudo mask of one image, with its CAMs.

        Args:
            image: uint8 array (H, W, 3) RGB, PIL image, or path.
            labels: names or aliases of the classes that are present; none gives background.
            image_id: id of its regions, where they lie in a folder and vote.

        Raises:
            ImageError: the image can't be used.
            RegionError: there are no regions of that id.
            ClassSetError: no such class.
        """
        prepared = self.prepare(as_pixels(image, self.pixel_range), labels, image_id)
        if not prepared.classes:
            return prepared.background(with_cams=True, outputs=1 + len(self.class_set.names))
        return self.generate([prepared], with_cams=True)[0].wait()[0]

    def load(self) -> None:
        """Load CLIP; errors as of ``method``."""
        _ = self.method

    def prepare(
        self, pixels: NDArray[np.uint8], labels: Sequence[str] | None, image_id: str = ""
    ) -> LabelledImage:
        """An image, uint8 (H, W, 3) RGB, on its way into CLIP.

        Without labels, None, all classes are taken to be present.

        Raises:
            ClassSetError: a label is unknown.
            RegionError: its regions vote, and there are none for this id.
        """
        labels = self.class_set.names if labels is None else labels
        # as the cache stores them, each once
        names = tuple(dict.fromkeys(map(self.class_set.canonical, labels)))
        classes = [self.class_set.index(name) for name in names]
        regions = None
        if classes and isinstance(self.refiner, RegionVote):
            regions = self.refiner.source(image_id, pixels)
        return LabelledImage(pixels, names, classes, self.method.prepare(pixels), regions)

    @torch.no_grad()
    def generate(self, batch: Sequence[LabelledImage], with_cams: bool) -> list[Generated]:
        """Start with images whose prepared sizes are equal, each with at least one class.

        Nothing leaves the device between CLIP and the labels, and on a GPU nothing waits for them.

        Raises:
            ImageError, MemoryError, RuntimeError: one of them can't be labelled, or all together can't.
        """
        power, start = self.method.background_power, mark(self.device)
        pixels = torch.stack([image.prepared.pixels for image in batch]).to(self.device)
        maps = self.method.scores(pixels, [image.classes for image in batch])
        # one answer for all: each waits for the device
        if not bool(torch.stack([torch.isfinite(cams).all() for cams in maps]).all()):
            raise ImageError(
                "CLIP's class activation isn't finite; try --precision fp32, or check the weights"
            )
        middle = mark(self.device)
        seen, scores, ordered = [], [], []
        for image, cams in zip(batch, maps, strict=True):
            height, width = (max(1, round(side * image.prepared.scale)) for side in image.pixels.shape[:2])
            own = image.prepared.seen
            seen.append(resize(image.pixels, width, height) if own is None else own)
            # half precision is what the cache stores and what the published CRF reads
            ordered.append(cams[self._order(image)])
            scores.append(assemble(upscale_cams(ordered[-1], (height, width)).half(), power))
        regions = [image.regions for image in batch if image.regions is not None]
        posteriors = self.refiner(seen, scores, regions, ordered if regions else ())
        confidences = label_confidences(self.config.confidence, seen, scores)
        on_host: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for image, cams, posterior, sure in zip(batch, maps, posteriors, confidences, strict=True):
            size = (image.pixels.shape[0], image.pixels.shape[1])
            values = [image.classes[place] for place in self._order(image)]
            mask, confidence = label(posterior, values, size, 1 + len(self.class_set.names), confidences=sure)
            stored = upscale_cams(cams, size).half().to("cpu", non_blocking=True) if with_cams else None
            on_host.append(
                (mask.to("cpu", non_blocking=True), confidence.to("cpu", non_blocking=True), stored)
            )
        # a copy starts when the device gets there; the last mark says when it has arrived
        marks = (start, middle, mark(self.device))
        return [
            Generated(image.labels or (), *tensors, marks, 1 / len(batch))
            for image, tensors in zip(batch, on_host, strict=True)
        ]

    def _order(self, image: LabelledImage) -> list[int]:
        """The order in which an image's classes win where several score alike, as places among its labels."""
        places = list(range(len(image.classes)))
        is_by_index = getattr(self.method, "ties", "label") == "index"
        return sorted(places, key=image.classes.__getitem__) if is_by_index else places
