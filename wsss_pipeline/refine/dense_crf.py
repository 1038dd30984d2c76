"""The dense CRF (Kraehenbuehl and Koltun, NIPS 2011) as CLIP-ES uses it: one refiner, two backends.

``lattice`` is our own, compiled for one CPU core or in torch on a GPU; ``pydensecrf`` is C++ on one CPU core, half
as fast, to compare with. They agree to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsss_pipeline.config import CrfConfig, CrfImage
from wsss_pipeline.errors import ConfigError, ImageError, MissingDependencyError
from wsss_pipeline.refine.dense_crf_cpu import infer
from wsss_pipeline.refine.dense_crf_torch import infer_batch
from wsss_pipeline.regions.regions import Regions

# Mean of the Caffe models in BGR, as the published script subtracts it.
REFERENCE_MEAN_BGR = (104.008, 116.669, 122.675)
LEAST_SCORE = 1e-5


class DenseCrf:
    """A ``Refiner``: posterior of each label at each pixel after mean-field inference.

    Args:
        config: kernels, iterations, backend (``auto`` is the lattice), and what the bilateral kernel sees.

    Raises:
        ConfigError: the backend is ``none``.
        MissingDependencyError: pydensecrf was asked for by name and can't be imported.
    """

    def __init__(self, config: CrfConfig) -> None:
        if config.backend == "none":
            raise ConfigError("the dense CRF has no backend 'none'; take auto, pydensecrf or lattice")
        backend = "lattice" if config.backend == "auto" else config.backend
        if backend == "pydensecrf" and not has_pydensecrf():
            raise MissingDependencyError(
                "--crf pydensecrf: pydensecrf isn't installed or can't be imported; "
                'pip install "wsss-pipeline[crf]" (Python below 3.13 and a C++ compiler), '
                "or take --crf lattice, which needs no compiler and is faster"
            )
        self.config = config.model_copy(update={"backend": backend})
        self.description = f"CRF: {backend}, {config.image} image"

    def determinants(self) -> Mapping[str, Any]:
        """All settings, the backend resolved; without ``half_scores`` where it is as it always was."""
        return {"crf": self.config.model_dump(exclude={"half_scores"} if self.config.half_scores else set())}

    def __call__(
        self,
        images: Sequence[NDArray[np.uint8]],
        scores: Sequence[Tensor],
        regions: Sequence[Regions] = (),
        cams: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """See ``Refiner``.

        Raises:
            ImageError: image and scores don't fit together.
            ConfigError: the kernels are too narrow for the lattice.
        """
        check_arrays(images, scores, "the dense CRF")
        seen = [crf_image(image, self.config.image) for image in images]
        unaries = [unary_from_scores(score, half=self.config.half_scores) for score in scores]
        if scores[0].device.type != "cpu" and self.config.backend == "lattice":
            device = scores[0].device
            on_device = [torch.from_numpy(image).to(device, non_blocking=True) for image in seen]
            return infer_batch(on_device, unaries, self.config)
        on_host = infer if self.config.backend == "lattice" else infer_by_pydensecrf
        return [
            torch.from_numpy(on_host(image, unary.cpu().numpy(), self.config)).to(unary.device)
            for image, unary in zip(seen, unaries, strict=True)
        ]


def check_arrays(
    images: Sequence[NDArray[Any]],
    scores: Sequence[Tensor],
    refiner: str,
    kinds: tuple[Any, ...] = (np.uint8,),
) -> None:
    """Refuses images that aren't uint8 (H, W, 3), and scores that aren't (L, H, W) for them, as ImageError.

    ``kinds``: types of images that the refiner takes.
    """
    for image, score in zip(images, scores, strict=True):
        if image.dtype not in kinds or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ImageError(f"{refiner} takes a uint8 image (H, W, 3), not {image.dtype} {image.shape}")
        if score.ndim != 3 or score.shape[1:] != image.shape[:2] or len(score) == 0:
            raise ImageError(
                f"{refiner} takes scores (L, {image.shape[0]}, {image.shape[1]}) for this image, "
                f"not {tuple(score.shape)}"
            )


def unary_from_scores(scores: Tensor, *, half: bool = True) -> Tensor:
    """Energies -log p from scores, in half precision as the published script does it.

    Args:
        scores: (1+K, H, W) in [0, 1], background first; they need not sum to 1. Rounded to float16 first, which
            is also what the cache stores.
        half: False for single precision throughout, as WeakCLIP has it.

    Returns:
        float32 (1+K, H, W), between 0 and 11.52; values that are float16 numbers, with ``half``.
    """
    # 0 minus, not a sign change: log 1 gives 0 and not -0
    return (0 - (scores.half() if half else scores.float()).clamp(LEAST_SCORE, 1).log()).float()


def crf_image(rgb: NDArray[np.uint8], kind: CrfImage) -> NDArray[np.uint8]:
    """The image as the bilateral kernel sees it.

    Args:
        rgb: uint8 (H, W, 3).
        kind: ``bgr`` and ``rgb`` the plain image; ``reference`` minus the Caffe mean, truncated toward zero and
            taken modulo 256, which is what the published script's cast of negative floats to uint8 does
            on x86 (C leaves it undefined; here it is the same everywhere).

    Returns:
        uint8 (H, W, 3), contiguous; BGR unless ``rgb`` is asked for.
    """
    if kind == "rgb":
        return np.ascontiguousarray(rgb)
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    if kind == "bgr":
        return bgr
    centred = bgr.astype(np.float32) - np.array(REFERENCE_MEAN_BGR, dtype=np.float32)
    return (centred.astype(np.int32) & 255).astype(np.uint8)


def has_pydensecrf() -> bool:
    """Whether pydensecrf can be imported."""
    try:
        from pydensecrf import densecrf  # noqa: F401
    except (ImportError, ValueError):  # ValueError: built for another NumPy
        return False
    return True


def infer_by_pydensecrf(
    image: NDArray[np.uint8], unary: NDArray[np.float32], parameters: CrfConfig
) -> NDArray[np.float32]:
    """As ``dense_crf_cpu.infer``, by the C++ library."""
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
