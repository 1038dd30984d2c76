"""Class texts enriched by visual attributes: sentences that a class's images show, gathered into a bank.

Source: ExCEL (Yang et al., CVPR 2025), section 3.2, "text semantic enrichment", as its published code computes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss_pipeline.data.classes import ClassSet
from wsss_pipeline.errors import ClassSetError
from wsss_pipeline.files import MIB, check_machine, read_json

MOST_FILE_BYTES = 16 * MIB
MOST_SENTENCES, LONGEST_SENTENCE = 1000, 1000  # a class, characters
KEPT = 0.9  # share of the bank that a class's text takes from, the nearest
ROUNDS = 300  # of k-means, at most
STARTS = 10

Attributes = Mapping[str, tuple[str, ...]]


def load_attributes(text: str, class_set: ClassSet) -> Attributes:
    """Sentences by class, in the order of the class set.

    Args:
        text: JSON file, ``{"cat": ["It has pointed ears.", ...], ...}``; empty for those that came with the class
            set, or with the package for a built-in one; ``none`` for none.
        class_set: classes that the names must be of; aliases will do.

    Returns:
        Without any the mapping is empty; else each class has one sentence at least.

    Raises:
        ClassSetError: the file can't be read, names unknown classes, leaves one out, or holds something else.
    """
    if text == "none":
        return {}
    own = {entry.name: entry.attributes for entry in class_set.classes}
    if not text and any(own.values()):
        return _complete(own, class_set, f"class set '{class_set.name}'")
    if not text:
        built_in = resources.files("wsss_pipeline.data") / "attributes" / f"{class_set.name}.json"
        if not built_in.is_file():
            return {}
        content = json.loads(built_in.read_text("utf-8"))
        if content.keys() != set(class_set.names):  # a set of the user's own that has such a name
            return {}
        return {name: tuple(content[name]) for name in class_set.names}
    try:
        content = read_json(Path(text), MOST_FILE_BYTES)
    except (OSError, ValueError) as error:
        check_machine(error)
        reason = getattr(error, "strerror", None) or error
        raise ClassSetError(f"--attributes {text[:200]} can't be read as JSON: {reason}") from error
    form = 'expected {"cat": ["It has pointed ears.", ...], ...}'
    if not isinstance(content, dict):
        raise ClassSetError(f"--attributes {text[:200]}: {form}, found {type(content).__name__}")
    found: dict[str, tuple[str, ...]] = {}
    for name, sentences in content.items():
        entry = class_set.find(name)
        if entry is None:
            raise ClassSetError(f"--attributes {text[:200]}: {class_set.unknown(name)}")
        if entry.name in found:
            raise ClassSetError(f"--attributes {text[:200]}: class '{entry.name}' occurs twice; keep one")
        if not isinstance(sentences, list) or not all(map(_is_sentence, sentences)):
            raise ClassSetError(
                f"--attributes {text[:200]}, class '{name:.60}': {form}; sentences are plain text"
            )
        found[entry.name] = tuple(sentences)
    return _complete(found, class_set, f"--attributes {text[:200]}")


def _is_sentence(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.strip()) <= LONGEST_SENTENCE


def _complete(found: Attributes, class_set: ClassSet, origin: str) -> Attributes:
    for name in class_set.names:
        if not 0 < len(found.get(name, ())) <= MOST_SENTENCES:
            raise ClassSetError(
                f"{origin}: class '{name}' has {len(found.get(name, ()))} sentences; give each class 1 to "
                f"{MOST_SENTENCES}, or --attributes none"
            )
    return {name: found[name] for name in class_set.names}


def attribute_bank(
    attributes: Attributes,
    class_set: ClassSet,
    template: str,
    encode: Callable[[Sequence[str]], Tensor],
    clusters: int,
) -> Tensor:
    """Centres of the sentences' rows, float32 (b, P), not normalised.

    Args:
        attributes: sentences by class.
        class_set: the classes, whose prompts go before their sentences.
        template: prompt template.
        encode: texts to unit rows.
        clusters: number of centres, b; as many as there are sentences where they are fewer.
    """
    texts = [
        f"{template.format(entry.prompt or entry.name)} {sentence}".lower()
        for entry in class_set.classes
        for sentence in attributes[entry.name]
    ]
    rows = encode(texts)
    return kmeans(rows, min(clusters, len(rows)))


def enriched(texts: Tensor, bank: Tensor) -> Tensor:
    """Class texts with what the bank knows of them: normalise(t + sum_j w_j b_j), w the softmax over the nearest.

    The softmax has no temperature. Of b centres the int((1 - 0.9) b) that are least like a text take no part.

    Args:
        texts: float32 (T, P), unit rows.
        bank: float32 (b, P).

    Returns:
        float32 (T, P), unit rows.
    """
    likeness = texts @ bank.T
    # the published code's own rounding: 11 of 112, 22 of 224, 9 of 100
    dropped = int((1 - KEPT) * len(bank))
    if dropped:
        farthest = likeness.topk(dropped, dim=1, largest=False).indices
        likeness = likeness.scatter(1, farthest, -torch.inf)
    return F.normalize(likeness.softmax(dim=1) @ bank + texts, dim=1)


def kmeans(rows: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Centres of the best of some k-means++ starts (Arthur and Vassilvitskii, 2007; Lloyd's rounds), float32 (k, P).

    Args:
        rows: float32 (n, P), n at least ``clusters``.
        clusters: number of centres, k.
        seed: seed of the starts; in double precision on the CPU, so that a machine's threads change nothing.
    """
    points, generator = rows.double().cpu(), torch.Generator().manual_seed(seed)
    best, smallest = points[:clusters], torch.inf
    for _ in range(STARTS):
        centres = _first_centres(points, clusters, generator)
        owners = torch.full((len(points),), -1)
        for _ in range(ROUNDS):
            distances = torch.cdist(points, centres)
            nearest = distances.argmin(dim=1)
            if torch.equal(nearest, owners):
                break
            owners = nearest
            sums = torch.zeros_like(centres).index_add_(0, owners, points)
            counts = torch.bincount(owners, minlength=clusters)[:, None]
            centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
        inertia = float(torch.cdist(points, centres).amin(dim=1).square().sum())
        if inertia < smallest:
            best, smallest = centres, inertia
    return best.float()


def _first_centres(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next one is a point, drawn by the square of its distance to the nearest so far."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distances = (points - points[chosen[0]]).square().sum(dim=1)
    while len(chosen) < clusters:
        if not distances.any():  # equal sentences: any of them will do
            chosen += [place for place in range(len(points)) if place not in chosen][: clusters - len(chosen)]
            break
        chosen.append(int(torch.multinomial(distances, 1, generator=generator)))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(dim=1))
    return points[chosen]
