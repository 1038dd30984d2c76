"""Texts around a learned context: against those that CLIP reads itself, and against the published code's."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.learned_prompts import (
    LearnedPrompts,
    PromptEncoder,
    class_rows,
    initial_context,
    seed_number,
    text_features,
    text_tower_digest,
)
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder, fuse
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig, ContextLayout, PromptedMaskConfig
from wsss_pipeline.data.classes import ClassEntry, ClassSet, load_class_set
from wsss_pipeline.errors import ConfigError

GOLDEN = Path(__file__).parent.parent / "golden" / "fma"
LARGE = Path(os.environ.get("WSSS_GOLDEN", "nowhere"))
CLASSES = ClassSet(
    name="pets",
    background=("grass", "sky"),
    classes=(ClassEntry(name="cat"), ClassEntry(name="person", synonyms=("people",), fuse="feature")),
)


def loaded(folder: Path) -> Clip:
    return load_clip(locate_clip(ClipConfig(weights=str(folder)), offline=True), torch.device("cpu"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return loaded(write_tiny_clip(tmp_path_factory.mktemp("clip") / "hf"))


def words(clip: Clip, text: str) -> torch.Tensor:
    """The token embeddings of a text."""
    ids = torch.tensor(clip.tokenizer(text, add_special_tokens=False)["input_ids"])
    return clip.text.get_input_embeddings()(ids)


def learned(clip: Clip, context: torch.Tensor, background: tuple[str, ...] | None = None) -> LearnedPrompts:
    texts = tuple(entry.texts() for entry in CLASSES.classes)
    digest = text_tower_digest(clip)
    return LearnedPrompts(
        context, "end", CLASSES.names, texts, CLASSES.background if background is None else background, digest
    )


@pytest.mark.parametrize(
    ("layout", "prompts"),
    [
        ("end", ["a clean origami cat.", "a clean origami good small dog.", "a clean origami."]),
        ("front", ["cat a clean origami.", "good small dog a clean origami.", "a clean origami."]),
    ],
)
def test_a_context_of_words_gives_the_row_of_the_sentence(
    clip: Clip, layout: ContextLayout, prompts: list[str]
) -> None:
    context = words(clip, "a clean origami")
    encoder = PromptEncoder(clip, [("cat",), ("good small dog",), ("",)], layout, len(context))
    expected = TextEncoder(clip.text, clip.tokenizer).encode(prompts)
    assert torch.allclose(encoder(context), expected, atol=1e-6)


@pytest.mark.parametrize("count", [3, 33])
def test_what_texts_share_is_encoded_once_and_changes_nothing(clip: Clip, count: int) -> None:
    tower = deepcopy(clip.text).double()
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 4, 64, generator=generator, dtype=torch.float64).requires_grad_()
    own = torch.randn(count, 3, 64, generator=generator, dtype=torch.float64).requires_grad_()
    ends = 4 + torch.arange(count) % 3
    tokens: list[int] = []
    tower.text_model.encoder.layers[0].register_forward_pre_hook(
        lambda _, given: tokens.append(given[0].shape[:2].numel())
    )
    found = []
    for shared in (0, 4):
        embedded = torch.cat([context.expand(count, -1, -1), own], dim=1)
        rows = text_features(tower, embedded, ends, shared)
        found.append([rows, *torch.autograd.grad(rows.pow(3).sum(), (context, own))])
    for apart, together in zip(*found, strict=True):
        assert apart.abs().max() > 1e-3
        assert (apart - together).abs().max() < 1e-12
    assert tokens == [7 * count, {3: 4 + 3 * 3, 33: 2 * (4 + 17 * 3)}[count]]


def test_a_shared_context_is_encoded_once_for_all_classes_and_one_of_its_own_is_not(clip: Clip) -> None:
    tokens: list[int] = []
    encoder = PromptEncoder(clip, [("cat",), ("dog",)], "end", 3)  # start, 3 of context; name, full stop, end
    handle = clip.text.text_model.encoder.layers[0].register_forward_pre_hook(
        lambda _, given: tokens.append(given[0].shape[:2].numel())
    )
    try:
        rows = [encoder(initial_context(shape, 0.5, "1")) for shape in ((3, 64), (2, 3, 64))]
    finally:
        handle.remove()
    length = encoder.tokens.shape[1]
    assert tokens == [4 + 2 * (length - 4), 2 * length]
    assert rows[0].shape == rows[1].shape


def test_a_class_of_several_texts_has_the_mean_of_their_rows(clip: Clip) -> None:
    context = words(clip, "photo of the")
    encoder = PromptEncoder(clip, [("cat",), ("person", "people")], "end", len(context))
    texts = ["photo of the cat.", "photo of the person.", "photo of the people."]
    expected = fuse(TextEncoder(clip.text, clip.tokenizer).encode(texts), [1, 2])
    assert torch.allclose(encoder(context), expected, atol=1e-6)


def test_a_context_of_its_own_moves_the_row_of_its_class_alone(clip: Clip) -> None:
    context = initial_context((2, 3, 64), 0.5, "1").requires_grad_()
    rows = PromptEncoder(clip, [("cat",), ("person", "people")], "front", 3)(context)
    (gradient,) = torch.autograd.grad(rows[1].square().sum() + rows[1, 0], context)
    assert gradient[1].abs().max() > 1e-4
    assert not gradient[0].any()


def test_a_text_that_does_not_fit_beside_the_context(clip: Clip) -> None:
    assert PromptEncoder(clip, [("cat " * 58,)], "end", 16).tokens.shape == (1, 77)
    with pytest.raises(ConfigError, match="has 78 tokens with a context of 16, CLIP reads 77"):
        PromptEncoder(clip, [("cat " * 59,)], "end", 16)


def test_initial_contexts_are_the_published_ones() -> None:
    with np.load(GOLDEN / "initial_and_schedule.npz") as stored:
        assert [seed_number("真"), seed_number("机")] == [stored["zhen_seed"], stored["ji_seed"]]
        shared, own = initial_context((16, 512), 0.015, "真"), initial_context((45, 16, 512), 0.0125, "机")
        assert np.array_equal(shared[:2], stored["zhen_shared_512"])
        assert np.array_equal(own[[0, 44], :1], stored["ji_per_class_512"])
        assert np.array_equal(initial_context((16, 64), 0.015, "真"), stored["zhen_shared_64"])
    as_number = initial_context((16, 64), 0.015, str(seed_number("真")))
    assert torch.equal(as_number, initial_context((16, 64), 0.015, "真"))


def test_a_file_gives_back_what_was_kept(clip: Clip, tmp_path: Path) -> None:
    kept = learned(clip, initial_context((4, 16, 64), 0.5, "a"))
    kept.save(tmp_path / "prompts.safetensors")
    found = LearnedPrompts.load(tmp_path / "prompts.safetensors")
    assert torch.equal(found.context, kept.context)
    assert replace(found, context=kept.context).__dict__ == kept.__dict__
    assert found.digest == kept.digest
    others = {
        replace(kept, context=kept.context + 1e-6).digest,
        replace(kept, layout="front").digest,
        replace(kept, background=("", "")).digest,
        kept.digest,
    }
    assert len(others) == 4


def test_rows_come_from_the_file_that_the_settings_name(clip: Clip, tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    learned(clip, words(clip, "a clean origami").detach()).save(file)
    found = class_rows(PromptedMaskConfig(prompts=str(file), templates=("{}",)), CLASSES, clip)
    plain = class_rows(PromptedMaskConfig(templates=("a clean origami {}.",)), CLASSES, clip)
    assert torch.allclose(found.foreground, plain.foreground, atol=1e-6)
    assert torch.allclose(found.background, plain.background, atol=1e-6)
    learned(clip, initial_context((2 + 3, 4, 64), 0.5, "1"), ("", "", "")).save(file)
    free = class_rows(PromptedMaskConfig(prompts=str(file)), CLASSES, clip)
    assert free.background.shape == (3, 32)
    assert not torch.allclose(free.background[0], free.background[1], atol=1e-3)


def test_prompts_of_others_are_refused_in_one_line(clip: Clip, tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    learned(clip, initial_context((4, 64), 0.5, "1")).save(file)
    config = PromptedMaskConfig(prompts=str(file))
    first, second = CLASSES.classes
    for classes, message in [
        (CLASSES.model_copy(update={"classes": (second, first)}), "learned for other classes, cat, person"),
        (
            CLASSES.model_copy(update={"classes": (ClassEntry(name="cat", prompt="dog"), second)}),
            "class 'cat' with the text 'cat', not 'dog'",
        ),
        (CLASSES.model_copy(update={"background": ("grass",)}), "other background words, grass, sky"),
    ]:
        with pytest.raises(ConfigError, match=message):
            class_rows(config, classes, clip)
    other = loaded(write_tiny_clip(tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="text tower of another CLIP; give that one with --clip"):
        class_rows(config, CLASSES, other)


@pytest.mark.parametrize(
    "change",
    [
        "cut",
        "half",
        "more tensors",
        "no description",
        "another shape",
        "a name too few",
        "NaN",
        "pickle",
        "none",
    ],
)
def test_files_that_are_no_prompts_are_refused(clip: Clip, tmp_path: Path, change: str) -> None:
    from safetensors import safe_open

    file = tmp_path / "prompts.safetensors"
    learned(clip, initial_context((4, 8, 64), 0.5, "1")).save(file)
    tensors = {"context": load_file(file)["context"].clone()}  # not the mapped file itself
    with safe_open(file, "pt") as stored:
        described = stored.metadata()
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif change == "half":
        save_file({"context": tensors["context"].half()}, file, described)
    elif change == "more tensors":
        save_file({**tensors, "more": torch.zeros(1)}, file, described)
    elif change == "no description":
        save_file(tensors, file)
    elif change == "another shape":
        save_file({"context": tensors["context"][:3].clone()}, file, described)
    elif change == "a name too few":
        text = described["prompts"].replace('"cat", "person"', '"cat"')
        save_file(tensors, file, {"prompts": text})
    elif change == "NaN":
        save_file({"context": tensors["context"] * torch.nan}, file, described)
    elif change == "pickle":
        torch.save(tensors, file)
    else:
        file.unlink()
    with pytest.raises(
        ConfigError, match=r"prompts\.safetensors can't be used: .*give a file of `wsss"
    ) as caught:
        LearnedPrompts.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not LARGE.is_dir(), reason="set WSSS_GOLDEN to the folder with the golden photographs")
def test_rows_are_those_of_the_published_code() -> None:
    clip = loaded(LARGE / "clip_es" / "model")
    with np.load(LARGE / "fma" / "text.npz") as file:
        stored = {key: file[key] for key in file.files}
    voc = load_class_set("voc12")
    texts = [entry.texts() for entry in voc.classes]
    with_words = [*texts, *((word,) for word in voc.background)]
    assert [text for (text,) in with_words] == [*stored["names_voc_fg"], *stored["names_voc_bg"]]
    coco = [(str(text),) for text in (*stored["names_coco_fg"], *stored["names_coco_bg"])]
    free = [*texts, *[("",)] * 25]
    ways: list[tuple[list[tuple[str, ...]], ContextLayout, str, str]] = [
        (with_words, "end", "cls", "rows_cls"),
        (with_words, "front", "cls", "rows_cls_front"),
        (free, "front", "seg", "rows_seg"),
        (free, "end", "seg", "rows_seg_end"),
        (coco, "end", "cls", "rows_coco"),
    ]
    for several, layout, task, name in ways:
        encoder, context = PromptEncoder(clip, several, layout, 16), torch.from_numpy(stored[f"ctx_{task}"])
        with torch.no_grad():
            assert np.abs(encoder(context).numpy() - stored[name]).max() < 2e-6, name
        if name in ("rows_cls", "rows_seg"):
            # where the published code has its X
            tokens = torch.from_numpy(stored[f"tokens_{task}"])[:, : encoder.tokens.shape[1]].long()
            assert np.array_equal(encoder.ends, stored[f"eot_{task}"])
            places = encoder.places if layout == "end" else torch.arange(1, 17).expand(len(tokens), -1)
            kept = tokens.scatter(1, places, 0)
            assert torch.equal(encoder.tokens.sort(dim=1).values, kept.sort(dim=1).values)
            embedded = encoder.embedded(context)[[0, 14, 44], :40]
            expected = torch.from_numpy(stored[f"prompt_{task}"])[:, : embedded.shape[1]]
            assert torch.equal(embedded, expected)
