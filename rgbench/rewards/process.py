"""A reward that needs another Python environment: a worker process there scores the images that are sent to it.

Behind the reward contract like any other, but without gradient: an LRM's expert, or a held-out judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.errors import UsageError
from rgbench.rewards.scorers import find_scorer, started
from rgbench.rewards.worker import Worker


class ProcessReward:
    """Scores by a worker process.

    Args:
        worker: running.
        ready: what it said of itself when it was.
        options: arguments of its ``load``, which change its scores.

    Attributes:
        logit_scale: factor from score to the logit of a preference, where its scorer knows it.
    """

    differentiable = False

    def __init__(self, worker: Worker, ready: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        contract = dict(ready["contract"])
        self.worker, self.name = worker, str(ready["name"])
        self.logit_scale: float | None = contract.pop("logit_scale", None)
        self.takes: str = contract["takes"]
        self._fingerprint = {
            **contract,
            "name": self.name,
            "kind": "process",
            "protocol": ready["protocol"],
            "code_sha256": ready["code_sha256"],
            "python": ready["python"],
            "versions": ready["versions"],
            "options": dict(options),
        }

    @classmethod
    def load(
        cls,
        python: str,
        worker: str,
        *,
        path: str | None = None,
        options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        timeout: float = 600.0,
        key: str = "reward",
    ) -> ProcessReward:
        """Start a worker and wait until it can score.

        Args:
            python: interpreter of the other environment.
            worker: a name in :data:`rgbench.rewards.scorers.WORKERS`, a .py file, or a module of that environment.
            path: weights; None for where the scorer looks by itself.
            options: further arguments of the scorer's ``load``.
            device: of torch, as the worker sees them.
            timeout: seconds without a sign of progress after which the worker is given up.
            key: of the recipe's section, for messages.

        Raises:
            UsageError: no such interpreter or scorer, a package missing there, arguments that the scorer does not
                take, or the worker ended before it could score; with its last words.
        """
        scorer = find_scorer(worker, key)
        running = Worker(python, scorer["worker"], key, timeout)
        given = {"path": path and str(Path(path).expanduser().absolute()), "device": device}
        settings = {**scorer, **given, "options": dict(options or {}), "look": False}
        return cls(running, started(running, settings, key), options or {})

    def fingerprint(self) -> dict[str, Any]:
        """What the scorer says of itself, its code, its options, and the versions in its environment."""
        return self._fingerprint

    def close(self) -> None:
        """End the worker; it ends with this process at the latest."""
        self.worker.close()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], on their device and of float32 at least.

        A scorer that takes 8-bit images is given the nearest: what a lossless file of the image would hold.

        Raises:
            UsageError: the images want a gradient.
            RgbenchError: the worker ended or hangs.
        """
        if torch.is_grad_enabled() and images.requires_grad:
            raise UsageError(f"reward {self.name}: runs in another process and gives no gradient; kind: lrm needs none")
        pixels = images.detach().float().cpu()
        if self.takes == "uint8":
            pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        array = pixels.contiguous().numpy()
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        scores = self.worker.score(array.shape, list(prompts), data)
        dtype = torch.promote_types(images.dtype, torch.float32)
        found = torch.tensor(scores, dtype=dtype, device=images.device)
        return found.masked_fill(~images.detach().isfinite().flatten(1).all(1), float("nan"))
