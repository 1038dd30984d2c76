"""A job as a user of the library makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.conftest import GOLDEN
from wsss_pipeline import MaskGenerator
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.config import MaskConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.errors import ClassSetError, ConfigError, ImageError, LabelError
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.pseudo_masks.job import JobPaths, MaskJob, check_work, plan_masks
from wsss_pipeline.pseudo_masks.run import run_share

VOC = load_class_set("voc12")
IMAGES = find_images(GOLDEN / "images")


def test_aliases_become_the_names_of_their_classes() -> None:
    labels = {"a": ("tv", "cat", "tvmonitor"), "b": (), "c": ("cat",)}
    job = MaskJob(IMAGES, labels, VOC, MaskConfig())
    assert job.labels == {"a": ("tvmonitor", "cat"), "b": (), "c": ("cat",)}
    assert replace(job, workers=3).labels == job.labels
    own = {"a": ("cat",)}
    assert MaskJob(IMAGES, own, VOC, MaskConfig()).labels is own, "nothing is copied where nothing changes"


def test_a_label_that_is_no_class_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ClassSetError, match="unknown class 'catt'; did you mean 'cat'"):
        MaskJob(IMAGES, {"cat": ("cat",), "x": ("catt",)}, VOC, MaskConfig())


def test_the_cache_stores_the_names_of_classes(tmp_path: Path, clip: Path) -> None:
    classes = load_class_set("voc12")
    config = load_mask_config(None, flags={"clip.weights": str(clip), "templates": ["a {}."]})
    job = MaskJob(
        IMAGES,
        {"cat": ("tv", "cat")},
        classes,
        config,
        cache_dir=tmp_path,
        device="cpu",
        offline=True,
        store_cams=True,
    )
    with MaskCache.open(run_share(job, quiet=True).path) as cache:
        assert cache["cat"].labels == ("tvmonitor", "cat")
    assert run_share(job, quiet=True).reused == 1


def test_a_generator_stores_the_names_of_classes_each_once(clip: Path) -> None:
    generator = MaskGenerator("voc12", clip=str(clip), device="cpu", offline=True)
    pixels = np.zeros((32, 32, 3), np.uint8)
    prepared = generator.prepare(pixels, ["tv", "cat", "tvmonitor"])
    assert prepared.labels == ("tvmonitor", "cat")
    assert prepared.classes == [20, 8]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_tells_its_choices_unless_another_process_does(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture, quiet: bool
) -> None:
    config = load_mask_config(None, flags={"clip.weights": str(clip), "refine": "none"})
    labels: dict[str, tuple[str, ...]] = {"cat": ("cat",)}
    job = MaskJob(IMAGES, labels, VOC, config, cache_dir=tmp_path, device="cpu", offline=True)
    maker = job.maker()
    with caplog.at_level("INFO"):
        run_share(job, maker, quiet=quiet)
    assert all((line in caplog.messages) != quiet for line in maker.lines())
    assert ("1 images: 0 in the cache, 1 to compute" in caplog.messages) != quiet


def test_254_classes_are_the_most_that_fit_into_8_bits(tmp_path: Path, clip: Path) -> None:
    """With a class or without one."""
    classes = load_class_set(",".join(f"c{number}" for number in range(1, 255)))
    config = load_mask_config(None, flags={"clip.weights": str(clip), "refine": "none"})
    labels: dict[str, tuple[str, ...]] = {"cat": ("c254",), "tiny_odd": ()}
    job = MaskJob(IMAGES, labels, classes, config, cache_dir=tmp_path, device="cpu", offline=True)
    with MaskCache.open(run_share(job, quiet=True).path) as cache:
        assert {cache[image_id].mask.dtype for image_id in labels} == {np.dtype(np.uint8)}


CONTRADICTIONS: list[tuple[JobPaths, str]] = [
    ({}, "give the images once"),
    ({"images": "i", "voc": "v", "split": "s"}, "give the images once"),
    ({"voc": "v"}, "--split goes with --voc or --coco"),
    ({"images": "i", "split": "s"}, "--split goes with --voc or --coco"),
    ({"voc": "v", "split": "s", "image_suffix": ".png"}, "--image-suffix goes with --images"),
    ({"coco": "c", "split": "s", "labels": "l"}, "--labels goes with --images"),
    ({"voc": "v", "split": "s", "labels_format": "csv"}, "--labels-format goes with --labels"),
    ({"images": "i"}, "no classes given"),
]


@pytest.mark.parametrize(("paths", "message"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused_before_anything_is_read(
    paths: JobPaths, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskJob.read(**paths)


def test_a_folder_for_each_class_stands_for_labels(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    job = MaskJob.read(images=tmp_path, classes="cat,dog")
    assert job.labels == {"cat/a": ("cat",), "dog/a": ("dog",)}


def test_masks_do_not_go_into_an_input(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (32, 32)).save(photos / "a.png")
    (tmp_path / "labels.csv").write_text("image,labels\na,ball\n")
    for cache, fits in (
        (photos, False),
        (photos / "cache", False),
        (tmp_path, True),
        (tmp_path / "cache", True),
    ):
        job = MaskJob.read(
            {"clip.weights": "demo"},
            images=photos,
            labels=tmp_path / "labels.csv",
            classes="demo",
            cache=cache,
        )
        if fits:
            assert plan_masks(job).image_ids == ["a"]
        else:
            with pytest.raises(ConfigError, match=r"--cache .* lies in --images"):
                plan_masks(job)


def test_work_of_which_nothing_can_come_is_refused(tmp_path: Path) -> None:
    images = {"a": tmp_path / "a.png"}
    with pytest.raises(ImageError, match=r"none of the 1 images .* they name 'a', the images are 'a'"):
        check_work(images, {"a": None}, {})
    (tmp_path / "a.png").touch()
    with pytest.raises(
        ImageError, match=r"they name 'b', the images are 'a'; 'b' is there, but .*; image ids"
    ):
        check_work(images, {"b": ("cat",)}, {"b": "there, but .jp2 isn't read"})
    with pytest.raises(LabelError, match="none of the 2 images has a class"):
        check_work(images, {"a": (), "b": ()}, {})
    check_work(images, {"b": (), "a": None}, {})
    check_work(images, {"b": ("cat",), "a": ()}, {})
