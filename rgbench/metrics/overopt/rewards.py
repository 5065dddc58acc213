"""The world's reward model as probes use it: loaded once per command, a batch scored once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rgbench.data.prompts import Prompt
from rgbench.errors import RgbenchError
from rgbench.metrics.contract import Context
from rgbench.rewards.hps import HPSReward
from rgbench.rewards.published import HPS_V21_FILE, find_published

SCALE = 100  # scores are shown as 100 · cosine


class SharedReward:
    """100 · cosine of images and their prompts, with the last batch's scores kept.

    Args:
        reward: the model.
    """

    def __init__(self, reward: HPSReward) -> None:
        self.reward = reward
        self._last: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float64 scores; asked again for the same tensor, the same scores.

        Raises:
            RgbenchError: a score that is not finite; names the prompt.
        """
        if self._last is None or self._last[0] is not images:
            scores = SCALE * self.reward(images, [prompt.text for prompt in prompts]).double()
            if not scores.isfinite().all():
                first = prompts[int(scores.isfinite().int().argmin())]
                raise RgbenchError(f"the reward of {first.id!r} is not finite")
            self._last = images, scores
        return self._last[1]


def shared_reward(context: Context, antialias: bool) -> SharedReward:
    """The world's reward model under one antialias setting, the same object for all that ask in one command;
    both settings share one network.

    Raises:
        UsageError: its folder is incomplete; or HPSv2.1's published file is not here, with the command that gets it.
    """
    folder = context.reward_folder
    if folder == Path(HPS_V21_FILE) and not folder.exists():
        find_published("hps 2.1", "--hps")

    name = f"reward {folder} {context.device}"

    def load() -> HPSReward:
        return HPSReward.load(folder, antialias=True, device=context.device)

    def share() -> SharedReward:
        return SharedReward(context.reference.remember(name, load).with_antialias(antialias))

    return context.reference.remember(f"{name} {antialias}", share)
