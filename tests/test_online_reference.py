"""Training of WeCLIP and ExCEL against the published code's own numbers, stage by stage and update by update.

The files under tests/golden hold what the published code computes on CPU in float32 for two small pictures, with a
seeded vision tower, texts and decoder. A folder named by WSSS_GOLDEN holds the same of larger ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.online_golden import (
    GOLDEN,
    Published,
    differing,
    gradient_differences,
    largest,
    pixels,
    published,
)
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.scores import assemble, normalise_cams, upscale_cams
from wsss_pipeline.config import ParConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.images import read_image
from wsss_pipeline.refine.par import propagate
from wsss_pipeline.segmentation.train_config import OptimisationConfig
from wsss_pipeline.segmentation.trainer import schedule

LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden photographs"
)
SIZES = ["small", pytest.param("large", marks=needs_large)]
NAMES = {
    ("weclip", "small"): ("motorcycle", "astronaut"),
    ("weclip", "large"): ("motorcycle", "chelsea_crop", "coffee_crop"),
    ("excel", "small"): ("motorcycle", "astronaut"),
    ("excel", "large"): ("motorcycle", "chelsea_crop", "coffee_crop"),
}
# first update, then those from which the network helps, then those from which it teaches itself
PHASES = {
    "weclip": {"step_early": 1, "step_late": 9145},
    "excel": {"step_early": 1, "step_lvc": 14001, "step_self": 24001},
}


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as context:
        yield context


def load(name: str, size: str, patch: pytest.MonkeyPatch) -> Published:
    if size == "small":
        return published(name, patch)
    return published(name, patch, LARGE / name, LARGE / "clip_es" / "model")


def labels_of(system: Published, name: str) -> list[int]:
    class_set = load_class_set("voc12")
    labels = json.loads((system.folder / "labels.json").read_text())[name]
    return sorted(map(class_set.index, labels))


def stored(tensor: Tensor, rows: Tensor) -> Tensor:
    """Of patch tokens in their order, those rows of all tokens that aren't the class token."""
    return tensor[..., rows[rows > 0] - 1, :]


def test_stages_of_weclip(size: str, patch: pytest.MonkeyPatch) -> None:
    system = load("weclip", size, patch)
    for name in NAMES["weclip", size]:
        golden = system.golden(f"{name}_voc")
        present = [[int(value) + 1 for value in golden["label_ids"]]]
        images = pixels(golden["crop"])[None]
        network, method = system.network, system.method
        with torch.no_grad():
            encoded = network.encode(images, attention="layers", last_layers=12)
            outputs = network.decode(encoded)
        if "features_rows" in golden:
            rows = golden.get("features_index", golden["rows"]).long()
            features = torch.stack(encoded.layers)[:, 0]
            expected = golden["features_rows"][:, rows > 0]
            assert largest(stored(features, rows), expected, relative=True) < 1e-4
            rows = golden["rows"].long()
            attention = encoded.features.attention[:, 0]
            expected = golden["attention_rows"][:, rows > 0][..., 1:]
            assert largest(stored(attention, rows), expected, relative=True) < 1e-4
            gate = outputs["similarity"][0].sigmoid()[rows[1:] - 1]
            assert largest(gate, golden["affinity_rows"]) < 1e-5
        assert largest(outputs["fused"][0], golden["fused"], relative=True) < 1e-4
        assert largest(outputs["logits"][0], golden["logits"], relative=True) < 1e-4
        texts = torch.cat([method._foreground[[value - 1 for value in present[0]]], method._background])
        raw = softmax_gradcam(encoded.features, [texts], [len(present[0])], method._logit_scale)[0]
        assert largest(normalise_cams(raw), golden["gradcam"]) < 1e-4
        (static,) = method.cams(encoded.features, present)
        (gated,) = method.cams(encoded.features, present, gate=outputs["similarity"].sigmoid())
        assert largest(static, golden["refined_static"], relative=True) < 1e-4
        assert largest(gated, golden["refined_gated"], relative=True) < 1e-4
        side, stride = images.shape[-1], int(golden["stride"])
        scores = assemble(upscale_cams(static, (side, side)))
        assert largest(scores[:, ::stride, ::stride], golden["scores_static"]) < 1e-3
        refined = propagate(images, scores[None], ParConfig())[0]
        assert largest(refined[:, ::stride, ::stride], golden["par_static"]) < 1e-3
        within = torch.zeros(1, side, side, dtype=torch.bool)
        full = {**outputs, "encoded": encoded, "grid_logits": outputs["logits"]}
        for update, key in ((9144, "pseudo_static"), (9145, "pseudo_gated")):
            mask, confidence = system.target(images, full, present, within, update)
            assert differing(mask[0], golden[key]) < 1e-3
            assert confidence.min() > 0


@pytest.mark.parametrize("name", ["motorcycle", "astronaut"])
def test_stages_of_excels_decoder(name: str, patch: pytest.MonkeyPatch) -> None:
    system = published("excel", patch)
    golden = system.golden(f"{name}_voc")
    tolerance = 1e-4 if golden["input"].dtype == torch.float32 else 1.1e-3
    present = [[int(value) + 1 for value in golden["label_ids"]]]
    network, method = system.network, system.method
    images = golden["input"][None].float()
    with torch.no_grad():
        encoded = network.encode(images, **method.encoding)
        outputs = network.decode(encoded)
        similarity = outputs["similarity"]
        both = network.encode(torch.cat([images, images.flip(-1)]), **method.encoding)
        beside = network.decode(both, batch_mean=True)["similarity"]
    if "features_rows" in golden:
        rows = golden["features_index"].long()
        features = torch.stack(encoded.layers)[:, 0]
        assert largest(stored(features, rows), golden["features_rows"][:, rows > 0], relative=True) < 1e-4
    assert largest(outputs["fused"][0], golden["fused"], relative=True) < tolerance
    assert largest(outputs["logits"][0], golden["logits"], relative=True) < tolerance
    rows = golden["rows"].long()
    gate = similarity.sigmoid()
    assert largest(gate[0][rows[1:] - 1], golden["affinity_rows"]) < (1e-5 if tolerance < 1e-3 else 1e-3)
    features, lvc = encoded.features, method._maps(encoded.features, similarity)
    assert largest(lvc[0, :20].T, golden["cam_lvc"]) < tolerance
    for guide, key in ((None, "refined_gated"), (similarity, "refined_gated_lvc")):
        (refined,) = method.cams(features, present, gate=gate, guide=guide)
        assert largest(refined, golden[key], relative=True) < tolerance
    # a picture beside its mirror image, by the mean of both as published
    mirrored = method.mirrored_maps(method._maps(both.features, beside), both.features.grid)
    assert largest(mirrored[0, :20].T, golden["cam_lvc_flip"]) < 10 * tolerance
    (refined,) = method._spread(mirrored, both.features, present, gate)
    assert largest(refined, golden["refined_gated_lvc_flip"], relative=True) < tolerance


@pytest.mark.parametrize("name", PHASES)
def test_an_update_in_each_phase(name: str, size: str, patch: pytest.MonkeyPatch) -> None:
    """Pseudo masks as they come out; losses and gradients with the published ones."""
    system = load(name, size, patch)
    first = system.golden("step_early")
    if name == "weclip":
        present = [labels_of(system, picture) for picture in NAMES[name, size][:2]]
    else:
        present = [[int(value) + 1 for value in first[f"label_ids_{number}"]] for number in (0, 1)]
    for phase, update in PHASES[name].items():
        golden = system.golden(phase)
        step = system.step(first["crops"], present, update)
        assert differing(step.mask, golden["pseudo"]) <= 1e-3, phase
        assert largest(step.outputs["grid_logits"], golden["logits"], relative=True) < 1e-4
        step = system.step(first["crops"], present, update, golden["pseudo"])
        assert step.losses["segmentation"] == pytest.approx(float(golden["loss_seg"]), rel=1e-5)
        assert step.losses["affinity"] == pytest.approx(0.1 * float(golden["loss_aff"]), rel=1e-5)
        assert sum(step.losses.values()) == pytest.approx(float(golden["loss"]), rel=1e-5)
        by_norm, by_value, count = gradient_differences(step, golden)
        assert by_norm < 1e-5, phase
        assert by_value < 1e-5, phase
        assert count == len(step.gradients) == (84 if name == "weclip" else 88)
    assert not differing(system.step(first["crops"], present, 1).mask, first["pseudo"]) > 1e-3
    late = list(PHASES[name].values())[1]
    before, after = (system.step(first["crops"], present, update).mask for update in (late - 1, late))
    assert (before != after).any(), "the network's help changes nothing"


def test_logits_of_several_scales_of_weclip(size: str, patch: pytest.MonkeyPatch) -> None:
    """As its test adds them up: at each scale the mean of picture and mirror image, on the grid of the first."""
    system = load("weclip", size, patch)
    golden = system.golden("test")
    height, width = golden["input_sizes"].tolist()[0]
    picture = pixels(golden["picture_rgb"])[None]
    first = F.interpolate(picture, (height, width), mode="bilinear", align_corners=False)
    second = F.interpolate(first, scale_factor=0.75, mode="bilinear", align_corners=False)
    total = torch.zeros(1, 21, *golden["logits_multi"].shape[1:])
    for scaled, key in ((first, "logits_1"), (second, "logits_075")):
        both = torch.cat([scaled, scaled.flip(-1)])
        logits = logits_of_whole_patches(system, both)
        assert largest(logits, golden[key], relative=True) < 1e-4
        mean = (logits[:1] + logits[1:].flip(-1)) / 2
        total += F.interpolate(mean, total.shape[2:], mode="bilinear", align_corners=False) / 2
    assert largest(total[0], golden["logits_multi"], relative=True) < 1e-4
    size = golden["mask_multi"].shape
    upscaled = F.interpolate(total, size, mode="bilinear", align_corners=False)
    assert differing(upscaled[0].argmax(dim=0), golden["mask_multi"]) < 1e-3
    # the masks of the whole picture with the decoder's gate
    height, width = (side // 16 * 16 for side in first.shape[2:])
    with torch.no_grad():
        encoded = system.network.encode(first[..., :height, :width], **system.method.encoding)
        gate = system.network.decode(encoded)["similarity"].sigmoid()
        with np.load(system.folder / "test.npz") as file:
            present = [labels_of(system, str(file["picture"]))]
        (refined,) = system.method.cams(encoded.features, present, gate=gate)
        assert largest(refined, golden["refined_val"], relative=True) < 1e-4
        scores = assemble(upscale_cams(refined, golden["pseudo_val"].shape))
        posterior = propagate(first, scores[None], ParConfig())[0]
    values = torch.tensor([0, *present[0]])
    assert differing(values[posterior.argmax(dim=0)], golden["pseudo_val"]) < 1e-3


def logits_of_whole_patches(system: Published, images: Tensor) -> Tensor:
    """On CLIP's grid; the published code sees nothing of a remainder at the right and below, ours pads it."""
    height, width = (side // 16 * 16 for side in images.shape[2:])
    with torch.no_grad():
        return system.network.logits(images[..., :height, :width])


def test_logits_of_several_scales_of_excel(size: str, patch: pytest.MonkeyPatch) -> None:
    """Squares of four sizes, scaled up before they are added; the mirror image at all but the first."""
    system = load("excel", size, patch)
    golden = system.golden("multiscale")
    side = 96 if size == "small" else 320
    with np.load(system.folder / "multiscale.npz") as file:
        name = str(file["picture"])
    image = read_image(system.folder / "images" / f"{name}.png")
    picture = pixels(torch.from_numpy(image.copy()))[None]
    total = torch.zeros(1, 21, *image.shape[:2])
    for scale in (1.0, 0.7, 1.2, 1.5):
        length = int(side * scale)
        square = F.interpolate(picture, (length, length), mode="bilinear", align_corners=False)
        logits = logits_of_whole_patches(system, torch.cat([square, square.flip(-1)]))
        logits = F.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        total += logits[:1] if scale == 1 else (logits[:1] + logits[1:].flip(-1)) / 2
    stride = int(golden["stride"])
    assert largest(total[0, :, ::stride, ::stride] / 4, golden["logits"], relative=True) < 1e-4
    assert differing(total[0].argmax(dim=0), golden["mask"]) < 1e-3


def test_learning_rates_are_the_published_ones() -> None:
    with np.load(GOLDEN / "weclip" / "functions.npz") as file:
        steps, rates = file["lr_steps"], file["lr_voc"]
    config = OptimisationConfig(schedule="poly-total", power=1.0, warm_up=50, iterations=30_000)
    assert [2e-3 * schedule(int(step), config) for step in steps] == pytest.approx(list(rates), abs=1e-12)
    with np.load(GOLDEN / "excel" / "functions.npz") as file:
        steps, voc, coco = file["lr_steps"], file["lr_voc"], file["lr_coco"]
    for rates, warm_up, iterations in ((voc, 50, 30_000), (coco, 200, 100_000)):
        config = OptimisationConfig(schedule="poly-total", power=1.0, warm_up=warm_up, iterations=iterations)
        assert [1e-3 * schedule(int(step), config) for step in steps] == pytest.approx(list(rates), abs=1e-12)
