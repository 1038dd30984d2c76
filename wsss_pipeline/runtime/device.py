"""Device and precision as the user asked for them, resolved to what this machine has."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsss_pipeline.config import Precision, ResolvedPrecision
from wsss_pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LEAST_ADDRESS_SPACE = (
    8 * 2**30
)  # torch with CUDA maps 3.3 GiB; an image in each of 8 threads 1 GiB, and their stacks


def resolve_device(requested: str, elsewhere: bool = False) -> torch.device:
    """``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N`` as a device.

    Of the processes that torchrun starts on a machine, ``auto`` gives each a CUDA device of its own, as far as
    there are enough. ``elsewhere``: other machines will use it, so that ``cuda`` needn't be here.

    Raises:
        ConfigError: a CUDA device was asked for and isn't there.
    """
    _warn_of_a_small_limit()
    import torch

    if requested == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK", "")
        return torch.device("cuda", int(rank) % torch.cuda.device_count() if rank.isdecimal() else 0)
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ConfigError(f"--device {requested}: choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {requested}: choose auto, cpu, cuda or cuda:N")
    if elsewhere and device.type == "cuda":
        return torch.device("cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {requested}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu, or mend the driver (see `wsss doctor`)"
        )
    return device


@lru_cache(maxsize=1)
def _warn_of_a_small_limit() -> None:
    """A line where a limit on the address space may end the process inside a library, without a word."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        logger.warning(
            "the address space is limited to %.1f GiB (ulimit -v): torch, which maps more than it uses, may end "
            "without a word; raise the limit to %d GiB or more",
            limit / 2**30,
            LEAST_ADDRESS_SPACE // 2**30,
        )


def resolve_precision(requested: Precision, device: torch.device) -> ResolvedPrecision:
    """The precision of matrix products in both stages; ``auto`` is bf16 where the device has fast ones, else fp32.

    In CLIP, bf16 moves a few masks' edges (see docs/performance.md), fp16 more; the precision is part of the cache's
    fingerprint, and its manifest says which it was.
    """
    if requested != "auto":
        return requested
    return "bf16" if has_fast_bf16(device) else "fp32"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX."""
    import torch

    if device.type == "cuda":
        try:
            return torch.cuda.get_device_capability(device) >= (8, 0)
        except (AssertionError, RuntimeError) as error:  # as torch puts it that there is no GPU
            raise ConfigError(
                "--precision auto looks at the GPU, and there is none here; give --precision bf16 or fp32"
            ) from error
    tell: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = tell()  # an older torch has no such function
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


# torch has no exception class of its own for memory that ran out on the CPU
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "could not create a memory object",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, the host's or a GPU's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY)
    )


@lru_cache(maxsize=1)
def memory_of_this_machine() -> int:
    """Bytes of memory that the machine has, or its container may use, whichever is less."""
    limits = [2**63]
    with suppress(ValueError, OSError, AttributeError):  # other systems lack some of these
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups in version 2 and 1
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path("/sys/fs/cgroup", name).read_text("ascii")))
    return min(limit for limit in limits if limit > 0)


def give_back_memory() -> None:
    """Freed memory goes back to the system where the C library can be told to; elsewhere nothing happens.

    glibc before 2.38 finds no use for freed blocks of up to 32 MB where the next one is wanted aligned, as torch
    wants all: they pile up as long as something small that was made in between is kept.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return None


MOST_IMAGES_AT_A_TIME = 8  # by default: each takes some 200 MB in CLIP ViT-B/16, a large one 1 GB


def images_at_a_time() -> int:
    """How many images a CPU works on side by side: one for each core that is this process's share, up to a limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # that torchrun started on this machine
    share = cores // max(1, int(processes)) if processes.isdecimal() else cores
    return min(max(1, share), MOST_IMAGES_AT_A_TIME)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Each torch operation runs in one thread, so that several images can be worked on side by side.

    Their results then depend neither on how many there are nor on the number of cores.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mark(device: torch.device) -> Any:
    """A moment on a device's clock: a GPU is there later than the call that gave it its work returns."""
    if device.type == "cpu":
        return time.monotonic()
    import torch

    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one ``mark`` to a later one of the same device; waits until the device is there."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
