"""What reading and augmenting from disk costs a training update, as a ratio.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/data_loading.py [--workers 0 1 2] [--updates 6] [--device cuda]

Pictures of VOC's size and a cache with a mask for each are made on the spot. Updates on a batch that lies
in memory and updates on batches out of the loader take turns within one run, so what else the machine does
hits both alike; the ratio of the medians is what loading costs. At 1.0 the loader is never waited for. The batch
in memory came through the same augmentation; the optimiser's step is part of both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from wsss_pipeline.cache import MaskCache, MaskSet, MaskWriter, PseudoMask, open_mask_set
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.data.image_ids import find_images
from wsss_pipeline.data.images import read_mask
from wsss_pipeline.demo.voc_folder import write_voc_folder
from wsss_pipeline.segmentation.augmentation import Augmentation
from wsss_pipeline.segmentation.dataset import Sample, SegmentationDataset, sample_order
from wsss_pipeline.segmentation.losses import confidence_weights, segmentation_loss
from wsss_pipeline.segmentation.network import IMAGE_MEAN, IMAGE_STD
from wsss_pipeline.segmentation.networks import build_network
from wsss_pipeline.segmentation.train_config import AugmentationConfig, NetworkConfig

PICTURES, WIDTH, HEIGHT = 48, 500, 375
TURNS = 3


def make_data(root: Path, crop: int) -> SegmentationDataset:
    """Drawn scenes of VOC's size as JPEG, and their ground truth as the masks of a cache."""
    write_voc_folder(root, seed=4, scenes={"train": PICTURES}, size=(WIDTH, HEIGHT))
    classes = load_class_set("demo")
    truth = find_images(root / "SegmentationClass")
    folder = open_mask_set(
        root / "cache",
        MaskSet(name=classes.name, determinants={"made from": "ground truth"}, class_names=classes.names),
    )
    with MaskWriter(folder) as writer:
        for image_id, file in truth.items():
            mask = read_mask(file)
            labels = tuple(name for value, name in enumerate(classes.names, 1) if (mask == value).any())
            confidence = np.full(mask.shape, 200, np.uint8)
            writer.write(image_id, PseudoMask(mask, confidence, labels), image_digest=image_id, seconds=0.0)
        writer.finish(list(truth))
    images = find_images(root / "JPEGImages")
    return SegmentationDataset(
        images,
        MaskCache.open(folder),
        list(truth),
        Augmentation(AugmentationConfig(crop=crop), IMAGE_MEAN, IMAGE_STD),
        seed=0,
    )


class Update:
    """One update of a network on a batch, as the trainer does it."""

    def __init__(self, network: str, encoder: str, device: torch.device) -> None:
        self._device = device
        config = NetworkConfig(name=network, encoder=encoder, weights="none")
        self._network = build_network(config, 11).to(device).train()
        self._optimizer = torch.optim.SGD(self._network.parameters(), 1e-4)

    def __call__(self, batch: Sample) -> None:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, non_blocking=True)

        outputs = self._network.training_outputs(moved(batch["image"]))
        weights = confidence_weights(moved(batch["confidence"]), "hard", 0.95)
        segmentation_loss(outputs, moved(batch["mask"]), weights, balanced=False).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure(
    update: Update, dataset: SegmentationDataset, batch: int, workers: int, updates: int
) -> list[float]:
    """Median milliseconds of an update in memory, and out of the loader."""
    loader = iter(
        DataLoader(
            dataset,  # type: ignore[arg-type]
            batch,
            sampler=sample_order(len(dataset), seed=0),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
    kept = next(loader)
    ways: tuple[Callable[[], Sample], ...] = (lambda: kept, lambda: next(loader))
    times: tuple[list[float], ...] = ([], [])
    ahead = 2 * workers + 1  # what the loader has ready when a turn begins isn't what it can keep up
    for _ in range(TURNS):
        for way, seconds in zip(ways, times, strict=True):
            for number in range(ahead + updates):
                started = time.perf_counter()
                update(way())
                if number >= ahead:
                    seconds.append(time.perf_counter() - started)
    return [1000 * statistics.median(seconds) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=6, help="timed, each way and turn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=320)
    parser.add_argument("--network", default="deeplabv3plus")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    update = Update(options.network, options.encoder, torch.device(options.device))
    print(f"{options.network}, {options.encoder}, {options.batch} crops of {options.crop}, {options.device}")
    print("| workers | in memory ms | from disk ms | ratio |\n| ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_data(Path(folder), options.crop)
        for workers in options.workers:
            memory, disk = measure(update, dataset, options.batch, workers, options.updates)
            print(f"| {workers} | {memory:.0f} | {disk:.0f} | {disk / memory:.3f} |", flush=True)


if __name__ == "__main__":
    main()
