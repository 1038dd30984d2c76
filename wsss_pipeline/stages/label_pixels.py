"""From CAMs to a labelled picture: dense CRF, arg max, confidence. Runs in a worker process as well."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

import cv2
import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.masks import half_percent_confidence
from wsss_pipeline.config import CrfConfig
from wsss_pipeline.refine import crf_image, dense_crf, unary_from_scores

LabelledPixels = tuple[NDArray[np.uint8], NDArray[np.uint8], float]
CrfArguments = tuple[NDArray[np.uint8], NDArray[np.float16], Sequence[int], tuple[int, int], CrfConfig, str]


def label_pixels(
    image: NDArray[np.uint8],
    scores: NDArray[np.float16],
    classes: Sequence[int],
    size: tuple[int, int],
    crf: CrfConfig,
    device: str = "cpu",
) -> LabelledPixels:
    """Mask and confidence of one picture, and the seconds that this took.

    Args:
        image: uint8 (h, w, 3) RGB at working size.
        scores: float16 (1+K, h, w) in [0, 1], background first.
        classes: mask value of each of the K classes.
        size: (H, W) of the mask; the posterior is scaled to it where it differs from (h, w).
        crf: with the backend resolved, so not ``auto``; ``none`` takes the scores, normalised to sum 1.

    Returns:
        Mask uint8 (H, W), the arg max; confidence uint8 (H, W), its posterior in half percents; seconds.
    """
    start = time.monotonic()
    if crf.backend == "none":
        posterior = scores.astype(np.float32)
        posterior /= posterior.sum(axis=0, keepdims=True)
    else:
        unary = unary_from_scores(scores)
        posterior = dense_crf(crf_image(image, crf.image), unary, crf, crf.backend, device)
    if posterior.shape[1:] != size:
        height, width = size
        posterior = np.stack(
            [cv2.resize(plane, (width, height), interpolation=cv2.INTER_LINEAR) for plane in posterior]
        )
    values = np.array([0, *classes], dtype=np.uint8)
    mask, confidence = values[posterior.argmax(axis=0)], half_percent_confidence(posterior.max(axis=0))
    return mask, confidence, time.monotonic() - start


def start_workers(count: int) -> ProcessPoolExecutor:
    """A pool of processes for ``label_pixels``; they leave signals to the parent and die with it."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_prepare_worker)


def _prepare_worker() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    cv2.setNumThreads(1)
    # torch comes later, if at all: several processes with a thread pool each would only get in their own way
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
