"""Device and precision as the user asked for them, resolved to what this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from wsss_pipeline.config import Precision
from wsss_pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

ResolvedPrecision = Literal["fp32", "bf16", "fp16"]


def resolve_device(requested: str) -> torch.device:
    """``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N`` as a device.

    Raises:
        ConfigError: a CUDA device was asked for and isn't there.
    """
    import torch

    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ConfigError(f"--device {requested}: choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {requested}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {requested}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu, or mend the driver (see `wsss doctor`)"
        )
    return device


def resolve_precision(requested: Precision) -> ResolvedPrecision:
    """The precision of CLIP's matrix products; ``auto`` is fp32, which the published masks need.

    bf16 and fp16 change the masks (measured on CLIP-ES: CAMs move by up to 0.03 and 0.3), so they are the
    user's choice, and part of the cache's fingerprint.
    """
    return "fp32" if requested == "auto" else requested
