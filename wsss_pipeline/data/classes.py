"""Class sets: built in, from a file, or named on the command line.

Mask values: 0 background, 1..C classes in class-set order, 255 ignore (65,535 with more than 254 classes).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field

from wsss_pipeline.config import Settings, read_yaml, resolve, yaml_content
from wsss_pipeline.data.class_lists import Color, is_no_class, named_classes, read_class_list
from wsss_pipeline.errors import ClassSetError, ConfigError, WsssError

_logger = logging.getLogger("wsss_pipeline.data")

DEFAULT_TEMPLATE = "a clean origami {}."  # the one that CLIP-ES selected (arXiv 2212.09506, section 3.3)
MAX_CLASSES = 65_534  # in 16 bits 0 and 65,535 mean something else
MAX_LENGTH = 1000  # characters of a text
MOST_TEXTS = 1000  # in a list of a class set; each is compared with all classes, and CLIP reads it


def _composed(text: str) -> str:
    """The text in Unicode's composed form, in which names are compared: macOS decomposes letters with accents."""
    return unicodedata.normalize("NFC", text)


def _text(value: object) -> str:
    # YAML reads no, on, 1 and the like as something else than text
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} isn't text; put it in quotes")
    text = value.strip()
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{value!r:.60} has {len(text):,} characters; the most is {MAX_LENGTH:,}")
    if not text or not text.isprintable():
        raise ValueError(f"{value!r:.60} is empty or holds a control character; write plain text")
    return text


def _class_name(name: str) -> str:
    if is_no_class(name):
        raise ValueError(f"{name!r} is no class: masks have 0 for background, 255 for ignore; leave it out")
    return name


def _set_name(name: str) -> str:
    if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        raise ValueError(f"{name!r:.120} can't be the name of a folder; use up to 100 of A-Z a-z 0-9 _ . -")
    return name


def _template(text: str) -> str:
    if text.count("{}") != 1 or re.search("[{}]", text.replace("{}", "")):
        raise ValueError(
            f"template {text!r:.200} needs exactly one {{}}, where the class name goes, "
            "and no other brace; for example 'a photo of a {}.'"
        )
    return text


def _as_tuple(value: object) -> object:
    if isinstance(value, list) and len(value) > MOST_TEXTS:
        raise ValueError(f"{len(value):,} entries; the most is {MOST_TEXTS:,}")
    return tuple(value) if isinstance(value, list) else value


def _some(value: object) -> object:
    if value == []:
        raise ValueError("an empty list; give at least one entry or leave the key out")
    return value


def _color(value: Color | None) -> Color | None:
    if value == (0, 0, 0):
        raise ValueError("black is the colour of the background in masks; give another one")
    return value


def _without_duplicates(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text, count in Counter(texts).items():
        if count > 1:
            raise ValueError(f"{text!r:.60} occurs twice; keep one")
    return texts


_Text = Annotated[str, BeforeValidator(_text)]
_Texts = Annotated[tuple[_Text, ...], BeforeValidator(_as_tuple), AfterValidator(_without_duplicates)]
_SomeTexts = Annotated[_Texts, BeforeValidator(_some)]
_Templates = Annotated[_SomeTexts, AfterValidator(lambda texts: tuple(map(_template, texts)))]
_ClassName = Annotated[_Text, AfterValidator(_class_name)]
_Channel = Annotated[int, Field(ge=0, le=255)]
_SetName = Annotated[_Text, AfterValidator(_set_name)]


class ClassEntry(Settings):
    """One class."""

    name: _ClassName = Field(description="The name, as it stands in labels, reports and exports.")
    prompt: _Text = Field("", description="Text for CLIP in place of the name; empty means the name.")
    synonyms: _SomeTexts = Field((), description="Further texts for CLIP.")
    fuse: Literal["sentence", "feature"] = Field(
        "sentence", description="Synonyms: all in one sentence, as CLIP-ES does; or the mean feature of each."
    )
    aliases: _SomeTexts = Field((), description="Other names that labels may use; CLIP doesn't see them.")
    attributes: _SomeTexts = Field((), description="Sentences of what one sees of it, for methods that ask.")
    coco_id: int | None = Field(None, ge=1, le=90, description="Category id of the class in MS COCO.")
    color: Annotated[
        tuple[_Channel, _Channel, _Channel] | None, BeforeValidator(_as_tuple), AfterValidator(_color)
    ] = Field(None, description="RGB colour of the class in ground truth that holds colours, 0 to 255 each.")

    def texts(self) -> tuple[str, ...]:
        """The texts to fill the template with, each to be embedded.

        The prompt (without one, the name) and the synonyms: joined by commas into one text with sentence
        fusion, one text each with feature fusion.
        """
        texts = (self.prompt or self.name, *self.synonyms)
        return texts if self.fuse == "feature" else (",".join(texts),)


def _too_many_classes(count: int) -> str:
    return f"{count:,} classes; a mask holds {MAX_CLASSES:,} (0 is background, 65535 ignore)"


def _tuple_of_classes(value: object) -> object:
    if not isinstance(value, list):
        return value
    if len(value) > MAX_CLASSES:
        raise ValueError(_too_many_classes(len(value)))
    return tuple(value)


def _fit_into_a_mask(classes: tuple[ClassEntry, ...]) -> tuple[ClassEntry, ...]:
    if len(classes) > MAX_CLASSES:
        raise ValueError(_too_many_classes(len(classes)))
    taken: dict[str | int | Color | None, str] = {}
    for entry in classes:
        for key in (*map(_composed, (entry.name, *entry.aliases)), entry.coco_id, entry.color):
            if key in taken and key is not None:
                raise ValueError(f"{key!r:.60} occurs twice (in '{taken[key]}' and '{entry.name}'); keep one")
            taken[key] = entry.name
    return classes


class ClassSet(Settings):
    """Classes in the order of their mask values 1..C, with what CLIP is asked about them."""

    name: _SetName = Field(description="Its name, fit to be part of a file name.")
    templates: _Templates = Field((DEFAULT_TEMPLATE,), description="Prompt templates, each with one {}.")
    background: _Texts = Field(
        (), description="Words that take part in the softmax as background; none of them is a class."
    )
    classes: Annotated[
        tuple[ClassEntry, ...],
        BeforeValidator(_tuple_of_classes),
        BeforeValidator(_some),
        AfterValidator(_fit_into_a_mask),
    ] = Field(description="The classes, mask value 1 first.")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, mask value 1 first."""
        return tuple(entry.name for entry in self.classes)

    @property
    def colors(self) -> dict[Color, int]:
        """Mask value of each RGB colour that a class has in ground truth, black's 0 among them; empty without any."""
        numbered = enumerate(self.classes, start=1)
        colors = {entry.color: value for value, entry in numbered if entry.color is not None}
        return {(0, 0, 0): 0, **colors} if colors else {}

    @cached_property
    def _values(self) -> dict[str, int]:
        """Mask value of each name and alias, composed; no two classes share one."""
        numbered = enumerate(self.classes, start=1)
        return {
            _composed(known): value for value, entry in numbered for known in (entry.name, *entry.aliases)
        }

    def find(self, name: str) -> ClassEntry | None:
        """The class of that name or alias, in any Unicode form, else as written; None where there is none."""
        value = self._values.get(_composed(name))
        return None if value is None else self.classes[value - 1]

    def index(self, name: str) -> int:
        """Mask value 1..C of a name or alias; a ClassSetError where there is no such class."""
        if (value := self._values.get(_composed(name))) is None:
            raise ClassSetError(f"class set '{self.name}': {self.unknown(name)}")
        return value

    def canonical(self, name: str) -> str:
        """The class's own name, of a name or alias; a ClassSetError where there is no such class."""
        return self.classes[self.index(name) - 1].name

    def nearest(self, name: str) -> list[str]:
        """Up to three names of classes that look or are called like ``name``, the most similar first."""
        spellings = {known.casefold(): self.classes[value - 1].name for known, value in self._values.items()}
        close = difflib.get_close_matches(_composed(name).casefold(), spellings, n=9)
        return list(dict.fromkeys(spellings[spelling] for spelling in close))[:3]

    def unknown(self, name: str) -> str:
        """Half a message: that no class has this name, and which ones come close."""
        more = f" and {len(self.names) - 10} more" if len(self.names) > 10 else ""
        hint = f"known: {', '.join(self.names[:10])}{more}"
        if close := self.nearest(name):
            hint = f"did you mean {' or '.join(map(repr, close))}?"
        return f"unknown class {name if len(name) <= 60 else f'{name[:60]}...'!r}; {hint}"


def load_class_set(text: str) -> ClassSet:
    """The class set that ``--classes`` names.

    Args:
        text: name of a built-in set (``voc12``, ``coco14``); a file, where one of that name exists, it ends in
            ``.yaml``, ``.yml``, ``.json``, ``.txt`` or ``.names``, or it holds a path separator and no comma: a
            class set in YAML, or a list of another tool's, see ``class_lists``; else class names with commas
            between them (``cat,dog``; a set of one class that is spelled like a built-in set or a file needs a
            comma behind it).

    A set that says nothing about its background gets the words of ``voc12``; ``background: []`` means none.
    Either way, words that also stand in a name, alias, prompt or synonym of a class are removed, with a
    logged warning. (That rule turns the published words for VOC into those published for COCO.)

    Raises:
        ClassSetError: unknown set, unreadable file, an unknown or missing key, a value of the wrong type, a
            class that occurs twice, more than 65,534 classes.
    """
    text = text.strip()
    built_in = builtin_class_sets()
    choices = f"choose {', '.join(built_in)}, a file, or names like cat,dog"
    if not text:
        raise ClassSetError(f"no classes; {choices}")
    if text in built_in:
        return _built_in(text)
    path, has_separator = Path(text), "/" in text or "\\" in text
    is_yaml = text.endswith((".yaml", ".yml"))
    if (
        is_yaml
        or text.endswith((".json", ".txt", ".names"))
        or (has_separator and "," not in text)
        or (not text.endswith(",") and os.path.isfile(path))  # noqa: PTH113  # no file's name is that long
    ):
        try:
            content = read_yaml(path, f"class set {text!r:.200}") if is_yaml else read_class_list(path)
        except WsssError as error:
            raise ClassSetError(f"{error}; or {choices}") from error
        return _class_set(content, text, path.stem)
    if close := difflib.get_close_matches(text, built_in, n=1, cutoff=0.7):
        raise ClassSetError(
            f"unknown class set '{text}'; did you mean '{close[0]}'? (for one class of that name: '{text},')"
        )
    names = [name.strip() for name in text.removesuffix(",").split(",")]
    return _class_set({"classes": names}, f"class names {text!r:.80}", "-".join(names))


@cache
def _built_in(name: str) -> ClassSet:
    text = (resources.files("wsss_pipeline.data") / "class_sets" / f"{name}.yaml").read_text("utf-8")
    return _class_set(text, f"class set {name}", name)


def _class_set(content: str | Mapping[str, Any], origin: str, default_name: str) -> ClassSet:
    """A class set from YAML text, or what stands in such, which may leave more out than ``ClassSet`` does.

    YAML text may also be a list of names, or have ``names`` in place of ``classes``, as YOLO's ``data.yaml``.
    """
    # something fit for a file name out of any text
    name = re.sub("[^A-Za-z0-9_-]+", "-", default_name).strip("-")[:40].rstrip("-") or "classes"
    try:
        keys = yaml_content(content, origin) if isinstance(content, str) else content
        if isinstance(keys, list):
            keys = {"classes": named_classes(keys, origin)}
        elif isinstance(keys, Mapping) and "names" in keys and "classes" not in keys:
            keys = {"classes": named_classes(keys["names"], origin)}
        elif not isinstance(keys, Mapping | None):
            raise ClassSetError(f"{origin}: expected 'key: value' lines, found {type(keys).__name__}")
        values: dict[str, Any] = {"name": name, **(keys or {})}
        if "template" in values:
            if "templates" in values:
                raise ClassSetError(f"{origin}: both 'template' and 'templates'; keep one of them")
            values["templates"] = [values.pop("template")]
        if "background" not in values:
            values["background"] = _built_in("voc12").background
        if isinstance(values.get("classes"), list):
            if len(values["classes"]) > MAX_CLASSES:
                raise ClassSetError(f"{origin}: {_too_many_classes(len(values['classes']))}")
            # one by one, so that a message has the number and the name of the entry
            entries = []
            for number, item in enumerate(values["classes"], start=1):
                item = item if isinstance(item, Mapping) else {"name": item}
                called = f" ({item['name']!r:.60})" if len(item) > 1 and "name" in item else ""
                entries.append(resolve(ClassEntry, [(f"{origin}: 'classes' item {number}{called}", item)]))
            values["classes"] = entries
        class_set = resolve(ClassSet, [(origin, values)])
    except ConfigError as error:
        raise ClassSetError(str(error)) from error

    def words(text: str) -> str:
        return f" {' '.join(text.casefold().replace(',', ' ').split())} "

    of_classes = [
        (entry.name, [words(text) for text in (entry.name, *entry.aliases, *entry.texts())])
        for entry in class_set.classes
    ]
    overlaps: dict[str, str] = {}
    for word in class_set.background:
        for name, texts in of_classes:
            if any(words(word) in text for text in texts):
                overlaps.setdefault(word, name)
    if not overlaps:
        return class_set
    _logger.warning(
        "class set '%s': removed from the background words, as they are also classes: %s",
        class_set.name,
        ", ".join(f"{word} (class '{name}')" for word, name in overlaps.items()),
    )
    kept = tuple(word for word in class_set.background if word not in overlaps)
    return class_set.model_copy(update={"background": kept})


def check_template(template: str, origin: str) -> str:
    """``template`` as it came, if it has exactly one ``{}`` and no other brace; else a ClassSetError."""
    try:
        return _template(template)
    except ValueError as error:
        raise ClassSetError(f"{origin}: {error}") from error


@cache
def voc_palette(size: int = 256) -> NDArray[np.uint8]:
    """uint8 (size, 3): the RGB colour of each mask value in PASCAL VOC's development kit; size is up to 65,536.

    Bit ``7 - i`` of red, green and blue is bit ``3i``, ``3i + 1`` and ``3i + 2`` of the mask value.
    """
    values, channels, i = np.ogrid[:size, :3, :6]
    bits = values >> (3 * i + channels) & 1
    palette = np.asarray((bits << (7 - i)).sum(axis=2), np.uint8)
    palette.flags.writeable = False
    return palette


def builtin_class_sets() -> list[str]:
    """Names of the class sets that come with the package."""
    files = (resources.files("wsss_pipeline.data") / "class_sets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
