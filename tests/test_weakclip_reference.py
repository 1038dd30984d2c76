"""WeakCLIP's network beside the published code's own numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.online_golden import largest
from tests.weakclip_golden import (
    GOLDEN,
    expected_norms,
    gradient_norms,
    own_names,
    own_value,
    pixels,
    published_network,
)
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.data.images import read_image
from wsss_pipeline.segmentation.weakclip import WeakClip

LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden photographs"
)
both = pytest.mark.parametrize(
    "large", [None, pytest.param(LARGE, marks=needs_large)], ids=["small", "large"]
)


def stored(large: Path | None, name: str) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Arrays of the small set's only file of these, or of one of the large set's."""
    file = GOLDEN / "weakclip" / "golden.npz" if large is None else large / "weakclip" / f"{name}.npz"
    with np.load(file) as arrays:
        return dict(arrays)


def seen(network: WeakClip, images: Tensor) -> dict[str, Tensor]:
    """What all parts of the network make of images, by the names of the golden files."""
    found: dict[str, Tensor] = {}
    decoder: Any = network.model["decoder"]
    vision: Any = network.model["vision"]
    hooks = [
        vision.vision_model.pre_layrnorm.register_forward_hook(
            lambda _, __, output: found.update(embedded=output)
        ),
        decoder.coattention.register_forward_hook(
            lambda _, inputs, outputs: found.update(
                tokens=inputs[0], text=inputs[1], text_diff=outputs[0], visual_diff=outputs[1]
            )
        ),
        decoder.coattention.memory.register_forward_hook(lambda _, __, output: found.update(memory=output)),
        decoder.coattention.queries.register_forward_hook(lambda _, __, output: found.update(queries=output)),
        decoder.neck.register_forward_hook(
            lambda _, __, outputs: found.update({f"neck{level}": x for level, x in enumerate(outputs)})
        ),
    ]
    with torch.no_grad():
        found |= network.decode(images)
        taps = Trunk(vision, rounded_positions=False, class_embeddings=2).encode(
            images, (3, 5, 7, 11), attention="none"
        )
    for hook in hooks:
        hook.remove()
    found |= {f"tap{level}": taps.taps[block] for level, block in enumerate((3, 5, 7, 11))}
    # the network doesn't make these: its neck has one convolution for an adapter's last and its own
    for level, adapt in enumerate(decoder.adapter):
        patches = found[f"tap{level}"][:, 1:].transpose(1, 2).unflatten(2, taps.grid)
        with torch.no_grad():
            found[f"pyramid{level}"] = adapt(patches)
        size = found[f"pyramid{level}"].shape[-2:]
        found[f"score_level{level}"] = F.interpolate(
            found["score"], size, mode="bilinear", align_corners=True
        )
    found |= {f"pyramid{level}_sum": found[f"pyramid{level}"].double().sum(dim=(2, 3)) for level in range(4)}
    found["text_updated"] = found["text"] + decoder.gamma.detach() * found["text_diff"]
    return found


BOUNDS = {
    **dict.fromkeys(("embedded", "text", "text_updated", "score"), 1e-5),
    **{f"score_level{level}": 1e-5 for level in range(4)},
    **{f"pyramid{level}_sum": 1e-3 for level in range(4)},
}


def cut(found: Tensor, expected: np.ndarray, name: str) -> Tensor:  # type: ignore[type-arg]
    """The part of a tensor that the golden files hold."""
    if name.startswith("tap"):
        return found[..., : expected.shape[-1]]
    if found.ndim == 4:
        step = found.shape[2] // expected.shape[2]
        return found[:, : expected.shape[1], ::step, ::step]
    return found


@pytest.mark.parametrize(
    ("large", "part"),
    [
        (None, "forward"),
        pytest.param(LARGE, "even", marks=needs_large),
        pytest.param(LARGE, "odd", marks=needs_large),
    ],
)
def test_each_part_of_the_network_is_the_published_one(large: Path | None, part: str) -> None:
    arrays, network = stored(large, "forward"), published_network(large)
    images = arrays["image"] if large is None else arrays[f"{part}/image"]
    found = seen(network, pixels(images))
    expected = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(f"{part}/")}
    expected.pop("image", None)
    assert expected.keys() <= found.keys()
    assert len(expected) == (14 if large is None else 30)
    differences = {
        name: largest(cut(found[name], value, name), torch.from_numpy(value))
        for name, value in expected.items()
    }
    assert not {name: value for name, value in differences.items() if value > BOUNDS.get(name, 1e-4)}


@needs_large
def test_the_position_table_is_brought_to_the_size_of_crops_first() -> None:
    arrays, network = stored(LARGE, "forward"), published_network(LARGE)
    table = network.state_dict()["model.vision.vision_model.embeddings.position_embedding.weight"]
    assert largest(table, torch.from_numpy(arrays["position_table"])) < 1e-6
    ids = torch.from_numpy(arrays["text_ids"])
    assert torch.equal(network.tokens, ids)
    assert torch.equal(network.ends, ids.argmax(dim=1) + 8)


def losses(outputs: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Seeding loss and weighted cross entropy of the score map, as the specification has them."""
    rows = torch.arange(64) * mask.shape[1] // 64
    columns = torch.arange(64) * mask.shape[2] // 64
    cues = mask[:, rows][:, :, columns]
    logits = F.interpolate(outputs["logits"], (64, 64), mode="bilinear")
    floored = logits.softmax(dim=1) + 1e-7
    logs = (floored / floored.sum(dim=1, keepdim=True)).log()
    own = -logs.gather(1, cues.clamp(max=logs.shape[1] - 1)[:, None])[:, 0]
    seeding = torch.zeros(())
    for part in (cues == 0, (cues > 0) & (cues < 255)):
        seeding = seeding + ((own * part).sum(dim=(1, 2)) / part.sum(dim=(1, 2)).clamp(min=1e-4)).mean()
    score = F.interpolate(outputs["score"] / 0.07, mask.shape[1:], mode="bilinear")
    entropy = F.cross_entropy(score, mask, ignore_index=255, reduction="sum") / mask.numel()
    return {"seeding": seeding, "score_ce": 0.4 * entropy}


@both
def test_each_parameter_gets_the_published_gradient_and_batch_norm_its_statistics(large: Path | None) -> None:
    """Of two of the three losses, which don't need a CRF; the largest relative difference of a norm is 1e-3."""
    arrays = stored(large, "train")
    prefix = "train/" if large is None else ""
    image = arrays["image"] if large is None else stored(large, "forward")["even/image"]
    mask = torch.from_numpy(arrays["train/mask" if large is None else "gt"]).long()
    network = published_network(large).train()
    told = expected_norms(GOLDEN / "weakclip" if large is None else LARGE / "weakclip")
    norms = {name: values for name, values in told["norms"].items() if name != "backbone.fpn1.1.bias"}
    state = dict(network.state_dict())
    found = losses(network.training_outputs(pixels(image)), mask)
    worst = {}
    for column, (name, loss) in enumerate(found.items(), start=1):
        assert float(loss.detach()) == pytest.approx(float(arrays[f"{prefix}loss_{name}"]), abs=1e-5)
        network.zero_grad()
        loss.backward(retain_graph=name == "seeding")
        for key, value in gradient_norms(network, list(norms)).items():
            expected = norms[key][column]
            assert (value == 0) == (expected is None), key
            if expected is not None:
                worst[key, name] = abs(value - expected) / expected
        if name == "seeding":
            assert all(parameter.grad is not None for parameter in network.parameters())
    assert not {key: value for key, value in worst.items() if value > 1e-3}
    assert all(own_names(name) == [] for name in told["no_gradient"])
    for key, after in arrays.items():
        if key.startswith(f"{prefix}after/"):
            (own,) = own_names(key.removeprefix(f"{prefix}after/"))
            assert largest(state[own], torch.from_numpy(after)) < 1e-5, key


@needs_large
def test_the_gradients_of_all_three_losses_are_the_published_ones() -> None:
    """With the published posterior of the CRF."""
    arrays, network = stored(LARGE, "train"), published_network(LARGE).train()
    outputs = network.training_outputs(pixels(stored(LARGE, "forward")["even/image"]))
    logits = F.interpolate(outputs["logits"], (64, 64), mode="bilinear")
    assert largest(logits, torch.from_numpy(arrays["z"])) < 1e-4
    floored = logits.softmax(dim=1) + 1e-7
    floored = floored / floored.sum(dim=1, keepdim=True)
    posterior = torch.from_numpy(arrays["crf_posterior"])
    boundary = (posterior * (posterior / floored).clamp(0.05, 20).log()).sum(dim=1).mean()
    found = losses(outputs, torch.from_numpy(arrays["gt"]).long())
    (boundary + torch.stack(list(found.values())).sum()).backward()
    parameters = dict(network.named_parameters())
    for key, value in arrays.items():
        if key.startswith("grad/"):
            name = key.removeprefix("grad/")
            (own,) = own_names(name)
            gradient, expected = parameters[own].grad, own_value(name, torch.from_numpy(value))
            assert gradient is not None
            # the published text tower sees 13 tokens, and has positions for no more
            assert not gradient[len(expected) :].any()
            assert largest(gradient[: len(expected)], expected, relative=True) < 1e-4, key


@pytest.mark.parametrize(
    ("setting", "score", "logits"),
    [("positions", 1e-3, 1e-2), ("coattention", 1e-3, 1e-3)],
)
def test_settings_that_are_not_published_give_another_answer(
    setting: str, score: float, logits: float
) -> None:
    other = {"positions": "one-step", "coattention": "stacked"}[setting]
    images = pixels(stored(None, "forward")["image"])
    found = []
    for changes in ({}, {setting: other}):
        network = published_network(**changes)
        with torch.no_grad():
            found.append(network.decode(images))
    assert largest(found[0]["score"], found[1]["score"]) > score
    assert largest(found[0]["logits"], found[1]["logits"]) > logits


def test_a_frozen_clip_sees_what_one_that_learns_sees() -> None:
    """And is in no checkpoint."""
    images, own = pixels(stored(None, "forward")["image"]), published_network()
    frozen = published_network(clip="frozen", adapter="full")
    with torch.no_grad():
        for name, value in own.decode(images).items():
            assert torch.equal(frozen.decode(images)[name], value)
    assert own.state_dict().keys() > frozen.state_dict().keys()
    assert all(name.startswith("model.decoder.") for name in frozen.state_dict())


def test_a_view_in_windows_is_the_published_one() -> None:
    """The mirrored view at the picture's own scale, in two windows, each cut to whole patches."""
    arrays, network = stored(None, "predict"), published_network()
    image = read_image(GOLDEN / "images" / "tiny_odd.png")
    height, width = arrays["predict/sizes"][5]
    view = cv2.flip(cv2.resize(image, (int(width), int(height)), interpolation=cv2.INTER_LINEAR), 1)
    images = pixels(view[None])
    total, count = torch.zeros(1, len(network.tokens), height, width), torch.zeros(height, width)
    starts = [(0, 0), (0, int(width) - 512)]
    assert len(starts) == arrays["predict/windows"][5]
    with torch.no_grad():
        for top, left in starts:
            window = images[:, :, top : top + 512, left : left + 512]
            total[..., top : top + 512, left : left + 512] += network(window)
            count[top : top + 512, left : left + 512] += 1
    logits = F.interpolate(total / count, image.shape[:2], mode="bilinear")
    posterior = logits.softmax(dim=1).flip(-1)[0, :, ::2, ::2]
    assert largest(posterior, torch.from_numpy(arrays["predict/view5"])) < 1e-4
