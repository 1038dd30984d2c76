"""Dense CRF: both backends against the published script's posteriors, and what callers may rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wsss_pipeline.config import CrfBackend, CrfConfig
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ConfigError, ImageError, MissingDependencyError
from wsss_pipeline.refine import choose_backend, crf_image, dense_crf, pydensecrf_backend, unary_from_scores

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = sorted(json.loads((GOLDEN / "labels.json").read_text()))
KINDS = {"quirk": "reference", "plain": "bgr"}

needs_pydensecrf = pytest.mark.skipif(
    not pydensecrf_backend.is_available(), reason="the optional package pydensecrf isn't installed"
)
BACKENDS = ["lattice", pytest.param("pydensecrf", marks=needs_pydensecrf)]


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "expected" / f"{name}.npz"))


def golden_unary(expected: dict[str, np.ndarray]) -> np.ndarray:
    cams = expected["refined_high"].astype(np.float16)
    return unary_from_scores(np.concatenate([1 - cams.max(axis=0, keepdims=True), cams]))


def random_unary(labels: int, height: int, width: int) -> np.ndarray:
    scores = np.random.default_rng(labels).random((labels, height, width), dtype=np.float32)
    return unary_from_scores(scores)


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_published_masks_within_5_pixels_and_posteriors_within_5e_3(
    name: str, kind: str, backend: str
) -> None:
    expected = golden(name)
    image = crf_image(read_image(GOLDEN / "images" / f"{name}.png"), KINDS[kind])
    posterior = dense_crf(image, golden_unary(expected), CrfConfig(), backend)
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


def test_unary_is_that_of_half_precision() -> None:
    scores = np.array([0.0, 1e-6, 0.1, 0.5, 1.0], np.float32).reshape(1, 1, 5)
    unary = unary_from_scores(scores)
    assert unary.dtype == np.float32
    smallest = -np.log(np.float16(1e-5))
    expected = [smallest, smallest, -np.log(np.float16(0.1)), -np.log(np.float16(0.5)), 0]
    assert unary.ravel().tolist() == [float(value) for value in expected]
    assert not np.signbit(unary).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_unary_of_a_tensor_equals_that_of_an_array(dtype: torch.dtype) -> None:
    scores = torch.rand((3, 4, 5), generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    array = scores.detach().double().numpy().astype(np.float16)
    assert np.array_equal(unary_from_scores(scores), unary_from_scores(array))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (23, 31)])
@pytest.mark.parametrize("labels", [1, 2, 5])
def test_posterior_sums_to_1_at_any_size(backend: str, size: tuple[int, int], labels: int) -> None:
    posterior = dense_crf(random_image(*size), random_unary(labels, *size), CrfConfig(), backend)
    assert posterior.dtype == np.float32
    assert posterior.shape == (labels, *size)
    assert (posterior >= 0).all()
    assert np.abs(posterior.sum(axis=0) - 1).max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_background_alone_is_certain(backend: str) -> None:
    posterior = dense_crf(random_image(8, 9), random_unary(1, 8, 9), CrfConfig(), backend)
    assert (posterior == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_may_be_permuted(backend: str) -> None:
    image, unary, order = random_image(19, 27), random_unary(4, 19, 27), [2, 0, 3, 1]
    straight = dense_crf(image, unary, CrfConfig(), backend)
    permuted = dense_crf(image, np.ascontiguousarray(unary[order]), CrfConfig(), backend)
    # the sums run in another order, and ten iterations on noise magnify the rounding
    assert np.abs(straight[order] - permuted).max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_iterations_give_the_softmax_of_the_scores(backend: str) -> None:
    unary = random_unary(3, 7, 8)
    posterior = dense_crf(random_image(7, 8), unary, CrfConfig(iterations=0), backend)
    expected = np.exp(-unary) / np.exp(-unary).sum(axis=0)
    assert np.abs(posterior - expected).max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_follow_the_edge_of_the_picture(backend: str) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    scores = np.full((2, 40, 60), 0.2, np.float32)
    # five columns past the edge are labelled as if they belonged to the left part
    scores[0, :, :35] = scores[1, :, 35:] = 0.8
    posterior = dense_crf(image, unary_from_scores(scores), CrfConfig(), backend)
    assert (posterior.argmax(axis=0) == (np.arange(60) >= 30)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_stay_as_they_were_and_needn_t_be_contiguous(backend: str) -> None:
    image, unary = random_image(11, 13), random_unary(3, 11, 13)
    kept_image, kept_unary = image.copy(), unary.copy()
    expected = dense_crf(
        np.ascontiguousarray(image[::-1]), np.ascontiguousarray(unary[:, ::-1]), CrfConfig(), backend
    )
    assert np.array_equal(dense_crf(image[::-1], unary[:, ::-1], CrfConfig(), backend), expected)
    assert np.array_equal(image, kept_image)
    assert np.array_equal(unary, kept_unary)


@pytest.mark.parametrize(
    ("image", "unary"),
    [
        (np.zeros((4, 5, 3), np.float32), np.zeros((2, 4, 5), np.float32)),
        (np.zeros((4, 5), np.uint8), np.zeros((2, 4, 5), np.float32)),
        (np.zeros((0, 5, 3), np.uint8), np.zeros((2, 0, 5), np.float32)),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((2, 5, 4), np.float32)),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((0, 4, 5), np.float32)),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((2, 4, 5), np.float64)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(image: np.ndarray, unary: np.ndarray) -> None:
    with pytest.raises(ImageError, match="the dense CRF takes a"):
        dense_crf(image, unary, CrfConfig(), "lattice")


def test_none_is_no_backend_to_run() -> None:
    with pytest.raises(ConfigError, match="can't run with backend 'none'"):
        dense_crf(random_image(2, 2), random_unary(2, 2, 2), CrfConfig(), "none")


def test_auto_runs_what_would_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydensecrf_backend, "is_available", lambda: False)
    image, unary = random_image(9, 9), random_unary(3, 9, 9)
    assert np.array_equal(
        dense_crf(image, unary, CrfConfig()), dense_crf(image, unary, CrfConfig(), "lattice")
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_without_weight_count_for_nothing(backend: str) -> None:
    image, unary = random_image(9, 12), random_unary(3, 9, 12)
    # so narrow a kernel couldn't be built, if it were needed
    off = CrfConfig(gaussian_weight=0, bilateral_weight=0, bilateral_sxy=0.01, bilateral_srgb=0.01)
    expected = np.exp(-unary) / np.exp(-unary).sum(axis=0)
    assert np.abs(dense_crf(image, unary, off, backend) - expected).max() < 1e-6


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("requested", "chosen"), [("auto", "lattice"), ("lattice", "lattice"), ("none", "none")]
)
def test_the_choice_of_backend_depends_on_nothing_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, requested: CrfBackend, chosen: str, installed: bool
) -> None:
    monkeypatch.setattr(pydensecrf_backend, "is_available", lambda: installed)
    assert choose_backend(requested) == chosen


def test_missing_pydensecrf_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(MissingDependencyError) as caught:
        choose_backend("pydensecrf")
    message = str(caught.value)
    assert 'pip install "wsss-pipeline[crf]"' in message
    assert "--crf lattice, which needs no compiler" in message
    assert "\n" not in message
    assert choose_backend("auto") == "lattice"


@needs_pydensecrf
def test_pydensecrf_runs_without_torch() -> None:
    code = (
        "import sys, numpy as np; from wsss_pipeline.config import CrfBackend, CrfConfig; "
        "from wsss_pipeline.refine import crf_image, dense_crf, unary_from_scores; "
        "image = crf_image(np.zeros((4, 5, 3), np.uint8), 'bgr'); "
        "dense_crf(image, unary_from_scores(np.ones((2, 4, 5), np.float16)), CrfConfig(), 'pydensecrf'); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
