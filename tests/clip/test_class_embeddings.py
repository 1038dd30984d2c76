"""Templates, synonym fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.clip.text import built_in_templates, class_embeddings
from wsss_pipeline.data.classes import ClassEntry, ClassSet, check_template


def encode(prompts: Sequence[str]) -> Tensor:
    """A row for each prompt that depends on all of its characters."""
    rows = torch.stack(
        [torch.randn(16, generator=torch.Generator().manual_seed(hash_of(prompt))) for prompt in prompts]
    )
    return F.normalize(rows, dim=1)


def hash_of(text: str) -> int:
    value = 7
    for character in text:
        value = (value * 31 + ord(character)) % 2**31
    return value


def class_set(*classes: ClassEntry, background: tuple[str, ...] = ("grass",)) -> ClassSet:
    return ClassSet(name="test", templates=("a {}.",), background=background, classes=classes)


def test_sentence_fusion_is_one_prompt() -> None:
    found = class_embeddings(
        class_set(ClassEntry(name="person", synonyms=("people", "human"))), ["a {}."], encode
    )
    assert torch.allclose(found.foreground, encode(["a person,people,human."]))
    assert torch.allclose(found.background, encode(["a grass."]))


def test_feature_fusion_is_the_mean_made_a_unit() -> None:
    entry = ClassEntry(name="person", synonyms=("people", "human"), fuse="feature")
    found = class_embeddings(class_set(entry), ["a {}."], encode).foreground
    mean = encode(["a person.", "a people.", "a human."]).mean(dim=0)
    assert torch.allclose(found[0], mean / mean.norm())


def test_templates_are_averaged_before_synonyms() -> None:
    entry = ClassEntry(name="person", synonyms=("human",), fuse="feature")
    found = class_embeddings(
        class_set(entry, ClassEntry(name="cat")), ["a {}.", "one {}!"], encode
    ).foreground
    texts = [
        F.normalize(encode([f"a {text}.", f"one {text}!"]).mean(dim=0), dim=0) for text in ("person", "human")
    ]
    assert torch.allclose(found[0], F.normalize(torch.stack(texts).mean(dim=0), dim=0), atol=1e-6)
    assert torch.allclose(found[1], F.normalize(encode(["a cat.", "one cat!"]).mean(dim=0), dim=0), atol=1e-6)


def test_everything_goes_through_one_call() -> None:
    calls = []

    def counted(prompts: Sequence[str]) -> Tensor:
        calls.append(list(prompts))
        return encode(prompts)

    class_embeddings(class_set(ClassEntry(name="cat"), ClassEntry(name="dog")), ["a {}."], counted)
    assert calls == [["a cat.", "a dog.", "a grass."]]


def test_no_background_words_give_no_rows() -> None:
    found = class_embeddings(class_set(ClassEntry(name="cat"), background=()), ["a {}."], encode)
    assert found.background.shape == (0, 16)


def test_other_braces_are_characters() -> None:
    found = class_embeddings(class_set(ClassEntry(name="cat")), ["a {} {x}"], encode)
    assert torch.allclose(found.foreground, encode(["a cat {x}"]))


def test_built_in_templates() -> None:
    templates = built_in_templates()
    assert len(templates) >= 80
    assert len(set(templates)) == len(templates)
    for template in templates:
        check_template(template, "built in")
    assert "a clean origami {}." in templates
