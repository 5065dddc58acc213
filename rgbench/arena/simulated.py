"""Simulated raters: they vote as the benchtop's annotators do, on what the oracle and gold's regressors read.

    overall     share of the caption's attributes that are right − λ · degradation
    quality     − λ · degradation
    alignment   share of the attributes that are right

Without the regressors the degradation is unknown: "overall" is then the share alone, and "quality" stays open.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rgbench.arena.contest import Contest, Design
from rgbench.arena.votes import Answer, Rater
from rgbench.benchtop.gold import Gold
from rgbench.benchtop.oracle import load_oracle
from rgbench.benchtop.preferences import PreferenceConfig, choose, utility
from rgbench.benchtop.scenes import IMAGE_SIZE
from rgbench.core.errors import UsageError
from rgbench.core.io import open_image
from rgbench.data.prompts import BENCHTOP, Prompt, benchtop_prompts, load_prompts
from rgbench.models.presets import CLASSIFIERS_FOLDER, REGRESSORS_FOLDER

BATCH_SIZE = 64
MAX_INDEX = 100_000  # of a benchtop prompt
CONFIG = PreferenceConfig()

log = logging.getLogger(__name__)


def vote_simulated(contest: Contest, num: int, device: str, regressors: Path = REGRESSORS_FOLDER) -> list[Rater]:
    """Answer every open question of ``num`` simulated raters, who join where they are missing.

    Args:
        contest: of benchtop images.
        num: raters.
        device: where the oracle runs.
        regressors: of degradation.

    Raises:
        UsageError: images or prompts that are not the benchtop's.
    """
    scenes = scenes_of(contest.design)
    if any(entrant.size(0) != (IMAGE_SIZE, IMAGE_SIZE) for entrant in contest.entrants.values()):
        raise UsageError(f"--rater simulated reads the benchtop's images of {IMAGE_SIZE} px alone")
    raters = [_rater(contest, f"simulated {number}") for number in range(1, num + 1)]
    read = _Reader(scenes, device, regressors)
    for rater in raters:
        _answer(contest, rater, read)
    return raters


def scenes_of(design: Design) -> list[dict[str, str]]:
    """The scene that each prompt describes.

    Raises:
        UsageError: a prompt without one.
    """
    source = design.sources.prompts
    found: dict[str, Prompt] = {}
    if source not in (None, BENCHTOP):
        found = {prompt.id: prompt for prompt in load_prompts(str(source)).prompts}
    else:
        ends = [prompt.id.rpartition("/")[2] for prompt in design.prompts]
        indices = [int(end) for end in ends if end.isascii() and end.isdigit() and int(end) < MAX_INDEX]
        found = {prompt.id: prompt for prompt in benchtop_prompts(max(indices, default=-1) + 1).prompts}
    scenes = []
    for prompt in design.prompts:
        known = found.get(prompt.id)
        if known is None or known.text != prompt.text or known.scene is None:
            raise UsageError(f"--rater simulated: {prompt.id!r} is no prompt of the benchtop; ask people instead")
        scenes.append(known.scene)
    return scenes


def _rater(contest: Contest, name: str) -> Rater:
    there = next((rater for rater in contest.votes.raters.values() if rater.name == name), None)
    if there is not None and there.kind != "simulated":
        raise UsageError(f"{there.path}: a person is called {name!r}; begin another arena with --out")
    return there or contest.votes.join(name, "simulated")


class _Reader:
    """Reads images once, whoever is shown them.

    Args:
        scenes: wanted, by prompt.
        device: where networks run.
        regressors: folder of them; without it degradation is not read.
    """

    def __init__(self, scenes: list[dict[str, str]], device: str, regressors: Path) -> None:
        self.scenes, self.oracle = scenes, load_oracle(CLASSIFIERS_FOLDER, device)
        self.gold = Gold(regressors, device) if regressors.is_dir() else None
        if self.gold is None:
            log.warning(
                "%s: no regressors of degradation; simulated raters leave the question of quality open",
                regressors,
            )
        self._read: dict[tuple[bytes, int], tuple[float, float]] = {}

    def __call__(self, shown: list[tuple[bytes, int]]) -> tuple[Tensor, Tensor]:
        """Share of right attributes and degradation, (n,) each, of n PNGs with the position of their prompt."""
        new = list(dict.fromkeys(key for key in shown if key not in self._read))
        for start in range(0, len(new), BATCH_SIZE):
            some = new[start : start + BATCH_SIZE]
            pixels = np.stack([np.asarray(open_image(png)) for png, _ in some])
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
            right = self.oracle.score(images, [self.scenes[prompt] for _, prompt in some])["mean"].cpu()
            bad = self.gold.degradation(images).cpu() if self.gold else torch.zeros(len(some))
            self._read |= dict(zip(some, zip(right.tolist(), bad.tolist(), strict=True), strict=True))
        values = torch.tensor([self._read[key] for key in shown], dtype=torch.float32).reshape(-1, 2)
        return values[:, 0], values[:, 1]

    @property
    def sees_quality(self) -> bool:
        """Whether degradation is read."""
        return self.gold is not None


def _answer(contest: Contest, rater: Rater, read: _Reader) -> None:
    asked = contest.comparisons(rater.name)
    open_tasks = [
        task
        for ticket, task in contest.tasks(rater.name).items()
        if ticket not in rater.votes and (read.sees_quality or task.question != "quality")
    ]
    sides = []
    for side in ("left", "right"):
        shown = [(contest.side(asked[task.comparison], side), asked[task.comparison].prompt) for task in open_tasks]
        sides.append(read(shown))
    (right_l, bad_l), (right_r, bad_r) = sides
    differences = {
        "overall": utility(right_l, bad_l, CONFIG) - utility(right_r, bad_r, CONFIG),
        "quality": CONFIG.degradation_weight * (bad_r - bad_l),
        "alignment": right_l - right_r,
    }
    chosen = {name: _choose(contest, rater, name, difference) for name, difference in differences.items()}
    votes = []
    for position, task in enumerate(open_tasks):
        answer: Answer = "left" if chosen[task.question][position] else "right"
        votes.append(contest.vote(rater, task.ticket, answer))
    rater.add([vote for vote in votes if vote is not None])


def _choose(contest: Contest, rater: Rater, question: str, difference: Tensor) -> Tensor:
    """Whether the left image is preferred, by annotators' luck of this rater and question."""
    digest = hashlib.sha256(json.dumps([contest.design.seed, rater.name, question]).encode()).digest()
    return choose(difference, CONFIG, torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
