"""The pseudo-mask cache: HDF5 files, keyed by what determines the masks.

``MaskCache`` reads a mask set, ``open_mask_set`` and ``MaskWriter`` make one; the rest looks after it.
"""

from wsss_pipeline.cache.finished import FinishedImages
from wsss_pipeline.cache.maintenance import (
    GcReport,
    MaskSetStatus,
    MergeReport,
    VerifyReport,
    gc,
    merge,
    status,
    verify,
)
from wsss_pipeline.cache.manifest import MaskSet, is_mask_set, list_mask_sets, open_mask_set
from wsss_pipeline.cache.mask_cache import MaskCache
from wsss_pipeline.cache.records import RecordInfo
from wsss_pipeline.cache.writer import MaskWriter
from wsss_pipeline.data.masks import PseudoMask

__all__ = [
    "FinishedImages",
    "GcReport",
    "MaskCache",
    "MaskSet",
    "MaskSetStatus",
    "MaskWriter",
    "MergeReport",
    "PseudoMask",
    "RecordInfo",
    "VerifyReport",
    "gc",
    "is_mask_set",
    "list_mask_sets",
    "merge",
    "open_mask_set",
    "status",
    "verify",
]
