"""Pixel-adaptive refinement, PAR (Ru et al., "Learning Affinity from Attention", CVPR 2022, section 3.3).

Each pixel's scores become a weighted sum of those of its neighbours, several times over. Neighbours are weighted by
how alike their colour is, measured in the deviation among the neighbours, and a little by how near they are. Unlike a
CRF it has no term that holds on to the scores it began with.

Numbers and details are those of the code published with WeCLIP (CVPR 2024) and ExCEL (CVPR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import ParConfig
from wsss_pipeline.refine.dense_crf import check_arrays
from wsss_pipeline.refine.par_cpu import propagate_compiled
from wsss_pipeline.regions.regions import Regions

# Images of one size and number of labels go together, since a small one leaves most of a GPU idle. Their neighbours'
# weights take 200 MB for a million pixels.
PIXELS_TOGETHER = 2**20
# A GPU takes longer to be asked for 48 small sums than to do them: up to here the neighbours' scores are copied and
# summed at once (500 MB), by which 1.1 ms an iteration become 0.4 for an image of 500 x 375 on an H200.
SCORES_AT_ONCE = 5 * 2**19
_TINY = 1e-8
_AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]


class Par:
    """A ``Refiner``: scores after PAR, divided by their sum.

    All labels of a pixel are filtered with the same weights, so their sum is the filtered sum of the scores, and
    dividing by it gives each label's share of what the pixel received: a mean of its neighbours' shares, in [0, 1],
    with the arg max that was published. The factor by which PAR's weights exceed 1 cancels out.

    Args:
        config: constants and iterations.
    """

    def __init__(self, config: ParConfig) -> None:
        self.config = config
        self.description = f"PAR: {config.iterations} iterations"

    def determinants(self) -> Mapping[str, Any]:
        """All settings."""
        return {"par": self.config.model_dump(mode="json")}

    def __call__(
        self,
        images: Sequence[NDArray[np.uint8]],
        scores: Sequence[Tensor],
        regions: Sequence[Regions] = (),
        cams: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """See ``Refiner``; an image may be float32 in 0..255 as well, between the bytes' values.

        Raises:
            ImageError: image and scores don't fit together.
        """
        check_arrays(images, scores, "PAR", (np.uint8, np.float32))
        alike: dict[torch.Size, list[int]] = {}
        for place, score in enumerate(scores):
            alike.setdefault(score.shape, []).append(place)
        found: dict[int, Tensor] = {}
        for (_, height, width), places in alike.items():
            at_a_time = max(1, PIXELS_TOGETHER // (height * width))
            for start in range(0, len(places), at_a_time):
                batch = places[start : start + at_a_time]
                # in the bytes' own units: a channel's scale and offset cancel out
                seen = [_on_device(images[place], scores[place].device) for place in batch]
                given = torch.stack([scores[place] for place in batch])
                for place, refined in zip(
                    batch, propagate(torch.stack(seen), given, self.config), strict=True
                ):
                    found[place] = refined / refined.sum(dim=0)
        return [found[place] for place in range(len(scores))]


def _on_device(image: NDArray[Any], device: torch.device) -> Tensor:
    """float32 (3, H, W) of an image (H, W, 3)."""
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return pixels.to(device, non_blocking=True).float()


@torch.no_grad()
def propagate(images: Tensor, scores: Tensor, parameters: ParConfig) -> Tensor:
    """PAR as published, compiled on a CPU and in torch elsewhere.

    Args:
        images: (B, 3, H, W), any real dtype and range: a channel's scale and offset don't matter. Resized to the
            scores' size, bilinear with aligned corners, where theirs differs.
        scores: (B, L, h, w), any real dtype.
        parameters: constants and iterations.

    Returns:
        float32 (B, L, h, w) on the device of the scores. The weights of a pixel's neighbours sum to 1 and
        ``distance_weight``; each iteration multiplies constant scores by this sum.
    """
    size, images, scores = scores.shape[2:], images.float(), scores.float()
    if images.shape[2:] != size:
        images = F.interpolate(images, size, mode="bilinear", align_corners=True)
    if scores.device.type != "cpu":
        return propagate_in_torch(images, scores, parameters)
    steps = np.array(_steps(parameters), np.int64)
    added = _distance_weights(parameters).numpy()
    return torch.stack(
        [
            torch.from_numpy(propagate_compiled(image.numpy(), score.numpy(), steps, added, parameters))
            for image, score in zip(images, scores, strict=True)
        ]
    )


def propagate_in_torch(images: Tensor, scores: Tensor, parameters: ParConfig) -> Tensor:
    """As ``propagate``, on any device, of float32 images and scores of one size."""
    weights = _weights(images, parameters)
    for _ in range(parameters.iterations):
        around = _neighbours(scores, parameters)
        if scores.numel() <= SCORES_AT_ONCE:
            scores = torch.stack(around, dim=2).mul_(weights[:, None]).sum(dim=2)
            continue
        result = torch.zeros_like(scores)
        for k, neighbour in enumerate(around):
            result.addcmul_(weights[:, k, None], neighbour)
        scores = result
    return scores


def _weights(images: Tensor, parameters: ParConfig) -> Tensor:
    """float32 (B, n, H, W): how much each of the n neighbours of a pixel gives to it."""
    count = len(_steps(parameters))
    logits = images.new_zeros(len(images), count, *images.shape[2:])
    for index in range(images.shape[1]):  # one channel at a time takes a third of the memory
        channel = images[:, index, None]
        around = torch.cat(_neighbours(channel, parameters), dim=1)
        # over the neighbours, without the pixel itself
        deviation = around.std(dim=1, keepdim=True)
        logits -= around.sub_(channel).div_((deviation + _TINY) * parameters.width).square_()
    added = _distance_weights(parameters).to(images.device)
    return (logits / images.shape[1]).softmax(dim=1).add_(added[:, None, None])


def _neighbours(values: Tensor, parameters: ParConfig) -> list[Tensor]:
    """Per step the neighbours' values: views like (B, C, H, W); beyond the border lies the pixel nearest to it."""
    reach, (height, width) = max(parameters.dilations), values.shape[2:]
    padded = F.pad(values, (reach,) * 4, mode="replicate")
    return [
        padded[:, :, reach + down : reach + down + height, reach + right : reach + right + width]
        for down, right in _steps(parameters)
    ]


def _steps(parameters: ParConfig) -> list[tuple[int, int]]:
    """Rows down and columns right from a pixel to each of its neighbours."""
    return [(down * by, right * by) for by in parameters.dilations for down, right in _AROUND]


def _distance_weights(parameters: ParConfig) -> Tensor:
    """float32 (n,) on the CPU: the part of the neighbours' weights that is the same for all pixels."""
    steps = torch.tensor(_steps(parameters), dtype=torch.float32, device="cpu")
    distances = steps.square().sum(dim=1).sqrt()
    scaled = distances / ((distances.std() + _TINY) * parameters.width)
    return parameters.distance_weight * (-scaled.square()).softmax(dim=0)
