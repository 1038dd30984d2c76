"""Text rows against the published code's way, and prompts that don't fit."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from tests.tiny_clip import write_tiny_clip
from wsss_pipeline.clip.sources import locate_clip
from wsss_pipeline.clip.text import TextEncoder
from wsss_pipeline.clip.weights import Clip, load_clip
from wsss_pipeline.config import ClipConfig
from wsss_pipeline.errors import ConfigError

PROMPTS = ["a clean origami cat.", "grass", "the sky over the water and a good small tree"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    folder = write_tiny_clip(tmp_path_factory.mktemp("clip") / "hf")
    return load_clip(locate_clip(ClipConfig(weights=str(folder)), offline=True), torch.device("cpu"))


def test_rows_equal_those_of_77_tokens_padded_with_0_and_taken_at_the_largest(clip: Clip) -> None:
    ids = torch.zeros(len(PROMPTS), 77, dtype=torch.int64)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        tokens = clip.tokenizer(prompt)["input_ids"]
        row[: len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        hidden = clip.text.text_model(input_ids=ids).last_hidden_state
        taken = hidden[torch.arange(len(PROMPTS)), ids.argmax(dim=1)]
        expected = F.normalize(clip.text.text_projection(taken), dim=1)
    rows = TextEncoder(clip.text, clip.tokenizer).encode(PROMPTS)
    assert torch.allclose(rows, expected, atol=1e-6)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad


def test_the_longest_prompt_that_fits(clip: Clip) -> None:
    encoder = TextEncoder(clip.text, clip.tokenizer)
    assert encoder.encode(["cat " * 75]).shape == (1, 32)
    with pytest.raises(ConfigError, match="has 78 tokens, CLIP reads 77"):
        encoder.encode(["cat " * 76])


def test_the_message_about_a_long_prompt_is_one_short_line(
    clip: Clip, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError) as caught:
        TextEncoder(clip.text, clip.tokenizer).encode(["a dog", "cat\n" * 300])
    assert "'cat cat" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
