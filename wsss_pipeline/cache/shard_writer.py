"""One shard by somebody else than the mask set's writer: a worker on another machine, under the writer's lock."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from wsss_pipeline.cache.index import Stamp, stamp
from wsss_pipeline.cache.manifest import read_manifest
from wsss_pipeline.cache.shard_names import ShardName
from wsss_pipeline.cache.shards import ShardBuilder
from wsss_pipeline.data.masks import PseudoMask
from wsss_pipeline.runtime.output import write_file


class ShardWriter:
    """Context manager that gathers records in memory; ``finish`` writes them as a finished shard.

    A ``MaskWriter`` of the same set must be open somewhere, and be told of the shard (``adopt``). Written twice, by
    a worker that is thought dead and by its successor, the shard is the same.

    Args:
        folder: of the mask set.
        name: that nobody else uses.

    Raises:
        CacheFormatError: the folder isn't a mask set of this format version.
    """

    def __init__(self, folder: Path, name: ShardName) -> None:
        self._path = folder / name.finished
        self._builder = ShardBuilder(read_manifest(folder).fingerprint)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._builder.close()

    def write(
        self, image_id: str, pseudo_mask: PseudoMask, *, image_digest: str, seconds: float, scale: float = 1.0
    ) -> None:
        """As ``MaskWriter.write``.

        Raises:
            CacheRecordError: the id can't be stored.
        """
        self._builder.add(image_id, pseudo_mask, image_digest=image_digest, seconds=seconds, scale=scale)

    def finish(self) -> Stamp | None:
        """Write the shard; None where there is no record.

        Raises:
            OutputError: disk full, read-only, ...
        """
        if not len(self._builder):
            return None
        write_file(self._path, self._builder.to_bytes())
        return stamp(self._path)
