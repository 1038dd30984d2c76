"""OpenAI's CLIP ``.pt`` files, read as data: no code in them runs, no pickle is trusted.

The published files are TorchScript archives: a zip with a pickle of the module tree and the tensors' bytes
beside it. The pickle is read by an unpickler that knows tensors, containers and inert objects, and nothing
else. A plain state dict goes through ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsss_pipeline.errors import WeightsError

DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
MAX_PICKLE_BYTES = 2**26


def read_openai_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of an OpenAI CLIP file by name, as stored (published files hold float16).

    Raises:
        WeightsError: not such a file, damaged, or with content that only running code could read.
    """
    try:
        if _is_torchscript(file):
            with zipfile.ZipFile(file) as archive:
                return _read_torchscript(archive)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            content = torch.load(file, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    # damaged files make zipfile, pickle and torch raise nearly anything; torch's own words recommend to
    # trust the file, which is no advice to pass on
    except Exception as error:
        reason = (
            str(error)
            if isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error)
            else ""
        )
        raise WeightsError(
            f"{file} can't be read as OpenAI CLIP weights{reason and ': '}{reason}: damaged, or more than plain "
            "tensors; use the original .pt file, or a Hugging Face folder"
        ) from error
    return _state_dict(content, file)


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise WeightsError(f"{file} holds no state dict; use OpenAI's .pt file or a Hugging Face folder")
    return {
        name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)
    }


def _read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if archive.getinfo(name).file_size > MAX_PICKLE_BYTES:
        raise WeightsError(f"{archive.filename}: its index is larger than any CLIP's; the file is damaged")
    root = _TensorUnpickler(archive, name.removesuffix("data.pkl")).load()
    tensors: dict[str, Tensor] = {}
    _collect(root, "", tensors)
    return tensors


def _collect(value: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    attributes = value.attributes if isinstance(value, _Inert) else {}
    for name, item in attributes.items():
        if isinstance(item, Tensor):
            tensors[prefix + name] = item
        else:
            _collect(item, f"{prefix}{name}.", tensors)


class _Inert:
    """Stands for an object of the archive's own classes: keeps its attributes and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.attributes = state


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles the module tree of a TorchScript archive; any other global is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
        self._archive = archive
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Inert
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch.jit._pickle":  # lists of numbers and tensors
            return lambda items, *_: list(items)
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which weights never need")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError("a storage of unknown kind")
        data = self._archive.read(f"{self._root}data/{key}")
        if len(data) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes, not {count * dtype.itemsize}")
        return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # as_strided checks the bounds itself and raises
    return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()
