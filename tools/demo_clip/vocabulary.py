"""The demo CLIP's vocabulary: byte pairs learnt from captions, in the order of CLIP's own files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def build_tokenizer(captions: Iterable[str], length: int, merges: int = 400) -> Any:
    """A ``transformers.CLIPTokenizer`` of at most ``514 + merges`` tokens.

    Any text can be written with it: like CLIP's, the vocabulary starts with all bytes, inside and at the
    end of a word, and ends with the start and end tokens.

    Args:
        captions: texts to learn from.
        length: tokens of the longest text that the model takes.
        merges: byte pairs to join, at most; fewer where the captions hold fewer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges,
        initial_alphabet=alphabet,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator((caption.lower() for caption in captions), trainer)
    pairs: Any = [tuple(pair) for pair in _merges(learner)][:merges]
    tokens = [
        *alphabet,
        *(byte + _WORD_END for byte in alphabet),
        *("".join(pair) for pair in pairs),
        START,
        END,
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=length)


def _merges(learner: Any) -> list[Any]:
    import json

    merges: list[Any] = json.loads(learner.to_str())["model"]["merges"]
    return merges
