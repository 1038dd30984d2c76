"""Folders of images as people have them, through the commands: the right masks, or one line on what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.end_to_end.conftest import mask_set, write_scored_world, wsss
from tests.end_to_end.test_bad_input import only_error
from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, open_mask_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_image
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.pictures.rows import PSEUDO_MASK, make_row
from wsss_pipeline.stages import train_seg as module

SCENES = {name: draw_scene((77, number)) for name, number in (("one", 3), ("two", 4))}
PICTURES = {name: np.ascontiguousarray(scene.image[20:84, 20:116]) for name, scene in SCENES.items()}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)


def write(folder: Path, pictures: dict[str, NDArray[Any]], suffix: str = "png") -> Path:
    for name, picture in pictures.items():
        path = folder / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = picture if picture.ndim == 2 else picture[..., [2, 1, 0, 3][: picture.shape[2]]]
        assert cv2.imwrite(str(path), stored)
    return folder


def generate(images: Path, cache: Path, *further: object) -> Result:
    labels = cache.parent / f"{cache.name}.json"
    if not labels.exists():
        labels.write_text(json.dumps({name: list(scene.labels) for name, scene in SCENES.items()}))
    return wsss(
        *("generate-masks", "--images", images, "--labels", labels, "--classes", "demo", "--clip", "demo"),
        *("--offline", "--cache", cache, "--workers", 0, "--device", "cpu", "--precision", "fp32", *further),
    )


def masks(done: Result) -> dict[str, list[list[int]]]:
    with MaskCache.open(mask_set(done)) as cache:
        return {image_id: cache[image_id].mask.tolist() for image_id in cache}


def twelve_bits(picture: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return np.rint(picture * (4095 / 255)).astype(np.uint16)


def test_twelve_bits_in_sixteen_with_their_range_are_what_they_look_like_in_eight(tmp_path: Path) -> None:
    """From the masks over a network to its masks, scores and pictures."""
    eight = write(tmp_path / "eight", PICTURES)
    twelve = write(tmp_path / "twelve", {name: twelve_bits(picture) for name, picture in PICTURES.items()})
    expected = generate(eight, tmp_path / "cache-8")
    plain = generate(twelve, tmp_path / "cache-plain")
    assert plain.exit_code == 0
    assert plain.stderr.count("less than half of 0 to 65535, for which they are taken") == 2
    assert "--pixel-range LOW:HIGH" in plain.stderr
    assert masks(plain) != masks(expected)
    ranged = generate(twelve, tmp_path / "cache", "--pixel-range", "0:4095")
    assert masks(ranged) == masks(expected)
    assert "less than half" not in ranged.stderr
    assert mask_set(plain).name == mask_set(expected).name != mask_set(ranged).name

    source = MaskCache.open(mask_set(ranged))
    row = make_row("one", find_images(twelve)["one"], {PSEUDO_MASK: source}, (200, 200))
    same = make_row("one", find_images(eight)["one"], {PSEUDO_MASK: source}, (200, 200))
    assert np.array_equal(row.cells[0].pixels, same.cells[0].pixels)
    pages = []
    for images, made in ((eight, expected), (twelve, ranged)):
        page = tmp_path / f"page-{images.name}"
        assert wsss("preview", "--cache", mask_set(made), "--images", images, "--html", page).exit_code == 0
        pages.append(sorted(path.read_bytes() for path in page.rglob("*.jpg")))
    assert len(pages[0]) == 2
    assert pages[0] == pages[1]

    trained = wsss(
        *("train-seg", "--cache", mask_set(ranged), "--images", twelve, "--out", tmp_path / "run"),
        *("--network", "segformer", "--encoder", "tiny", "--weights", "none", "--iterations", 2),
        *("--batch-size", 2, "--crop", 64, "--min-confidence", 0, "--workers", 0, "--device", "cpu"),
    )
    assert trained.exit_code == 0, trained.output
    assert "less than half" not in trained.stderr
    checkpoint = mask_set(trained)
    assert json.loads((checkpoint / "config.json").read_text())["pixel_range"] == [0, 4095]
    # after so few updates it would give every pixel the same
    weights = load_file(checkpoint / "model.safetensors")
    for name in (name for name in weights if "classifier" in name):
        weights[name] *= 100
    save_file(weights, checkpoint / "model.safetensors")

    seen = {}
    for name, images, further in (
        ("eight", eight, ()),
        ("twelve", twelve, ()),
        ("other", twelve, ("--pixel-range", "0:65535")),
    ):
        out, given = tmp_path / f"out-{name}", ("--checkpoint", checkpoint, "--images", images, *further)
        done = wsss("predict", *given, "--out", out, "--confidence", "--device", "cpu")
        assert done.exit_code == 0, done.output
        relabelled = wsss(
            *("relabel", *given, "--cache", tmp_path / f"relabel-{name}", "--workers", 0, "--refine", "none")
        )
        scored = wsss("evaluate", *given, "--gt", tmp_path / "out-eight" / "masks", "--json", "-")
        with MaskCache.open(mask_set(relabelled)) as cache:
            again = {image_id: cache[image_id].confidence.tobytes() for image_id in cache}
        seen[name] = [
            {path.name: path.read_bytes() for path in (out / "confidence").iterdir()},
            again,
            json.loads(scored.stdout)["pixel_accuracy"],
        ]
    assert seen["twelve"] == seen["eight"]
    assert seen["twelve"][2] == 1
    assert len(np.unique(cv2.imread(str(tmp_path / "out-eight/confidence/one.png")))) > 20
    assert seen["other"][0] != seen["twelve"][0]
    assert seen["other"][1] != seen["twelve"][1]


def test_prompts_are_learned_and_ranked_of_twelve_bits_as_of_eight(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"one": ["ball", "mushroom"], "two": ["kite", "ball"]}))
    found = []
    for name, change, further in (
        ("eight", np.asarray, ()),
        ("twelve", twelve_bits, ("--pixel-range", "0:4095")),
        ("plain", twelve_bits, ()),
    ):
        images = write(tmp_path / name, {i: change(picture) for i, picture in PICTURES.items()})
        given = ("--images", images, "--labels", tmp_path / "labels.json", "--clip", "demo", "--offline")
        given = (*given, "--classes", "demo", "--precision", "fp32", "--device", "cpu", *further)
        learned = wsss(
            *("learn-prompts", *given, "--out", tmp_path / f"run-{name}", "--iterations", 2, "--workers", 0),
            *("--batch-size", 2, "--set", "optimisation.warm_up=0"),
        )
        ranked = wsss("select-prompt", *given, "--json", "--template", "a {}", "--template", "the {} here")
        assert learned.exit_code == ranked.exit_code == 0, (learned.output, ranked.output)
        context = load_file(learned.stdout.splitlines()[-1])["context"].tolist()
        found.append((context, json.loads(ranked.stdout)))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]


def test_a_training_run_takes_a_range_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validated = []

    def read(path: Path, pixel_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
        validated.append(pixel_range)
        return read_image(path, pixel_range)

    monkeypatch.setattr(module, "read_image", read)
    twelve = write(tmp_path / "twelve", {name: twelve_bits(picture) for name, picture in PICTURES.items()})
    truth = write(tmp_path / "truth", {name: np.ones((64, 96), np.uint8) for name in PICTURES})
    common = (
        *("train-seg", "--gt-masks", truth, "--classes", "ball,", "--images", twelve, "--iterations", 1),
        *("--network", "segformer", "--encoder", "tiny", "--weights", "none", "--batch-size", 1),
        *("--crop", 64, "--workers", 0, "--device", "cpu"),
    )
    plain = wsss(*common, "--out", tmp_path / "plain")
    assert "less than half of 0 to 65535" in plain.stderr
    assert "pixel_range" not in json.loads((mask_set(plain) / "config.json").read_text())
    ranged = wsss(*common, "--out", tmp_path / "ranged", "--pixel-range", "0:4095", "--val-gt", truth)
    assert "less than half" not in ranged.stderr
    weights = [(mask_set(done) / "model.safetensors").read_bytes() for done in (plain, ranged)]
    assert weights[0] != weights[1]
    assert validated == [(0, 4095)] * 2


@pytest.mark.parametrize("text", ["4095", "4095:0", "a:b", "0:nan", "0:1:2", "auto"])
def test_what_is_no_range_is_refused_with_its_form(tmp_path: Path, text: str) -> None:
    done = generate(write(tmp_path / "images", PICTURES), tmp_path / "cache", "--pixel-range", text)
    assert done.exit_code == 2
    assert f"{text!r} isn't a range; write LOW:HIGH, for example 0:4095" in only_error(done.stderr)


def test_cut_outs_that_look_the_same_get_the_same_masks_whatever_lies_under_them(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    found = []
    for number in range(3):
        pictures = {}
        for name, picture in PICTURES.items():
            alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
            alpha[:, :40] = 0
            hidden = (255, 0, chance.integers(0, 256, picture.shape))[number]
            pictures[name] = np.dstack([np.where(alpha > 0, picture, hidden).astype(np.uint8), alpha])
        found.append(masks(generate(write(tmp_path / f"{number}", pictures), tmp_path / f"cache-{number}")))
    white = {name: picture.copy() for name, picture in PICTURES.items()}
    for picture in white.values():
        picture[:, :40] = 255
    expected = masks(generate(write(tmp_path / "white", white), tmp_path / "cache-white"))
    assert found == [expected] * 3


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scored_world(tmp_path_factory.mktemp("scored"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "images: holds no image, nor any other file; check the folder"),
        ({"a.jp2": b"x", "b/c.JP2": b"x", "notes.txt": b"x"}, "but 2 .jp2, 1 .txt; convert to JPEG or PNG"),
        ({"a.tar.gz": b"x"}, "holds no image that is read, but 1 .gz; check the folder"),
    ],
)
def test_a_command_without_any_image_says_so(
    scored: Path, tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    images = tmp_path / "images"
    for name, content in {"": None, **files}.items():
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            images.mkdir()
        else:
            (images / name).write_bytes(content)
    run, labels = ("--checkpoint", scored / "run"), tmp_path / "labels.json"
    labels.write_text('{"a": ["cat"]}')
    of_labels = ("--labels", labels, "--classes", "cat,dog")
    for command in (
        ("generate-masks", *of_labels, "--clip", "demo", "--cache", tmp_path / "cache"),
        ("generate-masks", "--classes", "cat,dog", "--clip", "demo", "--cache", tmp_path / "cache"),
        ("predict", *run, "--out", tmp_path / "out"),
        ("relabel", *run, "--cache", tmp_path / "cache"),
        ("preview", "--cache", scored / "cache", "--out", tmp_path / "sheet.png"),
        ("train-seg", "--cache", scored / "cache", "--out", tmp_path / "out"),
        ("evaluate", *run, "--gt", scored / "truth"),
        ("propose-regions", "--sam", "nowhere", "--out", tmp_path / "out"),
        ("learn-prompts", *of_labels, "--clip", "demo", "--out", tmp_path / "out"),
        ("select-prompt", *of_labels, "--clip", "demo"),
    ):
        done = wsss(*command, "--images", images)
        assert done.exit_code == 2, (command, done.output)
        assert said in only_error(done.stderr), command
    assert {path.name for path in tmp_path.iterdir()} == {"images", "labels.json"}


def test_an_image_that_is_there_in_another_format_is_not_called_missing(tmp_path: Path) -> None:
    images = write(tmp_path / "images", {"one": PICTURES["one"]})
    (images / "two.jp2").write_bytes(b"x")
    done = generate(images, tmp_path / "cache")
    assert done.exit_code == 1
    assert "two: there, but .jp2 isn't read; convert to JPEG or PNG" in done.stderr
    assert "no such image" not in done.stderr
    assert "formats that aren't read are left out: 1 .jp2" in done.stderr
    assert list(masks(done)) == ["one"]


def test_heic_alone_is_named_with_what_to_install(tmp_path: Path, without_heic: None) -> None:
    (tmp_path / "images").mkdir()
    for name in ("one.heic", "two.HEIC"):
        (tmp_path / "images" / name).write_bytes(HEIC)
    done = generate(tmp_path / "images", tmp_path / "cache")
    assert done.exit_code == 2
    assert "2 .heic; install wsss-pipeline[heic], or convert to JPEG or PNG" in only_error(done.stderr)
    # a phone's pictures that were only given another name
    (tmp_path / "named").mkdir()
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / "named" / name).write_bytes(HEIC)
    done = generate(tmp_path / "named", tmp_path / "cache")
    assert done.exit_code == 2
    assert "one.jpg: its content is HEIC, which isn't read; install wsss-pipeline[heic]" in done.stderr


def test_masks_beside_images_are_told_apart_by_suffix(tmp_path: Path) -> None:
    images = write(tmp_path / "images", PICTURES)
    expected = masks(generate(images, tmp_path / "cache"))
    both = shutil.copytree(images, tmp_path / "both")
    for name in PICTURES:
        (both / f"{name}.png").rename(both / f"{name}.jpg")
    indices = {name: np.array(mask, np.uint8) for name, mask in expected.items()}
    write(both, indices)
    refused = generate(both, tmp_path / "cache-both")
    assert refused.exit_code == 2
    assert "have the same image id 'one'; rename one of them, or say" in only_error(refused.stderr)
    assert "--image-suffix .jpg" in refused.stderr
    done = generate(both, tmp_path / "cache-both", "--image-suffix", ".jpg")
    assert masks(done) == expected
    scores = wsss("evaluate", "--cache", mask_set(done), "--gt", both, "--gt-suffix", ".png", "--json", "-")
    assert json.loads(scores.stdout)["miou"] == 1

    named = write(shutil.copytree(images, tmp_path / "named"), {f"{i}_mask": m for i, m in indices.items()})
    warned = wsss(
        *("predict", "--checkpoint", write_scored_world(tmp_path / "scored") / "run", "--images", named),
        *("--out", tmp_path / "out"),
    )
    assert "2 files look like masks of other images, such as one_mask, two_mask" in warned.stderr
    assert "--image-suffix '!_mask'" in warned.stderr
    chosen = wsss(
        *("predict", "--checkpoint", tmp_path / "scored" / "run", "--images", named),
        *("--out", tmp_path / "chosen", "--image-suffix", "!_mask"),
    )
    assert {path.stem for path in (tmp_path / "chosen" / "masks").iterdir()} == set(PICTURES)
    assert "look like masks" not in chosen.stderr
    scores = wsss("evaluate", "--cache", mask_set(done), "--gt", named, "--gt-suffix", "_mask", "--json", "-")
    assert json.loads(scores.stdout)["miou"] == 1
    trained = wsss(
        *("train-seg", "--gt-masks", named, "--gt-suffix", "_mask", "--classes", "demo", "--images", named),
        *("--image-suffix", "!_mask", "--val-gt", named, "--out", tmp_path / "run", "--iterations", 1),
        *("--network", "segformer", "--encoder", "tiny", "--weights", "none", "--batch-size", 2),
        *("--crop", 64, "--workers", 0, "--device", "cpu"),
    )
    assert trained.exit_code == 0, trained.output
    assert "masks: ground truth" in trained.stderr
    assert "2 images" in trained.stderr


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"one": [], "two": []}, "names 2 images and no class of any"),
        (
            {"x/eins": ["ball"], "x/zwei": ["kite"]},
            "none of the 2 images that the labels or the split name is there: they name 'x/eins', 'x/zwei', the "
            "images are 'one', 'two'; image ids are paths below",
        ),
    ],
)
def test_labels_of_which_nothing_can_come_are_refused(
    tmp_path: Path, labels: dict[str, list[str]], said: str
) -> None:
    (tmp_path / "cache.json").write_text(json.dumps(labels))
    done = generate(write(tmp_path / "images", PICTURES), tmp_path / "cache")
    assert done.exit_code == 2
    assert said in only_error(done.stderr)
    assert not (tmp_path / "cache").exists()


def test_only_where_no_image_at_all_can_be_used_has_nothing_been_done(scored: Path, tmp_path: Path) -> None:
    images = write(tmp_path / "images", PICTURES)
    (images / "two.png").write_bytes(b"x")
    network = ("predict", "--checkpoint", scored / "run", "--images", images, "--out", tmp_path / "out")
    assert generate(images, tmp_path / "cache").exit_code == 1
    assert wsss(*network).exit_code == 1
    (images / "one.png").write_bytes(b"x")
    assert generate(images, tmp_path / "other").exit_code == 2
    assert wsss(*network, "--overwrite").exit_code == 2


def test_an_empty_mask_set_is_not_exported(tmp_path: Path) -> None:
    folder = open_mask_set(tmp_path, MaskSet(name="none", determinants={}, class_names=("cat",)))
    with MaskWriter(folder) as writer:
        writer.finish(())
    done = wsss("export-masks", "--cache", folder, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "holds no image yet; run generate-masks on it first" in only_error(done.stderr)
    assert not (tmp_path / "out").exists()


def test_pages_and_bands_that_make_no_picture_cost_themselves_alone(tmp_path: Path) -> None:
    images = write(tmp_path / "images", {"one": PICTURES["one"]})
    small = Image.new("RGB", (40, 30))
    large = Image.fromarray(PICTURES["two"]).resize((200, 100))
    small.save(images / "two.tiff", save_all=True, append_images=[large])
    done = generate(images, tmp_path / "cache")
    assert done.exit_code == 1
    assert "page 1 has 40 x 30 pixels, page 2 200 x 100: the first looks like a thumbnail" in done.stderr
    large.save(images / "two.tiff", save_all=True, append_images=[small])
    done = generate(images, tmp_path / "cache")
    assert done.exit_code == 0
    assert "two.tiff has several pages or frames, of which the first one counts" in done.stderr
