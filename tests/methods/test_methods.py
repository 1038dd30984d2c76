"""What every method keeps to: its presets, its maps, batches. See test_fingerprint.py for its settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.methods import toy_method
from wsss_pipeline.clip import trunk
from wsss_pipeline.config import fields, section
from wsss_pipeline.demo.scenes import Scene, draw_scene
from wsss_pipeline.methods import load_mask_config, load_method, method_names, preset_names
from wsss_pipeline.pseudo_masks.generator import MaskGenerator

SCENES = [draw_scene((77, number)) for number in (3, 5)]

every_method = pytest.mark.parametrize("name", [*method_names(), toy_method.__name__])


def generator(name: str, **settings: object) -> MaskGenerator:
    settings |= {"clip.weights": "demo", "clip.precision": "fp32", "classes": "demo", "method": name}
    return MaskGenerator(settings=settings, device="cpu", offline=True)


@pytest.mark.parametrize("preset", [*preset_names(), f"{toy_method.__name__}/demo"])
def test_a_preset_resolves_and_a_class_set_of_its_name_brings_it(preset: str) -> None:
    name, _, short = preset.rpartition("/")
    config = load_mask_config(preset)
    assert config.method == name
    assert type(config) is load_method(name).Config
    brought = load_mask_config(flags={"method": name, "classes": config.classes})
    # one that isn't called what its class set is has to be asked for, as weclip/plus-voc12
    assert brought == (config if short == config.classes else load_mask_config(f"{name}/{config.classes}"))
    assert short.removeprefix("plus-").removesuffix("-coarse") == config.classes
    for key, value in load_method(name).presets[short].items():
        found = getattr(config, key)
        assert (found.model_dump() if hasattr(found, "model_dump") else found) == (
            value if not isinstance(value, dict) else {**found.model_dump(), **value}
        )


@every_method
def test_every_setting_is_described_and_every_number_has_a_range(name: str) -> None:
    from wsss_pipeline.config import bounds

    kind = load_method(name).Config
    for key, owner, field in fields(kind):
        assert owner.model_fields[field].description, key
        if owner.model_fields[field].annotation in (int, float):
            assert bounds(owner, field), f"{key} has no range"
    assert section(kind, "crf") is not None


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_called_what_its_file_is(name: str) -> None:
    assert load_method(name).name == name


@every_method
def test_maps_are_one_for_each_label_in_their_order(name: str) -> None:
    made = generator(name)
    scene = SCENES[0]
    image = made.prepare(scene.image, scene.labels)
    (maps,), (reversed_maps,) = (
        made.method.scores(image.prepared.pixels[None], [classes])
        for classes in (image.classes, image.classes[::-1])
    )
    assert maps.dtype == torch.float32
    assert maps.ndim == 3
    assert len(maps) == len(scene.labels) == 3
    assert maps.amax(dim=(1, 2)).min() > 0
    torch.testing.assert_close(reversed_maps.flip(0), maps, rtol=1e-3, atol=1e-5)


@every_method
def test_two_images_in_a_batch_get_what_each_gets_alone(name: str) -> None:
    made = generator(name)
    images = [made.prepare(scene.image, scene.labels) for scene in SCENES]
    together = [found.wait()[0] for found in made.generate(images, with_cams=True)]
    for found, scene in zip(together, SCENES, strict=True):
        alone = made(scene.image, scene.labels)
        assert len(np.unique(alone.mask)) > 1
        assert (found.mask == alone.mask).mean() > 0.999
        assert found.labels == alone.labels
        assert found.cams is not None
        assert alone.cams is not None
        assert np.abs(found.cams.astype(np.float32) - alone.cams).max() < 2e-3
        assert np.abs(found.confidence.astype(int) - alone.confidence).mean() < 0.05


@pytest.mark.parametrize("name", method_names())
def test_positions_are_rounded_where_the_published_results_were_made_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resize, rounded = trunk.resize_position_table, []

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        rounded.append(options["rounded"])
        return resize(*arguments, **options)

    monkeypatch.setattr(trunk, "resize_position_table", noted)
    generator(name)(SCENES[0].image, SCENES[0].labels)
    assert set(rounded) == {name == "clip-es"}


@pytest.mark.parametrize("refine", ["par", "crf"])
def test_what_a_refiner_sees_of_excels_square_has_the_images_colours(refine: str) -> None:
    made = generator("excel", refine=refine, **{"excel.size": "square", "excel.side": 64})
    for level in (0, 1, 99, 255):
        seen = made.method.prepare(np.full((40, 70, 3), level, np.uint8)).seen
        assert seen is not None
        assert seen.shape == (40, 70, 3)
        assert seen.dtype == (np.uint8 if refine == "crf" else np.float32)
        assert np.abs(seen.astype(np.float64) - level).max() < 1e-3


def miou_of_classes(masks: list[np.ndarray], scenes: list[Scene]) -> float:
    shares = [
        ((mask == value) & (scene.mask == value)).sum() / ((mask == value) | (scene.mask == value)).sum()
        for mask, scene in zip(masks, scenes, strict=True)
        for value in np.unique(scene.mask[scene.mask > 0])
    ]
    return float(np.mean(shares))


@pytest.mark.parametrize("name", method_names())
def test_masks_lie_where_the_objects_are(name: str) -> None:
    """Far under what is published in docs/demo.md, and far over what a broken method reaches."""
    scenes = [draw_scene((77, number)) for number in range(8)]
    made = generator(name)
    masks = [made(scene.image, scene.labels).mask for scene in scenes]
    assert miou_of_classes(masks, scenes) > 0.5


@pytest.mark.parametrize("preset", preset_names())
def test_presets_of_published_systems_keep_the_published_confidence(preset: str) -> None:
    config = load_mask_config(preset=preset)
    assert config.confidence == ("product" if preset.endswith("/demo") else "posterior")
