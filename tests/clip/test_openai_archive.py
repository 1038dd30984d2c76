"""TorchScript archives as data: what is read, and what an archive that means harm can't do."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from wsss_pipeline.clip.openai_archive import is_torchscript, read_torchscript
from wsss_pipeline.clip.tensor_files import read_tensor_files, tensors_in
from wsss_pipeline.errors import WeightsError

FLOATS = torch.arange(6, dtype=torch.float32)


class Node:
    """A module of the archive; its attributes are tensors and other modules."""

    __module__ = "__torch__"

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Stored:
    """A storage beside the pickle."""

    def __init__(self, key: str, length: int) -> None:
        self.key, self.length = key, length


class Placed:
    """A tensor in storage 0, with whatever the archive claims about it."""

    def __init__(self, size: Any, stride: Any, offset: Any = 0, state: Any = None, length: int = 6) -> None:
        self.arguments = (Stored("0", length), offset, size, stride, False, OrderedDict())
        self.state = state

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments, self.state


class TreePickler(pickle.Pickler):
    """Writes storages as TorchScript does."""

    def persistent_id(self, value: Any) -> Any:
        return (
            ("storage", torch.FloatStorage, value.key, "cpu", value.length) if type(value) is Stored else None
        )


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes a module tree as an archive with one storage of six numbers."""
    module: Any = types.ModuleType("__torch__")
    module.Node = Node
    monkeypatch.setitem(sys.modules, "__torch__", module)

    def write(root: Node) -> Path:
        index = io.BytesIO()
        TreePickler(index, protocol=2).dump(root)
        file = tmp_path / "ViT.pt"
        with zipfile.ZipFile(file, "w") as target:
            target.writestr("ViT/data.pkl", index.getvalue())
            target.writestr("ViT/constants.pkl", b"")
            target.writestr("ViT/data/0", FLOATS.numpy().tobytes())
        return file

    return write


def test_tensors_have_the_names_of_their_modules(archive: Any) -> None:
    tree = Node(visual=Node(proj=Placed((2, 3), (3, 1)), training=False), scale=Placed((), (), 5))
    found = read_torchscript(archive(tree))
    assert found.keys() == {"visual.proj", "scale"}
    assert torch.equal(found["visual.proj"], FLOATS.view(2, 3))
    assert found["scale"].item() == 5


def test_layers_may_share_a_mask(archive: Any) -> None:
    mask = Placed((3, 2), (1, 3))
    found = read_torchscript(archive(Node(first=Node(mask=mask), second=Node(mask=mask))))
    assert torch.equal(found["first.mask"], FLOATS.view(2, 3).T)
    assert torch.equal(found["first.mask"], found["second.mask"])


@pytest.mark.parametrize(
    "tensor",
    [
        Placed((7,), (1,)),
        Placed((2, 3), (3, 1), 1),
        Placed((2,), (1,), -1),
        Placed((-2,), (1,)),
        Placed((2**20, 2**20), (0, 0)),
        Placed((2**70,), (0,)),
        Placed((2,), (1, 1)),
        Placed("23", (1, 1)),
        Placed((6,), (1,), length=5),
        Placed((6,), (1,), length=2**40),
        # what a real tensor's __setstate__ would take as: lie elsewhere
        Placed((6,), (1,), state=(Placed((6,), (1,)), 0, (1000, 1000), (1000, 1))),
    ],
    ids=[
        *("too long", "shifted", "before", "negative", "repeated", "overflow"),
        *("ranks", "text", "short", "claims more", "moved"),
    ],
)
def test_a_tensor_never_leaves_its_storage(archive: Any, tensor: Placed) -> None:
    with pytest.raises(WeightsError, match=r"ViT\.pt can't be read") as caught:
        read_torchscript(archive(Node(weight=tensor)))
    assert "\n" not in str(caught.value)


def test_each_module_is_entered_once(archive: Any) -> None:
    node = Node(weight=Placed((6,), (1,)))
    for _ in range(60):  # 2**60 ways lead to the tensor
        node = Node(left=node, right=node)
    node.itself = node
    assert len(read_torchscript(archive(node))) == 1


def test_endless_names_are_refused(archive: Any) -> None:
    node = Node(weight=Placed((6,), (1,)))
    for _ in range(12):
        node = Node(**{"a" * 100: node})
    with pytest.raises(WeightsError, match="nested deeper"):
        read_torchscript(archive(node))


def test_other_objects_are_refused_by_name(archive: Any) -> None:
    with pytest.raises(WeightsError, match=r"refers to .*Path, which weights never need"):
        read_torchscript(archive(Node(weight=Path("a"))))


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert not is_torchscript(tmp_path / "ViT.pt")
    with pytest.raises(WeightsError, match="can't be read: No such file"):
        read_torchscript(tmp_path / "ViT.pt")


def test_torchs_advice_to_trust_a_file_is_not_passed_on(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "path": Path("a")}, tmp_path / "ViT.pt")
    with pytest.raises(WeightsError, match="more than plain tensors") as caught:
        read_tensor_files((tmp_path / "ViT.pt",), tensors_in)
    assert "do those steps" not in str(caught.value)
