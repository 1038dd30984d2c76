"""The attribute sentences of the built-in class sets: complete, distinct, short, and never the class's own name."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources

import pytest

from wsss_pipeline.data.classes import load_class_set

SENTENCES = {"voc12": 20, "coco14": 20, "demo": 12}


def read(name: str) -> str:
    return (resources.files("wsss_pipeline.data") / "attributes" / f"{name}.json").read_text("utf-8")


def says(sentence: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}(s|es)?\b", sentence, re.IGNORECASE) is not None


@pytest.mark.parametrize("name", SENTENCES)
def test_every_class_has_its_sentences_in_the_order_of_the_set(name: str) -> None:
    attributes = json.loads(read(name))
    assert tuple(attributes) == load_class_set(name).names
    assert {word: len(sentences) for word, sentences in attributes.items()} == dict.fromkeys(
        attributes, SENTENCES[name]
    )


@pytest.mark.parametrize("name", SENTENCES)
def test_no_sentence_occurs_twice(name: str) -> None:
    counts = Counter(s.casefold() for sentences in json.loads(read(name)).values() for s in sentences)
    assert [sentence for sentence, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_are_short_plain_text(name: str) -> None:
    wrong = [
        sentence
        for sentences in json.loads(read(name)).values()
        for sentence in sentences
        if not 4 <= len(sentence.split()) <= 14
        or not re.fullmatch(r"[A-Z][ -~]*[^ .]\.", sentence)
        or "  " in sentence
    ]
    assert wrong == []


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_name_no_class_and_no_background_of_the_set(name: str) -> None:
    """They would pull the map to another class, or onto what surrounds the object."""
    class_set = load_class_set(name)
    words = [word for entry in class_set.classes for word in (entry.name, *entry.aliases, *entry.synonyms)]
    named = {
        (word, sentence)
        for sentences in json.loads(read(name)).values()
        for sentence in sentences
        for word in (*words, *class_set.background)
        if says(sentence, word)
    }
    assert named == set()


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_say_what_is_seen(name: str) -> None:
    """CLIP reads past a "no" and finds the very thing that is missing."""
    denied = [
        sentence
        for sentences in json.loads(read(name)).values()
        for sentence in sentences
        if re.search(
            r"\b(no|not|none|never|nothing|without|hardly|neither|lacks?)\b", sentence, re.IGNORECASE
        )
    ]
    assert denied == []


@pytest.mark.parametrize("name", SENTENCES)
def test_the_file_is_written_in_one_way(name: str) -> None:
    text = read(name)
    assert text == json.dumps(json.loads(text), indent=1) + "\n"
