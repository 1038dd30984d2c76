"""From scores to a posterior: dense CRF. Importing this needs no torch."""

from wsss_pipeline.refine.dense_crf import choose_backend, crf_image, dense_crf, unary_from_scores

__all__ = ["choose_backend", "crf_image", "dense_crf", "unary_from_scores"]
