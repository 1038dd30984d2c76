"""Which pixels are the surest of their class, and that nothing is learnt from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.segmentation.conftest import CONFIG, Make, changed
from wsss_pipeline.cli import main
from wsss_pipeline.data.masks import MaskFolder, PseudoMask
from wsss_pipeline.errors import ConfigError, MaskError
from wsss_pipeline.segmentation.coverage import surest
from wsss_pipeline.segmentation.dataset import SegmentationDataset
from wsss_pipeline.segmentation.train_config import load_train_config
from wsss_pipeline.stages.train_seg import train_seg


class Given:
    """Masks out of arrays."""

    identity = description = "given"
    class_names = ("cat", "dog", "bird")

    def __init__(self, masks: Mapping[str, tuple[list[int], list[int]]]) -> None:
        self.masks = masks

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.masks

    def __getitem__(self, image_id: str) -> PseudoMask:
        if not self.masks[image_id][0]:
            raise MaskError("damaged")
        mask, confidence = (np.array([values], np.uint8) for values in self.masks[image_id])
        return PseudoMask(mask, confidence)


def test_each_class_keeps_its_share_over_all_masks_and_ties_stay_together() -> None:
    masks = Given(
        {
            "a": ([0, 0, 0, 0, 1, 1, 255], [200, 199, 198, 100, 30, 20, 255 - 60]),
            "b": ([0, 0, 1, 1, 2], [90, 80, 20, 10, 0]),
            "damaged": ([], []),
        }
    )
    found = surest(masks, list(masks.masks), 0.5, is_shown=False)
    # half of the background's six pixels are three, and of the class's four two, with a third that is as sure
    assert found.least.tolist() == [198, 20, 1, 200]
    assert found.pixels.tolist() == [6, 4, 1, 0]
    assert found.kept.tolist() == [3, 3, 0, 0]
    assert found.share(slice(1)) == 0.5
    assert found.share(slice(1, None)) == 0.6
    assert found.share(slice(3, None)) == 1.0


@pytest.mark.parametrize(("keep", "least"), [(1.0, 10), (0.8, 20), (0.2, 50), (0.19, 50), (0.01, 50)])
def test_the_share_is_reached_and_no_more_than_it_takes(keep: float, least: int) -> None:
    masks = Given({"a": ([1] * 5, [10, 20, 30, 40, 50])})
    assert surest(masks, ["a"], keep, is_shown=False).least[1] == least


class Unsure(MaskFolder):
    """Ground truth, surer to the right; the background always more so than anything else."""

    def __getitem__(self, image_id: str) -> PseudoMask:
        mask = super().__getitem__(image_id).mask
        ramp = np.broadcast_to(np.linspace(20, 90, mask.shape[1]).astype(np.uint8), mask.shape)
        return PseudoMask(mask, np.where(mask == 0, ramp + np.uint8(100), ramp))


def test_nothing_is_learnt_from_the_others(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though all of the objects lie below any threshold for all classes that would leave out background."""
    seen: list[Any] = []
    get = SegmentationDataset.__getitem__
    monkeypatch.setattr(
        SegmentationDataset,
        "__getitem__",
        lambda dataset, key: (lambda sample: seen.append(sample) or sample)(get(dataset, key)),
    )
    job = make(config=changed(CONFIG, loss__confidence="hard", loss__keep=0.5, optimisation__iterations=3))
    masks = Unsure(job.masks.path, job.masks.class_names)  # type: ignore[attr-defined]
    with caplog.at_level("INFO"):
        train_seg(replace(job, masks=masks))
    assert "hard confidence of the surest 50% of each class, from 0." in caplog.text
    assert "% of the background and 5" in caplog.text
    least = surest(masks, list(masks.files), 0.5, is_shown=False).least
    for sample in seen:
        mask, confidence = sample["mask"], sample["confidence"]
        for value in mask[mask != 255].unique().tolist():
            found = confidence[mask == value]
            assert ((found == 0) | (found >= least[value])).all()
    assert any((sample["confidence"][sample["mask"] == 0] == 0).any() for sample in seen)
    objects = torch.cat(
        [sample["confidence"][(sample["mask"] > 0) & (sample["mask"] < 255)] for sample in seen]
    )
    assert 0.2 < (objects > 0).float().mean() < 0.8


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.keep is for masks that are there before training"):
        load_train_config("weclip/demo", flags={"loss.keep": 0.5})
    result = CliRunner().invoke(
        main,
        [
            "train-seg",
            *["--cache", "c", "--images", "i", "--out", "o", "--keep", "0.8", "--min-confidence", "0.5"],
        ],
    )
    assert result.exit_code == 2
    assert "--keep takes the place of --min-confidence; drop one of them" in result.output
