"""The result of an evaluation, with everything a reader needs to compare the number with another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.evaluation.metrics import Scores
from wsss_pipeline.runtime.output import MARK, printable

RULE = (
    "one confusion matrix over all images, 255 in the ground truth left out, "
    "mean over the classes that occur in the ground truth"
)
VOC_TRAIN_IMAGES = 1_464
VOC_TRAIN_AUG_IMAGES = range(10_000, 11_000)  # 10,582; copies of the list differ by a few ids


@dataclass(frozen=True)
class Variant:
    """One way of making the masks.

    Attributes:
        scores: figures, see ``Scores``.
        crf: backend and image of the dense CRF (``backend``, ``image``), and what refined the masks besides or
            ``instead``; None where not known.
    """

    scores: Scores
    crf: Mapping[str, str] | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores together with what they were measured on.

    Attributes:
        variants: masks by name, the most refined last: those of a network; masks that lie there have one, named "".
        class_names: names of mask values 1..C.
        source: text that says what was scored, such as ``mask set cache/voc12-1a2b3c4d5e6f``.
        ground_truth: folder of the ground truth.
        split: name of the split, or "all" where every ground-truth file with a prediction counts.
        min_confidence: predictions below it counted as misses; None scores every pixel.
        image_miou: id of each scored image to the last variant's mIoU over the image's own classes, in [0, 1];
            None where its ground truth is 255 everywhere.
        matrix: int64 (1+C, 2+C), the last variant's ``confusion_matrix`` over all images.
        missing: ids of the split (or ground truth) without a prediction, left out.
        skipped: image id -> reason, for images that could not be read or don't fit; left out.
    """

    variants: Mapping[str, Variant]
    class_names: tuple[str, ...]
    source: str
    ground_truth: str
    split: str
    min_confidence: float | None
    image_miou: Mapping[str, float | None]
    matrix: NDArray[np.int64]
    missing: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def scores(self) -> Scores:
        """Those of the last variant."""
        return list(self.variants.values())[-1].scores

    @property
    def images(self) -> int:
        """Number of images that were scored."""
        return len(self.image_miou)

    @property
    def id_digest(self) -> str:
        """``id_digest`` of the scored ids: two evaluations with the same digest are comparable."""
        return id_digest(self.image_miou)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Remarks without which the numbers mislead."""
        remarks = []
        if self.images in VOC_TRAIN_AUG_IMAGES and self.class_names == load_class_set("voc12").names:
            remarks.append(
                f"split {self.split} has {self.images:,} images: published figures use train "
                f"({VOC_TRAIN_IMAGES:,} images) and can't be compared with train_aug"
            )
        if self.scores.ignored_predictions > 0:
            remarks.append(
                f"{100 * self.scores.ignored_predictions:.2f} % of the scored pixels have no label and count as "
                "misses: published figures score masks without 255"
            )
        return tuple(remarks)

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``, the last variant's scores at the top level, as fractions of 1.

        Of a network, all of its variants are under ``variants``, and ``variant`` names the last one. ``program``
        comes first: by it a file of these values is known as this program's own.
        """
        shared = {
            "images": self.images,
            "split": self.split,
            "id_digest": self.id_digest,
            "ground_truth": self.ground_truth,
            "min_confidence": self.min_confidence,
            "missing": list(self.missing),
            "skipped": dict(self.skipped),
            "warnings": list(self.warnings),
            "rule": RULE,
        }
        variants = {
            name: {**asdict(variant.scores), "scored": self._scored(name), "crf": variant.crf, **shared}
            for name, variant in self.variants.items()
        }
        last = list(variants)[-1]
        return {
            "program": MARK,
            **variants[last],
            **({"variant": last, "variants": variants} if last else {}),
        }

    def as_text(self) -> str:
        """Table of per-class IoU in percent, a column a variant, the means, then what was measured on what."""
        from rich.cells import cell_len, set_cell_size

        scores, variants = self.scores, [variant.scores for variant in self.variants.values()]
        is_network = "" not in self.variants
        corner, heads = "class", [" IoU %"]
        if is_network:
            corner, heads = "IoU %", [f"{name:>8}" for name in self.variants]
        rows = [
            (printable(name), [one.per_class_iou[name] for one in variants]) for name in scores.per_class_iou
        ]
        if is_network:
            rows.append(("mIoU", [one.miou for one in variants]))
        first = max(cell_len(name) for name in (corner, *(name for name, _ in rows)))
        table = [(corner, heads), ("-" * first, ["-" * len(head) for head in heads])]
        table += [(name, ["-" if iou is None else f"{100 * iou:.2f}" for iou in ious]) for name, ious in rows]
        lines = [
            "  ".join([set_cell_size(name, first), *map(str.rjust, texts, map(len, heads))])
            for name, texts in table
        ]
        if None in scores.per_class_iou.values():
            lines.append("(-: not in the ground truth, in no mean)")
        if not is_network:
            lines += [
                "",
                f"mIoU {100 * scores.miou:.2f} %   pixel accuracy {100 * scores.pixel_accuracy:.2f} %   "
                f"mean accuracy {100 * scores.mean_accuracy:.2f} %   "
                f"frequency-weighted IoU {100 * scores.frequency_weighted_iou:.2f} %",
            ]
            if abs(scores.miou - scores.miou_predicted_or_present) >= 5e-7:
                lines.append(
                    f"mIoU {100 * scores.miou_predicted_or_present:.2f} % when classes that are predicted but "
                    "absent from the ground truth count as 0"
                )
            if scores.ignored_predictions > 0:
                share = f"{100 * scores.ignored_predictions:.2f} %"
                lines.append(f"{share} of the pixels have no label; they count as misses")
        return "\n".join(map(printable, [*lines, "", *self.origin_lines()]))

    def _scored(self, name: str) -> str:
        return f"{self.source} ({name})" if name else self.source

    def origin_lines(self) -> list[str]:
        """What was measured on what, a line each."""
        name, variant = list(self.variants.items())[-1]
        crf = "not known"
        if variant.crf is not None:
            crf = ", ".join(f"{key} {value}" for key, value in variant.crf.items())
        confidence = "none" if self.min_confidence is None else f"{self.min_confidence:g}"
        lines = [
            f"split {self.split}, {self.images:,} images (ids {self.id_digest}), min confidence {confidence}",
            f"masks: {self._scored(name)} (CRF: {crf})",
            f"ground truth: {self.ground_truth}",
            f"rule: {RULE}",
        ]
        if self.missing:
            lines.append(f"left out, no prediction: {len(self.missing):,} (the first is '{self.missing[0]}')")
        if self.skipped:
            lines.append(f"left out, could not be scored: {len(self.skipped):,}")
            lines += [f"  {image_id}: {reason}" for image_id, reason in self.skipped.items()]
        return lines


def id_digest(image_ids: Iterable[str]) -> str:
    """First 12 hex digits of the SHA-256 of the sorted ids, each followed by a line feed."""
    text = "".join(f"{image_id}\n" for image_id in sorted(image_ids))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
