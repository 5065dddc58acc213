"""A run's checkpoints as targets, so that rewards and images can be followed along its training.

A checkpoint holds the networks but no pipeline. Its target is the finished run's pipeline
with the checkpoint's weights in place of the final ones: everything else is linked, so that
a checkpoint costs no more room than its network.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from rgbench import checkpoint
from rgbench.errors import UsageError
from rgbench.evaluation.targets import Target
from rgbench.files import load_safetensors, save_safetensors_atomic
from rgbench.strict_yaml import load_yaml

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"

log = logging.getLogger(__name__)


def checkpoint_targets(target: Target, scratch: Path) -> list[Target]:
    """The intact checkpoints of a finished run, from the first to the last before its end.

    Args:
        target: a run; anything else has no checkpoints.
        scratch: an existing folder for their pipelines, needed until the last was evaluated.

    Returns:
        Targets of the run's own name, told apart by their weights and ``training["step"]``;
        empty for a target that is no run.

    Raises:
        UsageError: a run that kept no checkpoint before its last step, or one of another network.
    """
    if not target.training:
        return []
    run = target.folder.parent
    found = []
    for folder in reversed(checkpoint.checkpoints(run / "checkpoints")):
        step = int(folder.name.removeprefix("step-"))
        if step >= target.training["steps"]:
            continue
        try:
            checkpoint.verify(folder)
        except checkpoint.CorruptCheckpoint as error:
            log.warning("%s; this checkpoint is left out", error)
            continue
        place = _pipeline(target.folder, folder / f"{_network(run)}.safetensors", scratch / target.name / folder.name)
        found.append(replace(target, folder=place, training={**target.training, "step": step}))
    if not found:
        raise UsageError(
            f"{run}: no checkpoint before its last step is left; train with a larger train.keep_checkpoints"
        )
    return found


def _network(run: Path) -> str:
    """Which network the run exports: "target" or "student"."""
    config, _ = load_yaml(run / "config.yaml")
    return str(config["sampling"]["network"])


def _pipeline(finished: Path, weights: Path, place: Path) -> Path:
    """Links to the finished pipeline's files, but for the network's weights."""
    final, ours = load_safetensors(finished / WEIGHTS), load_safetensors(weights)
    if final.keys() != ours.keys() or any(final[key].shape != ours[key].shape for key in final):
        raise UsageError(f"{weights}: not the network of {finished}; evaluate this run without --checkpoints")
    for file in sorted(path for path in finished.rglob("*") if path.is_file()):
        link = place / file.relative_to(finished)
        link.parent.mkdir(parents=True, exist_ok=True)
        if file != finished / WEIGHTS:
            os.symlink(file.resolve(), link)
    save_safetensors_atomic(ours, place / WEIGHTS)
    return place
