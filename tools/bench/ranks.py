"""``python -m tools.bench growth ranks``: a step on one rank and on two, and what of it is exchange.

On the CPU each rank has one thread, and gradients go over gloo through the machine's own memory: what is seen is the
arithmetic of splitting a step, not a network. torchrun starts this module in each rank; the first one writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rgbench.core.errors import RgbenchError
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.process import tune_process

# Ranks and images of the whole step: the same batch on two ranks, and the same on each.
PLANS = ((1, 32), (2, 32), (2, 64))
EXCHANGES = ("average", "largest", "gather_rows", "gather_lists")


def measure(
    methods: Sequence[str], overrides: list[str], rounds: int, device: str, plans: Sequence[tuple[int, int]],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each method and plan.

    Args:
        methods: those whose step is timed.
        overrides: ``key.path=value`` settings of the recipe.
        rounds: how often each step is timed.
        device: ``cpu`` or ``cuda``.
        plans: ranks and images of the whole step.
        say: prints a line.

    Raises:
        RgbenchError: the ranks failed.
    """
    rows = []
    for method in methods:
        for num, size in plans:
            say(f"growth {method}: {num} ranks, {size} images, on {device}")
            settings = [*overrides, f"train.batch_size={size}"]
            rows.append(_launch({"method": method, "overrides": settings, "rounds": rounds, "device": device}, num))
    return rows


def _launch(settings: dict[str, Any], num: int) -> dict[str, Any]:
    """Start the ranks, each with one thread on a CPU, and read what the first one wrote."""
    with tempfile.TemporaryDirectory(prefix="rgbench-bench-") as folder:
        file = Path(folder) / "row.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
        command = [sys.executable, *launcher, "-m", __name__, json.dumps(settings), str(file)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if settings["device"] == "cpu" else {}
        code = subprocess.run(command, env=os.environ | threads).returncode
        if code:
            raise RgbenchError(f"growth: {num} ranks of {settings['method']} failed with exit code {code}, see above")
        row: dict[str, Any] = read_json(file)
        return row


def main(settings: dict[str, Any], file: Path) -> None:
    """One rank's part.

    Args:
        settings: as :func:`measure` gives them.
        file: where the first rank writes the row.
    """
    import torch

    from rgbench.core.launch import Ranks
    from rgbench.core.registry import resolve
    from rgbench.core.run import RunDirectory
    from rgbench.data.sources import open_source
    from rgbench.models.pipeline import load_models
    from rgbench.train.loop import Loop
    from rgbench.train.recipe import load_recipe
    from tools.bench.clock import Clock, Spread

    ranks = Ranks.join(settings["device"])
    recipe = load_recipe(settings["method"], settings["overrides"])
    models = load_models(recipe.model.teacher_folder(), ranks.device, torch.float32)
    trainer = resolve("trainer", recipe.kind).build(recipe, models)
    loop = Loop(trainer, open_source(recipe.data), recipe, RunDirectory(file.parent / "run"), ranks)
    clock = Clock(torch.device(ranks.device))
    spent = _watch(ranks, clock)
    loop.train_step()
    steps: list[float] = []
    shares: dict[str, list[float]] = {name: [] for name in EXCHANGES}
    for _ in range(settings["rounds"]):
        spent.clear()
        steps.append(clock.seconds(loop.train_step))
        for name, values in shares.items():
            values.append(spent.get(name, 0.0))
    numel = sum(p.numel() for group in loop.updater.groups.values() for p in group.parameters)
    alone = [clock.seconds(lambda: ranks.average([torch.zeros(numel, device=ranks.device)])) for _ in range(9)]
    if ranks.is_main:
        size = recipe.train.batch_size
        row = {
            "method": settings["method"],
            "ranks": ranks.size,
            "batch_size": size,
            "threads_each": torch.get_num_threads(),
            "seconds": Spread.of(steps).to_json(),
            "images_per_sec": size / Spread.of(steps).median,
            "gradient_bytes": 4 * numel,
            "exchange_sec": {name: Spread.of(values).to_json() for name, values in shares.items()},
            "all_reduce_alone_sec": Spread.of(alone[1:]).to_json(),
        }
        write_json_atomic(file, row)
    ranks.leave()


def _watch(ranks: Any, clock: Any) -> dict[str, float]:
    """Count the seconds inside each of the ranks' exchanges, waiting for the others included."""
    spent: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            clock.wait()
            start = time.perf_counter()
            out = call(*args, **kwargs)
            clock.wait()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return out

        return run

    for name in EXCHANGES:
        setattr(ranks, name, timed(name, getattr(ranks, name)))
    return spent


if __name__ == "__main__":
    tune_process()
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
