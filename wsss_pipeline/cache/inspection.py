"""Shards that somebody else may have written, or a disk damaged, go through a process of their own first.

HDF5 is not made for files from strangers: in one with a damaged heap it goes round for ever, and nothing in the
process can stop it. So a process that does nothing else opens such a shard, with a limit on its computing time and
memory; one that runs into it is ended and the shard counts as damaged. What that process has been through from end
to end may be opened anywhere: HDF5 does with the same bytes what it did before.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from wsss_pipeline.cache.records import (
    RecordInfo,
    RecordKind,
    check_records,
    image_ids,
    read_texts,
    record_kind,
)
from wsss_pipeline.cache.shards import IMAGES, MAX_SHARD_BYTES, UnreadableShardError, open_shard
from wsss_pipeline.errors import CacheFormatError, CacheRecordError, ResourceError
from wsss_pipeline.files import check_machine, open_plain

Depth = Literal["ids", "digests", "infos", "records"]

# Of a core: listing takes milliseconds, checking every record some 4 s for the 64 MiB of a large shard.
SECONDS, SECONDS_PER_MIB = 2.0, 1.0
WAITING = 20.0  # times as long by the clock, for busy machines and slow disks
MEMORY = 6 * 2**30  # address space: the largest record that may be stored takes 2.5 GiB


@dataclass(frozen=True)
class Inspection:
    """What a shard holds, as deep as was asked for.

    Attributes:
        ids: image ids of all its records.
        digests: image id to digest of the record.
        infos: image id to what is known of its record; with ``records`` of the sound ones alone.
        damaged: image id to reason.
        sha256: SHA-256 of the file, hexadecimal; empty but for ``records``.
    """

    ids: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    infos: dict[str, RecordInfo] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    sha256: str = ""


def inspect(
    path: Path,
    fingerprint: str,
    kind: RecordKind[Any],
    depth: Depth,
    only: Sequence[str] | None = None,
) -> Inspection:
    """Look into a shard in bounded time and memory, whatever it is.

    Args:
        path: the file, finished or partial.
        fingerprint: that of the mask set.
        kind: what its records hold.
        depth: ids alone; digests of all records; what is known of them; or the same, with every array of every
            record read and compared with its digest.
        only: ids of the images that more than their ids is asked for; all of them, where None.

    Raises:
        UnreadableShardError: as ``open_shard``; also where it took too long or ended the process that read it.
    """
    return _inspector().ask(path, fingerprint, kind, depth, only)


class _Inspector:
    """The process, started when it is first asked, and again after it was ended. One question at a time."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def ask(
        self,
        path: Path,
        fingerprint: str,
        kind: RecordKind[Any],
        depth: Depth,
        only: Sequence[str] | None,
    ) -> Inspection:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UnreadableShardError(f"{path} can't be opened ({error.strerror})", False) from error
        seconds = SECONDS + SECONDS_PER_MIB * min(size, MAX_SHARD_BYTES) / 2**20
        question = {
            "path": str(path.absolute()),
            "fingerprint": fingerprint,
            "holds": kind.holds,
            "class_names": list(kind.class_names),
            "depth": depth,
            "only": only,
            "seconds": seconds,
        }
        with self._lock:
            if self._process is None:
                try:
                    self._process = _start()
                except OSError as error:
                    check_machine(error)
                    raise ResourceError(f"no process can be started: {error.strerror}; try again") from error
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            slow = threading.Event()

            def end() -> None:
                slow.set()
                process.kill()

            timer = threading.Timer(WAITING * seconds, end)
            timer.start()
            try:
                process.stdin.write(json.dumps(question).encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:  # it ended before it was asked
                answer = b""
            except BaseException:  # an interrupt: its answer would be taken for that to the next question
                self.close()
                raise
            finally:
                timer.cancel()
            if not answer.endswith(b"\n"):
                self.close()
                raise _gave_up(path, process.returncode, slow.is_set(), seconds)
        return _understood(json.loads(answer))

    def close(self) -> None:
        """End the process; the next question starts another."""
        process, self._process = self._process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):  # what it wasn't asked any more
                    assert stream is not None
                    stream.close()


_present: list[_Inspector] = []


def _inspector() -> _Inspector:
    if not _present or _present[0].owner != os.getpid():  # a fork has none of its own yet
        _present[:] = [_Inspector()]
    return _present[0]


def _start() -> subprocess.Popen[bytes]:
    # the same modules as here, and none out of the current folder, which may be somebody's download
    paths = [path for path in sys.path if path]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from wsss_pipeline.cache.inspection import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for the process that asks
    )


def _gave_up(path: Path, code: int, was_slow: bool, seconds: float) -> UnreadableShardError:
    if was_slow:
        return UnreadableShardError(
            f"{path} couldn't be read within {WAITING * seconds:.0f} s; try again when the disk is less busy",
            False,
        )
    if code == -signal.SIGKILL:  # not by us: memory ran out, or a person
        return UnreadableShardError(f"{path}: the process that read it was killed; try again", False)
    is_over = code == -getattr(signal, "SIGXCPU", 0)
    how = f"took over {seconds:.0f} s to read" if is_over else f"ended the process that read it ({code})"
    return UnreadableShardError(f"{path} is damaged: it {how}; `wsss cache gc` sets it aside", True)


def _understood(answer: dict[str, Any]) -> Inspection:
    if "error" in answer:
        raise UnreadableShardError(answer["error"], answer["is_damaged"])
    infos = {
        image_id: RecordInfo(**{**info, "labels": tuple(info["labels"])})
        for image_id, info in answer["infos"].items()
    }
    return Inspection(**{**answer, "infos": infos})


def serve() -> None:
    """Answer questions, one a line, until there are no more."""
    with suppress(ImportError, ValueError, OSError):  # Windows has none, or less is allowed already
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        question = json.loads(line)
        _allow(question["seconds"])
        try:
            answer: Mapping[str, Any] = asdict(_look(question))
        except CacheFormatError as error:
            answer = {"error": str(error), "is_damaged": getattr(error, "is_damaged", True)}
        except MemoryError:  # little of it was allowed: no fault of the shard's
            answer = {"error": f"{question['path']}: too little memory to read it", "is_damaged": False}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _allow(seconds: float) -> None:
    """Have this process ended by the system once it has computed for so long from now."""
    try:
        import resource
    except ImportError:  # Windows: the clock of the process that asks is all there is
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, hard))


def _look(question: Mapping[str, Any]) -> Inspection:
    path, depth = Path(question["path"]), question["depth"]
    kind = record_kind(question["holds"], question["class_names"])
    digest = ""
    if depth == "records":
        try:
            with open_plain(path, MAX_SHARD_BYTES) as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise UnreadableShardError(f"{path} can't be opened ({error.strerror})", False) from error
    with open_shard(path, question["fingerprint"]) as file:
        images = file[IMAGES]
        ids, strange = image_ids(images)
        if depth in ("infos", "records"):
            infos, damaged = check_records(images, kind, question["only"], arrays=depth == "records")
            return Inspection(ids, {i: info.digest for i, info in infos.items()}, infos, damaged, digest)
        digests: dict[str, str] = {}
        damaged = dict.fromkeys(strange, "its name is no image id")
        for image_id in ids if depth == "digests" else ():
            try:
                (digests[image_id],) = read_texts(images, image_id, "record_digest")
            except (CacheRecordError, ValueError) as error:
                damaged[image_id] = str(error)
        return Inspection(ids, digests, {}, damaged)
