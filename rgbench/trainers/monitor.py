"""What a run shows and records while it trains: progress bar, log.jsonl, TensorBoard."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rgbench.run import RunDirectory
from rgbench.trainers.wandb_board import WandbBoard

LOG_ONLY = ("grad_norm/", "gradient/", "fidelity/")
LINES_WITHOUT_TERMINAL = 20  # progress lines of a whole run where no bar can be drawn


class Monitor:
    """Progress and logs of one run; a context manager.

    Args:
        run: where log.jsonl and tensorboard/ lie.
        first: steps done already.
        steps: steps of the whole run.
        batch_size: images per step.
        console: where the bar is drawn; standard error by default.
        wandb: project at Weights & Biases, or None for none.
    """

    def __init__(
        self,
        run: RunDirectory,
        first: int,
        steps: int,
        batch_size: int,
        console: Console | None = None,
        wandb: str | None = None,
    ) -> None:
        self.project = wandb
        self.wandb: WandbBoard | None = None
        self.run, self.first, self.steps, self.batch_size = run, first, steps, batch_size
        self.num_steps, self.step_sec = 0, 0.0
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(run.path.name, total=steps, completed=first, values="")

    def __enter__(self) -> Monitor:
        self.run.rewind_log(self.first)
        self.board = SummaryWriter(str(self.run.tensorboard), purge_step=self.first + 1)
        if self.project is not None:
            self.wandb = WandbBoard(self.project, self.run)
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.board.close()
        if self.wandb is not None:
            self.wandb.close(failed=error is not None)

    @property
    def images_per_sec(self) -> float:
        """Over the optimiser steps of this process, without sample grids and checkpoints."""
        return self.num_steps * self.batch_size / max(self.step_sec, 1e-9)

    def show(self, step: int, values: dict[str, float], step_sec: float) -> None:
        """Move the bar; without a terminal, print a line now and then.

        Args:
            step: steps done.
            values: losses and rewards; what is measured of gradients and of the proxy goes to the log alone.
            step_sec: how long this step took.
        """
        self.num_steps, self.step_sec = self.num_steps + 1, self.step_sec + step_sec
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if not k.startswith(LOG_ONLY) and "@" not in k)
        text += f"  {self.images_per_sec:.1f} images/s"
        self.progress.update(self.task, completed=step, values=text)
        every = max(self.steps // LINES_WITHOUT_TERMINAL, 1)
        if not self.console.is_terminal and (step % every == 0 or step == self.steps):
            line = f"{self.run.path.name}  step {step}/{self.steps}  {text}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row of log.jsonl and one point per curve."""
        values = per_bin(values)
        row = {"step": step, **values, "images_per_sec": round(self.images_per_sec, 3)}
        self.run.log(row)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.add(step, values)

    def log_grid(self, step: int, grid: Tensor) -> None:
        """A sample grid (3, H, W) in [0, 1]."""
        self.board.add_image("samples", grid, step)
        if self.wandb is not None:
            self.wandb.add_grid(step, grid)


def per_bin(values: dict[str, float]) -> dict[str, float]:
    """Means over the samples of a bin from means over all samples.

    Args:
        values: among them ``name@bin``, the mean over all samples of a value that is zero outside of the bin, and
            ``weight@bin``, the share of samples inside. Such means may be averaged again, over micro-batches and
            ranks, as means over the bin may not.

    Returns:
        The same with ``name@bin`` divided by the weight, without the weights, and without bins that are empty.
    """
    weights = {key.partition("@")[2]: value for key, value in values.items() if key.startswith("weight@")}
    out = {}
    for key, value in values.items():
        name, _, where = key.partition("@")
        if not where:
            out[key] = value
        elif name != "weight" and weights[where] > 0:
            out[key] = value / weights[where]
    return out
