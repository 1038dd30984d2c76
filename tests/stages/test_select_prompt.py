"""Ranking templates by their sharpness on labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from wsss_pipeline.clip.image_encoder import DenseFeatures, ImageEncoder

from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import ClassEntry, ClassSet
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import clip_input_size, resize_for_clip, to_clip_tensor
from wsss_pipeline.errors import ClassSetError, ConfigError
from wsss_pipeline.methods import load_mask_config as load_config
from wsss_pipeline.methods.clip_es import ClipEsConfig as MaskConfig
from wsss_pipeline.stages.select_prompt import PromptRanking, select_prompt, write_choice

GOLDEN = Path(__file__).parent.parent / "golden"
CLASSES = ClassSet(
    name="pets",
    templates=("a {}.",),
    background=("grass", "sky"),
    classes=tuple(ClassEntry(name=name) for name in ("cat", "dog", "sofa")),
)
TEMPLATES = ["a photo of a {}", "the {}!", "{} and a good small tree"]
IMAGES = {
    name: GOLDEN / "images" / f"{name}.png" for name in json.loads((GOLDEN / "labels.json").read_text())
}
FIRST, SECOND, THIRD = list(IMAGES)[:3]
LABELS = {FIRST: ("dog", "cat"), SECOND: ("sofa",), THIRD: ("cat", "dog", "sofa")}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MaskConfig:
    folder = write_tiny_clip(tmp_path_factory.mktemp("clip") / "hf")
    return MaskConfig(clip=ClipConfig(weights=str(folder), precision="fp32"), max_pixels=16384)


def rank(config: MaskConfig, **changes: Any) -> PromptRanking:
    arguments: dict[str, Any] = {"images": IMAGES, "labels": LABELS, "class_set": CLASSES} | changes
    arguments = {"templates": TEMPLATES, "config": config, "device": "cpu", "offline": True} | arguments
    return select_prompt(**arguments)


def sharpness_by_definition(config: MaskConfig, template: str) -> float:
    """Equation 9, with the softmax over the classes of the image and all background words."""
    clip = load_clip(locate_clip(config.clip, offline=True), torch.device("cpu"))
    texts, total = TextEncoder(clip.text, clip.tokenizer), 0.0
    for image_id in (FIRST, THIRD):
        pixels = read_image(IMAGES[image_id])
        size = clip_input_size(pixels.shape[1], pixels.shape[0], 16, config.max_pixels)
        tensor = to_clip_tensor(resize_for_clip(pixels, size.width, size.height))
        feature = F.normalize(ImageEncoder(clip.vision).encode(tensor[None]).pooled[0].detach(), dim=0)
        words = [*LABELS[image_id], *CLASSES.background]
        rows = texts.encode([template.replace("{}", word) for word in words])
        scores = torch.softmax(clip.logit_scale * rows @ feature, dim=0)[: len(LABELS[image_id])].double()
        mean = scores.mean()
        total += float(((scores - mean) ** 2).mean() / mean)
    return total


def test_the_ranking_follows_the_definition(config: MaskConfig) -> None:
    ranking = rank(config)
    expected = {template: sharpness_by_definition(config, template) for template in TEMPLATES}
    assert len(set(expected.values())) == len(TEMPLATES)
    assert [template for template, _ in ranking.ranked] == sorted(TEMPLATES, key=expected.__getitem__)
    for template, value in ranking.ranked:
        assert value == pytest.approx(expected[template], rel=1e-3)
    assert ranking.images == 2, "the image with one class says nothing"
    assert ranking.failed == {}


def test_each_image_goes_through_clip_once(config: MaskConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = ImageEncoder.encode, []

    def counted(self: ImageEncoder, images: torch.Tensor) -> DenseFeatures:
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(ImageEncoder, "encode", counted)
    rank(config)
    assert sum(seen) == 2


def test_a_bad_image_is_named_and_left_out(config: MaskConfig, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    ranking = rank(config, images=IMAGES | {THIRD: broken})
    assert ranking.images == 1
    assert list(ranking.failed) == [THIRD]
    assert ranking.ranked == rank(config, labels={FIRST: LABELS[FIRST]}).ranked
    with pytest.raises(ConfigError, match="none of the 2 images"):
        rank(config, images={FIRST: broken, THIRD: broken})


def test_limit_counts_images_that_can_be_used(config: MaskConfig) -> None:
    labels = {SECOND: LABELS[SECOND], FIRST: LABELS[FIRST], THIRD: LABELS[THIRD]}
    assert rank(config, labels=labels, limit=1).ranked == rank(config, labels={FIRST: LABELS[FIRST]}).ranked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {SECOND: ("sofa",)}}, "no image with two classes or more"),
        ({"labels": {"elsewhere": ("cat", "dog")}}, "no image with two classes or more"),
    ],
)
def test_what_cannot_be_ranked(config: MaskConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rank(config, **changes)


def test_a_template_without_a_place_for_the_class(config: MaskConfig) -> None:
    with pytest.raises(ClassSetError, match="--template: template 'a photo' needs exactly one"):
        rank(config, templates=["a {}.", "a photo"])


@pytest.mark.parametrize("template", ["a {}.", 'the "{}": yes # no', "ein kleines {} für dich"])
def test_the_choice_is_read_back_as_configuration(tmp_path: Path, template: str) -> None:
    file = tmp_path / "new" / "prompt.yaml"
    write_choice(template, file)
    assert load_config(file=file).templates == (template,)


def test_a_choice_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        write_choice("a {}.", tmp_path / "file" / "prompt.yaml")
