"""The folder of a training run: whose it is, what run it holds, and that no other process writes into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wsss_pipeline.config import Settings, differing_keys, to_yaml
from wsss_pipeline.errors import CheckpointError, ConfigError, TrainingError
from wsss_pipeline.files import read_bytes, read_json
from wsss_pipeline.runtime.locks import ProcessLock
from wsss_pipeline.runtime.output import MARK, is_temporary, one_line, write_file, writing
from wsss_pipeline.segmentation.checkpoint import BEST, LAST, remove_checkpoint, settle
from wsss_pipeline.segmentation.trainer import LOG, NAN, STATE

CONFIG, DATA, LOCK = "config.yaml", "data.json", "run.lock"
MAX_FILE_BYTES = 2**32  # of a log; the others are small
# with what each of a run's files begins, in this version and in earlier ones
_BEGINNINGS = {
    CONFIG: (f"# {MARK}".encode(), b"version: 1\nnetwork:\n"),
    DATA: (f'{{\n  "program": "{MARK}"'.encode(), b'{\n  "masks": '),
    LOG: (b'{"step": ',),
}


# how an update's images are divided: which they are hangs on their number alone
_DIVISION = ("processes:", "optimisation.batch:", "optimisation.accumulate:")


@contextmanager
def run_folder(
    out: Path,
    config: Settings,
    data: Mapping[str, Any],
    read_config: Callable[[Path], Settings],
    *,
    overwrite: bool,
) -> Iterator[None]:
    """A run's folder, this process's alone, with what the run is written into it.

    Args:
        out: the folder.
        config: settings of the run.
        data: plain values that tell what it learns from. The number of ``processes`` may be another than before, and
            so may ``optimisation.batch`` and ``optimisation.accumulate``, where as many images make up an update.
        read_config: function that reads such settings from a YAML file.
        overwrite: choice to start anew where it holds a run.

    Raises:
        TrainingError: another process trains into it; or it holds another run, or anything else.
        CheckpointError: it isn't known what run it holds.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not _is_own(out):
            raise TrainingError(f"{out} holds something else than a run; give an empty folder")
    lock = ProcessLock(out / LOCK)
    if not lock.acquire():
        raise TrainingError(
            f"{out} is being trained into by {lock.owner}; wait for it or stop it, or give another --out"
        )
    try:
        with writing(out):
            for name in (LAST, BEST, STATE, NAN):
                settle(out / name)
                if overwrite:
                    remove_checkpoint(out / name)
            has_results = any((out / name).exists() for name in (LAST, BEST, STATE))
            if not has_results:
                (out / LOG).unlink(missing_ok=True)
                for entry in filter(is_temporary, out.iterdir()):
                    if entry.name.startswith((CONFIG, DATA)):
                        entry.unlink()
        if has_results:
            _check_same(out, config, data, read_config)
        else:
            # a run that saved nothing has nothing to lose, whatever its settings were
            write_file(out / DATA, json.dumps({"program": MARK, **data}, indent=2, ensure_ascii=False) + "\n")
            write_file(out / CONFIG, f"# {MARK}: settings of this run\n{to_yaml(config)}")
        yield
    finally:
        lock.release()


def _is_own(out: Path) -> bool:
    """Whether a folder is empty or a run, by the names of its files and by what stands in them."""
    entries = {entry.name: entry for entry in out.iterdir()}
    for name, beginnings in _BEGINNINGS.items():
        if name in entries:
            content = b"" if entries[name].is_symlink() else read_bytes(entries[name], MAX_FILE_BYTES)
            # the other way round: a kill or a full disk may have cut it, to nothing at worst
            is_own = any(content.startswith(text) or text.startswith(content) for text in beginnings)
            if entries[name].is_symlink() or not is_own:
                return False
    if {DATA, CONFIG} <= entries.keys():
        return True  # whatever lies beside
    known = {*_BEGINNINGS, LOCK, LOCK.replace(".lock", ".owner")}
    return all(name in known or name.startswith((CONFIG, DATA)) for name in entries)


def _check_same(
    out: Path, config: Settings, data: Mapping[str, Any], read_config: Callable[[Path], Settings]
) -> None:
    """A TrainingError where the run in a folder is another one, a CheckpointError where it isn't known which."""
    try:
        former = dict(read_json(out / DATA, MAX_FILE_BYTES))
        former_config = read_config(out / CONFIG)
        changes = differing_keys(former_config, config)
        (former_together, former_times), (together, times) = (
            _division(former_config, former),
            _division(config, data),
        )
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{out}: its {CONFIG} or {DATA} can't be read ({one_line(error)[:200]}); start anew with --overwrite"
        ) from error
    changes += [
        f"{key}: {former.get(key)!s:.200}, {new}" for key, new in data.items() if former.get(key) != new
    ]
    images = former_together * former_times
    is_same_update = images == together * times
    if is_same_update:
        changes = [change for change in changes if not change.startswith(_DIVISION)]
    if changes:
        how = ""
        if not is_same_update and images % together == 0:
            how = f"; its updates have {images} images: --accumulate {images // together} goes on with them"
        raise TrainingError(
            f"{out} holds a run with other settings ({'; '.join(changes)}): give another --out, the former "
            f"settings, or --overwrite{how}"
        )


def _division(config: Any, data: Mapping[str, Any]) -> tuple[int, int]:
    """How many images all processes look at together, and how many times for an update."""
    optimisation = config.optimisation
    return int(optimisation.batch * data.get("processes", 1)), int(optimisation.accumulate)
