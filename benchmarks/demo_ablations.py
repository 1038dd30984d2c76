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

from wsss_pipeline.cam.affinity import refine_cams
from wsss_pipeline.cam.gradcam import softmax_gradcam
from wsss_pipeline.cam.scores import assemble, normalise_cams, upscale_cams
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder, class_embeddings
from wsss_pipeline.clip.trunk import Features, Trunk
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.data.classes import ClassSet, load_class_set
from wsss_pipeline.data.transforms import prepare_image
from wsss_pipeline.demo.scenes import Scene, draw_scene
from wsss_pipeline.evaluation.metrics import Scores, confusion_matrix
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.methods.clip_es import ClipEsConfig
from wsss_pipeline.refine import DenseCrf, Unrefined, label

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
        config = load_mask_config(flags={"classes": "demo", "clip.weights": "demo"})
        assert isinstance(config, ClipEsConfig)
        self.config = config
        self.classes = load_class_set("demo")
        clip = load_clip(locate_clip(self.config.clip, offline=True), torch.device("cpu"))
        self.scale = clip.logit_scale
        self.trunk = Trunk(clip.vision)
        text = TextEncoder(clip.text, clip.tokenizer)
        self.embeddings = class_embeddings(self.classes, self.classes.templates, text.encode)
        plain = without_synonyms(self.classes)
        self.plain = class_embeddings(plain, plain.templates, text.encode)
        self.crf, self.unrefined = DenseCrf(config.crf), Unrefined()

    @torch.no_grad()
    def masks(self, scene: Scene) -> dict[str, NDArray[np.uint8]]:
        """A mask (H, W) by variant."""
        pixels = prepare_image(scene.image, self.trunk.patch_size, self.config.max_pixels).pixels
        features = self.trunk.encode(pixels[None], last_layers=self.config.cam.affinity_layers)
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

    def cams(self, features: Features, texts: Tensor, count: int) -> Tensor:
        return normalise_cams(softmax_gradcam(features, [texts], [count], self.scale)[0])

    def refined(self, cams: Tensor, features: Features, iterations: int | None = None) -> Tensor:
        cam = self.config.cam
        iterations = iterations or cam.affinity_iterations
        return refine_cams(cams, features.attention[0], cam.threshold, iterations, cam.sinkhorn_rounds)

    def label(self, scene: Scene, present: Sequence[int], cams: Tensor, with_crf: bool) -> NDArray[np.uint8]:
        size = (scene.mask.shape[0], scene.mask.shape[1])
        refine = self.crf if with_crf else self.unrefined
        (posterior,) = refine([scene.image], [assemble(upscale_cams(cams, size)).half()])
        return label(posterior, present, size)[0].numpy()


def cosine_gradcam(features: Features, texts: Tensor) -> Tensor:
    """GradCAM (K, h, w) of each class's cosine by itself, as before softmax-GradCAM."""
    embedding = features.last[0].pooled
    unit = F.normalize(embedding, dim=0)
    gradients = (texts - (texts @ unit)[:, None] * unit) / embedding.norm()
    weights = features.last[0].mean_token_gradients(gradients)
    return (weights @ features.last[0].tokens[1:].T).view(-1, *features.grid)


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
    print(f"{options.seeds} x {options.scenes} scenes, {stage.crf.description}\n")
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
