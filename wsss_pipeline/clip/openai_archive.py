"""OpenAI's CLIP ``.pt`` files, read as data: no code in them runs, no pickle is trusted.

The published files are TorchScript archives: a zip with a pickle of the module tree and the tensors' bytes
beside it. The pickle is read by an unpickler that makes inert records and containers and nothing else; the
tensors are read from the zip after that.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsss_pipeline.clip.tensor_files import DAMAGED, ROOM, RefusedError, check_unpacked
from wsss_pipeline.errors import WeightsError, WsssError
from wsss_pipeline.files import MIB, check_machine, check_plain

MOST_ARCHIVE_BYTES = 4 * 1024 * MIB  # of OpenAI's files the largest has 1.3 GiB
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
MAX_NAME = 1000


def is_torchscript(file: Path) -> bool:
    """True for a zip with what only TorchScript puts into one; False also for what can't be read."""
    try:
        check_plain(file, MOST_ARCHIVE_BYTES)
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception as error:  # whatever damaged files make zipfile raise
        check_machine(error)
        return False


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by name, as stored (OpenAI's files hold float16).

    Raises:
        WeightsError: not such a file, damaged, or with content that only running code could read.
    """
    try:
        check_plain(file, MOST_ARCHIVE_BYTES)
        with zipfile.ZipFile(file) as archive:
            return _read(archive, file.stat().st_size + ROOM)
    except (WsssError, MemoryError):
        raise
    except Exception as error:  # zipfile and pickle raise nearly anything on damaged files
        check_machine(error)
        if isinstance(error, OSError) and error.strerror:
            raise WeightsError(f"{file} can't be read: {error.strerror}") from error
        reason = f"{error}: " if isinstance(error, RefusedError) and str(error) != DAMAGED else ""
        raise WeightsError(
            f"{file} can't be read as CLIP weights: {reason}{DAMAGED}; "
            "use the original .pt file, or a Hugging Face folder"
        ) from error


class _Storage(NamedTuple):
    """The bytes of one tensor or several, not read yet."""

    key: str
    dtype: torch.dtype
    length: int


class _StoredTensor(NamedTuple):
    """A tensor that wasn't read yet: where in a storage it lies."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands for an object of the archive's own classes: keeps its attributes and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _TreeUnpickler(pickle.Unpickler):
    """Unpickles the module tree of a TorchScript archive, tensors as ``_StoredTensor``; other globals are refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Inert
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _StoredTensor(storage, offset, size, stride)
        if module == "torch.jit._pickle":  # lists of numbers and tensors
            return lambda items, *_: list(items)
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise RefusedError(f"it refers to {module}.{name}, which weights never need")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise RefusedError("it has a storage of unknown kind")
        return _Storage(str(key), dtype, count)


def _read(archive: zipfile.ZipFile, limit: int) -> dict[str, Tensor]:
    check_unpacked(archive, limit)
    (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    tree = _TreeUnpickler(io.BytesIO(archive.read(index))).load()
    tensors: dict[str, _StoredTensor] = {}
    entered: set[int] = set()  # each module once, whatever the number of ways that lead to it
    waiting = [("", tree)]
    while waiting:
        prefix, value = waiting.pop()
        if len(prefix) > MAX_NAME:
            raise RefusedError("its modules are nested deeper than any CLIP's")
        if isinstance(value, _StoredTensor):
            tensors[prefix.removesuffix(".")] = value
        elif isinstance(value, _Inert) and id(value) not in entered:
            entered.add(id(value))
            waiting += [(f"{prefix}{name}.", item) for name, item in value.attributes.items()]
    if sum(math.prod(tensor.size) * tensor.storage.dtype.itemsize for tensor in tensors.values()) > limit:
        raise RefusedError("its tensors are larger than the file")
    storages: dict[_Storage, Tensor] = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        key, dtype, length = storage
        data = archive.read(f"{index.removesuffix('data.pkl')}data/{key}")
        if len(data) != length * dtype.itemsize:
            raise RefusedError(f"storage {key} has {len(data)} bytes, not those of {length} numbers")
        empty = torch.empty(0, dtype=dtype)  # which frombuffer doesn't make
        storages[storage] = torch.frombuffer(bytearray(data), dtype=dtype) if data else empty
    # as_strided checks the bounds itself and raises
    return {
        name: torch.as_strided(storages[storage], size, stride, offset)
        for name, (storage, offset, size, stride) in tensors.items()
    }
