"""Captions: true of their scene, in many wordings, with their facts listed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tools.demo_clip.captions import BACKGROUND_SYNONYMS, scene_facts, write_caption
from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.demo.backgrounds import BACKGROUNDS
from wsss_pipeline.demo.scenes import Scene, draw_scene
from wsss_pipeline.demo.shapes import COLOURS

CLASS_OF_WORD = {word: entry.name for entry in load_class_set("demo").classes for word in entry.texts()}
BACKGROUND_OF_WORD = {word: word for word in BACKGROUNDS} | {
    synonym: word for word, synonym in BACKGROUND_SYNONYMS.items()
}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene((6, index), 32, 24) for index in range(200)]


def words_of(text: str) -> list[str]:
    return text.replace(",", " ").replace(".", " ").split()


def test_the_facts_are_those_that_the_words_say(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes:
        caption = write_caption(scene.objects, scene.backgrounds, rng)
        words = words_of(caption.text)
        said = {CLASS_OF_WORD[word] for word in words if word in CLASS_OF_WORD}
        said |= {BACKGROUND_OF_WORD[word] for word in words if word in BACKGROUND_OF_WORD}
        for colour, noun in pairwise(words):
            if colour in COLOURS and noun in CLASS_OF_WORD:
                said.add(f"{colour} {CLASS_OF_WORD[noun]}")
        assert caption.facts == said


def test_a_caption_is_true_of_its_scene(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    for scene in scenes:
        caption = write_caption(scene.objects, scene.backgrounds, rng)
        assert caption.facts
        assert caption.facts <= scene_facts(scene.objects, scene.backgrounds)


def test_every_class_background_and_synonym_is_spoken_of(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(2)
    texts = [write_caption(scene.objects, scene.backgrounds, rng).text for scene in scenes for _ in range(5)]
    spoken = {word for text in texts for word in words_of(text)}
    assert CLASS_OF_WORD.keys() | BACKGROUND_OF_WORD.keys() <= spoken


def test_wordings_vary(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(3)
    scene = next(scene for scene in scenes if scene.labels == ("car",))
    texts = {write_caption(scene.objects, scene.backgrounds, rng).text for _ in range(100)}
    assert len(texts) > 50


def test_the_same_generator_writes_the_same_caption(scenes: list[Scene]) -> None:
    scene = scenes[0]
    first, again = (
        write_caption(scene.objects, scene.backgrounds, np.random.default_rng(4)) for _ in range(2)
    )
    assert first == again
