"""Dense CRF: both backends against the published numbers, and against each other."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ConfigError, MissingDependencyError
from wsss_pipeline.refine import choose_backend, crf_image, dense_crf, unary_from_scores

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = sorted(json.loads((GOLDEN / "labels.json").read_text()))
KINDS: list[tuple[Literal["bgr", "reference"], str]] = [("bgr", "plain"), ("reference", "quirk")]

needs_pydensecrf = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason="pydensecrf2 isn't installed (it needs Python < 3.13 and a C++ compiler)",
)
backends = pytest.mark.parametrize("backend", [pytest.param("pydensecrf", marks=needs_pydensecrf), "lattice"])


def golden(name: str) -> dict[str, NDArray[np.generic]]:
    return dict(np.load(GOLDEN / "expected" / f"{name}.npz"))


def golden_unary(expected: dict[str, NDArray[np.generic]]) -> NDArray[np.float32]:
    cams = expected["refined_high"].astype(np.float16)
    return unary_from_scores(np.concatenate([1 - cams.max(axis=0, keepdims=True), cams]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "key"), KINDS)
def test_crf_image_equals_the_published_one(name: str, kind: Literal["bgr", "reference"], key: str) -> None:
    image = crf_image(read_image(GOLDEN / "images" / f"{name}.png"), kind)
    assert np.array_equal(image, golden(name)[f"crf_image_{key}"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "key"), KINDS)
@backends
def test_masks_differ_from_the_published_ones_in_at_most_5_pixels(
    name: str, kind: Literal["bgr", "reference"], key: str, backend: Literal["pydensecrf", "lattice"]
) -> None:
    expected = golden(name)
    image = crf_image(read_image(GOLDEN / "images" / f"{name}.png"), kind)
    posterior = dense_crf(image, golden_unary(expected), CrfConfig(), backend)
    labels = np.array([0, *(expected["label_ids"].astype(int) + 1)])[posterior.argmax(axis=0)]
    mask = np.where(posterior.max(axis=0) < 0.95, 255, labels)
    assert (labels != expected[f"label_{key}"]).sum() <= 5
    assert (mask != expected[f"mask_{key}"]).sum() <= 5
    # the golden posterior is kept in half precision: 5e-4 of that is its rounding
    assert np.abs(posterior - expected[f"crf_{key}"].astype(np.float32)).max() < 5e-3


@needs_pydensecrf
@pytest.mark.parametrize("labels", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", ["cat", "astronaut"])
def test_lattice_equals_pydensecrf(name: str, labels: int) -> None:
    image = read_image(GOLDEN / "images" / f"{name}.png")
    unary = smooth_unary(labels, image.shape[:2], seed=labels)
    ours = dense_crf(image, unary, CrfConfig(), "lattice")
    theirs = dense_crf(image, unary, CrfConfig(), "pydensecrf")
    assert (ours.argmax(axis=0) == theirs.argmax(axis=0)).mean() >= 0.9999
    assert np.abs(ours - theirs).max() < 5e-3
    assert len(np.unique(theirs.argmax(axis=0))) > 1, "a case that decides nothing"


def smooth_unary(labels: int, size: tuple[int, int], seed: int) -> NDArray[np.float32]:
    """-log of L smooth random fields, normalised over the labels."""
    import cv2

    coarse = np.random.default_rng(seed).normal(0, 2, (labels, 6, 6)).astype(np.float32)
    fields = np.stack([cv2.resize(field, size[::-1], interpolation=cv2.INTER_CUBIC) for field in coarse])
    return (np.log(np.exp(fields).sum(axis=0)) - fields).astype(np.float32)


@backends
def test_a_posterior_sums_to_1_and_follows_its_labels(backend: Literal["pydensecrf", "lattice"]) -> None:
    image = read_image(GOLDEN / "images" / "tiny_odd.png")
    unary = smooth_unary(4, image.shape[:2], seed=0)
    posterior = dense_crf(image, unary, CrfConfig(), backend)
    assert posterior.dtype == np.float32
    assert np.allclose(posterior.sum(axis=0), 1, atol=1e-5)
    order = [2, 0, 3, 1]
    swapped = dense_crf(image, np.ascontiguousarray(unary[order]), CrfConfig(), backend)
    assert np.allclose(swapped, posterior[order], atol=1e-5)


@backends
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (20, 20)])
@pytest.mark.parametrize("labels", [1, 3])
def test_small_and_flat_pictures(
    backend: Literal["pydensecrf", "lattice"], size: tuple[int, int], labels: int
) -> None:
    unary = smooth_unary(labels, size, seed=1)
    posterior = dense_crf(np.full((*size, 3), 77, np.uint8), unary, CrfConfig(), backend)
    assert posterior.shape == unary.shape
    assert np.isfinite(posterior).all()
    assert np.allclose(posterior.sum(axis=0), 1, atol=1e-5)


@backends
def test_without_kernels_or_iterations_the_softmax_is_left(backend: Literal["pydensecrf", "lattice"]) -> None:
    image = read_image(GOLDEN / "images" / "tiny_odd.png")
    unary = smooth_unary(3, image.shape[:2], seed=2)
    softmax = np.exp(-unary) / np.exp(-unary).sum(axis=0)
    for off in (
        replace(CrfConfig(), iterations=0),
        replace(CrfConfig(), gaussian_weight=0.0, bilateral_weight=0.0),
    ):
        assert np.allclose(dense_crf(image, unary, off, backend), softmax, atol=1e-6)


def test_the_crf_smooths_and_keeps_to_colour_edges() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 255
    scores = np.full((2, 40, 40), 0.5, np.float16)
    scores[1, :, 24:], scores[0, :, 24:] = (
        0.9,
        0.1,
    )  # the class reaches the edge at column 20 only in the picture
    scores[1, :, :16], scores[0, :, :16] = 0.1, 0.9
    labels = dense_crf(image, unary_from_scores(scores), CrfConfig(), "lattice").argmax(axis=0)
    assert (labels[:, :20] == 0).all()
    assert (labels[:, 20:] == 1).all()


def test_unary_is_taken_in_half_precision() -> None:
    scores = np.array([[[0.0]], [[0.3]], [[1.0]]], np.float16)
    unary = unary_from_scores(scores)
    assert unary.dtype == np.float32
    assert np.array_equal(unary, unary.astype(np.float16))
    assert unary[:, 0, 0] == pytest.approx([-np.log(1e-5), -np.log(0.3), 0], abs=6e-3)


def test_kernels_that_64_bits_cannot_number_are_refused() -> None:
    image = np.random.default_rng(0).integers(0, 255, (300, 300, 3)).astype(np.uint8)
    narrow = replace(CrfConfig(), bilateral_srgb=0.01, bilateral_sxy=0.01)
    with pytest.raises(ConfigError, match="too narrow"):
        dense_crf(image, smooth_unary(2, (300, 300), 0), narrow, "lattice")


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pydensecrf" else find_spec(name)
    )
    assert choose_backend("auto", "cpu") == "lattice"
    assert choose_backend("lattice", "cpu") == "lattice"
    assert choose_backend("none", "cpu") == "none"
    with pytest.raises(MissingDependencyError, match=r"--crf lattice.*wsss-pipeline\[crf\]"):
        choose_backend("pydensecrf", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_backend("auto", "cpu") == "pydensecrf"
    assert choose_backend("auto", "cuda") == "lattice"
