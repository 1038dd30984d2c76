"""A network's masks as a mask set: what they are, what determines them, and when they are made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from wsss_pipeline.cache import MaskCache, PseudoMask, finished
from wsss_pipeline.config import RelabelConfig, fields, resolve
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.images import read_image
from wsss_pipeline.data.transforms import PixelStatistics, normalise
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.errors import ConfigError, LabelError
from wsss_pipeline.pseudo_masks.report import MISSING
from wsss_pipeline.pseudo_masks.run import _Run
from wsss_pipeline.refine import DenseCrf, Par
from wsss_pipeline.refine.dense_crf import has_pydensecrf
from wsss_pipeline.segmentation.checkpoint import load_network, save_network
from wsss_pipeline.segmentation.inference import Segmenter
from wsss_pipeline.segmentation.networks import SegFormer, build_network
from wsss_pipeline.segmentation.train_config import NetworkConfig
from wsss_pipeline.stages.relabel import RelabelJob, relabel

DEMO = load_class_set("demo").names
SEGFORMER = NetworkConfig(name="segformer", encoder="tiny", weights="none")
IDS = [f"train_0000{number}" for number in range(4)]
EMPTY = IDS[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images/`` of four scenes, ``labels.json``, the last of them empty, and ``run/``, which is sure of much."""
    folder = tmp_path_factory.mktemp("root")
    write_voc_folder(folder, seed=5, scenes={"train": len(IDS)}, size=(64, 48))
    (folder / "JPEGImages").rename(folder / "images")
    labels = {image_id: [DEMO[number], DEMO[9 - number]] for number, image_id in enumerate(IDS)}
    (folder / "labels.json").write_text(json.dumps({**labels, EMPTY: []}))
    save_network(untrained(0), folder / "run" / "best", SEGFORMER, DEMO)
    return folder


def untrained(seed: int, sureness: float = 30.0) -> SegFormer:
    torch.manual_seed(seed)
    network = build_network(SEGFORMER, 1 + len(DEMO)).eval()
    assert isinstance(network, SegFormer)
    with torch.no_grad():
        network.model.decode_head.classifier.weight *= sureness
    return network


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run: what torch adds up in two threads differs in the last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**values: Any) -> RelabelConfig:
    keys = {key.replace("__", "."): value for key, value in values.items()}
    return resolve(RelabelConfig, [("test", keys)])


def job(root: Path, cache: Path, **changes: Any) -> RelabelJob:
    """Of the whole small world, with its labels."""
    given = {"labels": root / "labels.json", "device": "cpu", "config": config(refine="none"), **changes}
    return RelabelJob.read(root / "run", root / "images", cache, **given)


def made(job: RelabelJob) -> dict[str, PseudoMask]:
    report = relabel(job)
    assert not report.failed, report.failed
    with MaskCache.open(report.path) as cache:
        return {image_id: cache[image_id] for image_id in cache}


def labels_of(root: Path) -> dict[str, list[str]]:
    labels: dict[str, list[str]] = json.loads((root / "labels.json").read_text())
    return labels


def same(one: PseudoMask, other: PseudoMask) -> bool:
    return np.array_equal(one.mask, other.mask) and np.array_equal(one.confidence, other.confidence)


@pytest.mark.parametrize("refine", ["none", "crf", "par"])
def test_without_labels_the_masks_are_the_segmenters(root: Path, tmp_path: Path, refine: str) -> None:
    settings = config(inference={"scales": (0.5, 1.0), "flip": True}, refine=refine)
    refiner = {"none": None, "crf": DenseCrf(settings.crf), "par": Par(settings.par)}[refine]
    segmenter = Segmenter(untrained(0), DEMO, inference=settings.inference, refiner=refiner)
    found = made(job(root, tmp_path, labels=None, config=settings))
    assert list(found) == IDS
    for image_id, record in found.items():
        assert same(record, segmenter(root / "images" / f"{image_id}.jpg"))
        assert record.labels == tuple(DEMO[value - 1] for value in np.unique(record.mask) if value)
    assert any(record.labels for record in found.values())


@pytest.mark.parametrize("refine", ["none", "crf", "par"])
def test_with_labels_a_mask_has_no_other_class(root: Path, tmp_path: Path, refine: str) -> None:
    found, labels = made(job(root, tmp_path, config=config(refine=refine))), labels_of(root)
    for image_id, record in found.items():
        assert record.labels == tuple(labels[image_id])
        allowed = {0, *(1 + DEMO.index(name) for name in labels[image_id])}
        assert set(np.unique(record.mask).tolist()) <= allowed
    assert any(record.mask.any() for record in found.values())
    assert not found[EMPTY].mask.any()
    assert (found[EMPTY].confidence == 200).all()


def test_the_confidence_is_that_among_background_and_the_labels(root: Path, tmp_path: Path) -> None:
    record = made(job(root, tmp_path))[IDS[0]]
    image = read_image(root / "images" / f"{IDS[0]}.jpg")
    values = [0, 1, 10]
    network = untrained(0)
    statistics = PixelStatistics(network.image_mean, network.image_std)  # type: ignore[arg-type]
    with torch.no_grad():
        probabilities = network(normalise(image, statistics)[None])[0].softmax(dim=0)
    kept = probabilities[values].numpy().astype(np.float64)
    assert kept.sum(axis=0).min() < 0.5, "much was given to classes that aren't there"
    kept /= kept.sum(axis=0)
    assert np.array_equal(record.mask, np.array(values)[kept.argmax(axis=0)])
    off = kept.max(axis=0) * 200 - record.confidence
    assert off.min() > -1e-3, "rounded down"
    assert off.max() < 1 + 1e-3


def test_where_the_network_rules_all_labels_out_the_background_stays() -> None:
    """Their probabilities are 0 to float32, and so is their sum."""
    network = untrained(0)
    network.logits = (
        lambda images: torch.tensor([0.0, 500.0, 0.0])[None, :, None, None].expand(  # type: ignore[method-assign]
            1, 3, *images.shape[-2:]
        )
    )
    record = Segmenter(network, ["cat", "dog"])(np.zeros((8, 8, 3), np.uint8), classes=[2])
    assert not record.mask.any()
    assert (record.confidence == 100).all()


def test_any_class_takes_from_the_labels_which_images_to_do(root: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({IDS[0]: [DEMO[3]], EMPTY: []}))
    found = made(job(root, tmp_path / "cache", labels=tmp_path / "labels.json", any_class=True))
    assert list(found) == [IDS[0], EMPTY]
    assert found[EMPTY].mask.any()
    report = relabel(job(root, tmp_path / "cache", labels=None))
    assert (report.reused, report.computed, report.unlabelled) == (2, 2, 0)
    report = relabel(job(root, tmp_path / "cache", labels=root / "labels.json", any_class=True))
    assert (report.reused, report.computed) == (4, 0)


def test_a_split_says_which_images(root: Path, tmp_path: Path) -> None:
    split = tmp_path / "ids.txt"
    split.write_text(f"images/{IDS[2]}.jpg\ngone\n")
    for labels, failed in ((root / "labels.json", {}), (None, {"gone": MISSING})):
        report = relabel(job(root, tmp_path / "cache", labels=labels, split=split))
        assert (report.computed, report.failed, report.unlabelled) == (1, failed, 0)


def identity_and_mask(job: RelabelJob) -> tuple[str, PseudoMask]:
    """Of the first scene, in 16 bits a channel, without a cache."""
    maker = job.maker()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "scene.png"
        assert cv2.imwrite(str(file), read_image(job.images[IDS[0]])[..., ::-1].astype(np.uint16) * 257)
        image = maker.prepare(read_image(file, maker.pixel_range), job.labels[IDS[0]])
    return maker.mask_set.fingerprint, maker.generate([image], False)[0].wait()[0]


LOOKS = {"inference.scales": (0.5, 1.0)}
CRF, PAR = {"refine": "crf"}, {"refine": "par"}
# another value of each setting, and those under which it means something
ROWS: dict[str, tuple[Any, Mapping[str, Any]]] = {
    "inference.scales": ((0.5, 1.0), {}),
    "inference.flip": (True, {}),
    "inference.window": (32, {}),
    "inference.window_stride": (10, {"inference.window": 32}),
    "inference.short_side": (60, {}),
    "inference.long_side": (64, {"inference.short_side": 60}),
    "inference.winners_only": (True, CRF),
    "inference.pixel_range": ((0, 30_000), {}),
    "inference.combine": ("max", LOOKS),
    "precision": ("bf16", {}),
    "refine": ("crf", {}),
    "crf.backend": ("none", {"refine": "auto"}),
    "crf.image": ("reference", CRF),
    "crf.half_scores": (False, CRF),
    "crf.iterations": (2, CRF),
    "crf.gaussian_sxy": (3.0, CRF),
    "crf.gaussian_weight": (20.0, CRF),
    "crf.bilateral_sxy": (9.0, CRF),
    "crf.bilateral_srgb": (30.0, CRF),
    "crf.bilateral_weight": (1.0, CRF),
    "par.iterations": (3, PAR),
    "par.dilations": ((1, 2), PAR),
    "par.width": (1.0, PAR),
    "par.distance_weight": (1.0, PAR),
    "confidence": ("margin", {}),
}


# what the settings of a row alone make, found once
PLAIN: dict[str, tuple[str, PseudoMask]] = {}


def test_every_setting_has_a_row() -> None:
    assert {key for key, _, _ in fields(RelabelConfig)} == set(ROWS)


@pytest.mark.parametrize("key", ROWS)
def test_a_setting_changes_masks_and_fingerprint(root: Path, tmp_path: Path, key: str) -> None:
    value, given = ROWS[key]
    before = {"refine": "none", **given}

    def found(values: Mapping[str, Any]) -> tuple[str, PseudoMask]:
        return identity_and_mask(job(root, tmp_path, config=resolve(RelabelConfig, [("test", values)])))

    known = str(before)
    if known not in PLAIN:
        PLAIN[known] = found(before)
    plain, other = PLAIN[known], found({**before, key: value})
    assert plain[0] != other[0]
    assert not same(plain[1], other[1])


def test_a_confidence_by_the_networks_own_scores_leaves_the_mask(root: Path, tmp_path: Path) -> None:
    found = {
        kind: identity_and_mask(job(root, tmp_path, config=config(refine="crf", confidence=kind)))
        for kind in ("posterior", "margin", "product")
    }
    assert len({fingerprint for fingerprint, _ in found.values()}) == 3
    determinants = job(root, tmp_path).maker().mask_set.determinants
    assert "confidence" not in determinants, "sets of before there was a choice keep their fingerprint"
    masks = [record for _, record in found.values()]
    assert all(np.array_equal(record.mask, masks[0].mask) for record in masks)
    assert len({record.confidence.tobytes() for record in masks}) == 3


def test_what_means_nothing_changes_neither(root: Path, tmp_path: Path) -> None:
    """Settings of what is switched off, and how a single look is combined."""
    plain = identity_and_mask(job(root, tmp_path))
    unused = {"crf.iterations": 3, "par.iterations": 3, "inference.combine": "max", "inference.long_side": 99}
    for key, value in unused.items():
        values = {"refine": "none", key: value}
        other = identity_and_mask(job(root, tmp_path, config=resolve(RelabelConfig, [("test", values)])))
        assert plain[0] == other[0], key
        assert same(plain[1], other[1]), key


def test_restriction_weights_and_class_names_are_part_of_the_fingerprint(root: Path, tmp_path: Path) -> None:
    plain, restricted = (
        identity_and_mask(job(root, tmp_path, labels=labels)) for labels in (None, root / "labels.json")
    )
    assert plain[0] != restricted[0]
    assert not same(plain[1], restricted[1])
    other = untrained(0)
    with torch.no_grad():
        other.model.decode_head.classifier.bias[4] += 5
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    save_network(other, copy / "run" / "best", SEGFORMER, DEMO)
    found = identity_and_mask(job(copy, tmp_path, labels=None))
    assert found[0] != plain[0]
    assert not same(found[1], plain[1])
    save_network(untrained(0), copy / "run" / "best", SEGFORMER, ("globe", *DEMO[1:]))
    assert identity_and_mask(job(copy, tmp_path, labels=None))[0] != plain[0]


def test_paths_and_what_training_began_from_are_no_part_of_it(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    shutil.move(copy / "run" / "best", copy / "run" / "last")
    (copy / "images" / f"{IDS[1]}.jpg").unlink()
    file = copy / "run" / "last" / "config.json"
    content = json.loads(file.read_text())
    content["network"]["weights"] = "imagenet"
    file.write_text(json.dumps(content))
    (copy / "labels.csv").write_text(f"image,labels\n{IDS[0]},{DEMO[0]};{DEMO[9]}\n")
    one = job(root, tmp_path / "one")
    other = job(copy, tmp_path / "other", labels=copy / "labels.csv", classes="demo")
    assert one.maker().mask_set.folder_name == other.maker().mask_set.folder_name
    assert one.maker().mask_set.folder_name.startswith("relabel-")


def test_it_goes_on_where_it_stopped_and_redoes_what_changed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "SETTLED_NS", 0)
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    first = relabel(replace(job(copy, tmp_path / "cache"), limit=2))
    assert (first.computed, first.reused) == (2, 0)
    second = relabel(replace(job(copy, tmp_path / "cache"), workers=2))
    assert (second.computed, second.reused, second.path) == (2, 2, first.path)
    assert relabel(job(copy, tmp_path / "cache")).reused == 4
    labels = labels_of(copy)
    (copy / "labels.json").write_text(json.dumps({**labels, IDS[1]: [DEMO[5]]}))
    shutil.copy(copy / "images" / f"{IDS[0]}.jpg", copy / "images" / f"{IDS[2]}.jpg")
    third = relabel(job(copy, tmp_path / "cache"))
    assert (third.computed, third.reused) == (2, 2)
    assert relabel(replace(job(copy, tmp_path / "cache"), overwrite=True)).computed == 4
    with MaskCache.open(first.path) as cache:
        assert cache[IDS[1]].labels == (DEMO[5],)
        assert cache.manifest.completion.complete


def test_of_any_class_the_labels_in_the_record_do_not_count(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "SETTLED_NS", 0)  # so that files which have just been written are believed
    free = job(root, tmp_path, labels=None)
    assert relabel(free).computed == 4
    with monkeypatch.context() as patch:
        patch.setattr(finished, "image_digest", lambda file: pytest.fail("read again"))
        assert relabel(free).reused == 4
    assert relabel(replace(free, check_bytes=True)).reused == 4
    (file,) = tmp_path.glob("*/known-*.json")
    file.unlink()
    assert relabel(free).reused == 4


def test_shares_make_what_one_run_makes(root: Path, tmp_path: Path) -> None:
    from wsss_pipeline.runtime.share import Share

    whole = made(job(root, tmp_path / "one"))
    for index in range(2):
        parts = made(replace(job(root, tmp_path / "two"), share=Share(index, 2)))
    assert set(parts) == set(whole)
    assert all(same(parts[image_id], whole[image_id]) for image_id in whole)


@pytest.mark.parametrize("way", ["threads", "as on a GPU"])
def test_an_image_that_cannot_be_done_costs_itself_alone(
    root: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One can't be read; of the other the network makes no number; for a third memory runs out."""
    if way != "threads":
        monkeypatch.setattr(_Run, "_one_by_one", _Run._in_batches)
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    (copy / "images" / f"{IDS[0]}.jpg").write_bytes(b"no image")
    logits, looks = SegFormer.logits, iter(range(9))

    def failing(network: SegFormer, images: torch.Tensor) -> torch.Tensor:
        match next(looks):
            case 0:
                return logits(network, images) * torch.nan
            case 1:
                raise MemoryError
        return logits(network, images)

    monkeypatch.setattr(SegFormer, "logits", failing)
    report = relabel(job(copy, tmp_path / "cache", labels=None))
    assert list(report.failed) == IDS[:3]
    assert "can't be read" in report.failed[IDS[0]]
    assert "not a pseudo mask" in report.failed[IDS[1]]
    assert "--window" in report.failed[IDS[2]]
    assert report.computed == 1


def test_what_does_not_go_together_is_refused(root: Path, tmp_path: Path) -> None:
    for changes, text in (
        ({"labels": None, "any_class": True}, "--any-class goes with --labels"),
        ({"labels": None, "classes": "demo"}, "--classes goes with --labels"),
        ({"classes": "cat,dog"}, "aren't the classes of the network"),
        ({"config": config(refine="crf", crf={"backend": "none"})}, "contradict each other"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"config": config(precision="fp16")}, "--precision fp16 is for GPUs"),
    ):
        with pytest.raises(ConfigError, match=text):
            job(root, tmp_path / "cache", **changes)
    (tmp_path / "labels.json").write_text(json.dumps({IDS[0]: ["bal"]}))
    with pytest.raises(LabelError, match="did you mean 'ball'"):
        job(root, tmp_path / "cache", labels=tmp_path / "labels.json")
    assert not (tmp_path / "cache").exists()


def test_labels_may_use_the_aliases_of_a_built_in_class_set(root: Path, tmp_path: Path) -> None:
    names = load_class_set("voc12").names
    torch.manual_seed(0)
    save_network(build_network(SEGFORMER, 21), tmp_path / "run" / "best", SEGFORMER, names)
    (tmp_path / "labels.json").write_text(json.dumps({IDS[0]: ["tv"]}))
    (tmp_path / "images").symlink_to(root / "images")
    assert job(tmp_path, tmp_path / "cache").labels == {IDS[0]: ("tvmonitor",)}


@pytest.mark.skipif(not has_pydensecrf(), reason="pydensecrf isn't installed")
def test_another_backend_of_the_crf_is_another_mask_set(root: Path, tmp_path: Path) -> None:
    sets = {
        job(root, tmp_path, config=config(refine="crf", crf={"backend": backend}))
        .maker()
        .mask_set.fingerprint
        for backend in ("lattice", "pydensecrf", "auto")
    }
    assert len(sets) == 2


def test_the_network_that_is_loaded_is_the_one_that_was_saved(root: Path) -> None:
    """What the other tests take for granted."""
    loaded = load_network(root / "run").network.state_dict()
    assert all(torch.equal(loaded[name], values) for name, values in untrained(0).state_dict().items())
