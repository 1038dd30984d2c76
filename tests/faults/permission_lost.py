"""generate-masks that loses its permission after the first flush: ``python -m tests.faults.permission_lost``.

Arguments: the cache folder for a first, undisturbed run, which imports all there is to import; the one for the
second run, whose mask set is made unwritable in its midst; then the command without ``--cache``. root, whom
permissions don't stop, becomes nobody in between.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from wsss_pipeline.cache import writer
from wsss_pipeline.cli import main as wsss

NOBODY = 65534


def main() -> None:
    """Both runs; the exit code is the second one's."""
    first, second, *arguments = sys.argv[1:]
    writer.IMAGES_PER_FLUSH, writer.FLUSH_REST = 2, 0.0
    wsss([*arguments, "--cache", first], prog_name="wsss", standalone_mode=False)
    if os.geteuid() == 0:
        os.setuid(NOBODY)
    flush = writer.MaskWriter.flush

    def flush_and_lock(self: writer.MaskWriter) -> None:
        flush(self)
        for path in Path(second).iterdir():
            path.chmod(0o500)

    writer.MaskWriter.flush = flush_and_lock  # type: ignore[method-assign]
    wsss([*arguments, "--cache", second], prog_name="wsss")


if __name__ == "__main__":
    main()
