"""Configurations and vocabularies as they are found in the wild."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.openai_clip import openai_state_dict, write_torchscript
from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.errors import WeightsError

PROMPTS = ["a photo of a cat", "the sofa", "sky and water"]
Variant = Callable[[Callable[[dict[str, Any]], None]], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "hf")


@pytest.fixture
def variant(folder: Path, tmp_path: Path) -> Variant:
    """A function that copies the CLIP and lets its argument change the configuration."""

    def make(change: Callable[[dict[str, Any]], None]) -> Path:
        copy = tmp_path / "variant"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        change(config)
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return make


def load(weights: Path, tokenizer: Path | None = None) -> Clip:
    config = ClipConfig(weights=str(weights), tokenizer=None if tokenizer is None else str(tokenizer))
    return load_clip(locate_clip(config, offline=True), torch.device("cpu"))


def rows(clip: Clip) -> torch.Tensor:
    return TextEncoder(clip.text, clip.tokenizer).encode(PROMPTS)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_towers_are_float32_whatever_the_configuration_says(
    variant: Variant, folder: Path, key: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        for part in (config, config["vision_config"], config["text_config"]):
            part.pop("dtype", None)
            part[key] = "float16"

    clip = load(variant(change))
    state = clip.vision.state_dict() | clip.text.state_dict()
    source = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source[name])
    assert not any(tensor.requires_grad for tensor in [*clip.vision.parameters(), *clip.text.parameters()])
    assert not clip.vision.training
    assert not clip.text.training


def test_towers_with_the_wrong_width_of_the_projection(variant: Variant, folder: Path) -> None:
    """As converted OpenCLIP models have it: right for the whole, the library's default for the towers."""

    def change(config: dict[str, Any]) -> None:
        config["vision_config"]["projection_dim"] = config["text_config"]["projection_dim"] = 512

    assert torch.equal(rows(load(variant(change))), rows(load(folder)))


@pytest.mark.parametrize("end", [2, None])
def test_older_configurations_with_another_end_of_text(
    variant: Variant, folder: Path, end: int | None
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"]["eos_token_id"] = end
        if end is None:
            del config["text_config"]["eos_token_id"]

    assert torch.equal(rows(load(variant(change))), rows(load(folder)))


def test_a_vocabulary_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    vocabulary = json.loads((other / "vocab.json").read_text())
    shifted = {token: place + 5 for token, place in vocabulary.items()}
    (other / "vocab.json").write_text(json.dumps({f"filler{n}": n for n in range(5)} | shifted))
    archive = write_torchscript(openai_state_dict(folder), tmp_path / "ViT.pt")
    for weights in (folder, archive):
        with pytest.raises(WeightsError, match="give the model's own with --tokenizer"):
            load(weights, other)
    # the other way round every text would end nowhere, and all rows be equal
    with pytest.raises(WeightsError, match="give the model's own with --tokenizer"):
        load(write_tiny_clip_with(other, tmp_path / "larger"), folder)


def write_tiny_clip_with(vocabulary: Path, target: Path) -> Path:
    """A tiny CLIP whose text tower knows five tokens more."""
    shutil.copytree(vocabulary, target)
    tensors = load_file(target / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(5, tensors[name].shape[1])])
    (target / "model.safetensors").unlink()
    torch.save(tensors, target / "pytorch_model.bin")
    config = json.loads((target / "config.json").read_text())
    size = len(tensors[name])
    config["text_config"] |= {"vocab_size": size, "eos_token_id": size - 1}
    (target / "config.json").write_text(json.dumps(config))
    assert rows(load(target)).shape == (len(PROMPTS), 32)
    return target


def test_weights_of_another_shape_are_named(variant: Variant) -> None:
    def change(config: dict[str, Any]) -> None:
        config["vision_config"]["patch_size"] = 8

    with pytest.raises(WeightsError, match=r"has shape \(.*\) instead of \(.*\); weights and configuration"):
        load(variant(change))


def test_a_damaged_safetensors_file_is_named(variant: Variant) -> None:
    copy = variant(lambda config: None)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"model\.safetensors can't be read .*fetch it again") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_an_old_weights_file_with_code_in_it_is_refused(variant: Variant) -> None:
    copy = variant(lambda config: None)
    (copy / "model.safetensors").unlink()
    torch.save({"logit_scale": torch.zeros(()), "harm": Path("a")}, copy / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin can't be read") as caught:
        load(copy)
    assert "do those steps" not in str(caught.value)


def test_tokenizer_json_alone_will_do(folder: Path, variant: Variant) -> None:
    copy = variant(lambda config: None)
    clip = load(folder)
    clip.tokenizer.save_pretrained(copy)
    for name in ("vocab.json", "merges.txt"):
        (copy / name).unlink(missing_ok=True)
    assert (copy / "tokenizer.json").is_file()
    assert torch.equal(rows(load(copy)), rows(clip))


def test_a_loaded_clip_does_not_follow_its_file(variant: Variant) -> None:
    copy = variant(lambda config: None)
    clip = load(copy)
    before = rows(clip)
    with (copy / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 8)
        file.write(bytes(size - size // 8))
    assert torch.equal(rows(clip), before)


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == bars
