"""Files of tensors by name, safetensors or what ``torch.save`` wrote: looked at first, and nothing in them is run.

The tensors are the mapped files themselves: only what is looked at is read, however large a file says it is.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from wsss_pipeline.errors import WeightsError
from wsss_pipeline.files import GIT_LFS_POINTER, MIB, check_machine, check_plain, open_plain
from wsss_pipeline.runtime.output import one_line

Value = TypeVar("Value")
MOST_WEIGHT_BYTES = 64 * 1024 * MIB
MOST_WHOLE_BYTES = 4096 * MIB  # of a file that is read whole before its shapes are known
# what a zip archive may hold beyond its own size: its code is compressed, and layers share their mask
ROOM = 2**24
DAMAGED = "damaged, or more than plain tensors"
_UNDER = ("state_dict", "model", "model_state_dict")  # where checkpoints of other programs keep the tensors


class RefusedError(pickle.UnpicklingError):
    """Content that weights never need; its message is fit for users."""


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, by name; raises as ``tensors_in``, though a damaged body isn't noticed."""
    check_plain(file, MOST_WEIGHT_BYTES)
    if file.suffix != ".safetensors":
        return {name: tuple(value.shape) for name, value in tensors_in(file).items()}
    from safetensors import safe_open

    # for NumPy, which maps nothing before it is asked for a tensor
    with safe_open(file, "numpy") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118


def tensors_in(file: Path) -> dict[str, Tensor]:
    """Tensors by name, bare or under ``state_dict``, ``model`` or ``model_state_dict``.

    Raises:
        OSError: the file can't be read, is no plain file or too large.
        RefusedError, and more from the libraries: it is damaged or holds something else.
    """
    check_plain(file, MOST_WEIGHT_BYTES)
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    is_zip = zipfile.is_zipfile(file)
    if is_zip:
        with zipfile.ZipFile(file) as archive:
            check_unpacked(archive, file.stat().st_size + ROOM)
    else:  # of torch before 1.6, which has no other way
        check_plain(file, MOST_WHOLE_BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # in words that recommend to trust the file, which is no advice to pass on
            raise RefusedError(DAMAGED) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _UNDER if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise RefusedError("they hold no tensors by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def read_tensor_files(files: tuple[Path, ...], read: Callable[[Path], dict[str, Value]]) -> dict[str, Value]:
    """What ``read``, a function of this module, finds in all the files; WeightsError where one can't be read."""
    found: dict[str, Value] = {}
    for path in files:
        try:
            found |= read(path)
        except MemoryError:
            raise
        except Exception as error:  # what a damaged or hostile file raises is up to its format
            check_machine(error)
            reason = one_line(getattr(error, "strerror", None) or error, 200)
            mend = "fetch it again"
            if is_lfs_pointer(path):
                raise WeightsError(
                    f"{path}: a pointer of Git LFS in place of the weights; fetch them with git lfs pull"
                ) from error
            if isinstance(error, RefusedError):
                mend += ", or save its tensors alone (a state dict), best as safetensors"
            raise WeightsError(f"{path} can't be read ({reason}); {mend}") from error
    return found


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in the place of one that it is yet to fetch."""
    mark = GIT_LFS_POINTER.encode()
    try:
        with open_plain(path, MOST_WEIGHT_BYTES) as file:
            return file.read(len(mark)) == mark
    except OSError:
        return False


def check_unpacked(archive: zipfile.ZipFile, limit: int) -> None:
    """A RefusedError where an archive would unpack to more than ``limit`` bytes."""
    # by the zip's directory, before anything is unpacked: zipfile reads no more than stands there
    if sum(entry.file_size for entry in archive.infolist()) > limit:
        raise RefusedError("it would unpack to far more than its size")
