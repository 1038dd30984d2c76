"""What a method of one's own costs: one file, and nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.demo.voc_folder import write_voc_folder

MODULE = "tests.methods.toy_method"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=5, scenes={"train": 4})
    return folder


def test_it_is_one_file_of_under_40_lines() -> None:
    assert len((Path(__file__).parent / "toy_method.py").read_text().splitlines()) < 40


def test_it_runs_through_masks_cache_scores_and_report(root: Path, tmp_path: Path) -> None:
    result = wsss(
        *("generate-masks", "--voc", root, "--split", "train", "--classes", "demo", "--clip", "demo"),
        *("--method", MODULE, "--cache", tmp_path / "cache", "--store-cams", "--device", "cpu", "--offline"),
        *("--workers", 0, "--precision", "fp32"),
    )
    assert result.exit_code == 0, result.stderr
    assert "method: patch-text" in result.stderr
    with MaskCache.open(mask_set(result)) as cache:
        assert len(cache) == 4
        determinants = cache.manifest.mask_set.determinants
        assert determinants["method"] == {"name": "patch-text", "version": 1}
        assert determinants["sharpness"] == 40.0, "its preset of the class set's name"
        assert determinants["crf"] == {"backend": "none"}, "its own refiner"
        assert all(mask.mask.any() and mask.cams.any() for mask in map(cache.__getitem__, cache))
    scored = wsss(
        *("evaluate", "--cache", mask_set(result), "--images", root / "JPEGImages"),
        *("--gt", root / "SegmentationClass", "--json", tmp_path / "scores.json"),
        *("--report", tmp_path / "report.html"),
    )
    assert scored.exit_code == 0, scored.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 4
    assert "train_00001" in (tmp_path / "report.html").read_text()


def test_its_settings_are_shown_and_checked_like_any_others() -> None:
    shown = wsss("config", "show", "--preset", f"{MODULE}/demo", "--set", "sharpness=7")
    assert shown.exit_code == 0, shown.stderr
    assert "sharpness: 7.0  # Factor on the cosine of patch and text. 0 to 1000." in shown.stdout
    assert "classes: demo" in shown.stdout
    assert "cam:" not in shown.stdout, "those are another method's"
    refused = wsss("config", "show", "--method", MODULE, "--set", "cam.threshold=0.5")
    assert refused.exit_code == 2
    assert "has no setting 'cam.threshold'; give --method clip-es, or leave it out" in refused.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import a_package_that_is_not_here", "No module named 'a_package_that_is_not_here'"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("", "has no attribute 'METHOD'"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    name = f"method_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = wsss("config", "show", "--method", name)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"unknown method '{name}'" in result.stderr
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("name", "hint"), [("clip_es", "did you mean 'clip-es'?"), ("", "known: "), (".x", "known: ")]
)
def test_a_method_that_is_not_there(name: str, hint: str) -> None:
    result = wsss("config", "show", "--method", name)
    assert result.exit_code == 2
    assert hint in result.stderr
