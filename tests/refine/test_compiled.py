"""Where machine code is kept, and compiling where nothing can be written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from wsss_pipeline.refine import dense_crf_cpu
from wsss_pipeline.refine.dense_crf_cpu import compiled, folder_for_code

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's ``home`` and a ``temporary`` one; the package's can't be written."""
    package = str(Path(dense_crf_cpu.__file__).parent)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).startswith(package) and access(path, mode)
    )
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary").chmod(0o1777)
    return tmp_path


def test_code_is_kept_where_only_the_user_can_write(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = installed / "home/.cache/wsss-pipeline"
    temporary = installed / f"temporary/wsss-pipeline-{os.getuid()}"
    assert folder_for_code() == str(home)
    assert home.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", str(installed / "cache"))
    assert folder_for_code() == str(installed / "cache/wsss-pipeline")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    home.chmod(0o770)
    assert folder_for_code() == str(temporary)
    (installed / "temporary").chmod(0o777)
    assert folder_for_code() is None, "anybody could put another folder in its place"
    (installed / "temporary").chmod(0o1777)
    temporary.rmdir()
    (installed / "planted").mkdir(mode=0o700)
    temporary.symlink_to(installed / "planted")
    assert folder_for_code() is None
    temporary.unlink()
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/somewhere")
    assert folder_for_code() == "/somewhere"


def test_another_users_folder_is_not_taken(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    assert folder_for_code() is None


@pytest.mark.usefixtures("installed")
def test_where_users_have_no_numbers_the_choice_is_numbas_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")
    assert folder_for_code() == ""


def test_code_in_the_users_folder_is_found_again(installed: Path) -> None:
    assert compiled(double)(21) == 42
    assert list((installed / "home/.cache/wsss-pipeline").rglob("*.nbc"))
    assert numba.config.CACHE_DIR == ""
    again = compiled(double)
    assert again(21) == 42
    assert again.stats.cache_hits


def double(value: int) -> int:
    return 2 * value


def test_without_a_folder_to_keep_it_the_code_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numba.njit
    asked = []

    def njit(**options: bool) -> object:
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return plain(**options)

    monkeypatch.setattr("wsss_pipeline.refine.dense_crf_cpu.njit", njit)
    assert compiled(double)(21) == 42
    assert asked == [{"cache": True, "nogil": True}, {"nogil": True}]


def test_a_cache_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    """The functions of the dense CRF are decorated as their module is imported; to compile them too takes long."""
    (tmp_path / "file").write_bytes(b"")
    code = (
        "from wsss_pipeline.refine import dense_crf_cpu, par_cpu; "
        "from tests.refine.test_compiled import double; "
        "print(dense_crf_cpu.compiled(double)(21))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "42\n"


def test_all_that_is_compiled_is_compiled_so() -> None:
    package = Path(dense_crf_cpu.__file__).parents[1]
    importing = {
        path.name for path in package.rglob("*.py") if re.search(r"import.*\bn?jit\b", path.read_text())
    }
    assert importing == {Path(dense_crf_cpu.__file__).name}
