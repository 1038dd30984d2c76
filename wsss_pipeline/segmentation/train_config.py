"""What a training run is: network, loss, data, schedule. Typed, frozen, defaults in one place.

The layers, later ones winning: defaults < recipe < --config FILE < --set key=value < command-line flags.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from wsss_pipeline.config import ImagesConfig, Precision, Settings, recipe, recipe_names, resolve, user_layers

Confidence = Literal["hard", "soft"]

MASK_CLASSIFICATION = ("mask2former", "eomt")
TRANSFORMERS = ("hf", *MASK_CLASSIFICATION)  # networks whose encoder is a hub id or a folder
ON_CLIP = ("frozen-clip", "weakclip")  # networks whose encoder is a CLIP


class FrozenClipConfig(Settings):
    """The decoder of ``frozen-clip`` (WeCLIP, CVPR 2024; ExCEL, CVPR 2025; WeCLIP+, TPAMI 2025)."""

    first_block: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="First of the blocks whose outputs are fused; from the end if negative.",
    )
    last_block: int = Field(-2, ge=-1000, le=1000, description="Last of them.")
    in_place: bool = Field(
        False,
        description="Fuse what ExCEL's published code does, whose sums in place change the blocks' outputs.",
    )
    calibrated_blocks: int = Field(
        5, ge=1, le=1000, description="With in_place, last blocks with q-q, k-k, v-v attention."
    )
    width: int = Field(256, ge=8, le=2048, description="Of the decoder.")
    heads: int = Field(8, ge=1, le=256, description="Of its attention.")
    depth: int = Field(3, ge=1, le=12, description="Number of its blocks.")
    dropout: float = Field(0.1, ge=0, le=0.99, description="Of fused channels, in training.")
    affinity: Literal["raw", "centred"] = Field(
        "raw",
        description="Similarity of patches: product of features (WeCLIP), or cosine less its mean (ExCEL).",
    )
    affinity_mean: Literal["batch", "image"] = Field(
        "batch", description="Which mean that is, in training; elsewhere it is the image's."
    )
    dino: str = Field(
        "", description="Hub id or folder of a frozen DINOv2 beside CLIP (WeCLIP+); empty for none."
    )


class WeakClipConfig(Settings):
    """``weakclip`` (WeakCLIP, IJCV 2024)."""

    clip: Literal["frozen", "published"] = Field(
        "frozen",
        description="frozen keeps CLIP as it is; published lets it learn with a rate that rises from 0.",
    )
    adapter: Literal["full", "published"] = Field(
        "full",
        description="full trains the pyramid adapter as the rest; published with a rate that rises from 0.",
    )
    coattention: Literal["last-layer", "stacked"] = Field(
        "last-layer",
        description="last-layer has the one of three layers that acts in the published code; stacked has all three.",
    )
    positions: Literal["two-step", "one-step"] = Field(
        "two-step",
        description="two-step resizes the position table to that of 512 x 512 first, as published.",
    )
    edges: Literal["padded", "cut"] = Field(
        "padded",
        description="What isn't whole patches at an image's edge is padded; or, as published, cut off, and "
        "the answer stretched over it.",
    )
    contexts: int = Field(8, ge=1, le=64, description="Learned tokens before the names of all classes.")
    width: int = Field(256, ge=8, le=1024, description="Of the co-attention.")
    heads: int = Field(4, ge=1, le=256, description="Of the co-attention.")
    channels: int = Field(256, ge=8, le=1024, description="Of the feature pyramid and the head.")
    dropout: float = Field(0.1, ge=0, le=0.99, description="In co-attention and head, in training.")
    stochastic_depth: float = Field(
        0.1,
        ge=0,
        le=0.9,
        description="Share of tokens that CLIP's last block is left out for, in training; with clip published.",
    )


class NetworkConfig(Settings):
    """A segmentation network."""

    name: str = Field(
        "deeplabv3plus",
        description="deeplabv2, segformer, frozen-clip, weakclip, hf, mask2former, eomt, or a decoder of "
        "segmentation-models-pytorch: deeplabv3plus, unet, ...",
    )
    encoder: str = Field(
        "resnet50",
        description="A ResNet of timm for deeplabv2; tiny, mit-b0 to mit-b5, their hub id or a folder for segformer; "
        "for frozen-clip and weakclip a CLIP, as --clip takes it; for hf, mask2former, eomt a hub id or folder of "
        "transformers; else an encoder of segmentation-models-pytorch.",
    )
    weights: str = Field(
        "imagenet",
        description="What training starts from: imagenet, coco, none, or a file or folder; for hf, mask2former, eomt "
        "also a hub id, and imagenet is what --encoder holds.",
    )
    frozen: FrozenClipConfig = FrozenClipConfig()
    weakclip: WeakClipConfig = WeakClipConfig()


class LossConfig(Settings):
    """Confidence-guided cross entropy (CLIP-ES, arXiv 2212.09506, section 3.5), and further losses with weights."""

    confidence: Confidence = Field(
        "soft",
        description="soft weights each pixel by its confidence; hard leaves out those under min_confidence, as "
        "published.",
    )
    min_confidence: float = Field(0.0, ge=0, le=1, description="Pixels below it count nothing.")
    keep: float = Field(
        0.0,
        ge=0,
        le=1,
        description="In place of min_confidence: the share of each class's pixels that count, the surest ones. "
        "0 is off.",
    )
    balanced: bool = Field(
        False,
        description="Background and foreground count half each; DeepLabV2 from ImageNet weights may diverge without.",
    )
    segmentation: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="Weight of the cross entropy; 0 where others take its place (WeakCLIP).",
    )
    affinity: float = Field(
        0.0, ge=0, le=1000, description="Weight of the affinity loss of frozen-clip (WeCLIP, ExCEL: 0.1)."
    )
    affinity_radius: int = Field(
        8, ge=1, le=1000, description="Largest distance of the patches that it compares, patches."
    )
    dice: float = Field(0.0, ge=0, le=1000, description="Weight of the Dice loss (WeCLIP+: 1).")
    cross: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of what CLIP's and DINOv2's branch learn from each other (WeCLIP+: 0.1).",
    )
    seeding: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of the seeding loss: a picture's background and foreground count alike (WeakCLIP: 1).",
    )
    boundary: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of the boundary loss, which learns from a dense CRF of the network's own (WeakCLIP: 1).",
    )
    score: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of the score map's cross entropy, of weakclip (WeakCLIP: 0.4).",
    )
    grid: int = Field(
        64, ge=2, le=1024, description="Side of the grid on which seeding and boundary loss look."
    )
    restrict_to_labels: bool = Field(
        False,
        description="Learn no class that an image hasn't got by its labels, from its mask or by boundary.",
    )

    @property
    def threshold(self) -> float:
        """Confidence below which pixels count nothing; with ``keep`` those that don't count have none at all."""
        return 0.005 if self.keep else self.min_confidence


class OnlineConfig(Settings):
    """Targets made of the training images themselves, update by update (WeCLIP; WeCLIP+; ExCEL); for frozen-clip.

    Updates count from 1, and 0 is never.
    """

    method: str = Field(
        "",
        description="Makes the masks in training: weclip, excel, or METHOD/PRESET; empty for masks of a cache.",
    )
    settings: tuple[str, ...] = Field(
        (), strict=False, description="Of the method, such as [weclip.threshold=0.5]."
    )
    gate_from: int = Field(
        0, ge=0, le=10**9, description="Update from which the network's affinity gates that of the CAMs."
    )
    guide_from: int = Field(
        0, ge=0, le=10**9, description="Update from which it guides the calibrated attention (ExCEL)."
    )
    self_affinity_from: int = Field(
        0, ge=0, le=10**9, description="Update from which the affinity loss learns from the network's labels."
    )
    override_from: int = Field(
        0,
        ge=0,
        le=10**9,
        description="Update from which the network's sure labels replace the target's (WeCLIP+).",
    )
    override_above: float = Field(0.75, ge=0, le=1, description="Probability from which it is sure.")


class AugmentationConfig(Settings):
    """What happens to an image before the network sees it."""

    crop: int = Field(320, ge=16, le=4096, description="Side of the square training image, pixels.")
    style: Literal["torchvision", "opencv"] = Field(
        "torchvision",
        description="What resizes and colours: torchvision, or OpenCV as in WeakCLIP. There, scales are of a "
        "frame of short_side x long_side, and crops are drawn for their classes.",
    )
    short_side: int = Field(
        512,
        ge=16,
        le=10_000,
        description="With opencv, the frame at scale 1 that images are fitted into, pixels.",
    )
    long_side: int = Field(2048, ge=16, le=100_000, description="Its other side.")
    largest_share: float = Field(
        0.75,
        ge=0,
        le=1,
        description="With opencv, a crop is drawn anew where a class covers so much, ten times; 0 is never.",
    )
    scale_min: float = Field(0.5, ge=0.05, le=20, description="Smallest random scale.")
    scale_max: float = Field(1.5, ge=0.05, le=20, description="Largest random scale.")
    flip: bool = Field(True, description="Mirror every second image.")
    photometric: bool = Field(True, description="Vary brightness, contrast, saturation and hue.")

    @model_validator(mode="after")
    def _scales_in_order(self) -> AugmentationConfig:
        if self.scale_min > self.scale_max:
            raise ValueError("scale_min is larger than scale_max")
        if self.short_side > self.long_side:
            raise ValueError("short_side is larger than long_side")
        return self


class OptimisationConfig(Settings):
    """Optimiser and schedule."""

    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="The optimiser.")
    lr: float = Field(1e-3, ge=0, le=1000, description="Peak learning rate of the encoder.")
    momentum: float = Field(0.9, ge=0, le=1, description="Of sgd.")
    weight_decay: float = Field(5e-4, ge=0, le=10, description="Of all but biases and norms.")
    head_lr_factor: float = Field(10.0, ge=0, le=1000, description="Times lr, for all but the encoder.")
    schedule: Literal["poly", "cosine", "poly-total", "cosine-total"] = Field(
        "poly",
        description="How the rate falls after the warm-up; with -total, its updates count too (as published).",
    )
    min_lr: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Rate at which cosine-total ends; one that begins lower rises to it (WeakCLIP: 1e-6).",
    )
    power: float = Field(0.9, ge=0, le=10, description="Of the poly schedule.")
    warm_up: int = Field(0, ge=0, le=10**9, description="Updates in which the rate rises.")
    iterations: int = Field(20_000, ge=1, le=10**9, description="Updates.")
    batch: int = Field(10, ge=1, le=10**6, description="Images per process and micro-step.")
    accumulate: int = Field(1, ge=1, le=10**6, description="Micro-steps per update.")
    clip_norm: float = Field(0.0, ge=0, le=10**9, description="Largest norm of the gradient; 0 is off.")
    ema: float = Field(0.0, ge=0, le=0.999999, description="Decay of the averaged weights; 0 is off.")


class TrainConfig(Settings):
    """A training run."""

    version: int = Field(1, description="Of the recipe.")
    images: ImagesConfig = ImagesConfig()
    network: NetworkConfig = NetworkConfig()
    online: OnlineConfig = OnlineConfig()
    loss: LossConfig = LossConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    optimisation: OptimisationConfig = OptimisationConfig()
    precision: Precision = Field(
        "auto", description="Of the forward pass; auto is bf16 where the device is fast at it, else fp32."
    )
    seed: int = Field(0, ge=0, le=2**62, description="Of weights, order and augmentation.")
    max_unusable: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of samples whose image or mask can't be used, above which training stops.",
    )
    validate_every: int = Field(1000, ge=1, le=10**9, description="Updates between validations.")
    save_every: int = Field(500, ge=1, le=10**9, description="Updates between checkpoints.")

    @model_validator(mode="after")
    def _what_belongs_together(self) -> TrainConfig:
        needs = {"online.method": bool(self.online.method), "loss.affinity": self.loss.affinity > 0}
        needs["loss.cross"] = self.loss.cross > 0
        for key, is_set in needs.items():
            if is_set and self.network.name != "frozen-clip":
                raise ValueError(f"{key} needs --network frozen-clip, not {self.network.name}")
        if self.network.name in ON_CLIP and self.network.encoder == NetworkConfig().encoder:
            raise ValueError(
                f"--network {self.network.name} needs a CLIP: give --encoder, a hub id, a folder, a file of weights "
                "or demo"
            )
        if self.network.name in TRANSFORMERS and self.network.encoder == NetworkConfig().encoder:
            raise ValueError(
                f"--network {self.network.name} needs a model of transformers: give --encoder, a hub id or a folder "
                "with a config.json"
            )
        if self.network.name in MASK_CLASSIFICATION:
            others = ("balanced", "dice", "seeding", "boundary", "score", "restrict_to_labels")
            for key in ("segmentation", *others):
                if getattr(self.loss, key) != getattr(LossConfig(), key):
                    raise ValueError(
                        f"loss.{key} isn't for {self.network.name}, which has losses of its own: leave it out"
                    )
        loss = self.loss
        optimisation = self.optimisation
        if optimisation.min_lr and optimisation.schedule != "cosine-total":
            raise ValueError(
                "optimisation.min_lr is for the schedule cosine-total: give that, or set it to 0"
            )
        if not (loss.segmentation or loss.dice or loss.seeding or loss.boundary or loss.score):
            raise ValueError(
                "loss.segmentation is 0 and no other loss learns from the masks: give one a weight"
            )
        if loss.score and self.network.name != "weakclip":
            raise ValueError(f"loss.score needs --network weakclip, not {self.network.name}")
        starts = ("gate_from", "guide_from", "self_affinity_from", "override_from")
        if not self.online.method and (chosen := [name for name in starts if getattr(self.online, name)]):
            raise ValueError(
                f"online.{chosen[0]} is for targets that are made in training: give --online METHOD"
            )
        if self.loss.keep and self.online.method:
            raise ValueError(
                "loss.keep is for masks that are there before training: give --cache, or loss.min_confidence"
            )
        if self.loss.cross > 0 and not self.network.frozen.dino:
            raise ValueError("loss.cross needs two branches: give network.frozen.dino, or set it to 0")
        return self


def load_train_config(
    recipe_name: str | None = None,
    file: Path | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The resolved configuration from all its layers; see ``wsss_pipeline.config``.

    Raises:
        ConfigError: unknown recipe or key, unreadable file, wrong type, value out of range.
    """
    layers = [recipe(recipe_name)] if recipe_name is not None else []
    return resolve(TrainConfig, [*layers, *user_layers(file, overrides, flags)])


def online_recipe(method: str, classes: str | None) -> str | None:
    """The recipe that belongs to a method of online targets: that of the class set's name, else that of VOC.

    Args:
        method: METHOD or METHOD/PRESET.
        classes: as ``--classes`` has it.
    """
    name, _, preset = method.partition("/")
    wanted = [f"{name}/{known}" for known in (preset, classes, "voc12") if known]
    return next((known for known in wanted if known in recipe_names()), None)
