"""CLIP-ES (Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023, arXiv 2212.09506).

Softmax-GradCAM on a frozen CLIP, class-aware attention affinity, dense CRF.
"""

from __future__ import annotations

from pydantic import Field

from wsss_pipeline.config import MaskConfig, Settings


class CamConfig(Settings):
    """Softmax-GradCAM and class-aware attention affinity (arXiv 2212.09506, section 3)."""

    affinity: bool = Field(True, description="Spread the CAMs along CLIP's own attention.")
    affinity_layers: int = Field(
        8, ge=1, le=1000, description="How many last layers' attention is averaged; a shallower CLIP has fewer."
    )
    affinity_iterations: int = Field(
        2, ge=1, le=100, description="How often CAMs are spread, t; 1 where an object is few patches wide."
    )
    sinkhorn_rounds: int = Field(3, ge=0, le=1000, description="Rounds that make the attention doubly stochastic.")
    threshold: float = Field(
        0.4, ge=0, le=1, description="Of the box mask, relative to the map's largest value; for COCO 0.7."
    )


class ClipEsConfig(MaskConfig):
    """Settings of CLIP-ES."""

    cam: CamConfig = CamConfig()


class ClipEs:
    """CLIP-ES."""

    name = "clip-es"
    version = 1
    Config = ClipEsConfig
    presets = {
        # numbers of the published code
        "voc12": {"classes": "voc12", "cam": {"threshold": 0.4}},
        "coco14": {"classes": "coco14", "cam": {"threshold": 0.7}},
        # The demo's objects are 3 to 6 patches wide, and two iterations of affinity spread a CAM over more than
        # that: mIoU of the CAM 68.8, after one iteration 71.0, after two 62.8 (80 scenes of another seed).
        "demo": {"classes": "demo", "cam": {"affinity_iterations": 1}},
    }


METHOD = ClipEs
