"""Networks of transformers: any semantic segmentation model, and those whose queries claim masks."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.end_to_end.conftest import wsss
from tests.tiny_transformers import CONFIGS, MEAN, STD, SWIN, network_of, write_model
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.errors import CheckpointError, ConfigError, NetworkError
from wsss_pipeline.segmentation.checkpoint import load_network, save_network
from wsss_pipeline.segmentation.hf_networks import TransformersNetwork
from wsss_pipeline.segmentation.inference import Segmenter, network_digest
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.pretrained import load_pretrained
from wsss_pipeline.segmentation.train_config import NetworkConfig, TrainConfig, load_train_config

NAMES = ("cat", "dog", "cow")


def config_of(folder: Path, kind: str, weights: str = "imagenet") -> NetworkConfig:
    return NetworkConfig(name=network_of(kind), encoder=str(folder), weights=weights)


def make(folder: Path, kind: str, **values: Any) -> TransformersNetwork:
    torch.manual_seed(0)
    network = build_network(config_of(write_model(folder, kind, **values), kind), 4)
    assert isinstance(network, TransformersNetwork)
    return network


def learn(network: TransformersNetwork, count: int = 1, side: int = 64) -> dict[str, Tensor]:
    """Losses of random pictures and labels, a strip of them ignored, with gradients."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, side, side, generator=generator)
    target = torch.randint(0, 4, (count, side // 16, side // 16), generator=generator)
    target = target.repeat_interleave(16, 1).repeat_interleave(16, 2)
    target[:, :9] = 255
    certain = torch.full(target.shape, 200, dtype=torch.uint8)
    outputs = network.train().training_outputs(images)
    losses = weighted_losses(outputs, target, certain, TrainConfig(), 1, lambda sums: sums)
    torch.stack(list(losses.values())).sum().backward()
    return losses


@pytest.mark.parametrize("kind", CONFIGS)
def test_whatever_transformers_has_is_one_of_our_networks(tmp_path: Path, kind: str) -> None:
    """Any size, a batch of one in training, a checkpoint that needs no folder, one group for each parameter."""
    network = make(tmp_path / "model", kind)
    assert (network.image_mean, network.image_std) == (tuple(MEAN), tuple(STD))
    losses = learn(network)
    assert all(bool(value.isfinite()) for value in losses.values())
    grouped = [group["params"] for group in network.parameter_groups(0.1, 0.01, 10)]
    assert sorted(id(one) for group in grouped for one in group) == sorted(map(id, network.parameters()))
    assert 0 < len(list(network.encoder().parameters())) < len(list(network.parameters()))
    save_network(network, tmp_path / "last", config_of(tmp_path / "model", kind), NAMES)
    shutil.rmtree(tmp_path / "model")
    loaded = load_network(tmp_path / "last").network
    assert (loaded.image_mean, loaded.image_std) == (tuple(MEAN), tuple(STD))
    assert network_digest(loaded) == network_digest(network)
    network.eval()
    for size in ((1, 1), (33, 50), (130, 70)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            logits = loaded(images)
            assert torch.equal(logits, network(images))
        assert logits.shape == (2, 4, *size)
        assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["dpt", "eomt"])
def test_a_model_of_one_size_looks_at_tiles(tmp_path: Path, kind: str) -> None:
    network = make(tmp_path, kind).eval()
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        whole = network(images)
        for row in (0, 64):
            for column in (0, 64, 128):
                part = (..., slice(row, row + 64), slice(column, column + 64))
                assert torch.allclose(whole[part], network(images[part]), atol=1e-5)
    learn(network, side=128)
    assert network.image_mean == tuple(MEAN)


@pytest.mark.parametrize("kind", ["upernet", "mask2former", "eomt"])
def test_weights_are_the_models_but_for_the_head(tmp_path: Path, kind: str) -> None:
    """Of four classes as well: what they are there says nothing of ours."""
    folder = write_model(tmp_path / "model", kind, weights=True, num_labels=4)
    network, stored = make(tmp_path / "fresh", kind), load_file(folder / "model.safetensors")
    fresh = {name: value.clone() for name, value in network.model.state_dict().items()}
    load_pretrained(network, config_of(folder, kind))
    same = [name for name, value in network.model.state_dict().items() if torch.equal(value, fresh[name])]
    heads = ("class_predictor", "empty_weight", "classifier", "auxiliary_head")
    changed = [name for name in fresh if name in stored and not torch.equal(stored[name], fresh[name])]
    kept = [name for name in changed if name in same]
    assert kept
    assert all(any(head in name for head in heads) for name in kept), kept
    assert len(changed) - len(kept) > 10
    # and a trained one's, out of its checkpoint
    save_network(network, tmp_path / "last", config_of(folder, kind), NAMES)
    again = make(tmp_path / "again", kind)
    load_pretrained(again, config_of(folder, kind, str(tmp_path / "last")))
    encoder = network.encoder().state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in again.encoder().state_dict().items())


def test_a_backbone_takes_weights_of_its_own(tmp_path: Path) -> None:
    """As the recipe of FMA-WSSS has it: Swin from ImageNet, the rest from nothing."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(5)
    donor = SwinForImageClassification(SwinConfig(**{k: v for k, v in SWIN.items() if k != "out_features"}))
    donor.save_pretrained(tmp_path / "swin")
    network = make(tmp_path / "model", "mask2former")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    load_pretrained(network, config_of(tmp_path / "model", "mask2former", str(tmp_path / "swin")))
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > 20
    assert all("pixel_level_module.encoder" in name for name in changed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("imagenet", "no model.safetensors in .*--weights none"),
        ("nowhere", "they don't exist; give a folder"),
        ("owner/model", "isn't in the hub's cache"),
        ("{other}", r"they fit \d of the encoder's"),
        ("{pickle}", "can't be read"),
    ],
)
def test_weights_that_cannot_be_used_are_one_line(
    upernet: Path, tmp_path: Path, weights: str, message: str
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    places = {"other": tmp_path / "other.safetensors", "pickle": tmp_path / "pickle.bin"}
    config = config_of(upernet / "model", "upernet", weights.format(**places))
    with pytest.raises(NetworkError, match=message) as caught:
        load_pretrained(build_network(config, 4), config, offline=True)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
        ({"image_mean": 0.5, "image_std": 0.25}, 0.5, 0.25),
        ({"do_rescale": True, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 0.5}, 0.5, 0.25),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 63.75}, 0.5, 0.25),
        ({"do_normalize": False, "image_mean": 0.5, "image_std": 0.5}, 0.0, 1.0),
        ({}, 0.0, 1.0),
    ],
)
def test_the_statistics_are_those_of_the_preprocessor(
    tmp_path: Path, processor: dict[str, Any], mean: float, std: float
) -> None:
    write_model(tmp_path, "segformer")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    network = build_network(config_of(tmp_path, "segformer"), 4)
    assert network.image_mean == pytest.approx((mean,) * 3)
    assert network.image_std == pytest.approx((std,) * 3)


def test_a_model_of_blue_first_sees_blue_first(tmp_path: Path) -> None:
    plain = make(tmp_path, "segformer").eval()
    (tmp_path / "preprocessor_config.json").write_text('{"do_flip_channel_order": true}')
    network = build_network(config_of(tmp_path, "segformer"), 4).eval()
    network.load_state_dict(plain.state_dict())
    save_network(network, tmp_path / "last", config_of(tmp_path, "segformer"), NAMES)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(plain(images), plain(images.flip(1)))
        for one in (network, load_network(tmp_path / "last").network):
            assert torch.equal(one(images), plain(images.flip(1)))


def test_an_auxiliary_head_learns_with_its_own_weight(tmp_path: Path) -> None:
    losses = {
        weight: learn(make(tmp_path / str(weight), "upernet", auxiliary_loss_weight=weight))
        for weight in (0.4, 0.8)
    }
    assert losses[0.8]["auxiliary"].item() == pytest.approx(2 * losses[0.4]["auxiliary"].item())
    assert losses[0.8]["segmentation"].item() == pytest.approx(losses[0.4]["segmentation"].item())
    without = make(tmp_path / "none", "upernet", use_auxiliary_head=False)
    assert learn(without).keys() == {"segmentation"}


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no type": ("of a model of type None", lambda values: values.pop("model_type")),
    "another type": ("takes one of", lambda values: values.update(model_type="llama")),
    "a number for the type": ("of a model of type 3", lambda values: values.update(model_type=3)),
    "a backbone of a hub": (
        "lies elsewhere",
        lambda values: values.update(backbone="owner/model", backbone_config=None),
    ),
    "a backbone of timm's hub": (
        "lies elsewhere",
        lambda values: values.update(
            backbone_config={"model_type": "timm_backbone", "backbone": "hf_hub:a/b"}
        ),
    ),
    "a million layers": ("depths", lambda values: values["backbone_config"].update(depths=[10**6] * 4)),
    "many layers": ("depths", lambda values: values["backbone_config"].update(depths=[200] * 4)),
    "a list without end": ("values", lambda values: values.update(pool_scales=[1] * 1000)),
    "a wide model": ("parameters", lambda values: values.update(hidden_size=65_536)),
    "wider still": ("hidden_size", lambda values: values.update(hidden_size=10**9)),
    "a large window": (
        "parameters",
        lambda values: values["backbone_config"].update(window_size=4096),
    ),
    "text for a number": ("no upernet can be built", lambda values: values.update(hidden_size="x")),
    "a function that isn't": (
        "no upernet can be built",
        lambda values: values["backbone_config"].update(hidden_act="nothing"),
    ),
}


@pytest.fixture(scope="module")
def upernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, a folder of transformers, and ``last``, a checkpoint of it."""
    folder = tmp_path_factory.mktemp("upernet")
    save_network(make(folder / "model", "upernet"), folder / "last", config_of(folder, "upernet"), NAMES)
    return folder


@pytest.fixture
def saved(upernet: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    return shutil.copytree(upernet, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_configuration_is_one_line(saved: Path, kind: str) -> None:
    """In a folder, and in a checkpoint."""
    message, spoil = HOSTILE[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, error in (("model", NetworkError), ("last", CheckpointError)):
        file = saved / name / "config.json"
        values = json.loads(file.read_text())
        spoil(values["architecture"] if name == "last" else values)
        file.write_text(json.dumps(values))
        with pytest.raises(error, match=message) as caught:
            load_network(saved / name) if name == "last" else build_network(
                config_of(saved / name, "upernet"), 4
            )
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


def test_what_would_run_or_fetch_code_is_left_out(tmp_path: Path) -> None:
    network = make(tmp_path / "plain", "upernet")
    values = json.loads((tmp_path / "plain/config.json").read_text())
    values |= {"auto_map": {"x": "y--z.Z"}, "_attn_implementation": "owner/kernel", "dtype": "float16"}
    values["backbone_config"] |= {"attn_implementation": "owner/kernel", "_name_or_path": "owner/model"}
    (tmp_path / "plain/config.json").write_text(json.dumps(values))
    again = build_network(config_of(tmp_path / "plain", "upernet"), 4)
    assert isinstance(again, TransformersNetwork)
    assert again.architecture == network.architecture
    assert all(value.dtype == torch.float32 for value in again.parameters())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values.pop("architecture"), "architecture is for hf, mask2former, eomt"),
        (lambda values: values["network"].update(name="unet"), "architecture is for hf, mask2former, eomt"),
        (lambda values: values["network"].update(name="eomt"), "of a model of type upernet"),
        (lambda values: values["architecture"].update(hidden_size=2048), "doesn't fit"),
        (lambda values: values["architecture"].update(image_mean=3), "no upernet can be built"),
    ],
)
def test_a_checkpoint_is_built_from_what_it_holds(
    saved: Path, spoil: Callable[[dict[str, Any]], object], message: str
) -> None:
    values = json.loads((saved / "last/config.json").read_text())
    spoil(values)
    (saved / "last/config.json").write_text(json.dumps(values))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message):
        load_network(saved / "last")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


@pytest.mark.parametrize(
    ("name", "encoder", "message"),
    [
        ("hf", "nowhere", "there is no such folder"),
        ("hf", "a/b/c", "there is no such folder"),
        ("mask2former", "owner/model", "isn't in the hub's cache"),
        ("eomt", "{empty}", "no config.json in"),
        ("eomt", "{upernet}", "of a model of type upernet; this network takes one of eomt, eomt_dinov3"),
        ("hf", "x" * 3000, "can't be looked up"),
    ],
)
def test_an_encoder_that_is_none_is_one_line(tmp_path: Path, name: str, encoder: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "upernet", "upernet")
    places = {"empty": tmp_path / "empty", "upernet": tmp_path / "upernet"}
    with pytest.raises(NetworkError, match=message) as caught:
        build_network(NetworkConfig(name=name, encoder=encoder.format(**places)), 4)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["hf", "mask2former", "eomt"])
def test_settings_that_mean_nothing_to_them_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--network {name} needs a model of transformers: give --encoder"):
        load_train_config(flags={"network.name": name})
    flags = {"network.name": name, "network.encoder": "owner/model"}
    load_train_config(flags=flags)
    for setting in ("loss.balanced=true", "loss.dice=1"):
        if name == "hf":
            load_train_config(flags=flags, overrides=[setting])
            continue
        with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]} isn't for {name}"):
            load_train_config(flags=flags, overrides=[setting])


def test_the_recipes_of_fma_are_whole() -> None:
    for name, iterations in (("voc12", 80_000), ("coco14", 100_000)):
        config = load_train_config(f"fma/{name}")
        assert (config.network.name, config.optimisation.iterations) == ("mask2former", iterations)
        assert config.augmentation.crop == 512


@pytest.mark.parametrize("kind", ["mask2former", "eomt"])
def test_scores_are_class_times_mask(tmp_path: Path, kind: str) -> None:
    """As the library's own processor has it; the softmax of the logits is their share of the sum."""
    network = make(tmp_path, kind).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = network(images)
        output = network.model(pixel_values=images)
        classes = output.class_queries_logits.softmax(-1)
        masks = torch.nn.functional.interpolate(output.masks_queries_logits, size=(64, 64), mode="bilinear")
        scores = sum(
            classes[0, query, :-1, None, None] * masks[0, query].sigmoid()
            for query in range(classes.shape[1])
        )
    assert isinstance(scores, Tensor)
    assert torch.equal(logits[0].argmax(0), scores.argmax(0))
    assert torch.allclose(logits[0].softmax(0), scores / scores.sum(0), atol=1e-5)
    found = Segmenter(network, NAMES)(torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8).numpy())
    assert found.mask.shape == (40, 50)
    assert found.confidence.min() >= 50, "the largest of four probabilities"


def test_where_no_query_claims_a_pixel_no_class_is_surer_than_another(tmp_path: Path) -> None:
    network = make(tmp_path, "mask2former").eval()
    forward = network.model.forward

    def nothing(**given: Any) -> Any:
        output = forward(**given)
        output.masks_queries_logits = torch.full_like(output.masks_queries_logits, -25.0)
        return output

    network.model.forward = nothing
    with torch.no_grad():
        probability = network(torch.randn(1, 3, 64, 64)).softmax(dim=1)
    assert torch.allclose(probability, torch.full_like(probability, 0.25), atol=1e-3)


@pytest.mark.parametrize("kind", ["upernet", "mask2former", "eomt"])
def test_a_run_is_predicted_scored_and_relabelled(root: Path, tmp_path: Path, kind: str) -> None:
    """The commands, without the folder that the network was built from."""
    write_model(tmp_path / "model", kind)
    images, truth, run = root / "JPEGImages", root / "SegmentationClass", tmp_path / "run"
    trained = wsss(
        *("train-seg", "--gt-masks", truth, "--classes", "demo", "--images", images, "--out", run),
        *("--network", network_of(kind), "--encoder", tmp_path / "model", "--weights", "none"),
        *("--iterations", 1, "--batch-size", 2, "--crop", 48, "--device", "cpu", "--workers", 0),
    )
    assert trained.exit_code == 0, trained.stderr
    shutil.rmtree(tmp_path / "model")
    scored = wsss(
        *("evaluate", "--checkpoint", run, "--images", images, "--gt", truth, "--device", "cpu"),
        *("--scales", "0.5,1", "--flip"),
    )
    assert scored.exit_code == 0, scored.stderr
    relabelled = wsss(
        *("relabel", "--checkpoint", run, "--images", images, "--cache", tmp_path / "cache"),
        *("--refine", "none", "--device", "cpu", "--labels", root / "Annotations"),
    )
    assert relabelled.exit_code == 0, relabelled.stderr
    assert len(MaskCache.open(Path(relabelled.stdout.splitlines()[-1]))) == 8
