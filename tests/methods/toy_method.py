"""A whole method: each patch goes to the text that it is most alike, as in MaskCLIP (arXiv 2112.01071)."""

import torch
from pydantic import Field

from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.config import MaskConfig
from wsss_pipeline.data.transforms import prepare_image


class PatchText:
    name, version, presets = "patch-text", 1, {"demo": {"classes": "demo", "sharpness": 40.0}}
    refiner, background_power = "none", 2.0

    class Config(MaskConfig):
        sharpness: float = Field(20.0, ge=0, le=1000, description="Factor on the cosine of patch and text.")

    def __init__(self, config, clip, classes, precision):
        self.config, self.clip, self.trunk = config, clip, Trunk(clip.vision, precision)
        self.text = class_embeddings(classes, config.templates, TextEncoder(clip.text, clip.tokenizer).encode)

    @classmethod
    def determinants(cls, config):
        return {"sharpness": config.sharpness}

    def prepare(self, image):
        return prepare_image(image, self.trunk.patch_size, self.config.max_pixels, self.clip.statistics)

    def scores(self, batch, present):
        features, maps = self.trunk.encode(batch), []
        for patches, values in zip(features.patches, present, strict=True):
            rows = torch.cat([self.text.foreground[[v - 1 for v in values]], self.text.background])
            cosines = torch.cosine_similarity(rows.to(patches)[:, None], patches, dim=-1)
            maps.append((self.config.sharpness * cosines).softmax(0)[: len(values)].view(-1, *features.grid))
        return maps


METHOD = PatchText
