"""``rgbench export``: a network of a run's newest checkpoint as a pipeline folder."""

from __future__ import annotations

from pathlib import Path

import torch

from rgbench import checkpoint
from rgbench.errors import UsageError
from rgbench.models import load_models
from rgbench.run import RunDirectory
from rgbench.trainers.export import Network, export_pipeline
from rgbench.trainers.lcd import LCD
from rgbench.trainers.recipe import LCDRecipe, load_recipe


def export_run(path: Path, network: Network, out: Path | None = None, device: str = "cpu") -> Path:
    """Write a network of a run's newest checkpoint as a pipeline folder; the run itself stays as it is.

    Args:
        path: the run; it need not be finished.
        network: ``target`` (the EMA) or ``student`` (online).
        out: a new folder; ``{run}-{network}`` beside the run by default.
        device: where the networks are put.

    Returns:
        The folder.

    Raises:
        UsageError: no run, no checkpoint, another teacher than the run's, or something at ``out`` already.
    """
    run = RunDirectory.open(path)
    folder = out or path.resolve().with_name(f"{path.resolve().name}-{network}")
    if folder.exists():
        raise UsageError(f"{folder}: exists already; nothing was overwritten. Choose another place with --out")
    newest = checkpoint.latest(run.checkpoints)
    if newest is None:
        raise UsageError(f"{run.checkpoints}: no checkpoint yet; nothing to export")
    recipe, meta = load_recipe(str(run.config_file)), run.read()
    if not isinstance(recipe, LCDRecipe):
        raise UsageError(f"{path}: a run of {recipe.kind} has no student to export")
    models = load_models(recipe.model.teacher_folder(), device, torch.float32)
    if models.weights_sha256 != meta["teacher"]["sha256"]:
        raise UsageError(
            f"{models.path}: not the teacher that {path} was trained from; its weights have another sha256"
        )
    trainer = LCD(recipe, models)
    tensors, state = checkpoint.load(newest)
    for stem, module in trainer.modules().items():
        module.load_state_dict(tensors[stem])
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_pipeline(trainer, recipe, meta | {"step": state["step"]}, folder, network)
    return folder
