"""The permutohedral lattice: as a Gaussian filter, and against the C++ code it takes the place of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss_pipeline.config import CrfConfig
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.refine import dense_crf_cpu
from wsss_pipeline.refine.dense_crf import crf_image, has_pydensecrf, infer_by_pydensecrf, unary_from_scores
from wsss_pipeline.refine.dense_crf_cpu import build_lattice
from wsss_pipeline.refine.dense_crf_torch import PermutohedralLattice, infer_batch

Infer = Callable[[np.ndarray, np.ndarray, CrfConfig], np.ndarray]

IMAGES = sorted((Path(__file__).parent.parent / "golden" / "images").glob("*.png"))

needs_pydensecrf = pytest.mark.skipif(
    not has_pydensecrf(), reason="the optional package pydensecrf isn't installed"
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_unary(labels: int, size: tuple[int, int]) -> np.ndarray:
    """Unary float32 (L, H, W) from scores as smooth as upscaled CAMs."""
    coarse = torch.rand((1, labels - 1, 5, 6), generator=seeded(labels))
    cams = F.interpolate(coarse, size, mode="bilinear")[0] ** 2
    return unary_from_scores(torch.cat([1 - cams.amax(dim=0, keepdim=True), cams])).numpy()


def in_torch(image: np.ndarray, unary: np.ndarray, parameters: CrfConfig, device: str = "cpu") -> np.ndarray:
    """What runs on a GPU, on the CPU."""
    images = [torch.from_numpy(np.ascontiguousarray(image)).to(device)]
    return infer_batch(images, [torch.from_numpy(unary).to(device)], parameters)[0].cpu().numpy()


both_ways = pytest.mark.parametrize("infer", [dense_crf_cpu.infer, in_torch], ids=["compiled", "in_torch"])


@needs_pydensecrf
@both_ways
@pytest.mark.parametrize("labels", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("file", IMAGES, ids=lambda path: path.stem)
def test_agrees_with_pydensecrf(file: Path, labels: int, infer: Infer) -> None:
    image = crf_image(read_image(file), "bgr")
    unary = smooth_unary(labels, image.shape[:2])
    ours = infer(image, unary, CrfConfig())
    theirs = infer_by_pydensecrf(image, unary, CrfConfig())
    assert (ours.argmax(axis=0) == theirs.argmax(axis=0)).mean() >= 0.9999
    # 1e-5 where both are built for the same x86; points on a border between two simplices may fall
    # elsewhere when the C++ compiler fuses multiplications and additions
    assert np.abs(ours - theirs).max() < 5e-3
    assert np.abs(ours - theirs).mean() < 1e-5


@needs_pydensecrf
@both_ways
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (17, 29)])
@pytest.mark.parametrize("is_constant", [False, True])
def test_agrees_with_pydensecrf_on_degenerate_images(
    size: tuple[int, int], is_constant: bool, infer: Infer
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = np.full_like(image, 77) if is_constant else image
    unary = smooth_unary(3, size)
    ours = infer(image, unary, CrfConfig())
    theirs = infer_by_pydensecrf(image, unary, CrfConfig())
    assert np.abs(ours - theirs).max() < 1e-4


@needs_pydensecrf
@both_ways
def test_agrees_with_pydensecrf_for_other_parameters(infer: Infer) -> None:
    image = crf_image(read_image(IMAGES[0]), "reference")
    parameters = CrfConfig(
        iterations=4,
        gaussian_sxy=2.5,
        gaussian_weight=1.5,
        bilateral_sxy=20.0,
        bilateral_srgb=13.0,
        bilateral_weight=7.0,
    )
    unary = smooth_unary(3, image.shape[:2])
    ours, theirs = infer(image, unary, parameters), infer_by_pydensecrf(image, unary, parameters)
    assert np.abs(ours - theirs).max() < 5e-3


@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_is_near_the_exact_gaussian_filter(dimensions: int) -> None:
    features = torch.rand((dimensions, 400), generator=seeded(dimensions)) * 3
    values = torch.rand((400, 2), generator=seeded(9)) + (features[0, :, None] > 1.5)
    kernel = torch.exp(-torch.cdist(features.T, features.T).square() / 2)
    exact = kernel @ values / kernel.sum(dim=1, keepdim=True)
    lattice = PermutohedralLattice(features)
    ours = lattice.filter(values) / lattice.filter(torch.ones(400, 1))
    # the lattice is an approximation: the values range over 2, a wrong neighbour costs several tenths
    assert (ours - exact).abs().max() < 0.25
    assert (ours - exact).abs().mean() < 0.06


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(("dimensions", "spread"), [(1, 9.0), (2, 30.0), (3, 4.0), (5, 40.0)])
def test_the_compiled_lattice_filters_like_the_one_in_torch(
    dimensions: int, spread: float, columns: int
) -> None:
    features = torch.randn((dimensions, 4001), generator=seeded(dimensions)) * spread
    values = torch.rand((4001, columns), generator=seeded(columns))
    padded = torch.cat([features, torch.zeros(dimensions, 3)], dim=1)
    expected = PermutohedralLattice(padded).filter(torch.cat([values, torch.zeros(3, columns)]))[:4001]
    found = np.ones((4001, columns), np.float32)
    build_lattice(features.numpy(), pad_to=4).add_filtered(values.numpy(), found)
    torch.testing.assert_close(torch.from_numpy(found) - 1, expected, rtol=1e-4, atol=1e-5)


def test_coordinates_that_span_almost_63_bits_are_ordered_as_well() -> None:
    wide = torch.randn((5, 300), generator=seeded(5)) * 120
    values = torch.rand((300, 1), generator=seeded(6))
    found = np.zeros((300, 1), np.float32)
    build_lattice(wide.numpy()).add_filtered(values.numpy(), found)
    torch.testing.assert_close(torch.from_numpy(found), PermutohedralLattice(wide).filter(values))


def test_is_linear_and_treats_each_column_alone() -> None:
    lattice = PermutohedralLattice(torch.rand((3, 200), generator=seeded(1)) * 5)
    values = torch.rand((200, 3), generator=seeded(2))
    together = lattice.filter(values)
    for column in range(3):
        torch.testing.assert_close(
            together[:, column : column + 1], lattice.filter(values[:, column : column + 1])
        )
    mixed = lattice.filter(values @ torch.tensor([[2.0], [-1.0], [0.5]]))
    torch.testing.assert_close(mixed, together @ torch.tensor([[2.0], [-1.0], [0.5]]), rtol=1e-4, atol=1e-5)


def test_points_far_apart_do_not_see_each_other() -> None:
    lattice = PermutohedralLattice(torch.tensor([[0.0, 100.0], [0.0, -50.0]]))
    filtered = lattice.filter(torch.eye(2))
    assert filtered[0, 1] == filtered[1, 0] == 0
    assert (filtered.diag() > 0).all()


def test_repeats_to_the_bit() -> None:
    features = torch.rand((5, 500), generator=seeded(3)) * 8
    values = torch.rand((500, 4), generator=seeded(4))
    first, second = (PermutohedralLattice(features).filter(values) for _ in range(2))
    assert torch.equal(first, second)


@both_ways
def test_kernels_too_narrow_for_the_keys_are_refused(infer: Infer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    parameters = CrfConfig(bilateral_sxy=0.01, bilateral_srgb=0.01)
    with pytest.raises(ConfigError, match=r"crf\.bilateral_srgb"):
        infer(image, smooth_unary(2, (20, 20)), parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_what_the_cpu_gives() -> None:
    image = crf_image(read_image(IMAGES[0]), "bgr")
    unary = smooth_unary(4, image.shape[:2])
    on_cpu, on_gpu = (
        dense_crf_cpu.infer(image, unary, CrfConfig()),
        in_torch(image, unary, CrfConfig(), "cuda"),
    )
    assert (on_cpu.argmax(axis=0) == on_gpu.argmax(axis=0)).mean() >= 0.9999
    assert np.abs(on_cpu - on_gpu).max() < 5e-3


def test_images_that_share_a_lattice_get_what_each_gets_alone() -> None:
    images = [read_image(IMAGES[0])[:37, :50], read_image(IMAGES[1])[:31, :41]]
    unaries = [smooth_unary(labels, image.shape[:2]) for labels, image in zip((4, 2), images, strict=True)]
    together = infer_batch(
        [torch.from_numpy(np.ascontiguousarray(image)) for image in images],
        [torch.from_numpy(unary) for unary in unaries],
        CrfConfig(),
    )
    for image, unary, found in zip(images, unaries, together, strict=True):
        alone = in_torch(np.ascontiguousarray(image), unary, CrfConfig())
        assert found.shape == alone.shape
        assert np.abs(found.numpy() - alone).max() < 1e-6
