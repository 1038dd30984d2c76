"""Loading CLIP: three kinds of source, equal features, nothing in a file is run."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.openai_clip import openai_state_dict, write_torchscript
from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder
from wsss_pipeline.clip.trunk import Trunk
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.errors import ConfigError, WeightsError

PROMPTS = [
    "a photo of a cat",
    "grass",
    "a clean origami dog.",
    "the sky over the water and a good small tree",
]


# what a file of tensors alone doesn't tell
OPENAI: dict[str, Any] = {"activation": "quick_gelu", "head_width": 64, "text_head_width": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "hf", layers=3, width=128)


def features(weights: Path, tokenizer: Path | None = None) -> tuple[Tensor, Tensor, Tensor, float]:
    stated = OPENAI if weights.suffix == ".pt" else {}
    config = ClipConfig(
        weights=str(weights), tokenizer=None if tokenizer is None else str(tokenizer), **stated
    )
    clip = load_clip(locate_clip(config, offline=True), torch.device("cpu"))
    images = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = Trunk(clip.vision).encode(images)
    text = TextEncoder(clip.text, clip.tokenizer).encode(PROMPTS)
    return (
        torch.cat([dense.last[0].tokens, dense.last[0].output]),
        dense.attention,
        text,
        clip.logit_scale,
    )


@pytest.mark.parametrize("kind", ["torchscript", "state dict", "nested state dict", "torch bin"])
def test_all_sources_give_the_same_features(folder: Path, tmp_path: Path, kind: str) -> None:
    tensors = openai_state_dict(folder)
    source = tmp_path / "ViT.pt"
    if kind == "torchscript":
        write_torchscript(tensors, source)
    elif kind == "state dict":
        torch.save(tensors, source)
    elif kind == "nested state dict":
        torch.save(
            {"state_dict": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 3}, source
        )
    else:
        source = tmp_path / "bin"
        shutil.copytree(folder, source)
        (source / "model.safetensors").unlink()
        torch.save(load_file(folder / "model.safetensors"), source / "pytorch_model.bin")
    expected = features(folder)
    actual = features(source, tokenizer=None if kind == "torch bin" else folder)
    for ours, theirs in zip(actual[:3], expected[:3], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
    assert actual[3] == pytest.approx(expected[3])


def test_half_precision_archives_are_read_as_float32(folder: Path, tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in openai_state_dict(folder).items()}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    first = features(write_torchscript(half, tmp_path / "half.pt"), folder)
    second = features(write_torchscript(rounded, tmp_path / "full.pt"), folder)
    assert first[0].dtype == torch.float32
    assert torch.equal(first[0], second[0])


def test_a_vocabulary_beside_the_archive_is_found(folder: Path, tmp_path: Path) -> None:
    source = write_torchscript(openai_state_dict(folder), tmp_path / "ViT.pt")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path / name)
    assert torch.allclose(features(source)[2], features(folder)[2], atol=1e-5)


def test_an_archive_without_a_vocabulary_says_what_to_give(
    folder: Path, tmp_path: Path, no_hub: None
) -> None:
    source = write_torchscript(openai_state_dict(folder), tmp_path / "ViT.pt")
    with pytest.raises(WeightsError, match="--tokenizer") as caught:
        locate_clip(ClipConfig(weights=str(source)), offline=True)
    assert "\n" not in str(caught.value)


def located_and_loaded(source: Path, tokenizer: Path) -> None:
    config = ClipConfig(weights=str(source), tokenizer=str(tokenizer), **OPENAI)
    load_clip(locate_clip(config, offline=True), torch.device("cpu"))


class Harmful:
    """Unpickling it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> object:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("kind", ["torchscript", "plain pickle", "zip"])
def test_code_in_a_file_does_not_run(folder: Path, tmp_path: Path, kind: str) -> None:
    witness, source = tmp_path / "witness", tmp_path / "ViT.pt"
    content = {"weight": torch.zeros(1), "harm": Harmful(witness)}
    if kind == "plain pickle":
        source.write_bytes(pickle.dumps(content))
    elif kind == "zip":
        torch.save(content, source)
    else:
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("ViT/data.pkl", pickle.dumps(Harmful(witness)))
            archive.writestr("ViT/constants.pkl", b"")
    with pytest.raises(WeightsError, match=r"ViT\.pt"):
        located_and_loaded(source, folder)
    assert not witness.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, 0.99])
def test_damaged_archives_give_one_line(folder: Path, tmp_path: Path, keep: float) -> None:
    whole = write_torchscript(openai_state_dict(folder), tmp_path / "whole.pt").read_bytes()
    source = tmp_path / "cut.pt"
    source.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(WeightsError) as caught:
        located_and_loaded(source, folder)
    assert "\n" not in str(caught.value)
    assert "cut.pt" in str(caught.value)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path, folder: Path) -> None:
    source = write_torchscript(openai_state_dict(folder), tmp_path / "ViT.pt")
    short = tmp_path / "short.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(short, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-4] if name.endswith("data/0") else content)
    files = locate_clip(ClipConfig(weights=str(short), tokenizer=str(folder)), offline=True)
    with pytest.raises(WeightsError, match="damaged"):
        load_clip(files, torch.device("cpu"))


def test_an_archive_that_would_unpack_to_far_more_than_its_size_is_refused(
    tmp_path: Path, folder: Path
) -> None:
    whole, bomb = write_torchscript(openai_state_dict(folder), tmp_path / "ViT.pt"), tmp_path / "bomb.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2**26) if name.endswith("data/0") else old.read(name))
    assert bomb.stat().st_size < 2**23
    files = locate_clip(ClipConfig(weights=str(bomb), tokenizer=str(folder)), offline=True)
    with pytest.raises(WeightsError, match="far more than its size"):
        load_clip(files, torch.device("cpu"))


def test_a_resnet_is_refused(tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "RN50.pt"
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, source)
    with pytest.raises(WeightsError, match="ResNet CLIP"):
        located_and_loaded(source, folder)


def test_weights_with_a_tensor_missing_are_refused(tmp_path: Path, folder: Path) -> None:
    tensors = openai_state_dict(folder)
    del tensors["visual.ln_post.bias"]
    source = tmp_path / "ViT.pt"
    torch.save(tensors, source)
    with pytest.raises(WeightsError, match="post_layernorm"):
        located_and_loaded(source, folder)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nobody/no-such-clip", "isn't in the hub's cache"),
        ("./no-such-folder", "don't exist"),
        ("no-such-file.pt", "don't exist"),
    ],
)
def test_missing_weights_offline(weights: str, message: str, no_hub: None) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        locate_clip(ClipConfig(weights=weights), offline=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"no config\.json"),
        ("{", "can't be read"),
        ("[]", "no configuration"),
        ('{"model_type": "bert"}', "type bert, not a whole CLIP"),
    ],
)
def test_folders_that_hold_no_clip(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(WeightsError, match=message):
        locate_clip(ClipConfig(weights=str(tmp_path)), offline=True)


def test_the_hubs_own_cache_is_used_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tmp_path / "models--someone--clip" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    reference.write_text(commit)
    snapshot = tmp_path / "models--someone--clip" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    from huggingface_hub import _snapshot_download

    monkeypatch.setattr(_snapshot_download.constants, "HF_HUB_CACHE", str(tmp_path))
    files = locate_clip(ClipConfig(weights="someone/clip"), offline=True)
    assert files.digest() == locate_clip(ClipConfig(weights=str(folder)), offline=True).digest()


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_hub_repository_is_fetched_in_one_form_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    repository, local = tmp_path / "repository", tmp_path / "local"
    shutil.copytree(folder, repository)
    torch.save(load_file(folder / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "tf_model.h5").write_bytes(b"not wanted")
    if form == "bin":
        (repository / "model.safetensors").unlink()

    def snapshot_download(repo_id: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert (repo_id, local_files_only) == ("someone/clip", False)
        local.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in repository.glob(pattern):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    files = locate_clip(ClipConfig(weights="someone/clip"))
    assert [path.name for path in files.weights] == [
        "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    ]
    assert not (local / "tf_model.h5").exists()
    assert (local / "pytorch_model.bin").exists() == (form == "bin")
    assert load_clip(files, torch.device("cpu")).logit_scale == pytest.approx(100, rel=1e-3)


def test_digest_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)

    def digest() -> str:
        return locate_clip(ClipConfig(weights=str(copy)), offline=True).digest()

    original = locate_clip(ClipConfig(weights=str(folder)), offline=True).digest()
    assert digest() == original
    config = json.loads((copy / "config.json").read_text())
    config["transformers_version"] = "0"
    (copy / "config.json").write_text(json.dumps(config))
    assert digest() == original
    config["vision_config"]["num_attention_heads"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    assert digest() != original
    shutil.copy(folder / "config.json", copy / "config.json")
    with (copy / "merges.txt").open("a") as file:
        file.write("x y\n")
    assert digest() != original


class TestTextEncoder:
    """Rows of prompts."""

    def test_rows_are_units_and_do_not_depend_on_their_neighbours(self, folder: Path) -> None:
        clip = load_clip(locate_clip(ClipConfig(weights=str(folder)), offline=True), torch.device("cpu"))
        encoder = TextEncoder(clip.text, clip.tokenizer)
        together = encoder.encode(PROMPTS)
        alone = torch.cat([encoder.encode([prompt]) for prompt in PROMPTS])
        assert torch.allclose(together, alone, atol=1e-6)
        assert torch.allclose(encoder.encode(PROMPTS, batch_size=3), together, atol=1e-6)
        assert torch.allclose(together.norm(dim=1), torch.ones(len(PROMPTS)))
        assert (together[0] - together[1]).abs().max() > 1e-2

    def test_no_prompts_give_no_rows(self, folder: Path) -> None:
        clip = load_clip(locate_clip(ClipConfig(weights=str(folder)), offline=True), torch.device("cpu"))
        assert TextEncoder(clip.text, clip.tokenizer).encode([]).shape == (0, 32)

    def test_a_prompt_that_is_too_long_is_named(self, folder: Path) -> None:
        clip = load_clip(locate_clip(ClipConfig(weights=str(folder)), offline=True), torch.device("cpu"))
        with pytest.raises(ConfigError, match="CLIP reads 77; shorten it"):
            TextEncoder(clip.text, clip.tokenizer).encode(["a cat", "xyz " * 50])
