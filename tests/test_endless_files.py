"""Files without end, whatever names them, and YAML that unfolds without end: one short line, at once."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig, MaskConfig, resolve, user_layers
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.errors import WsssError
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.pretrained import load_pretrained
from wsss_pipeline.segmentation.train_config import NetworkConfig

KINDS = ("FIFO", "device", "sparse")


def endless(path: Path, kind: str, size: int = 60 * 2**30) -> Path:
    """A file that nobody should wait for the end of; it takes no room on the disk."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("ab") as file:
            file.truncate(size)
    return path


def config_of(path: Path) -> MaskConfig:
    return resolve(MaskConfig, user_layers(path, (), {}))


READERS: dict[str, Callable[[Path], Any]] = {
    "class set": lambda path: load_class_set(str(path)),
    "configuration": config_of,
    "split": read_split,
}


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(WsssError) as caught:
        read()
    message = str(caught.value)
    assert len(message) < 600
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", [*KINDS, "folder", "gone"])
@pytest.mark.parametrize("reader", READERS)
def test_settings_that_are_no_plain_file(tmp_path: Path, reader: str, kind: str) -> None:
    path = tmp_path / "x.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        endless(path, kind)
    message = refusal(lambda: READERS[reader](path))
    assert str(path) in message
    assert "can't be read" in message


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGED = "a0: &a0 {a: 1, b: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)
HOSTILE = {
    "aliases of aliases": LAUGHS,
    "aliases in names": LAUGHS + "classes: [*a11, *a11]\nname: *a11\n",
    "merged mappings": MERGED,
    "one long text in many places": f"a: &a {'x' * 10_000}\nb: [{', '.join(['*a'] * 10_000)}]\n",
    "a list that holds itself": "classes: &a [*a]",
    "a mapping that holds itself": "&a {name: *a}",
    "nested lists": "[" * 100_000,
    "nested mappings": "a: {" * 100_000,
    "nested blocks": "- " * 100_000,
    "a number of many digits": "method: 1" + "0" * 200_000,
    "a number of base 60": "method: 1" + ":00" * 80_000,
    "many entries": "background: [" + "a, " * 80_000 + "]\nclasses: [cat]",
    "many classes": "classes: [" + "a, " * 80_000 + "]",
    "a long name": f"classes: [{'a' * 200_000}]",
    "a long key": f"{'a' * 1000}: 1",
    "half a character as key": '"\\udcff": 1',
    "half a character as value": 'method: "\\udcff"\nname: "\\udcff"\nclasses: ["\\udcff"]',
}


def test_yaml_without_end(tmp_path: Path) -> None:
    """In a process of its own with little memory, for what isn't refused takes all there is."""
    paths = []
    for case, text in HOSTILE.items():
        paths.append(tmp_path / f"{case}.yaml")
        paths[-1].write_text(text)
    code = """
import sys, time
from pathlib import Path
from tests.test_endless_files import READERS, refusal
for reader in ("class set", "configuration"):
    for path in map(Path, sys.argv[1:]):
        began = time.process_time()
        assert "\\n" not in refusal(lambda: READERS[reader](path)), (reader, path)
        assert time.process_time() - began < 10, (reader, path)
"""
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 5000000; exec "$@"', "-", sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize("count", [65_535, 200_000])
def test_too_many_class_names_bring_a_short_line(count: int) -> None:
    message = refusal(lambda: load_class_set(",".join(f"c{number}" for number in range(count))))
    assert f"{count:,} classes; a mask holds 65,534" in message


def test_long_settings_bring_a_short_line() -> None:
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["x" * 100_000], {})))
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["method=[" + "x" * 100_000], {})))
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["x" * 100_000 + "=1"], {})))
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["crf.image=" + "x" * 100_000], {})))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


def digest_and_load(weights: Path, tokenizer: Path | None = None) -> None:
    files = locate_clip(
        ClipConfig(weights=str(weights), tokenizer=tokenizer and str(tokenizer)), offline=True
    )
    files.digest()
    load_clip(files, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "preprocessor_config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "chat_template.jinja",
    ],
)
def test_a_clip_with_a_file_without_end(tmp_path: Path, clip: Path, name: str, kind: str) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(clip, copy)
    if name == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    if name == "open_clip_model.safetensors":
        (copy / "config.json").unlink()
        (copy / "open_clip_config.json").write_text("{}")
    (copy / name).unlink(missing_ok=True)
    endless(copy / name, kind)
    message = refusal(lambda: digest_and_load(copy))
    assert f"{name} can't be read" in message


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_of_openai_without_end(tmp_path: Path, clip: Path, kind: str) -> None:
    path = endless(tmp_path / "ViT.pt", kind)
    refusal(lambda: digest_and_load(path, clip))


@pytest.mark.parametrize(
    ("tower", "change"),
    [
        ("vision_config", {"num_hidden_layers": 10**9}),
        ("text_config", {"num_hidden_layers": 10**9}),
        ("text_config", {"hidden_size": 10**9}),
        ("vision_config", {"image_size": 10**9, "patch_size": 1}),
        ("text_config", {"vocab_size": 10**12}),
    ],
)
def test_a_configuration_of_a_model_without_end(
    tmp_path: Path, clip: Path, tower: str, change: dict[str, int]
) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(clip, copy)
    config = json.loads((copy / "config.json").read_text())
    config[tower] |= change
    (copy / "config.json").write_text(json.dumps(config))
    assert "no CLIP has" in refusal(lambda: digest_and_load(copy))


def sparse_safetensors(path: Path, tensors: dict[str, list[int]]) -> Path:
    """A file with a sound header, whose numbers are a hole."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def initial_weights(path: Path) -> None:
    config = NetworkConfig(name="deeplabv2", encoder="resnet18", weights=str(path))
    load_pretrained(build_network(config, 3), config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
def test_initial_weights_without_end(tmp_path: Path, name: str, kind: str) -> None:
    path = endless(tmp_path / name, kind, size=70 * 2**30)
    assert "can't be read" in refusal(lambda: initial_weights(path))
    assert "can't be read" in refusal(lambda: initial_weights(tmp_path))


# in a process of its own, for the largest amount of memory that one has had never shrinks
MEASURED = """
import resource, sys, time
from pathlib import Path
from tests.test_endless_files import digest_and_load, initial_weights, refusal
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for path in map(Path, sys.argv[1:]):
    print(refusal(lambda: (digest_and_load if path.is_dir() else initial_weights)(path)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, path  # KiB
assert time.process_time() - began < 20
"""


def test_giant_tensors_are_refused_in_little_memory(tmp_path: Path, clip: Path) -> None:
    """In a CLIP; in initial weights, under names of the encoder or not: those of another shape are never read."""
    paths = []
    for size in (2**26, 15 * 2**30):
        copy = tmp_path / f"clip-{size}"
        shutil.copytree(clip, copy)
        sparse_safetensors(copy / "model.safetensors", {"logit_scale": [], "x": [size // 4]})
        paths.append(copy)
    paths += [
        sparse_safetensors(tmp_path / "a.safetensors", {"x": [15 * 2**30]}),
        sparse_safetensors(tmp_path / "b.safetensors", {"conv1.weight": [2**30], "bn1.weight": [2**30]}),
    ]
    whole = tmp_path / "c.pth"
    torch.save({"conv1.weight": torch.zeros(2**20)}, whole)
    paths.append(whole)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
