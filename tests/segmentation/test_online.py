"""Training on targets that are made of each batch's own crops, by WeCLIP and by ExCEL."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.end_to_end.conftest import wsss
from tests.end_to_end.test_bad_input import only_error
from tests.forks import ForkServer
from tests.segmentation.conftest import Make, changed, online_config, other_clip
from tests.segmentation.test_trainer import DiesAtFive, Killed, log_of, losses
from wsss_pipeline.cache import MaskCache
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import to_yaml
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.labels import read_labels
from wsss_pipeline.data.masks import CERTAIN, IGNORE, WIDE_IGNORE, MaskFolder
from wsss_pipeline.demo.scenes import draw_scene
from wsss_pipeline.errors import CheckpointError, TrainingError
from wsss_pipeline.methods import load_method
from wsss_pipeline.pseudo_masks.generator import MaskGenerator
from wsss_pipeline.segmentation import trainer as trainer_module
from wsss_pipeline.segmentation.checkpoint import decoder_digest, load_network, save_network
from wsss_pipeline.segmentation.frozen_clip import FrozenClip
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.objectives import weighted_losses
from wsss_pipeline.segmentation.targets import OnlineTarget
from wsss_pipeline.segmentation.train_config import FrozenClipConfig, NetworkConfig, OnlineConfig
from wsss_pipeline.stages.train_seg import train_seg

METHODS = ("weclip", "excel")
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@each_method
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(
    make_online: Make, monkeypatch: pytest.MonkeyPatch, demo_clip: Clip, method: str, ema: float
) -> None:
    """It dies in the first update in which the network helps, and goes on from before it."""
    frozen = {name: value.clone() for name, value in demo_clip.vision.state_dict().items()}
    config = online_config(method, optimisation__ema=ema)
    whole = train_seg(make_online("whole", config))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "Progress", DiesAtFive)
        with pytest.raises(Killed):
            train_seg(make_online("parts", config))
    parts = train_seg(make_online("parts", config))
    assert (whole.steps, parts.steps) == (6, 6)
    files = ["last/model.safetensors", "state/network.safetensors"]
    for name in [*files, "state/average.safetensors"] if ema else files:
        one, other = (load_file(result.checkpoint.parent / name) for result in (whole, parts))
        assert all(torch.equal(one[key], other[key]) for key in one)
        # the decoder alone; a number of updates is in the average
        assert all("model.fusion." in key or "model.decoder." in key or key == "n_averaged" for key in one)
        assert sum(value.numel() for value in one.values()) < 60_000
    assert losses(parts.checkpoint.parent)[-2:] == losses(whole.checkpoint.parent)[-2:]
    assert all(torch.equal(value, frozen[name]) for name, value in demo_clip.vision.state_dict().items())


def labels_of(root: Path) -> dict[str, list[str]]:
    """Of the eight scenes, as their annotations say."""
    images = find_images(root / "JPEGImages")
    return read_labels(root / "Annotations", images, load_class_set("demo"))


@dataclass(frozen=True)
class Made:
    """Targets of one batch, and what they were made of."""

    present: list[list[int]]
    beyond: Tensor
    target: Tensor
    confidence: Tensor


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """The targets of all batches, in order."""
    seen: list[Made] = []
    make = OnlineTarget.__call__

    def recorded(self: OnlineTarget, images: Tensor, outputs: Any, present: Any, *more: Any) -> Any:
        target, confidence = make(self, images, outputs, present, *more)
        seen.append(Made([list(values) for values in present], more[0], target, confidence))
        return target, confidence

    monkeypatch.setattr(OnlineTarget, "__call__", recorded)
    return seen


def write(folder: Path, labels: Mapping[str, list[str]]) -> Path:
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder / "labels.json"


def test_with_more_than_254_classes_targets_know_beyond_the_edge_from_class_255(
    make_online: Make, root: Path, tmp_path: Path, made: list[Made]
) -> None:
    names = (*(f"other {number}" for number in range(254)), *load_class_set("demo").names)
    config = online_config("weclip", optimisation__batch=4, optimisation__iterations=2, loss__affinity=0.1)
    config = changed(config, augmentation__scale_min=0.3, augmentation__scale_max=0.3)
    run = train_seg(
        make_online("run", config, labels=write(tmp_path, labels_of(root)), classes=",".join(names))
    ).checkpoint.parent
    assert all(math.isfinite(line["loss"]) for line in log_of(run))
    found = set[int]()
    for part in made:
        assert part.beyond.any()
        assert torch.equal(part.target == WIDE_IGNORE, part.beyond)
        found |= set(part.target[~part.beyond].tolist())
    assert found <= {0, *range(255, 265)}
    assert len(found) > 3


@pytest.mark.parametrize("batch", [1, 3, 5])
@each_method
def test_a_crops_target_holds_its_images_classes_alone(
    make_online: Make, root: Path, tmp_path: Path, made: list[Made], method: str, batch: int
) -> None:
    """One image has no label, one has all; the network helps from the second update on."""
    names = load_class_set("demo").names
    labels = write(tmp_path, {**labels_of(root), "train_00001": [], "train_00002": list(names)})
    updates = -(-8 // batch)
    helped = {"online__gate_from": 2, "online__guide_from": 2, "online__self_affinity_from": 2}
    config = online_config(method, optimisation__batch=batch, optimisation__iterations=updates, **helped)
    config = changed(config, augmentation__scale_min=0.3, augmentation__scale_max=0.6)
    run = train_seg(make_online("run", config, labels=labels)).checkpoint.parent
    assert [len(batch.present) for batch in made] == [batch] * updates
    assert all(math.isfinite(line["loss"]) and line["images"] == batch for line in log_of(run))
    counts, found = [], set[int]()
    for part in made:
        for present, beyond, target, confidence in zip(
            part.present, part.beyond, part.target, part.confidence, strict=True
        ):
            assert torch.equal(target == IGNORE, beyond)
            assert (confidence[beyond] == 0).all()
            assert set(target[~beyond].tolist()) <= {0, *present}
            if not present:
                assert (confidence[~beyond] == CERTAIN).all()
            counts.append(len(present))
            found |= set(target[~beyond].tolist())
    assert {0, len(names)} <= set(counts)
    assert len(found) > 3, "hardly any class is in the targets"
    assert any(part.beyond.any() for part in made)


def test_the_confidence_of_targets_is_the_one_that_the_settings_name(
    make_online: Make, made: list[Made]
) -> None:
    for kind in ("posterior", "product"):
        config = online_config("excel", optimisation__iterations=1)
        settings = (*config.online.settings, f"confidence={kind}")
        config = config.model_copy(update={"online": config.online.model_copy(update={"settings": settings})})
        train_seg(make_online(kind, config))
    plain, other = made
    assert torch.equal(plain.target, other.target)
    assert not torch.equal(plain.confidence, other.confidence)


@each_method
def test_images_without_labels_teach_the_background(
    make_online: Make, root: Path, tmp_path: Path, made: list[Made], method: str
) -> None:
    elsewhere = {
        "elsewhere": [load_class_set("demo").names[0]]
    }  # for a list without any class is none of labels
    labels = write(tmp_path, {image_id: [] for image_id in labels_of(root)} | elsewhere)
    config = online_config(method, optimisation__iterations=8, optimisation__lr=0.01)
    run = train_seg(make_online("run", config, labels=labels)).checkpoint
    assert all((part.target[~part.beyond] == 0).all() for part in made)
    values = losses(run.parent)
    assert 0 <= values[-1] < 0.5 * values[0]
    predicted = load_network(run).network(torch.randn(1, 3, 48, 48)).argmax(dim=1)
    assert (predicted == 0).all()


@pytest.mark.parametrize("batch", [1, 3])
@each_method
def test_a_damaged_image_teaches_nothing_whatever_its_labels(
    make_online: Make, root: Path, tmp_path: Path, made: list[Made], method: str, batch: int
) -> None:
    shutil.copytree(root / "JPEGImages", tmp_path / "images")
    (damaged,) = (tmp_path / "images").glob("train_00003.*")
    damaged.write_bytes(b"no image")
    config = online_config(method, optimisation__batch=batch, optimisation__iterations=8 // batch + 1)
    runs = []
    for number, own in enumerate(([], list(load_class_set("demo").names))):
        labels = write(tmp_path, {**labels_of(root), "train_00003": own})
        changes = {"images": tmp_path / "images", "labels": labels}
        job = make_online(f"run {number}", changed(config, max_unusable=1.0), **changes)
        runs.append(train_seg(job).checkpoint)
    one, other = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(one[name], other[name]) and one[name].isfinite().all() for name in one)
    assert any(line["damaged"] == 1 for line in log_of(runs[0].parent))
    whole = [target for part in made for target in part.target if (target == IGNORE).all()]
    assert len(whole) == sum(line["damaged"] for run in runs for line in log_of(run.parent))


@pytest.mark.parametrize("value", [0, 3, IGNORE])
@each_method
def test_a_target_of_one_kind_alone_has_a_finite_loss(demo_clip: Clip, method: str, value: int) -> None:
    """The published balanced loss isn't a number where background or foreground doesn't occur."""
    config = online_config(method, online__override_from=1, loss__dice=1.0)
    torch.manual_seed(0)
    network = FrozenClip(config.network.frozen, 11, demo_clip).train()
    outputs = network.training_outputs(torch.randn(2, 3, 48, 48))
    target = torch.full((2, 48, 48), value)
    confidence = torch.full((2, 48, 48), CERTAIN, dtype=torch.uint8)
    found = weighted_losses(outputs, target, confidence, config, 1, lambda sums: sums)
    total = torch.stack(list(found.values())).sum()
    total.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients) == (value != IGNORE)


def test_images_that_lack_labels_are_named_or_left_out(make_online: Make, root: Path, tmp_path: Path) -> None:
    some = dict(list(labels_of(root).items())[:6])
    job = make_online("run", online_config("weclip"), labels=write(tmp_path, some))
    with pytest.raises(
        TrainingError,
        match=r"2 of the 8 images aren't in the labels .*labels\.json \(train_00006, train_00007\)",
    ):
        train_seg(job)
    assert train_seg(replace(job, allow_missing=True)).steps == 6
    assert json.loads((job.out / "data.json").read_text())["images"] == 6


@pytest.mark.parametrize("cause", ["rate", "weights"])
@each_method
def test_nan_stops_with_one_line_and_the_network_before_it(
    make_online: Make, tmp_path: Path, demo_clip: Clip, method: str, cause: str
) -> None:
    """Also where what isn't a number goes into the targets."""
    config = online_config(method, online__gate_from=1, online__guide_from=1, optimisation__clip_norm=0.0)
    if cause == "rate":
        config = changed(config, optimisation__optimizer="sgd", optimisation__lr=1e30)
    else:
        tensors = FrozenClip(config.network.frozen, 11, demo_clip).model.state_dict()
        tensors["fusion.fuse.bias"][0] = math.nan
        save_file(tensors, tmp_path / "start.safetensors")
        config = changed(config, network__weights=str(tmp_path / "start.safetensors"))
    with pytest.raises(TrainingError, match=r"the loss is nan at update \d.*train_0000") as caught:
        train_seg(make_online("run", config))
    assert "\n" not in str(caught.value)
    values = json.loads((tmp_path / "run" / "nan" / "config.json").read_text())
    assert len(values["image_ids"]) == 2


@each_method
def test_an_update_changes_every_tensor_of_the_decoder(
    make_online: Make, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """And what the network says of the crops goes into their targets without a gradient."""
    given: list[dict[str, Tensor | None]] = []
    kind = load_method(method)
    cams = kind.cams  # type: ignore[attr-defined]

    def recorded(self: Any, features: Any, present: Any, **from_network: Tensor | None) -> Any:
        given.append(from_network)
        return cams(self, features, present, **from_network)

    monkeypatch.setattr(kind, "cams", recorded)
    config = online_config(method, online__gate_from=1, online__guide_from=1, optimisation__iterations=1)
    config = changed(config, optimisation__weight_decay=0.0, optimisation__warm_up=0)
    first = train_seg(make_online("first", changed(config, optimisation__lr=0.0))).checkpoint
    after = train_seg(make_online("after", config)).checkpoint
    one, other = (load_file(run / "model.safetensors") for run in (first, after))
    assert [name for name in one if torch.equal(one[name], other[name])] == []
    for tensors in given:
        assert set(tensors) == {"gate", "guide", "prior"}
        missing = {name for name, value in tensors.items() if value is None}
        assert missing == (set() if method == "excel" else {"guide"})
        assert not any(value is not None and value.requires_grad for value in tensors.values())


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "raw": {},
    "centred": {"affinity": "centred"},
    "centred on each image": {"affinity": "centred", "affinity_mean": "image"},
    "in place": {"in_place": True, "last_block": -1},
    "one block": {"first_block": -1, "last_block": -1},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_a_network_sees_in_an_image_is_the_same_in_any_batch(demo_clip: Clip, name: str) -> None:
    torch.manual_seed(0)
    config = FrozenClipConfig(width=32, depth=1, **CONFIGURATIONS[name])
    network = FrozenClip(config, 11, demo_clip).eval()
    images = torch.randn(2, 3, 43, 61)
    with torch.no_grad():
        together = network(images)
        padded = torch.nn.functional.pad(images, (0, 3, 0, 5))
        both = network.decode(network.encode(padded))
        for number in range(2):
            assert (network(images[number, None])[0] - together[number]).abs().max() < 1e-5
            alone = network.decode(network.encode(padded[number, None]))
            for key, value in alone.items():
                assert torch.allclose(value[0], both[key][number], rtol=1e-4, atol=1e-5), key


def test_an_exported_network_takes_any_number_and_size_of_images(demo_clip: Clip) -> None:
    """Else torch refuses; that ONNX computes the same is checked whenever one is written."""
    network = FrozenClip(FrozenClipConfig(width=32, depth=1), 11, demo_clip).eval()
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
    program = torch.export.export(network, (torch.zeros(2, 3, 64, 48),), dynamic_shapes=shapes)
    assert len(program.range_constraints) >= 3


def saved_network(folder: Path, demo_clip: Clip, **frozen: Any) -> Path:
    """A checkpoint for the demo's classes, of seeded weights."""
    config = NetworkConfig.model_validate(
        {"name": "frozen-clip", "encoder": "demo", "weights": "none", "frozen": {"width": 32, **frozen}}
    )
    torch.manual_seed(0)
    network = build_network(config, 11, clip=demo_clip)
    save_network(network, folder, config, load_class_set("demo").names)
    return folder


OF_A_DECODER = [
    *(("frozen.heads", 4, True), ("frozen.affinity", "centred", True), ("frozen.in_place", True, True)),
    *(("frozen.dropout", 0.5, False), ("frozen.affinity_mean", "image", False)),
    *(("frozen.dino", "elsewhere/dino", False), ("weights", "imagenet", False)),
]


def test_masks_hang_on_all_of_a_decoder_but_what_acts_in_training(tmp_path: Path, demo_clip: Clip) -> None:
    folder = saved_network(tmp_path / "last", demo_clip)
    before, text = decoder_digest(tmp_path), (folder / "config.json").read_text()
    assert decoder_digest(folder) == before
    for key, value, is_another in OF_A_DECODER:
        content = json.loads(text)
        *sections, name = ("network", *key.split("."))
        section = content
        for part in sections:
            section = section[part]
        assert section[name] != value
        section[name] = value
        (folder / "config.json").write_text(json.dumps(content))
        assert (decoder_digest(tmp_path) != before) == is_another, key
    (folder / "config.json").write_text(text.replace(json.loads(text)["frozen"]["clip"], "0" * 64))
    assert decoder_digest(tmp_path) != before
    (folder / "config.json").write_text(text)
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, folder / "model.safetensors")
    assert decoder_digest(tmp_path) != before


def test_more_calibrated_blocks_than_clip_has_are_all_but_the_first(demo_clip: Clip) -> None:
    images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def logits(blocks: int) -> Tensor:
        config = FrozenClipConfig(width=32, depth=1, in_place=True, last_block=-1, calibrated_blocks=blocks)
        torch.manual_seed(0)
        return FrozenClip(config, 3, demo_clip).eval().logits(images)

    depth = int(demo_clip.vision.config.num_hidden_layers)
    assert torch.equal(logits(depth - 1), logits(1000))
    assert not torch.equal(logits(1), logits(1000))


def mask_generator(method: str, **settings: Any) -> MaskGenerator:
    settings = {"clip.weights": "demo", "classes": "demo", "method": method, **settings}
    return MaskGenerator(settings=settings, device="cpu", offline=True)


@pytest.mark.parametrize("affinity", ["raw", "centred"])
@each_method
def test_masks_made_with_a_network_are_the_same_in_any_batch(
    tmp_path: Path, demo_clip: Clip, method: str, affinity: str
) -> None:
    folder = saved_network(tmp_path / "network", demo_clip, affinity=affinity)
    settings = {"weclip.prior": True} if method == "weclip" else {"excel.affinity": True}
    generator = mask_generator(method, **settings, **{f"{method}.checkpoint": str(folder)})
    scenes = [draw_scene((77, number)) for number in (3, 5)]
    images = [generator.prepare(scene.image, scene.labels) for scene in scenes]
    pixels = torch.stack([image.prepared.pixels for image in images])
    with torch.no_grad():
        together = generator.method.scores(pixels, [image.classes for image in images])
        parts = [generator.method.scores(image.prepared.pixels[None], [image.classes]) for image in images]
    for (alone,), found in zip(parts, together, strict=True):
        assert found.amax() > 0
        assert (alone - found).abs().max() < 1e-5 * max(1, float(found.amax()))


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


REFUSED: dict[str, tuple[Callable[[dict[str, Any], Path], object], str]] = {
    "another CLIP": (
        lambda values, folder: values["network"].update(encoder=str(other_clip(folder / "clip"))),
        r"trained on another CLIP than \S+clip; give the one it was trained on",
    ),
    "a CLIP that is gone": (
        lambda values, folder: values["network"].update(encoder=str(folder / "gone")),
        r"needs its frozen encoder, which can't be had: .*gone",
    ),
    "no digests": (lambda values, folder: values.pop("frozen"), "config.json doesn't say which CLIP"),
    "a digest of nothing": (
        lambda values, folder: values["frozen"].update(clip=None),
        "config.json doesn't say which CLIP",
    ),
    "a digest of a DINOv2 too many": (
        lambda values, folder: values["frozen"].update(dino="0" * 64),
        "another DINOv2 than none",
    ),
    "no such block": (
        lambda values, folder: values["network"]["frozen"].update(last_block=7),
        "frozen.last_block 7: this CLIP has the blocks 0 to 5",
    ),
    "heads that don't divide": (
        lambda values, folder: values["network"]["frozen"].update(heads=5),
        "frozen.width 32 isn't a multiple of network.frozen.heads 5",
    ),
}


def test_a_run_on_masks_does_not_go_on_with_another_clip(
    make_online: Make, root: Path, tmp_path: Path
) -> None:
    """At the same place; a run whose targets are made in training knows it by their fingerprint."""
    folder = other_clip(tmp_path / "clip")
    masks = MaskFolder(root / "SegmentationClass", load_class_set("demo").names, "ground truth")
    config = online_config("weclip", online=OnlineConfig(), network__encoder=str(folder))
    job = replace(make_online("run", config), masks=masks, labels=None, classes=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "Progress", DiesAtFive)
        with pytest.raises(Killed):
            train_seg(job)
    shutil.rmtree(folder)
    other_clip(folder, 0.2)
    with pytest.raises(CheckpointError, match=r"trained on another CLIP than .*clip; give the one"):
        train_seg(job)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_checkpoint_without_the_clip_it_was_trained_on_is_refused(
    tmp_path: Path, demo_clip: Clip, kind: str
) -> None:
    folder = saved_network(tmp_path / "last", demo_clip)
    rewritten(folder, lambda values: values["frozen"].pop("dino"))  # there was none
    assert load_network(folder).class_names == load_class_set("demo").names
    change, message = REFUSED[kind]
    rewritten(folder, lambda values: change(values, tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_clip_that_has_moved_is_found_where_one_says(root: Path, tmp_path: Path, demo_clip: Clip) -> None:
    folder = saved_network(tmp_path / "last", demo_clip)
    arguments = ("--images", root / "JPEGImages", "--checkpoint", folder)
    assert wsss("predict", *arguments, "--out", tmp_path / "before").exit_code == 0
    rewritten(folder, lambda values: values["network"].update(encoder=str(tmp_path / "gone")))
    commands = {
        "predict": ("--out", tmp_path / "after"),
        "evaluate": ("--gt", root / "SegmentationClass"),
        "relabel": ("--cache", tmp_path / "cache"),
    }
    for command, further in commands.items():
        lost = wsss(command, *arguments, *further)
        assert lost.exit_code == 2
        assert lost.stderr.splitlines()[-1].endswith("where CLIP lies elsewhere now, give --clip")
        assert wsss(command, *arguments, *further, "--clip", "demo").exit_code == 0
        other = wsss(command, *arguments, *further, "--clip", other_clip(tmp_path / f"clip-{command}"))
        assert other.exit_code == 2
        assert "another CLIP" in other.stderr
    before, after = (sorted((tmp_path / name / "masks").glob("*.png")) for name in ("before", "after"))
    assert [file.read_bytes() for file in before] == [file.read_bytes() for file in after]
    assert len(after) == 8


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {},
            "trained on other classes than those that masks are to be made of: it knows cat, dog; give these",
        ),
        ({"in_place": True, "last_block": -1, "calibrated_blocks": 2}, "fuses 2 calibrated blocks, and "),
    ],
)
@each_method
def test_a_network_that_does_not_fit_helps_no_masks(
    tmp_path: Path, demo_clip: Clip, method: str, other: dict[str, Any], message: str
) -> None:
    folder = saved_network(tmp_path / "last", demo_clip, **other)
    if not other:
        rewritten(folder, lambda values: values.update(id2label={"0": "background", "1": "cat", "2": "dog"}))
        tensors = load_file(folder / "model.safetensors")
        for name in ("weight", "bias"):
            key = f"model.decoder.classify.{name}"
            tensors[key] = tensors[key][:3].clone()
        save_file(tensors, folder / "model.safetensors")
    generator = mask_generator(method, **{f"{method}.checkpoint": str(folder)})
    with pytest.raises(CheckpointError, match=message) as caught:
        generator(draw_scene((77, 3)).image, ["ball"])
    assert "\n" not in str(caught.value)


@each_method
def test_two_processes_are_one_with_twice_the_batch(
    make_online: Make, root: Path, tmp_path: Path, forks: ForkServer, method: str
) -> None:
    """ExCEL's similarities lose the mean of the whole batch, and gradients go through it."""
    # AdamW divides a gradient by its size, and so makes a step of what is rounding
    helped = {"online__gate_from": 2, "online__guide_from": 3, "online__self_affinity_from": 4}
    config = online_config(method, optimisation__optimizer="sgd", optimisation__lr=0.05, **helped)
    config = changed(config, optimisation__iterations=4, optimisation__warm_up=0, loss__affinity=1.0)
    config = changed(config, network__frozen__dropout=0.0)
    assert method != "excel" or config.network.frozen.affinity_mean == "batch"
    (tmp_path / "two.yaml").write_text(to_yaml(config))
    codes, _, stderr = forks.run_two(
        *("train-seg", "--config", tmp_path / "two.yaml", "--out", tmp_path / "two", "--classes", "demo"),
        *("--images", root / "JPEGImages", "--labels", root / "Annotations"),
        *("--device", "cpu", "--workers", 0, "--offline"),
    )
    assert codes == [0, 0], stderr
    train_seg(make_online("one", changed(config, optimisation__batch=4)))
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    for name in ("loss_segmentation", "loss_affinity"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)
    weights = [load_file(tmp_path / name / "last/model.safetensors") for name in ("one", "two")]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-5


@pytest.mark.usefixtures("make_online")  # its CLIP
@each_method
def test_a_network_that_was_trained_helps_to_make_masks_and_predicts(
    root: Path, tmp_path: Path, method: str
) -> None:
    """And a run that has ended does nothing."""
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for name in ("train_00000.jpg", "train_00001.jpg"):
        shutil.copy(root / "JPEGImages" / name, images)
    labelled = ("--images", images, "--labels", root / "Annotations", "--classes", "demo", "--device", "cpu")
    train = ("train-seg", "--online", method, *labelled, "--out", run, "--workers", 0, "--offline")
    train += ("--iterations", 2, "--batch-size", 2, "--crop", 48, "--set", "network.frozen.width=32")
    for _ in range(2):
        result = wsss(*train)
        assert result.stdout.splitlines()[-1] == str(run / "last"), result.stderr
        assert len(log_of(run)) == 2
    generate = ("generate-masks", "--method", method, *labelled, "--clip", "demo", "--workers", 0)
    sets = [
        Path(wsss(*generate, "--cache", tmp_path / "cache", *more).stdout.splitlines()[-1])
        for more in ((), ("--set", f"{method}.checkpoint={run}"))
    ]
    assert sets[0] != sets[1]
    with MaskCache.open(sets[0]) as alone, MaskCache.open(sets[1]) as helped:
        assert any((alone[image_id].confidence != helped[image_id].confidence).any() for image_id in alone)
    predict = ("predict", "--checkpoint", run, "--images", images, "--out", tmp_path / "found")
    assert wsss(*predict, "--device", "cpu").exit_code == 0
    masks = sorted(path.name for path in (tmp_path / "found" / "masks").iterdir())
    assert masks == ["train_00000.png", "train_00001.png"]


LABELS, CLASSES, ONLINE = ("--labels", "{root}/Annotations"), ("--classes", "demo"), ("--online", "weclip")
TRUTH = ("--gt-masks", "{root}/SegmentationClass", *CLASSES, "--network", "frozen-clip")
MISUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a method that can't": (
        ("--online", "clip-es", *LABELS, *CLASSES),
        "--online clip-es: it makes no targets in training; choose one of excel, weclip, or make masks first",
    ),
    "no such method": (
        ("--online", "weclp", *LABELS, *CLASSES),
        "unknown method 'weclp'; did you mean 'weclip'",
    ),
    "no such preset": (("--online", "weclip/voc", *LABELS, *CLASSES), "unknown preset 'weclip/voc'"),
    "no labels": ((*ONLINE, *CLASSES), "lies in no class folder; give --labels"),
    "labels in another form": (
        (*ONLINE, *CLASSES, *LABELS, "--labels-format", "csv"),
        "a folder is never in the form csv",
    ),
    "a form without labels": (
        (*ONLINE, *CLASSES, "--labels-format", "csv"),
        "--labels-format goes with --labels",
    ),
    "no such labels": ((*ONLINE, *CLASSES, "--labels", "nowhere.json"), "'nowhere.json' can't be read"),
    "no classes": ((*ONLINE, *LABELS), "--online needs classes: give --classes voc12, FILE.yaml or cat,dog"),
    "a cache as well": (
        (*ONLINE, *LABELS, *CLASSES, "--cache", "cache"),
        "give the masks once: --cache DIR, --on",
    ),
    "labels of ground truth": ((*TRUTH, "--encoder", "demo", *LABELS), "--labels is for --online METHOD"),
    "another network": (
        (*ONLINE, *LABELS, *CLASSES, "--network", "segformer"),
        "online.method needs --network frozen-clip, not segformer",
    ),
    "a crop between two patches": (
        (*ONLINE, *LABELS, *CLASSES, "--crop", "50"),
        "--crop 50 isn't a multiple of 8, the patch of this CLIP; 48 is",
    ),
    "such a crop of ground truth": (
        (*TRUTH, "--encoder", "demo", "--crop", "50"),
        "--crop 50 isn't a multiple of 8, the patch of this CLIP; 48 is",
    ),
    "another pass of CLIP": (
        (*ONLINE, *LABELS, *CLASSES, "--set", "network.frozen.in_place=true"),
        "network.frozen.in_place fuses 5 calibrated blocks, and weclip has none: give a method with as many",
    ),
    "no CLIP": (TRUTH, "--network frozen-clip needs a CLIP: give --encoder"),
    "no such CLIP": (
        (*ONLINE, *LABELS, *CLASSES, "--encoder", "./no-clip"),
        "CLIP weights ./no-clip don't exist; give a folder",
    ),
    "no such block": (
        (*ONLINE, *LABELS, *CLASSES, "--set", "network.frozen.last_block=9"),
        "network.frozen.last_block 9: this CLIP has the blocks 0 to 5",
    ),
    "no such setting": (
        (*ONLINE, *LABELS, *CLASSES, "--set", "online.settings=[weclip.treshold=1]"),
        "online.settings weclip.treshold=1: unknown key 'weclip.treshold'; did you mean 'weclip.threshold'?",
    ),
    "a checkpoint's help": (
        (*ONLINE, *LABELS, *CLASSES, "--set", "online.settings=[weclip.checkpoint=run]"),
        "online.settings: no checkpoint helps in training, the network itself does; leave it out",
    ),
    "help without targets": (
        (*TRUTH, "--encoder", "demo", "--set", "online.override_from=1"),
        "online.override_from is for targets that are made in training: give --online METHOD",
    ),
}


@pytest.mark.usefixtures("make_online")  # its CLIP
@pytest.mark.parametrize("kind", MISUSED)
def test_what_cannot_be_trained_is_one_line(root: Path, tmp_path: Path, kind: str) -> None:
    arguments, message = MISUSED[kind]
    given = [argument.format(root=root) for argument in arguments]
    common = ("--images", root / "JPEGImages", "--out", tmp_path / "run", "--device", "cpu", "--workers", 0)
    result = wsss("train-seg", *given, *common, "--iterations", 1, "--offline")
    assert result.exit_code == 2
    assert message in only_error(result.stderr)
    assert not result.stdout
    assert not (tmp_path / "run" / "last").exists()
