"""``wsss compare``: a mask set, a folder of masks and a network side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.conftest import IDS, write_scored_world, wsss


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scored_world(tmp_path_factory.mktemp("root"))


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(original, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Path()


def test_a_set_a_folder_and_a_network_against_ground_truth(place: Path) -> None:
    result = wsss(
        "compare", "cache", "masks", "run", "--images", "images", "--gt", "truth", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:3] == ["[1] cache", "[2] masks", "[3] run"]
    assert f"{len(IDS)} images that all of them have; 0 left out" in lines
    (mean,) = (line for line in lines if line.startswith("mean"))
    assert float(mean.split()[1]) == 100
    assert float(mean.split()[1]) > float(mean.split()[2]) > float(mean.split()[3])
    assert "[1] and [2] agree in 99.8 % of the pixels" in lines
    assert lines[-1] == "best by ground truth: cache"


def test_without_ground_truth_one_is_recommended_with_how_far_to_trust_it(place: Path) -> None:
    result = wsss("compare", "cache", "masks", "--images", "images", "--report", "page.html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("likely the best: ")
    assert "expected IoU %" in result.stdout
    assert "most different images: three (0.7 % of the pixels), a/one (0.0 %" in result.stdout
    page = Path("page.html").read_text()
    assert page.index("Largest differences") < page.index("<h3>three") < page.index("<h3>a/one")
    assert "likely the best" in page
    values = json.loads(wsss("compare", "cache", "masks", "--json").stdout)
    assert values["masks"].keys() == {"cache", "masks"}
    assert values["by"] == "expected IoU"


def test_a_split_may_name_paths_of_images(place: Path) -> None:
    Path("split.txt").write_text("images/a/one.png masks/a/one.png\nthree\n")
    values = json.loads(wsss("compare", "cache", "masks", "--split", "split.txt", "--json").stdout)
    assert (values["images"], values["left_out"]) == (2, 0)


def test_images_that_one_lacks_or_that_do_not_fit_are_left_out(place: Path) -> None:
    (place / "masks" / "a" / "one.png").unlink()
    shutil.copy(place / "images" / "three.png", place / "masks" / "a" / "two.png")
    result = wsss("compare", "cache", "masks", "--json")
    assert result.exit_code == 1
    values = json.loads(result.stdout)
    assert (values["images"], values["left_out"], list(values["skipped"])) == (1, 1, ["a/two"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cache",), "takes two or more different"),
        (("cache", "masks", "cache"), "takes two or more different"),
        (("cache", "run"), "run is a network: give --images"),
        (("masks", "truth"), "give --classes"),
        (("cache", "masks", "--report", "page.html"), "give their folder (--images)"),
        (("cache", "nowhere"), "nowhere"),
        (("cache", "masks", "--classes", "bird,"), "cache has other classes (cat, dog)"),
        (("cache", "masks", "--images", "images", "--report", "masks/page.html"), "--report"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    place: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = wsss("compare", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
