"""What every stage of a world build shares: seeds, precision, schedules, progress lines."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from rgbench.benchtop.scenes import Scenes, captions, scene_batch
from rgbench.core.run import stream_seed


def stage_seed(seed: int, stage: str, step: int) -> int:
    """Seed of one optimiser step (-1: the initial weights), pure in (world seed, stage, step)."""
    return stream_seed(seed, stage, step + 1)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Mixed precision of a stage: ``fp32`` or ``bf16``."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def linear_decay(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then linear decay to nothing."""
    return min((step + 1) / warmup, 1.0) * max(1.0 - step / steps, 0.0)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def training_scenes(split: str, step: int, batch_size: int, device: torch.device) -> tuple[Tensor, Scenes, list[str]]:
    """The batch of optimiser step ``step``: images (B, 3, 64, 64), attributes, captions."""
    indices = range(step * batch_size, (step + 1) * batch_size)
    images, scenes = scene_batch(split, indices)
    return images.to(device), scenes, captions(scenes, split, indices)


class StageLog:
    """Prints one JSON line every ``every`` steps and appends it to ``path``."""

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every, self.start = path, every, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, **values: float | Tensor) -> None:
        if step % self.every:
            return
        row = {"step": step, "elapsed_sec": round(time.monotonic() - self.start, 1)}
        row |= {k: round(float(torch.as_tensor(v).detach()), 5) for k, v in values.items()}
        line = json.dumps(row)
        print(line, flush=True)
        with self.path.open("a") as f:
            f.write(line + "\n")


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of a model's state, in place."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)
