"""Weakly supervised semantic segmentation from image-level labels with a frozen CLIP.

Names are imported when they are first used, so that ``import wsss_pipeline`` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from wsss_pipeline.cache import MaskCache
    from wsss_pipeline.data.classes import load_class_set
    from wsss_pipeline.errors import WsssError
    from wsss_pipeline.pseudo_masks.generator import MaskGenerator
    from wsss_pipeline.pseudo_masks.job import MaskJob
    from wsss_pipeline.segmentation.inference import Segmenter
    from wsss_pipeline.stages.evaluate import evaluate, open_masks
    from wsss_pipeline.stages.generate_masks import generate_masks
    from wsss_pipeline.stages.train_seg import TrainJob, train_seg

__all__ = [
    "MaskCache",
    "MaskGenerator",
    "MaskJob",
    "Segmenter",
    "TrainJob",
    "WsssError",
    "__version__",
    "evaluate",
    "generate_masks",
    "load_class_set",
    "open_masks",
    "train_seg",
]

_MODULES = {
    "MaskCache": "cache",
    "MaskGenerator": "pseudo_masks.generator",
    "MaskJob": "pseudo_masks.job",
    "Segmenter": "segmentation.inference",
    "TrainJob": "stages.train_seg",
    "WsssError": "errors",
    "evaluate": "stages.evaluate",
    "generate_masks": "stages.generate_masks",
    "load_class_set": "data.classes",
    "open_masks": "stages.evaluate",
    "train_seg": "stages.train_seg",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
