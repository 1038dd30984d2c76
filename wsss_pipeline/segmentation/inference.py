"""A trained network on one image of any size: whole or in windows, at several scales, mirrored, refined."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import CrfConfig, InferenceConfig
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.images import AnyImage, as_pixels, read_image
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import MaskError
from wsss_pipeline.refine import DenseCrf, label
from wsss_pipeline.runtime.device import resolve_device
from wsss_pipeline.segmentation.checkpoint import find_checkpoint, load_network
from wsss_pipeline.segmentation.networks import SegmentationNetwork

RAW, CRF = "raw", "+CRF"
_PLAIN = (1.0, False)  # scale 1, not mirrored


class Segmenter:
    """A trained network as a function from an image to its mask.

    Args:
        network: network in evaluation mode, on ``device``.
        class_names: names of mask values 1..C.
        inference: scales, flip, windows; the image as it is, where None.
        crf: refine with the dense CRF of these settings; None, or backend ``none``, for no CRF.
        description: origin of the network, for people.

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
    ) -> None:
        self.network = network
        self.class_names = tuple(class_names)
        self.device = device
        self.inference = inference or InferenceConfig()
        self.crf = DenseCrf(crf) if crf is not None and crf.backend != "none" else None
        self.description = description

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: str = "auto",
        inference: InferenceConfig | None = None,
        crf: CrfConfig | None = None,
    ) -> Segmenter:
        """The network of a training run or checkpoint folder.

        Raises:
            CheckpointError: there is none, it is damaged, or another program's.
            ConfigError: no such device.
        """
        where = resolve_device(device)
        loaded = load_network(Path(path), where)
        description = f"network {find_checkpoint(Path(path))}"
        return cls(loaded.network, loaded.class_names, where, inference, crf, description)

    @property
    def identity(self) -> str:
        """Digest of the weights as they are now, the class names, and what is done beside the network."""
        crf = self.crf.config.model_dump() if self.crf is not None else None
        network = [type(self.network).__name__, self.network.image_mean, self.network.image_std]
        settings = [*network, self.class_names, self.inference.model_dump(), crf]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, values in self.network.state_dict().items():
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return f"network {digest.hexdigest()[:12]}"

    def __call__(self, image: AnyImage) -> PseudoMask:
        """The most refined mask of an image: a uint8 array (H, W, 3) RGB or (H, W) grey, a PIL image, or a path.

        Raises:
            ImageError: the image can't be used.
            MaskError: the network's answer holds NaN.
        """
        return list(self.variants(as_pixels(image), raw=False).values())[-1]

    def variants(self, image: NDArray[np.uint8], *, raw: bool = True) -> dict[str, PseudoMask]:
        """Masks of an image by name, the most refined last, out of one set of passes.

        Args:
            image: uint8 (H, W, 3) RGB.
            raw: give the mask of the image as it is too, where scales or flip say otherwise.
        """
        posteriors = _probabilities(self.network, image, self.inference, self.device, raw=raw)
        if self.crf is not None:
            (posteriors[CRF],) = self.crf([image], [posteriors[self.inference.name]])
        masks = {}
        for name, posterior in posteriors.items():
            mask, confidence = label(posterior, range(1, len(posterior)), image.shape[:2])
            masks[name] = PseudoMask(mask.cpu().numpy(), confidence.cpu().numpy())
        return masks


class NetworkMasks:
    """A ``MaskSource``: what a network makes of images, given as id to file."""

    def __init__(self, segmenter: Segmenter, images: Mapping[str, ImageFile]) -> None:
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
        return read_image(self.images[image_id])


def predict_probabilities(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    config: InferenceConfig,
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Probabilities float32 (1+C, H, W), background first, summing to 1; arguments as for ``Segmenter``."""
    return _probabilities(network, image, config, device, raw=False)[config.name].cpu().numpy()


@torch.no_grad()
def _probabilities(
    network: SegmentationNetwork,
    image: NDArray[np.uint8],
    config: InferenceConfig,
    device: torch.device | str,
    *,
    raw: bool,
) -> dict[str, Tensor]:
    """Probabilities (1+C, H, W) as ``config`` says, by its name; before them, with ``raw``, the plain pass's."""
    mean, std = (torch.tensor(row)[:, None, None] for row in (network.image_mean, network.image_std))
    values = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    pixels = ((values - mean) / std)[None].to(device)
    looks = [(scale, mirrored) for scale in config.scales for mirrored in (False, True)[: 1 + config.flip]]
    logits = {
        look: _upscaled(network, pixels, *look, config.window)
        for look in dict.fromkeys([*looks, *([_PLAIN] if raw else [])])
    }
    probabilities = {RAW: logits[_PLAIN].softmax(dim=0)} if raw else {}
    if config.name not in probabilities:
        several = torch.stack([logits[look] for look in looks])
        combined = several.amax(0).softmax(0) if config.combine == "max" else several.softmax(1).mean(0)
        probabilities[config.name] = combined
    return probabilities


def _upscaled(
    network: SegmentationNetwork, pixels: Tensor, scale: float, mirrored: bool, window: int | None
) -> Tensor:
    """Logits (1+C, H, W) at the size of ``pixels`` (1, 3, H, W)."""
    height, width = pixels.shape[-2:]
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    scaled = pixels
    if size != (height, width):
        scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
    if mirrored:
        scaled = scaled.flip(-1)
    logits = network(scaled) if window is None else _in_windows(network, scaled, window)
    if mirrored:
        logits = logits.flip(-1)
    if size != (height, width):
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return logits[0].float()


def _in_windows(network: SegmentationNetwork, pixels: Tensor, window: int) -> Tensor:
    """Mean of the logits of windows that overlap by half; a smaller image is one window."""
    tops, lefts = (
        sorted({*range(0, side - window, window // 2), max(0, side - window)}) for side in pixels.shape[-2:]
    )
    total: Tensor | None = None
    count = pixels.new_zeros(1, 1, *pixels.shape[-2:])
    for top in tops:
        for left in lefts:
            part = (..., slice(top, top + window), slice(left, left + window))
            logits = network(pixels[part])
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], *pixels.shape[-2:])
            total[part] += logits
            count[part] += 1
    assert total is not None
    return total / count
