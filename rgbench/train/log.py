"""What a run shows and records while it trains: progress bar, log.jsonl, TensorBoard.

Weights & Biases beside TensorBoard, for those who ask for it (``train.wandb``; the extra ``rgbench[wandb]``).

What a run has cost so far, over all its interruptions.

Sample grids: the same prompts and seeds at every look, so that one sees the student learn.
"""

from __future__ import annotations

import io
import math
import resource
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rgbench.core.config import load_yaml
from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_file, write_bytes_atomic
from rgbench.core.run import RunDirectory, stream_generator
from rgbench.train.base import Trainer
from rgbench.train.recipe import LCDRecipe


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


SUMMED: tuple[str, ...] = ("cpu_sec", "gpu_sec")
PEAKS: tuple[str, ...] = ("peak_rss_gib", "peak_gpu_gib")
GPU_KEYS = ("gpu_sec", "peak_gpu_gib")
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


class CostMeter:
    """Adds up wall and CPU time, images, reward calls and peak memory.

    Args:
        before: an earlier :meth:`read` to go on from, or None.
        device_type: where the run computes; a GPU's time counts only for ``cuda``, whatever else the process did.
    """

    def __init__(self, before: dict[str, Any] | None = None, device_type: str = "cpu") -> None:
        self._before, self._on_gpu = before or {}, device_type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self.images, self.reward_calls = self._before.get("images", 0), self._before.get("reward_calls", 0)

    def read(self) -> dict[str, Any]:
        """``wall_sec`` and ``cpu_sec`` of this process, ``images`` trained on, ``reward_calls`` (images that the expert
        scored), ``peak_rss_gib``; of a run on a CUDA GPU, ``gpu_sec`` for which it held it and ``peak_gpu_gib``.
        """
        rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / 2**30
        return {
            "wall_sec": round(self._before.get("wall_sec", 0.0) + time.monotonic() - self._wall, 3),
            "cpu_sec": round(self._before.get("cpu_sec", 0.0) + time.process_time() - self._cpu, 3),
            "images": self.images,
            "reward_calls": self.reward_calls,
            "peak_rss_gib": round(max(self._before.get("peak_rss_gib", 0.0), rss_gib), 4),
            **self._gpu(),
        }

    def _gpu(self) -> dict[str, float]:
        """Seconds for which a GPU was held, busy or not, as clusters bill them; nothing where none ever was."""
        spent = {key: self._before[key] for key in GPU_KEYS if key in self._before}
        if self._on_gpu:
            held_sec = spent.get("gpu_sec", 0.0) + time.monotonic() - self._wall
            peak_gib = max(spent.get("peak_gpu_gib", 0.0), torch.cuda.max_memory_allocated() / 2**30)
            spent = {"gpu_sec": round(held_sec, 3), "peak_gpu_gib": round(peak_gib, 4)}
        return spent


def of_all_ranks(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """The cost of a run from its ranks' :meth:`CostMeter.read`, the main one's first.

    CPU and GPU time add up, peaks are those of the largest process, and all else the main rank has counted for all.
    """
    own = costs[0]
    summed = {key: round(sum(cost.get(key, 0.0) for cost in costs), 3) for key in SUMMED if key in own}
    peaks = {key: max(cost.get(key, 0.0) for cost in costs) for key in PEAKS if key in own}
    return {**own, **summed, **peaks}


NUM_PROMPTS = 8


def sample_grid(trainer: Trainer, recipe: LCDRecipe, prompts: list[str]) -> Tensor:
    """Images of the network that will be exported, tiled.

    Args:
        trainer: its target or its student is sampled, as the recipe says.
        recipe: sampling steps, guidance, seed.
        prompts: one image each.

    Returns:
        (3, rows·H, columns·W) in [0, 1], on the CPU.
    """
    network = trainer.target if recipe.sampling.network == "target" else trainer.student
    models = trainer.models.with_student(network, recipe.lcd.num_ddim_timesteps, recipe.lcd.timestep_scaling)
    generators = [stream_generator(recipe.seed, "preview", 0, i) for i in range(len(prompts))]
    sampling = recipe.sampling
    images = models.sample(prompts, generators, num_steps=sampling.steps, guidance_scale=sampling.guidance_scale).cpu()
    return tile(images)


def tile(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in rows of about √(2B): (3, rows·H, columns·W); what is left over is black."""
    columns = min(len(images), math.ceil(math.sqrt(2 * len(images))))
    rows = math.ceil(len(images) / columns)
    blank = torch.zeros(rows * columns - len(images), *images.shape[1:])
    grid = torch.cat([images.float(), blank]).unflatten(0, (rows, columns))
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def write_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) in [0, 1] as an 8-bit PNG."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_bytes_atomic(path, buffer.getvalue())
