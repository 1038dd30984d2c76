"""Labels as ``cls_labels_onehot.npy``: a dict of vectors that numpy saved as a pickle, read as data.

No code in the file runs: the unpickler makes inert records of whatever it is told to call, and what numpy would have
made of them is read from these. It is Python's own in Python, whose memory grows with the file alone.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wsss_pipeline import files
from wsss_pipeline.data.label_readers.label_table import LabelTable, reading
from wsss_pipeline.data.label_readers.vectors import classes_in_vector
from wsss_pipeline.errors import LabelError
from wsss_pipeline.files import MIB

MAGIC = b"\x93NUMPY"
MOST_BYTES = 512 * MIB  # that of COCO's 123,000 images takes a twentieth
_NEEDED = (
    *(
        (module, name)
        for module in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar", "_frombuffer")
    ),
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")),
)


def read_npy(file: Path) -> bytes:
    """The bytes of a ``.npy`` file; a LabelError: unreadable, or too large."""
    with reading(file):
        return files.read_bytes(file, MOST_BYTES)


def fill_from_npy(table: LabelTable, content: bytes, file: Path) -> None:
    """Image id to a vector with a number for each class, in the class set's order: 1 where it is present.

    A whole number for an id stands for the one image whose name has that number, see ``images_numbered``.
    """
    try:
        labels = _dict_in(content)
    except LabelError as error:
        raise LabelError(f"{file}: {error}") from error
    except Exception as error:  # damaged ones make pickle and numpy raise nearly anything
        raise LabelError(
            f"{file}: not a .npy file of labels, or damaged ({type(error).__name__}); expected what "
            "np.save('cls_labels_onehot.npy', {'image_id': vector}) writes"
        ) from error
    for key, value in labels.items():
        key = _value(key)
        where = f"{file}, image {key!r:.80}"
        if isinstance(key, int):
            fitting = table.images_numbered(key)
            if len(fitting) > 1:
                raise LabelError(f"{where}: may be {fitting[0]!r:.80} or {fitting[1]!r:.80}; write whole ids")
            key = fitting[0] if fitting else str(key)
        if not isinstance(key, str):
            raise LabelError(f"{where}: expected an image id")
        table.add_record(key, classes_in_vector(_value(value), table.classes, where), where)


class _Name(NamedTuple):
    """Something of numpy's that the file refers to; called, it makes a record of that. It can't be changed."""

    name: str

    def __call__(self, *arguments: Any) -> _Made:
        return _Made(self.name, arguments)


class _Made:
    """What a call in the file would have made: what was called, with what, and the state set afterwards."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Unpickles lists, dicts, texts and numbers, and records of numpy's arrays; all else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (re.sub(r"\.(multiarray|numeric)$", "", module), name) in _NEEDED:
            return _Name(name)
        raise LabelError(
            f"it refers to {f'{module}.{name}'!r:.80}, which labels never need, so nothing of it was run"
        )


def _dict_in(content: bytes) -> dict[Any, Any]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if not dtype.hasobject:
        raise LabelError(f"an array {shape!r:.60} without image ids; save a dict {{'image_id': vector}}")
    array = _Unpickler(stream).load()
    found = _value(array)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        raise LabelError(f"it holds {type(found).__name__}, not a dict {{'image_id': vector}}")
    return found


def _value(made: Any) -> Any:
    """A list of an array's numbers or objects, the number or text of a scalar; else what it is."""
    if not isinstance(made, _Made):
        return made
    if made.name == "_reconstruct":
        _, shape, dtype, _, data = made.state
    elif made.name == "_frombuffer":
        data, dtype, shape, _ = made.arguments
    elif made.name == "scalar":
        (dtype, data), shape = made.arguments, ()
    else:
        raise LabelError(f"it holds a {made.name} where a number or text belongs")
    if isinstance(data, list):
        return data
    if isinstance(data, _Made) and data.name == "encode":  # how protocol 2 keeps bytes
        data = data.arguments[0].encode("latin1")
    code = dtype.arguments[0]
    order = dtype.state[1].replace("|", "=")
    if not re.fullmatch("[fiub][1248]|U[0-9]{1,5}", code) or order not in ("<", ">", "="):
        raise LabelError(f"it holds numbers of type {code!r:.60}")
    kind = np.dtype(order + code)
    if len(shape) > 1 or math.prod(shape) * kind.itemsize != len(data):
        raise LabelError(f"a vector of shape {shape!r:.60} with {len(data)} bytes")
    numbers: list[Any] = np.frombuffer(data, kind).tolist()
    return numbers if shape else numbers[0]
