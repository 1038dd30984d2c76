"""Dense CRF: both backends against the published script's posteriors, and what callers may rely on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsss_pipeline.config import CrfBackend, CrfConfig
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ConfigError, ImageError, MissingDependencyError
from wsss_pipeline.refine import DenseCrf
from wsss_pipeline.refine import dense_crf as module
from wsss_pipeline.refine.dense_crf import crf_image, has_pydensecrf, unary_from_scores

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = sorted(json.loads((GOLDEN / "labels.json").read_text()))
KINDS = {"quirk": "reference", "plain": "bgr"}

needs_pydensecrf = pytest.mark.skipif(
    not has_pydensecrf(), reason="the optional package pydensecrf isn't installed"
)
BACKENDS = ["lattice", pytest.param("pydensecrf", marks=needs_pydensecrf)]


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "expected" / f"{name}.npz"))


def golden_scores(expected: dict[str, np.ndarray]) -> torch.Tensor:
    cams = torch.from_numpy(expected["refined_high"]).half()
    return torch.cat([1 - cams.amax(dim=0, keepdim=True), cams])


def random_scores(labels: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(labels).random((labels, height, width), dtype=np.float32))


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def posterior_of(image: np.ndarray, scores: torch.Tensor, /, **settings: Any) -> np.ndarray:
    """float32 (L, H, W) by the refiner; ``settings`` are those of ``CrfConfig``."""
    (found,) = DenseCrf(CrfConfig(**settings))([image], [scores])
    assert found.dtype == torch.float32
    return found.numpy()


def softmax_of(scores: torch.Tensor) -> np.ndarray:
    return torch.softmax(-unary_from_scores(scores), dim=0).numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_published_masks_within_5_pixels_and_posteriors_within_5e_3(
    name: str, kind: str, backend: str
) -> None:
    expected = golden(name)
    image = read_image(GOLDEN / "images" / f"{name}.png")
    posterior = posterior_of(image, golden_scores(expected), backend=backend, image=KINDS[kind])
    values = np.array([0, *(expected["label_ids"] + 1)])
    labels = values[posterior.argmax(axis=0)]
    mask = np.where(posterior.max(axis=0) < 0.95, 255, labels)
    assert (mask != expected[f"mask_{kind}"]).sum() <= 5
    assert (labels != expected[f"label_{kind}"]).sum() <= 5
    difference = np.abs(posterior - expected[f"crf_{kind}"].astype(np.float32))
    # the posteriors were stored as float16, whose steps below 1 are 5e-4
    assert difference.max() < 5e-3
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_crf_image_equals_the_published_one(name: str, kind: str) -> None:
    rgb = read_image(GOLDEN / "images" / f"{name}.png")
    image = crf_image(rgb, KINDS[kind])
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert np.array_equal(image, golden(name)[f"crf_image_{kind}"])


def test_reference_image_truncates_toward_zero_and_wraps() -> None:
    # blue minus 104.008: 0 -> -104.008 -> -104 -> 152; 103 -> -1.008 -> 255; 104 -> -0.008 -> 0; 255 -> 150
    rgb = np.zeros((1, 4, 3), np.uint8)
    rgb[0, :, 2] = [0, 103, 104, 255]
    assert crf_image(rgb, "reference")[0, :, 0].tolist() == [152, 255, 0, 150]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_unary_is_that_of_half_precision(dtype: torch.dtype) -> None:
    scores = torch.tensor([0.0, 1e-6, 0.1, 0.5, 1.0], dtype=dtype).reshape(1, 1, 5)
    unary = unary_from_scores(scores)
    assert unary.dtype == torch.float32
    smallest = -np.log(np.float16(1e-5))
    rounded = np.float16(float(scores[0, 0, 2]))  # bfloat16 has 0.1 elsewhere
    assert unary.flatten().tolist() == [smallest, smallest, -np.log(rounded), -np.log(np.float16(0.5)), 0]
    assert not torch.signbit(unary).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (23, 31)])
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_posterior_sums_to_1_at_any_size(backend: str, size: tuple[int, int], labels: int) -> None:
    posterior = posterior_of(random_image(*size), random_scores(labels, *size), backend=backend)
    assert posterior.shape == (labels, *size)
    assert (posterior >= 0).all()
    assert np.abs(posterior.sum(axis=0) - 1).max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_background_alone_is_certain(backend: str) -> None:
    posterior = posterior_of(random_image(8, 9), random_scores(1, 8, 9), backend=backend)
    assert (posterior == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_may_be_permuted(backend: str) -> None:
    # ten iterations on noise magnify rounding: this noise less than its mirror image in colour
    image, scores, order = random_image(19, 27)[..., ::-1], random_scores(4, 19, 27), [2, 0, 3, 1]
    straight = posterior_of(image, scores, backend=backend)
    permuted = posterior_of(image, scores[order], backend=backend)
    assert np.abs(straight[order] - permuted).max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_iterations_give_the_softmax_of_the_scores(backend: str) -> None:
    scores = random_scores(3, 7, 8)
    posterior = posterior_of(random_image(7, 8), scores, backend=backend, iterations=0)
    assert np.abs(posterior - softmax_of(scores)).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_follow_the_edge_of_the_image(backend: str) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    scores = torch.full((2, 40, 60), 0.2)
    # five columns past the edge are labelled as if they belonged to the left part
    scores[0, :, :35] = scores[1, :, 35:] = 0.8
    posterior = posterior_of(image, scores, backend=backend)
    assert (posterior.argmax(axis=0) == (np.arange(60) >= 30)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_stay_as_they_were_and_needn_t_be_contiguous(backend: str) -> None:
    image, scores = random_image(11, 13), random_scores(3, 11, 13)
    kept_image, kept_scores = image.copy(), scores.clone()
    across = scores.transpose(1, 2).contiguous().transpose(1, 2)  # the same values in another order of memory
    expected = posterior_of(np.ascontiguousarray(image[::-1]), scores.flip(1), backend=backend)
    assert np.array_equal(posterior_of(image[::-1], across.flip(1), backend=backend), expected)
    posterior_of(image, across, backend=backend)
    assert np.array_equal(image, kept_image)
    assert torch.equal(scores, kept_scores)


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (np.zeros((4, 5, 3), np.float32), (2, 4, 5)),
        (np.zeros((4, 5), np.uint8), (2, 4, 5)),
        (np.zeros((0, 5, 3), np.uint8), (2, 0, 5)),
        (np.zeros((4, 5, 3), np.uint8), (2, 5, 4)),
        (np.zeros((4, 5, 3), np.uint8), (0, 4, 5)),
        (np.zeros((4, 5, 3), np.uint8), (4, 5)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(image: np.ndarray, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="the dense CRF takes"):
        DenseCrf(CrfConfig())([image], [torch.ones(shape)])


def test_none_is_no_backend_to_run() -> None:
    with pytest.raises(ConfigError, match="no backend 'none'"):
        DenseCrf(CrfConfig(backend="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_without_weight_count_for_nothing(backend: str) -> None:
    image, scores = random_image(9, 12), random_scores(3, 9, 12)
    # so narrow a kernel couldn't be built, if it were needed
    off = {"gaussian_weight": 0, "bilateral_weight": 0, "bilateral_sxy": 0.01, "bilateral_srgb": 0.01}
    assert np.abs(posterior_of(image, scores, backend=backend, **off) - softmax_of(scores)).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_several_sizes_get_what_each_gets_alone(backend: str) -> None:
    sizes = [(9, 12), (5, 31), (9, 12)]
    images = [random_image(*size) for size in sizes]
    scores = [random_scores(2 + number, *size) for number, size in enumerate(sizes)]
    together = DenseCrf(CrfConfig(backend=backend))(images, scores)
    for image, score, found in zip(images, scores, together, strict=True):
        assert np.array_equal(found.numpy(), posterior_of(image, score, backend=backend))


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("requested", ["auto", "lattice"])
def test_the_choice_of_backend_depends_on_nothing_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, requested: CrfBackend, installed: bool
) -> None:
    monkeypatch.setattr(module, "has_pydensecrf", lambda: installed)
    assert DenseCrf(CrfConfig(backend=requested)).config.backend == "lattice"
    image, scores = random_image(9, 9), random_scores(3, 9, 9)
    expected = posterior_of(image, scores, backend="lattice")
    assert np.array_equal(posterior_of(image, scores, backend=requested), expected)


def test_missing_pydensecrf_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(MissingDependencyError) as caught:
        DenseCrf(CrfConfig(backend="pydensecrf"))
    message = str(caught.value)
    assert 'pip install "wsss-pipeline[crf]"' in message
    assert "--crf lattice, which needs no compiler" in message
    assert "\n" not in message


def test_the_fingerprints_part_is_all_settings_with_the_backend_resolved() -> None:
    settings = {"iterations": 3, "image": "reference", "bilateral_srgb": 5.0}
    determinants = DenseCrf(CrfConfig(**settings)).determinants()
    resolved = CrfConfig(**settings, backend="lattice").model_dump()
    assert resolved.pop("half_scores")  # which came later, see test_weakclip_masks.py
    assert determinants == {"crf": resolved}
