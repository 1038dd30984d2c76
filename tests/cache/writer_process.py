"""A process that fills a mask set, for tests that kill it, starve it or let it hold its lock.

    writer_process.py MODE FOLDER COUNT

prints ``ready`` when all is imported, then does its work and prints ``done``.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

from cache_samples import current, make_digest, make_mask

from wsss_pipeline.cache import MaskWriter, writer
from wsss_pipeline.errors import OutputError


def fill(folder: Path, count: int, images_per_shard: int) -> None:
    image_ids = [f"image-{number}" for number in range(count)]
    with MaskWriter(folder, images_per_shard=images_per_shard) as mask_writer:
        done = current(mask_writer, folder, image_ids)
        for image_id in image_ids:
            if image_id not in done:
                record = make_mask(image_id)
                mask_writer.write(image_id, record, image_digest=make_digest(image_id), seconds=0.0)
        mask_writer.finish(image_ids)


def main(mode: str, folder: Path, count: int) -> None:
    writer.IMAGES_PER_FLUSH, writer.FLUSH_REST = 4, 0.0
    print("ready", flush=True)
    if mode == "fork":
        for line in sys.stdin:  # a folder each: a process of its own, without the time that imports take
            child = os.fork()
            if child == 0:
                fill(Path(line.rstrip("\n")), count, images_per_shard=25)
                os._exit(0)
            print(child, flush=True)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        return
    if mode == "hold":
        with MaskWriter(folder):
            print("holding", flush=True)
            sys.stdin.read()
    elif mode == "starve":  # no file may grow beyond COUNT bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
        try:
            fill(folder, 1000, images_per_shard=1000)
        except OutputError as error:
            print(f"{type(error).__name__}: {error}")
            return
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
