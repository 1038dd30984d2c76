"""PAR against what its published code gave, its parts against their definition, and what callers may rely on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.config import MaskConfig, ParConfig, resolve
from wsss_pipeline.data.images import read_image
from wsss_pipeline.errors import ConfigError, ImageError
from wsss_pipeline.refine import Par, label, load_refiner, par
from wsss_pipeline.refine.par import propagate, propagate_in_torch

SMALL = Path(__file__).parent.parent / "golden" / "excel"
LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere")) / "excel"
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden photographs"
)
FOLDERS = [SMALL, pytest.param(LARGE, marks=needs_large)]
PICTURES = [(SMALL, "astronaut"), (SMALL, "motorcycle")] + [
    pytest.param(LARGE, name, marks=needs_large) for name in ("motorcycle", "chelsea_crop", "coffee_crop")
]
AROUND = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]

both_forms = pytest.mark.parametrize("form", [propagate, propagate_in_torch], ids=["compiled", "in torch"])


def golden(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def tensor(array: np.ndarray) -> torch.Tensor:
    """With a batch of one."""
    return torch.from_numpy(array).float()[None]


def drawn(labels: int, height: int, width: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W) in 0..255 and scores (B, L, H, W)."""
    generator = torch.Generator().manual_seed(labels + height * width)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator).float()
    return images, torch.rand((batch, labels, height, width), generator=generator)


def by_definition(image: np.ndarray, scores: np.ndarray, parameters: ParConfig) -> np.ndarray:
    """One pixel after the other in double precision: image (3, H, W), scores (L, H, W)."""
    _, height, width = image.shape
    steps = [(a * by, b * by) for by in parameters.dilations for a, b in AROUND]
    near = np.array([by * (1 if 0 in way else math.sqrt(2)) for by in parameters.dilations for way in AROUND])
    scaled = (near / near.std(ddof=1) / parameters.width) ** 2
    nearness = np.exp(scaled.min() - scaled)
    nearness *= parameters.distance_weight / nearness.sum()
    weights = {}
    for y, x in np.ndindex(height, width):
        places = [(min(max(y + a, 0), height - 1), min(max(x + b, 0), width - 1)) for a, b in steps]
        colours = np.array([image[:, r, c] for r, c in places], np.float64)
        deviation = colours.std(axis=0, ddof=1)
        logits = -(((colours - image[:, y, x]) / (deviation + 1e-8) / parameters.width) ** 2).mean(axis=1)
        alike = np.exp(logits - logits.max())
        weights[y, x] = places, alike / alike.sum() + nearness
    values = scores.astype(np.float64)
    for _ in range(parameters.iterations):
        after = np.zeros_like(values)
        for (y, x), (places, of_pixel) in weights.items():
            for (r, c), weight in zip(places, of_pixel, strict=True):
                after[:, y, x] += weight * values[:, r, c]
        values = after
    return values


@both_forms
@pytest.mark.parametrize(
    ("given", "expected", "settings"),
    [
        ("par_in_2", "par_out_2", {}),
        ("par_in_5", "par_out_5", {}),
        ("par_in_2", "par_out_2_1iter", {"iterations": 1}),
        ("par_in_2", "par_out_2_d124_3iter", {"iterations": 3, "dilations": (1, 2, 4)}),
    ],
)
@pytest.mark.parametrize("folder", FOLDERS)
def test_published_scores_within_1e_5(
    folder: Path, given: str, expected: str, settings: dict[str, Any], form: Any
) -> None:
    cases = golden(folder, "functions")
    images, scores = tensor(cases["par_image"]), tensor(cases[given])
    if form is propagate_in_torch:
        images = F.interpolate(images, scores.shape[2:], mode="bilinear", align_corners=True)
    found = form(images, scores, ParConfig(**settings))
    assert found.dtype == torch.float32
    assert np.abs(found[0].numpy() - cases[expected]).max() < 1e-5


@pytest.mark.parametrize(("folder", "name"), PICTURES)
def test_published_masks_from_the_squashed_picture_that_par_was_given(folder: Path, name: str) -> None:
    expected = golden(folder, f"{name}_voc")
    height, width = expected["size_hw"].tolist()
    every = int(expected["stride"])
    scores = assemble(upscale_cams(torch.from_numpy(expected["cam_refined"]), (height, width)))
    assert np.abs(scores[:, ::every, ::every].numpy() - expected["scores"]).max() < 1e-5
    refined = propagate(tensor(expected["input"]), scores[None], ParConfig())[0]
    assert np.abs(refined[:, ::every, ::every].numpy() - expected["par"]).max() < 1e-3
    values = np.array([0, *(expected["label_ids"] + 1)])
    assert (values[refined.argmax(dim=0)] == expected["mask"]).mean() >= 0.999


@pytest.mark.parametrize(("folder", "name"), PICTURES)
def test_the_refiner_sees_the_picture_at_its_own_size_and_gives_nearly_the_published_mask(
    folder: Path, name: str
) -> None:
    expected = golden(folder, f"{name}_voc")
    image = read_image(folder / "images" / f"{name}.png")
    size = image.shape[0], image.shape[1]
    scores = assemble(upscale_cams(torch.from_numpy(expected["cam_refined"]), size))
    (posterior,) = Par(ParConfig())([image], [scores])
    mask, _ = label(posterior, (expected["label_ids"] + 1).tolist(), size)
    assert (mask.numpy() == expected["mask"]).mean() > 0.975


@both_forms
@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (2, 3), (7, 60)])
def test_is_what_the_definition_says_at_any_size(size: tuple[int, int], form: Any) -> None:
    parameters = ParConfig(iterations=2)
    images, scores = drawn(3, *size)
    expected = by_definition(images[0].numpy(), scores[0].numpy(), parameters)
    assert np.abs(form(images, scores, parameters)[0].numpy() - expected).max() < 1e-5


@both_forms
@pytest.mark.parametrize(
    "settings",
    [
        {"dilations": (3,)},
        {"dilations": (5, 1)},
        {"width": 2.0},
        {"distance_weight": 1.5},
        {"distance_weight": 0.0},
        {"iterations": 3},
    ],
)
def test_every_setting_is_what_the_definition_says(settings: dict[str, Any], form: Any) -> None:
    parameters = ParConfig(**{"iterations": 1, "dilations": (1, 2, 4), **settings})
    images, scores = drawn(2, 9, 11)
    expected = by_definition(images[0].numpy(), scores[0].numpy(), parameters)
    assert np.abs(form(images, scores, parameters)[0].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("labels", [1, 4])
def test_the_compiled_form_equals_the_one_in_torch(labels: int) -> None:
    images, scores = drawn(labels, 70, 83, batch=2)
    smooth = F.avg_pool2d(images, 9, stride=1, padding=4)
    expected = propagate_in_torch(smooth, scores, ParConfig())
    assert (propagate(smooth, scores, ParConfig()) - expected).abs().max() < 1e-5


@both_forms
def test_images_of_a_batch_get_what_each_gets_alone(form: Any) -> None:
    images, scores = drawn(2, 20, 31, batch=3)
    together = form(images, scores, ParConfig())
    alone = [form(image[None], score[None], ParConfig()) for image, score in zip(images, scores, strict=True)]
    assert (together - torch.cat(alone)).abs().max() < 1e-6


@both_forms
def test_labels_do_not_see_each_other(form: Any) -> None:
    images, scores = drawn(3, 12, 17)
    together = form(images, scores, ParConfig())
    for index in range(3):
        alone = form(images, scores[:, index, None], ParConfig())
        assert torch.equal(together[:, index, None], alone)


@both_forms
def test_no_iterations_leave_the_scores(form: Any) -> None:
    images, scores = drawn(2, 6, 7)
    assert torch.equal(form(images, scores, ParConfig(iterations=0)), scores)


@both_forms
@pytest.mark.parametrize("colour", [0.0, 0.1, 77.0])
def test_on_an_image_of_one_colour_all_neighbours_weigh_alike(colour: float, form: Any) -> None:
    _, scores = drawn(2, 10, 12)
    parameters = ParConfig(iterations=1, dilations=(1,), distance_weight=0.0)
    around = F.pad(scores, (1,) * 4, mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    expected = (around.sum(dim=(4, 5)) - scores) / 8
    assert (form(torch.full((1, 3, 10, 12), colour), scores, parameters) - expected).abs().max() < 1e-6


@both_forms
def test_a_pixel_unlike_neighbours_that_are_all_alike_gets_their_mean(form: Any) -> None:
    images = torch.zeros(1, 3, 5, 5)
    images[:, :, 2, 2] = 255  # the deviation among its neighbours is 0
    scores = torch.zeros(1, 1, 5, 5)
    scores[..., 1, 1:4] = 1
    found = form(images, scores, ParConfig(iterations=1, dilations=(1,), distance_weight=0.0))
    assert found[0, 0, 2, 2].item() == pytest.approx(3 / 8)


@both_forms
def test_scale_and_offset_of_a_channel_do_not_matter(form: Any) -> None:
    images, scores = drawn(2, 14, 18)
    mean, deviation = (
        torch.tensor([[[123.0]], [[116.0]], [[103.0]]]),
        torch.tensor([[[58.0]], [[57.0]], [[9.0]]]),
    )
    one, other = (form(values, scores, ParConfig()) for values in (images, (images - mean) / deviation))
    assert (one - other).abs().max() < 1e-4


@both_forms
def test_constant_scores_grow_by_the_sum_of_the_weights(form: Any) -> None:
    images, scores = drawn(1, 13, 15)
    found = form(images, torch.ones_like(scores), ParConfig())
    assert torch.allclose(found, torch.tensor(1.01**20), rtol=1e-4)


def test_an_image_of_another_size_is_resized_with_aligned_corners() -> None:
    images, _ = drawn(1, 9, 13)
    _, scores = drawn(2, 5, 7)
    expected = propagate(images[:, :, ::2, ::2], scores, ParConfig())
    assert (propagate(images, scores, ParConfig()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_any_dtype_is_worked_on_in_single_precision(dtype: torch.dtype) -> None:
    images, scores = drawn(2, 8, 9)
    images, scores = images.to(dtype), (scores * 200).to(dtype)
    found = propagate(images, scores, ParConfig())
    assert found.dtype == torch.float32
    assert torch.equal(found, propagate(images.float(), scores.float(), ParConfig()))


@both_forms
def test_what_is_no_number_spreads_to_what_it_reaches_and_to_its_label_alone(form: Any) -> None:
    images, scores = drawn(2, 9, 40)
    scores[0, 1, 4, 20] = torch.nan
    found = form(images, scores, ParConfig(iterations=1, dilations=(2,)))
    places = {(4 + 2 * down, 20 + 2 * right) for down, right in AROUND}
    assert {tuple(place) for place in found[0, 1].isnan().nonzero().tolist()} == places
    assert not found[0, 0].isnan().any()


@both_forms
def test_a_colour_that_is_no_number_spoils_the_pixels_that_see_it(form: Any) -> None:
    images, scores = drawn(1, 9, 40)
    images[0, 1, 4, 20] = torch.nan
    found = form(images, scores, ParConfig(iterations=1, dilations=(2,)))
    places = {(4 + 2 * down, 20 + 2 * right) for down, right in [*AROUND, (0, 0)]}
    assert {tuple(place) for place in found[0, 0].isnan().nonzero().tolist()} == places


@both_forms
@pytest.mark.parametrize("width", [0.01, 0.1, 100.0])
def test_weights_of_any_size_are_what_the_definition_says(width: float, form: Any) -> None:
    parameters = ParConfig(iterations=1, dilations=(1, 4), width=width, distance_weight=0.0)
    images, scores = drawn(2, 12, 9)
    expected = by_definition(images[0].numpy(), scores[0].numpy(), parameters)
    assert np.abs(form(images, scores, parameters)[0].numpy() - expected).max() < 1e-4


def test_a_posterior_that_is_no_number_is_marked_and_so_refused() -> None:
    scores = torch.full((2, 6, 6), 0.5)
    scores[0, 3, 3] = torch.nan
    (posterior,) = Par(ParConfig())([np.zeros((6, 6, 3), np.uint8)], [scores])
    assert (label(posterior, [1], (6, 6))[1] == 255).any()


@both_forms
def test_arguments_stay_as_they_were_and_need_not_be_contiguous(form: Any) -> None:
    images, scores = drawn(2, 11, 16)
    kept = images.clone(), scores.clone()
    expected = form(images, scores, ParConfig())
    across = [values.transpose(2, 3).contiguous().transpose(2, 3) for values in (images, scores)]
    assert torch.equal(form(*across, ParConfig()), expected)
    assert torch.equal(images, kept[0])
    assert torch.equal(scores, kept[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_what_the_cpu_gives() -> None:
    images, scores = drawn(3, 60, 80, batch=2)
    found = propagate(images.cuda(), scores.cuda(), ParConfig())
    assert found.is_cuda
    assert (found.cpu() - propagate(images, scores, ParConfig())).abs().max() < 1e-5
    (posterior,) = Par(ParConfig())([np.zeros((60, 80, 3), np.uint8)], [scores[0].cuda()])
    assert posterior.is_cuda


def test_no_gradient_is_kept() -> None:
    images, scores = drawn(2, 5, 6)
    assert not propagate(images, scores.requires_grad_(), ParConfig()).requires_grad


def test_the_refiner_gives_shares_of_the_refined_scores() -> None:
    refine, sizes = Par(ParConfig()), [(21, 30), (17, 12)]
    given = [drawn(labels, *size) for labels, size in zip((3, 1), sizes, strict=True)]
    images = [image[0].byte().permute(1, 2, 0).numpy()[::-1] for image, _ in given]
    posteriors = refine(images, [scores[0].flip(1).half() for _, scores in given])
    for posterior, (image, scores) in zip(posteriors, given, strict=True):
        refined = propagate(image.flip(2), scores.flip(2).half(), ParConfig())[0]
        assert posterior.dtype == torch.float32
        assert (posterior.argmax(dim=0) == refined.argmax(dim=0)).all()
        assert (posterior - refined / refined.sum(dim=0)).abs().max() < 1e-5
        assert (posterior.sum(dim=0) - 1).abs().max() < 1e-6
    assert (posteriors[1] == 1).all()


@pytest.mark.parametrize("pixels", [1, 300, 2**20])
def test_images_of_all_sizes_and_numbers_of_labels_get_what_each_gets_alone(
    pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many go together, here by the form in torch."""
    monkeypatch.setattr(par, "propagate", propagate_in_torch)
    refine, images, scores = Par(ParConfig(iterations=3)), [], []
    for number, shape in enumerate([(2, 9, 12), (3, 9, 12), (2, 9, 12), (2, 12, 9), (2, 9, 12)]):
        drawn_images, drawn_scores = drawn(*shape, batch=number + 1)  # the last differ
        images.append(drawn_images[-1].byte().permute(1, 2, 0).numpy())
        scores.append(drawn_scores[-1])
    images[2] = images[2].astype(np.float32) / 3
    alone = [refine([image], [score])[0] for image, score in zip(images, scores, strict=True)]
    monkeypatch.setattr(par, "PIXELS_TOGETHER", pixels)
    together = refine(images, scores)
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-6


def test_labels_follow_the_edge_of_the_image() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    scores = torch.full((2, 40, 60), 0.2)
    scores[0, :, :35] = scores[1, :, 35:] = 0.8  # five columns past the edge
    (posterior,) = Par(ParConfig())([image], [scores])
    assert (posterior.argmax(dim=0) == (torch.arange(60) >= 30)).all()


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (np.zeros((4, 5, 3), np.float64), (2, 4, 5)),
        (np.zeros((0, 5, 3), np.uint8), (2, 0, 5)),
        (np.zeros((4, 5, 3), np.uint8), (2, 5, 4)),
        (np.zeros((4, 5, 3), np.uint8), (0, 4, 5)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(image: np.ndarray, shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="PAR takes"):
        Par(ParConfig())([image], [torch.ones(shape)])


@pytest.mark.parametrize(
    "settings",
    [
        {"dilations": ()},
        {"dilations": (0,)},
        {"dilations": (257,)},
        {"dilations": (1.5,)},
        {"width": 0.0},
        {"iterations": -1},
        {"distance_weight": -0.1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        resolve(MaskConfig, [("here", {f"par.{key}": value for key, value in settings.items()})])


def test_it_is_named_by_refine_and_may_be_what_a_method_has() -> None:
    for chosen, default in (("par", "crf"), ("auto", "par")):
        config = MaskConfig.model_validate(
            {"refine": chosen, "crf": {"backend": "none"}, "par": {"width": 0.5}}
        )
        refiner = load_refiner(config, default)
        assert isinstance(refiner, Par)
        assert refiner.determinants() == {
            "par": {
                "iterations": 20,
                "dilations": [1, 2, 4, 8, 12, 24],
                "width": 0.5,
                "distance_weight": 0.01,
            }
        }
        assert refiner.description == "PAR: 20 iterations"
