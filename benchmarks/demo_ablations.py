"""What each part of stage one is worth, on fresh drawn scenes with the embedded CLIP.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/demo_ablations.py [--scenes 200] [--seeds 3]

Every variant sees the same scenes; mIoU over all scenes of a seed by the rule of ``wsss evaluate``, as mean and
95 % confidence interval over the seeds (Student's t). Scenes are scored as drawn, without JPEG in between.
Needs no GPU: about two minutes for 3 x 200 scenes on two cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from wsss_pipeline.cam.prompts import class_embeddings
from wsss_pipeline.cam.softmax_gradcam import normalise_cams, softmax_gradcam
from wsss_pipeline.clip.image_encoder import DenseFeatures, ImageEncoder
from wsss_pipeline.clip.text_encoder import TextEncoder
from wsss_pipeline.stages.label_pixels import label_pixels

from wsss_pipeline.cam.affinity import refine_cams
from wsss_pipeline.cam.scores import assemble, upscale_cams
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.data.classes import ClassSet, load_class_set
from wsss_pipeline.data.transforms import to_clip_tensor
from wsss_pipeline.demo.scenes import Scene, draw_scene
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.methods import load_mask_config as load_config
from wsss_pipeline.refine import choose_backend

FIRST_SEED = 1000  # far from those of training and of the demo
SYNONYM_CLASSES = ("car", "cup")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, two-sided, by number of seeds
VARIANTS = (
    "GradCAM of the cosine, no softmax",
    "softmax over the classes alone",
    "softmax with background words: CAM",
    "CAM + CRF",
    "CAM + CAA",
    "CAM + CAA + CRF",
    "CAM + CAA + CRF, no synonyms",
    "CAM + CAA of two iterations",
    "CAM + CAA of two iterations + CRF",
)


class StageOne:
    """The parts of stage one, to be left out one by one."""

    def __init__(self) -> None:
        self.config = load_config(flags={"classes": "demo", "clip.weights": "demo"})
        self.classes = load_class_set("demo")
        clip = load_clip(locate_clip(self.config.clip, offline=True), torch.device("cpu"))
        self.scale = clip.logit_scale
        self.encoder = ImageEncoder(clip.vision, "fp32", self.config.cam.affinity_layers)
        text = TextEncoder(clip.text, clip.tokenizer)
        self.embeddings = class_embeddings(self.classes, self.classes.templates, text.encode)
        plain = without_synonyms(self.classes)
        self.plain = class_embeddings(plain, plain.templates, text.encode)
        self.backend = choose_backend("auto")

    def masks(self, scene: Scene) -> dict[str, NDArray[np.uint8]]:
        """A mask (H, W) by variant."""
        features = self.encoder.encode(to_clip_tensor(scene.image)[None])
        present = [self.classes.index(name) for name in scene.labels]
        rows = [value - 1 for value in present]
        background = self.embeddings.background
        foreground, plain = self.embeddings.foreground[rows], self.plain.foreground[rows]
        cams = self.cams(features, torch.cat([foreground, background]), len(rows))
        maps = {
            VARIANTS[0]: normalise_cams(cosine_gradcam(features, foreground)),
            VARIANTS[1]: self.cams(features, foreground, len(rows)),
            VARIANTS[2]: cams,
            VARIANTS[3]: cams,
            VARIANTS[4]: self.refined(cams, features),
            VARIANTS[5]: self.refined(cams, features),
            VARIANTS[6]: self.refined(
                self.cams(features, torch.cat([plain, background]), len(rows)), features
            ),
            VARIANTS[7]: self.refined(cams, features, 2),
            VARIANTS[8]: self.refined(cams, features, 2),
        }
        return {name: self.label(scene, present, found, "CRF" in name) for name, found in maps.items()}

    def cams(self, features: DenseFeatures, texts: Tensor, count: int) -> Tensor:
        raw = softmax_gradcam(
            features.tokens,
            features.pooled,
            features.grid,
            [texts],
            [count],
            self.scale,
            features.mean_token_gradients,
        )
        return normalise_cams(raw[0])

    def refined(self, cams: Tensor, features: DenseFeatures, iterations: int | None = None) -> Tensor:
        cam = self.config.cam
        iterations = iterations or cam.affinity_iterations
        return refine_cams(cams, features.attention[0], cam.threshold, iterations, cam.sinkhorn_rounds)

    def label(self, scene: Scene, present: Sequence[int], cams: Tensor, with_crf: bool) -> NDArray[np.uint8]:
        size = (scene.mask.shape[0], scene.mask.shape[1])
        scores = assemble(upscale_cams(cams, size)).half().numpy()
        crf = self.config.crf.model_copy(update={"backend": self.backend if with_crf else "none"})
        return label_pixels(scene.image, scores, present, size, crf)[0]


def cosine_gradcam(features: DenseFeatures, texts: Tensor) -> Tensor:
    """GradCAM (K, h, w) of each class's cosine by itself, as before softmax-GradCAM."""
    embedding = features.pooled[0]
    unit = F.normalize(embedding, dim=0)
    gradients = (texts - (texts @ unit)[:, None] * unit) / embedding.norm()
    weights = features.mean_token_gradients(0, gradients)
    return (weights @ features.tokens[0, 1:].T).view(-1, *features.grid)


def without_synonyms(classes: ClassSet) -> ClassSet:
    entries = tuple(entry.model_copy(update={"synonyms": ()}) for entry in classes.classes)
    return classes.model_copy(update={"classes": entries})


def measure(stage: StageOne, seed: int, scenes: int) -> dict[str, Scores]:
    names = ("background", *stage.classes.names)
    matrices = {name: np.zeros((len(names), len(names) + 1), np.int64) for name in VARIANTS}
    for index in range(scenes):
        scene = draw_scene((seed, index))
        for name, mask in stage.masks(scene).items():
            matrices[name] += confusion_matrix(mask, scene.mask, len(names))
    return {name: Scores.from_matrix(matrix, names) for name, matrix in matrices.items()}


def interval(values: Sequence[float]) -> str:
    """Mean and half width of the 95 % confidence interval, in percent."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=200, help="per seed")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3, 4, 5), help="how many")
    options = parser.parse_args()
    stage = StageOne()
    runs = [measure(stage, FIRST_SEED + seed, options.scenes) for seed in range(options.seeds)]
    print(f"{options.seeds} x {options.scenes} scenes, CRF backend {stage.backend}\n")
    print(f"| {'variant':34} | mIoU %      | {' and '.join(SYNONYM_CLASSES)} IoU % |")
    print(f"| {'-' * 34} | ----------- | ----------------- |")
    for name in VARIANTS:
        synonyms = [
            statistics.fmean(run[name].per_class_iou[entry] or 0.0 for entry in SYNONYM_CLASSES)
            for run in runs
        ]
        print(f"| {name:34} | {interval([run[name].miou for run in runs]):11} | {interval(synonyms):17} |")


if __name__ == "__main__":
    main()
