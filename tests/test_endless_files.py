"""Files without end, whatever names them, and YAML that unfolds without end: one short line, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wsss_pipeline.config import MaskConfig, resolve, user_layers
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.errors import WsssError

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
}


@pytest.mark.parametrize("reader", ["class set", "configuration"])
def test_yaml_without_end(tmp_path: Path, reader: str) -> None:
    """In a process of its own with little memory, for what isn't refused takes all there is."""
    paths = []
    for case, text in HOSTILE.items():
        paths.append(tmp_path / f"{case}.yaml")
        paths[-1].write_text(text)
    code = f"""
import sys, time
from pathlib import Path
from tests.test_endless_files import READERS, refusal
for path in map(Path, sys.argv[1:]):
    began = time.process_time()
    assert "\\n" not in refusal(lambda: READERS[{reader!r}](path))
    assert time.process_time() - began < 10, path
"""
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "-", sys.executable, "-c", code, *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize("count", [255, 10_000])
def test_too_many_class_names_bring_a_short_line(count: int) -> None:
    message = refusal(lambda: load_class_set(",".join(f"c{number}" for number in range(count))))
    assert f"{count:,} classes; a mask holds 254" in message


def test_long_settings_bring_a_short_line() -> None:
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["x" * 100_000], {})))
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["method=[" + "x" * 100_000], {})))
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["x" * 100_000 + "=1"], {})))
    refusal(lambda: resolve(MaskConfig, user_layers(None, ["crf.image=" + "x" * 100_000], {})))
