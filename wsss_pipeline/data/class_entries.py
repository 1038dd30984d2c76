"""What a class set is, once read: names, prompts, background words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from wsss_pipeline.errors import ClassSetError

Fusion = Literal["sentence", "feature"]

# Mask values are 0 background, 1..C classes, 255 ignore.
MAX_CLASSES = 254


@dataclass(frozen=True)
class ClassEntry:
    """One class.

    Attributes:
        name: as it stands in labels, reports and exports.
        prompt: text for CLIP in place of the name.
        synonyms: further texts for CLIP.
        fuse: how synonyms come together: ``sentence``, all in one text, as CLIP-ES does;
            ``feature``, the mean of their embeddings.
        aliases: other names that labels may use; CLIP doesn't see them.
        coco_id: category id of the class in MS COCO, 1..90.
    """

    name: str
    prompt: str | None = None
    synonyms: tuple[str, ...] = ()
    fuse: Fusion = "sentence"
    aliases: tuple[str, ...] = ()
    coco_id: int | None = None

    def texts(self) -> tuple[str, ...]:
        """The texts to fill the template with, each to be embedded.

        The prompt (without one, the name) and the synonyms: joined by commas into one text with sentence
        fusion, one text each with feature fusion.
        """
        texts = (self.prompt or self.name, *self.synonyms)
        return texts if self.fuse == "feature" else (",".join(texts),)


@dataclass(frozen=True)
class ClassSet:
    """Classes in the order of their mask values 1..C, with what CLIP is asked about them.

    Attributes:
        name: fit to be part of a file name.
        templates: prompt templates, each with one ``{}``.
        background: words that take part in the softmax as background; none of them is a class.
        classes: mask value 1 first.
    """

    name: str
    templates: tuple[str, ...]
    background: tuple[str, ...]
    classes: tuple[ClassEntry, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, mask value 1 first."""
        return tuple(entry.name for entry in self.classes)

    def find(self, name: str) -> ClassEntry | None:
        """The class of that name or alias, exactly as written; None where there is none."""
        return self._by_name.get(name)

    def index(self, name: str) -> int:
        """Mask value 1..C of a name or alias.

        Raises:
            ClassSetError: no such class.
        """
        entry = self.find(name)
        if entry is None:
            raise ClassSetError(f"class set '{self.name}': {self.unknown(name)}")
        return self.classes.index(entry) + 1

    def nearest(self, name: str) -> list[str]:
        """Up to three names of classes that look or are called like ``name``, the most similar first."""
        spellings = {known.casefold(): entry.name for known, entry in self._by_name.items()}
        close = difflib.get_close_matches(name.casefold(), spellings, n=9)
        return list(dict.fromkeys(spellings[spelling] for spelling in close))[:3]

    def unknown(self, name: str) -> str:
        """Half a message: that no class has this name, and which ones come close."""
        close = self.nearest(name)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {_shortened(self.names)}"
        )
        return f"unknown class {_shown(name)}; {hint}"

    @cached_property
    def _by_name(self) -> dict[str, ClassEntry]:
        # Names come before aliases: a name that is also another class's alias means itself.
        aliases = {alias: entry for entry in self.classes for alias in entry.aliases}
        return aliases | {entry.name: entry for entry in self.classes}


def overlapping(background: tuple[str, ...], classes: tuple[ClassEntry, ...]) -> Iterator[tuple[str, str]]:
    """Background words that also stand in the texts of a class, with the name of that class.

    A background word overlaps where its words follow one another in a name, an alias, a prompt or a
    synonym, in any case: ``sign`` with the class ``stop sign``, ``people`` with the prompt
    ``person with clothes,people,human``.
    """
    for word in background:
        for entry in classes:
            texts = (entry.name, *entry.aliases, *entry.texts())
            if any(f" {_words(word)} " in f" {_words(text)} " for text in texts):
                yield word, entry.name
                break


def _words(text: str) -> str:
    return " ".join(text.casefold().replace(",", " ").split())


def _shown(name: str) -> str:
    return repr(name if len(name) <= 60 else f"{name[:60]}...")


def _shortened(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
