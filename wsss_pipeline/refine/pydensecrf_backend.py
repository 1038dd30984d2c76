"""Mean-field inference of the dense CRF by pydensecrf: C++, one core, an optional package.

Imports no torch, since it runs in worker processes, which have to start fast and stay small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig


def is_available() -> bool:
    """Whether pydensecrf can be imported."""
    try:
        from pydensecrf import densecrf  # noqa: F401
    except (ImportError, ValueError):  # ValueError: built for another NumPy
        return False
    return True


def infer(image: NDArray[np.uint8], unary: NDArray[np.float32], parameters: CrfConfig) -> NDArray[np.float32]:
    """Posterior (L, H, W); arguments as those of ``dense_crf``, already checked."""
    from pydensecrf import densecrf

    labels, height, width = unary.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1)))
    if parameters.gaussian_weight:
        crf.addPairwiseGaussian(sxy=parameters.gaussian_sxy, compat=parameters.gaussian_weight)
    if parameters.bilateral_weight:
        crf.addPairwiseBilateral(
            sxy=parameters.bilateral_sxy,
            srgb=parameters.bilateral_srgb,
            rgbim=np.ascontiguousarray(image),
            compat=parameters.bilateral_weight,
        )
    return np.array(crf.inference(parameters.iterations), dtype=np.float32).reshape(labels, height, width)
