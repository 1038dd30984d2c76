"""The dense CRF (Kraehenbuehl and Koltun, NIPS 2011) as CLIP-ES uses it: one function, two backends.

``lattice`` is our own, compiled for one CPU core or in torch on a GPU; ``pydensecrf`` is C++ on one CPU core, half
as fast, to compare with. They agree to rounding. Arrays in and out; torch is imported only where a GPU's lattice
or a tensor needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.config import CrfBackend, CrfConfig, CrfImage
from wsss_pipeline.errors import ConfigError, ImageError, MissingDependencyError
from wsss_pipeline.refine import pydensecrf_backend

if TYPE_CHECKING:
    from torch import Tensor

# Mean of the Caffe models in BGR, as the published script subtracts it.
REFERENCE_MEAN_BGR = (104.008, 116.669, 122.675)


def choose_backend(requested: CrfBackend) -> Literal["pydensecrf", "lattice", "none"]:
    """The backend that a run uses.

    ``auto`` is the lattice.

    Args:
        requested: as configured.

    Raises:
        MissingDependencyError: pydensecrf was asked for by name and can't be imported.
    """
    if requested == "auto":
        return "lattice"
    if requested == "pydensecrf" and not pydensecrf_backend.is_available():
        raise MissingDependencyError(
            "--crf pydensecrf: pydensecrf isn't installed or can't be imported; "
            'pip install "wsss-pipeline[crf]" (Python below 3.13 and a C++ compiler), '
            "or take --crf lattice, which needs no compiler and is faster"
        )
    return requested


def dense_crf(
    image: NDArray[np.uint8],
    unary: NDArray[np.float32],
    parameters: CrfConfig,
    backend: CrfBackend = "auto",
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Posterior of each label at each pixel after mean-field inference.

    Args:
        image: uint8 (H, W, 3) as the bilateral kernel is to see it, see ``crf_image``; the order of its
            channels matters a little.
        unary: float32 (L, H, W), L >= 1, finite energies -log p, see ``unary_from_scores``.
        parameters: of the kernels, and the number of iterations; its ``backend`` and ``image`` aren't read.
        backend: ``pydensecrf``, ``lattice``, or ``auto``, see ``choose_backend``.
        device: for the lattice; pydensecrf always runs on the CPU.

    Returns:
        float32 (L, H, W), summing to 1 over L at each pixel.

    Raises:
        ImageError: image and unary don't fit together.
        ConfigError: ``none`` for a backend, or kernels too narrow for the lattice.
        MissingDependencyError: pydensecrf was asked for by name and can't be imported.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(f"the dense CRF takes a uint8 image (H, W, 3), not {image.dtype} {image.shape}")
    if unary.dtype != np.float32 or unary.ndim != 3 or unary.shape[1:] != image.shape[:2] or len(unary) == 0:
        raise ImageError(
            f"the dense CRF takes a float32 unary (L, {image.shape[0]}, {image.shape[1]}) for this image, "
            f"not {unary.dtype} {unary.shape}"
        )
    chosen = choose_backend(backend)
    if chosen == "pydensecrf":
        return pydensecrf_backend.infer(image, unary, parameters)
    if chosen == "lattice":
        if device == "cpu":
            from wsss_pipeline.refine import mean_field_cpu

            return mean_field_cpu.infer(image, unary, parameters)
        from wsss_pipeline.refine import lattice_backend

        return lattice_backend.infer(image, unary, parameters, device)
    raise ConfigError("the dense CRF can't run with backend 'none'; take 'auto', 'pydensecrf' or 'lattice'")


def unary_from_scores(scores: NDArray[np.floating[Any]] | Tensor) -> NDArray[np.float32]:
    """Energies -log p from scores, in half precision as the published script does it.

    Args:
        scores: (1+K, H, W) in [0, 1], background first; any float type, array or tensor on any device.
            They need not sum to 1. Rounded to float16 first, which is also what the cache stores.

    Returns:
        float32 (1+K, H, W) whose values are float16 numbers, between 0 and 11.51.
    """
    if not isinstance(scores, np.ndarray):
        scores = scores.detach().half().cpu().numpy()
    half = scores.astype(np.float16)
    clipped = np.clip(half, np.float16(1e-5), np.float16(1))
    # 0 minus, not a sign change: log 1 gives 0 and not -0
    return (np.float16(0) - np.log(clipped)).astype(np.float32)


def crf_image(rgb: NDArray[np.uint8], kind: CrfImage) -> NDArray[np.uint8]:
    """The picture as the bilateral kernel sees it.

    Args:
        rgb: uint8 (H, W, 3).
        kind: ``bgr`` the plain picture; ``reference`` minus the Caffe mean, truncated toward zero and
            taken modulo 256, which is what the published script's cast of negative floats to uint8 does
            on x86 (C leaves it undefined; here it is the same everywhere).

    Returns:
        uint8 (H, W, 3), BGR, contiguous.
    """
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    if kind == "bgr":
        return bgr
    centred = bgr.astype(np.float32) - np.array(REFERENCE_MEAN_BGR, dtype=np.float32)
    return (centred.astype(np.int32) & 255).astype(np.uint8)
