"""Pictures on their way into CLIP: decoded, measured, gathered into batches of one size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.image_files import ImageFile, Status, file_status
from wsss_pipeline.data.images import file_digest, read_image
from wsss_pipeline.data.transforms import ClipInputSize, clip_input_size, resize_for_clip
from wsss_pipeline.errors import ImageError

Result = TypeVar("Result")


@dataclass(frozen=True)
class LoadedImage:
    """One picture with its labels.

    ``status``: of the file, before it was read. ``pixels``: uint8 (H, W, 3) RGB. ``classes``: mask values 1..C
    in the order of ``labels``.
    ``clip_size``: what CLIP gets; its ``scale`` is under 1 where the picture was too large.
    """

    image_id: str
    digest: str
    status: Status
    labels: tuple[str, ...]
    classes: list[int]
    pixels: NDArray[np.uint8]
    clip_size: ClipInputSize
    started: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the picture and its mask."""
        height, width = self.pixels.shape[:2]
        return height, width

    @property
    def working_size(self) -> tuple[int, int]:
        """(h, w) for the CRF: that of the picture, or smaller by ``scale``."""
        height, width = self.size
        scale = self.clip_size.scale
        return max(1, round(height * scale)), max(1, round(width * scale))

    def clip_pixels(self) -> NDArray[np.uint8]:
        """uint8 (h, w, 3) RGB at ``clip_size``."""
        return resize_for_clip(self.pixels, self.clip_size.width, self.clip_size.height)

    def working_pixels(self) -> NDArray[np.uint8]:
        """uint8 (h, w, 3) RGB at ``working_size``."""
        height, width = self.working_size
        return self.pixels if self.size == (height, width) else resize_for_clip(self.pixels, width, height)


def load_image(
    image_id: str,
    file: ImageFile,
    labels: tuple[str, ...],
    classes: list[int],
    patch_size: int,
    max_pixels: int,
) -> LoadedImage:
    """Read one picture.

    Raises:
        ImageError: the file can't be used.
    """
    try:
        status = file_status(file)
    except (OSError, ValueError) as error:
        raise ImageError(f"{file}: can't be read: {error}; replace or remove it") from error
    digest = file_digest(file)
    pixels = read_image(file)
    size = clip_input_size(pixels.shape[1], pixels.shape[0], patch_size, max_pixels)
    return LoadedImage(image_id, digest, status, labels, classes, pixels, size)


def ahead(
    read: Callable[[str], Result], image_ids: Iterable[str], readers: int, at_most: int
) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Each id with what waits for ``read(id)``, in order.

    Args:
        read: of one id.
        image_ids: in order.
        readers: threads that read ahead; with 0, reading happens when it is waited for.
        at_most: so many are read ahead.
    """
    if not readers:
        yield from ((image_id, partial(read, image_id)) for image_id in image_ids)
        return
    pool = ThreadPoolExecutor(readers)
    under_way: deque[tuple[str, Callable[[], Result]]] = deque()
    try:
        for image_id in image_ids:
            under_way.append((image_id, pool.submit(read, image_id).result))
            if len(under_way) > at_most:
                yield under_way.popleft()
        while under_way:
            yield under_way.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def windows(images: Iterable[LoadedImage], length: int) -> Iterator[list[LoadedImage]]:
    """The images in order, ``length`` at a time."""
    iterator = iter(images)
    while window := list(islice(iterator, length)):
        yield window


def same_size_batches(window: Iterable[LoadedImage], batch_size: int) -> list[list[LoadedImage]]:
    """Images of one ``clip_size``, at most ``batch_size`` of them; one without classes is left out."""
    groups: dict[tuple[int, int], list[LoadedImage]] = {}
    for image in window:
        if image.classes:
            groups.setdefault((image.clip_size.width, image.clip_size.height), []).append(image)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
