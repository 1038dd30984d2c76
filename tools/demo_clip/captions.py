"""Captions of scenes, in many wordings: what the demo CLIP reads of the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsss_pipeline.data.classes import load_class_set
from wsss_pipeline.demo.scenes import DrawnObject

BACKGROUND_SYNONYMS: dict[str, str] = {
    "grass": "lawn",
    "sand": "beach",
    "water": "sea",
    "sky": "clouds",
    "brick": "wall",
    "wood": "planks",
    "road": "street",
    "snow": "ice",
}
_WORDS = {entry.name: (entry.name, *entry.synonyms) for entry in load_class_set("demo").classes}
_OPENINGS = (
    *("", "", "a photo of ", "a photo of ", "a photo of ", "a picture of ", "an image of "),
    *("this is ", "there is ", "we see "),
)
_JOINTS = (" and ", " and ", ", ", " next to ", " with ", " beside ")
_PLACES = (" on ", " on ", " in ", " over ", " near ", " in front of ", " with ", " and ")
_COLOUR_SHARE = 0.25
_SYNONYM_SHARE = 0.25


@dataclass(frozen=True)
class Caption:
    """A text and what it says: class names, background words and ``colour class`` pairs."""

    text: str
    facts: frozenset[str]

    @property
    def single(self) -> bool:
        """Whether it speaks of one thing or one place alone (with its colour or not)."""
        return sum(" " not in fact for fact in self.facts) == 1


def scene_facts(objects: Sequence[DrawnObject], backgrounds: Sequence[str]) -> frozenset[str]:
    """All that a caption of the scene may say."""
    things = {fact for drawn in objects for fact in (drawn.name, f"{drawn.colour} {drawn.name}")}
    return frozenset(things | set(backgrounds))


def write_caption(
    objects: Sequence[DrawnObject], backgrounds: Sequence[str], rng: np.random.Generator
) -> Caption:
    """One caption of a scene with these objects and backgrounds; another wording at each call.

    It tells of all things, or of one, and of the place or not, or of the place alone. A view may show
    things alone or a place alone; nothing at all is a ValueError.
    """
    if not objects and not backgrounds:
        raise ValueError("a caption needs an object or a background to speak of")
    kind = rng.choice(["one thing", "things", "place", "all"], p=[0.35, 0.15, 0.2, 0.3])
    if not objects:
        kind = "place"
    elif not backgrounds and kind in ("place", "all"):
        kind = "one thing"
    told = [objects[position] for position in rng.permutation(len(objects))]
    if kind == "one thing":
        told = told[:1]
    facts: set[str] = set()
    things = _things(told, facts, rng) if kind != "place" else ""
    place = _place(backgrounds, facts, rng) if kind in ("place", "all") else ""
    if things and place:
        turned = rng.random() < 0.25
        text = f"{place} with {things}" if turned else things + _pick(_PLACES, rng) + place
    else:
        text = things + place
    return Caption(_pick(_OPENINGS, rng) + text + ("." if rng.random() < 0.5 else ""), frozenset(facts))


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[rng.integers(len(choices))]


def _things(objects: Sequence[DrawnObject], facts: set[str], rng: np.random.Generator) -> str:
    text = ""
    for drawn in objects:
        joint = _pick(_JOINTS, rng) if text else ""
        text += joint + _thing(drawn, facts, rng)
    return text


def _thing(drawn: DrawnObject, facts: set[str], rng: np.random.Generator) -> str:
    facts.add(drawn.name)
    noun = _pick(_WORDS[drawn.name], rng)
    if rng.random() < _COLOUR_SHARE:
        facts.add(f"{drawn.colour} {drawn.name}")
        noun = f"{drawn.colour} {noun}"
    if rng.random() < 0.2:
        return f"the {noun}"
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _place(backgrounds: Sequence[str], facts: set[str], rng: np.random.Generator) -> str:
    words = [backgrounds[position] for position in rng.permutation(len(backgrounds))]
    if rng.random() < 0.4:
        words = words[:1]
    facts.update(words)
    article = ("", "", "the ", "a ")[rng.integers(4)]
    return " and ".join(
        article + (BACKGROUND_SYNONYMS[word] if rng.random() < _SYNONYM_SHARE else word) for word in words
    )
