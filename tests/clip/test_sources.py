"""What a user hears who names a CLIP that isn't there, or isn't one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.errors import WeightsError


def refusal(weights: object, tokenizer: str | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        locate_clip(ClipConfig(weights=str(weights), tokenizer=tokenizer), offline=True)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("weights", "meant"),
    [
        ("ViT-B/16", "openai/clip-vit-base-patch16"),
        ("ViT-B/32", "openai/clip-vit-base-patch32"),
        ("ViT-L-14.pt", "openai/clip-vit-large-patch14"),
        ("/nowhere/ViT-L-14-336px.pt", "openai/clip-vit-large-patch14-336"),
        ("openai/clip-vit-base-patch-16", "openai/clip-vit-base-patch16"),
    ],
)
def test_what_was_probably_meant_on_the_hub(weights: str, meant: str, no_hub: None) -> None:
    assert refusal(weights).endswith(f"did you mean {meant}?")


def test_what_was_probably_meant_here(tmp_path: Path) -> None:
    (tmp_path / "tiny-clip").mkdir()
    assert refusal(tmp_path / "tiny-clp").endswith(f"did you mean {tmp_path / 'tiny-clip'}?")
    assert "did you mean" not in refusal(tmp_path / "something else")


def test_a_right_name_gets_no_hint(no_hub: None) -> None:
    message = refusal("openai/clip-vit-base-patch16")
    assert "`hf download openai/clip-vit-base-patch16`" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("text", ["", " ", "~nobody-of-this-name/clip", "x" * 5000])
def test_texts_that_are_no_path(tmp_path: Path, text: str) -> None:
    assert refusal(text).startswith("--clip ")
    assert len(refusal(text)) < 250
    source = write_tiny_clip(tmp_path / "clip")
    if text:
        assert refusal(source, tokenizer=text).startswith("--tokenizer ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "siglip"},
            "vision and text tower: a SigLIP has no class token",
        ),
        ({"vision_config": 5}, "not a whole CLIP"),
        ({"text_config": None}, "not a whole CLIP"),
    ],
)
def test_other_models_are_told_from_clip(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write_tiny_clip(tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert message in refusal(folder)


def test_a_vision_tower_alone_is_not_enough() -> None:
    message = refusal(Path(__file__).parent.parent / "golden" / "vision")
    assert "not a whole CLIP with vision and text tower" in message
