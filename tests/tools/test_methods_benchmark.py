"""The table of all methods' speed, with a tiny CLIP: each row is there, and its ways come to the same result."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.methods import main
from tests.tiny_clip import write_golden_clip

GOLDEN = Path(__file__).parents[1] / "golden"
STAGE_ONE = {f"{method}, stage one" for method in ("clip-es", "excel", "weclip", "fma")}
OTHERS = [f"{method}, {phase}" for method in ("weclip", "excel") for phase in ("early", "late")]


def table(capsys: pytest.CaptureFixture[str], clip: Path, only: str) -> dict[str, list[str]]:
    """Name of a row to its other cells."""
    small = ["--size", "96", "64", "--side", "64", "--count", "2", "--batch", "2", "--scales", "1"]
    main(["--clip", str(clip), *small, "--repeats", "1", "--only", only])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == [
        "",
        "plain, s",
        "fp32, s",
        "times",
        "bf16, s",
        "times",
        "as plain",
        "memory, MiB",
        "where",
    ]
    assert all(len(row) == len(rows[0]) for row in rows)
    return {name: cells for name, *cells in rows[2:]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_golden_clip(tmp_path_factory.mktemp("clip") / "hf", GOLDEN)


def test_stage_one_makes_the_plain_masks(capsys: pytest.CaptureFixture[str], clip: Path) -> None:
    found = table(capsys, clip, "stage one")
    assert found.keys() == STAGE_ONE
    for name, (plain, fp32, times, _, _, equal, _, where) in found.items():
        fast, exact = float(fp32.split()[0]), float(equal.split()[0])
        # maps go to the vote in half precision, by which a small region may fall to another class
        assert exact > (99 if name.startswith("fma") else 99.9), name
        # both are printed with three digits behind the point
        assert float(times) == pytest.approx(float(plain.split()[0]) / fast, rel=0.1, abs=0.1), name
        assert where.startswith("CLIP, CAM, affinity"), name


# the others differ from these in the method alone, whose losses have tests of their own
@pytest.mark.parametrize(
    "only",
    ["weclip-plus", "weakclip, step", *(pytest.param(f"{name} ", marks=pytest.mark.slow) for name in OTHERS)],
)
def test_training_steps_have_the_plain_losses(
    capsys: pytest.CaptureFixture[str], clip: Path, only: str
) -> None:
    for name, cells in table(capsys, clip, only).items():
        fp32, bf16 = (float(text) for text in cells[5].split(" / "))
        assert fp32 < 1e-4, name
        assert 0 < bf16 < 0.05, name
        assert name == "weakclip, step" or "PAR" in cells[-1]


@pytest.mark.slow
def test_a_relabelled_image_has_the_plain_mask(capsys: pytest.CaptureFixture[str], clip: Path) -> None:
    (cells,) = table(capsys, clip, "relabelled").values()
    assert float(cells[5].split()[0]) > 99.9
