"""The two kernels of the dense CRF: position alone, and position with colour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig

# pydensecrf takes the pixels by fours and fills the last four up with points whose features are 0. These
# carry no values, but the lattice then has the vertices around them, which link dark pixels to each other:
# worth up to 0.03 in the posterior of a few pixels, so we add the same points.
POINTS_AT_A_TIME = 4


def position_features(height: int, width: int, deviation: float) -> NDArray[np.float32]:
    """float32 (2, H*W): column and row of each pixel in units of ``deviation``."""
    # NumPy divides alike for every device, where a GPU would multiply by the reciprocal
    rows, columns = np.indices((height, width), dtype=np.float32).reshape(2, -1)
    return np.stack([columns, rows]) / np.float32(deviation)


def bilateral_features(image: NDArray[np.uint8], parameters: CrfConfig) -> NDArray[np.float32]:
    """float32 (5, H*W) of uint8 (H, W, 3): position and colour, each in units of its deviation."""
    height, width = image.shape[:2]
    position = position_features(height, width, parameters.bilateral_sxy)
    colour = image.reshape(-1, 3).T.astype(np.float32) / np.float32(parameters.bilateral_srgb)
    return np.concatenate([position, colour])
