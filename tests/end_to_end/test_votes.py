"""Masks out of regions' votes, from the proposals to the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.config import SlicConfig
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


def generate(root: Path, cache: Path, *further: object) -> Result:
    return wsss(
        *("generate-masks", "--voc", root, "--split", "train", "--classes", "demo", "--clip", "demo"),
        *("--cache", cache, "--device", "cpu", "--offline", *further),
    )


def test_pixels_in_the_same_regions_have_one_label_and_an_image_without_regions_is_reported(
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
            pixels = read_image(root / "JPEGImages" / f"{image_id}.jpg")
            masks, mask = source(image_id, pixels).masks(), cache[image_id].mask
            assert len(masks)
            assert (mask[~masks.any(axis=0)] == 0).all()
            groups = np.unique(masks.reshape(len(masks), -1), axis=1, return_inverse=True)[1].reshape(-1)
            pairs = np.unique(np.stack([groups, mask.reshape(-1)]), axis=1)
            assert pairs.shape[1] == groups.max() + 1


def test_superpixels_vote_where_there_is_no_sam(root: Path, tmp_path: Path) -> None:
    options = ("--refine", "vote", "--regions", "slic", "--set", "slic.segments=40")
    result = generate(root, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "region vote: about 40 SLIC superpixels" in result.stderr
    folder = mask_set(result)
    with MaskCache.open(folder) as cache:
        for image_id in cache:
            pixels = read_image(root / "JPEGImages" / f"{image_id}.jpg")
            for region in open_regions("slic", SlicConfig(segments=40))(image_id, pixels).masks():
                assert len(np.unique(cache[image_id].mask[region])) == 1
    scored = wsss("evaluate", "--cache", folder, "--gt", root / "SegmentationClass")
    assert "instead region vote" in scored.stdout
    assert "3 masks reused from the cache" in generate(root, tmp_path, *options).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--refine", "vote"), "the region vote needs regions; give --regions slic"),
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
