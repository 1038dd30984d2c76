"""Networks: one calling convention, whatever is inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wsss_pipeline.errors import NetworkError
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import DeepLabV2, SegFormer, build_network
from wsss_pipeline.segmentation.pretrained import load_pretrained
from wsss_pipeline.segmentation.train_config import NetworkConfig

NETWORKS = [
    ("deeplabv3plus", "resnet18"),
    ("deeplabv2", "resnet18"),
    ("segformer", "tiny"),
    ("unet", "mobilenet_v2"),
    ("frozen-clip", "demo"),
    ("weakclip", "demo"),
]


def make(name: str, encoder: str, weights: str = "none") -> SegmentationNetwork:
    torch.manual_seed(0)
    config = NetworkConfig(name=name, encoder=encoder, weights=weights)
    return build_network(config, 4, class_names=("cat", "dog", "bird"))


@pytest.mark.parametrize(("name", "encoder"), NETWORKS)
@pytest.mark.parametrize("size", [(67, 49), (64, 64), (33, 100)])
def test_logits_have_the_size_of_the_input(name: str, encoder: str, size: tuple[int, int]) -> None:
    network = make(name, encoder).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, *size)).shape == (2, 4, *size)


@pytest.mark.parametrize(
    ("name", "encoder"), [*NETWORKS, ("pan", "resnet18"), ("dpt", "tu-vit_tiny_patch16_224")]
)
def test_an_image_may_be_as_small_as_it_likes(name: str, encoder: str) -> None:
    """Also smaller than the kernels inside SegFormer and PAN."""
    network = make(name, encoder).eval()
    for size in ((1, 1), (7, 33), (33, 7), (20, 15)):
        with torch.no_grad():
            logits = network(torch.randn(1, 3, *size))
        assert logits.shape == (1, 4, *size)
        assert logits.isfinite().all()


@pytest.mark.parametrize(("name", "encoder"), NETWORKS)
def test_a_batch_of_one_can_be_trained_on(name: str, encoder: str) -> None:
    outputs = make(name, encoder).train().training_outputs(torch.randn(1, 3, 64, 64))
    logits = [output for name, output in outputs.items() if name.startswith("logits")]
    assert logits
    assert all(output.shape[:2] == (1, 4) and output.isfinite().all() for output in logits)


@pytest.mark.parametrize(("name", "encoder"), NETWORKS)
def test_each_trained_parameter_is_in_one_group(name: str, encoder: str) -> None:
    network = make(name, encoder)
    groups = network.parameter_groups(0.1, 0.01, 10)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    inside = {id(parameter) for parameter in network.encoder().parameters()}
    for group in groups:
        in_encoder = {id(parameter) in inside for parameter in group["params"]}
        assert in_encoder == {group["lr"] == 0.1}
        assert group["lr"] in (
            (0.1,) if in_encoder == {True} else (1.0, 2.0)
        )  # DeepLabV2's biases learn twice as fast


def test_deeplabv2_gives_three_scales_and_their_maximum() -> None:
    network = make("deeplabv2", "resnet18").train()
    outputs = network.training_outputs(torch.randn(1, 3, 64, 64))
    assert {name: tuple(x.shape[-2:]) for name, x in outputs.items()} == {
        "logits": (8, 8),
        "logits_0.75": (6, 6),
        "logits_0.5": (4, 4),
        "logits_max": (8, 8),
    }
    full, maximum = outputs["logits"], outputs["logits_max"]
    assert bool((maximum >= full).all())
    assert bool((maximum > full).any())


def test_deeplabv2_learns_as_published() -> None:
    network = make("deeplabv2", "resnet18")
    groups = network.parameter_groups(0.001, 0.0005, 10)
    assert [group["lr"] for group in groups] == pytest.approx([0.001, 0.01, 0.02])
    assert [group["weight_decay"] for group in groups] == [0.0005, 0.0005, 0.0]
    assert len(groups[1]["params"]) == len(groups[2]["params"]) == 4


def test_deeplabv2_keeps_its_batch_norm() -> None:
    network = make("deeplabv2", "resnet18").train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    network.training_outputs(torch.randn(2, 3, 64, 64))
    after = [norm.running_mean for norm in norms if norm.running_mean is not None]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    assert network.training


@pytest.mark.parametrize(
    ("name", "encoder", "message"),
    [
        ("resnet", "resnet18", "unknown network 'resnet'; known: deeplabv2, segformer"),
        ("unet", "resnet17", "can't have the encoder 'resnet17'"),
        ("deeplabv2", "vgg16", "takes a ResNet of timm"),
        ("segformer", "mit-b9", "no encoder 'mit-b9'"),
    ],
)
def test_what_does_not_exist_is_named(name: str, encoder: str, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        make(name, encoder)


def test_each_segformer_has_as_many_parameters_as_the_published_one() -> None:
    """With the 150 classes of ADE20K: 3.8, 13.7, 27.5, 47.3, 64.1 and 84.7 million in the paper (table 1)."""
    with torch.device("meta"):
        networks = [SegFormer(f"mit-b{number}", 150) for number in range(6)]
    found = [sum(value.numel() for value in network.parameters()) for network in networks]
    assert found == [3_752_694, 13_715_798, 27_461_974, 47_337_814, 64_108_374, 84_708_694]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"hidden_sizes": 3}', '{"hidden_sizes": [31, 2, 3, 4]}', '{"depths": [1]}']
)
def test_a_damaged_folder_of_a_segformer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(NetworkError, match=r"config\.json"):
        make("segformer", str(tmp_path))


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = NetworkConfig(name="segformer", encoder="tiny", weights=str(tmp_path))
    with pytest.raises(NetworkError, match=rf"weights {tmp_path}: no \.safetensors, \.pth or \.bin file"):
        load_pretrained(make("segformer", "tiny"), config)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
def test_an_encoder_takes_weights_from_a_file(tmp_path: Path, prefix: str) -> None:
    donor, network = (
        make("deeplabv2", "resnet18"),
        build_network(NetworkConfig(name="deeplabv2", encoder="resnet18"), 4),
    )
    state = donor.encoder().state_dict()
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "w.safetensors")
    for place in (tmp_path, tmp_path / "w.safetensors"):
        load_pretrained(network, NetworkConfig(name="deeplabv2", encoder="resnet18", weights=str(place)))
        assert all(torch.equal(value, state[name]) for name, value in network.encoder().state_dict().items())


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_a_checkpoint_of_torch_may_hold_them_deeper(tmp_path: Path, key: str | None) -> None:
    donor, network = make("deeplabv2", "resnet18"), make("deeplabv2", "resnet18")
    nn.init.constant_(next(donor.encoder().parameters()), 0.25)
    state = donor.encoder().state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pth")
    config = NetworkConfig(name="deeplabv2", encoder="resnet18", weights=str(tmp_path / "w.pth"))
    load_pretrained(network, config)
    assert all(torch.equal(value, state[name]) for name, value in network.encoder().state_dict().items())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("imagenet", "can't be fetched offline; give a file"),
        ("nowhere.pth", "don't exist; choose imagenet, coco, none"),
        ("other", "fit 0 of the"),
        ("pickle.pth", "can't be read as tensors"),
        ("list.pth", "read as tensors: they hold no tensors by name"),
    ],
)
def test_weights_that_cannot_be_used_are_named(tmp_path: Path, weights: str, message: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    file = tmp_path / ("other.safetensors" if weights == "other" else weights)
    config = NetworkConfig(
        name="deeplabv2", encoder="resnet18", weights=str(file) if file.exists() else weights
    )
    network = make("deeplabv2", "resnet18")
    assert isinstance(network, DeepLabV2)
    with pytest.raises(NetworkError, match=message):
        load_pretrained(network, config, offline=True)


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self._path,)


def test_nothing_in_a_file_of_weights_is_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "extra": _Touch(tmp_path / "run")}, tmp_path / "w.pth")
    config = NetworkConfig(name="deeplabv2", encoder="resnet18", weights=str(tmp_path / "w.pth"))
    with pytest.raises(NetworkError, match="can't be read as tensors"):
        load_pretrained(make("deeplabv2", "resnet18"), config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoder", ["mit-b0", "mit_b0", "nvidia/mit-b0"])
def test_a_segformers_weights_are_asked_for_by_their_hub_id(
    monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    from transformers import SegformerModel

    donor, asked = make("segformer", "mit-b0"), []
    nn.init.constant_(next(donor.encoder().parameters()), 0.25)
    monkeypatch.setattr(SegformerModel, "from_pretrained", lambda name: asked.append(name) or donor.encoder())
    network = make("segformer", encoder)
    load_pretrained(network, NetworkConfig(name="segformer", encoder=encoder, weights="imagenet"))
    assert asked == ["nvidia/mit-b0"]
    assert (next(network.encoder().parameters()) == 0.25).all()


def test_an_encoder_without_published_weights_is_named() -> None:
    with pytest.raises(NetworkError, match="no imagenet weights for segformer with tiny"):
        load_pretrained(make("segformer", "tiny"), NetworkConfig(name="segformer", encoder="tiny"))
