"""From scores to a posterior that follows the image's edges, and from there to labels."""

from wsss_pipeline.refine.confidence import label_confidences
from wsss_pipeline.refine.dense_crf import DenseCrf
from wsss_pipeline.refine.par import Par
from wsss_pipeline.refine.refiner import Refiner, Unrefined, label, load_refiner
from wsss_pipeline.refine.region_vote import RegionVote

__all__ = [
    "DenseCrf",
    "Par",
    "Refiner",
    "RegionVote",
    "Unrefined",
    "label",
    "label_confidences",
    "load_refiner",
]
