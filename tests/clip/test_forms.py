"""CLIP in all the forms that people have it in: the same weights give the same maps, or one line says why not."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, MetaClip2Config, MetaClip2Model

from tests.openai_clip import openai_state_dict, write_torchscript
from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import ClipFiles, locate_clip
from wsss_pipeline.clip.text import TextEncoder
from wsss_pipeline.clip.weights import load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.transforms import PixelStatistics, prepare_image
from wsss_pipeline.errors import CheckpointError, WeightsError
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.segmentation.checkpoint import check_frozen, load_frozen_clip, load_network, save_network
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import FrozenClipConfig, NetworkConfig, WeakClipConfig

IMAGE = np.random.default_rng(4).integers(0, 256, (40, 56, 3)).astype(np.uint8)
VOCABULARY = ("vocab.json", "merges.txt")
# the model's true form: image tower 4 heads of 32, text tower 2 of 64, GELU
STATED = {"clip.activation": "gelu", "clip.head_width": 32, "clip.text_head_width": 64}
MODEL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "width": 128, "heads": 2, "layers": 2},
}
OPEN_CLIP = {
    "model_cfg": MODEL,
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
Write = Callable[[Path], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers has it."""
    path = write_tiny_clip(tmp_path_factory.mktemp("clip") / "hf", layers=3, width=128)
    values = json.loads((path / "config.json").read_text())
    for tower, heads in (("vision_config", 4), ("text_config", 2)):
        values[tower] |= {"num_attention_heads": heads, "hidden_act": "gelu"}
    (path / "config.json").write_text(json.dumps(values))
    return path


def cams(weights: Path, tokenizer: Path | None = None, method: str = "clip-es", **settings: Any) -> Tensor:
    """Class activation maps of the image, float32 (2, h, w)."""
    generator = made(weights, tokenizer, method, **settings)
    pixels = generator.method.prepare(IMAGE).pixels
    return generator.method.scores(pixels[None], [[1, 2]])[0]


def made(
    weights: Path, tokenizer: Path | None = None, method: str = "clip-es", **settings: Any
) -> MaskGenerator:
    given = {"clip.precision": "fp32", "refine": "none", "clip.tokenizer": tokenizer and str(tokenizer)}
    return MaskGenerator(
        ["cat", "dog"],
        clip=str(weights),
        method=method,
        settings=given | settings,
        device="cpu",
        offline=True,
    )


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return cams(folder)


def beside(target: Path, source: Path, **files: Mapping[str, Any]) -> None:
    """The vocabulary, and JSON files, in a folder."""
    target.mkdir(exist_ok=True)
    for name in VOCABULARY:
        shutil.copy(source / name, target)
    for name, values in files.items():
        (target / f"{name}.json").write_text(json.dumps(values))


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def custom_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As OpenCLIP names them with ``custom_text``."""
    return {
        name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": value
        for name, value in tensors.items()
    }


def write(kind: str, folder: Path, target: Path) -> tuple[Path, dict[str, Any]]:
    """The model in another form: what ``--clip`` names, and settings that it needs."""
    openai, own = openai_state_dict(folder), load_file(folder / "model.safetensors")
    needed: dict[str, Any] = {}
    file = target / "model.pt"
    beside(target, folder)
    if kind.endswith("config beside"):
        beside(target, folder, open_clip_config=MODEL if kind.startswith("bare") else OPEN_CLIP)
    if kind.endswith("stated"):
        needed = STATED
    if kind == "OpenCLIP folder":
        beside(target, folder, open_clip_config=OPEN_CLIP)
        save_file(openai, target / "open_clip_model.safetensors")
        return target, {}
    if kind == "OpenCLIP folder, older":
        beside(target, folder, open_clip_config=OPEN_CLIP)
        torch.save(openai, target / "open_clip_pytorch_model.bin")
        return target, {}
    if kind == "OpenCLIP folder of timm":
        beside(
            target, folder, open_clip_config=OPEN_CLIP, config={"architecture": "vit_base_patch16_clip_224"}
        )
        save_file({"blocks.0.norm1.weight": torch.zeros(3)}, target / "model.safetensors")
        save_file(openai, target / "open_clip_model.safetensors")
        return target, {}
    if kind == "OpenCLIP folder, text of its own":
        model = {**MODEL, "custom_text": True}
        beside(target, folder, open_clip_config={**OPEN_CLIP, "model_cfg": model})
        save_file(custom_text(openai), target / "open_clip_model.safetensors")
        return target, {}
    if kind == "Hugging Face and OpenCLIP in one":
        shutil.copytree(folder, target, dirs_exist_ok=True)
        beside(target, folder, open_clip_config=OPEN_CLIP)
        torch.save(openai, target / "open_clip_pytorch_model.bin")
        return target, {}
    if kind == "one file of a Hugging Face folder":
        shutil.copytree(folder, target, dirs_exist_ok=True)
        return target / "model.safetensors", {}
    if "training" in kind:
        content = {"epoch": 3, "name": "run", "state_dict": with_prefix(openai, "module."), "optimizer": {}}
        torch.save(content, file, _use_new_zipfile_serialization="old" not in kind)
    elif "safetensors of OpenAI" in kind:
        file = target / "model.safetensors"
        save_file(openai, file)
    elif "safetensors of Hugging Face" in kind:
        file = target / "weights.safetensors"
        save_file({**own, "vision_model.embeddings.position_ids": torch.arange(17)}, file)
    elif "prefix" in kind:
        torch.save({"model": with_prefix(own, "clip.model.")}, file)
    elif kind.startswith("TorchScript"):
        write_torchscript(openai, file)
    return file, needed


@pytest.mark.parametrize(
    "kind",
    [
        "OpenCLIP folder",
        "OpenCLIP folder, older",
        "OpenCLIP folder of timm",
        "OpenCLIP folder, text of its own",
        "Hugging Face and OpenCLIP in one",
        "one file of a Hugging Face folder",
        "training, config beside",
        "training, stated",
        "training, old pickle, stated",
        "bare training, config beside",
        "safetensors of OpenAI's names, config beside",
        "safetensors of Hugging Face's names, config beside",
        "safetensors of Hugging Face's names, stated",
        "prefix, stated",
        "TorchScript, stated",
    ],
)
def test_all_forms_of_a_model_give_the_same_maps(
    folder: Path, expected: Tensor, tmp_path: Path, kind: str
) -> None:
    weights, settings = write(kind, folder, tmp_path / "model")
    assert (cams(weights, **settings) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"clip.activation": "quick_gelu"}, 1e-3),
        ({"clip.head_width": 64}, 1e-2),
        ({"clip.text_head_width": 32}, 1e-3),
    ],
)
def test_another_form_gives_other_maps(
    folder: Path, expected: Tensor, tmp_path: Path, change: dict[str, Any], least: float
) -> None:
    """Stated for tensors alone, and stated in place of what a configuration says: the same maps."""
    weights, settings = write("training, stated", folder, tmp_path / "model")
    found = cams(weights, **{**settings, **change})
    assert (found - expected).abs().max() > least
    assert (cams(folder, **change) - found).abs().max() <= 1e-5
    assert made(folder, **change).mask_set.fingerprint != made(folder).mask_set.fingerprint


@pytest.mark.parametrize(
    "kind", ["training", "safetensors of OpenAI's names", "safetensors of Hugging Face's names"]
)
def test_tensors_alone_are_never_taken_for_openais(folder: Path, tmp_path: Path, kind: str) -> None:
    weights, _ = write(kind, folder, tmp_path / "model")
    message = refused(weights)
    assert "put its config.json or open_clip_config.json beside it" in message
    assert "clip.activation, clip.head_width, clip.text_head_width (OpenAI's: quick_gelu, 64, 64)" in message
    assert "or state clip.text_head_width (" in refused(weights, activation="gelu", head_width=32)


def refused(weights: Path, tokenizer: Path | None = None, **stated: Any) -> str:
    """The one line that a user hears."""
    config = ClipConfig(weights=str(weights), tokenizer=tokenizer and str(tokenizer), **stated)
    with pytest.raises(WeightsError) as caught:
        load_clip(locate_clip(config, offline=True), torch.device("cpu"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def located(weights: Path, **stated: Any) -> ClipFiles:
    return locate_clip(ClipConfig(weights=str(weights), **stated), offline=True)


def test_a_metaclip_2_is_a_clip_of_many_languages(tmp_path: Path) -> None:
    """Features are those of transformers; its text ends with token 2."""
    folder = tmp_path / "metaclip"
    words = ["▁a", "▁photo", "▁of", "▁cat", "▁dog", "▁猫", "▁", *"abcdefghijklmnopqrstuvwxyz."]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(piece, -float(place)) for place, piece in enumerate([*special, *words])]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    backend.add_special_tokens(special)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "vocab_size": len(pieces)}
    config = MetaClip2Config(
        text_config={**tower, **ids, "projection_dim": 32},
        vision_config={**tower, "patch_size": 16, "image_size": 64, "projection_dim": 32},
        projection_dim=32,
    )
    torch.manual_seed(0)
    model = MetaClip2Model(config).eval()
    model.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "XLMRobertaTokenizer", **names})
    )
    clip = load_clip(located(folder), torch.device("cpu"))
    texts = ["a photo of a cat", "猫", "dog."]
    found = TextEncoder(clip.text, clip.tokenizer).encode(texts)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=image, **tokens)
        assert torch.allclose(found, outputs.text_embeds, atol=1e-5)
        seen = torch.nn.functional.normalize(clip.vision(image).image_embeds, dim=1)
        assert torch.allclose(seen, outputs.image_embeds, atol=1e-5)
    assert cams(folder).isfinite().all()
    as_clip = json.loads((folder / "config.json").read_text()) | {"model_type": "clip"}
    digest = located(folder).digest()
    (folder / "config.json").write_text(json.dumps(as_clip))
    assert located(folder).digest() != digest


def test_what_settings_leave_open_files_say(folder: Path, tmp_path: Path) -> None:
    weights, _ = write("training, config beside", folder, tmp_path / "model")
    files = located(weights, activation="quick_gelu")
    assert files.form == (("quick_gelu", "quick_gelu"), (32, 64))
    assert files.form_origin == "clip.activation, open_clip_config.json"


def test_the_digest_of_openais_form_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    """Of weights, vocabulary and nothing else; another form is part of it."""
    weights, _ = write("TorchScript", folder, tmp_path / "model")

    def sha(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    content = {
        "weights": [sha(weights)],
        "architecture": None,
        "vocabulary": {name: sha(folder / name) for name in VOCABULARY},
    }
    before = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert located(weights).digest() == before
    assert located(weights, activation="quick_gelu", head_width=64).digest() == before
    others = [{"activation": "gelu"}, {"head_width": 32}, {"text_head_width": 32}]
    assert len({before, *(located(weights, **other).digest() for other in others)}) == 4


NOT_A_CLIP: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "LongCLIP": (
        lambda tensors: {**tensors, "positional_embedding_res": tensors["positional_embedding"]},
        "LongCLIP, with two position tables",
    ),
    "LoRA": (
        lambda tensors: {**tensors, "visual.transformer.resblocks.0.attn.lora_A.weight": torch.zeros(2, 4)},
        "LoRA adapters; merge them",
    ),
    "adapter": (
        lambda tensors: {**tensors, "visual.transformer.resblocks.0.adapter.weight": torch.zeros(2, 4)},
        "1 tensors that a CLIP doesn't have, such as visual.transformer.resblocks.0.adapter.weight",
    ),
    "layer scale": (
        lambda tensors: {**tensors, "visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(4)},
        "leaving them out would change the model",
    ),
    "ResNet": (
        lambda tensors: {**tensors, "visual.layer1.0.conv1.weight": torch.zeros(1)},
        "is a ResNet CLIP",
    ),
    "EVA": (
        lambda tensors: {"visual.blocks.0.attn.q_proj.weight": torch.zeros(1)},
        "image tower of EVA",
    ),
    "timm": (lambda tensors: {"visual.trunk.blocks.0.norm1.weight": torch.zeros(1)}, "image tower of timm"),
    "SigLIP": (
        lambda tensors: {"vision_model.head.probe": torch.zeros(1)},
        "is a SigLIP, which has no class token",
    ),
    "image tower alone": (
        lambda tensors: {name: value for name, value in tensors.items() if name.startswith("visual.")},
        "no logit_scale; it isn't a whole CLIP",
    ),
    "no text": (
        lambda tensors: {
            name: value for name, value in tensors.items() if name.startswith(("visual.", "logit_scale"))
        },
        "isn't a whole CLIP model: it has no tensor",
    ),
    "text under text.": (custom_text, "text tower under 'text.'"),
    "two models": (
        lambda tensors: {**with_prefix(tensors, "model."), **with_prefix(tensors, "ema.")},
        "holds 2 image towers, under 'ema.', 'model.'",
    ),
    "no class token": (
        lambda tensors: {**tensors, "visual.positional_embedding": torch.zeros(16, 128)},
        "no square of patches and a class token",
    ),
    "a classifier": (lambda tensors: {"fc.weight": torch.zeros(1)}, "isn't a CLIP with a vision transformer"),
    "a flat tensor": (
        lambda tensors: {**tensors, "visual.proj": torch.zeros(3)},
        "a tensor has the wrong shape",
    ),
    "logit_scale": (
        lambda tensors: {**tensors, "logit_scale": torch.zeros(7)},
        "logit_scale isn't one number",
    ),
}


@pytest.mark.parametrize("kind", NOT_A_CLIP)
def test_what_is_no_plain_clip_is_named(folder: Path, tmp_path: Path, kind: str) -> None:
    change, message = NOT_A_CLIP[kind]
    torch.save(change(openai_state_dict(folder)), tmp_path / "model.pt")
    stated = {"activation": "gelu", "head_width": 32, "text_head_width": 64}
    found = refused(tmp_path / "model.pt", folder, **stated)
    assert message in found
    assert len(found) < 400


def test_a_head_beside_a_clip_is_left_out_and_said(
    folder: Path, expected: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {**with_prefix(openai_state_dict(folder), "clip."), "classifier.weight": torch.zeros(3)}
    torch.save(tensors, tmp_path / "model.pt")
    caplog.set_level(logging.WARNING)
    assert (cams(tmp_path / "model.pt", folder, **STATED) - expected).abs().max() <= 1e-5
    assert "1 tensors are no part of a CLIP and are left out, such as classifier.weight" in caplog.text


def test_heads_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    weights, _ = write("training", folder, tmp_path / "model")
    message = refused(weights, activation="gelu", head_width=80, text_head_width=64)
    assert "heads 80 wide don't fit into the vision tower, 128 wide" in message


def test_a_layer_that_the_configuration_does_not_know_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "config.json").read_text())
    values["vision_config"]["num_hidden_layers"] = 2
    (copy / "config.json").write_text(json.dumps(values))
    assert "16 tensors more than its configuration says" in refused(copy)


@pytest.mark.parametrize("case", ["pointer", "activation", "part"])
def test_a_folder_that_is_not_whole_says_what_to_mend(folder: Path, tmp_path: Path, case: str) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    if case == "pointer":
        (copy / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        )
        assert "a pointer of Git LFS in place of the weights; fetch them with git lfs pull" in refused(copy)
    elif case == "activation":
        values = json.loads((copy / "config.json").read_text())
        values["vision_config"]["hidden_act"] = "swishy"
        (copy / "config.json").write_text(json.dumps(values))
        assert "'swishy' is no activation" in refused(copy)
    else:
        (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
        assert "1 of the 2 parts of the weights are there" in refused(copy)


def test_an_adapter_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter; merge it" in refused(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224"}, "its image tower is one of timm"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "is a ResNet CLIP"),
        ("vision_cfg", {"attentional_pool": True}, "pools by attention"),
        ("vision_cfg", {"pool_type": "avg"}, "pools otherwise"),
        ("vision_cfg", {"no_ln_pre": True}, "has no_ln_pre: True"),
        ("vision_cfg", {"head_width": "80"}, "vision_cfg.head_width is '80'"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "another language model"),
        ("text_cfg", {"no_causal_mask": True}, "no causal mask"),
        ("text_cfg", {"hf_tokenizer_name": "bert-base-uncased"}, "vocabulary is another"),
        ("text_cfg", {"heads": 3}, "3 heads don't fit"),
        ("multimodal_cfg", {"width": 128}, "CoCa"),
    ],
)
def test_an_openclip_of_another_kind_is_named(
    folder: Path, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    weights, _ = write("OpenCLIP folder", folder, tmp_path / "model")
    model = {**MODEL, part: {**MODEL.get(part, {}), **change}}
    beside(weights, folder, open_clip_config={"model_cfg": model})
    assert message in refused(weights)


def test_configurations_that_contradict_each_other(folder: Path, expected: Tensor, tmp_path: Path) -> None:
    weights, _ = write("Hugging Face and OpenCLIP in one", folder, tmp_path / "model")
    beside(weights, folder, open_clip_config={"model_cfg": {**MODEL, "quick_gelu": True}})
    assert "config.json says gelu, open_clip_config.json quick_gelu; state the right one" in refused(weights)
    found = cams(weights, **{"clip.activation": "gelu"})
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_openclip_repository_is_fetched_in_one_form_only(
    folder: Path, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """One of timm's, which holds an image tower's weights as well."""
    repository, _ = write("OpenCLIP folder of timm", folder, tmp_path / "repository")
    local = tmp_path / "local"
    torch.save(openai_state_dict(folder), repository / "open_clip_pytorch_model.bin")
    beside(repository, folder, preprocessor_config=HALF)
    if form == "bin":
        (repository / "open_clip_model.safetensors").unlink()

    def snapshot_download(repo_id: str, allow_patterns: list[str], local_files_only: bool) -> str:
        local.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in repository.glob(pattern):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    files = locate_clip(ClipConfig(weights="someone/open-clip"))
    name = "open_clip_model.safetensors" if form == "safetensors" else "open_clip_pytorch_model.bin"
    assert [path.name for path in files.weights] == [name]
    assert not (local / "model.safetensors").exists()
    assert (local / "open_clip_pytorch_model.bin").exists() == (form == "bin")
    assert (local / "preprocessor_config.json").exists()
    assert (cams(Path("someone/open-clip")) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vision_cfg", {"width": 768}),
        ("vision_cfg", {"layers": 12}),
        ("vision_cfg", {"patch_size": 32}),
        ("text_cfg", {"width": 512, "heads": 8}),
        ("text_cfg", {"layers": 12}),
    ],
)
@pytest.mark.parametrize("kind", ["OpenCLIP folder", "training, config beside"])
def test_an_openclip_configuration_of_another_model(
    folder: Path, tmp_path: Path, part: str, change: dict[str, Any], kind: str
) -> None:
    weights, _ = write(kind, folder, tmp_path / "model")
    model = {**MODEL, part: {**MODEL[part], **change}}
    beside(tmp_path / "model", folder, open_clip_config={"model_cfg": model})
    message = refused(weights)
    assert f"{part}.{next(iter(change))} {next(iter(change.values()))}" in message
    assert "belong to different models" in message


def test_one_part_of_a_model_asks_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert f"give its folder, {tmp_path}" in refused(tmp_path / "model-00001-of-00002.safetensors")


def test_an_archive_of_another_size_than_openais_is_told_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And what lies beside it says nothing of it."""
    weights, stated = write("TorchScript, stated", folder, tmp_path / "model")
    beside(tmp_path / "model", folder, open_clip_config=OPEN_CLIP, preprocessor_config=HALF)
    assert located(weights).own_statistics is None
    cams(weights)
    assert "not of a size that OpenAI published" in caplog.text
    caplog.clear()
    cams(weights, **stated)
    assert not caplog.text


def test_openclip_configurations_that_hold_nothing(folder: Path, tmp_path: Path) -> None:
    weights, _ = write("OpenCLIP folder", folder, tmp_path / "model")
    beside(weights, folder, open_clip_config={"model_cfg": 3})
    assert "no vision_cfg and text_cfg" in refused(weights)
    (weights / "open_clip_model.safetensors").unlink()
    assert "no open_clip_model.safetensors in" in refused(weights)


HALF = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
OWN = PixelStatistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class TestPixelStatistics:
    """Mean and standard deviation of the pixels that a model was trained with."""

    @pytest.mark.parametrize(
        ("file", "values"),
        [
            ("preprocessor_config", HALF),
            ("processor_config", {"image_processor": HALF}),
            ("preprocessor_config", {"do_rescale": False, "image_mean": 127.5, "image_std": 63.75}),
            (
                "open_clip_config",
                {"model_cfg": MODEL, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}},
            ),
        ],
    )
    def test_they_are_the_models_own(
        self, folder: Path, tmp_path: Path, file: str, values: dict[str, Any]
    ) -> None:
        copy = tmp_path / "clip"
        shutil.copytree(folder, copy)
        beside(copy, folder, **{file: values})
        files = located(copy)
        assert files.own_statistics == OWN
        assert files.statistics_origin == f"{file}.json"
        assert files.digest() == located(folder).digest(), "they stand beside it"
        assert files.determinants == {"clip": files.digest(), "pixels": [[0.5] * 3, [0.25] * 3]}

    @pytest.mark.parametrize(
        ("method", "settings"),
        [
            ("clip-es", {}),
            ("fma", {"vote.regions": "slic"}),
            ("weclip", {}),
            ("excel", {"excel.size": "native"}),
            ("excel", {"excel.side": 48}),
        ],
    )
    def test_every_method_prepares_images_with_them(
        self, folder: Path, tmp_path: Path, method: str, settings: dict[str, Any]
    ) -> None:
        copy = tmp_path / "clip"
        shutil.copytree(folder, copy)
        beside(copy, folder, preprocessor_config=HALF)
        image = np.full((32, 48, 3), 255, np.uint8)
        before = made(folder, None, method, **settings).method.prepare(image).pixels
        own = made(copy, None, method, **settings).method.prepare(image).pixels
        assert torch.allclose(own, torch.full_like(own, 2.0))
        assert (before - own).abs().min() > 0.05
        if method == "clip-es":
            expected = prepare_image(IMAGE, 16, 10**6, OWN).pixels
            assert torch.equal(made(copy).method.prepare(IMAGE).pixels, expected)

    def test_openais_change_nothing(self, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "clip"
        shutil.copytree(folder, copy)
        said = OPEN_CLIP["preprocess_cfg"]
        beside(copy, folder, preprocessor_config={"image_mean": said["mean"], "image_std": said["std"]})
        assert located(copy).own_statistics is None
        assert made(copy).mask_set.determinants == made(folder).mask_set.determinants

    def test_files_that_contradict_each_other(
        self, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        copy = tmp_path / "clip"
        shutil.copytree(folder, copy)
        beside(copy, folder, preprocessor_config=HALF, open_clip_config=OPEN_CLIP)
        assert located(copy).own_statistics is None
        assert "open_clip_config.json and preprocessor_config.json have other pixel statistics" in caplog.text

    @pytest.mark.parametrize(
        "values", [{"image_mean": [0.5]}, {"image_mean": [0.5] * 3, "image_std": [0, 1, 1]}]
    )
    def test_what_is_no_statistics_is_refused(
        self, folder: Path, tmp_path: Path, values: dict[str, Any]
    ) -> None:
        copy = tmp_path / "clip"
        shutil.copytree(folder, copy)
        beside(copy, folder, preprocessor_config=values)
        assert "preprocessor_config.json has no mean and standard deviation of three" in refused(copy)

    def test_statistics_of_values_to_255_are_refused(self, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "clip"
        shutil.copytree(folder, copy)
        values = {"image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]}
        beside(copy, folder, preprocessor_config=values)
        assert "aren't of values from 0 to 1; divide them by 255" in refused(copy)
        beside(copy, folder, preprocessor_config={"do_rescale": False, **values})
        assert located(copy).own_statistics is not None

    @pytest.mark.parametrize("name", ["frozen-clip", "weakclip"])
    def test_a_network_has_them_and_keeps_them(self, folder: Path, tmp_path: Path, name: str) -> None:
        copy = tmp_path / "clip"
        shutil.copytree(folder, copy)
        beside(copy, folder, preprocessor_config=HALF)
        config = NetworkConfig.model_validate(
            {
                "name": name,
                "encoder": str(copy),
                "frozen": FrozenClipConfig(width=16, heads=2, depth=1, first_block=0, last_block=1),
                "weakclip": WeakClipConfig(width=16, heads=2, channels=8),
            }
        )
        clip = load_clip(located(copy), torch.device("cpu"))
        network = build_network(config, 3, class_names=["cat", "dog"], clip=clip)
        assert (network.image_mean, network.image_std) == tuple(OWN)
        save_network(network, tmp_path / "last", config, ["cat", "dog"])
        # another preprocessor's file is no other CLIP: the network keeps what it was trained with
        plain = load_clip(located(folder), torch.device("cpu"))
        loaded = load_network(tmp_path / "last", clip=plain).network
        assert (loaded.image_mean, loaded.image_std) == tuple(OWN)
        with pytest.raises(CheckpointError, match=r"trained on pixels of mean \(0\.5, 0\.5, 0\.5\)"):
            check_frozen(build_network(config, 3, class_names=["cat", "dog"], clip=plain), tmp_path / "last")  # type: ignore[arg-type]
        if name == "frozen-clip":
            with pytest.raises(CheckpointError, match=r"weclip has \(0\.485, 0\.456, 0\.406\) for this CLIP"):
                load_frozen_clip(tmp_path / "last", plain, "fp32", ("cat", "dog"), "weclip", {})
