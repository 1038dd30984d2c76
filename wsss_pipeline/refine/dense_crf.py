"""Dense CRF: one function, two backends; numpy in, numpy out. Importing this needs no torch."""

from __future__ import annotations

import importlib.util
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.config import CrfBackend, CrfConfig, CrfImage
from wsss_pipeline.errors import MissingDependencyError

# mean colour, BGR, that the published script subtracts
REFERENCE_MEAN = np.array([104.008, 116.669, 122.675], dtype=np.float32)


def choose_backend(requested: CrfBackend, device: str) -> Literal["pydensecrf", "lattice", "none"]:
    """The backend to use: ``auto`` is lattice on a GPU; on a CPU pydensecrf where installed, else lattice.

    Args:
        requested: as the user chose.
        device: type of the torch device, ``cpu`` or ``cuda``.

    Raises:
        MissingDependencyError: pydensecrf was asked for and isn't installed.
    """
    installed = importlib.util.find_spec("pydensecrf") is not None
    if requested == "auto":
        return "pydensecrf" if device == "cpu" and installed else "lattice"
    if requested == "pydensecrf" and not installed:
        raise MissingDependencyError(
            "pydensecrf isn't installed; use --crf lattice, which needs no compiler, or install it with "
            "`pip install 'wsss-pipeline[crf]'` (Python 3.11 or 3.12 and a C++ compiler)"
        )
    return requested


def crf_image(image: NDArray[np.uint8], kind: CrfImage) -> NDArray[np.uint8]:
    """The picture as the bilateral kernel sees it.

    Args:
        image: uint8 (H, W, 3) RGB.
        kind: ``bgr``: the channels reversed. ``reference``: as the published script makes it on x86: BGR
            minus the mean colour, truncated toward zero, then modulo 256.

    Returns:
        uint8 (H, W, 3), contiguous.
    """
    bgr = np.ascontiguousarray(image[..., ::-1])
    if kind == "bgr":
        return bgr
    # through a signed type: a negative float straight to uint8 is undefined, and differs between processors
    shifted: NDArray[np.int16] = np.trunc(bgr.astype(np.float32) - REFERENCE_MEAN).astype(np.int16)
    return (shifted % 256).astype(np.uint8)


def unary_from_scores(scores: NDArray[np.float16]) -> NDArray[np.float32]:
    """Unary potentials, -log of the scores.

    Args:
        scores: float16 (L, H, W) in [0, 1]; needn't sum to 1.

    Returns:
        float32 (L, H, W). Clipped to 1e-5 and taken the logarithm of in half precision, as in the published
        script, which reads its CAMs from half-precision files.
    """
    clipped = np.clip(scores.astype(np.float16, copy=False), np.float16(1e-5), np.float16(1))
    return (-np.log(clipped)).astype(np.float32)


def dense_crf(
    image: NDArray[np.uint8],
    unary: NDArray[np.float32],
    parameters: CrfConfig,
    backend: Literal["auto", "pydensecrf", "lattice"] = "auto",
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Posterior of a fully connected CRF (Kraehenbuehl and Koltun, NIPS 2011).

    Args:
        image: uint8 (H, W, 3), see ``crf_image``.
        unary: float32 (L, H, W), negative log probabilities of the labels that are present.
        parameters: kernels and iterations.
        backend: ``pydensecrf`` runs on the CPU, ``lattice`` on ``device``; ``auto``: see ``choose_backend``.
        device: torch device for ``lattice``.

    Returns:
        float32 (L, H, W), summing to 1 over the labels.
    """
    if choose_backend(backend, device.partition(":")[0]) == "pydensecrf":
        return _pydensecrf(image, unary, parameters)
    import torch

    from wsss_pipeline.refine.lattice import lattice_crf

    with torch.no_grad():
        picture, potentials = torch.from_numpy(image).to(device), torch.from_numpy(unary).to(device)
        return lattice_crf(picture, potentials, parameters).cpu().numpy()


def _pydensecrf(
    image: NDArray[np.uint8], unary: NDArray[np.float32], parameters: CrfConfig
) -> NDArray[np.float32]:
    import pydensecrf.densecrf as densecrf

    labels, height, width = unary.shape
    model = densecrf.DenseCRF2D(width, height, labels)
    model.setUnaryEnergy(np.ascontiguousarray(unary.reshape(labels, -1)))
    if parameters.gaussian_weight:
        model.addPairwiseGaussian(sxy=parameters.gaussian_sxy, compat=parameters.gaussian_weight)
    if parameters.bilateral_weight:
        model.addPairwiseBilateral(
            sxy=parameters.bilateral_sxy,
            srgb=parameters.bilateral_srgb,
            rgbim=np.ascontiguousarray(image),
            compat=parameters.bilateral_weight,
        )
    posterior = np.array(model.inference(parameters.iterations), dtype=np.float32)
    return posterior.reshape(labels, height, width)
