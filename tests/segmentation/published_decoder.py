"""Decoders by the names of their published checkpoints, as the networks here call the same tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_NAMES = (
    (r"^dino_decoder_fts_fuse\.", "model.dino_fusion."),
    (r"^decoder_fts_fuse\.", "model.fusion."),
    (r"linears_modulelist\.(\d+)\.proj\.", r"layers.\1.0."),
    (r"linears_modulelist\.(\d+)\.proj_2\.", r"layers.\1.2."),
    (r"linear_fuse\.", "fuse."),
    (r"^decoder\.linear_pred\.", "model.decoder.classify."),
    (r"^decoder\.transformer\.resblocks\.", "model.decoder.blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".linear1."),
    (r"\.mlp\.c_proj\.", ".linear2."),
)


def own_name(published: str) -> str:
    for pattern, name in _NAMES:
        published = re.sub(pattern, name, published)
    return published


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {own_name(name): value.float() for name, value in tensors.items()}
