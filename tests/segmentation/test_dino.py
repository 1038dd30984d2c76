"""DINOv2 from files that may be anybody's, and a network on it and CLIP."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.data.transforms import IMAGENET_STATISTICS, PixelStatistics, normalise
from wsss_pipeline.errors import CheckpointError, WeightsError
from wsss_pipeline.segmentation.checkpoint import load_network, save_network
from wsss_pipeline.segmentation.dino import load_dino
from wsss_pipeline.segmentation.frozen_clip import FrozenClip
from wsss_pipeline.segmentation.inference import InferenceConfig, Segmenter
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import FrozenClipConfig, NetworkConfig, load_train_config
from wsss_pipeline.stages.train_seg import TrainJob, train_seg

NAMES = ("cat", "dog")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
KINDS = ["Dinov2", "Dinov2WithRegisters"]


def write_dino(folder: Path, kind: str = "Dinov2", seed: int = 0, **sizes: Any) -> Path:
    """A random one as transformers writes it."""
    import transformers as library

    transformers: Any = library
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dino(tmp_path / "dino")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip(locate_clip(ClipConfig(weights="demo"), offline=True), torch.device("cpu"))


def config(folder: Path, **frozen: Any) -> NetworkConfig:
    own = FrozenClipConfig(first_block=-2, width=32, heads=4, depth=1, dino=str(folder), **frozen)
    return NetworkConfig(name="frozen-clip", encoder="demo", weights="none", frozen=own)


def make(folder: Path, clip: Clip, **frozen: Any) -> FrozenClip:
    torch.manual_seed(0)
    network = build_network(config(folder, **frozen), 3, clip=clip)
    assert isinstance(network, FrozenClip)
    return network.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swiglu", [False, True])
def test_its_patches_are_those_of_transformers(tmp_path: Path, kind: str, swiglu: bool) -> None:
    import transformers as library

    transformers: Any = library
    folder = write_dino(tmp_path / "dino", kind, use_swiglu_ffn=swiglu)
    dino = load_dino(str(folder), offline=True)
    own = getattr(transformers, f"{kind}Model").from_pretrained(folder, dtype=torch.float32).eval()
    images = torch.randn(2, 3, 28, 70)
    with torch.no_grad():
        assert torch.equal(dino.model(images).last_hidden_state, own(images).last_hidden_state)
    assert not dino.model.training
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in dino.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_sees_the_patches_and_nothing_else(tmp_path: Path, clip: Clip, kind: str) -> None:
    """The class token and the registers, which lie before them, are no patches."""
    network = make(write_dino(tmp_path / "dino", kind), clip)
    dino = network.frozen.dino
    assert dino is not None
    images = torch.randn(1, 3, 96, 64)
    maps = network.encode(images).dino
    assert maps is not None
    assert maps.shape == (1, 32, 6, 4)
    scaled = torch.nn.functional.interpolate(images, (84, 56), mode="bilinear")
    with torch.no_grad():
        tokens = dino.model(scaled).last_hidden_state
    others = 1 if kind == "Dinov2" else 5
    assert tokens.shape[1] == others + 24
    assert torch.allclose(maps[0].flatten(1).T, tokens[0, others:], atol=1e-6)


def test_it_gets_its_own_pixels_where_clip_has_others(folder: Path, clip: Clip) -> None:
    own = PixelStatistics((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    maps = []
    for statistics in (None, own):
        network = make(folder, replace(clip, own_statistics=statistics))
        maps.append(network.encode(normalise(image, statistics or IMAGENET_STATISTICS)[None]).dino)
    assert maps[0] is not None
    assert maps[1] is not None
    assert torch.allclose(maps[0], maps[1], atol=1e-5)


def test_half_precision_files_and_parts_and_pickles_are_read(folder: Path, tmp_path: Path) -> None:
    expected = load_dino(str(folder), offline=True)
    state = load_file(folder / "model.safetensors")
    for name in ("half", "parts", "pickle"):
        other = tmp_path / name
        other.mkdir()
        shutil.copy(folder / "config.json", other)
        if name == "half":
            save_file({key: value.half() for key, value in state.items()}, other / "model.safetensors")
        elif name == "parts":
            for part in range(2):
                own = dict(list(state.items())[part::2])
                save_file(own, other / f"model-0000{part + 1}-of-00002.safetensors")
        else:
            torch.save(state, other / "pytorch_model.bin")
        found = load_dino(str(other), offline=True)
        tolerance = 1e-3 if name == "half" else 0.0
        for one, two in zip(found.model.parameters(), expected.model.parameters(), strict=True):
            assert one.dtype == torch.float32
            assert float((one - two).abs().max()) <= tolerance


def test_its_digest_is_of_weights_and_architecture_alone(folder: Path, tmp_path: Path) -> None:
    digest = load_dino(str(folder), offline=True).digest
    other = shutil.copytree(folder, tmp_path / "elsewhere")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "transformers_version": "0", "x": 1}))
    assert load_dino(str(other), offline=True).digest == digest
    (other / "config.json").write_text(json.dumps({**values, "layer_norm_eps": 1e-5}))
    assert load_dino(str(other), offline=True).digest != digest
    assert load_dino(str(write_dino(tmp_path / "another", seed=1)), offline=True).digest != digest


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._path,)


def changed(folder: Path, **values: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))


def without(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": _Touch(folder / "run")}, folder / "pytorch_model.bin")


def other_shape(folder: Path) -> None:
    changed(folder, hidden_size=64)


def all_too_large(folder: Path) -> None:
    """Weights of just the sizes that the configuration has, all of them holes in the file."""
    import transformers as library

    transformers: Any = library
    changed(folder, hidden_size=8192, num_hidden_layers=4, mlp_ratio=16)
    values = {**SIZES, "hidden_size": 8192, "num_hidden_layers": 4, "mlp_ratio": 16}
    with torch.device("meta"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(**values))
    header, end = {}, 0
    for name, value in model.state_dict().items():
        header[name] = {
            "dtype": "F16",
            "shape": list(value.shape),
            "data_offsets": [end, end + 2 * value.numel()],
        }
        end += 2 * value.numel()
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def sparse(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**43)  # takes no disk


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json in"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds no configuration"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in"),
    "a CLIP": (lambda folder: changed(folder, model_type="clip"), "is of type clip, not one of dinov2,"),
    "no type": (lambda folder: changed(folder, model_type=None), "is of type None"),
    "a list of types": (lambda folder: changed(folder, model_type=["dinov2"]), "is of type"),
    "too wide": (lambda folder: changed(folder, hidden_size=10**9), "1000000000 for hidden_size"),
    "too deep": (lambda folder: changed(folder, num_hidden_layers=10**9), "for num_hidden_layers"),
    "too fine": (lambda folder: changed(folder, image_size=10**9), "for image_size"),
    "no heads": (lambda folder: changed(folder, num_attention_heads=0), "0 for num_attention_heads"),
    "text": (lambda folder: changed(folder, patch_size="14"), "'14' for patch_size"),
    "true": (lambda folder: changed(folder, mlp_ratio=True), "True for mlp_ratio"),
    "large all in all": (all_too_large, "none has so many"),
    "no patch": (lambda folder: changed(folder, image_size=8), "patch_size beyond its image_size"),
    "odd heads": (lambda folder: changed(folder, num_attention_heads=3), "can't be loaded|different models"),
    "unknown activation": (lambda folder: changed(folder, hidden_act="x"), "can't be loaded"),
    "a tensor missing": (
        lambda folder: without(folder, "layernorm.weight"),
        "lacks 1 tensors, such as layernorm.weight; it isn't a whole DINOv2 model",
    ),
    "another shape": (other_shape, "weights and configuration belong to different models"),
    "cut off": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:2000]
        ),
        "can't be read",
    ),
    "a pickle": (pickled, "can't be read"),
    "a sparse file": (sparse, "can't be read"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_dinov2_is_one_line(folder: Path, kind: str) -> None:
    damage, message = BROKEN[kind]
    damage(folder)
    started = time.monotonic()
    with pytest.raises(WeightsError, match=message) as caught:
        load_dino(str(folder), offline=True)
    assert str(caught.value).isprintable()
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.monotonic() - started < 10
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"),
        ("/nowhere/dino", "doesn't exist; give a folder or a hub id, such as facebook/dinov2-small"),
        ("dinov2-small", "doesn't exist; give a folder or a hub id"),
        ("./a/b", "doesn't exist"),
        (__file__, "is a file; give the folder"),
        ("nobody/dinov2-none", "isn't in the hub's cache; fetch it once without --offline"),
    ],
)
def test_one_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        load_dino(name, offline=True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [(96, 96), (33, 70), (5, 100), (1, 1)])
def test_images_of_any_size(folder: Path, clip: Clip, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = make(folder, clip)(torch.randn(2, 3, *size))
    assert logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("affinity", ["raw", "centred"])
def test_a_picture_is_alone_in_its_batch(folder: Path, clip: Clip, affinity: str) -> None:
    network, images = make(folder, clip, affinity=affinity), torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        together = network.decode(network.encode(images))
        for number in range(3):
            alone = network.decode(network.encode(images[number : number + 1]))
            for name, value in alone.items():
                assert torch.allclose(value[0], together[name][number], rtol=1e-4, atol=1e-4), name


def frozen_tensors(network: FrozenClip) -> dict[str, Tensor]:
    dino = network.frozen.dino
    assert dino is not None
    towers = {"clip": network.frozen.clip.vision, "dino": dino.model}
    return {
        f"{name}.{key}": value.clone()
        for name, tower in towers.items()
        for key, value in tower.state_dict().items()
    }


def test_an_update_changes_all_of_the_decoder_and_nothing_that_is_frozen(folder: Path, clip: Clip) -> None:
    network = make(folder, clip).train()
    frozen, trained = frozen_tensors(network), copy.deepcopy(network.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    outputs = network.training_outputs(torch.randn(2, 3, 64, 64))
    loss = outputs["logits"].square().mean() + outputs["similarity"].sigmoid().mean()
    loss.backward()
    optimizer.step()
    after = network.state_dict()
    parts = {".".join(name.split(".")[:2]) for name in after}
    assert parts == {"model.fusion", "model.dino_fusion", "model.decoder"}
    assert not [name for name, value in trained.items() if torch.equal(value, after[name])]
    still = frozen_tensors(network)
    assert all(torch.equal(value, still[name]) for name, value in frozen.items())
    assert not network.frozen.dino.model.training  # type: ignore[union-attr]


def test_an_average_of_the_weights_shares_what_is_frozen(folder: Path, clip: Clip) -> None:
    network = make(folder, clip)
    average = torch.optim.swa_utils.AveragedModel(network)
    assert average.module.frozen is network.frozen
    own = {value.data_ptr() for value in network.parameters()}
    assert not own & {value.data_ptr() for value in average.module.parameters()}


def test_a_checkpoint_holds_the_decoder_alone(folder: Path, clip: Clip, tmp_path: Path) -> None:
    network, images = make(folder, clip), torch.randn(1, 3, 64, 48)
    save_network(network, tmp_path / "last", config(folder), NAMES)
    weights = tmp_path / "last" / "model.safetensors"
    assert {name.split(".")[1] for name in load_file(weights)} == {"fusion", "dino_fusion", "decoder"}
    count = sum(value.numel() for value in network.parameters())
    assert weights.stat().st_size < 4 * count + 10_000
    loaded = load_network(tmp_path / "last")
    assert isinstance(loaded.network, FrozenClip)
    with torch.no_grad():
        assert torch.equal(loaded.network(images), network(images))


def test_a_checkpoint_is_refused_another_dinov2_or_none(folder: Path, clip: Clip, tmp_path: Path) -> None:
    save_network(make(folder, clip), tmp_path / "last", config(folder), NAMES)
    write_dino(folder, seed=1)
    with pytest.raises(CheckpointError, match=f"trained on another DINOv2 than {folder}"):
        load_network(tmp_path / "last")
    shutil.rmtree(folder)
    with pytest.raises(
        CheckpointError, match=r"needs its frozen encoder, which can't be had: .*doesn't exist"
    ):
        load_network(tmp_path / "last")


def test_a_run_of_weclip_plus(
    root: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The published recipe, but for its sizes, from images and labels to a network that predicts."""
    caplog.set_level("INFO")
    settings = load_train_config(
        "weclip-plus/voc12",
        overrides=[
            *("network.encoder=demo", f"network.frozen.dino={folder}", "network.frozen.width=32"),
            *("network.frozen.heads=4", "augmentation.crop=48", "optimisation.iterations=3"),
            *("optimisation.batch=2", "optimisation.warm_up=0", "online.override_from=2", "precision=fp32"),
        ],
    )
    images, labels = root / "JPEGImages", root / "Annotations"
    job = TrainJob(
        images, None, tmp_path / "run", settings, labels, "demo", device="cpu", workers=0, offline=True
    )
    assert train_seg(job).steps == 3
    assert f"network: frozen-clip, demo and {folder} (frozen), 0.05 M parameters to train" in caplog.text
    assert f"data: labels {labels}, 8 images" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    parts = ["loss_segmentation", "loss_affinity", "loss_dice", "loss_cross"]
    for record in records:
        assert all(0 < record[part] < 100 for part in parts)
        assert record["loss"] == pytest.approx(sum(record[part] for part in parts), rel=1e-5)
    picture = torch.zeros(50, 70, 3, dtype=torch.uint8).numpy()
    mask = Segmenter.load(tmp_path / "run", "cpu", InferenceConfig(scales=(1.0, 1.5), flip=True))(
        picture
    ).mask
    assert mask.shape == (50, 70)
