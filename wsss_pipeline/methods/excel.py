"""ExCEL (Yang et al., "Exploring CLIP's Dense Knowledge for Weakly Supervised Semantic Segmentation", CVPR 2025).

Calibrated patches compared with class texts that attributes enrich, class-aware attention affinity, PAR. That takes
no training. With a network that was trained on such masks, its similarity of patches guides the calibrated attention
and gates the affinity.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from wsss_pipeline.cam.affinity import gated_attention, refine_cams
from wsss_pipeline.cam.patch_text import patch_text_cams
from wsss_pipeline.clip.attributes import attribute_bank, enriched, load_attributes
from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import MaskConfig, RefinerName, ResolvedPrecision, Settings
from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, Prepared, clip_input_size, normalise
from wsss_pipeline.segmentation.checkpoint import decoder_digest, load_frozen_clip

logger = logging.getLogger(__name__)


class ExcelSettings(Settings):
    """Patch-text CAMs and class-aware attention affinity (ExCEL, section 3)."""

    size: Literal["square", "native"] = Field(
        "square", description="CLIP sees each image squashed to a square, as published, or at its own size."
    )
    side: int = Field(
        320, ge=32, le=4096, description="Of the square, pixels; multiples of the patch are best."
    )
    refine_on: Literal["square", "image"] = Field(
        "square",
        description="What the refiner sees: the square scaled back to the image's size, or the image.",
    )
    calibrated_blocks: int = Field(
        5, ge=0, le=1000, description="Last blocks with q-q, k-k, v-v attention; 0 for CLIP's own patches."
    )
    attributes: str = Field(
        "", description="JSON of sentences by class; empty for those of the class set, none for plain texts."
    )
    clusters: int = Field(112, ge=1, le=100_000, description="Of the sentences; for COCO 224.")
    affinity: bool = Field(True, description="Spread the CAMs along CLIP's own attention.")
    affinity_layers: int = Field(6, ge=1, le=1000, description="How many last layers' attention is averaged.")
    affinity_iterations: int = Field(
        2, ge=1, le=100, description="How often CAMs are spread; 1 where an object is few patches wide."
    )
    sinkhorn_rounds: int = Field(
        3, ge=0, le=1000, description="Rounds that make the attention doubly stochastic."
    )
    threshold: float = Field(
        0.79, ge=0, le=1, description="Of the box mask, relative to the map's largest value; for COCO 0.88."
    )
    checkpoint: str = Field(
        "", description="Run of a frozen-clip network that guides and gates attention; empty for none."
    )
    mirrored: bool = Field(True, description="With a checkpoint, see the mirrored image too.")


class ExcelConfig(MaskConfig):
    """Settings of ExCEL."""

    excel: ExcelSettings = ExcelSettings()


class Excel:
    """CAMs of the classes that are present, out of maps of all classes and background words.

    Args:
        config: its settings.
        clip: the frozen CLIP, on the device to use.
        class_set: classes, background words, templates, attributes.
        precision: type of CLIP's matrix products.
    """

    name = "excel"
    version = 1
    refiner: ClassVar[RefinerName] = "par"
    background_power = 1.0
    helped_by: ClassVar[frozenset[str]] = frozenset({"gate", "guide"})
    Config = ExcelConfig
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # numbers of the published code
        "voc12": {"classes": "voc12", "confidence": "posterior"},
        "coco14": {
            "classes": "coco14",
            "excel": {"threshold": 0.88, "clusters": 224},
            "confidence": "posterior",
        },
        # The demo's objects are 3 to 6 patches wide: a square loses the edges, and affinity spreads a map beyond them
        # (mIoU after the CRF 85.2 without it, 78.5 with one iteration, on 80 scenes of another seed).
        "demo": {"classes": "demo", "excel": {"size": "native", "affinity": False}},
    }

    def __init__(
        self, config: ExcelConfig, clip: Clip, class_set: ClassSet, precision: ResolvedPrecision
    ) -> None:
        self._config = config
        self._trunk = Trunk(clip.vision, precision, rounded_positions=False)
        self._statistics = clip.own_statistics or IMAGENET_STATISTICS
        self._heads = int(clip.vision.config.num_attention_heads)
        self._network = None
        if config.excel.checkpoint:
            path = Path(config.excel.checkpoint)
            self._network = load_frozen_clip(path, clip, precision, class_set.names, self.name, self.encoding)
        encode = TextEncoder(clip.text, clip.tokenizer).encode
        rows = class_embeddings(class_set, config.templates, encode)
        foreground, settings = rows.foreground, config.excel
        attributes = load_attributes(settings.attributes, class_set)
        if attributes:
            bank = attribute_bank(attributes, class_set, config.templates[0], encode, settings.clusters)
            foreground = enriched(foreground, bank)
            count = sum(map(len, attributes.values()))
            logger.info(
                "attributes: %d sentences of %d classes in %d centres", count, len(attributes), len(bank)
            )
        else:
            logger.info("attributes: none, the classes' texts stay as they are")
        self._texts = torch.cat([foreground, rows.background]).to(self._trunk.device)

    @classmethod
    def determinants(cls, config: ExcelConfig) -> Mapping[str, Any]:
        """See ``Method``; attributes are told by their text, and not by where they lie."""
        dropped = {"attributes", "clusters", "checkpoint"}
        network = decoder_digest(Path(config.excel.checkpoint)) if config.excel.checkpoint else None
        dropped |= set() if network else {"mirrored"}
        dropped |= {"side", "refine_on"} if config.excel.size == "native" else set()
        if not config.excel.affinity:
            dropped |= {"affinity_layers", "affinity_iterations", "sinkhorn_rounds", "threshold"}
        found = {"excel": config.excel.model_dump(exclude=dropped)}
        return found if network is None else {**found, "network": network}

    @classmethod
    def class_determinants(cls, config: ExcelConfig, class_set: ClassSet) -> Mapping[str, Any]:
        """See ``Method``."""
        attributes = load_attributes(config.excel.attributes, class_set)
        if not attributes:
            return {"attributes": None}
        text = json.dumps([list(sentences) for sentences in attributes.values()])
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"attributes": {"sentences": digest, "clusters": config.excel.clusters}}

    def prepare(self, image: NDArray[np.uint8]) -> Prepared:
        """See ``Method``: bilinear without antialiasing, ImageNet's statistics where CLIP has none of its own."""
        patch, settings = self._trunk.patch_size, self._config.excel
        size = clip_input_size(image.shape[1], image.shape[0], patch, self._config.max_pixels)
        if settings.size == "native":
            return Prepared(
                _resized(normalise(image, self._statistics), (size.height, size.width)), size.scale
            )
        side = patch * max(1, round(settings.side / patch))
        pixels, seen = _resized(normalise(image, self._statistics), (side, side)), None
        if settings.refine_on == "square":
            height, width = (max(1, round(end * size.scale)) for end in image.shape[:2])
            mean, deviation = (torch.tensor(row)[:, None, None] for row in self._statistics)
            levels = _resized(255 * (pixels * deviation + mean), (height, width), align_corners=True)
            levels = levels.permute(1, 2, 0).contiguous()
            # rounding would move a thousandth of the pixels; but the CRF takes bytes
            takes_floats = self._config.refine in ("auto", "par")
            seen = (levels if takes_floats else levels.round().clamp(0, 255).to(torch.uint8)).numpy()
        return Prepared(pixels, size.scale, seen)

    @property
    def encoding(self) -> Mapping[str, Any]:
        """See ``targets.OnlineMethod``."""
        settings = self._config.excel
        return {
            "attention": "layers",
            "last_layers": settings.affinity_layers if settings.affinity else 1,
            "calibrated_blocks": settings.calibrated_blocks,
        }

    def scores(self, batch: Tensor, present: Sequence[Sequence[int]]) -> list[Tensor]:
        """See ``Method``: patch-text CAMs, or with affinity the refined ones, which aren't normalised."""
        if self._network is None:
            cams = self.cams(self._trunk.encode(batch, **self.encoding), present)
        else:
            seen = torch.cat([batch, batch.flip(-1)]) if self._config.excel.mirrored else batch
            encoded = self._network.encode(seen, **self.encoding)
            similarity = self._network.decode(encoded)["similarity"]
            maps = self._maps(encoded.features, similarity)
            if self._config.excel.mirrored:
                maps = self.mirrored_maps(maps, encoded.features.grid)
            cams = self._spread(maps, encoded.features, present, similarity.sigmoid())
        return cams

    def cams(
        self,
        features: Features,
        present: Sequence[Sequence[int]],
        *,
        gate: Tensor | None = None,
        guide: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> list[Tensor]:
        """See ``targets.OnlineMethod``; a prior isn't looked at."""
        return self._spread(self._maps(features, guide), features, present, gate)

    def mirrored_maps(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """The larger of each image's maps and its mirror image's (2B, T, hw), in 0..1 again, (B, T, hw)."""
        own, mirrored = maps.chunk(2)
        maps = own.maximum(mirrored.reshape(*own.shape[:2], *grid).flip(-1).flatten(2))
        maps = maps - maps.amin(dim=2, keepdim=True)
        return maps / (maps.amax(dim=2, keepdim=True) + 1e-5)

    def _maps(self, features: Features, similarity: Tensor | None) -> Tensor:
        """Patch-text maps of all texts (B, T, hw), of the calibrated stream that similar patches guide."""
        calibrated = features.calibrated
        if similarity is not None:
            # patches that are less alike than the mean aren't looked at; a patch always sees itself
            unlike = (similarity < 0) & ~torch.eye(
                len(similarity[0]), dtype=torch.bool, device=similarity.device
            )
            calibrated = self._trunk.guided(
                features, similarity.masked_fill(unlike, -torch.inf).softmax(dim=-1)
            )
        assert calibrated is not None
        return patch_text_cams(calibrated, self._texts)

    def _spread(
        self, maps: Tensor, features: Features, present: Sequence[Sequence[int]], gate: Tensor | None
    ) -> list[Tensor]:
        """The present classes' maps (K, h, w) of each image, along the attention where affinity is on."""
        settings, cams = self._config.excel, []
        # as published: of calibrated blocks the heads are summed, of others averaged
        summed = torch.ones(len(features.attention), device=maps.device)
        summed[len(summed) - min(settings.calibrated_blocks, len(summed)) :] = self._heads
        for number, (own, values) in enumerate(zip(maps, present, strict=True)):
            chosen = own[[value - 1 for value in values]].reshape(len(values), *features.grid)
            if settings.affinity and values:
                attention = features.attention[:, number]
                if gate is None:
                    attention = torch.einsum("l,lij->ij", summed / len(summed), attention)
                else:
                    attention = gated_attention(summed[:, None, None] * attention, gate[number])
                chosen = refine_cams(
                    chosen,
                    attention,
                    settings.threshold,
                    settings.affinity_iterations,
                    settings.sinkhorn_rounds,
                )
            cams.append(chosen)
        return cams


def _resized(image: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """(3, H, W) at another size, bilinear without antialiasing."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=align_corners)[0]


METHOD = Excel
