"""A run's share of the images when several runs divide the work."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wsss_pipeline.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Share ``index`` (0-based) of ``count``."""

    index: int = 0
    count: int = 1

    def select(self, image_ids: Iterable[str]) -> list[str]:
        """The ids of this share, in their order.

        An id's share depends on the id and ``count`` alone, not on the other ids, so that runs which see
        different lists still agree.
        """
        if self.count == 1:
            return list(image_ids)
        chosen = []
        for image_id in image_ids:
            digest = hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()
            if int.from_bytes(digest[:8], "big") % self.count == self.index:
                chosen.append(image_id)
        return chosen


def parse_share(text: str) -> Share:
    """``I/N`` with I from 0 to N-1.

    Raises:
        ConfigError: any other text.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--shard {text}: write I/N with I from 0 to N-1, for example 0/4")
    return Share(int(match[1]), int(match[2]))


def share_of_environment(environment: Mapping[str, str] = os.environ) -> Share:
    """The share that a SLURM array task, a torchrun rank, or a rank within an array task stands for.

    Everything where there's neither.

    Raises:
        ConfigError: the variables contradict each other.
    """
    task = _share(environment, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
    rank = _share(environment, "RANK", "WORLD_SIZE")
    return Share(task.index * rank.count + rank.index, task.count * rank.count)


def is_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in environment


def _share(environment: Mapping[str, str], index: str, count: str, first: str = "") -> Share:
    if index not in environment or count not in environment:
        return Share()
    try:
        start = int(environment.get(first, "0"))
        return parse_share(f"{int(environment[index]) - start}/{int(environment[count])}")
    except (ValueError, ConfigError) as error:
        raise ConfigError(
            f"{index}={environment[index]!r} of {count}={environment[count]!r} is no share of the work; "
            "unset them or give --shard I/N"
        ) from error
