"""What a rater is asked: every pair of models on every prompt, in an order of his own.

Rounds ask each pair once, so that all pairs have equally many votes wherever a rater stops; of two rounds a model is on
the left in one and on the right in the other. One comparison in ten is an attention check: an image beside a degraded
copy of itself. All of it is a function of the arena's seed and the rater's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

# As in Wallace et al. (2023), arXiv 2311.12908, section 5.1, whose three criteria papers on aligned students ask for.
QUESTIONS = {
    "overall": "Which image do you prefer given the text?",
    "quality": "Which image is more visually appealing?",
    "alignment": "Which image better fits the text?",
}
DEGRADED = "degraded copy"
CHECK_EVERY = 10  # comparisons, one check among them


@dataclass(frozen=True)
class Comparison:
    """Two images of one prompt.

    Attributes:
        pair: the two models; of a check the model and ``DEGRADED``.
        prompt: position in the arena's prompts.
        left: which of the pair stands on the left.
        check: whether one of the two is a degraded copy.
    """

    pair: tuple[str, str]
    prompt: int
    left: str
    check: bool

    @property
    def right(self) -> str:
        """The other one of the pair."""
        return self.pair[1] if self.left == self.pair[0] else self.pair[0]


def plan(models: Sequence[str], num_prompts: int, seed: int, rater: str) -> list[Comparison]:
    """Every comparison of a rater, with the checks among them.

    Args:
        models: two or more.
        num_prompts: of the arena.
        seed: of the arena.
        rater: name.
    """
    digest = hashlib.sha256(json.dumps([seed, rater]).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    pairs = list(combinations(models, 2))
    prompts = [rng.permutation(num_prompts) for _ in pairs]
    sides = [_by_turns(rng, num_prompts) for _ in pairs]
    asked = [
        Comparison(pairs[p], int(prompts[p][turn]), pairs[p][sides[p][turn]], check=False)
        for turn in range(num_prompts)
        for p in rng.permutation(len(pairs))
    ]
    found: list[Comparison] = []
    checked = rng.permutation(list(models)).tolist()
    for number, start in enumerate(range(0, len(asked), CHECK_EVERY - 1)):
        block = asked[start : start + CHECK_EVERY - 1]
        pair = (checked[number % len(checked)], DEGRADED)
        check = Comparison(pair, int(rng.integers(num_prompts)), pair[rng.integers(2)], check=True)
        block.insert(int(rng.integers(len(block) + 1)), check)
        found += block
    return found


def _by_turns(rng: np.random.Generator, num: int) -> list[int]:
    """``num`` of 0 and 1, one of each in every two."""
    return [int(side) for _ in range(0, num, 2) for side in rng.permutation(2)][:num]
