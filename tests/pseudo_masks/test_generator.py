"""``MaskGenerator``: the object that the commands and the library run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.end_to_end.conftest import GOLDEN, LABELS, generate_arguments, mask_set, wsss
from wsss_pipeline import MaskGenerator
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.cam.scores import assemble
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.data.transforms import resize
from wsss_pipeline.errors import ClassSetError, ConfigError, ImageError
from wsss_pipeline.refine import Refiner, label

CAT = GOLDEN / "images" / "cat.png"

pytestmark = pytest.mark.usefixtures("published_text")


def make(clip: Path, classes: str | Sequence[str] = "voc12", **settings: object) -> MaskGenerator:
    keys = {"clip.precision": "fp32", **{key.replace("__", "."): value for key, value in settings.items()}}
    return MaskGenerator(classes, clip=str(clip), settings=keys, device="cpu", offline=True)


@pytest.fixture
def generator(clip: Path) -> MaskGenerator:
    return make(clip)


def assert_equal(one: PseudoMask, other: PseudoMask) -> None:
    assert np.array_equal(one.mask, other.mask)
    assert np.array_equal(one.confidence, other.confidence)
    assert one.labels == other.labels
    assert one.cams is not None
    assert other.cams is not None
    assert np.array_equal(one.cams, other.cams)


def test_an_image_in_any_form_gives_the_same_mask(generator: MaskGenerator) -> None:
    found = generator(read_image(CAT), ["cat", "sofa"])
    assert set(np.unique(found.mask)) <= {0, 8, 18}
    assert len(np.unique(found.mask)) > 1
    assert found.cams is not None
    assert (found.cams.max(axis=(1, 2)) > 0.5).all()
    with Image.open(CAT) as opened:
        for form in (CAT, str(CAT), opened):
            assert_equal(generator(form, ["cat", "sofa"]), found)


def test_no_label_means_background(generator: MaskGenerator) -> None:
    found = generator(CAT, [])
    assert not found.mask.any()
    assert (found.confidence == 200).all()
    assert found.cams is not None
    assert found.cams.shape == (0, 120, 180)


def test_aliases_are_classes_and_other_names_are_refused(generator: MaskGenerator) -> None:
    by_alias = generator(CAT, ["cat", "couch"])
    assert np.array_equal(by_alias.mask, generator(CAT, ["cat", "sofa"]).mask)
    assert by_alias.labels == ("cat", "sofa")
    with pytest.raises(ClassSetError, match="'sofas'"):
        generator(CAT, ["cat", "sofas"])


def test_an_image_that_cannot_be_used_is_an_image_error(generator: MaskGenerator, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"a\.png"):
        generator(tmp_path / "a.png", ["cat"])
    with pytest.raises(ImageError, match="uint8"):
        generator(np.zeros((4, 4, 3)), ["cat"])  # type: ignore[arg-type]


def test_nothing_is_written(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(clip)(CAT, ["cat"])
    assert not list(tmp_path.iterdir())


def test_clip_is_loaded_when_the_first_mask_is_asked_for(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss_pipeline.pseudo_masks.generator.load_clip", None)
    generator = make(clip, ["cat", "sofa"], refine="none")
    assert generator.class_set.names == ("cat", "sofa")
    assert generator.mask_set.class_names == ("cat", "sofa")
    assert generator.lines()[-1] == "CRF: none"


def test_the_choices_are_told_in_lines(clip: Path) -> None:
    generator = make(clip, ["cat", "sofa"], templates=["a {}.", "the {}."], confidence="posterior")
    background = generator.class_set.background
    assert generator.lines()[:5] == [
        "classes (2): cat, sofa",
        f"background words ({len(background)}): {', '.join(background) or 'none'}",
        "templates (2): a {}. | the {}.",
        f"method: clip-es; CLIP: {clip}, fp32 on cpu",
        "confidence: posterior",
    ]


def test_classes_are_needed_and_a_single_name_will_do(clip: Path) -> None:
    with pytest.raises(ConfigError, match="no classes given"):
        make(clip, "")
    assert make(clip, ["cat"]).class_set.names == ("cat",)


def test_the_commands_masks_are_those_of_the_object(clip: Path, tmp_path: Path) -> None:
    world = tmp_path
    (world / "labels.json").write_text((GOLDEN / "labels.json").read_text())
    (world / "images").symlink_to(GOLDEN / "images")
    arguments = ["--config", world / "config.yaml", "--store-cams", "--precision", "fp32", "--device", "cpu"]
    (world / "config.yaml").write_text("max_pixels: 9000\ncam: {threshold: 0.3}\ncrf: {iterations: 3}\n")
    labels = '{"cat": ["sofa", "cat"], "astronaut": ["person"], "tiny_odd": []}'
    (world / "labels.json").write_text(labels)
    result = wsss(*generate_arguments(world, clip), *arguments)
    assert result.exit_code == 0, result.stderr
    generator = make(clip, max_pixels=9000, cam__threshold=0.3, crf__iterations=3)
    assert mask_set(result).name == generator.mask_set.folder_name
    with MaskCache.open(mask_set(result)) as cache:
        assert len(cache) == 3
        assert cache["cat"].mask.any()
        for image_id in cache:
            found = generator(GOLDEN / "images" / f"{image_id}.png", cache.labels(image_id))
            assert_equal(found, cache[image_id])


class Recorder:
    """A refiner that keeps what it is given."""

    description = "recorder"

    def __init__(self, refiner: Refiner) -> None:
        self._refiner = refiner
        self.images: list[np.ndarray] = []
        self.scores: list[Tensor] = []

    def determinants(self) -> dict[str, object]:
        return {}

    def __call__(
        self,
        images: Sequence[np.ndarray],
        scores: Sequence[Tensor],
        regions: Sequence[object] = (),
        cams: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        self.images += images
        self.scores += scores
        return self._refiner(images, scores)


def test_the_refiner_sees_a_large_image_scaled_down_and_the_mask_is_not(clip: Path) -> None:
    generator = make(clip, max_pixels=5400)  # a quarter of the image
    generator.refiner = recorder = Recorder(generator.refiner)
    found = generator(CAT, ["cat", "sofa"])
    assert np.array_equal(recorder.images[0], resize(read_image(CAT), 90, 60))
    assert recorder.scores[0].shape == (3, 60, 90)
    assert found.mask.shape == (120, 180)
    strip = np.zeros((2, 20_000, 3), np.uint8)  # no side vanishes
    assert generator(strip, ["cat"]).mask.shape == (2, 20_000)
    assert recorder.scores[1].shape == (2, 1, 7348)


@pytest.mark.parametrize("power", [1.0, 3.0])
def test_the_backgrounds_score_is_what_the_largest_class_leaves_to_the_methods_power(
    clip: Path, monkeypatch: pytest.MonkeyPatch, power: float
) -> None:
    monkeypatch.setattr("wsss_pipeline.methods.clip_es.ClipEs.background_power", power)
    found = make(clip, refine="none")(CAT, ["cat", "sofa"])
    assert found.cams is not None
    scores = assemble(torch.from_numpy(found.cams), power).float()
    mask, confidence = label(scores / scores.sum(dim=0), [8, 18], found.mask.shape)
    assert len(np.unique(found.mask)) > 1
    assert (mask.numpy() == found.mask).mean() > 0.99
    assert np.abs(confidence.numpy().astype(int) - found.confidence).max() <= 1


@pytest.mark.parametrize(("ties", "winner"), [("label", 18), ("index", 8)])
def test_of_classes_that_score_alike_the_first_label_wins_or_the_smallest_index(
    clip: Path, monkeypatch: pytest.MonkeyPatch, ties: str, winner: int
) -> None:
    def alike(method: object, pixels: Tensor, classes: Sequence[Sequence[int]]) -> list[Tensor]:
        return [torch.linspace(0, 1, 6).expand(len(present), 4, 6) for present in classes]

    monkeypatch.setattr("wsss_pipeline.methods.clip_es.ClipEs.scores", alike)
    monkeypatch.setattr("wsss_pipeline.methods.clip_es.ClipEs.ties", ties, raising=False)
    found = make(clip, refine="none")(CAT, ["sofa", "cat"])
    assert set(np.unique(found.mask)) == {0, winner}
    assert (found.mask[:, -20:] == winner).all()
    assert found.labels == ("sofa", "cat")


def test_regions_vote_with_what_the_method_gave_and_not_with_the_scores(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 1e-7 of the min-max keeps a weak map weak, unless it was scaled up before."""
    generator = make(clip, method="fma", vote__regions="slic")
    scores = generator.method.scores
    for largest, is_object in ((1e-2, True), (3e-8, False)):

        def scaled(*arguments: Any, largest: float = largest) -> list[Tensor]:
            return [largest * maps / maps.max() for maps in scores(*arguments)]

        monkeypatch.setattr(generator.method, "scores", scaled)
        assert generator(CAT, ["cat"]).mask.any() == is_object


def test_maps_that_are_no_number_are_an_image_error(clip: Path) -> None:
    generator = make(clip)
    with torch.no_grad():
        generator.method._trunk._embeddings.patch_embedding.weight.fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match="isn't finite; try --precision fp32"):
        generator(CAT, ["cat"])


def test_a_posterior_that_is_no_number_is_a_mask_error(clip: Path) -> None:
    from wsss_pipeline.errors import MaskError

    generator = make(clip)
    generator.refiner = Broken(generator.refiner)
    with pytest.raises(MaskError, match="NaN"):
        generator(CAT, ["cat"])


class Broken(Recorder):
    def __call__(
        self,
        images: Sequence[np.ndarray],
        scores: Sequence[Tensor],
        regions: Sequence[object] = (),
        cams: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        return [score.float().fill_(float("nan")) for score in scores]


def test_golden_labels_are_those_of_the_class_set(generator: MaskGenerator) -> None:
    for image_id, labels in LABELS.items():
        found = generator(GOLDEN / "images" / f"{image_id}.png", labels)
        assert set(np.unique(found.mask)) <= {0, *(generator.class_set.index(name) for name in labels)}
