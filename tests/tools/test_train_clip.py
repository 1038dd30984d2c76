"""Training in miniature: it learns, it is repeatable, and what it writes is a CLIP like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from tools.demo_clip.clip_model import embed_images
from tools.demo_clip.train_clip import TrainingPlan, train
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig

PLAN = TrainingPlan(steps=20, batch=16, scenes=64, seed=3, learning_rate=2e-3, warm_up=2, width=64, layers=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("clip")
    return folder, train(folder, PLAN, CPU, workers=0)


def test_twenty_steps_decrease_the_loss(trained: tuple[Path, list[float]]) -> None:
    _, losses = trained
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1


def test_transformers_loads_the_folder(trained: tuple[Path, list[float]]) -> None:
    folder, _ = trained
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(["a photo of a ball.", "a house on grass"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=torch.zeros(1, 3, 96, 96), **ids).logits_per_image
    assert logits.shape == (1, 2)
    assert torch.isfinite(logits).all()


def test_the_package_loads_the_folder(trained: tuple[Path, list[float]]) -> None:
    clip = load_clip(locate_clip(ClipConfig(weights=str(trained[0])), offline=True), CPU)
    rows = TextEncoder(clip.text, clip.tokenizer).encode(["a ball", "a clean origami zebra."])
    assert rows.shape == (2, 96)
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_weights_are_kept_in_half_precision(trained: tuple[Path, list[float]]) -> None:
    weights = trained[0] / "model.safetensors"
    parameters = CLIPModel.from_pretrained(trained[0]).num_parameters()
    assert 2 * parameters < weights.stat().st_size < 2.2 * parameters + 20_000


def test_embeddings_are_those_of_transformers(trained: tuple[Path, list[float]]) -> None:
    """At the size of the position table, where nothing is stretched."""
    model = CLIPModel.from_pretrained(trained[0], dtype=torch.float32).eval()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = embed_images(model, images)
        output = model.vision_model(images)
        expected = model.visual_projection(output.pooler_output)
        patches = model.visual_projection(model.vision_model.post_layernorm(output.last_hidden_state[:, 1:]))
    normalise = torch.nn.functional.normalize
    assert torch.allclose(found.whole, normalise(expected, dim=1), atol=1e-5)
    assert torch.allclose(found.pooled, normalise(patches.mean(dim=1), dim=1), atol=1e-5)
    assert found.patches.shape == (2, 144, 96)


def test_the_same_plan_gives_the_same_losses(tmp_path: Path) -> None:
    short = replace(PLAN, steps=3)
    first = train(tmp_path / "a", short, CPU, workers=0)
    assert train(tmp_path / "b", short, CPU, workers=1) == pytest.approx(first, rel=1e-3)
    assert train(tmp_path / "c", replace(short, seed=4), CPU, workers=0) != pytest.approx(first, rel=1e-3)
