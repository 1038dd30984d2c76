"""What an evaluation found, with everything a reader needs to compare the number with another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from wsss_pipeline.evaluation.metrics import Scores

RULE = (
    "one confusion matrix over all images, 255 in the ground truth left out, "
    "mean over the classes that occur in the ground truth"
)


@dataclass(frozen=True)
class EvaluationResult:
    """Scores together with what they were measured on.

    Attributes:
        scores: see ``Scores``.
        images: number of images that were scored.
        split: name of the split, or "all" where every ground-truth file with a prediction counts.
        id_digest: ``id_digest`` of the scored ids: two results with the same digest are comparable.
        ground_truth: folder of the ground truth.
        scored: what was scored, such as ``cache voc-1a2b3c4d5e6f``.
        crf: backend and image of the dense CRF (``backend``, ``image``), or None where not known.
        min_confidence: predictions below it counted as misses; None scores every pixel.
        missing: ids of the split (or ground truth) without a prediction, left out.
        skipped: image id -> reason, for images that could not be read or don't fit; left out.
        warnings: remarks without which the numbers mislead.
    """

    scores: Scores
    images: int
    split: str
    id_digest: str
    ground_truth: str
    scored: str
    crf: dict[str, str] | None
    min_confidence: float | None
    missing: tuple[str, ...]
    skipped: dict[str, str]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``; the scores lie at the top level, as fractions of 1."""
        values = asdict(self)
        return {**values.pop("scores"), **values, "missing": list(self.missing), "rule": RULE}

    def as_text(self) -> str:
        """Table of per-class IoU in percent, the summary, then what was measured on what."""
        return "\n".join([*self._class_lines(), "", *self._summary_lines(), "", *self.origin_lines()])

    def _class_lines(self) -> list[str]:
        from rich.cells import cell_len

        width = max(cell_len(name) for name in ("class", *self.scores.per_class_iou))

        def line(name: str, value: str) -> str:
            return f"{name}{' ' * (width - cell_len(name))}  {value:>6}"

        rows = [line("class", "IoU %"), f"{'-' * width}  ------"]
        for name, iou in self.scores.per_class_iou.items():
            rows.append(line(name, "-" if iou is None else f"{100 * iou:.2f}"))
        if None in self.scores.per_class_iou.values():
            rows.append("(-: not in the ground truth, in no mean)")
        return rows

    def _summary_lines(self) -> list[str]:
        scores = self.scores
        lines = [
            f"mIoU {100 * scores.miou:.2f} %   pixel accuracy {100 * scores.pixel_accuracy:.2f} %   "
            f"mean accuracy {100 * scores.mean_accuracy:.2f} %   "
            f"frequency-weighted IoU {100 * scores.frequency_weighted_iou:.2f} %"
        ]
        if abs(scores.miou - scores.miou_predicted_or_present) >= 5e-7:
            lines.append(
                f"mIoU {100 * scores.miou_predicted_or_present:.2f} % when classes that are predicted but "
                "absent from the ground truth count as 0"
            )
        if scores.ignored_predictions > 0:
            lines.append(
                f"{100 * scores.ignored_predictions:.2f} % of the pixels have no label; they count as misses"
            )
        return lines

    def origin_lines(self) -> list[str]:
        """What was measured on what, a line each."""
        crf = (
            "not known"
            if self.crf is None
            else ", ".join(f"{key} {value}" for key, value in self.crf.items())
        )
        confidence = "none" if self.min_confidence is None else f"{self.min_confidence:g}"
        lines = [
            f"split {self.split}, {self.images:,} images (ids {self.id_digest}), min confidence {confidence}",
            f"masks: {self.scored} (CRF: {crf})",
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
