"""How long texts are for a tokenizer, before anything is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def num_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with its begin and end marks, uncut.

    Args:
        tokenizer: of open_clip, of transformers, or one of ours that has a ``num_tokens`` of its own.
        texts: B of them.
    """
    if hasattr(tokenizer, "num_tokens"):
        return tokenizer.num_tokens(texts)
    if type(tokenizer).__module__.startswith("open_clip"):
        from open_clip.tokenizer import SimpleTokenizer  # seconds to import, and only where it is imported already

        if isinstance(tokenizer, SimpleTokenizer):
            return [len(tokenizer.encode(text)) + 2 for text in texts]
        texts, tokenizer = [tokenizer.clean_fn(text) for text in texts], tokenizer.tokenizer
    return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False).input_ids]
