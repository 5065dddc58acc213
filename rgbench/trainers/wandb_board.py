"""Weights & Biases beside TensorBoard, for those who ask for it (``train.wandb``; the extra ``rgbench[wandb]``)."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from rgbench.errors import UsageError
from rgbench.files import sha256_file
from rgbench.run import RunDirectory
from rgbench.strict_yaml import load_yaml


def check_wandb() -> None:
    """Refuse a recipe that wants it where it is not installed.

    Raises:
        UsageError: it is not.
    """
    if find_spec("wandb") is None:
        raise UsageError("train.wandb needs the wandb library: pip install 'rgbench[wandb]'; or leave train.wandb null")


class WandbBoard:
    """One run there; gone on with under the same id when the run is.

    Its own settings come from its environment variables: ``WANDB_MODE=offline`` on a node without network.

    Args:
        project: its name there.
        run: read for the configuration; its folder holds wandb's files.

    Raises:
        UsageError: not logged in, or no network.
    """

    def __init__(self, project: str, run: RunDirectory) -> None:
        import wandb

        config, _ = load_yaml(run.config_file)
        identity = sha256_file(run.path / "environment.json")[:16]  # holds the time at which the run began
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=project, name=run.path.name, id=identity, resume="allow", dir=str(run.path), config=config
            )
        except wandb.errors.Error as error:
            raise UsageError(f"train.wandb: {error}; run: wandb login, or set WANDB_MODE=offline") from error

    def add(self, step: int, values: dict[str, float]) -> None:
        """One point per curve."""
        self._run.log(values, step=step)

    def add_grid(self, step: int, grid: Tensor) -> None:
        """A sample grid (3, H, W) in [0, 1]."""
        pixels = (grid.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        self._run.log({"samples": self._wandb.Image(pixels)}, step=step)

    def close(self, failed: bool) -> None:
        """End it; a run that was interrupted shows as such there and may go on."""
        self._run.finish(exit_code=int(failed))
