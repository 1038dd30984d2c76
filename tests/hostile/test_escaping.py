"""Nothing that others named reaches the terminal, or a page, in a form that could change what is around it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.conftest import GOLDEN, mask_set, write_labels, wsss
from wsss_pipeline.cache.manifest import fingerprint
from wsss_pipeline.data.masks import CERTAIN, PseudoMask
from wsss_pipeline.evaluation.comparison import Comparison
from wsss_pipeline.evaluation.metrics import Scores
from wsss_pipeline.evaluation.quality import Quality, estimate
from wsss_pipeline.evaluation.result import Evaluation, Variant
from wsss_pipeline.pictures.evaluation_page import comparison_page, confidence_page, evaluation_page

# escape codes of seven and of eight bits, a reordering mark, a line break of Unicode, a byte that isn't UTF-8
NASTY = "\x1b[2J\x9b31m\u202egpj\u2028x\udcff"
NAME = NASTY.removesuffix(
    "\udcff"
)  # pytest's processes can't send each other a lone surrogate, as out of a log
# what may stand in the name of a class or an image: what isn't shown, and yet no control character
STRANGE = "\u202egpj\u200bx\ufeff"


def printed(*arguments: object) -> None:
    """Runs a command, whatever its exit code, and looks at all that it says."""
    result = wsss(*arguments)
    for text in (result.stdout, result.stderr):
        bad = {c for c in text if not c.isprintable() and c != "\n"}
        assert not bad, (arguments[0], bad, text[:2000])
    for line in result.stdout.splitlines():
        if line.startswith(("{", "[")):
            json.loads(line)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    content = (GOLDEN / "images" / "tiny_odd.png").read_bytes()
    for name in ("plain", STRANGE, f"damaged{STRANGE}"):
        (folder / f"{name}.png").write_bytes(b"no image" if name.startswith("damaged") else content)
    (folder / f"{NASTY}.png").write_bytes(b"")
    return folder


@pytest.fixture
def inputs(tmp_path: Path, images: Path, clip: Path) -> list[object]:
    names = ["cat", "dog"]
    write_labels(
        tmp_path, {"plain": names, STRANGE: names, f"damaged{STRANGE}": ["cat"], f"gone{STRANGE}": ["cat"]}
    )
    labels = tmp_path / "labels.json"
    return ["--images", images, "--labels", labels, "--classes", "cat,dog", "--clip", clip, "--device", "cpu"]


@pytest.fixture(params=["beside the masks", "all"])
def cache(tmp_path: Path, inputs: list[object], request: pytest.FixtureRequest) -> Path:
    """A mask set whose manifest somebody else has written over, with or without what the masks depend on."""
    made = wsss("generate-masks", *inputs, "--cache", tmp_path / "cache", "--workers", 0)
    folder = mask_set(made)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["created"] = NASTY
    manifest["versions"] = {NASTY: NASTY}
    if request.param == "all":
        text = f"{NASTY[:-1]}\nwarning: forged"  # without the byte that JSON can't hold
        manifest["determinants"] |= {"precision": text, text: [text], "classes": [{"name": text}]}
        manifest |= {"class_names": [text], "fingerprint": fingerprint(manifest["determinants"])}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("options", [[], ["--json"], ["--dry-run"]])
def test_generate_masks(inputs: list[object], tmp_path: Path, options: list[str]) -> None:
    printed("-v", "generate-masks", *inputs, "--cache", tmp_path / f"c{STRANGE}", "--workers", 0, *options)


@pytest.mark.parametrize("options", [[], ["--json"], ["--template", f"a {STRANGE} {{}}."]])
def test_select_prompt(inputs: list[object], tmp_path: Path, options: list[str]) -> None:
    printed("select-prompt", *inputs, "--out", tmp_path / f"p{STRANGE}.yaml", *options)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["ls"], ["ls", "--json"], ["status"], ["status", "--json"], ["verify"], ["gc"]),
        *(["verify", "--cache", NASTY], ["ls", f"/{NASTY}"]),
    ],
    ids=str,
)
def test_cache(cache: Path, arguments: list[str]) -> None:
    printed("cache", *arguments, *([] if len(arguments) > 2 or NASTY in arguments[-1] else [cache]))


@pytest.mark.parametrize("kind", ["garbage in a shard's name", "damaged"])
def test_cache_with_strange_files(cache: Path, kind: str) -> None:
    (cache / f"shard-0of1-{NASTY}.h5").write_bytes(b"")
    (cache / "shard-0of1-00009.h5").write_bytes(NASTY.encode("utf-8", "surrogateescape"))
    for command in ("ls", "status", "verify", "gc"):
        printed("cache", command, cache)
    printed("cache", "merge", cache, "--into", cache.parent / STRANGE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "--clip", NASTY],
        ["doctor", "--clip", NASTY, "--json"],
        ["doctor", "--cache", f"/nowhere/{NASTY}"],
        ["config", "show", "--set", f"clip.weights={STRANGE}"],
        ["config", "show", "--set", f'clip.weights="{NASTY.encode("unicode_escape").decode()}"'],
        ["config", "show", "--set", f"{NASTY}=1"],
        ["config", "show", "--preset", NASTY],
        ["config", "show", "--recipe", NASTY],
        ["generate-masks", "--images", NASTY, "--classes", NASTY],
        ["generate-masks", "--voc", NASTY, "--split", NASTY],
        ["generate-masks", "--coco", NASTY, "--split", "train"],
        ["train-seg", "--images", NASTY, "--cache", NASTY, "--out", NASTY],
        ["train-seg", "--images", NASTY, "--gt-masks", NASTY, "--classes", NASTY, "--out", NASTY],
    ],
    ids=ascii,
)
def test_what_was_typed(arguments: list[str]) -> None:
    printed(*arguments)


def make_evaluation() -> Evaluation:
    matrix = np.array([[5, 1, 0], [2, 4, 0]], np.int64)
    scores = Scores.from_matrix(matrix, ["background", NAME])
    return Evaluation(
        {NAME: Variant(scores, {NAME: NAME})},
        (NAME,),
        NAME,
        NAME,
        NAME,
        None,
        {NAME: 0.5},
        matrix,
        (NAME,),
        {NAME: f"{NAME}\nforged"},
    )


def is_clean(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_the_table_of_an_evaluation() -> None:
    table = make_evaluation().as_text()
    assert is_clean(table)
    assert "\nforged" not in table


class Masks:
    class_names = (NAME,)
    identity = description = NAME

    def __contains__(self, image_id: object) -> bool:
        return True

    def __getitem__(self, image_id: str) -> PseudoMask:
        mask = np.ones((8, 8), np.uint8)
        labels = (NAME, f"unknown {NAME}")
        return PseudoMask(mask, np.full((8, 8), CERTAIN, np.uint8), labels, np.ones((2, 8, 8), np.float16))


def estimated(masks: dict[str, Any]) -> Quality:
    return estimate(masks[NAME], [NAME])


def compared(masks: dict[str, Any]) -> Comparison:
    comparison = Comparison(list(masks), (NAME,))
    comparison.add(NAME, [source[NAME] for source in masks.values()])
    return comparison


@pytest.mark.parametrize(
    "page",
    [
        lambda masks: evaluation_page(make_evaluation(), {}, masks, {NAME: NAME}),
        lambda masks: confidence_page({NAME: 5.0}, {NAME: 5.0}, {}, masks, {NAME: NAME}, estimated(masks)),
        lambda masks: comparison_page(compared(masks), {}, masks, {NAME: NAME}),
    ],
)
def test_a_page(page: Callable[[dict[str, Any]], str]) -> None:
    text = page({"Pseudo mask": Masks(), NAME: Masks()})
    assert is_clean(text)
    assert "gpj" in text
    assert not re.search("<(?!/?[a-z!])", text)
