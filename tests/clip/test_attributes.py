"""Sentences that enrich class texts: read, gathered, and put to the texts that they are like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wsss_pipeline.clip.attributes import attribute_bank, enriched, kmeans, load_attributes
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.errors import ClassSetError

PETS = load_class_set("cat,dog")


def unit(*shape: int, seed: int = 0) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.mark.parametrize("name", ["voc12", "coco14", "demo"])
def test_built_in_sets_bring_their_own(name: str) -> None:
    classes = load_class_set(name)
    assert tuple(load_attributes("", classes)) == classes.names
    assert load_attributes("none", classes) == {}
    assert load_attributes("", PETS) == {}


def test_a_class_set_brings_its_own_and_a_file_takes_their_place(tmp_path: Path) -> None:
    (tmp_path / "pets.yaml").write_text(
        "name: pets\nclasses:\n  - {name: cat, aliases: [kitten], attributes: [It purrs.]}\n"
        "  - {name: dog, attributes: [It barks., It wags.]}\n"
    )
    pets = load_class_set(str(tmp_path / "pets.yaml"))
    assert load_attributes("", pets) == {"cat": ("It purrs.",), "dog": ("It barks.", "It wags.")}
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"dog": ["It digs."], "kitten": ["It is small."]}))
    assert load_attributes(str(file), pets) == {"cat": ("It is small.",), "dog": ("It digs.",)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "expected"),
        ('{"cat": ["a"]}', "class 'dog' has 0 sentences"),
        ('{"cat": ["a"], "dog": []}', "class 'dog' has 0 sentences"),
        ('{"cat": ["a"], "dog": "b"}', "expected"),
        ('{"cat": ["a"], "dog": [3]}', "expected"),
        ('{"cat": ["a"], "dog": ["\\u001b[31m"]}', "plain text"),
        ('{"cat": ["a"], "dgo": ["b"]}', "did you mean 'dog'"),
        ("{", "can't be read as JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ClassSetError, match="--attributes") as caught:
        load_attributes(str(tmp_path / "a.json"), PETS)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    with pytest.raises(ClassSetError, match="can't be read"):
        load_attributes(str(tmp_path / "missing.json"), PETS)


def test_template_and_prompt_go_before_each_sentence() -> None:
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return unit(len(texts), 8)

    attributes = {"cat": ("It Purrs.",), "dog": ("It barks.", "It wags.")}
    bank = attribute_bank(attributes, PETS, "a clean origami {}.", encode, clusters=100)
    assert asked == [
        "a clean origami cat. it purrs.",
        "a clean origami dog. it barks.",
        "a clean origami dog. it wags.",
    ]
    assert sorted(map(tuple, bank.tolist())) == sorted(map(tuple, unit(3, 8).tolist())), (
        "each is its own centre"
    )


def test_a_text_takes_from_its_nearest_by_a_softmax() -> None:
    texts, bank = unit(4, 8), unit(112, 8, seed=1)
    found = enriched(texts, bank)
    for row, text in zip(found, texts, strict=True):
        likeness = bank @ text
        kept = likeness.argsort(descending=True)[: 112 - 11]
        weights = torch.softmax(likeness[kept], dim=0)
        expected = text + weights @ bank[kept]
        torch.testing.assert_close(row, expected / expected.norm())


@pytest.mark.parametrize(("size", "dropped"), [(1, 0), (5, 0), (10, 0), (100, 9), (224, 22)])
def test_the_published_number_takes_no_part_and_a_small_bank_all_does(size: int, dropped: int) -> None:
    texts, bank = unit(3, 16), unit(size, 16, seed=1)
    found = enriched(texts, bank)
    assert found.isfinite().all()
    for row, text in zip(found, texts, strict=True):
        kept = (bank @ text).argsort(descending=True)[: size - dropped]
        expected = text + torch.softmax(bank[kept] @ text, dim=0) @ bank[kept]
        torch.testing.assert_close(row, expected / expected.norm())


def test_centres_are_found_and_found_again() -> None:
    middles = 10 * unit(6, 8)
    points = torch.cat([middle + 0.1 * unit(20, 8, seed=n) for n, middle in enumerate(middles)])
    centres = kmeans(points, 6)
    assert torch.equal(centres, kmeans(points, 6))
    distances = torch.cdist(middles, centres)
    assert distances.amin(dim=1).max() < 0.1
    assert sorted(distances.argmin(dim=1).tolist()) == list(range(6))
    # no centre is better somewhere else: each is the mean of what is nearest to it
    owners = torch.cdist(points, centres).argmin(dim=1)
    for number, centre in enumerate(centres):
        torch.testing.assert_close(centre, points[owners == number].mean(dim=0))


def test_equal_sentences_are_no_trouble() -> None:
    assert kmeans(torch.ones(5, 3), 3).shape == (3, 3)
    assert kmeans(unit(4, 3), 4).isfinite().all()
