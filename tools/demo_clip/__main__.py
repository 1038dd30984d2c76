"""Trains the demo's CLIP; from the root of the repository:

    OMP_WAIT_POLICY=PASSIVE python -m tools.demo_clip --out DIR

DIR becomes a Hugging Face folder (config, fp16 weights, vocabulary). The one in ``wsss_pipeline/demo/clip``
was made so, with the defaults.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from tools.demo_clip.train_clip import TrainingPlan, train
from wsss_pipeline.runtime.device import resolve_device


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = TrainingPlan()
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_clip", description="Train the demo's CLIP on drawn scenes."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--scenes", type=int, default=defaults.scenes, help="how many to draw")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = TrainingPlan(options.steps, options.batch, options.scenes, options.seed)
    train(options.out, plan, resolve_device(options.device), options.workers)


if __name__ == "__main__":
    main()
