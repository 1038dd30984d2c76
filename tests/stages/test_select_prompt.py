"""Ranking templates by their sharpness on labelled images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.end_to_end.conftest import wsss
from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder
from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig, MaskConfig
from wsss_pipeline.data.classes import ClassEntry, ClassSet
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import CLIP_STATISTICS, PixelStatistics, prepare_image
from wsss_pipeline.errors import ClassSetError, ConfigError
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.pseudo_masks.job import MaskJob
from wsss_pipeline.stages.select_prompt import PromptRanking, select_prompt, sharpness

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


def rank(config: MaskConfig, templates: Sequence[str] = tuple(TEMPLATES), **changes: Any) -> PromptRanking:
    job = MaskJob(IMAGES, LABELS, CLASSES, config, device="cpu", offline=True)
    return select_prompt(replace(job, **changes), templates)


def sharpness_by_definition(
    config: MaskConfig, template: str, statistics: PixelStatistics = CLIP_STATISTICS
) -> float:
    """Equation 9, with the softmax over the classes of the image and all background words."""
    clip = load_clip(locate_clip(config.clip, offline=True), torch.device("cpu"))
    texts, total = TextEncoder(clip.text, clip.tokenizer), 0.0
    for image_id in (FIRST, THIRD):
        pixels = prepare_image(read_image(IMAGES[image_id]), 16, config.max_pixels, statistics).pixels
        feature = F.normalize(Trunk(clip.vision).encode(pixels[None]).last[0].pooled, dim=0)
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


def test_images_are_seen_with_the_models_own_pixel_statistics(tmp_path: Path) -> None:
    folder = write_tiny_clip(tmp_path / "clip")
    values = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    config = MaskConfig(clip=ClipConfig(weights=str(folder), precision="fp32"), max_pixels=16384)
    ((_, found),) = rank(config, TEMPLATES[:1]).ranked
    own = PixelStatistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert found == pytest.approx(sharpness_by_definition(config, TEMPLATES[0], own), rel=1e-3)
    assert found != pytest.approx(sharpness_by_definition(config, TEMPLATES[0]), rel=1e-2)


def test_each_image_goes_through_clip_once(config: MaskConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, seen = Trunk.encode, []

    def counted(self: Trunk, images: torch.Tensor) -> Features:
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Trunk, "encode", counted)
    rank(config)
    assert sum(seen) == 2


def test_a_bad_image_is_named_and_left_out(
    config: MaskConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    ranking = rank(config, images=IMAGES | {THIRD: broken})
    assert ranking.images == 1
    assert list(ranking.failed) == [THIRD]
    assert [str(broken) in message for message in caplog.messages] == [True]
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


@pytest.mark.parametrize("template", ["a {}.", 'the "{}": yes # no', "a good {} für dich"])
def test_the_choice_is_read_back_as_configuration(config: MaskConfig, tmp_path: Path, template: str) -> None:
    result = wsss(
        *command(config, tmp_path, LABELS), "--template", template, "--out", tmp_path / "new" / "prompt.yaml"
    )
    assert result.exit_code == 0
    assert load_mask_config(file=tmp_path / "new" / "prompt.yaml").templates == (template,)
    assert json.loads(result.stdout)["ranked"][0][0] == template


def test_a_choice_that_cannot_be_written(config: MaskConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "prompt.yaml"
    result = wsss(*command(config, tmp_path, LABELS), "--template", "a {}.", "--out", out)
    assert result.exit_code == 2
    assert "can't be written" in result.stderr


def command(config: MaskConfig, folder: Path, labels: Mapping[str, Sequence[str]]) -> list[object]:
    (folder / "labels.json").write_text(json.dumps(labels))
    return [
        *("select-prompt", "--images", GOLDEN / "images", "--labels", folder / "labels.json"),
        *("--classes", "cat,dog,sofa", "--clip", config.clip.weights, "--max-pixels", config.max_pixels),
        *("--device", "cpu", "--json"),
    ]


def test_sharpness_by_hand() -> None:
    scores = [torch.tensor([0.2, 0.6]), torch.tensor([0.9]), torch.tensor([0.1, 0.1, 0.4])]
    # variances 0.04 and 0.02, means 0.4 and 0.2
    assert sharpness(scores) == pytest.approx(0.04 / 0.4 + 0.02 / 0.2)
    assert sharpness([torch.tensor([0.3, 0.3])]) == pytest.approx(0)
    assert sharpness([torch.tensor([0.0, 0.0])]) == 0
    assert sharpness([]) == 0
