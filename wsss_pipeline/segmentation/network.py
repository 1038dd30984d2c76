"""What all segmentation networks have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_pipeline.config import PixelRange

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB, for values in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)
BatchNorm = nn.modules.batchnorm._BatchNorm
resized = partial(F.interpolate, mode="bilinear", align_corners=False)


def tiles(pixels: Tensor, side: int) -> Tensor:
    """Squares (B*R*C, K, side, side) of pixels (B, K, R*side, C*side), picture by picture and row by row."""
    count, channels, height, width = pixels.shape
    grid = pixels.reshape(count, channels, height // side, side, width // side, side)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)


def joined(squares: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (B, K, *size) out of their tiles, see ``tiles``."""
    (channels, side), (height, width) = squares.shape[1:3], size
    grid = squares.reshape(-1, height // side, width // side, channels, side, side)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class SegmentationNetwork(nn.Module):
    """Images (B, 3, H, W), normalised with the network's mean and standard deviation, to logits (B, 1+C, H, W).

    H and W may be anything: the model sees the images padded with the mean colour.

    Attributes:
        model: module that makes the logits.
        encoder_name: name of the model's part that comes with pre-trained weights.
        multiple: number of pixels that the sides of the model's input must be multiples of.
        smallest: smallest sides of its input, pixels.
        is_fixed: the model takes squares of side ``multiple`` alone; a larger image is looked at in tiles.
        query_bytes: memory that masks of queries take at inference, bytes a pixel.
        image_mean: mean of its training images, RGB, for values in [0, 1].
        image_std: their standard deviation.
        pixel_range: values of its training images' files that became 0 and 255, see ``read_image``.
    """

    model: nn.Module
    encoder_name: str = ""
    multiple: int = 1
    smallest: int = 1
    is_fixed: bool = False
    query_bytes: int = 0
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD
    pixel_range: PixelRange | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits at the size of the input."""
        return self.at_input_size(images, self.logits)

    def at_input_size(self, images: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``look`` finds in images that need no padding, (B, K, H, W) at the size of ``images``."""
        height, width = images.shape[-2:]
        seen = self.seen(images)
        size = (seen.shape[-2], seen.shape[-1])
        found = look(tiles(seen, self.multiple) if self.is_fixed else seen)
        side = (self.multiple, self.multiple) if self.is_fixed else size
        if found.shape[-2:] != side:
            found = resized(found, size=side)
        if self.is_fixed:
            found = joined(found, size)
        return found[..., :height, :width]

    def seen(self, pixels: Tensor, value: float = 0) -> Tensor:
        """Pixels (B, K, H, W), padded below and on the right to sides that the model takes, with ``value``."""
        height, width = pixels.shape[-2:]
        # not max: an exported network would be left with a condition on the size
        below: Any = torch.sym_max(-height % self.multiple, self.smallest - height)
        right: Any = torch.sym_max(-width % self.multiple, self.smallest - width)
        return F.pad(pixels, (0, right, 0, below), value=value)

    def logits(self, images: Tensor) -> Tensor:
        """Logits of images that need no padding, at whatever size the model has them."""
        output: Tensor = self.model(images)
        return output

    def training_outputs(self, images: Tensor, **wanted: Any) -> dict[str, Any]:
        """What the loss is made of, by name: ``logits`` (B, 1+C, H, W); every name that begins so is one of them.

        ``wanted`` is for networks on a frozen CLIP, see ``FrozenClip``.
        """
        return {"logits": self(images)}

    def encoder(self) -> nn.Module:
        """What comes with pre-trained weights."""
        return self.model.get_submodule(self.encoder_name)

    def parameter_groups(self, lr: float, weight_decay: float, head_factor: float) -> list[dict[str, Any]]:
        """Groups for the optimiser: encoder at ``lr``, the rest at ``head_factor`` times it.

        Biases and norms have no weight decay.
        """
        plain = {
            id(parameter)
            for module in self.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if isinstance(module, (BatchNorm, nn.LayerNorm, nn.GroupNorm)) or name == "bias"
        }
        inside = {id(parameter) for parameter in self.encoder().parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                groups.setdefault((id(parameter) in inside, id(parameter) in plain), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": lr if in_encoder else lr * head_factor,
                "weight_decay": 0.0 if is_plain else weight_decay,
            }
            for (in_encoder, is_plain), parameters in groups.items()
        ]
