"""What ``auto`` stands for."""

from __future__ import annotations

import os

import pytest
import torch

from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.device import (
    images_at_a_time,
    resolve_device,
    resolve_precision,
    single_threaded_torch,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, "fp32"),
        ({"avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", CPU) == expected


def test_a_torch_that_cannot_tell_means_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", GPU) == expected


def test_what_was_asked_for_is_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert [resolve_precision(name, CPU) for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def test_each_process_of_torchrun_gets_a_gpu_and_a_part_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(str(resolve_device("auto")))
    assert found == ["cuda:0", "cuda:1", "cuda:0"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert images_at_a_time() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert images_at_a_time() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    assert images_at_a_time() == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "meta", ""])
def test_a_device_that_is_not_here_or_none_at_all(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name}: "):
        resolve_device(name)


def test_the_device_of_another_machine_need_not_be_here() -> None:
    assert str(resolve_device("cuda:7", elsewhere=True)) == "cuda"
    assert str(resolve_device("cpu", elsewhere=True)) == "cpu"


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), single_threaded_torch():  # noqa: PT012
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
