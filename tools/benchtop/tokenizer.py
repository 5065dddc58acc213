"""The benchtop tokenizer: CLIP's byte-level BPE with merges for the caption vocabulary.

Every caption word becomes one token; any other text falls back to bytes. The end
token has the highest id (open_clip pools at the arg-max) and padding is id 0, as in
Stable Diffusion 2.1.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from rgbench.benchtop.scenes import vocabulary

CONTEXT_LENGTH = 32


def build_tokenizer(out: Path) -> CLIPTokenizer:
    """Write the tokenizer's files to ``out`` and return it."""
    merges = bpe_merges([*vocabulary()])
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        pad_token="!",
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def bpe_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every word is one symbol."""
    symbols = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for s in symbols.values() for pair in itertools.pairwise(s)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        symbols = {w: _merge(s, best) for w, s in symbols.items()}
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
