"""Mask sets, folders of masks and networks side by side on the same images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsss_pipeline.cache import MaskCache, list_mask_sets
from wsss_pipeline.data.class_lists import Color
from wsss_pipeline.data.datasets import read_split
from wsss_pipeline.data.image_files import ImageFile
from wsss_pipeline.data.masks import MaskFolder, MaskSource
from wsss_pipeline.errors import CheckpointError, ConfigError, EvaluationError, ImageError, MaskError
from wsss_pipeline.evaluation.comparison import Comparison
from wsss_pipeline.evaluation.metrics import check_sizes
from wsss_pipeline.pictures.evaluation_page import comparison_page
from wsss_pipeline.pictures.rows import GROUND_TRUTH
from wsss_pipeline.runtime.device import is_out_of_memory
from wsss_pipeline.runtime.output import check_replaceable, write_file
from wsss_pipeline.runtime.progress import Progress
from wsss_pipeline.segmentation.checkpoint import find_checkpoint
from wsss_pipeline.segmentation.inference import NetworkMasks, Segmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """What came out.

    Attributes:
        comparison: counts of all images that could be compared.
        skipped: image id to reason, for the others.
        left_out: number of images that not all of the masks have.
    """

    comparison: Comparison
    skipped: Mapping[str, str]
    left_out: int

    def lines(self, shown: int = 10) -> list[str]:
        """The table, agreement, the images that differ most and the conclusion, as a person reads them."""
        from rich.cells import cell_len, set_cell_size

        comparison = self.comparison
        heads, rows = comparison.table()
        # a column of numbers is headed by a letter, which may stand for a long path
        letters = [f"[{number}]" for number in range(1, len(heads))]
        first = max(cell_len(name) for name in (heads[0], *(row[0] for row in rows)))
        table = [
            "  ".join([set_cell_size(row[0], first), *(f"{text:>6}" for text in row[1:])])
            for row in ([heads[0], *letters], *rows)
        ]
        legend = [f"{letter} {name}" for letter, name in zip(letters, heads[1:], strict=True)]
        places = dict(zip(comparison.names, letters, strict=True))
        least = list(comparison.agreement_by_class.items())[:shown]
        return [
            *legend,
            f"{len(comparison.different):,} images that all of them have; {self.left_out:,} left out",
            "",
            *table,
            "",
            *(
                f"{places[one]} and {places[other]} agree in {100 * share:.1f} % of the pixels"
                for (one, other), share in comparison.agreement.items()
            ),
            f"least agreement, IoU %: {', '.join(f'{name} {100 * iou:.1f}' for name, iou in least)}",
            "most different images: "
            + ", ".join(
                f"{image_id} ({100 * comparison.different[image_id]:.1f} % of the pixels)"
                for image_id in comparison.most_different[:shown]
            ),
            comparison.conclusion(),
        ]


def open_compared(
    paths: Sequence[Path],
    images: Mapping[str, ImageFile] | None = None,
    class_names: Sequence[str] | None = None,
    device: str = "auto",
    clip: str | None = None,
) -> dict[str, MaskSource]:
    """What lies at each path, by the path: a mask set, a network's masks of the images, or a folder of index masks.

    Args:
        paths: at least two.
        images: image id to file, for networks.
        class_names: the C names without the background, for folders of masks where nothing else knows them.
        device, clip: settings of networks, see ``Segmenter``.

    Raises:
        ConfigError: fewer than two, one of them twice, networks without images, classes that aren't known or differ.
        CacheError, CheckpointError, ImageError, MaskError: one of them can't be opened.
    """
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise ConfigError("compare takes two or more different mask sets, folders of masks or runs")
    found: dict[str, MaskSource | None] = {}
    for path in paths:
        found[str(path)] = None
        if path.is_dir() and list_mask_sets(path):
            found[str(path)] = MaskCache.open(path)
            continue
        try:
            find_checkpoint(path)
        except CheckpointError:
            continue
        if images is None:
            raise ConfigError(f"{path} is a network: give --images, the folder that it is to look at")
        found[str(path)] = NetworkMasks(Segmenter.load(path, device, clip=clip), images)
    known = next((source.class_names for source in found.values() if source is not None), None)
    names = known if class_names is None else tuple(class_names)
    if names is None:
        raise ConfigError("folders of masks don't know their class names; give --classes")
    for name, source in found.items():
        if source is not None and source.class_names != names:
            raise ConfigError(
                f"{name} has other classes ({', '.join(source.class_names):.200}) than the others "
                f"({', '.join(names):.200}); only masks of the same classes, in the same order, can be compared"
            )
    return {
        name: MaskFolder(Path(name), names) if source is None else source for name, source in found.items()
    }


def compare(
    masks: Mapping[str, MaskSource],
    *,
    ground_truth: Path | None = None,
    colors: Mapping[Color, int] | None = None,
    gt_suffix: str | None = None,
    split: Path | None = None,
    report: Path | None = None,
    images: Mapping[str, ImageFile] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Compared:
    """Compares masks on the images that all of them have.

    Args:
        masks: masks by name, see ``open_compared``.
        ground_truth: folder of masks, see ``MaskFolder``; images without one are left out then. For scores alone.
        colors: RGB colour to mask value of ground truth that holds colours.
        gt_suffix: ending of ground-truth names, which image ids don't have.
        split: text file of the image ids to look at; all, without.
        report: HTML file to write; needs ``images``.
        images: image id to file.
        settings: settings of the run, for the report.

    Raises:
        EvaluationError: no image to compare, or ground truth whose values fit no class.
        ConfigError: a report without images.
        ImageError, LabelError: a folder or the split can't be read.
        OutputError: ``report`` can't be written, or is a file that this program didn't write.
    """
    if report is not None:
        if images is None:
            raise ConfigError("a report shows images; give their folder (--images)")
        check_replaceable(report)
    names = next(iter(masks.values())).class_names
    truths = None
    if ground_truth is not None:
        try:
            truths = MaskFolder(ground_truth, names, "ground truth", colors, suffix=gt_suffix)
        except MaskError as error:
            raise EvaluationError(str(error)) from error
    there = _ids(masks.values())
    wanted = there if split is None else read_split(split, dict.fromkeys(there))
    ids = [
        image_id
        for image_id in wanted
        if all(image_id in source for source in masks.values()) and (truths is None or image_id in truths)
    ]
    if not ids:
        raise EvaluationError(
            f"none of the {len(wanted):,} images has masks in all of {', '.join(masks)}"
            + (" and ground truth" if ground_truth is not None else "")
            + "; image ids are paths below a folder without suffix, and must be the same in all"
        )
    comparison = Comparison(list(masks), names)
    skipped: dict[str, str] = {}
    with Progress(len(ids)) as progress:
        for image_id in ids:
            try:
                records = [source[image_id] for source in masks.values()]
                truth = None if truths is None else truths[image_id].mask
                if truth is not None:
                    try:
                        check_sizes(records[0].mask, truth, image_id)
                    except EvaluationError as error:
                        raise MaskError(str(error)) from error
                comparison.add(image_id, records, truth)
            except (ImageError, MaskError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                skipped[image_id] = str(error) or "this machine has too little memory for it"
                logger.warning("%s: left out: %s", image_id, skipped[image_id])
                progress.advance(failed=1)
                continue
            progress.advance()
    if not comparison.different:
        first = next(iter(skipped.values()))
        raise EvaluationError(f"none of the {len(ids):,} images could be compared; the first: {first}")
    if report is not None and images is not None:
        shown = dict(masks)
        if truths is not None:
            shown[GROUND_TRUTH] = truths
        write_file(report, comparison_page(comparison, images, shown, settings or {}))
    return Compared(comparison, skipped, len(wanted) - len(ids))


def _ids(masks: Iterable[MaskSource]) -> list[str]:
    """Of all images that any of the masks has, sorted."""
    found: set[str] = set()
    for source in masks:
        if isinstance(source, NetworkMasks):
            found |= source.images.keys()
        elif isinstance(source, MaskFolder):
            found |= source.files.keys()
        elif isinstance(source, MaskCache):
            found |= set(source)
    return sorted(found)
