"""Labels as ``cls_labels_onehot.npy``: a dict of vectors that numpy saved as a pickle, read as data.

No code in the file runs: the unpickler makes inert records of whatever it is told to call, and what numpy would have
made of them is read from these. It is Python's own in Python, whose memory grows with the file alone.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from wsss_pipeline import files
from wsss_pipeline.data.label_readers.label_table import LabelTable, reading
from wsss_pipeline.data.label_readers.vectors import classes_in_vector
from wsss_pipeline.errors import LabelError, WsssError
from wsss_pipeline.files import MIB

MAGIC = b"\x93NUMPY"
MOST_BYTES = 512 * MIB  # that of COCO's 123,000 images takes a twentieth
MOST_NUMBERS = 10_000  # of a vector; the same one may stand for all images
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
        for made, vector in _dict_in(content, file).items():
            key = _value(made, str(file))
            where = f"{file}, image {key!r:.80}"
            if isinstance(key, int):
                fitting = table.images_numbered(key)
                if len(fitting) > 1:
                    raise LabelError(
                        f"{where}: may be {fitting[0]!r:.80} or {fitting[1]!r:.80}; write whole ids"
                    )
                key = fitting[0] if fitting else str(key)
            if not isinstance(key, str):
                raise LabelError(f"{where}: expected an image id")
            table.add_record(key, classes_in_vector(_value(vector, where), table.classes, where), where)
    except (WsssError, MemoryError):
        raise
    except Exception as error:  # damaged ones make pickle and numpy raise nearly anything
        raise LabelError(
            f"{file}: not a .npy file of labels, or damaged ({type(error).__name__}); expected what "
            "np.save('cls_labels_onehot.npy', {'image_id': vector}) writes"
        ) from error


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

    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, stream: io.BytesIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def load_bytearray8(self) -> None:
        """As Python's own, which makes room for any number of bytes before it looks how many there are."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}

    def find_class(self, module: str, name: str) -> Any:
        if (re.sub(r"\.(multiarray|numeric)$", "", module), name) in _NEEDED:
            return _Name(name)
        raise LabelError(
            f"{self._file}: refers to {f'{module}.{name}'!r:.80}, which labels never need, so nothing of it was run"
        )


def _dict_in(content: bytes, file: Path) -> dict[Any, Any]:
    """The dict in the one object of an array, its keys and values as the unpickler made them."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if not dtype.hasobject:
        raise LabelError(
            f"{file}: an array {shape!r:.60} without image ids; save a dict {{'image_id': vector}}"
        )
    found = _Unpickler(stream, file).load()
    if isinstance(found, _Made):
        (found,) = found.state[4]
    if not isinstance(found, dict):
        raise LabelError(f"{file}: it holds {type(found).__name__}, not a dict {{'image_id': vector}}")
    return found


def _value(made: Any, where: str) -> Any:
    """The numbers of a vector, the number or text of a scalar; else what it is.

    Raises:
        LabelError: what no vector of labels is: of more than one axis, with other than numbers, or too long.
    """
    shape: tuple[int, ...] = ()
    if isinstance(made, _Made) and made.name == "_reconstruct":
        _, shape, dtype, _, data = made.state
    elif isinstance(made, _Made) and made.name == "_frombuffer":
        data, dtype, shape, _ = made.arguments
    elif isinstance(made, _Made) and made.name == "scalar":
        dtype, data = made.arguments
    else:
        data = made
    if isinstance(data, list) and not (isinstance(made, _Made) and made.name == "scalar"):
        # a list, or an array of objects
        if len(data) > MOST_NUMBERS:
            raise LabelError(f"{where}: {len(data):,} values; a vector has a number for each class")
        scalars = [item for item in data if isinstance(item, _Made) and item.name == "scalar"]
        return [_value(item, where) for item in data] if len(scalars) == len(data) else data
    if data is made:
        if isinstance(made, int) and made.bit_length() > 64:  # which take minutes to print
            raise LabelError(f"{where}: a number of more than 64 bits")
        return made
    if isinstance(data, _Made) and data.name == "encode":  # how protocol 2 keeps bytes
        data = data.arguments[0].encode("latin1")
    code, order = dtype.arguments[0], dtype.state[1].replace("|", "=")
    if not re.fullmatch("[fiub][1248]|U[0-9]{1,4}", code) or order not in ("<", ">", "="):
        raise LabelError(f"{where}: numbers of type {code!r:.60}")
    kind = np.dtype(order + code)
    size = kind.itemsize * math.prod(shape)
    if len(shape) > 1 or len(data) != size or size > MOST_NUMBERS * 8:
        raise LabelError(
            f"{where}: an array of shape {shape!r:.60} in {len(data):,} bytes isn't a vector of labels"
        )
    numbers: list[Any] = np.frombuffer(data, kind).tolist()
    return numbers if shape else numbers[0]
