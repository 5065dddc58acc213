"""Attribute classifiers of the oracle: each architecture trained apart, on scenes that no other stage sees.

They see every combination of attributes, with blur, noise and colour shifts, so that they fail on wrong content and not
on soft edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from rgbench.benchtop.oracle import CLASSIFIERS, Classifier, targets
from rgbench.benchtop.preferences import blur, noise
from rgbench.benchtop.scenes import scene_batch
from tools.benchtop.stage import StageLog, autocast, linear_decay, set_lr, stage_seed


@dataclass(frozen=True)
class ClassifierConfig:
    """Hyper-parameters of the classifiers; ``steps`` by architecture, as each needs."""

    seed: int = 0
    steps: dict[str, int] = field(default_factory=lambda: {"resnet": 1000, "vit": 3000, "convnext": 1500})
    batch_size: int = 64
    lr: float = 2e-3
    dtype: str = "fp32"


def train_classifiers(config: ClassifierConfig, out: Path, device: torch.device) -> None:
    """Train all classifiers; write ``out/classifiers/{architecture}/model.safetensors`` in fp16."""
    for number, name in enumerate(CLASSIFIERS):
        folder = out / "classifiers" / name
        if not (folder / "model.safetensors").exists():
            classifier = _train(name, number, config, out, device)
            folder.mkdir(parents=True, exist_ok=True)
            state = classifier.state_dict()
            state = {k: v.half().cpu() if v.is_floating_point() else v.cpu() for k, v in state.items()}
            save_file(state, folder / "model.safetensors")


def _train(name: str, number: int, config: ClassifierConfig, out: Path, device: torch.device) -> Classifier:
    stage = f"judge_{name}"  # the seeds of the shipped weights
    torch.manual_seed(stage_seed(config.seed, stage, -1))
    classifier = Classifier(name).to(device).train()
    lr = config.lr * (0.5 if name == "vit" else 1.0)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
    log = StageLog(out / f"classifier_{name}.jsonl")
    for step in range(config.steps[name]):
        generator = torch.Generator().manual_seed(stage_seed(config.seed, stage, step))
        set_lr(optimiser, lr * linear_decay(step, config.steps[name]))
        start = (10**8 * (number + 1)) + step * config.batch_size
        images, scenes = scene_batch("all", range(start, start + config.batch_size))
        with autocast(device, config.dtype):
            logits = classifier(_augment(images, generator).to(device))
        truth = [t.to(device) for t in targets(scenes)]
        terms = [F.cross_entropy(x.float(), t, ignore_index=-1) for x, t in zip(logits, truth, strict=True)]
        loss = torch.stack(terms).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimiser.step()
        right = torch.stack([(x.argmax(1) == t)[t >= 0].float().mean()
                             for x, t in zip(logits, truth, strict=True)])  # fmt: skip
        log(step, loss=loss, accuracy=right.mean(), worst=right.min())
    return classifier.eval()


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur half of the images, add noise to half, shift gain and offset of each channel; CPU tensors."""
    n = len(images)

    def strength(limit: float) -> Tensor:
        return limit * torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.5)

    images = noise(blur(images, strength(0.5), generator), strength(0.3), generator)
    gain = 1 + 0.1 * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
    offset = 0.05 * (2 * torch.rand(n, 3, 1, 1, generator=generator) - 1)
    return (gain * images + offset).clamp(0, 1)
