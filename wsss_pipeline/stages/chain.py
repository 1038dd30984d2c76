"""A chain: several commands told in one file, each with what those before it made; what is done is done.

    about: CLIP-ES on PASCAL VOC 2012.
    inputs:
      voc: {about: VOC2012 folder}
      out: {about: folder for what is made, default: runs/voc12}
    stages:
      masks: generate-masks --voc {voc} --split train_aug --cache {out}/cache
      network: train-seg --cache {masks} --images {voc}/JPEGImages --out {out}/network

In braces stand an input's value, or the last line that an earlier stage has printed: the folder that it made. Every
command itself knows what it has done before, so a chain that was interrupted goes on where it was.
"""

from __future__ import annotations

import difflib
import logging
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pydantic import Field

from wsss_pipeline.config import Settings, read_yaml, resolve, yaml_mapping
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.runtime.output import one_line, printable

logger = logging.getLogger(__name__)

_PLACE = re.compile(r"\{([\w-]+)\}")
SOME_FAILED, INTERRUPTED = 1, 130  # exit codes


class Input(Settings):
    """What a chain asks its user for."""

    about: str = Field(description="One line for the user.")
    default: str | None = Field(
        None, description="Its value where none is given; without one it must be given."
    )


class Chain(Settings):
    """Commands in order."""

    about: str = Field(description="One line: what it makes.")
    inputs: dict[str, Input] = Field(description="Name to what it stands for.")
    stages: dict[str, str] = Field(min_length=1, description="Name to command line, without wsss.")

    def values(self, given: Sequence[str]) -> dict[str, str]:
        """Each input's value.

        Args:
            given: texts ``name=value``.

        Raises:
            ConfigError: an input that it hasn't, that is given twice, or that is missing.
        """
        found: dict[str, str] = {}
        for text in given:
            name, separator, value = text.partition("=")
            if not separator or not value:
                raise ConfigError(f"'{text:.200}': write inputs as NAME=VALUE, for example out=runs/first")
            if name not in self.inputs:
                close = difflib.get_close_matches(name, self.inputs, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"it has: {', '.join(self.inputs)}"
                raise ConfigError(f"the chain has no input '{name:.100}'; {hint}")
            if name in found:
                raise ConfigError(f"input '{name}' is given twice; drop one of them")
            found[name] = value
        missing = [
            f"{name}=... ({about.about})"
            for name, about in self.inputs.items()
            if name not in found and about.default is None
        ]
        if missing:
            raise ConfigError(f"the chain needs {', '.join(missing)}")
        defaults = {name: about.default for name, about in self.inputs.items() if about.default is not None}
        return {name: _filled(text, defaults | found) for name, text in defaults.items()} | found

    def check(self, origin: str) -> None:
        """A ConfigError where a stage can't be: no command line, or something in braces that isn't there yet."""
        known = set(self.inputs)
        for name, line in self.stages.items():
            where = f"{origin}: stage '{name:.100}'"
            try:
                words = shlex.split(line)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}; see its quotes") from error
            if not words or words[0] == "run":
                raise ConfigError(f"{where} must begin with a command of wsss other than run")
            if name in known:
                raise ConfigError(f"{where} has the name of an input; give it another")
            if unknown := set(_PLACE.findall(line)) - known:
                raise ConfigError(
                    f"{where}: nothing before it is called {{{min(unknown)}}}; known: {', '.join(sorted(known))}"
                )
            known.add(name)


@dataclass(frozen=True)
class StageResult:
    """What became of a stage.

    Attributes:
        name: name of the stage.
        command: words of its command, without wsss.
        code: exit code.
        last_line: last line that it printed; empty where it printed nothing.
    """

    name: str
    command: list[str]
    code: int
    last_line: str


def chain_names() -> list[str]:
    """Names of the chains in the package, such as ``clip-es/voc12``."""
    root = Path(str(resources.files("wsss_pipeline") / "chains"))
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.glob("*/*.yaml"))


def load_chain(name: str) -> Chain:
    """The chain of that name in the package, or that of a YAML file.

    Raises:
        ConfigError: there is none, or it can't be used.
    """
    if name in chain_names():
        path, origin = (
            Path(str(resources.files("wsss_pipeline") / "chains" / f"{name}.yaml")),
            f"chain {name}",
        )
    elif name.endswith((".yaml", ".yml")):
        path, origin = Path(name), f"chain {name}"
    else:
        close = difflib.get_close_matches(name, chain_names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(chain_names())}"
        raise ConfigError(f"unknown chain '{name:.100}'; {hint}, or a YAML file")
    chain = resolve(Chain, [(origin, yaml_mapping(read_yaml(path, origin), origin))])
    chain.check(origin)
    return chain


def commands(chain: Chain, values: Mapping[str, str]) -> dict[str, list[str]]:
    """Words of each stage's command, with ``<name>`` for what an earlier stage will print."""
    later = {name: f"<{name}>" for name in chain.stages}
    return {name: _words(line, {**later, **values}) for name, line in chain.stages.items()}


def run_chain(chain: Chain, values: Mapping[str, str], *, offline: bool = False) -> Iterator[StageResult]:
    """Run the stages in order, each in a process of its own, up to the first that can't do its work.

    A stage some of whose images failed is no reason to stop. What a stage prints goes where this process prints.

    Args:
        chain: chain.
        values: value of each input.
        offline: choice to fetch nothing.

    Raises:
        ConfigError: a stage printed nothing, and a later one has its name in braces.
    """
    known = dict(values)
    for number, (name, line) in enumerate(chain.stages.items(), 1):
        for place in _PLACE.findall(line):
            if not known[place] and place in chain.stages:
                raise ConfigError(
                    f"stage {name} can't begin: {place} printed nothing that {{{place}}} could stand for; "
                    "name the folder that it makes instead"
                )
        words = _words(line, known) + (["--offline"] if offline else [])
        logger.info("%d/%d %s: wsss %s", number, len(chain.stages), name, printable(shlex.join(words)))
        result = StageResult(name, words, *_run(words))
        yield result
        if result.code not in (0, SOME_FAILED):
            return
        known[name] = result.last_line


def _run(words: list[str]) -> tuple[int, str]:
    """Exit code and last line of stdout of a command."""
    last = ""
    # Ctrl-C reaches the child as well, which ends in its own way; its exit code says so
    before = [signal.signal(signal.SIGINT, lambda *_: None)]
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "wsss_pipeline", *words],
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            before.append(signal.signal(signal.SIGTERM, lambda *_: process.terminate()))
            assert process.stdout is not None
            for text in process.stdout:
                sys.stdout.write(text)
                sys.stdout.flush()
                last = text.rstrip("\n") or last
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=False):
            signal.signal(number, handler)
    code = process.returncode
    return (128 - code if code < 0 else code), last


def _words(line: str, values: Mapping[str, str]) -> list[str]:
    # filled after splitting, so that a space in a path stays in its word
    return [_filled(word, values) for word in shlex.split(line)]


def _filled(text: str, values: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise ConfigError(f"'{one_line(text, 100)}': nothing is called {{{found[1]}}}")
        return values[found[1]]

    return _PLACE.sub(value, text)
