"""The oracle: did the image show what the caption says?

Three judges vote on each attribute; a render-and-match check that learns nothing reads
the same attributes by matched filtering. The vote is the oracle's answer, the agreement
of all four is reported beside it, because a network alone can be fooled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rgbench.worlds.judges import HEADS, JUDGES, Judge, load_judge
from rgbench.worlds.render_match import render_and_match
from rgbench.worlds.scenes import Scenes

ATTRIBUTES = ("shape", "colour", "size", "layout")


class Oracle:
    """Reads and scores benchtop images.

    Args:
        judges: the judges by name.
        device: where they run.
    """

    def __init__(self, judges: dict[str, Judge], device: torch.device | str = "cpu") -> None:
        self.judges, self.device = judges, device

    @torch.inference_mode()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Predicted class per judge and head.

        Args:
            images: (B, 3, 64, 64) in [0, 1].

        Returns:
            judge name → (B, 7) int64, columns as ``HEADS``.
        """
        images = images.to(self.device)
        return {name: torch.stack([x.argmax(1) for x in judge(images)], 1) for name, judge in self.judges.items()}

    def vote(self, readings: dict[str, Tensor]) -> Tensor:
        """(B, 7) majority of the judges; -1 where all differ."""
        stacked = torch.stack(list(readings.values()))
        mode = stacked.mode(0).values
        return torch.where((stacked == mode).sum(0) > len(stacked) // 2, mode, -1)

    def score(self, images: Tensor, scenes: list[dict[str, str]] | Scenes, match: bool = False) -> dict[str, Tensor]:
        """Share of each attribute that is right, per image.

        Args:
            images: (B, 3, 64, 64) in [0, 1].
            scenes: what each image should show.
            match: also run render-and-match (slow), as ``match_mean`` and ``match_agreement``.

        Returns:
            (B,) float32 each: ``shape``, ``colour``, ``size``, ``layout`` over the scene's slots,
            ``mean`` over attributes, ``all`` (1 where everything is right), ``agreement`` (share
            of heads on which the judges are unanimous), and every judge's own ``mean:{judge}``.
        """
        wanted = scenes if isinstance(scenes, Scenes) else Scenes.from_dicts(scenes)
        readings = {name: r.cpu() for name, r in self.read(images).items()}
        out = score_reading(self.vote(readings), wanted)
        present = heads_present(wanted)
        stacked = torch.stack(list(readings.values()))
        unanimous = (stacked == stacked[0]).all(0)
        out["agreement"] = _share(unanimous, present)
        for name, reading in readings.items():
            out[f"mean:{name}"] = score_reading(reading, wanted)["mean"]
        if match:
            matched = render_and_match(images.cpu(), wanted.count)
            out["match_mean"] = score_reading(matched, wanted)["mean"]
            out["match_agreement"] = _share(matched == self.vote(readings), present)
        return out


def heads_present(wanted: Scenes) -> Tensor:
    """(B, 7) bool: the heads that the wanted scene's slots fill."""
    two = wanted.count == 2
    return torch.stack([two | (slot != 1) for _, slot, _ in HEADS], 1)


def score_reading(reading: Tensor, wanted: Scenes) -> dict[str, Tensor]:
    """Share right per attribute, ``mean`` over the four attributes, and ``all``, each (B,).

    Args:
        reading: (B, 7) predicted classes, columns as ``HEADS``.
        wanted: the scenes asked for.
    """
    truth = torch.stack([wanted.layout if s is None else getattr(wanted, n)[:, s] for n, s, _ in HEADS], 1)
    present = heads_present(wanted)
    right = (reading == truth) & present
    out = {}
    for attribute in ATTRIBUTES:
        columns = [i for i, (name, _, _) in enumerate(HEADS) if name == attribute]
        out[attribute] = _share(right[:, columns], present[:, columns])
    out["mean"] = torch.stack([out[a] for a in ATTRIBUTES]).mean(0)
    out["all"] = (right | ~present).all(1).float()
    return out


def _share(hits: Tensor, present: Tensor) -> Tensor:
    return (hits & present).sum(1).float() / present.sum(1).float()


def load_oracle(folder: Path, device: torch.device | str = "cpu") -> Oracle:
    """The oracle from a world's ``judges`` folder."""
    return Oracle({name: load_judge(folder / name, device) for name in JUDGES}, device)
