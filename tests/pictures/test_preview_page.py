"""The page to look through masks: the folder that is written, and what a browser makes of it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.end_to_end.conftest import write_scored_world, wsss
from tests.pictures.browser import Browser, needs_chromium
from tests.pictures.conftest import CAT, DOG
from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter
from wsss_pipeline.cache.manifest import open_mask_set
from wsss_pipeline.data.classes import voc_palette
from wsss_pipeline.data.datasets import read_split, split_line
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.errors import MaskError, OutputError
from wsss_pipeline.evaluation.quality import likely_wrong
from wsss_pipeline.pictures.preview_page import PreviewImage, layer, preview_page
from wsss_pipeline.stages import preview as stage
from wsss_pipeline.stages.preview import preview_folder

EVIL = "a/</script><img src=x onerror=alert(2)>"
ODD = "100%41 #1?x=\"'&amp;"
# as the page shows them, the most doubtful first
ORDER = ["absent", EVIL, ODD, "\\u202egnp.evil", "plain", "twice.jpg", "space at its end"]


def shown_in(page: Path) -> list[dict[str, object]]:
    """The images of a page, as its script reads them."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"))
    images: list[dict[str, object]] = json.loads(text)["images"]
    return images


# -- the folder


def test_pictures_are_drawn_once_and_anew_where_image_or_mask_is_another(
    masks: MaskCache, hostile: Path, tmp_path: Path
) -> None:
    shutil.copytree(hostile / "images", tmp_path / "images")
    images = find_images(tmp_path / "images")
    report = preview_folder(masks, images, tmp_path / "look")
    assert (report.images, report.failed) == (7, {})
    names = {path.name for path in (tmp_path / "look" / "pictures").iterdir()}
    assert report.drawn == len(names) == 7 + 4, "equal masks share a layer"
    assert all(re.fullmatch(r"[0-9a-f]{32}\.(jpg|png)", name) for name in names), "no name of an image's"
    before = (report.page).read_bytes()
    again = preview_folder(masks, images, tmp_path / "look")
    assert (again.drawn, report.page.read_bytes()) == (0, before)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / "plain.png")
    assert preview_folder(masks, images, tmp_path / "look").drawn == 1
    (photo,) = [str(one["image"]) for one in shown_in(report.page) if one["line"] == "plain"]
    assert np.asarray(Image.open(tmp_path / "look" / photo)).mean((0, 1)) == pytest.approx([254, 0, 0], abs=2)


def test_a_layer_is_transparent_where_it_darkens_and_has_the_class_s_colour(
    masks: MaskCache, hostile: Path, tmp_path: Path
) -> None:
    report = preview_folder(masks, find_images(hostile / "images"), tmp_path, ["plain"])
    (entry,) = shown_in(report.page)
    layer = np.asarray(Image.open(tmp_path / str(entry["layer"])))
    assert layer.shape == (30, 40, 4)
    assert layer[0, 0].tolist() == [0, 0, 0, 115]
    assert layer[10, 10].tolist() == [128, 0, 0, 153]
    (doubt,) = likely_wrong(masks["plain"], masks.class_names).values()
    assert 0 < doubt < 1
    assert entry["classes"] == [[0, round(doubt, 4), round(20 * 16 / 1200, 4)]]


def test_a_layer_of_a_mask_of_16_bits_is_smaller_and_has_its_classes() -> None:
    mask = np.zeros((640, 960), np.uint16)
    mask[:, 480:] = 300
    pixels = np.asarray(Image.open(io.BytesIO(layer(mask))))
    assert pixels.shape == (213, 320, 4)
    assert pixels[0, 0].tolist() == [0, 0, 0, 115]
    assert pixels[0, 200].tolist() == [*voc_palette(301)[300], 153]
    record = PseudoMask(mask, np.full(mask.shape, 150, np.uint8))
    # 0.75 makes 0.9 right; of the other half the tenth that is wrong may all belong to it
    doubt = likely_wrong(record, [f"class {value}" for value in range(1, 400)])
    assert doubt == pytest.approx({"class 300": 1 - 0.9 / 1.1})


@pytest.mark.parametrize(
    ("determinants", "is_remarked"),
    [
        ({"crf": {"backend": "lattice"}}, True),
        ({"crf": {"backend": "lattice"}, "confidence": "product"}, False),
    ],
)
def test_masks_that_are_sure_of_everything_are_remarked_on(
    determinants: dict[str, object],
    is_remarked: bool,
    hostile: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = open_mask_set(tmp_path, MaskSet(name="sure", determinants=determinants, class_names=(CAT,)))
    with MaskWriter(folder) as writer:
        record = PseudoMask(np.ones((30, 40), np.uint8), np.full((30, 40), 200, np.uint8), (CAT,))
        writer.write("plain", record, image_digest="0" * 64, seconds=0.1)
    images = find_images(hostile / "images")
    page = preview_folder(MaskCache.open(folder), images, tmp_path / "look").page.read_text("utf-8")
    stage.preview(folder, images, tmp_path / "sheet.png")
    assert ("sure of nearly everything" in page) == is_remarked
    assert ("sure of nearly everything" in caplog.text) == is_remarked


def test_images_can_be_chosen_and_what_is_not_there_is_refused(
    masks: MaskCache, hostile: Path, tmp_path: Path
) -> None:
    images = find_images(hostile / "images")
    page = preview_folder(masks, images, tmp_path, [EVIL, "plain", EVIL]).page
    assert [one["line"] for one in shown_in(page)] == [EVIL, "plain"]
    assert len(shown_in(preview_folder(masks, images, tmp_path, limit=3).page)) == 3
    with pytest.raises(MaskError, match="no image 'nonsense'"):
        preview_folder(masks, images, tmp_path, ["nonsense"])
    with pytest.raises(MaskError, match="do they belong together"):
        preview_folder(masks, {"other": tmp_path / "other.png"}, tmp_path)


def test_what_cannot_be_read_is_on_the_page_with_its_reason(
    masks: MaskCache, hostile: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(hostile / "images", tmp_path / "images")
    (tmp_path / "images" / "plain.png").write_bytes(b"nothing")
    Image.new("RGB", (7, 9)).save(tmp_path / "images" / "absent.png")
    (tmp_path / "images" / f"{ODD}.png").unlink()
    arguments = ("preview", "--cache", masks.path, "--images", tmp_path / "images")
    result = wsss(*arguments, "--html", tmp_path / "look")
    assert result.exit_code == 1, result.output
    assert "6 images on the page, 9 pictures drawn, 2 failed" in result.stderr
    assert result.stdout.strip() == str(tmp_path / "look" / "index.html")
    problems = {
        one["line"]: (one["problem"], bool(one["image"]), one["layer"])
        for one in shown_in(tmp_path / "look" / "index.html")
        if one["problem"]
    }
    assert set(problems) == {"plain", "absent"}
    assert problems["absent"] == ("the image is 7x9, its mask 40x30: they don't belong together", True, "")
    assert problems["plain"][1:] == (False, "")
    assert "1 of the 7 images of the mask set have no image file" in caplog.text + result.stderr


def test_a_stop_leaves_a_page_of_what_there_is_and_the_next_run_goes_on(
    masks: MaskCache, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = stage.layer

    def stopped(mask: np.ndarray) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return draw(mask)

    monkeypatch.setattr(stage, "layer", stopped)
    arguments = ("preview", "--cache", masks.path, "--images", hostile / "images", "--html", tmp_path)
    result = wsss(*arguments)
    assert result.exit_code == 130
    assert "go on with: wsss" in result.stderr
    assert len(shown_in(tmp_path / "index.html")) == 1
    assert "1 of 7 images: the run was interrupted" in (tmp_path / "index.html").read_text()
    monkeypatch.undo()
    done = wsss(*arguments)
    assert done.exit_code == 0
    assert "7 images on the page, 9 pictures drawn" in done.stderr
    assert "interrupted" not in (tmp_path / "index.html").read_text()


def test_nothing_of_others_is_written_over(masks: MaskCache, hostile: Path, tmp_path: Path) -> None:
    images = find_images(hostile / "images")
    report = preview_folder(masks, images, tmp_path / "look", ["plain"])
    (entry,) = shown_in(report.page)
    for name in ("index.html", str(entry["layer"])):
        kept = (tmp_path / "look" / name).read_bytes()
        (tmp_path / "look" / name).write_text("precious")
        with pytest.raises(OutputError, match="this program didn't write it"):
            preview_folder(masks, images, tmp_path / "look", ["plain"])
        assert (tmp_path / "look" / name).read_text() == "precious"
        (tmp_path / "look" / name).write_bytes(kept)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "pictures").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="links aren't followed"):
        preview_folder(masks, images, tmp_path / "linked", ["plain"])
    assert not list(elsewhere.iterdir())
    shutil.copy(tmp_path / "look" / str(entry["image"]), elsewhere)  # now the layer alone isn't there
    with pytest.raises(OutputError, match="links aren't followed"):
        preview_folder(masks, images, tmp_path / "linked", ["plain"])
    assert len(list(elsewhere.iterdir())) == 1


def test_masks_of_a_folder_and_of_a_network_too_and_what_goes_with_what(tmp_path: Path) -> None:
    world = write_scored_world(tmp_path)
    common = ("preview", "--images", world / "images")
    predictions = ("--predictions", world / "masks", "--classes", "cat,dog")
    network = ("--checkpoint", world / "run", "--device", "cpu")
    for number, source in enumerate((predictions, network)):
        result = wsss(*common, *source, "--html", tmp_path / f"look-{number}")
        assert result.exit_code == 0, result.output
        assert len(shown_in(tmp_path / f"look-{number}" / "index.html")) == 3
        refused = wsss(*common, *source)
        assert refused.exit_code == 2
        assert "--html" in refused.stderr
    chosen = tmp_path / "chosen"
    for more, ids in ((("--limit", 2), ["a/one", "three"]), (("--id", "a/two"), ["a/two"])):
        assert wsss(*common, "--cache", world / "cache", "--html", chosen, *more).exit_code == 0
        assert [one["line"] for one in shown_in(chosen / "index.html")] == ids
    for more, said in (
        (("--out", "x.png", "--html", "x"), "give one of them"),
        (("--clip", "x", "--html", "x"), "--clip goes with --checkpoint"),
        (("--classes", "cat,dog", "--html", "x"), "--classes goes with --predictions"),
        (("--limit", 201), "up to 200"),
        (("--html", world / "images" / "look"), "only read"),
    ):
        refused = wsss(*common, "--cache", world / "cache", *more)
        assert refused.exit_code == 2
        assert said in refused.stderr
    assert "give the masks once" in wsss(*common, "--html", tmp_path / "x").stderr


@pytest.mark.parametrize("image_id", ["a/b", "a.jpg", "a.jpg.PNG", "end ", "end.gif ", "mid dle", "a\u00a0"])
def test_a_list_names_an_image_so_that_it_is_read_as_the_same(image_id: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{split_line(image_id)}\n", encoding="utf-8")
    assert read_split(tmp_path / "list.txt") == [image_id]
    assert split_line(f" {image_id}") is None


# -- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a folder #1 100%")
    images = find_images(hostile / "images")
    return preview_folder(MaskCache.open(hostile / "cache"), images, folder).page


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Iterator[Browser]:
    """The page, nothing marked."""
    chromium.open(page)
    chromium.run("localStorage.clear()")
    chromium.open(page)
    yield chromium
    assert chromium.complaints() == []


def current(browser: Browser) -> str:
    (text,) = browser.texts("li.current .id")
    return text


@needs_chromium
def test_the_worst_stand_first_and_names_are_text_alone(browser: Browser) -> None:
    assert browser.texts("li .id") == ORDER
    assert browser.run("document.querySelectorAll('li b, [onerror], [onclick], script').length") == 2, (
        "its own"
    )
    browser.wait_for("[...document.images].every((one) => one.complete)")
    assert browser.run("[...document.images].map((one) => one.naturalWidth)") == [40] * 14
    assert browser.texts("li:nth-child(2) .classes > span") == [f"{CAT} 0.50", f"{DOG} 0.06"]
    assert browser.texts("li:nth-child(1) .classes > span") == [f"{DOG} 1.00"]
    assert browser.texts("li:nth-child(7) .classes") == ["background only"]
    colour = "getComputedStyle(document.querySelector('li:nth-child(2) .swatch')).backgroundColor"
    assert browser.run(colour) == "rgb(128, 0, 0)"
    # neither another script nor another address is let in
    script = "document.body.append(element('script', {textContent: 'window.letIn = 1'}))"
    assert browser.run(f"(() => {{ {script}; return window.letIn; }})()") is None
    for attempt, directive in (
        ("fetch('http://127.0.0.1:9/').catch(() => 0)", "connect-src"),
        ("element('img', {src: 'http://127.0.0.1:9/'})", "img-src"),
    ):
        refusal = "addEventListener('securitypolicyviolation', (one) => done(one.effectiveDirective))"
        attempt = f"new Promise((done) => {{ document.{refusal}; {attempt}; setTimeout(done, 3000); }})"
        assert browser.run(attempt) == directive
    browser.events.clear()  # of these two


@needs_chromium
def test_filters_and_order(browser: Browser) -> None:
    assert browser.texts("#class option") == ["all (7)", "cat (3)", f"{DOG} (4)", "background only (1)"]
    browser.choose("#class", DOG[:5])
    assert browser.texts("li .id") == ["absent", ODD, EVIL, "twice.jpg"], "by the doubt in this class"
    browser.choose("#sort", "image id")
    assert browser.texts("li .id") == [ODD, EVIL, "absent", "twice.jpg"]
    browser.choose("#class", "background only")
    assert browser.texts("li .id") == ["space at its end"]
    browser.choose("#class", "all")
    browser.run("search.focus()")
    browser.press("E", "v", "i", "l")
    assert browser.texts("li .id") == ["\\u202egnp.evil"]
    assert browser.texts("#status") == ["1 of 7 images, 0 marked"]
    browser.press("x")
    assert browser.texts("#end") == ["No image."], "text, not a key: evilx"
    assert browser.texts("#status") == ["0 of 7 images, 0 marked"]


@needs_chromium
def test_keys_move_and_mark_and_marks_are_kept_and_saved(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    assert current(browser) == ORDER[0]
    for keys, expected in (("jjk", 1), ("k", 0), ("k", 0), ("j" * 9, 6)):
        browser.press(*keys)
        assert current(browser) == ORDER[expected]
    browser.press("x", "ArrowLeft", "x", "ArrowLeft", "x", "ArrowRight", "x", "x")
    assert browser.texts("li.bad .id") == [ORDER[4], ORDER[5], ORDER[6]]
    assert browser.run("[...document.querySelectorAll('[aria-pressed=true]')].length") == 3
    browser.click("li button", 1)
    assert current(browser) == EVIL
    browser.click("li button", 4)
    assert browser.texts("#status") == ["7 of 7 images, 3 marked"]
    browser.choose("#marks", "marked")
    assert browser.texts("li .id") == [EVIL, *ORDER[5:]]
    browser.choose("#marks", "not marked")
    assert browser.texts("li .id") == [ORDER[0], *ORDER[2:5]]
    browser.open(page)
    assert browser.texts("li.bad .id") == [EVIL, *ORDER[5:]], "remembered"
    browser.click("#save")
    saved = browser.saved / "rejected.txt"
    until_saved(browser, saved)
    assert read_split(saved) == [EVIL, "space at its end ", "twice.jpg"]
    saved.unlink()


def until_saved(browser: Browser, file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists() or not file.stat().st_size:
        assert time.monotonic() < until, list(browser.saved.iterdir())
        time.sleep(0.02)


@needs_chromium
def test_arrows_go_by_rows_and_the_overlay_goes_and_comes(browser: Browser) -> None:
    size = {"deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", width=400, height=700, **size)
    assert browser.run("document.documentElement.scrollWidth") == 400, "nothing to scroll to the right"
    assert browser.run("columns()") == 2
    browser.press("ArrowDown", "ArrowDown")
    assert current(browser) == ORDER[4]
    inside = "(() => { const box = document.querySelector('li.current').getBoundingClientRect();"
    inside += "return box.top >= controls.getBoundingClientRect().bottom && box.bottom <= innerHeight; })()"
    assert browser.run(inside), "in view, below the controls"
    browser.press("ArrowUp")
    assert current(browser) == ORDER[2]
    assert browser.run(inside)
    seen = "getComputedStyle(document.querySelector('.layer')).visibility"
    for press in (lambda: browser.press("o"), lambda: browser.click("#overlay")):
        press()
        assert (browser.run(seen), browser.run("overlay.checked")) == ("hidden", False)
        browser.press("o")
        assert (browser.run(seen), browser.run("overlay.checked")) == ("visible", True)
    browser.send("Emulation.clearDeviceMetricsOverride")


@needs_chromium
def test_cards_are_made_as_one_scrolls(chromium: Browser, tmp_path: Path) -> None:
    entries = [
        PreviewImage(f"image {number:04}", doubt={"cat": 0.5}, share={"cat": 0.1}) for number in range(1000)
    ]
    page = tmp_path / "index.html"
    page.write_text(preview_page(entries, ["cat"], identity="made", summary={}))
    chromium.open(page)
    made = "document.querySelectorAll('li').length"
    first = chromium.run(made)
    assert first < 300
    assert chromium.texts("#status") == ["1,000 of 1,000 images, 0 marked"]
    chromium.run("scrollTo(0, document.body.scrollHeight)")
    chromium.wait_for(f"{made} > {first}")
    chromium.press(*"j" * 5)
    chromium.run("select(999)")
    assert current(chromium) == "image 0999"
    assert chromium.complaints() == []
