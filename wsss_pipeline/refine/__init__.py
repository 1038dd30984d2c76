"""From scores to a posterior that follows the picture's edges: the dense CRF with its two backends.

Importing this package imports neither torch nor pydensecrf.
"""

from wsss_pipeline.refine.dense_crf import choose_backend, crf_image, dense_crf, unary_from_scores

__all__ = ["choose_backend", "crf_image", "dense_crf", "unary_from_scores"]
