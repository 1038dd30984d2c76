"""What runs on a GPU, against the CPU; only where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.end_to_end.conftest import mask_set, wsss
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.config import ParConfig
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.refine import Par

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc_folder(folder, seed=5, scenes={"train": 12})
    return folder


def generate(root: Path, *further: object) -> Path:
    return mask_set(
        wsss(
            *("generate-masks", "--voc", root, "--split", "train", "--classes", "demo", "--clip", "demo"),
            *("--offline", *further),
        )
    )


@pytest.mark.parametrize(("precision", "equal"), [("fp32", 0.999), ("bf16", 0.98)])
def test_masks_of_gpu_and_cpu_agree(root: Path, tmp_path: Path, precision: str, equal: float) -> None:
    on_cpu = generate(root, "--device", "cpu", "--precision", "fp32", "--cache", tmp_path / "cpu")
    on_gpu = generate(
        root,
        *("--device", "cuda", "--precision", precision, "--batch-size", 5, "--cache", tmp_path / "gpu"),
    )
    with MaskCache.open(on_cpu) as expected, MaskCache.open(on_gpu) as found:
        assert set(found) == set(expected)
        shares = [(found[key].mask == expected[key].mask).mean() for key in expected]
    assert sum(shares) / len(shares) >= equal


def test_par_of_many_images_at_once_is_that_of_the_cpu() -> None:
    """Of two sizes and two numbers of labels, and more than go together."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 375, 500), (3, 375, 500), (2, 500, 375)] * 7
    scores = [torch.rand(size, generator=generator) for size in sizes]
    images = [
        torch.randint(0, 256, (*size[1:], 3), generator=generator, dtype=torch.uint8).numpy()
        for size in sizes
    ]
    refine = Par(ParConfig())
    expected, found = refine(images, scores), refine(images, [score.cuda() for score in scores])
    for one, other in zip(found, expected, strict=True):
        assert one.is_cuda
        assert (one.cpu() - other).abs().max() < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_network_trains_on_a_gpu(root: Path, tmp_path: Path, precision: str) -> None:
    result = wsss(
        *("train-seg", "--gt-masks", root / "SegmentationClass", "--classes", "demo"),
        *("--images", root / "JPEGImages", "--out", tmp_path / "run", "--network", "segformer"),
        *("--encoder", "tiny", "--weights", "none", "--crop", 64, "--batch-size", 4, "--iterations", 3),
        *("--device", "cuda", "--precision", precision),
    )
    assert result.exit_code == 0, result.output
    scored = wsss(
        *("evaluate", "--checkpoint", tmp_path / "run", "--images", root / "JPEGImages"),
        *("--gt", root / "SegmentationClass", "--device", "cuda"),
    )
    assert scored.exit_code == 0, scored.output


@pytest.mark.parametrize("method", ["weclip", "excel"])
def test_a_network_on_frozen_clip_learns_on_a_gpu_what_it_learns_on_a_cpu(
    root: Path, tmp_path: Path, method: str
) -> None:
    """First updates of plain losses on the same crops, gate and guide included."""
    losses = {}
    for device in ("cpu", "cuda"):
        result = wsss(
            *("train-seg", "--online", method, "--classes", "demo", "--labels", root / "Annotations"),
            *("--images", root / "JPEGImages", "--out", tmp_path / device, "--iterations", 4),
            *("--set", "online.gate_from=2", "--batch-size", 4),
            *(("--set", "online.guide_from=3") if method == "excel" else ()),
            *("--set", "network.frozen.dropout=0", "--workers", 0, "--device", device, "--precision", "fp32"),
        )
        assert result.exit_code == 0, result.output
        log = (tmp_path / device / "log.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in log]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)
    scored = wsss(
        *("evaluate", "--checkpoint", tmp_path / "cuda", "--images", root / "JPEGImages"),
        *("--gt", root / "SegmentationClass", "--device", "cuda"),
    )
    assert scored.exit_code == 0, scored.output
