"""Every setting of a training run does what it is there for, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.segmentation.conftest import changed, loaded_once, online_config, other_clip
from tests.segmentation.test_dino import write_dino
from wsss_pipeline.config import fields
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.masks import MaskFolder, PseudoMask
from wsss_pipeline.errors import ConfigError
from wsss_pipeline.pseudo_masks import generator as generator_module
from wsss_pipeline.segmentation import networks as networks_module
from wsss_pipeline.segmentation.augmentation import Augmentation
from wsss_pipeline.segmentation.checkpoint import TrainingState
from wsss_pipeline.segmentation.dataset import SegmentationDataset
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import OnlineConfig, TrainConfig, load_train_config
from wsss_pipeline.segmentation.trainer import Trainer
from wsss_pipeline.stages.train_seg import TrainJob, train_seg

NAMES = tuple(f"class {value}" for value in range(1, 11))
CONFIG = TrainConfig.model_validate(
    {
        "network": {"name": "segformer", "encoder": "tiny", "weights": "none"},
        "augmentation": {"crop": 32},
        "optimisation": {"lr": 0.01, "iterations": 3, "batch": 2},
        "precision": "fp32",
    }
)

# at ten times this rate the second update is no number, with some numbers of threads
DECODER = {"network__name": "unet", "network__encoder": "mobilenet_v2", "optimisation__lr": 0.001}
LEARNT = {"loss", "trained", "kept"}
# key -> another value, and what has to change; all else has to stay
ROWS: dict[str, tuple[Any, set[str]]] = {
    "version": (2, set()),
    "images.pixel_range": ((0, 40_000), set()),  # these images have 8 bits; others stand in end_to_end
    "network.name": ("linknet", {"architecture", *LEARNT}),
    "network.encoder": ("mit-b0", {"architecture", *LEARNT}),
    "network.weights": ("{weights}", LEARNT),
    "loss.confidence": ("soft", LEARNT),
    "loss.min_confidence": (0.5, LEARNT),
    "loss.keep": (0.9, LEARNT),
    "loss.balanced": (True, LEARNT),
    "augmentation.crop": (48, LEARNT),
    "augmentation.scale_min": (1.25, LEARNT),
    "augmentation.scale_max": (0.75, LEARNT),
    "augmentation.flip": (False, {"trained", "kept"}),  # the first two crops aren't flipped
    "augmentation.photometric": (False, LEARNT),
    "optimisation.optimizer": ("adamw", {"trained", "kept"}),
    "optimisation.lr": (0.02, {"rates", "trained", "kept"}),
    "optimisation.momentum": (0.5, {"trained", "kept"}),
    "optimisation.weight_decay": (0.1, {"trained", "kept"}),
    "optimisation.head_lr_factor": (1.0, {"trained", "kept"}),
    "optimisation.schedule": ("cosine", {"rates", "trained", "kept"}),
    "optimisation.power": (0.5, {"rates", "trained", "kept"}),
    "optimisation.warm_up": (2, {"rates", "trained", "kept"}),
    "optimisation.iterations": (2, {"rates", "trained", "kept"}),
    "optimisation.batch": (3, {"images", *LEARNT}),
    "optimisation.accumulate": (2, {"images", *LEARNT}),
    "optimisation.clip_norm": (0.01, {"trained", "kept"}),
    "optimisation.ema": (0.9, {"kept"}),
    "precision": ("bf16", LEARNT),
    "seed": (1, LEARNT),
    "max_unusable": (0.5, set()),  # see test_a_training_that_sees_too_little_stops
    "validate_every": (2, {"validated"}),
    "save_every": (2, {"saved"}),
}

AFTER = {"second loss", "trained", "kept"}  # of what helps from the second update on
ALL = {"loss", *AFTER}
IN_PLACE = {"network__frozen__in_place": True}
SURE = {"online__override_from": 2, "online__override_above": 0.0}
WEAKCLIP = {
    "network__name": "weakclip",
    "network__weakclip__width": 32,
    "network__weakclip__channels": 32,
    "loss__affinity": 0.0,
}
OPENCV = {"augmentation__style": "opencv"}
LEARNING_CLIP = {**WEAKCLIP, "network__weakclip__clip": "published"}


@dataclass(frozen=True)
class Row:
    """Another value of a setting of networks on a frozen CLIP.

    Attributes:
        base: the method whose targets it learns from, or ``masks`` for those of a folder.
        value: another value.
        changes: what has to change; all else has to stay.
        given: settings under which that is so.
    """

    base: str
    value: Any
    changes: set[str]
    given: Mapping[str, Any] = field(default_factory=dict)


FROZEN_ROWS: dict[str, list[Row]] = {
    "network.encoder": [Row("weclip", "{clip}", ALL)],
    "network.frozen.first_block": [Row("weclip", 2, {"architecture", *ALL})],
    "network.frozen.last_block": [Row("weclip", -3, {"architecture", *ALL})],
    "network.frozen.in_place": [Row("excel", True, ALL), Row("masks", True, ALL)],
    "network.frozen.calibrated_blocks": [Row("masks", 3, ALL, IN_PLACE), Row("masks", 3, set())],
    "network.frozen.width": [Row("weclip", 24, {"architecture", *ALL})],
    "network.frozen.heads": [Row("weclip", 2, ALL)],
    "network.frozen.depth": [Row("weclip", 2, {"architecture", *ALL})],
    "network.frozen.dropout": [Row("weclip", 0.5, ALL)],
    "network.frozen.affinity": [Row("weclip", "centred", ALL)],
    "network.frozen.affinity_mean": [Row("excel", "image", ALL), Row("weclip", "image", set())],
    "network.weakclip.clip": [Row("masks", "published", {"architecture", *ALL}, WEAKCLIP)],
    "network.weakclip.adapter": [Row("masks", "published", AFTER, WEAKCLIP)],
    "network.weakclip.coattention": [Row("masks", "stacked", {"architecture", *ALL}, WEAKCLIP)],
    # nothing to the demo's CLIP, or too little for every loss: see test_weakclip_reference.py, test_weakclip.py
    "network.weakclip.positions": [],
    "network.weakclip.heads": [],
    "network.weakclip.edges": [],  # of no crop, see test_weakclip_masks.py
    "network.weakclip.contexts": [Row("masks", 4, {"architecture", *ALL}, WEAKCLIP)],
    "network.weakclip.width": [Row("masks", 24, {"architecture", *ALL}, WEAKCLIP)],
    "network.weakclip.channels": [Row("masks", 24, {"architecture", *ALL}, WEAKCLIP)],
    "network.weakclip.dropout": [Row("masks", 0.5, ALL, WEAKCLIP)],
    "network.weakclip.stochastic_depth": [
        Row("masks", 0.5, ALL, LEARNING_CLIP),
        Row("masks", 0.5, set(), WEAKCLIP),
    ],
    "online.method": [Row("weclip", "excel", ALL)],
    "online.settings": [Row("weclip", ("weclip.threshold=0.9",), ALL)],
    "online.gate_from": [Row("weclip", 2, AFTER), Row("excel", 2, AFTER)],
    "online.guide_from": [Row("excel", 2, AFTER)],
    "online.self_affinity_from": [
        Row("weclip", 2, AFTER),
        Row("weclip", 2, set(), {"loss__affinity": 0.0}),
    ],
    "online.override_from": [Row("weclip", 2, AFTER, {"online__override_above": 0.0})],
    "online.override_above": [Row("weclip", 1.0, AFTER, SURE), Row("weclip", 1.0, set())],
    "loss.affinity": [Row("weclip", 0.5, ALL), Row("masks", 0.5, ALL)],
    "loss.affinity_radius": [Row("weclip", 1, ALL), Row("weclip", 1, set(), {"loss__affinity": 0.0})],
    "loss.dice": [Row("weclip", 1.0, ALL)],
    "loss.cross": [Row("weclip", 0.5, ALL, {"network__frozen__dino": "{dino}"})],
    "network.frozen.dino": [Row("weclip", "{dino}", {"architecture", *ALL})],
    "loss.segmentation": [Row("masks", 0.5, ALL)],
    "loss.seeding": [Row("masks", 1.0, ALL)],
    "loss.boundary": [Row("masks", 1.0, ALL)],
    "loss.score": [Row("masks", 0.5, ALL, WEAKCLIP)],
    "loss.grid": [Row("masks", 16, ALL, {"loss__seeding": 1.0}), Row("masks", 16, set())],
    "loss.restrict_to_labels": [
        Row("weclip", True, ALL, {"loss__boundary": 1.0}),
        Row("masks", True, set(), {"loss__boundary": 1.0}),  # whose labels aren't known
    ],
    "augmentation.style": [Row("masks", "opencv", ALL)],
    "augmentation.short_side": [Row("masks", 128, ALL, OPENCV), Row("masks", 128, set())],
    "augmentation.long_side": [Row("masks", 600, ALL, OPENCV), Row("masks", 600, set())],
    "augmentation.largest_share": [Row("masks", 0.0, ALL, OPENCV), Row("masks", 0.0, set())],
    "optimisation.min_lr": [
        Row("masks", 0.01, {"rates", "trained", "kept"}, {"optimisation__schedule": "cosine-total"})
    ],
    "optimisation.schedule": [
        Row("weclip", "poly-total", {"rates", *AFTER}, {"optimisation__warm_up": 1}),
        Row("weclip", "poly-total", set()),
        Row("masks", "cosine-total", {"rates", "trained", "kept"}),
    ],
}


class Unsure(MaskFolder):
    """Ground truth, more and less certain by rows and columns, and without label in the lower left corner."""

    def __getitem__(self, image_id: str) -> PseudoMask:
        mask = super().__getitem__(image_id).mask.copy()
        confidence = np.full_like(mask, 198)
        confidence[:, ::2] = 190
        confidence[::2] = 150
        mask[-20:, :20] = 255
        return PseudoMask(mask, confidence)


Observe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def observe(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observe]:
    """Trains and says what can be seen of a run: numbers, weights and files."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "val.txt").write_text("train_00003\n")
    saved: list[int] = []
    save = TrainingState.save

    def observed(base: str = "", **values: Any) -> dict[str, Any]:
        masks: Unsure | None = Unsure(root / "SegmentationClass", NAMES)
        # some pixels lie below this threshold, so that kind of loss, threshold and share all matter
        config = changed(CONFIG, loss__confidence="hard", loss__min_confidence=0.95)
        more: dict[str, Any] = {"val_gt": root / "SegmentationClass", "val_split": folder / "val.txt"}
        if base:
            start = {
                "optimisation__iterations": 2,
                "optimisation__warm_up": 0,
                "optimisation__clip_norm": 0.0,
            }
            never = {"online__gate_from": 0, "online__guide_from": 0, "online__self_affinity_from": 0}
            method = "weclip" if base == "masks" else base
            config, more = online_config(method, **start, **never), {}
        if base == "masks":
            config = changed(config, online=OnlineConfig())
        elif base:
            masks, more = None, {"labels": root / "Annotations", "classes": "demo"}
        config = changed(config, **values)
        job = TrainJob(root / "JPEGImages", masks, folder / "run", config, device="cpu", workers=0, **more)
        saved.clear()
        train_seg(replace(job, overwrite=True))
        log = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
        trained = load_file(job.out / "state/network.safetensors")
        return {
            "loss": log[0]["loss"],
            **({"second loss": log[1]["loss"]} if base else {}),
            "rates": [line["lr"] for line in log],
            "images": {line["images"] for line in log},
            "validated": [line["step"] for line in log[:-1] if "miou" in line],
            "saved": saved[:-1],
            "architecture": {name: value.shape for name, value in trained.items()},
            "trained": _digest(trained),
            "kept": _digest(load_file(job.out / "last/model.safetensors")),
            "config": (job.out / "config.yaml").read_text(),
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_module, "load_clip", lambda files, device: loaded_once(files))
        patch.setattr(networks_module, "load_clip", lambda files, device: loaded_once(files))
        patch.setattr(
            TrainingState, "save", lambda state, folder: saved.append(state.step) or save(state, folder)
        )
        yield observed


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for value in tensors.values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def plain(observe: Observe) -> dict[str, Any]:
    return observe()


def test_every_setting_has_a_row() -> None:
    keys = [key for key, _, _ in fields(TrainConfig)]
    assert [key for key in keys if key in ROWS] == list(ROWS)
    assert set(keys) == ROWS.keys() | FROZEN_ROWS.keys()


@pytest.mark.parametrize("key", ROWS)
def test_a_setting_changes_what_it_should_and_nothing_else(
    observe: Observe, plain: dict[str, Any], tmp_path: Path, key: str
) -> None:
    value, expected = ROWS[key]
    if key == "network.weights":
        torch.manual_seed(7)
        donor = build_network(CONFIG.network, 11).encoder().state_dict()
        save_file(donor, tmp_path / "donor.safetensors")
        value = str(tmp_path / "donor.safetensors")
    common = DECODER if key == "network.name" else {}
    before = observe(**common) if common else plain
    after = observe(**{**common, key.replace(".", "__"): value})
    assert sorted(name for name in before if before[name] != after[name]) == sorted({*expected, "config"})


@pytest.fixture(scope="module")
def plain_frozen(observe: Observe) -> Callable[..., dict[str, Any]]:
    """What can be seen of a run under some settings, looked at once."""
    return cache(lambda base, given: observe(base, **dict(given)))


@pytest.mark.parametrize(
    ("key", "row"),
    [
        pytest.param(key, row, id=f"{key}-{number}")
        for key, rows in FROZEN_ROWS.items()
        for number, row in enumerate(rows)
    ],
)
def test_a_setting_of_networks_on_a_frozen_clip_changes_what_it_should(
    observe: Observe, plain_frozen: Callable[..., dict[str, Any]], tmp_path: Path, key: str, row: Row
) -> None:
    made: dict[Any, Callable[[Path], Path]] = {"{clip}": other_clip, "{dino}": write_dino}

    def filled(value: Any) -> Any:
        return str(made[value](tmp_path / value[1:-1])) if value in made else value

    given = {name: filled(value) for name, value in row.given.items()}
    before = plain_frozen(row.base, tuple(given.items()))
    after = observe(row.base, **{**given, key.replace(".", "__"): filled(row.value)})
    assert sorted(name for name in before if before[name] != after[name]) == sorted({*row.changes, "config"})


def test_scales_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--set .*: 'augmentation': scale_min is larger than scale_max$"):
        load_train_config(overrides=["augmentation.scale_min=2"])


class ByPixel(SegmentationNetwork):
    """A class for each pixel's colour alone, so that an update can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Conv2d(3, 11, 1)


@dataclass(frozen=True)
class Kept:
    """Weights at one update."""

    network: Tensor
    average: Tensor | None


@pytest.fixture
def weights_after(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Kept]]:
    """The weights at the beginning and after each update of plain gradient descent on whole, certain masks."""
    updates: list[Kept] = []

    def flat(module: nn.Module) -> Tensor:
        return torch.cat([value.detach().flatten() for value in module.parameters()])

    def keep(state: TrainingState, folder: Path) -> None:
        updates.append(Kept(flat(state.network), None if state.average is None else flat(state.average)))

    monkeypatch.setattr(TrainingState, "save", keep)

    def weights(**values: Any) -> list[Kept]:
        plain = {"head_lr_factor": 1.0, "momentum": 0.0, "weight_decay": 0.0}
        settings = {f"optimisation__{name}": value for name, value in {**plain, **values}.items()}
        config = changed(
            CONFIG, save_every=1, augmentation__scale_min=1.0, augmentation__scale_max=1.0, **settings
        )
        torch.manual_seed(0)
        network = ByPixel()
        updates[:] = [Kept(flat(network), None)]
        (tmp_path / "run").mkdir(exist_ok=True)
        masks = MaskFolder(root / "SegmentationClass", NAMES)
        images = find_images(root / "JPEGImages")
        augmentation = Augmentation(config.augmentation, network.image_mean, network.image_std)
        dataset = SegmentationDataset(images, masks, list(images), augmentation, 0)
        Trainer(Accelerator(cpu=True), config, network, dataset, tmp_path / "run").run()
        return list(updates)

    return weights


def test_an_update_of_several_parts_is_that_of_the_whole(weights_after: Callable[..., list[Kept]]) -> None:
    whole = weights_after(batch=4, accumulate=1, iterations=1)
    parts = weights_after(batch=1, accumulate=4, iterations=1)
    assert not torch.allclose(whole[1].network, whole[0].network)
    assert torch.allclose(parts[1].network, whole[1].network, atol=1e-7)


def test_a_gradient_is_no_longer_than_its_limit(weights_after: Callable[..., list[Kept]]) -> None:
    free, clipped = (weights_after(lr=1.0, clip_norm=limit, iterations=1) for limit in (0.0, 0.01))
    lengths = [float((run[1].network - run[0].network).norm()) for run in (free, clipped)]
    assert lengths[0] > 0.02
    assert lengths[1] == pytest.approx(0.01, rel=1e-3)


def test_the_average_keeps_the_decays_share_of_what_it_was(weights_after: Callable[..., list[Kept]]) -> None:
    _, first, second, third = weights_after(lr=1.0, ema=0.75, iterations=3)
    assert first.average is not None
    expected = first.network
    assert torch.allclose(first.average[-len(expected) :], expected)
    for update in (second, third):
        assert update.average is not None
        expected = 0.75 * expected + 0.25 * update.network
        assert torch.allclose(update.average[-len(expected) :], expected, atol=1e-6)
        assert not torch.allclose(update.network, expected, atol=1e-4)
