"""``wsss export-model``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from wsss_pipeline.commands.options import PATH, frozen_clip_option, offline_guarantee, say


@click.command("export-model", short_help="A trained network as ONNX or Hugging Face folder.")
@click.option("--checkpoint", type=PATH, required=True, help="A training run, or a checkpoint folder.")
@click.option("--out", type=PATH, required=True, help="File to write (.onnx), or folder.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "huggingface"]),
    default="onnx",
    show_default=True,
    help="huggingface is for SegFormer alone.",
)
@frozen_clip_option
@offline_guarantee
def command(checkpoint: Path, out: Path, kind: Literal["onnx", "huggingface"], clip: str | None) -> None:
    """Export a trained network for other programs.

    ONNX takes any batch and image size, and is checked against torch before the file gets its name. The last
    line on stdout is what was written. Files are replaced only where an earlier export wrote them.

    \b
    Example:
      wsss export-model --checkpoint run --out network.onnx
    """
    from wsss_pipeline.stages.export_model import export_model

    say(export_model(checkpoint, out, kind, clip))
