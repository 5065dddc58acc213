"""What all stages of a build share: seeds, scenes, precision, schedule, log.

Every optimiser step reseeds from (world seed, stage, step), so what a stage makes depends on nothing before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.benchtop.scenes import Scenes, captions, scene_batch
from rgbench.core.run import stream_seed

LATENTS_SPLIT = "web"  # of the scenes that the latents cache holds, on which teacher and proxy are trained


def stage_seed(seed: int, stage: str, step: int) -> int:
    """Seed of one optimiser step; step -1 seeds the initial weights."""
    return stream_seed(seed, stage, step + 1)


def digest(inputs: list[str], settings: dict[str, Any]) -> str:
    """8 hex digits that name what a stage keeps between calls: of its inputs' sha256 and its settings."""
    return hashlib.sha256(json.dumps([*inputs, settings]).encode()).hexdigest()[:8]


def training_scenes(split: str, step: int, batch_size: int, device: torch.device) -> tuple[Tensor, Scenes, list[str]]:
    """The batch of an optimiser step: images (B, 3, 64, 64), attributes, captions."""
    indices = range(step * batch_size, (step + 1) * batch_size)
    images, scenes = scene_batch(split, indices)
    return images.to(device), scenes, captions(scenes, split, indices)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Mixed precision of a stage: ``fp32`` or ``bf16``."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def linear_decay(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then linear decay to zero."""
    return min((step + 1) / warmup, 1.0) * max(1.0 - step / steps, 0.0)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = lr


class StageLog:
    """Log of a stage: one JSON line every 50 steps, printed and appended to a file.

    Args:
        path: the file; its folder is made.
    """

    EVERY = 50

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, **values: float | Tensor) -> None:
        """Log the values of a step, if it is one of those."""
        if step % self.EVERY:
            return
        row = {"step": step, "elapsed_sec": round(time.monotonic() - self.start, 1)}
        row |= {k: round(float(torch.as_tensor(v).detach()), 5) for k, v in values.items()}
        line = json.dumps(row)
        print(line, flush=True)
        with self.path.open("a") as f:
            f.write(line + "\n")
