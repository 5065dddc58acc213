"""What a run shows and records while it trains: progress, log.jsonl, TensorBoard, trackers, cost, captions, samples."""

from __future__ import annotations

import io
import logging
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from rgbench.core.config import load_yaml
from rgbench.core.errors import UsageError
from rgbench.core.io import sha256_file, write_bytes_atomic
from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.rewards.base import num_tokens
from rgbench.train.base import CaptionTokenizer
from rgbench.train.recipe import TrainSection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_ONLY = ("grad_norm/", "gradient/", "fidelity/", "gold/")  # not shown beside the progress bar
UTILITY, RIGHT, REWARD = "gold/utility", "gold/right", "gold/reward"
TRACKERS = ("wandb", "trackio")  # libraries, and keys of the recipe's train section that name a project there
GOLD_FILE = "gold.png"
# TensorBoard's page "Custom Scalars": over-optimisation on one screen.
PANELS = {
    "over-optimisation": {
        "gold and trained reward, same images": ["Multiline", [UTILITY, RIGHT, REWARD]],
        "share of the reward in the gradient": ["Multiline", ["gradient/share"]],
        "proxy and expert": ["Multiline", ["proxy_correlation", "pair_accuracy", "fidelity/kendall_tau"]],
    }
}
LINES_WITHOUT_TERMINAL = 20  # progress lines of a whole run where no bar can be drawn
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss

log = logging.getLogger("rgbench")


class Monitor:
    """Progress and logs of one run; a context manager.

    Args:
        run: where log.jsonl and tensorboard/ are.
        first: steps already done.
        train: of the recipe.
        console: where the bar is drawn; standard error by default.
    """

    def __init__(self, run: RunDirectory, first: int, train: TrainSection, console: Console | None = None) -> None:
        self.run, self.first, self.train, self.steps = run, first, train, train.steps
        self.trackers: list[Tracker] = []
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
        self.task = self.progress.add_task(run.path.name, total=self.steps, completed=first, values="")

    def __enter__(self) -> Monitor:
        self.run.rewind_log(self.first)
        self.board = SummaryWriter(str(self.run.tensorboard), purge_step=self.first + 1)
        self.board.add_custom_scalars(PANELS)
        for library in TRACKERS:
            if (project := getattr(self.train, library)) is not None:
                self.trackers.append(Tracker(library, project, self.run))
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.board.close()
        for tracker in self.trackers:
            tracker.close(failed=error is not None)

    @property
    def images_per_sec(self) -> float:
        """Over the optimiser steps of this process, without sample grids and checkpoints."""
        return self.num_steps * self.train.batch_size / max(self.step_sec, 1e-9)

    def show(self, step: int, values: dict[str, float], step_sec: float) -> None:
        """Move the bar; without a terminal, print a line now and then.

        Args:
            step: steps done.
            values: of the step; only losses and rewards are shown.
            step_sec: duration of the step.
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
        """Write one row of log.jsonl and one point per curve."""
        values = per_bin(values)
        row = {"step": step, **values, "images_per_sec": round(self.images_per_sec, 3)}
        self.run.log(row)
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()  # now, so that its thread fails here or not at all
        for tracker in self.trackers:
            tracker.add(step, values)

    def grid_file(self, step: int) -> Path:
        """Where the sample grid of a step lies."""
        return self.run.samples / f"step-{step:08d}.png"

    def log_grid(self, step: int, grid: Tensor) -> None:
        """Write a sample grid (3, H, W) in [0, 1]."""
        self._log_image("samples", step, grid, self.grid_file(step))

    def show_gold(self, step: int, values: Mapping[str, float]) -> None:
        """Print what was measured of gold, and draw it against the trained reward over all steps so far."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name.startswith("gold/"))
        self.console.print(f"{self.run.path.name}  step {step}  {shown}", highlight=False, soft_wrap=True)
        self._log_image("gold", step, draw_gold(self.run.read_log()), self.run.path / GOLD_FILE)

    def _log_image(self, name: str, step: int, image: Tensor, file: Path) -> None:
        write_png(image, file)
        self.board.add_image(name, image, step)
        self.board.flush()
        for tracker in self.trackers:
            tracker.add_image(name, step, image)


def plot_gold(log: Sequence[Mapping[str, float]], axes: Axes) -> Axes:
    """Draw gold against the trained reward along training, or against the step where there is no reward.

    Args:
        log: rows of a run's ``log.jsonl``; those without gold are passed over.
        axes: to draw into; returned.
    """
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in log if UTILITY in row]
    with_reward = bool(rows) and all(REWARD in row for row in rows)
    x = [row[REWARD if with_reward else "step"] for row in rows]
    y = [row[UTILITY] for row in rows]
    axes.plot(x, y, color="0.7", lw=1)
    if with_reward:
        points = axes.scatter(x, y, c=[row["step"] for row in rows], cmap="viridis", zorder=2)
        axes.figure.colorbar(points, ax=axes, label="optimiser step", ticks=MaxNLocator(integer=True))
    else:
        axes.scatter(x, y, zorder=2)
    axes.set(xlabel="trained reward" if with_reward else "optimiser step", ylabel="gold utility")
    axes.set_title("Gold along training")
    return axes


def draw_gold(log: list[dict[str, Any]]) -> Tensor:
    """The picture of gold along training, (3, H, W) in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which minds where it is

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    plot_gold(log, figure.add_subplot())
    canvas.draw()
    return torch.tensor(np.asarray(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1) / 255


def per_bin(values: dict[str, float]) -> dict[str, float]:
    """Means over the samples of a bin from means over all samples.

    Args:
        values: among them ``name@bin``, the mean over all samples of a value that is zero outside of the bin, and
            ``weight@bin``, the share of samples inside. Such means may be averaged again, over micro-batches and
            ranks; means over a bin may not.

    Returns:
        The same with ``name@bin`` divided by the weight, without the weights and without empty bins.
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


def tile(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in rows of about √(2B): (3, rows·H, columns·W), the rest black."""
    columns = min(len(images), math.ceil(math.sqrt(2 * len(images))))
    rows = math.ceil(len(images) / columns)
    blank = torch.zeros(rows * columns - len(images), *images.shape[1:])
    grid = torch.cat([images.float(), blank]).unflatten(0, (rows, columns))
    return grid.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def write_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) in [0, 1] as an 8-bit PNG."""
    buffer = io.BytesIO()
    Image.fromarray(_pixels(image)).save(buffer, format="PNG")
    write_bytes_atomic(path, buffer.getvalue())


def _pixels(image: Tensor) -> Any:
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def check_trackers(train: TrainSection) -> None:
    """Refuse ``train.wandb`` and ``train.trackio`` where the library is missing.

    Raises:
        UsageError: it is.
    """
    for library in TRACKERS:
        if getattr(train, library) is not None and find_spec(library) is None:
            raise UsageError(
                f"train.{library} needs the {library} library: pip install 'rgbench[{library}]'; or leave "
                f"train.{library} null"
            )


class Tracker:
    """A run at Weights & Biases or trackio, which has its interface; continued on resume.

    Their settings come from their environment variables: ``WANDB_MODE=offline`` on a node without network.

    Args:
        library: ``wandb`` or ``trackio``.
        project: its name there.
        run: read for the configuration.

    Raises:
        UsageError: not logged in, or no network.
    """

    def __init__(self, library: str, project: str, run: RunDirectory) -> None:
        self._library = import_module(library)
        config, _ = load_yaml(run.config_file)
        identity = sha256_file(run.path / "environment.json")[:16]  # holds the time at which the run began
        options: dict[str, Any] = {"project": project, "config": config, "resume": "allow"}
        if library == "wandb":
            options |= {"name": run.path.name, "id": identity, "dir": str(run.path)}
        else:  # knows runs by their names
            options |= {"name": f"{run.path.name}-{identity}", "embed": False}
        failures = (self._library.errors.Error,) if library == "wandb" else ()
        try:
            with redirect_stdout(sys.stderr):  # where trackio prints: stdout is the command's own
                self._run = self._library.init(**options)
        except failures as error:
            raise UsageError(f"train.wandb: {error}; run: wandb login, or set WANDB_MODE=offline") from error

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write one point per curve."""
        self._run.log(values, step=step)

    def add_image(self, name: str, step: int, image: Tensor) -> None:
        """Write an image (3, H, W) in [0, 1]."""
        self._run.log({name: self._library.Image(_pixels(image))}, step=step)

    def close(self, failed: bool) -> None:
        """End it; at Weights & Biases an interrupted run is shown as failed until it is resumed."""
        with redirect_stdout(sys.stderr):
            self._run.finish(**({"exit_code": int(failed)} if self._library.__name__ == "wandb" else {}))


class CaptionCount:
    """Counts captions, and those that a tokenizer cuts: a reward cannot judge words that it never sees.

    Args:
        tokenizers: by name.

    Attributes:
        seen: captions so far.
        cut: of them, too long for a tokenizer, by its name.
    """

    def __init__(self, tokenizers: Mapping[str, CaptionTokenizer]) -> None:
        self.tokenizers = tokenizers
        self.seen, self.cut = 0, dict.fromkeys(tokenizers, 0)

    def add(self, batch: Batch) -> None:
        """Count a batch, and warn of the first caption that each tokenizer cuts."""
        self.seen += len(batch.prompts)
        for name, own in self.tokenizers.items():
            for identity, num in zip(batch.ids, num_tokens(own.tokenizer, batch.prompts), strict=True):
                if num > own.limit and not self.cut[name]:
                    reader = name.replace("_", " ")
                    log.warning(
                        f"the caption of {identity} has {num} tokens, the {reader} reads {own.limit}: the rest is cut. "
                        "run.json counts such captions"
                    )
                self.cut[name] += num > own.limit

    def state_dict(self) -> dict[str, Any]:
        """``seen`` and ``cut``, JSON-able."""
        return {"seen": self.seen, "cut": dict(self.cut)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; a new tokenizer starts at 0."""
        self.seen = state["seen"]
        self.cut |= {name: num for name, num in state["cut"].items() if name in self.cut}


def merge_counts(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several ranks' :meth:`CaptionCount.state_dict`."""
    cut = {name: sum(count["cut"][name] for count in counts) for name in counts[0]["cut"]}
    return {"seen": sum(count["seen"] for count in counts), "cut": cut}


class CostMeter:
    """Wall, CPU and GPU time, images, reward calls and peak memory of a run, over all its interruptions.

    Args:
        before: an earlier :meth:`read` to continue, or None.
        device_type: where the run computes; a GPU's time counts only for ``cuda``.
    """

    def __init__(self, before: dict[str, Any] | None = None, device_type: str = "cpu") -> None:
        self._before, self._on_gpu = before or {}, device_type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self.images, self.reward_calls = self._before.get("images", 0), self._before.get("reward_calls", 0)

    def read(self) -> dict[str, Any]:
        """``wall_sec`` and ``cpu_sec`` of this process, ``images`` trained on, ``reward_calls`` (images that the expert
        scored), ``peak_rss_gib``; of a run that ever computed on a GPU, ``peak_gpu_gib`` and ``gpu_sec``, for which it
        held one, busy or not, as clusters bill them.
        """
        before, wall_sec = self._before, time.monotonic() - self._wall
        rss_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES / 2**30
        cost = {
            "wall_sec": round(before.get("wall_sec", 0.0) + wall_sec, 3),
            "cpu_sec": round(before.get("cpu_sec", 0.0) + time.process_time() - self._cpu, 3),
            "images": self.images,
            "reward_calls": self.reward_calls,
            "peak_rss_gib": round(max(before.get("peak_rss_gib", 0.0), rss_gib), 4),
        }
        if self._on_gpu:
            peak_gib = torch.cuda.max_memory_allocated() / 2**30
            cost["gpu_sec"] = round(before.get("gpu_sec", 0.0) + wall_sec, 3)
            cost["peak_gpu_gib"] = round(max(before.get("peak_gpu_gib", 0.0), peak_gib), 4)
            return cost
        return cost | {key: before[key] for key in ("gpu_sec", "peak_gpu_gib") if key in before}


def merge_costs(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """The cost of a run from its ranks' :meth:`CostMeter.read`, the main one's first.

    CPU and GPU time add up, peaks are those of the largest process, and the main rank has counted the rest for all.
    """
    merged = dict(costs[0])
    for key in merged.keys() & {"cpu_sec", "gpu_sec"}:
        merged[key] = round(sum(cost.get(key, 0.0) for cost in costs), 3)
    for key in merged.keys() & {"peak_rss_gib", "peak_gpu_gib"}:
        merged[key] = max(cost.get(key, 0.0) for cost in costs)
    return merged
