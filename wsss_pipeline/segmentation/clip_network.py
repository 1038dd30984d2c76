"""What networks on a CLIP have in common: the CLIP that no checkpoint holds, and the digest that stands for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import Settings
from wsss_pipeline.segmentation.network import SegmentationNetwork


class Frozen:
    """What isn't trained. It is no module, so it is in no checkpoint; copies of a network share it.

    Attributes:
        clip: CLIP as it was loaded.
        modules: modules that have to lie on the network's device.
    """

    def __init__(self, clip: Clip, modules: Sequence[nn.Module]) -> None:
        self.clip, self.modules = clip, tuple(modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self


class ClipNetwork(SegmentationNetwork):
    """A network that is of no use without the CLIP it was built on.

    Attributes:
        config: settings of what is trained.
        frozen: what no checkpoint holds.

    Args:
        clip: CLIP, whose own pixel statistics go before ImageNet's.
    """

    config: Settings
    frozen: Frozen
    _clip_digest: str | None = None

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        if clip.own_statistics is not None:
            self.image_mean, self.image_std = clip.own_statistics

    def frozen_digests(self) -> dict[str, str | None]:
        """Digests of the models that the network was built on, by name; reads CLIP's files."""
        files = self.frozen.clip.files
        if self._clip_digest is None and files is not None:
            self._clip_digest = files.digest()
        return {"clip": self._clip_digest}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClipNetwork:
        """Also to what is frozen."""
        for module in self.frozen.modules:
            module._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
