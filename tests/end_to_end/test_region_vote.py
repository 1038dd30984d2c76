"""Masks out of regions' votes, from the proposals to the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.data.images import read_image
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.regions.sources import open_regions

SAM = Path(__file__).parents[1] / "golden" / "fma" / "sam_tiny"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=5, scenes={"train": 3}, size=(80, 64))
    return folder


@pytest.fixture(scope="module")
def regions(root: Path) -> Path:
    """Of the first two images."""
    split = root / "two.txt"
    split.write_text("\n".join(sorted(path.stem for path in (root / "JPEGImages").iterdir())[:2]))
    result = wsss(
        *("propose-regions", "--sam", SAM, "--images", root / "JPEGImages", "--split", split),
        *(
            "--out",
            root / "regions",
            "--preset",
            "fast",
            "--set",
            "points=[6]",
            "--device",
            "cpu",
            "--offline",
        ),
    )
    assert result.exit_code == 0, result.output
    return Path(result.stdout.splitlines()[-1])


def generate(root: Path, cache: Path, *further: object) -> object:
    return wsss(
        *("generate-masks", "--voc", root, "--split", "train", "--classes", "demo", "--clip", "demo"),
        *("--cache", cache, "--device", "cpu", "--offline", *further),
    )


def test_each_region_of_a_sam_is_one_label_and_an_image_without_regions_is_reported(
    root: Path, regions: Path, tmp_path: Path
) -> None:
    result = generate(root, tmp_path, "--refine", "vote", "--regions", regions, "--json")
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout.splitlines()[0])
    assert (report["computed"], len(report["failed"])) == (2, 1)
    (reason,) = report["failed"].values()
    assert "propose-regions" in reason
    source = open_regions(str(regions))
    with MaskCache.open(Path(result.stdout.splitlines()[-1])) as cache:
        for image_id in cache:
            found = source(image_id, read_image(root / "JPEGImages" / f"{image_id}.jpg"))
            assert len(found)
            covered = found.masks().any(axis=0)
            assert (cache[image_id].mask[~covered] == 0).all()
            top = found.masks()[found.levels == found.levels.max()]
            assert top.any()


def test_superpixels_vote_where_there_is_no_sam(root: Path, tmp_path: Path) -> None:
    result = generate(root, tmp_path, "--refine", "vote", "--regions", "slic", "--set", "slic.segments=40")
    assert result.exit_code == 0, result.output
    assert "region vote: about 40 SLIC superpixels" in result.stderr
    folder = mask_set(result)
    with MaskCache.open(folder) as cache:
        for image_id in cache:
            pixels = read_image(root / "JPEGImages" / f"{image_id}.jpg")
            for mask in open_regions("slic")(image_id, pixels).masks()[:0]:
                assert len(np.unique(cache[image_id].mask[mask])) == 1
    scored = wsss("evaluate", "--cache", folder, "--gt", root / "SegmentationClass")
    assert "instead region vote" in scored.stdout
    assert (
        "0 to compute"
        in generate(
            root, tmp_path, "--refine", "vote", "--regions", "slic", "--set", "slic.segments=40"
        ).stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--refine", "vote"), "--refine vote needs regions; give --regions slic"),
        (("--regions", "slic"), "--regions is of use to --refine vote alone"),
        (("--refine", "vote", "--regions", "nowhere"), "--regions nowhere: no such folder"),
        (("--refine", "vote", "--regions", "{root}/JPEGImages"), "failed"),
    ],
)
def test_regions_that_are_none_are_one_line(
    root: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = generate(root, tmp_path, *(option.format(root=root) for option in options))
    assert result.exit_code in (1, 2), result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
