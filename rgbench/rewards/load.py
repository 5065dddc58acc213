"""From the ``reward:`` section of a recipe to a reward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.registry import resolve
from rgbench.rewards.base import CallableReward, ViewedReward, WeightedReward
from rgbench.rewards.config import (
    HPS,
    Aesthetic,
    PixelReward,
    Plugin,
    Process,
    RewardSection,
    SingleReward,
    Sum,
    find_published,
)

MEMBERS = ("name", "differentiable", "fingerprint")


def load_reward(
    section: RewardSection,
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    preset_path: Path | None = None,
    key: str = "reward",
) -> Any:
    """Load a reward, with its blur and crop, or a sum of rewards, not yet calibrated.

    Args:
        section: from :mod:`rgbench.rewards.config`.
        device: where to put the weights.
        dtype: floating type of weights and arithmetic.
        preset_path: the HPS weights of the preset, for ``path: null``.
        key: of the section, for messages.

    Returns:
        A :class:`rgbench.rewards.base.Reward`.

    Raises:
        UsageError: unknown, missing or unfit.
        RgbenchError: a plug-in that is no reward.
    """
    if isinstance(section, Sum):
        terms = [
            load_reward(term, device=device, dtype=dtype, preset_path=preset_path, key=f"{key}.terms.{i}")
            for i, term in enumerate(section.terms)
        ]
        return WeightedReward(
            terms,
            [term.scale for term in section.terms],
            standardise=section.standardise == "calibrated",
            balance=section.balance == "gradient",
        )
    reward: Any
    if isinstance(section, Process):
        reward = resolve("reward", "process").load(
            section.python,
            section.worker,
            path=section.path,
            options=section.options,
            device=section.device or str(device),
            timeout=section.timeout,
            key=key,
        )
    else:
        assert isinstance(section, PixelReward)
        arguments = {"antialias": section.antialias, "device": device, "dtype": dtype}
        if isinstance(section, Plugin):
            reward = _load_plugin(section, key, arguments)
        else:
            reward = _load_own(section, preset_path, key, arguments)
    assert isinstance(section, SingleReward)
    return _viewed(reward, section)


def _viewed(reward: Any, section: SingleReward) -> Any:
    """The reward behind its blur and crop, where it has any."""
    if section.blur_sigma or section.random_crop:
        return ViewedReward(reward, blur_sigma=section.blur_sigma, random_crop=section.random_crop)
    return reward


def reward_of_shapes(section: RewardSection, preset_path: Path | None, notes: list[str], key: str = "reward") -> Any:
    """A recipe's reward with weights of any value; no weight file is read.

    Args:
        section: from :mod:`rgbench.rewards.config`.
        preset_path: the HPS weights of the preset, for ``path: null``; None for ViT-H-14, as all published ones are.
        notes: takes what is not counted.
        key: of the section, for messages.

    Returns:
        A :class:`rgbench.rewards.base.Reward`; for a plug-in or process, whose networks are not known here, one that
        computes nothing.

    Raises:
        UsageError: no configuration.
    """
    if isinstance(section, Sum):
        terms = [reward_of_shapes(term, preset_path, notes, f"{key}.terms.{i}") for i, term in enumerate(section.terms)]
        weights, balance = [term.scale for term in section.terms], section.balance == "gradient"
        return WeightedReward(terms, weights, standardise=section.standardise == "calibrated", balance=balance)
    if isinstance(section, (Process, Plugin)):
        notes.append(f"{key} {section.kind}: not counted")
        return _viewed(_Uncounted(section.kind), section)
    assert isinstance(section, PixelReward)
    path = Path(section.path) if section.path else preset_path if isinstance(section, HPS) else None
    if path is None and section.kind in ("pickscore", "aesthetic"):  # whose architecture the configuration says
        path = find_published(section.kind, f"{key}.path")
    head = {"head": section.head} if isinstance(section, Aesthetic) else {}
    reward: Any = resolve("reward", section.kind)
    return _viewed(reward.of_shapes(path, antialias=section.antialias, **head), section)


@dataclass
class _Uncounted:
    """A reward without networks."""

    name: str
    differentiable = True
    logit_scale = 1.0

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.flatten(1).mean(1)


def _load_own(section: PixelReward, preset_path: Path | None, key: str, arguments: dict[str, Any]) -> Any:
    path = section.path or _default_path(section, preset_path, key)
    if isinstance(section, Aesthetic):
        head_path = section.head_path or find_published(f"aesthetic {section.head} head", f"{key}.head_path")
        arguments = arguments | {"head": section.head, "head_path": head_path}
    return resolve("reward", section.kind).load(path, **arguments)


def _default_path(section: PixelReward, preset_path: Path | None, key: str) -> Path:
    """The preset's reward where it is of this kind and no version is named, else the published weights."""
    if not isinstance(section, HPS):
        return find_published(section.kind, f"{key}.path")
    if section.version is not None:
        return find_published(f"hps {section.version}", f"{key}.path")
    if preset_path is None:
        raise UsageError(f"{key}.path: give a path, or {key}.version; only a model.preset brings one with it")
    return preset_path


def _load_plugin(section: Plugin, key: str, arguments: dict[str, Any]) -> Any:
    """A plug-in is a class with ``load(path, *, antialias, device, dtype, **options)``, or a scoring function."""
    plugin = resolve("reward", section.kind)
    if not hasattr(plugin, "load"):
        if section.options or section.path:
            raise UsageError(f"{key}: {section.kind} is a function of images and prompts; it takes no path or options")
        return CallableReward(plugin, section.kind)
    arguments = arguments | section.options
    try:
        inspect.signature(plugin.load).bind(section.path, **arguments)
    except TypeError as error:
        raise UsageError(f"{key}.options: {section.kind} does not take them: {error}") from error
    reward = plugin.load(section.path, **arguments)
    absent = [member for member in MEMBERS if not hasattr(reward, member)]
    if absent or not callable(reward):
        lacks = ", ".join(absent) or "__call__"
        raise RgbenchError(
            f"reward '{section.kind}': the plug-in's load gave {type(reward).__name__}, which lacks {lacks}"
        )
    return reward
