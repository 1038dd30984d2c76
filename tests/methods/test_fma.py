"""FMA-WSSS's maps against the published code's own numbers; what a user sees of prompts that don't fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModelWithProjection

from benchmarks.plain_fma import PlainFma
from wsss_pipeline.cam.affinity import box_masks
from wsss_pipeline.cam.scores import min_max
from wsss_pipeline.clip.learned_prompts import LearnedPrompts, text_tower_digest
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import ClassEmbeddings
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import prepare_image
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.methods import fma as module
from wsss_pipeline.methods import load_mask_config
from wsss_pipeline.pseudo_masks.generator import MaskGenerator

GOLDEN = Path(__file__).parent.parent / "golden"
LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
VOC = load_class_set("voc12")
# what the golden files call the results of each preset
SETTINGS = {
    "voc12-coarse": "refined_voc_cls",
    "voc12": "refined_voc_seg",
    "coco14-coarse": "refined_coco_cls",
    "coco14": "cam_raw",
}
needs_large = pytest.mark.skipif(
    not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden photographs"
)


def maps(clip: Clip, preset: str, image: np.ndarray, ids: np.ndarray, prompts: str = "") -> torch.Tensor:
    config = load_mask_config(f"fma/{preset}", flags={"classes": "voc12", "prompts": prompts})
    method = module.Fma(config, clip, VOC, "fp32")  # type: ignore[arg-type]
    with torch.no_grad():
        pixels = method.prepare(image).pixels[None]
        (found,) = method.scores(pixels, [[int(value) + 1 for value in ids]])
    return found


def difference(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Relative to the largest value."""
    assert actual.shape == expected.shape
    return float(np.abs(actual.numpy() - expected).max() / (np.abs(expected).max() or 1))


@pytest.mark.parametrize("name", ["astronaut", "cat", "motorcycle", "tiny_odd"])
def test_maps_are_those_of_the_published_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with np.load(GOLDEN / "fma" / "visual_cams.npz") as file:
        rows = F.normalize(torch.from_numpy(file["text_rows"]), dim=1)
        stored = {key.removeprefix(f"{name}_"): file[key] for key in file.files if key.startswith(name)}
    vision = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "vision", dtype=torch.float32)
    clip = Clip(vision.requires_grad_(False).eval(), None, None, float(torch.tensor(4.60546875).exp()))
    monkeypatch.setattr(module, "class_rows", lambda *_: ClassEmbeddings(rows[:20], rows[20:]))
    image = read_image(GOLDEN / "images" / f"{name}.png")
    raw = maps(clip, "coco14", image, stored["label_ids"])
    score = min_max(F.relu(raw))
    assert difference(score, stored["score"]) < 5e-5
    for preset, key in SETTINGS.items():
        assert difference(maps(clip, preset, image, stored["label_ids"]), stored[key]) < 5e-5, key
    plain = PlainFma(vision, rows[:20], rows[20:], clip.logit_scale)
    pixels = prepare_image(image, 16, 1 << 20).pixels[None]
    found = np.stack(plain.refined_cams(pixels, stored["label_ids"].tolist()))
    assert difference(torch.from_numpy(found), stored["refined_voc_seg"]) < 5e-5
    for key, threshold in (("voc_cls", 0.4), ("voc_seg", 0.5), ("coco_cls", 0.6)):
        assert np.array_equal(box_masks(score, threshold).numpy(), stored[f"box_mask_{key}"])


def large_clip() -> Clip:
    files = locate_clip(ClipConfig(weights=str(LARGE / "clip_es" / "model")), offline=True)
    return load_clip(files, torch.device("cpu"))


def kept(clip: Clip, context: np.ndarray, layout: Any, background: tuple[str, ...], folder: Path) -> str:
    texts = tuple(entry.texts() for entry in VOC.classes)
    prompts = LearnedPrompts(
        torch.from_numpy(context).float(), layout, VOC.names, texts, background, text_tower_digest(clip)
    )
    prompts.save(folder / "prompts.safetensors")
    return str(folder / "prompts.safetensors")


@needs_large
@pytest.mark.parametrize("task", ["cls", "seg", "untrained"])
def test_learned_prompts_give_the_published_maps(task: str, tmp_path: Path) -> None:
    clip, free = large_clip(), ("",) * 25
    if task == "untrained":
        with np.load(LARGE / "fma" / "untrained.npz") as file:
            stored = dict(file)
        pictures = ["astronaut", "chelsea", "coffee", "rocket"]
        prompts = kept(clip, stored["ctx"], "front", free, tmp_path)
    else:
        with np.load(LARGE / "fma" / "text.npz") as file:
            context = file[f"ctx_{task}"]
        pictures = sorted(path.stem for path in (LARGE / "fma" / "cams").glob("*.npz"))
        layout, words = ("end", VOC.background) if task == "cls" else ("front", free)
        prompts = kept(clip, context, layout, words, tmp_path)
    for picture in pictures:
        if task == "untrained":
            expected = {key.removeprefix(f"{picture}_"): value for key, value in stored.items()}
        else:
            with np.load(LARGE / "fma" / "cams" / f"{picture}.npz") as file:
                expected = {key.removeprefix(f"{task}_"): file[key] for key in file.files}
        image = read_image(next((LARGE / "clip_es" / "images").glob(f"{picture}.*")))
        for preset, key in SETTINGS.items():
            if key in expected:
                found = maps(clip, preset, image, expected["label_ids"], prompts)
                assert difference(found, expected[key]) < 5e-5, f"{picture} {key}"


def test_a_tie_goes_to_the_first_in_the_class_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"clip.weights": "demo", "clip.precision": "fp32", "refine": "none"}

    def largest(method: str, labels: list[str]) -> int:
        made = MaskGenerator("demo", method=method, settings=settings, device="cpu", offline=True)
        monkeypatch.setattr(made.method, "scores", lambda batch, present: [torch.ones(2, 2, 2).cumsum(2)])
        mask = made(np.zeros((16, 16, 3), np.uint8), labels).mask
        return int(mask[0, -1])

    first, second = load_class_set("demo").names[:2]
    assert largest("fma", [second, first]) == largest("fma", [first, second]) == 1
    assert (largest("clip-es", [second, first]), largest("clip-es", [first, second])) == (2, 1)


def test_a_method_without_prompts_refuses_them() -> None:
    with pytest.raises(
        ConfigError, match="method excel has no setting 'prompts'; give --method clip-es or fma or"
    ):
        load_mask_config(flags={"method": "excel", "prompts": "prompts.safetensors"})


def test_prompts_of_other_classes_are_refused_before_clip_is_loaded(tmp_path: Path) -> None:
    texts = tuple(entry.texts() for entry in VOC.classes)
    file = tmp_path / "prompts.safetensors"
    LearnedPrompts(torch.zeros(4, 8), "end", VOC.names, texts, VOC.background, "0" * 64).save(file)
    settings = {"clip.weights": "demo", "prompts": str(file)}
    made = MaskGenerator("demo", method="fma", settings=settings, device="cpu", offline=True)
    with pytest.raises(ConfigError, match="learned for other classes, aeroplane, bicycle"):
        _ = made.mask_set
    assert any("prompts: learned" in line for line in made.lines())
    assert not any(line.startswith("templates") for line in made.lines())
