"""Shares of the work."""

from __future__ import annotations

import pytest

from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.share import Share, parse_share, share_of_environment

IDS = [f"folder/{number}" for number in range(1000)]


def test_shares_are_disjoint_complete_and_in_order() -> None:
    shares = [Share(index, 7).select(IDS) for index in range(7)]
    assert sorted(image_id for share in shares for image_id in share) == sorted(IDS)
    assert all(share == sorted(share, key=IDS.index) for share in shares)
    assert all(90 < len(share) < 200 for share in shares)


def test_a_share_depends_on_the_id_alone() -> None:
    whole = Share(2, 5).select(IDS)
    assert Share(2, 5).select(IDS[::-1][:300]) == [
        image_id for image_id in IDS[::-1][:300] if image_id in whole
    ]


def test_parse() -> None:
    assert parse_share("3/16") == Share(3, 16)


@pytest.mark.parametrize("text", ["", "3", "16/16", "-1/4", "a/b", "1/0", "1/2/3", "1.0/2"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="write I/N"):
        parse_share(text)


def test_environment() -> None:
    assert share_of_environment({}) == Share(0, 1)
    assert share_of_environment({"RANK": "1", "WORLD_SIZE": "2"}) == Share(1, 2)
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"}
    assert share_of_environment(slurm) == Share(2, 4)


def test_ranks_within_an_array_task_divide_its_share() -> None:
    shares = {
        share_of_environment(
            {
                "SLURM_ARRAY_TASK_ID": str(task),
                "SLURM_ARRAY_TASK_COUNT": "3",
                "RANK": str(rank),
                "WORLD_SIZE": "2",
            }
        )
        for task in range(3)
        for rank in range(2)
    }
    assert shares == {Share(index, 6) for index in range(6)}


def test_environment_that_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="RANK='x'"):
        share_of_environment({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID='9' of SLURM_ARRAY_TASK_COUNT='4'"):
        share_of_environment({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4"})
