"""WeCLIP+ against the published code's own numbers: each stage, whole updates, and the test.

The files under tests/golden/weclip hold what the published code computes on CPU in float32 with a seeded CLIP, DINOv2
and decoder. Tolerances are those that its accuracy allows. Pictures of full size are checked where WSSS_GOLDEN names
the folder that has them.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from tests.segmentation.published_decoder import own_name, renamed
from wsss_pipeline.cam.affinity import gated_attention, refine_cams
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.scores import assemble, normalise_cams, upscale_cams
from wsss_pipeline.clip import learned_prompts
from wsss_pipeline.clip.text import ClassEmbeddings
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import ParConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, normalise
from wsss_pipeline.methods import load_mask_config, weclip
from wsss_pipeline.refine import load_refiner
from wsss_pipeline.refine.par import Par
from wsss_pipeline.segmentation.dino import load_dino
from wsss_pipeline.segmentation.frozen_clip import Encoded, FrozenClip
from wsss_pipeline.segmentation.losses import affinity_labels, override_labels, segmentation_loss
from wsss_pipeline.segmentation.network import resized
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.targets import OnlineTarget
from wsss_pipeline.segmentation.train_config import FrozenClipConfig, load_train_config

SMALL = Path(__file__).parent / "golden"
LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
EARLY, LATE = 1, 18001  # updates: before and after the network's own labels count


@dataclass(frozen=True)
class Reference:
    """A set of the published code's numbers, and what they were computed with."""

    folder: Path
    clip: Clip
    dino: Path

    def golden(self, name: str) -> dict[str, Any]:
        with np.load(self.folder / f"{name}.npz") as file:
            return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fui"}

    def network(self, num_classes: int = 21) -> FrozenClip:
        """In evaluation mode."""
        tensors = load_file(self.folder / "plus_decoder.safetensors")
        if num_classes > 21:
            tensors |= load_file(self.folder / "plus_coco_pred.safetensors")
        width = len(tensors["decoder_fts_fuse.linear_fuse.bias"])
        config = FrozenClipConfig(first_block=-2, last_block=-2, width=width, dropout=0)
        network = FrozenClip(config, num_classes, self.clip, "fp32", load_dino(str(self.dino), offline=True))
        network.load_state_dict(renamed(tensors))
        return network.eval()

    def method(self, preset: str, kind: str) -> weclip.WeClip:
        """With the published rows in the place of a text tower's."""
        text = self.golden("text")
        rows = ClassEmbeddings(text[f"{kind}_fg"], text[f"{kind}_bg"])
        config = load_mask_config(f"weclip/{preset}", overrides=["clip.weights=demo"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learned_prompts, "class_embeddings", lambda *_: rows)
            patch.setattr(learned_prompts, "TextEncoder", lambda *_: SimpleNamespace(encode=None))
            return weclip.WeClip(config, self.clip, load_class_set(config.classes), "fp32")  # type: ignore[arg-type]

    def target(self, preset: str = "plus-voc12", kind: str = "voc", recipe: str = "voc12") -> OnlineTarget:
        method = self.method(preset, kind)
        config = load_mask_config(f"weclip/{preset}")
        refiner = load_refiner(config, method.refiner)
        online = load_train_config(f"weclip-plus/{recipe}").online
        return OnlineTarget(method, refiner, online, *IMAGENET_STATISTICS)


@pytest.fixture(
    scope="module",
    params=[
        (SMALL, "vision", 4.60546875),
        pytest.param(
            (LARGE, "clip_es/model", 4.605170249938965),
            marks=pytest.mark.skipif(not LARGE.is_dir(), reason="WSSS_GOLDEN names no folder"),
        ),
    ],
    ids=["small", "large"],
)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    root, name, log_scale = request.param
    folder, dino = root / "weclip", tmp_path_factory.mktemp("dino")
    shutil.copy(folder / "plus_dino_config.json", dino / "config.json")
    tensors = {as_in_files(key): value for key, value in load_file(folder / "plus_dino.safetensors").items()}
    save_file(tensors, dino / "model.safetensors")
    vision = CLIPVisionModelWithProjection.from_pretrained(root / name, dtype=torch.float32)
    biases = load_file(folder / "query_bias.safetensors")
    assert not vision.load_state_dict(biases, strict=False).unexpected_keys
    clip = Clip(vision.requires_grad_(False).eval(), SimpleNamespace(), None, float(np.exp(log_scale)))
    return Reference(folder, clip, dino)


def as_in_files(name: str) -> str:
    """A tensor of DINOv2 by the name that published files have for it."""
    for later, former in {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
    }.items():
        name = name.replace(f"attention.{later}", f"attention.{former}")
    return name.replace("attention.o_proj", "attention.output.dense")


def pixels(pictures: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) as the network sees it."""
    return torch.stack([normalise(picture.numpy(), IMAGENET_STATISTICS) for picture in pictures])


def values_of(expected: dict[str, Any]) -> list[int]:
    return [int(number) + 1 for number in expected["label_ids"]]


def largest(found: Tensor, expected: Tensor, *, relative: bool = False) -> float:
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).abs().max())
    return difference / float(expected.abs().max()) if relative else difference


def agreement(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found == expected).double().mean())


@torch.no_grad()
def test_what_the_network_makes_of_a_crop(reference: Reference) -> None:
    expected, network, method = (
        reference.golden("plus_stages"),
        reference.network(),
        reference.method("plus-voc12", "voc"),
    )
    encoded = network.encode(pixels(expected["crop"][None]), **method.encoding)
    outputs = network.decode(encoded)
    assert encoded.dino is not None
    assert largest(encoded.dino[0], expected["dino_tokens"], relative=True) < 1e-4
    width = len(expected["fused_clip"])
    assert largest(outputs["fused"][0, :width], expected["fused_clip"], relative=True) < 1e-4
    tokens = encoded.dino.flatten(2).transpose(1, 2)
    fused = network.model["dino_fusion"]([tokens], encoded.dino.shape[2:])
    assert largest(fused[0], expected["fused_dino"], relative=True) < 1e-4
    for branch in ("clip", "dino"):
        assert largest(outputs[f"{branch}_logits"][0], expected[f"logits_{branch}"], relative=True) < 1e-4
    rows = expected["rows"].long()[1:] - 1
    assert largest(outputs["similarity"][0].sigmoid()[rows], expected["affinity_rows"]) < 1e-5
    assert largest(outputs["logits"][0].softmax(dim=0), expected["prior"]) < 1e-5


@torch.no_grad()
def test_cams_and_mask_of_a_crop(reference: Reference) -> None:
    """The last block gets what goes into the one before it."""
    expected, network, target = reference.golden("plus_stages"), reference.network(), reference.target()
    method: Any = target.method
    present, images = [values_of(expected)], pixels(expected["crop"][None])
    outputs = network.training_outputs(images, **method.encoding)
    features = outputs["encoded"].features
    text = reference.golden("text")
    rows = torch.cat([text["voc_fg"][expected["label_ids"]], text["voc_bg"]])
    (raw,) = softmax_gradcam(features, [rows], [len(rows) - 25], reference.clip.logit_scale)
    assert largest(normalise_cams(raw), expected["gradcam"]) < 1e-4
    unit = F.normalize(features.last[0].pooled, dim=0)
    assert (
        largest((reference.clip.logit_scale * rows @ unit).softmax(dim=0), expected["probabilities"]) < 1e-5
    )
    attention = features.last[0].probabilities.mean(dim=0)[expected["rows"].long()]
    assert largest(attention, expected["last_attention_rows"], relative=True) < 1e-4
    looks = features.attention[-6:, 0].sum(dim=(1, 2), dtype=torch.float64)
    gap = looks.mean() - looks  # the gate cancels out
    assert largest(gap, expected["layer_gap"], relative=True) < 1e-3
    prior, gate = outputs["grid_logits"].softmax(dim=1), outputs["similarity"].sigmoid()
    (refined,) = method.cams(features, present, gate=gate, prior=prior)
    assert largest(refined, expected["refined"], relative=True) < 1e-4
    size = images.shape[2:]
    scores, step = assemble(upscale_cams(refined, size)), int(expected["stride"])
    assert largest(scores[:, ::step, ::step], expected["scores"]) < 1e-3
    mask, _ = target(images, outputs, present, torch.zeros(1, *size, dtype=torch.bool), EARLY)
    assert agreement(mask[0], expected["pseudo"]) >= 0.999
    assert len(mask.unique()) > 1


@torch.no_grad()
def test_a_crop_of_coco(reference: Reference) -> None:
    expected, network = reference.golden("plus_coco"), reference.network(81)
    target = reference.target("plus-coco14", "coco", "coco14")
    method: Any = target.method
    present, images = [values_of(expected)], pixels(expected["crop"][None])
    outputs = network.training_outputs(images, **method.encoding)
    decoded, features = network.decode(outputs["encoded"]), outputs["encoded"].features
    for branch in ("clip", "dino"):
        assert largest(decoded[f"{branch}_logits"][0], expected[f"logits_{branch}"], relative=True) < 1e-4
    text = reference.golden("text")
    rows = torch.cat([text["coco_fg"][expected["label_ids"]], text["coco_bg"]])
    (raw,) = softmax_gradcam(features, [rows], [len(rows) - 23], reference.clip.logit_scale)
    assert largest(normalise_cams(raw), expected["gradcam"]) < 1e-4
    unit = F.normalize(features.last[0].pooled, dim=0)
    assert (
        largest((reference.clip.logit_scale * rows @ unit).softmax(dim=0), expected["probabilities"]) < 1e-5
    )
    looks = features.attention[-8:, 0].sum(dim=(1, 2), dtype=torch.float64)
    assert largest(looks.mean() - looks, expected["layer_gap"], relative=True) < 1e-3
    prior, gate = outputs["grid_logits"].softmax(dim=1), outputs["similarity"].sigmoid()
    (refined,) = method.cams(features, present, gate=gate, prior=prior)
    assert largest(refined, expected["refined"], relative=True) < 1e-4
    mask, _ = target(images, outputs, present, torch.zeros(1, *images.shape[2:], dtype=torch.bool), EARLY)
    assert agreement(mask[0], expected["pseudo"]) >= 0.999


@pytest.mark.parametrize(("name", "update"), [("early", EARLY), ("late", LATE)])
def test_an_update(reference: Reference, name: str, update: int) -> None:
    """Two pictures: targets, each loss, and gradients of all of the decoder."""
    expected, crops = reference.golden(f"plus_step_{name}"), reference.golden("plus_step_early")
    network, target, config = (
        reference.network().train(),
        reference.target(),
        load_train_config("weclip-plus/voc12"),
    )
    class_set = load_class_set("voc12")
    labels = json.loads((reference.folder / "labels.json").read_text())
    present = [sorted(map(class_set.index, names)) for names in list(labels.values())[:2]]
    images = pixels(crops["crops"])
    method: Any = target.method
    outputs = network.training_outputs(images, **method.encoding)
    prior, gate = outputs["grid_logits"].detach().softmax(dim=1), outputs["similarity"].detach().sigmoid()
    refined = method.cams(outputs["encoded"].features, present, gate=gate, prior=prior)
    assert largest(torch.cat(refined), expected["refined"], relative=True) < 1e-4
    beyond = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    mask, confidence = target(images, outputs, present, beyond, update)
    assert agreement(mask, expected["pseudo_cam"]) >= 0.999
    for branch in ("clip", "dino"):
        found = outputs[f"{branch}_logits"].argmax(dim=1)
        assert agreement(found, crops[f"pred_{branch}"]) >= 0.999
    # a pixel or two of the mask may be another label's; the losses are of the published one
    mask = expected["pseudo_cam"].long()
    pairs = affinity_labels(mask, outputs["encoded"].features.grid, config.loss.affinity_radius)
    assert 1 + int((pairs == 1).sum()) == int(expected["positives"])
    assert 1 + int((pairs == 0).sum()) == int(expected["negatives"])
    labels_learnt = mask
    if name == "late":
        labels_learnt = override_labels(mask, outputs["logits"], config.online.override_above)
    assert agreement(labels_learnt, expected["pseudo"]) >= 0.999
    losses = weighted_losses(outputs, mask, confidence, config, update, lambda sums: sums)
    found = {
        "loss_seg": losses["segmentation"],
        "loss_aff": losses["affinity"] / 0.1,
        "loss_dice": losses["dice"],
        "loss": sum(losses.values(), torch.zeros(())),
    }
    published = {key: expected[key] for key in found}
    found["cross"] = losses["cross"] / 0.1
    published["cross"] = expected["loss_clip"] + expected["loss_dino"]
    weights = torch.ones_like(mask, dtype=torch.float32)
    for branch, other in (("clip", "dino"), ("dino", "clip")):
        branch_logits = {"logits": outputs[f"{branch}_logits"]}
        pseudo = outputs[f"{other}_logits"].argmax(dim=1)
        found[f"loss_{branch}"] = segmentation_loss(branch_logits, pseudo, weights, balanced=True)
        published[f"loss_{branch}"] = expected[f"loss_{branch}"]
    for key, value in found.items():
        assert largest(value.detach(), published[key], relative=True) < 1e-5
    found["loss"].backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    norms = {key.removeprefix("norm/"): value for key, value in expected.items() if key.startswith("norm/")}
    assert {own_name(key) for key in norms} == gradients.keys()
    for key, value in norms.items():
        gradient = gradients[own_name(key)]
        assert gradient is not None
        assert largest(gradient.norm(), value, relative=True) < 1e-4
    for key, value in expected.items():
        if key.startswith("grad/"):
            gradient = gradients[own_name(key.removeprefix("grad/"))]
            assert gradient is not None
            assert largest(gradient, value, relative=True) < 1e-4


def encoded_of_any_size(network: FrozenClip, images: Tensor, **wanted: Any) -> Encoded:
    """As published: CLIP doesn't see what is beyond its last whole patch, DINOv2 sees all of it, resized."""
    height, width = (side // network.multiple * network.multiple for side in images.shape[2:])
    encoded, dino = network.encode(images[..., :height, :width], **wanted), network.frozen.dino
    assert dino is not None
    return replace(encoded, dino=network._dino_maps(dino.model, images))


@torch.no_grad()
def test_the_published_test(reference: Reference) -> None:
    """Two scales, the second made of the first, and mirrored; the logits averaged on the first scale's grid."""
    expected, network = reference.golden("plus_test"), reference.network()
    sizes = expected["input_sizes"].tolist()
    grid = [side // network.multiple for side in sizes[0]]
    images, maps = pixels(expected["picture_rgb"][None]), []
    for size in sizes:
        images = resized(images, size=size)
        plain, mirrored = network.decode(
            encoded_of_any_size(network, torch.cat([images, images.flip(-1)])), with_similarity=False
        )["logits"]
        maps.append(resized((plain + mirrored.flip(-1))[None] / 2, size=grid))
    logits = torch.stack(maps).mean(dim=0)
    assert largest(logits[0], expected["logits_multi"], relative=True) < 1e-4
    mask = resized(logits, size=expected["mask_multi"].shape).argmax(dim=1)[0]
    assert agreement(mask, expected["mask_multi"]) >= 0.999


@torch.no_grad()
def test_the_published_validations_pseudo_mask(reference: Reference) -> None:
    """Of a whole picture; PAR sees CLIP's input, brought back to the picture's size."""
    expected, network = reference.golden("plus_test"), reference.network()
    method = reference.method("plus-voc12", "voc")
    with np.load(reference.folder / "plus_test.npz") as file:
        labels = json.loads((reference.folder / "labels.json").read_text())[str(file["picture"])]
    present = sorted(map(load_class_set("voc12").index, labels))
    images = resized(pixels(expected["picture_rgb"][None]), size=expected["input_sizes"][0].tolist())
    encoded = encoded_of_any_size(network, images, **method.encoding)
    outputs = network.decode(encoded)
    gate, prior = outputs["similarity"].sigmoid(), outputs["logits"].softmax(dim=1)
    (refined,) = method.cams(encoded.features, [present], gate=gate, prior=prior)
    size = tuple(expected["pseudo_val"].shape)
    mean, std = (torch.tensor(row) for row in IMAGENET_STATISTICS)
    seen = F.interpolate(images, size, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
    (posterior,) = Par(ParConfig())(
        [(255 * (seen * std + mean)).numpy()], [assemble(upscale_cams(refined, size))]
    )
    mask = torch.tensor([0, *present])[posterior.argmax(dim=0)]
    assert agreement(mask, expected["pseudo_val"]) >= 0.999


def test_refinement_with_a_prior(reference: Reference) -> None:
    expected = reference.golden("plus_functions")
    classes = 1 + expected["ids"]
    for kind, layers, threshold in (("voc", 6, 0.4), ("coco", 8, 0.7)):
        attention = gated_attention(expected["attention"][-layers:, 1:, 1:], expected["gate"])
        plain = refine_cams(expected["cam"], attention, threshold)
        assert largest(plain, expected[f"{kind}_noprior"]) < 1e-5
        boxes = None if kind == "voc" else threshold
        weighed = refine_cams(expected["cam"], attention, boxes, prior=expected["prior"][classes])
        assert largest(weighed, expected[f"{kind}_prior"]) < 1e-5
