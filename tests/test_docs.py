"""What stands in README and docs works: every block of shell commands and Python that can run is run.

The first word of a fence says what a block is: ``sh`` and ``python`` are run, in the order of the page, in a folder
that has what they speak of; ``console`` needs what CI hasn't (a GPU, a cluster, the net, hours); the others are
data or output. ``wsss`` runs in this process: its start alone would take seconds each time.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import pytest
from PIL import Image

from docs.generate import FOLDER, commands_page, settings_page
from tests.end_to_end.conftest import GOLDEN, wsss
from tests.tiny_clip import write_golden_clip
from wsss_pipeline import __version__
from wsss_pipeline.cli import COMMANDS
from wsss_pipeline.config import recipe_names
from wsss_pipeline.methods import load_method, method_names

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
RUN, LEFT_ALONE = {"sh", "python"}, {"console", "csv", "yaml", "text", "slurm"}
MAKE_CACHE = "generate-masks --images photos --labels labels.csv --classes cat,dog"
HUB_NAME = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it begins at."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found = []
    pattern = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text("utf-8")
    for match in pattern.finditer(text):
        found.append(Block(match[1].strip(), match[2], text.count("\n", 0, match.start()) + 1))
    return found


WITH_COMMANDS = [page for page in PAGES if any(block.language in RUN for block in blocks(page))]


def first(language: str, page: str) -> str:
    return next(block.text for block in blocks(ROOT / page) if block.language == language)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache on this machine that holds a small CLIP under the name of the default one."""
    root = tmp_path_factory.mktemp("hub")
    folder = root / "hub" / f"models--{HUB_NAME.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    write_golden_clip(snapshot, GOLDEN)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    return root


@pytest.fixture
def place(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the pictures, labels and data sets that the pages speak of."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    pictures = {name: GOLDEN / "images" / f"{name}.png" for name in ("tiny_odd", "camera_gray", "cat")}
    for number, file in enumerate(pictures.values(), start=1):
        for target in (f"photos/holiday/000{number}.png", f"VOCdevkit/VOC2012/JPEGImages/2007_{number}.png"):
            (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        (tmp_path / "coco" / "train2014").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, f"coco/train2014/COCO_{number}.png")
    Path("labels.csv").write_text(first("csv", "docs/quickstart.md"))
    Path("garden.yaml").write_text(first("yaml", "docs/quickstart.md"))
    write_voc(Path("VOCdevkit/VOC2012"))
    Path("coco/annotations").mkdir()
    Path("coco/annotations/instances_train2014.json").write_text(
        json.dumps(
            {
                "images": [{"id": number, "file_name": f"COCO_{number}.png"} for number in (1, 2, 3)],
                "annotations": [{"image_id": number, "category_id": 17} for number in (1, 3)],
                "categories": [{"id": 17, "name": "cat"}],
            }
        )
    )
    return tmp_path


def write_voc(root: Path) -> None:
    for folder in ("Annotations", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    ids = ["2007_1", "2007_2", "2007_3"]
    for split in ("train", "train_aug"):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(ids))
    for image_id in ids:
        xml = "<annotation><object><name>cat</name></object></annotation>"
        (root / "Annotations" / f"{image_id}.xml").write_text(xml)
        with Image.open(root / "JPEGImages" / f"{image_id}.png") as picture:
            size = picture.size
        Image.new("L", size, 8).save(root / "SegmentationClass" / f"{image_id}.png")


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block; comments and line continuations are the shell's."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in RUN | LEFT_ALONE, f"{page.name} line {block.line}: {block.language!r}"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_what_can_run_runs(page: Path, place: Path) -> None:
    if page.stem == "cache":  # a page about what others have made
        for cache in ("cache", "other"):
            made = wsss(*shlex.split(f"{MAKE_CACHE} --cache {cache}"))
            assert made.exit_code == 0, made.stderr
    for block in blocks(page):
        where = f"{page.name} line {block.line}"
        if block.language == "python":
            exec(compile(block.text, where, "exec"), {})
        for command in commands(block.text) if block.language == "sh" else []:
            assert command[0] == "wsss", f"{where}: only wsss can run here, not {command[0]}"
            result = wsss(*command[1:])
            assert result.exit_code == 0, f"{where}: {shlex.join(command)}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_cannot_run_here_have_options_that_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language not in ("console", "slurm"):
            continue
        for words in commands(
            "\n".join(line for line in block.text.splitlines() if not line.startswith("#"))
        ):
            if not {"wsss", "wsss_pipeline"} & set(words):
                continue
            start = next(index for index, word in enumerate(words) if word in ("wsss", "wsss_pipeline"))
            name = words[start + 1 : start + (3 if words[start + 1] in ("cache", "config") else 2)]
            options = [word.split("=")[0] for word in words[start + 2 :] if word.startswith("--")]
            text = wsss(*name, "--help").output
            missing = [option for option in options if not re.search(rf"{option}\b", text)]
            assert not missing, f"{page.name}: {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    headings = {}
    for file in PAGES:
        lines = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
        headings[file] = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if urlparse(target).scheme:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in headings[file], f"{page.name}: {target}"


def test_the_toy_method_is_shown_as_it_is() -> None:
    method = (ROOT / "tests/methods/toy_method.py").read_text("utf-8")
    assert method in [block.text for block in blocks(ROOT / "docs/adding-a-method.md")]


@pytest.mark.parametrize(("name", "page"), [("commands", commands_page), ("settings", settings_page)])
def test_the_generated_pages_are_what_the_code_says(name: str, page: Callable[[], str]) -> None:
    text = (FOLDER / f"{name}.md").read_text("utf-8")
    assert text == page(), f"run: {sys.executable} docs/generate.py"


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the one table of a page whose first line begins with ``header``."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(header)]
    cells = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


@pytest.mark.parametrize(
    ("page", "header"),
    [("README.md", "| method | what"), ("docs/which-method.md", "| method | pseudo masks |")],
)
def test_the_tables_of_methods_have_all_methods_and_systems_that_there_are(page: str, header: str) -> None:
    data_sets = {"voc12", "coco14", "demo"}
    systems = {name.split("/")[0] for name in recipe_names()} - data_sets
    listed = [cells[0].strip("`") for cells in rows(page, header) if cells[0]]
    assert sorted(listed) == sorted({*method_names(), *systems})


def test_both_tables_of_methods_have_the_same_scores() -> None:
    full = {
        cells[0]: cells for cells in rows("docs/which-method.md", "| method | pseudo masks |") if cells[0]
    }
    best = {"`clip-es`": "73.8", "`weclip-plus`": "83.9"}  # the second row of CLIP-ES; on test, not val
    for method, _, _, _, val, coco, _ in rows("README.md", "| method | what"):
        assert val.split(" ")[0] == best.get(method, full[method][2]), method
        assert coco == full[method][4], method


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_methods_presets_and_recipes_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    methods = {match.strip("`") for match in re.findall(r"--(?:method|online) ([a-z-]+)[\s`]", text)}
    assert methods <= {*method_names()}
    known = {f"{name}/{preset}" for name in method_names() for preset in load_method(name).presets}
    presets = set(re.findall(r"--preset ([a-z-]+/[a-z0-9-]+)", text))
    assert presets <= known | set(recipe_names())  # relabel's presets are called like recipes
    assert set(re.findall(r"--recipe ([a-z0-9-]+/[a-z0-9-]+)", text)) <= set(recipe_names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`wsss ([a-z][a-z-]*)", page.read_text("utf-8")))
    assert named <= {*COMMANDS}


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") <= 130
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\]\(([^)#]+)", text))


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0].split()[0] == __version__


def test_the_picture_of_the_readme_is_small_and_wide_enough() -> None:
    file = ROOT / "docs/picture.jpg"
    assert file.stat().st_size < 150_000
    with Image.open(file) as picture:
        assert picture.width >= 1200


@pytest.mark.slow
def test_the_picture_is_drawn_by_its_script(tmp_path: Path) -> None:
    arguments = [
        "--out",
        tmp_path / "picture.jpg",
        "--work",
        tmp_path / "work",
        "--scenes",
        8,
        "--iterations",
        1,
    ]
    subprocess.run(
        [sys.executable, "docs/picture.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    with Image.open(tmp_path / "picture.jpg") as drawn, Image.open(ROOT / "docs/picture.jpg") as kept:
        assert drawn.size == kept.size


@pytest.mark.parametrize("header", ["| pseudo masks | mIoU |", "| network on 300"])
def test_figures_of_drawn_scenes_stand_on_the_page_of_the_demo_too(header: str) -> None:
    demo = (ROOT / "docs/demo.md").read_text("utf-8")
    figures = [figure for cells in rows("docs/which-method.md", header) for figure in cells[1].split(", ")]
    assert figures
    assert [figure for figure in figures if figure not in demo] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_that_are_named_exist(page: Path) -> None:
    known = set(re.findall(r"^\| `([a-z_.0-9]+)` \|", settings_page(), re.MULTILINE))
    groups = {key.split(".")[0] for key in known if "." in key}
    text = page.read_text("utf-8")
    named = re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", text)
    named = [key for key in named if key.split(".")[0] in groups and Path(key).suffix != ".py"]
    assert {*named, *re.findall(r"--set '?([a-z_.0-9]+)=", text)} - known <= {"key"}  # --set key=value
