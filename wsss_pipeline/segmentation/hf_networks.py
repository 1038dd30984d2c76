"""Networks of transformers, built from the content of a config.json that a checkpoint keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wsss_pipeline.clip.sources import (
    check_file,
    fetch_files,
    fetch_model,
    local_path,
    pixel_statistics,
    read_config,
    weight_files,
)
from wsss_pipeline.clip.tensor_files import MOST_WEIGHT_BYTES, read_tensor_files, tensors_in
from wsss_pipeline.clip.weights import loading
from wsss_pipeline.errors import NetworkError, WeightsError
from wsss_pipeline.runtime.output import one_line
from wsss_pipeline.segmentation.network import SegmentationNetwork, resized

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
MOST_PARAMETERS = 2 * 10**9  # the largest that are published have 1.2 billion
# no whole number of a config.json is larger, and none that counts parts of a model
LARGEST, LARGEST_COUNT = 65_536, 256
_COUNTS = re.compile("depth|layers|blocks|stages|levels|num_convs|repeats|num_heads|attention_heads")
# of a config.json: what concerns other programs, other classes, or code that isn't here
_DROPPED = re.compile(
    "_.*|auto_map|architectures|.*attn_implementation.*|.*dtype|quantization_config|use_kernels|id2label|label2id"
    "|num_labels|use_pretrained_backbone|transformers_version|return_dict|torchscript"
    "|output_attentions|output_hidden_states|output_auxiliary_logits"
)
_NAMES_ELSEWHERE = re.compile("[:/\\\\]")
_OWN_NAMES = "model."  # with which the tensors of this package's checkpoints begin
_LEAST_SHARE = 0.5  # of an encoder's tensors that files must hold to be its weights


def read_architecture(encoder: str, offline: bool) -> dict[str, Any]:
    """What a model is built from, out of a hub id or a folder: config.json, and the statistics of its images.

    Args:
        encoder: hub id, or folder with a config.json; a preprocessor_config.json beside it says how images are
            normalised, which is ImageNet's way where there is none.
        offline: choice to use only what is on this machine, the hub's own cache included.

    Returns:
        The content of config.json, with ``image_mean``, ``image_std`` (RGB, for values in [0, 1]) and ``is_bgr``
        where a preprocessor says so.

    Raises:
        NetworkError: not found, not reachable, or not to be read.
    """
    try:
        folder = local_path(encoder, "--encoder")
        if not folder.is_dir():
            if encoder.count("/") != 1 or encoder[:1] in (".", "/", "~"):
                raise WeightsError("there is no such folder; give one with a config.json, or a hub id")
            folder = fetch_files(encoder, offline, (CONFIG, PROCESSOR))
        if not (folder / CONFIG).is_file():
            raise WeightsError(f"no {CONFIG} in {one_line(folder, 200)}")
        values = read_config(folder / CONFIG)
        if (folder / PROCESSOR).is_file():
            processor = read_config(folder / PROCESSOR)
            mean, std = pixel_statistics(processor, f"its {PROCESSOR}")
            values |= {"image_mean": list(mean), "image_std": list(std)}
            values["is_bgr"] = bool(processor.get("do_flip_channel_order", False))
    except WeightsError as error:
        raise NetworkError(f"--encoder {one_line(encoder, 100)}: {one_line(error, 300)}") from error
    return values


def _cleaned(values: Any, key: str = "") -> Any:
    """Values of a config.json without what would look elsewhere; a ValueError where a number is beyond reason."""
    if isinstance(values, Mapping):
        is_timm = values.get("model_type") == "timm_backbone"
        if (name := values.get("backbone")) and (not is_timm or _NAMES_ELSEWHERE.search(str(name))):
            raise ValueError(f"its backbone lies elsewhere ({name!s:.60}); describe it under backbone_config")
        return {
            name: _cleaned(value, name)
            for name, value in values.items()
            if not _DROPPED.fullmatch(name) and (name != "backbone" or is_timm)
        }
    if isinstance(values, list):
        numbers = [value for value in values if type(value) is int]
        if len(values) > LARGEST_COUNT or (_COUNTS.search(key) and sum(numbers) > LARGEST_COUNT):
            raise ValueError(f"{key} has {len(values):,} values that add up to {sum(numbers):.6g}")
        return [_cleaned(value, key) for value in values]
    largest = LARGEST_COUNT if _COUNTS.search(key) else LARGEST
    if type(values) is int and not -LARGEST_COUNT <= values <= largest:
        raise ValueError(f"{key} is {values:.6g}; numbers up to {largest:,} are built")
    return values


class TransformersNetwork(SegmentationNetwork):
    """A model of transformers with a fresh head for these classes.

    Args:
        architecture: what ``read_architecture`` gives, or a checkpoint keeps.
        num_classes: number of classes with the background.
        models: types of models (``model_type``) to the names of their classes.

    Attributes:
        architecture: all that the model is built from, statistics of its images left aside.
        always: values that replace those of a configuration.

    Raises:
        NetworkError: it is of another type, or no model can be built from it.
    """

    always: Mapping[str, Any] = {}

    def __init__(self, architecture: Mapping[str, Any], num_classes: int, models: Mapping[str, str]) -> None:
        super().__init__()
        import transformers as library
        from transformers import CONFIG_MAPPING

        transformers: Any = library
        found = architecture.get("model_type")
        if not isinstance(found, str) or found not in models:
            raise NetworkError(
                f"{CONFIG} is of a model of type {found!s:.60}; this network takes one of {', '.join(sorted(models))}"
            )
        kind: Any = getattr(transformers, models[found])
        try:
            with loading(CONFIG):
                if "image_mean" in architecture:
                    self.image_mean, self.image_std = (
                        tuple(architecture[name]) for name in ("image_mean", "image_std")
                    )
                self._is_bgr = bool(architecture.get("is_bgr", False))
                self.architecture = {
                    name: value
                    for name, value in _cleaned(architecture).items()
                    if name not in ("image_mean", "image_std")
                }
                config, other = (
                    CONFIG_MAPPING[found].from_dict(
                        {**self.architecture, "num_labels": number, **self.always}
                    )
                    for number in (num_classes, num_classes + 1)
                )
                with torch.device("meta"):  # names and shapes alone: no memory, no random numbers
                    sketch, another = kind(config), kind(other)
                numbers = sum(value.numel() for value in (*sketch.parameters(), *sketch.buffers()))
                if numbers > MOST_PARAMETERS:
                    raise ValueError(f"it calls for {numbers:,} parameters")
                self.model = kind(config)
        except WeightsError as error:
            raise NetworkError(f"no {found} can be built: {one_line(error, 300)}") from error
        others = another.state_dict()
        self._head = {
            name for name, value in sketch.state_dict().items() if value.shape != others[name].shape
        }

    def pixel_values(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in the order of channels that the model was trained with."""
        return images.flip(1) if self._is_bgr else images

    def encoder(self) -> nn.Module:
        """The backbone, or what else carries the model's name."""
        model: Any = self.model
        encoder: nn.Module = getattr(model, "backbone", None) or model.base_model
        return encoder

    def load_weights(self, weights: str, offline: bool) -> None:
        """Copies tensors that fit, of a whole model or of its encoder alone; those of the head stay fresh.

        Args:
            weights: hub id, folder, or file of tensors; that of a checkpoint of this package as well.
            offline: as in ``read_architecture``.

        Raises:
            NetworkError: not found, not readable, or another model's.
        """
        try:
            path = local_path(weights, "--weights")
            if not path.exists():
                if weights.count("/") != 1 or weights[:1] in (".", "/", "~"):
                    raise WeightsError("they don't exist; give a folder, a file, a hub id, or none")
                path = fetch_model(weights, offline)
            files = weight_files(path) if path.is_dir() else (path,)
            if not files:
                raise WeightsError(f"no model.safetensors in {one_line(path, 200)}; or give --weights none")
            for file in files:
                check_file(file, MOST_WEIGHT_BYTES)
            with loading("they"):
                tensors = read_tensor_files(files, tensors_in)
                if all(name.startswith(_OWN_NAMES) for name in tensors):
                    tensors |= {name.removeprefix(_OWN_NAMES): value for name, value in tensors.items()}
                self._take(tensors)
        except WeightsError as error:
            raise NetworkError(f"weights {one_line(weights, 100)}: {one_line(error, 300)}") from error

    def _take(self, tensors: dict[str, Tensor]) -> None:
        encoder, own = self.encoder(), self.model.state_dict(keep_vars=True)
        inside = {id(value) for value in encoder.state_dict(keep_vars=True).values()}
        fitting = _fitting(self.model, tensors)
        if sum(id(own[name]) in inside for name in fitting) >= _LEAST_SHARE * len(inside):
            kept = {name: value for name, value in fitting.items() if name not in self._head}
            self.model.load_state_dict(kept, strict=False)
            return
        fitting = _fitting(encoder, tensors) if hasattr(encoder, "from_pretrained") else {}
        if len(fitting) < _LEAST_SHARE * len(inside):
            raise WeightsError(
                f"they fit {len(fitting)} of the encoder's {len(inside)} tensors: they are another model's"
            )
        encoder.load_state_dict(fitting, strict=False)


def _fitting(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by a model's own names, out of those of files, whose names the library leads to them."""
    loaded, told = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=dict(tensors),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    absent = {*told["missing_keys"], *(key[0] for key in told["mismatched_keys"])}
    return {name: value for name, value in loaded.state_dict().items() if name not in absent}


class HfNetwork(TransformersNetwork):
    """Any ``AutoModelForSemanticSegmentation``: UperNet, DPT, BEiT, Data2Vec, MobileViT, MobileNetV2, SegFormer, ...

    The input is padded to a multiple of 32, or of the patch where that is larger. A model that takes no other size
    than its configuration's, as DPT and Data2Vec do, looks at tiles of it. An auxiliary head takes part in training,
    with the weight that the configuration has for it (0.4 unless changed).

    Args:
        architecture, num_classes: see ``TransformersNetwork``.
    """

    def __init__(self, architecture: Mapping[str, Any], num_classes: int) -> None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

        super().__init__(architecture, num_classes, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES)
        config: Any = self.model.config
        parts = [part for part in (config, getattr(config, "backbone_config", None)) if part is not None]
        patches = [getattr(part, "patch_size", None) for part in parts]
        # a plain vision transformer has large patches, and may halve their grid; one of several stages has small ones
        self.multiple = next((patch for patch in patches if type(patch) is int and patch > 8), 32)
        self.smallest = 2 * self.multiple
        self._pools_globally = any(isinstance(module, nn.AdaptiveAvgPool2d) for module in self.modules())
        if next(self.parameters()).is_meta or self._takes(2 * self.multiple, 3 * self.multiple) is None:
            return
        side = next((part.image_size for part in parts if getattr(part, "image_size", None)), None)
        problem = "it has no image_size of one number" if type(side) is not int else self._takes(side, side)
        if problem:
            raise NetworkError(f"this {config.model_type} takes no images: {problem}")
        self.multiple, self.smallest, self.is_fixed = int(side or 0), 1, True

    def _takes(self, height: int, width: int) -> str | None:
        """Why the model takes no images of this size; None where it does."""
        self.model.eval()
        try:
            with torch.no_grad():
                self.logits(torch.zeros(1, 3, height, width))
        except Exception as error:  # each model has its own way to say so
            return one_line(error, 200) or type(error).__name__
        finally:
            self.model.train()
        return None

    def logits(self, images: Tensor) -> Tensor:
        """At the size that the model has them."""
        count = len(images)
        if self.training and self._pools_globally and count == 1:
            # batch norm would see one value per channel; two equal images are one
            images = images.expand(2, -1, -1, -1)
        output: Tensor = self.model(pixel_values=self.pixel_values(images)).logits
        return output[:count]

    def _with_auxiliary(self, images: Tensor) -> Tensor:
        """Logits of the model and of its auxiliary head (B, 2 (1+C), h, w)."""
        model: Any = self.model
        found: list[Tensor] = []
        hook = model.auxiliary_head.register_forward_hook(lambda module, given, output: found.append(output))
        try:
            logits = self.logits(images)
        finally:
            hook.remove()
        return torch.cat([logits, resized(found[0][: len(logits)], size=logits.shape[-2:])], dim=1)

    def training_outputs(self, images: Tensor, **wanted: Any) -> dict[str, Any]:
        """``logits``; of an auxiliary head ``auxiliary``, logits of the same shape, and its ``auxiliary_weight``."""
        model: Any = self.model
        if getattr(model, "auxiliary_head", None) is None:
            return super().training_outputs(images)
        logits, auxiliary = self.at_input_size(images, self._with_auxiliary).chunk(2, dim=1)
        return {
            "logits": logits,
            "auxiliary": auxiliary,
            "auxiliary_weight": float(model.config.auxiliary_loss_weight),
        }
