"""A trained network on one image of any size: whole or in windows, at several scales, mirrored, refined.

What the work takes grows with the image, with the largest scale, with the number of classes and with that of the
looks at it. An image for which it would be more than ``MOST_BYTES`` is worked on in tiles that overlap, each all
the way to its labels; of the whole image only mask and confidence are kept. With 20 classes and one look this
begins at 1.3 megapixels; below, tiles play no part. Except for masks that a fingerprint stands for, a machine with
less than twice as much memory has smaller tiles, and where memory runs out all the same, smaller ones are tried.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.clip.trunk import DTYPES
from wsss_pipeline.config import ConfidenceName, CrfConfig, InferenceConfig, PixelRange, ResolvedPrecision
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import AnyImage, ImageWarnings, as_pixels, read_stored_image
from wsss_pipeline.data.masks import Mask, PseudoMask, mask_type
from wsss_pipeline.data.transforms import fitted_size
from wsss_pipeline.errors import MaskError
from wsss_pipeline.refine import DenseCrf, Refiner, Unrefined, label, label_confidences
from wsss_pipeline.runtime.device import is_out_of_memory, memory_of_this_machine, resolve_device
from wsss_pipeline.segmentation.checkpoint import find_checkpoint, load_network
from wsss_pipeline.segmentation.clip_network import ClipNetwork
from wsss_pipeline.segmentation.hf_networks import TransformersNetwork
from wsss_pipeline.segmentation.network import SegmentationNetwork

logger = logging.getLogger(__name__)

RAW, CRF, REFINED = "raw", "+CRF", "refined"
MOST_BYTES = 11 * 2**28  # with what the libraries take, a process stays at some 4 GiB
# a pixel that a network looks at, beside its logits: measured, SegFormer's larger heads, the hungriest; DeepLabV3+
# with ResNet-50 takes a third
NETWORK_BYTES = 1700
# that a GPU looks at together, as far as the memory of one image allows; a CPU is no faster with several
WINDOWS_AT_A_TIME = 16
SMALLER, SMALLEST = (1, 4), 16  # what a tile's memory is divided by, where it runs out
MARGIN_PART = 8  # an eighth of a tile on each side is left to the tile beside it


class Segmenter:
    """A trained network as a function from an image to its mask.

    Args:
        network: network in evaluation mode, on ``device``.
        class_names: names of mask values 1..C.
        inference: scales, flip, windows; the image as it is, where None.
        crf: refine with the dense CRF of these settings; None, or backend ``none``, for no CRF.
        description: origin of the network, for people.
        refiner: another refiner, in place of ``crf``.
        confidence: choice of what says how sure a label is; of the most refined mask.
        precision: type of the network's matrix products; probabilities are float32 in any case.
        fixed_tiles: whether how an image is divided hangs on the image alone, as the same masks everywhere need it,
            and not on the memory that there is.

    Raises:
        MissingDependencyError: the CRF's backend isn't installed.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        class_names: Sequence[str],
        device: torch.device | str = "cpu",
        inference: InferenceConfig | None = None,
        crf: CrfConfig | None = None,
        description: str = "network",
        refiner: Refiner | None = None,
        confidence: ConfidenceName = "posterior",
        precision: ResolvedPrecision = "fp32",
        *,
        fixed_tiles: bool = False,
    ) -> None:
        self.network = network
        self.class_names = tuple(class_names)
        self.device = device
        self.precision = precision
        self.inference = inference or InferenceConfig()
        if refiner is None and crf is not None and crf.backend != "none":
            refiner = DenseCrf(crf)
        self.refiner = None if isinstance(refiner, Unrefined) else refiner
        self.description = description
        self._fixed_tiles, self._has_told = fixed_tiles, False
        self.confidence: ConfidenceName = confidence

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: str = "auto",
        inference: InferenceConfig | None = None,
        crf: CrfConfig | None = None,
        clip: str | None = None,
    ) -> Segmenter:
        """The network of a training run or checkpoint folder; ``clip`` says where its frozen CLIP lies now.

        Raises:
            CheckpointError: there is none, it is damaged, or another program's.
            ConfigError: no such device.
        """
        where = resolve_device(device)
        loaded = load_network(Path(path), where, clip)
        description = f"network {find_checkpoint(Path(path))}"
        return cls(loaded.network, loaded.class_names, where, inference, crf, description)

    @property
    def identity(self) -> str:
        """Digest of the weights as they are now, the class names, and what is done beside the network."""
        refiner = None if self.refiner is None else dict(self.refiner.determinants())
        settings = [network_digest(self.network), self.class_names, self.inference.determinants(), refiner]
        settings += [] if self.confidence == "posterior" else [self.confidence]
        if self.precision != "fp32":
            settings.append(self.precision)
        return f"network {hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"

    @property
    def pixel_range(self) -> PixelRange | None:
        """Values of images that become 0 and 255, see ``read_image``: as chosen, else as in training."""
        return self.inference.pixel_range or self.network.pixel_range

    def __call__(self, image: AnyImage, classes: Sequence[int] | None = None) -> PseudoMask:
        """The most refined mask of an image.

        Args:
            image: uint8 array (H, W, 3) RGB or (H, W) grey, PIL image, or path.
            classes: see ``variants``.

        Raises:
            ImageError: the image can't be used.
            MaskError: the network's answer holds NaN.
        """
        pixels = as_pixels(image, self.pixel_range)
        return list(self.variants(pixels, raw=False, classes=classes).values())[-1]

    def variants(
        self, image: NDArray[np.uint8], *, raw: bool = True, classes: Sequence[int] | None = None
    ) -> dict[str, PseudoMask]:
        """Masks of an image by name, the most refined last, out of one set of passes.

        Args:
            image: uint8 (H, W, 3) RGB.
            raw: give the mask of the image as it is too, where scales or flip say otherwise.
            classes: mask values 1..C that may occur beside background, at least one; None for all. What the network
                gives to others is dropped before the refiner, and the rest divided by its sum.
        """
        if self._fixed_tiles:
            return self._in_tiles(image, MOST_BYTES, raw=raw, classes=classes)
        for smaller in SMALLER:
            try:
                return self._in_tiles(image, most_bytes() / smaller, raw=raw, classes=classes)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # beyond the handler, which holds on to what took the memory
            logger.warning("memory ran out; trying smaller tiles, which moves the borders in a mask a little")
        return self._in_tiles(image, most_bytes() / SMALLEST, raw=raw, classes=classes)

    def _in_tiles(
        self, image: NDArray[np.uint8], most: float, *, raw: bool, classes: Sequence[int] | None
    ) -> dict[str, PseudoMask]:
        """See ``variants``; in tiles that take ``most`` bytes of memory each."""
        outputs = 1 + len(self.class_names)
        tiles = list(_tiles(self.network, image, self.inference, outputs, most, raw=raw))
        if len(tiles) > 1 and not self._has_told:
            self._has_told = True
            (rows, columns), (height, width) = tiles[0].seen, image.shape[:2]
            logger.info(
                "large images, such as one of %dx%d, are looked at in tiles that overlap (%d of %dx%d pixels): as a "
                "whole this one would take more than %.1f GiB",
                *(width, height, len(tiles), columns.stop - columns.start, rows.stop - rows.start),
                most / 2**30,
            )
        present = list(range(1, 1 + len(self.class_names)) if classes is None else classes)
        refined = CRF if isinstance(self.refiner, DenseCrf) else REFINED
        found: dict[str, tuple[Mask, NDArray[np.uint8]]] = {}
        for tile in tiles:
            part = image[tile.seen]
            posteriors = _probabilities(
                self.network, part, image.shape[:2], self.inference, self.device, self.precision, raw=raw
            )
            if classes is not None:
                posteriors = {name: _restricted(full, present) for name, full in posteriors.items()}
            scores = posteriors[self.inference.name]
            (sure,) = label_confidences(self.confidence, [part], [scores])
            if self.refiner is not None:
                if self.inference.winners_only:
                    winners = torch.unique(scores.argmax(dim=0))
                    full = torch.zeros_like(scores)
                    (full[winners],) = self.refiner([part], [scores[winners]])
                    posteriors[refined] = full
                else:
                    (posteriors[refined],) = self.refiner([part], [scores])
            for name, posterior in posteriors.items():
                own = sure if name == next(reversed(posteriors)) else None
                arrays = label(posterior, present, part.shape[:2], outputs, confidences=own)
                size = image.shape[:2]
                whole = found.setdefault(name, (np.empty(size, mask_type(outputs)), np.empty(size, np.uint8)))
                for target, values in zip(whole, arrays, strict=True):
                    target[tile.kept] = values[tile.inner].cpu().numpy()
        return {name: PseudoMask(*arrays) for name, arrays in found.items()}


def most_bytes() -> int:
    """Memory that a tile may take: the same on any machine that has twice as much."""
    return min(MOST_BYTES, memory_of_this_machine() // 2)


def network_digest(network: SegmentationNetwork) -> str:
    """64 hexadecimal digits that stand for a network's weights as they are now, with those of what is frozen in it,
    and its pixel statistics."""
    kind: list[Any] = [type(network).__name__, network.image_mean, network.image_std]
    kind += [network.pixel_range] if network.pixel_range else []
    if isinstance(network, ClipNetwork):
        kind += [network.frozen_digests(), network.config.model_dump(exclude={"dino"})]
    if isinstance(network, TransformersNetwork):
        kind.append(network.architecture)
    digest = hashlib.sha256(json.dumps(kind).encode())
    for name, values in network.state_dict().items():
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _restricted(posterior: Tensor, classes: Sequence[int]) -> Tensor:
    """Probabilities (1+K, H, W) of background and these K classes, summing to 1, out of (1+C, H, W)."""
    kept = posterior[[0, *classes]]
    # where all of them are 0 to float32, none is more probable than another
    kept = kept.clamp(min=torch.finfo(kept.dtype).tiny)
    return kept / kept.sum(dim=0)


class NetworkMasks:
    """A ``MaskSource``: what a network makes of images, given as id to file.

    Attributes:
        warnings: context manager that tells how many images it has warned of.
    """

    def __init__(self, segmenter: Segmenter, images: Mapping[str, ImageFile]) -> None:
        self.warnings = ImageWarnings()
        self.pixel_range = segmenter.pixel_range
        self.segmenter = segmenter
        self.images = images
        self.class_names = segmenter.class_names
        self.description = segmenter.description

    @property
    def identity(self) -> str:
        """That of the network and of what is done beside it."""
        return self.segmenter.identity

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.images

    def __getitem__(self, image_id: str) -> PseudoMask:
        """The most refined mask; ImageError where the image can't be read, MaskError where there is none."""
        return self.segmenter(self._image(image_id))

    def variants(self, image_id: str) -> dict[str, PseudoMask]:
        """See ``Segmenter.variants``; errors as above."""
        return self.segmenter.variants(self._image(image_id))

    def _image(self, image_id: str) -> NDArray[np.uint8]:
        if image_id not in self.images:
            raise MaskError(f"{self.description}: no image '{image_id}' to look at")
        stored = read_stored_image(self.images[image_id], self.pixel_range)
        self.warnings.warn(self.images[image_id], stored.remarks)
        return stored.pixels


Box = tuple[slice, slice]


@dataclass(frozen=True)
class _Tile:
    """Rows and columns of an image that are looked at together.

    Attributes:
        seen: all of them.
        kept: those that it decides on.
        inner: the same, counted from the corner of ``seen``.
    """

    seen: Box
    kept: Box
    inner: Box


def _tiles(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    config: InferenceConfig,
    outputs: int,
    most: float,
    *,
    raw: bool,
) -> Iterator[_Tile]:
    """One tile for an image that fits into ``most`` bytes, else as many as it takes, of one size."""
    sides = height, width = image.shape[:2]
    while max(height, width) > 2 * MARGIN_PART and (
        _bytes_needed(network, (height, width), sides, outputs, config, raw) > most
    ):
        height, width = (side if side < max(height, width) else side * 7 // 8 for side in (height, width))
    for seen_rows, kept_rows, inner_rows in _stretches(sides[0], height):
        for seen_columns, kept_columns, inner_columns in _stretches(sides[1], width):
            yield _Tile((seen_rows, seen_columns), (kept_rows, kept_columns), (inner_rows, inner_columns))


def _stretches(side: int, at_most: int) -> Iterator[tuple[slice, slice, slice]]:
    """``seen``, ``kept`` and ``inner`` of each tile of ``at_most`` so many pixels along a side, see ``_Tile``."""
    margin = at_most // MARGIN_PART
    count = math.ceil((side - 2 * margin) / (at_most - 2 * margin))
    length = math.ceil((side + 2 * margin * (count - 1)) / count)
    starts = [(side - length) * number // max(1, count - 1) for number in range(count)]
    middles = [(start + length + following) // 2 for start, following in pairwise(starts)]
    for start, low, high in zip(starts, [0, *middles], [*middles, side], strict=True):
        yield slice(start, start + length), slice(low, high), slice(low - start, high - start)


def _bytes_needed(
    network: SegmentationNetwork,
    size: tuple[int, int],
    whole: tuple[int, int],
    outputs: int,
    config: InferenceConfig,
    raw: bool,
) -> float:
    """Of memory, to get from a part, (H, W), of a ``whole`` image to its probabilities."""
    looks = {*_looks(config, size, whole), *([(size, False)] if raw else [])}
    scaled = max((own for own, _ in looks), key=math.prod)
    looked_at = scaled if config.window is None else [min(side, config.window) for side in scaled]
    padded = [
        max(network.smallest, math.ceil(side / network.multiple) * network.multiple) for side in looked_at
    ]
    logits = 4 * outputs * (2 * math.prod(scaled) + (2 * len(looks) + 2) * math.prod(size))
    return (NETWORK_BYTES + network.query_bytes) * math.prod(padded) + logits


@torch.no_grad()
def _probabilities(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    whole: tuple[int, int],
    config: InferenceConfig,
    device: torch.device | str,
    precision: ResolvedPrecision,
    *,
    raw: bool,
) -> dict[str, Tensor]:
    """Probabilities (1+C, H, W) of a part of a ``whole`` image as ``config`` says, by its name; before them, with
    ``raw``, the plain pass's."""
    mean, std = (torch.tensor(row)[:, None, None] for row in (network.image_mean, network.image_std))
    image = np.ascontiguousarray(image)
    size = height, width = image.shape[:2]

    def normalised(levels: NDArray[np.uint8]) -> Tensor:
        values = torch.from_numpy(levels).permute(2, 0, 1).float() / 255
        return ((values - mean) / std)[None].to(device)

    def logits_of(images: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, DTYPES[precision], enabled=precision != "fp32"):
            found: Tensor = network(images)
        return found.float()

    pixels = normalised(image)
    looks, plain = _looks(config, size, whole), (size, False)
    wanted = dict.fromkeys([*looks, *([plain] if raw else [])])
    logits: dict[_Look, Tensor] = {}
    for scaled in dict.fromkeys(own for own, _ in wanted):
        seen = pixels
        if scaled != size and config.short_side is not None:
            resized = cv2.resize(image, (scaled[1], scaled[0]), interpolation=cv2.INTER_LINEAR)
            seen = normalised(np.asarray(resized, np.uint8))
        elif scaled != size:
            is_smaller = scaled[0] < height or scaled[1] < width
            seen = F.interpolate(pixels, scaled, mode="bilinear", align_corners=False, antialias=is_smaller)
        mirrors = [mirrored for own, mirrored in wanted if own == scaled]
        batch = torch.cat([seen.flip(-1) if mirrored else seen for mirrored in mirrors])
        if config.window is None:
            found = torch.cat([logits_of(one[None]) for one in batch])
        else:
            stride = config.window_stride or config.window // 2
            side = min(config.window, max(scaled))
            fitting = int(MOST_BYTES // ((NETWORK_BYTES + network.query_bytes) * side**2))
            together = 1 if pixels.device.type == "cpu" else max(1, min(WINDOWS_AT_A_TIME, fitting))
            found = _in_windows(logits_of, batch, config.window, stride, together)
        for mirrored, one in zip(mirrors, found, strict=True):
            own = (one.flip(-1) if mirrored else one)[None]
            if scaled != size:
                own = F.interpolate(own, size=size, mode="bilinear", align_corners=False)
            logits[scaled, mirrored] = own[0].float()
    probabilities = {RAW: logits[plain].softmax(dim=0)} if raw else {}
    if config.name not in probabilities:
        several = torch.stack([logits[look] for look in looks])
        if config.combine == "mean":
            probabilities[config.name] = several.softmax(1).mean(0)
        else:
            combined = several.amax(0) if config.combine == "max" else several.mean(0)
            probabilities[config.name] = combined.softmax(0)
    return probabilities


_Look = tuple[
    tuple[int, int], bool
]  # height and width at which an image is looked at, and whether it is mirrored


def _looks(config: InferenceConfig, size: tuple[int, int], whole: tuple[int, int]) -> list[_Look]:
    """Looks at a part, (H, W), of a ``whole`` image."""
    looks: list[_Look] = []
    for scale in config.scales:
        factors = (scale, scale)
        if config.short_side is not None:
            fitted = fitted_size(whole, scale, config.short_side, config.long_side)
            factors = (fitted[0] / whole[0], fitted[1] / whole[1])
        height, width = (max(1, round(side * factor)) for side, factor in zip(size, factors, strict=True))
        looks += [((height, width), mirrored) for mirrored in (False, True)[: 1 + config.flip]]
    return looks


def _in_windows(
    network: Callable[[Tensor], Tensor], pixels: Tensor, window: int, stride: int, together: int
) -> Tensor:
    """Mean of the logits of windows, (N, 1+C, H, W) for as many images; a smaller image is one window.

    The network sees ``together`` windows at a time.
    """
    count, _, height, width = pixels.shape
    tops, lefts = (
        sorted({*range(0, side - window, stride), max(0, side - window)}) for side in (height, width)
    )
    places = [
        (number, slice(None), slice(top, top + window), slice(left, left + window))
        for number in range(count)
        for top in tops
        for left in lefts
    ]
    total: Tensor | None = None
    overlap = pixels.new_zeros(count, 1, height, width)
    for start in range(0, len(places), together):
        chosen = places[start : start + together]
        found = network(torch.stack([pixels[place] for place in chosen]))
        if total is None:
            total = found.new_zeros(count, found.shape[1], height, width)
        for place, logits in zip(chosen, found, strict=True):
            total[place] += logits
            overlap[place] += 1
    assert total is not None
    return total / overlap
