"""Processes that begin with their work: forks of one that has imported everything, ``python -m tests.forks``.

A process of its own takes seconds to import torch and what stands on it. A fork of one that has begun once runs a
module in no time, and can be killed, limited and sent signals like any other. What depends on how an interpreter
starts or on the order of imports needs a real start.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# variables that torchrun sets, of those that are read here, by torch or by accelerate
TORCHRUN = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
)
STAGES = ("generate_masks", "propose_regions", "learn_prompts", "train_seg", "relabel", "evaluate")


def import_all() -> None:
    """Import what commands import as they go, and start no threads that a fork would break."""
    import torch
    import transformers

    from wsss_pipeline.methods import load_method, method_names

    for module in STAGES:
        importlib.import_module(f"wsss_pipeline.stages.{module}")
    importlib.import_module("skimage.segmentation")
    for name in method_names():
        load_method(name)
    assert transformers.CLIPModel
    torch.set_num_threads(1)


def start(
    module: str,
    arguments: list[str],
    output: tuple[Path, Path],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    file_size: int | None = None,
    is_group: bool = False,
) -> int:
    """A fork of this process that runs a module as ``python -m`` does; its process id.

    Args:
        module: name of the module.
        arguments: its arguments.
        output: files that stdout and stderr are appended to.
        folder: working directory, where it isn't this process's.
        environment: variables to set; None for one to remove.
        file_size: bytes that no file may grow beyond, as on a full disk.
        is_group: choice of a group of its own, for signals to it and to what it starts.
    """
    child = os.fork()
    if child:
        if is_group:
            with suppress(OSError):  # whoever comes first: it is to be there when we return
                os.setpgid(child, child)
        return child
    code = 1
    try:
        if is_group:
            os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for stream, file in enumerate(output, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
        for name, value in (environment or {}).items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        if folder is not None:
            os.chdir(folder)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


class Fork:
    """A process of the server's; like one of ``subprocess``, with texts."""

    def __init__(self, server: ForkServer, pid: int, output: tuple[Path, Path]) -> None:
        self.pid, self.returncode = pid, None
        self._server, self._output = server, output
        self._end = os.pidfd_open(pid)

    returncode: int | None

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float = 120) -> int:
        """Exit code, the negative signal's number where that ended it."""
        code = self._ended(timeout)
        if code is None:
            raise TimeoutError(f"process {self.pid} has run for {timeout:.0f} s")
        return code

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """What it said on stdout and stderr, at its end."""
        self.wait(timeout)
        stdout, stderr = (file.read_text("utf-8", errors="replace") for file in self._output)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """A signal to a process that hasn't been waited for."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._end], [], [], seconds)[0]:
            self.returncode = self._server.ask(wait=self.pid)
            os.close(self._end)
        return self.returncode


class ForkServer:
    """The process that is forked; ``folder`` is for what the forks print."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments: object, module: str = "wsss_pipeline", **options: Any) -> Fork:
        """A process that runs a module, ``options`` as of ``start``."""
        self._count += 1
        output = tuple(str(self._folder / f"{self._count}.{name}") for name in ("stdout", "stderr"))
        pid = self.ask(module=module, arguments=[str(word) for word in arguments], output=output, **options)
        return Fork(self, pid, (Path(output[0]), Path(output[1])))

    def run_two(self, *arguments: object, **options: Any) -> tuple[list[int], str, str]:
        """Exit codes, stdout and stderr of two processes that are told what torchrun tells the two that it starts."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            values = (rank, rank, 2, 2, "127.0.0.1", port, "none")
            environment = {name: str(value) for name, value in zip(TORCHRUN, values, strict=True)}
            processes.append(self.start(*arguments, environment=environment, **options))
        said = [process.communicate() for process in processes]
        codes = [process.wait() for process in processes]
        return codes, "".join(stdout for stdout, _ in said), "".join(stderr for _, stderr in said)

    def run(self, *arguments: object, timeout: float = 200, **options: Any) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a process at its end."""
        process = self.start(*arguments, **options)
        stdout, stderr = process.communicate(timeout)
        return process.wait(), stdout, stderr

    def ask(self, **request: Any) -> int:
        """The server's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request, default=str), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it, and with it what it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def main() -> None:
    """Answer requests until there are no more: start a process, or wait for one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the one that asks ends us
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all()
    running: set[int] = set()
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            running.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = start(**request)
            running.add(answer)
        print(answer, file=answers, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
