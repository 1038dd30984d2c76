"""WeakCLIP: a feature pyramid on CLIP's patches, guided by the score map of patches and learned prompts.

Source: WeakCLIP (Zhu et al., "WeakCLIP: Adapting CLIP for Weakly-Supervised Semantic Segmentation", IJCV 2024). Where
paper and published code differ, the code is followed; where the code does what can't be meant, the settings choose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss_pipeline.clip.learned_prompts import text_features
from wsss_pipeline.clip.trunk import Trunk, resize_position_table
from wsss_pipeline.clip.weights import Clip
from wsss_pipeline.config import ResolvedPrecision
from wsss_pipeline.errors import NetworkError
from wsss_pipeline.runtime.output import one_line
from wsss_pipeline.segmentation.clip_network import ClipNetwork, Frozen
from wsss_pipeline.segmentation.network import resized
from wsss_pipeline.segmentation.train_config import WeakClipConfig

BACKGROUND = "background"  # its prompt, before those of the classes
TRAINED_SIDE = 512  # of the crops that the position table is first brought to, pixels
LAYERS = 3  # of stacked co-attention
SHARE = 0.1  # of what co-attention adds to texts and patches, before training


class _Attention(nn.Module):
    """Multi-head attention without biases before the heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out_proj, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, N, width), what queries (B, N, width) take from memory (B, M, width)."""
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, tokens in ((self.q_proj, queries), (self.k_proj, memory), (self.v_proj, memory))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        taken: Tensor = self.dropout(self.out_proj(mixed.transpose(1, 2).flatten(2)))
        return taken


class _Layer(nn.Module):
    """Self-attention, attention to a memory that isn't normalised, MLP; each added to the tokens."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = (_Attention(width, heads, dropout) for _ in range(2))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """(B, N, width) out of tokens (B, N, width) and memory (B, M, width)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.self_attn(normed, normed)
        tokens = tokens + self.cross_attn(self.norm2(tokens), memory)
        changed: Tensor = tokens + self.mlp(self.norm3(tokens))
        return changed


class _CoAttention(nn.Module):
    """Texts attend to an image's tokens, and its tokens to the texts.

    The published code runs three layers a side on the same input and keeps the last one's output: it has one.
    """

    def __init__(self, config: WeakClipConfig, channels: int) -> None:
        super().__init__()
        width, count = config.width, LAYERS if config.coattention == "stacked" else 1
        self.memory = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width), nn.LayerNorm(width))
        self.queries = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.text_layers, self.visual_layers = (
            nn.ModuleList(_Layer(width, config.heads, config.dropout) for _ in range(count)) for _ in range(2)
        )
        self.text_out, self.visual_out = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels)) for _ in range(2)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What texts (B, K, P) and what tokens (B, 1+hw, P) are to gain, out of tokens and text (K, P)."""
        memory = self.memory(tokens)
        # not len(): an exported network would take this number of images alone
        queries = self.queries(text).expand(tokens.shape[0], -1, -1)
        found = []
        for layers, start, other in (
            (self.text_layers, queries, memory),
            (self.visual_layers, memory, queries),
        ):
            changed = start
            for layer in layers:
                changed = layer(changed, other)
            found.append(changed)
        return self.text_out(found[0]), self.visual_out(found[1])


def _pyramid_adapter(channels: int) -> nn.ModuleList:
    """Of four maps (B, D, h, w): strides a quarter, a half, once and twice that of the patches.

    The last layer of the first two is linear, and so is what follows it: see ``_Neck``.
    """

    def norm() -> nn.Module:
        return nn.GroupNorm(1, channels)

    def twice() -> nn.Module:
        return nn.ConvTranspose2d(channels, channels, 2, stride=2)

    return nn.ModuleList(
        [
            nn.Sequential(norm(), twice(), nn.BatchNorm2d(channels), nn.GELU(), twice()),
            nn.Sequential(norm(), twice()),
            norm(),
            nn.Sequential(norm(), nn.MaxPool2d(2)),
        ]
    )


class _Neck(nn.Module):
    """Feature pyramid (Lin et al., CVPR 2017) without norm or activation."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in range(4))
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        for module in (*self.lateral, *self.smooth):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, adapter: nn.ModuleList, patches: Sequence[Tensor], score: Tensor) -> list[Tensor]:
        """(B, width, h_i, w_i), the finest first, out of adapted patches, each level beside the score map.

        Args:
            adapter: see ``_pyramid_adapter``.
            patches: four times float (B, D, h, w).
            score: float32 (B, K, h, w), with D + K the neck's channels.
        """
        maps: list[Tensor] = []
        lateral: Any
        for lateral, adapt, level in zip(self.lateral, adapter, patches, strict=True):
            own, beside = lateral.weight.split([level.shape[1], score.shape[1]], dim=1)
            *before, last = adapt if isinstance(adapt, nn.Sequential) else [adapt]
            for module in before:
                level = module(level)
            if isinstance(last, nn.ConvTranspose2d):
                # two linear layers, the product of their weights: a third of the work, and no map of D channels
                with torch.autocast(level.device.type, enabled=False):
                    mixed = own[:, :, 0, 0]
                    weight = torch.einsum("oc,icyx->ioyx", mixed, last.weight)
                    bias = lateral.bias + mixed @ last.bias
                level = F.conv_transpose2d(level, weight, bias, last.stride)
            else:
                level = F.conv2d(last(level), own, lateral.bias)
            guide = F.interpolate(score, level.shape[-2:], mode="bilinear", align_corners=True)
            maps.append(level + F.conv2d(guide, beside))
        for finer in (2, 1, 0):
            maps[finer] = maps[finer] + F.interpolate(maps[finer + 1], maps[finer].shape[-2:], mode="nearest")
        return [smooth(level) for smooth, level in zip(self.smooth, maps, strict=True)]


class _Head(nn.Module):
    """Levels brought to the finest one's size by convolutions, summed and classified (Semantic FPN, CVPR 2019)."""

    def __init__(self, width: int, dropout: float, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
                )
                for _ in range(max(1, level))
            )
            for level in range(4)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.dropout, self.classify = nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, 1+C, h_0, w_0) out of (B, width, h_i, w_i)."""
        size = maps[0].shape[-2:]
        # drawn once for all levels, as it would be of their sum
        kept = self.dropout(maps[0].new_ones(*maps[0].shape[:2], 1, 1))
        logits: Tensor = self.classify(kept * self.branches[0][0](maps[0]))  # type: ignore[index]
        for level in (1, 2, 3):
            branch = maps[level]
            blocks: Any = self.branches[level]
            for block in blocks[:-1]:
                branch = resized(block(branch), scale_factor=2)
            # classified before the last step of enlarging: the two commute, and there are fewer classes than channels
            own = resized(F.conv2d(kept * blocks[-1](branch), self.classify.weight), scale_factor=2)
            logits = logits + (own if own.shape[-2:] == size else resized(own, size=size))
        return logits


class _Decoder(nn.Module):
    """All that isn't CLIP.

    Attributes:
        contexts: (1, length, text width), tokens before each class's name.
        gamma, beta: (P,), shares of what co-attention adds to texts and to tokens.
    """

    def __init__(
        self, config: WeakClipConfig, num_classes: int, channels: int, text_width: int, joint: int
    ) -> None:
        super().__init__()
        self.contexts = nn.Parameter(torch.empty(1, config.contexts, text_width))
        nn.init.trunc_normal_(self.contexts, a=-2, b=2)
        self.gamma, self.beta = (nn.Parameter(torch.full((joint,), SHARE)) for _ in range(2))
        self.adapter = _pyramid_adapter(channels)
        self.coattention = _CoAttention(config, joint)
        self.neck = _Neck(channels + num_classes, config.channels)
        self.head = _Head(config.channels, config.dropout, num_classes)


class WeakClip(ClipNetwork):
    """A pyramid decoder on a CLIP with learned prompts, which refines masks of other methods.

    CLIP stays as it is (``clip: frozen``), and is then in no checkpoint, or learns with a rate that rises from 0
    (``clip: published``) and is part of ``model``.

    Attributes:
        config: settings.
        frozen: CLIP as it was loaded, and towers that aren't trained.
        tokens: int64 (1+C, 2+n), tokens of the names of background and classes, without context.
        ends: int64 (1+C,), places of the end tokens behind the context.

    Args:
        config: settings.
        class_names: names of mask values 1..C, which are the prompts.
        clip: CLIP; what is trained or changed of it is a copy.
        precision: type of the matrix products of a CLIP that is frozen.

    Raises:
        NetworkError: settings that contradict each other, or a name that is too long for CLIP.
    """

    model: nn.ModuleDict
    config: WeakClipConfig

    def __init__(
        self,
        config: WeakClipConfig,
        class_names: Sequence[str],
        clip: Clip,
        precision: ResolvedPrecision = "fp32",
    ) -> None:
        super().__init__(clip)
        self.config = config
        if config.width % config.heads:
            raise NetworkError(
                f"network.weakclip.width {config.width} isn't a multiple of network.weakclip.heads {config.heads}"
            )
        is_frozen = config.clip == "frozen"
        vision = copy.deepcopy(clip.vision)
        patch = int(vision.config.patch_size)
        if config.positions == "two-step":
            table = vision.vision_model.embeddings.position_embedding
            side = TRAINED_SIDE // patch
            with torch.no_grad():
                table.weight = nn.Parameter(
                    resize_position_table(table.weight, (side, side), rounded=False), requires_grad=False
                )
        text = clip.text if is_frozen else copy.deepcopy(clip.text)
        decoder = _Decoder(
            config,
            1 + len(class_names),
            int(vision.config.hidden_size),
            int(text.config.hidden_size),
            int(vision.config.projection_dim),
        )
        self.model = nn.ModuleDict({"decoder": decoder})
        if not is_frozen:
            self.model["vision"] = vision.requires_grad_(True)
            self.model["text"] = text.requires_grad_(True)
        self.frozen = Frozen(clip, [vision, text] if is_frozen else [])
        self._trunk = Trunk(
            vision, precision if is_frozen else "fp32", rounded_positions=False, class_embeddings=2
        )
        depth = self._trunk.depth
        # of 12 blocks 3, 5, 7 and 11
        self._taps = [max(0, blocks - 1) for blocks in (depth // 3, depth // 2, 2 * depth // 3, depth)]
        self.multiple, self.smallest = patch, 2 * patch  # the coarsest level halves the grid
        # no buffers: an average of the weights would be taken of them too
        self.tokens, self.ends = _tokens((BACKGROUND, *class_names), clip, config.contexts)
        self._kept_text: tuple[tuple[int, ...], Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeakClip:
        """Also to the tokens."""
        self.tokens, self.ends = fn(self.tokens), fn(self.ends)
        super()._apply(fn, recurse)
        return self

    def parameter_groups(self, lr: float, weight_decay: float, head_factor: float) -> list[dict[str, Any]]:
        """What learns at ``lr``; then CLIP and the adapter where their rate starts at 0. All with weight decay.

        ``head_factor`` has no part, as published.
        """
        slow = {
            id(parameter)
            for name, module in self.model.named_children()
            for parameter in module.parameters()
            if name != "decoder"
        }
        if self.config.adapter == "published":
            slow |= {id(parameter) for parameter in self._decoder.adapter.parameters()}
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in self.parameters():
            parts[id(parameter) in slow].append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": weight_decay}
            for parameters, rate in zip(parts, (lr, 0.0), strict=True)
            if parameters
        ]

    @property
    def _decoder(self) -> _Decoder:
        decoder = self.model["decoder"]
        assert isinstance(decoder, _Decoder)
        return decoder

    def text(self) -> Tensor:
        """Rows of background and classes, float32 (1+C, P), not normalised.

        Without gradients they are kept until a weight that they hang on changes.
        """
        text_model: Any = self.frozen.clip.text if self.config.clip == "frozen" else self.model["text"]
        contexts = self._decoder.contexts
        state: tuple[int, ...] = ()
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            weights = [contexts, *text_model.parameters()]
            state = tuple(number for weight in weights for number in (weight.data_ptr(), weight._version))
            if self._kept_text is not None and self._kept_text[0] == state:
                return self._kept_text[1]
        # few tokens, on which all of the score map hangs
        with torch.autocast(contexts.device.type, enabled=False):
            words = text_model.text_model.embeddings.token_embedding(self.tokens)
            between = contexts.expand(len(words), -1, -1)
            embedded = torch.cat([words[:, :1], between, words[:, 1:]], dim=1)
            rows = text_features(text_model, embedded, self.ends, 1 + between.shape[1])
        if state:
            self._kept_text = state, rows
        return rows

    def decode(self, images: Tensor) -> dict[str, Tensor]:
        """What the network makes of images that need no padding.

        Args:
            images: float32 (B, 3, H, W), normalised with ImageNet's mean and standard deviation, H and W multiples
                of CLIP's patch and at least two of them.

        Returns:
            ``logits`` (B, 1+C, 4h, 4w) with h x w patches; ``score`` float32 (B, 1+C, h, w), cosine of patch and
            text.
        """
        decoder, is_frozen = self._decoder, self.config.clip == "frozen"
        with ExitStack() as stack:
            if is_frozen:
                stack.enter_context(torch.no_grad())
                # its own precision decides
                stack.enter_context(torch.autocast(images.device.type, enabled=False))
            features = self._trunk.encode(
                images,
                self._taps,
                attention="none",
                stochastic_depth=self.config.stochastic_depth if self.training and not is_frozen else 0.0,
            )
            tokens = self._trunk.projected(features.taps[self._taps[-1]])
        text = self.text()
        text_gain, token_gain = decoder.coattention(tokens, text)
        with torch.autocast(images.device.type, enabled=False):
            texts = F.normalize(text + decoder.gamma * text_gain.float(), dim=-1)
            patches = F.normalize((tokens.float() + decoder.beta * token_gain.float())[:, 1:], dim=-1)
            score = (texts @ patches.transpose(1, 2)).reshape(images.shape[0], -1, *features.grid)
        cells = (features.taps[tap][:, 1:].transpose(1, 2) for tap in self._taps)
        maps = [patches.reshape(*patches.shape[:2], *features.grid) for patches in cells]
        return {"logits": decoder.head(decoder.neck(decoder.adapter, maps, score)), "score": score}

    def at_input_size(self, images: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        """See ``SegmentationNetwork``; with ``edges: cut`` only images of less than two patches are padded."""
        if self.config.edges == "padded":
            return super().at_input_size(images, look)
        height, width = images.shape[-2:]
        rows: Any = torch.sym_max(height, self.smallest)
        columns: Any = torch.sym_max(width, self.smallest)
        padded = F.pad(images, (0, columns - width, 0, rows - height))
        whole = padded[
            ..., : rows // self.multiple * self.multiple, : columns // self.multiple * self.multiple
        ]
        return resized(look(whole), size=(rows, columns))[..., :height, :width]

    def logits(self, images: Tensor) -> Tensor:
        """Four for each patch's side."""
        return self.decode(images)["logits"]

    def training_outputs(self, images: Tensor, **wanted: Any) -> dict[str, Any]:
        """Results of ``decode``, at the network's own sizes.

        Args:
            images: float32 (B, 3, H, W), as for ``decode``.
            wanted: nothing.
        """
        height, width = (side // (2 * self.multiple) for side in images.shape[-2:])
        if len(images) * height * width == 1:
            # batch norm would see one value per channel; two equal images are one
            return {name: value[:1] for name, value in self.decode(images.expand(2, -1, -1, -1)).items()}
        return self.decode(images)


def _tokens(names: Sequence[str], clip: Clip, length: int) -> tuple[Tensor, Tensor]:
    """See ``WeakClip.tokens`` and ``WeakClip.ends``."""
    longest = int(clip.text.config.max_position_embeddings)
    rows = [clip.tokenizer(name, verbose=False)["input_ids"] for name in names]
    for name, row in zip(names, rows, strict=True):
        if len(row) + length > longest:
            raise NetworkError(
                f"the class '{one_line(name, 80)}' has {len(row) + length} tokens with a context of {length}, CLIP "
                f"reads {longest}; shorten it, or lower network.weakclip.contexts"
            )
    widest = max(map(len, rows))
    padded = [row + [0] * (widest - len(row)) for row in rows]  # no token sees those behind it
    return torch.tensor(padded), torch.tensor([len(row) - 1 + length for row in rows])
