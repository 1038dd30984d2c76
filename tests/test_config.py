"""Configuration: layers, types, ranges, messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsss_pipeline.config import to_yaml
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.methods import load_mask_config as load_config
from wsss_pipeline.methods import preset_names
from wsss_pipeline.methods.clip_es import ClipEsConfig as MaskConfig


def test_defaults_are_those_of_clip_es() -> None:
    config = load_config()
    assert config == MaskConfig()
    assert (config.cam.threshold, config.cam.affinity_layers, config.cam.sinkhorn_rounds) == (0.4, 8, 3)
    assert (config.crf.bilateral_sxy, config.crf.bilateral_srgb, config.crf.bilateral_weight) == (
        67.0,
        3.0,
        4.0,
    )


def test_presets_load_and_name_their_class_set() -> None:
    names = ("coco14", "demo", "voc12")
    expected = [f"{method}/{name}" for method in ("clip-es", "excel", "fma", "weclip") for name in names]
    others = ["weclip/plus-coco14", "weclip/plus-voc12", "fma/coco14-coarse", "fma/voc12-coarse"]
    assert preset_names() == sorted([*expected, *others])
    assert load_config("clip-es/coco14").classes == "coco14"
    assert load_config("clip-es/coco14").cam.threshold == 0.7


def test_a_built_in_class_set_brings_its_preset() -> None:
    assert load_config(flags={"classes": "coco14"}).cam.threshold == 0.7
    assert load_config(overrides=["classes=coco14"]).cam.threshold == 0.7
    assert load_config(flags={"classes": "cat,dog"}).cam.threshold == 0.4


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("cam: {threshold: 0.5, sinkhorn_rounds: 5}\nclip: {weights: from-file}\n")
    config = load_config("clip-es/coco14", file, ["cam.sinkhorn_rounds=7"], {"clip.weights": "from-flag"})
    assert config.cam.threshold == 0.5
    assert config.cam.sinkhorn_rounds == 7
    assert config.clip.weights == "from-flag"
    assert config.classes == "coco14"


def test_flags_that_were_not_given_change_nothing() -> None:
    assert load_config(flags={"clip.weights": None, "classes": None}) == MaskConfig()


def test_yaml_reads_back_to_the_same(tmp_path: Path) -> None:
    config = load_config(
        "clip-es/coco14", overrides=["templates=['a {}', 'Überblick: {}']", "crf.backend=none"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), "utf-8")
    assert load_config(file=file) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cam.treshold=0.4", "did you mean 'cam.threshold'?"),
        ("nonsense=1", "unknown key 'nonsense'"),
        ("cam=3", "holds several keys"),
        ("cam.threshold=high", "takes a value of type float"),
        ("cam.affinity_layers=true", "takes a value of type int"),
        ("cam.affinity=1", "takes a value of type bool"),
        ("cam.threshold=1.5", "must lie between 0 and 1"),
        ("cam.threshold=.nan", "must lie between 0 and 1"),
        ("max_pixels=0", "must lie between"),
        ("crf.backend=gpu", "choose one of auto, pydensecrf, lattice, none"),
        ("templates=[1]", "takes a list of texts"),
        ("threshold", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("cam.threshold=[", "not valid YAML"),
    ],
)
def test_bad_settings_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["- a\n- b\n", "1: x\n", "null: x\n", "a: [", "!!python/object/apply:os.system ['true']", "\x00", "text"],
)
def test_bad_files_are_refused_and_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(file=file)


def test_missing_file_and_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(file=Path("/nonexistent/config.yaml"))
    with pytest.raises(ConfigError, match="known: clip-es/coco14, clip-es/demo, clip-es/voc12"):
        load_config("clip-es/voc")
