"""From what a user names to where regions come from."""

from __future__ import annotations

from pathlib import Path

from wsss_pipeline.cache.manifest import list_mask_sets
from wsss_pipeline.config import SlicConfig
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.regions.outside import JsonRegions, LabelImages, json_files
from wsss_pipeline.regions.regions import RegionSource
from wsss_pipeline.regions.store import StoredRegions
from wsss_pipeline.regions.superpixels import Slic

SLIC = "slic"


def open_regions(name: str, slic: SlicConfig | None = None) -> RegionSource:
    """A source of regions.

    Args:
        name: ``slic``; a region set, or a folder that holds exactly one; a folder of JSON files; one of label images.
        slic: settings of the superpixels; the defaults where None.

    Raises:
        ConfigError: nothing of this kind.
        CacheError: a mask set, several region sets, or one of another format version.
        ImageError, RegionError: the folder can't be read.
        MissingDependencyError: scikit-image isn't installed.
    """
    if name == SLIC:
        return Slic(slic or SlicConfig())
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"--regions {name:.200}: no such folder; name {SLIC}, a region set of `wsss propose-regions`, or a "
            "folder of JSON files or label images"
        )
    if list_mask_sets(folder):
        return StoredRegions.open(folder)
    has_json, has_images = bool(json_files(folder)), bool(find_images(folder, may_be_empty=True))
    if has_json == has_images:
        both = "both JSON files and images; name a folder that holds the regions alone"
        none = "no region set, no JSON files and no label images; check the path"
        raise ConfigError(f"--regions {name:.200} holds {both if has_json else none}")
    return JsonRegions(folder) if has_json else LabelImages(folder)
