"""A trained network for other programs: ONNX, or a Hugging Face folder where the network is SegFormer."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wsss_pipeline.errors import CheckpointError, ConfigError, MissingDependencyError
from wsss_pipeline.files import check_machine
from wsss_pipeline.runtime.output import MARK, check_apart, check_replaceable, one_line, write_file
from wsss_pipeline.segmentation.checkpoint import LoadedNetwork, find_checkpoint, load_network
from wsss_pipeline.segmentation.mask_classification import MaskClassification
from wsss_pipeline.segmentation.network import SegmentationNetwork
from wsss_pipeline.segmentation.networks import SegFormer

logger = logging.getLogger(__name__)

ExportFormat = Literal["onnx", "huggingface"]

# a batch and a size other than those traced, and one that no stride divides
CHECKED_SHAPES = ((1, 3, 96, 128), (3, 3, 67, 49))
TRACED_SHAPE = (2, 3, 128, 96)
# of a Hugging Face folder, as transformers looks for them
CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
LARGEST_DIFFERENCE = 1e-3  # of a logit, relative to the largest one


def export_model(checkpoint: Path, out: Path, kind: ExportFormat, clip: str | None = None) -> Path:
    """Writes the network of ``checkpoint`` to ``out``: a ``.onnx`` file, or a folder.

    ``clip`` says where a network's frozen CLIP lies now, see ``Segmenter.load``.

    The ONNX file takes ``images`` float32 (B, 3, H, W), normalised with ImageNet's mean and standard deviation,
    any B, H and W, and gives ``logits`` (B, 1+C, H, W). It is run on other shapes than the traced one and
    compared with torch before it gets its name.

    Raises:
        CheckpointError: no network there, or what was exported doesn't compute the same.
        ConfigError: the format doesn't fit the network, the name doesn't fit the format, or ``out`` and the
            checkpoint lie in each other.
        OutputError: ``out`` can't be written, or there is something at it that no earlier export wrote.
        MissingDependencyError: onnx, onnxscript or onnxruntime isn't installed.
    """
    check_apart(out, "--out", {"--checkpoint": find_checkpoint(checkpoint)})
    for file in [out] if kind == "onnx" else [out / name for name in (CONFIG, WEIGHTS, PROCESSOR)]:
        check_replaceable(file)
    loaded = load_network(checkpoint, clip=clip)
    if kind == "huggingface":
        for name, content in _huggingface_files(loaded).items():
            write_file(out / name, content, below=out)
        return out
    if isinstance(loaded.network, MaskClassification):
        raise ConfigError(
            f"{loaded.config['network']['name']} has no ONNX form, for where its queries look depends on what they "
            "saw; use it through wsss predict or the Python API"
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"ONNX export needs {package}: pip install 'wsss-pipeline[export]'")
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: end the name of an ONNX file in .onnx")
    name, dynamic = loaded.config["network"]["name"], torch.export.Dim.DYNAMIC
    try:
        program = torch.onnx.export(
            loaded.network,
            (torch.zeros(TRACED_SHAPE),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
            verbose=False,
        )
        assert program is not None
    except Exception as error:  # what a model does that has no form there is up to its library
        check_machine(error)
        raise CheckpointError(
            f"{name} can't be brought into ONNX form for images of any size: {one_line(error, 200)}; nothing was "
            "written, use it through wsss predict or the Python API"
        ) from error
    program.model.metadata_props["id2label"] = json.dumps(loaded.config["id2label"])
    model = program.model_proto
    model.producer_name = MARK
    content = model.SerializeToString()
    difference = _largest_difference(loaded.network, content)
    if not difference <= LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"the ONNX form of {name} differs from torch by {difference:.2g} of its "
            f"largest logit (allowed: {LARGEST_DIFFERENCE:g}); nothing was written"
        )
    write_file(out, content)
    count = len(CHECKED_SHAPES)
    logger.info("checked against torch on %d shapes: largest difference %.1e", count, difference)
    return out


@torch.no_grad()
def _largest_difference(network: SegmentationNetwork, content: bytes) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    differences = []
    for shape in CHECKED_SHAPES:
        images = torch.randn(shape, generator=generator)
        expected: Tensor = network(images)
        (logits,) = session.run(None, {"images": images.numpy()})
        if logits.shape != tuple(expected.shape):
            return float("inf")
        differences.append(np.abs(logits - expected.numpy()).max() / max(1e-6, float(expected.abs().max())))
    return float(np.max(differences))  # NaN where one is


def _huggingface_files(loaded: LoadedNetwork) -> dict[str, bytes]:
    """What ``save_pretrained`` would write, by file name; on a full disk it raises errors of its own kinds."""
    if not isinstance(loaded.network, SegFormer):
        name = loaded.config["network"]["name"]
        raise ConfigError(f"transformers has no {name} to load a folder of it with; export it as onnx")
    from safetensors.torch import save
    from transformers import SegformerImageProcessor

    model: Any = loaded.network.model
    model.config.id2label = {int(key): name for key, name in loaded.config["id2label"].items()}
    model.config.label2id = loaded.config["label2id"]
    model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
    processor = SegformerImageProcessor(
        do_resize=False,  # the network takes any size
        image_mean=list(loaded.network.image_mean),
        image_std=list(loaded.network.image_std),
        do_reduce_labels=False,
    )
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    texts = {CONFIG: model.config.to_json_string(), PROCESSOR: processor.to_json_string()}
    # further keys are kept, and nothing is made of them
    marked = {
        name: json.dumps({"generator": MARK, **json.loads(text)}, indent=2) for name, text in texts.items()
    }
    return {
        WEIGHTS: save(weights, metadata={"format": "pt", "generator": MARK}),
        **{name: f"{text}\n".encode() for name, text in marked.items()},
    }
