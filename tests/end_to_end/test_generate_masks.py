"""``wsss generate-masks`` as its users meet it: masks, resume, what fails and what doesn't."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.end_to_end.conftest import GOLDEN, LABELS, Run, generate_arguments, mask_set, write_labels, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.clip.text import ClassEmbeddings
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.refine.dense_crf import has_pydensecrf

needs_pydensecrf = pytest.mark.skipif(
    not has_pydensecrf(), reason="the optional package pydensecrf isn't installed"
)


def contents(path: Path) -> dict[str, tuple[bytes, bytes]]:
    with MaskCache.open(path) as cache:
        return {
            image_id: (cache[image_id].mask.tobytes(), cache[image_id].confidence.tobytes())
            for image_id in cache
        }


def test_masks_of_the_present_classes_in_the_size_of_the_pictures(generate: Run, world: Path) -> None:
    result = generate()
    assert result.exit_code == 0
    path = mask_set(result)
    assert path.parent == world / "cache"
    names = load_class_set("voc12")
    with MaskCache.open(path) as cache:
        assert set(cache) == set(LABELS)
        assert cache.class_names == names.names
        for image_id, labels in LABELS.items():
            record = cache[image_id]
            with Image.open(world / "images" / f"{image_id}.png") as picture:
                assert record.mask.shape == picture.size[::-1]
            assert record.labels == tuple(labels)
            assert set(np.unique(record.mask)) <= {0, *(names.index(label) for label in labels)}
            assert cache.record_info(image_id).scale == 1.0
        assert any(len(np.unique(cache[image_id].mask)) > 1 for image_id in cache), "all masks are empty"


@pytest.mark.parametrize("crf", ["lattice", pytest.param("pydensecrf", marks=needs_pydensecrf)])
@pytest.mark.parametrize(("crf_image", "key"), [("bgr", "plain"), ("reference", "quirk")])
def test_masks_equal_the_published_ones(
    generate: Run, monkeypatch: pytest.MonkeyPatch, crf: str, crf_image: str, key: str
) -> None:
    """The golden text rows stand in for a text tower; all else is the command's own."""
    with np.load(GOLDEN / "expected" / "text.npz") as text:
        rows = ClassEmbeddings(torch.from_numpy(text["fg"]), torch.from_numpy(text["bg"]))
    monkeypatch.setattr("wsss_pipeline.clip.learned_prompts.class_embeddings", lambda *arguments: rows)
    path = mask_set(generate("--store-cams", "--crf", crf, "--crf-image", crf_image, "--precision", "fp32"))
    with MaskCache.open(path) as cache:
        for name in LABELS:
            record = cache[name]
            with np.load(GOLDEN / "expected" / f"{name}.npz") as expected:
                assert (record.with_ignore(0.95) != expected[f"mask_{key}"]).sum() <= 5
                assert (record.mask != expected[f"label_{key}"]).sum() <= 5
                assert np.abs(record.cams.astype(np.float32) - expected["refined_high"]).max() < 1e-3


def test_a_second_run_computes_nothing_and_loads_no_clip(
    generate: Run, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    first = generate()
    files = {path: path.stat().st_mtime_ns for path in mask_set(first).glob("shard-*")}
    monkeypatch.setattr("wsss_pipeline.pseudo_masks.generator.load_clip", None)
    second = generate("--json")
    assert second.exit_code == 0
    assert mask_set(second) == mask_set(first)
    assert "CLIP was not loaded" in second.stderr
    assert json.loads(second.stdout.splitlines()[0])["reused"] == len(LABELS)
    assert {path: path.stat().st_mtime_ns for path in mask_set(second).glob("shard-*")} == files


def test_only_what_changed_is_made_again(generate: Run, world: Path) -> None:
    before = contents(mask_set(generate()))
    write_labels(world, {**LABELS, "cat": ["cat"]})
    with Image.open(world / "images" / "astronaut.png") as picture:
        flipped = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flipped.save(world / "images" / "astronaut.png")
    result = generate("--json")
    summary = json.loads(result.stdout.splitlines()[0])
    assert (summary["computed"], summary["reused"]) == (2, 3)
    after = contents(mask_set(result))
    changed = {image_id for image_id in before if before[image_id] != after[image_id]}
    assert "astronaut" in changed
    assert changed <= {"cat", "astronaut"}
    with MaskCache.open(mask_set(result)) as cache:
        assert cache["cat"].labels == ("cat",)


def test_what_changes_masks_changes_the_mask_set(generate: Run) -> None:
    plain = mask_set(generate("--limit", 1))
    others = [
        ("--template", "a photo of a {}."),
        ("--crf-image", "reference"),
        ("--confidence", "margin"),
        ("--crf", "none"),
        ("--set", "cam.threshold=0.5"),
        ("--precision", "fp16"),
        ("--max-pixels", "5000"),
    ]
    paths = {mask_set(generate("--limit", 1, *arguments)) for arguments in others}
    assert len(paths | {plain}) == len(others) + 1
    same = [("--batch-size", "4"), ("--workers", "1"), ("--store-cams",), ("--preset", "clip-es/voc12")]
    assert {mask_set(generate("--limit", 1, *arguments)) for arguments in same} == {plain}


@pytest.mark.parametrize("crf", ["lattice", pytest.param("pydensecrf", marks=needs_pydensecrf)])
@pytest.mark.parametrize("arguments", [("--batch-size", 4), ("--workers", 2), ("--shard", "0/1")])
def test_masks_do_not_depend_on_how_they_are_made(
    generate: Run, world: Path, arguments: tuple[object, ...], crf: str
) -> None:
    for copy in ("cat", "motorcycle"):  # neighbours of one size, for batches
        shutil.copy(world / "images" / f"{copy}.png", world / "images" / f"{copy}2.png")
    write_labels(world, dict(sorted({**LABELS, "cat2": ["sofa"], "motorcycle2": ["car"]}.items())))
    plain = mask_set(generate("--crf", crf))
    other = mask_set(generate("--crf", crf, *arguments, cache="other"))
    assert contents(plain) == contents(other)


def test_shards_make_one_cache(generate: Run) -> None:
    whole = contents(mask_set(generate()))
    parts = [mask_set(generate("--shard", f"{index}/3", cache="parts")) for index in range(3)]
    assert len(set(parts)) == 1
    assert contents(parts[0]) == whole
    assert json.loads((parts[0] / "manifest.json").read_text())["completion"]["complete"] is True


def test_cams_are_stored_on_request_even_later(generate: Run) -> None:
    with MaskCache.open(mask_set(generate())) as cache:
        assert cache["cat"].cams is None
    with MaskCache.open(mask_set(generate("--store-cams"))) as cache:
        cams = [cache[image_id].cams for image_id in cache]
        assert all(maps is not None and maps.dtype == np.float16 for maps in cams)
        assert cache["cat"].cams.shape == (2, 120, 180)
        assert min(maps.min() for maps in cams) == 0
        assert 0.5 < max(maps.max() for maps in cams) <= 1


def test_overwrite_computes_again(generate: Run) -> None:
    generate()
    result = generate("--overwrite", "--json")
    assert json.loads(result.stdout.splitlines()[0])["computed"] == len(LABELS)


def test_images_without_labels_are_background_and_counted(generate: Run, world: Path) -> None:
    write_labels(world, {**LABELS, "cat": []})
    result = generate("--store-cams")
    assert result.exit_code == 0
    assert "1 of 5 images without a label: all background" in result.stderr
    with MaskCache.open(mask_set(result)) as cache:
        assert not cache["cat"].mask.any()
        assert (cache["cat"].confidence == 200).all()


def test_images_that_the_labels_do_not_name_are_left_out(generate: Run, world: Path) -> None:
    write_labels(world, {"cat": ["cat"]})
    result = generate()
    assert result.exit_code == 0
    assert "since the labels don't name them: 4" in result.stderr
    with MaskCache.open(mask_set(result)) as cache:
        assert list(cache) == ["cat"]


def test_bad_images_are_reported_skipped_and_counted(
    generate: Run, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsss_pipeline.runtime.progress.SECONDS_BETWEEN_LINES", 0)
    images = world / "images"
    whole = (images / "cat.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("no picture")
    huge = bytearray(whole)
    huge[16:24] = (10**6).to_bytes(4, "big") * 2
    (images / "huge.png").write_bytes(huge)
    bad = ["cut", "empty", "text", "huge", "absent"]
    write_labels(world, {**{name: ["cat"] for name in bad}, **LABELS})
    result = generate("--json")
    assert result.exit_code == 1
    summary = json.loads(result.stdout.splitlines()[0])
    assert sorted(summary["failed"]) == sorted(bad)
    assert summary["computed"] == len(LABELS)
    assert all(0 < summary["busy"][stage] < 60 for stage in ("reading", "CLIP", "refining", "writing"))
    assert 0 < summary["computing"] <= summary["seconds"]
    last = [line for line in result.stderr.splitlines() if "images/s, ETA" in line][-1]
    assert last.startswith("9/9 images, ")
    assert last.endswith(", 4 failed")
    for name in bad:
        assert f"  {name}: " in result.stderr
    assert contents(mask_set(result)).keys() == LABELS.keys()
    assert json.loads((mask_set(result) / "manifest.json").read_text())["completion"]["complete"] is False
    (images / "empty.png").write_bytes(whole)
    again = json.loads(generate("--json").stdout.splitlines()[0])
    assert (again["computed"], again["reused"], len(again["failed"])) == (1, len(LABELS), 4)


def test_large_images_are_scaled_and_the_mask_is_not(generate: Run) -> None:
    result = generate("--max-pixels", 5000)
    assert result.exit_code == 0
    assert "4 of 5 images scaled down" in result.stderr
    with MaskCache.open(mask_set(result)) as cache:
        assert cache["cat"].mask.shape == (120, 180)
        assert cache.record_info("cat").scale == pytest.approx((5000 / (120 * 180)) ** 0.5)
        assert cache.record_info("tiny_odd").scale == 1


@pytest.mark.parametrize("size", [(304, 64), (1, 1), (3, 700), (700, 2), (16, 16), (17, 15)])
def test_odd_sizes_are_ordinary(generate: Run, world: Path, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).save(world / "images" / "odd.png")
    write_labels(world, {"odd": ["dog", "cat"]})
    result = generate()
    assert result.exit_code == 0
    with MaskCache.open(mask_set(result)) as cache:
        assert cache["odd"].mask.shape == size[::-1]


def test_rotation_tags_are_ignored_with_few_warnings(generate: Run, world: Path) -> None:
    names = ["turned", "turned2", "turned3", "turned4"]
    for name in names:
        with Image.open(world / "images" / "cat.png") as picture:
            exif = picture.getexif()
            exif[0x0112] = 6
            picture.save(world / "images" / f"{name}.jpg", exif=exif)
    write_labels(world, {name: ["cat"] for name in names})
    result = generate()
    assert result.stderr.count("has an EXIF rotation tag, which is ignored") == 3
    assert "and 1 more images with an EXIF rotation tag" in result.stderr
    with MaskCache.open(mask_set(result)) as cache:
        assert cache["turned"].mask.shape == (120, 180)


@pytest.mark.parametrize(
    "arguments", [("--crf", "none"), ("--crf", "lattice"), ("--set", "cam.affinity=false")]
)
def test_every_part_can_be_chosen(generate: Run, arguments: tuple[object, ...]) -> None:
    result = generate("--limit", 2, *arguments)
    assert result.exit_code == 0
    assert len(contents(mask_set(result))) == 2


def test_dry_run_tells_and_writes_nothing(generate: Run, world: Path) -> None:
    (world / "images" / "empty.png").write_bytes(b"")
    write_labels(world, {**LABELS, "empty": ["cat"], "absent": ["cat"], "cat": []})
    result = generate("--dry-run")
    assert result.exit_code == 0
    assert "images: 6, 0 of them in the cache, 6 to compute" in result.stdout
    assert "no file is there: 1" in result.stdout
    assert "can't be used: 1" in result.stdout
    assert not (world / "cache").exists()
    generate()
    assert "5 of them in the cache, 1 to compute" in generate("--dry-run").stdout


def test_dry_run_tells_the_disk_to_be_taken(
    generate: Run, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsss_pipeline.pseudo_masks.job.BYTES_PER_PIXEL", 2**20)
    monkeypatch.setattr("wsss_pipeline.pseudo_masks.job.BYTES_PER_CAM_PIXEL", 2**21)
    write_labels(world, {"cat": ["cat", "sofa"], "tiny_odd": []})
    mask, cams = 180 * 120 + 67 * 49, 2 * 180 * 120  # two maps for the first image, none for the second
    assert f"disk: about {mask}.0 MiB" in generate("--dry-run").stdout
    assert f"disk: about {mask + 2 * cams}.0 MiB" in generate("--dry-run", "--store-cams").stdout


def test_labels_in_folders_and_names_as_classes(world: Path, clip: Path) -> None:
    for image_id, labels in LABELS.items():
        folder = world / "by_class" / labels[0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "images" / f"{image_id}.png", folder)
    result = wsss(
        *("generate-masks", "--images", world / "by_class", "--classes", "cat,person,bicycle,tvmonitor,bird"),
        *("--clip", clip, "--cache", world / "cache", "--workers", 0),
    )
    assert result.exit_code == 0
    assert mask_set(result).name.startswith("cat-person-bicycle")
    with MaskCache.open(mask_set(result)) as cache:
        assert cache["bird/tiny_odd"].labels == ("bird",)


def test_tar_shards_give_the_masks_of_files(generate: Run, world: Path, clip: Path) -> None:
    expected = mask_set(generate())
    for number, file in enumerate(sorted((world / "images").glob("*.png"))):
        with tarfile.open(world / f"{number % 2}.tar", "a") as tar:
            tar.add(file, file.name)
    arguments = generate_arguments(world, clip, "from-tar")
    arguments[arguments.index("--images") + 1] = world / "{0..1}.tar"
    result = wsss(*arguments)
    assert result.exit_code == 0, result.stderr
    with MaskCache.open(expected) as files, MaskCache.open(mask_set(result)) as tars:
        assert set(files) == set(tars)
        assert all(np.array_equal(files[key].mask, tars[key].mask) for key in files)
    again = wsss(*arguments)
    assert "nothing was left to compute" in again.stderr
