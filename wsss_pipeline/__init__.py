"""Weakly supervised semantic segmentation from image-level labels with a frozen CLIP."""

__version__ = "0.1.0"

__all__ = ["__version__"]
