"""Affinity against its definition with whole matrices; boxes by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.refine.test_par import FOLDERS
from wsss_pipeline.cam.affinity import (
    box_masks,
    boxes_by_labelling,
    boxes_by_reachability,
    gated_attention,
    refine_cams,
    sinkhorn_scaling,
)
from wsss_pipeline.cam.scores import assemble, upscale_cams


def attention(cells: int, seed: int = 0) -> torch.Tensor:
    """Row-stochastic float64, well away from uniform."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(cells, cells, generator=generator, dtype=torch.float64), dim=1)


def test_refined_cams_equal_the_definition_with_whole_matrices() -> None:
    weights = attention(20)
    cams = torch.rand(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    normalised = weights.clone()
    for _ in range(3):
        normalised /= normalised.sum(dim=0, keepdim=True)
        normalised /= normalised.sum(dim=1, keepdim=True)
    symmetric = (normalised + normalised.T) / 2
    masks = box_masks(cams, 0.6).double()
    expected = torch.stack(
        [
            (((symmetric @ symmetric) * mask.flatten()) @ cam.flatten()).view(4, 5)
            for cam, mask in zip(cams, masks, strict=True)
        ]
    )
    assert torch.allclose(refine_cams(cams, weights, 0.6, rounds=3), expected, atol=1e-12)
    assert not torch.allclose(refine_cams(cams, weights, 0.6, rounds=1), expected, atol=1e-4)
    masked = (cams * masks).flatten(1)
    for iterations in (1, 3):
        power = torch.linalg.matrix_power(symmetric, iterations)
        refined = refine_cams(cams, weights, 0.6, iterations)
        assert torch.allclose(refined.flatten(1), masked @ power.T, atol=1e-12)


def test_many_sinkhorn_rounds_make_it_doubly_stochastic() -> None:
    weights = attention(12)
    rows, columns = sinkhorn_scaling(weights, 200)
    scaled = rows[:, None] * weights * columns
    assert torch.allclose(scaled.sum(dim=0), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(scaled.sum(dim=1), torch.ones(12, dtype=torch.float64))


def test_cells_that_nobody_attends_to_do_not_spoil_the_rest() -> None:
    weights = attention(12).float()
    weights[:, 3] = 0
    weights[5] = 0
    cams = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2))
    refined = refine_cams(cams, weights, 0.1).flatten(1)
    # the cell that attends to nobody and the one that nobody attends to still have their other half
    assert (refined > 0).all()
    rows, columns = sinkhorn_scaling(weights, 3)
    scaled = rows[:, None] * weights * columns
    assert torch.allclose(scaled.sum(dim=1)[torch.arange(12) != 5], torch.ones(11))
    assert not scaled[5].any()
    assert not scaled[:, 3].any()


def boxes(drawing: str, threshold: float = 0.5) -> str:
    """The box mask of a drawing in which # is 1 and + is 0.5, drawn the same way."""
    rows = drawing.split()
    values = {"#": 1.0, "+": 0.5, ".": 0.0}
    cam = torch.tensor([[values[cell] for cell in row] for row in rows])[None] * 0.9999999
    found = box_masks(cam, threshold)[0]
    return " ".join("".join("#" if cell else "." for cell in row) for row in found)


def test_boxes_are_unions_over_parts() -> None:
    assert boxes("#.... .#... ..... ..... .....") == "##... ##... ..... ..... ....."  # corners connect
    assert boxes("#.... ..... ..#.. ...#. .....") == "#.... ..... ..##. ..##. ....."
    assert boxes("###.. #.#.. ###.. ..... .....") == "###.. ###.. ###.. ..... ....."


def test_no_box_reaches_the_last_row_or_column() -> None:
    assert boxes("...#. ...## ..... ..### ..###") == "...#. ...#. ..... ..##. ....."
    assert boxes("..... ..... ..... ..... #####") == "..... ..... ..... ..... ....."
    assert boxes("....# ....# ..... ..... .....") == "..... ..... ..... ..... ....."


def test_the_threshold_is_relative_and_strict() -> None:
    # the peak is 254 steps, half of it 127: the + cells have exactly 127 and stay out
    assert boxes("#+... ..... ..... ..... .....", threshold=0.5) == "#.... ..... ..... ..... ....."
    assert boxes("#+... ..... ..... ..... .....", threshold=0.49) == "##... ..... ..... ..... ....."


def test_an_empty_map_has_no_box() -> None:
    assert not box_masks(torch.zeros(1, 4, 4), 0.4).any()


def test_upscaling_normalises_before_it_and_not_after() -> None:
    cams = torch.zeros(1, 3, 3)
    cams[0, 1, 1] = 7.0
    found = upscale_cams(cams, (4, 4))
    assert found.shape == (1, 4, 4)
    # the nearest pixels lie 3/8 of a cell off the centre of the middle cell, both ways
    assert abs(float(found.max()) - (5 / 8) ** 2) < 1e-5
    assert upscale_cams(cams, (3, 3)).max() > 0.999


def test_the_background_is_what_the_largest_class_leaves() -> None:
    cams = torch.tensor([[[0.25, 0.5]], [[0.75, 0.0]]])
    assert torch.equal(assemble(cams), torch.tensor([[[0.25, 0.5]], [[0.25, 0.5]], [[0.75, 0.0]]]))
    assert torch.equal(assemble(cams, 2.0), torch.tensor([[[0.0625, 0.25]], [[0.25, 0.5]], [[0.75, 0.0]]]))


def test_boxes_by_matrix_products_are_those_by_labelling() -> None:
    generator = torch.Generator().manual_seed(3)
    foregrounds = [torch.rand((6, 9, 13), generator=generator) < share for share in (0.05, 0.2, 0.4, 0.9)]
    foregrounds += [torch.zeros((2, 5, 5), dtype=torch.bool), torch.ones((1, 4, 6), dtype=torch.bool)]
    rows = [
        "########.",
        ".......#.",
        ".#####.#.",
        ".#...#.#.",
        ".#.#.#.#.",
        ".#.###.#.",
        ".#.....#.",
        ".#######.",
    ]
    foregrounds.append(torch.tensor([[[cell == "#" for cell in row] for row in rows]]))
    for foreground in foregrounds:
        assert torch.equal(boxes_by_reachability(foreground), boxes_by_labelling(foreground))


def test_each_class_has_a_threshold_of_its_own() -> None:
    cams = torch.zeros(2, 4, 4)
    cams[0, 0, 0], cams[0, 2, 2], cams[1, 1, 1] = 1.0, 0.39, 0.1
    masks = box_masks(cams, 0.4)
    assert masks[0].nonzero().tolist() == [[0, 0]]
    assert masks[1].nonzero().tolist() == [[1, 1]]
    assert masks.dtype == torch.float32
    assert box_masks(cams.double(), 0.4).dtype == torch.float64
    assert box_masks(cams, 0.38)[0].nonzero().tolist() == [[0, 0], [2, 2]]


def test_the_gate_takes_layers_that_look_at_patches_as_much_as_their_mean() -> None:
    layers = torch.stack([attention(6, seed).float() * share for seed, share in enumerate((0.9, 0.2, 0.8))])
    gate = torch.rand(6, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        gated_attention(layers, gate), layers[[0, 2]].mean(dim=0) * gate, rtol=1e-4, atol=0
    )
    # rounding doesn't choose among layers that are alike
    alike = layers[:1].expand(7, -1, -1)
    torch.testing.assert_close(gated_attention(alike, gate), layers[0] * gate, rtol=1e-4, atol=0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_refined_cams_and_boxes_are_those_published_for_excel(folder: Path) -> None:
    """By attention with the mean of the last six layers; boxes are given by their ends, exclusive."""
    with np.load(folder / "functions.npz") as file:
        cases = {key: torch.from_numpy(values) for key, values in file.items()}
    cams = cases["aff_cam"].T[cases["aff_ids"]].reshape(-1, 6, 6)
    weights = cases["aff_attention"][-6:, 1:, 1:].mean(dim=0)
    for threshold in (0.4, 0.7, 0.75, 0.79, 0.88):
        expected = cases[f"aff_static_{threshold}"]
        assert (refine_cams(cams, weights, threshold) - expected).abs().max() < 1e-5
    for number, map_ in enumerate(cases["box_maps"]):
        for threshold in (0.4, 0.79):
            expected = torch.zeros(8, 8)
            for left, top, right, bottom in cases[f"box_{number}_{threshold}"].tolist():
                expected[top:bottom, left:right] = 1
            assert torch.equal(box_masks(map_[None], threshold)[0], expected)
