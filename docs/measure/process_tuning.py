"""What the process tuning gives: the benchtop LCD step under each setting, idle and beside a busy process.

    python docs/measure/process_tuning.py [--steps N] [--out results/bench/process-tuning.json]

Each setting runs in its own process (OpenMP and glibc read their settings once), settings
alternate over the rounds, and the median second per step is reported with its ratio to
the default. "Spin" is how often a thread of GNU's OpenMP looks at a barrier before it sleeps;
passive is 0, the default 300,000. The neighbour is one thread that multiplies matrices.
Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from rgbench.core.io import write_json_atomic

SETTINGS = {
    "default": (False, {}),
    "allocator": (True, {}),
    "passive": (False, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "allocator, passive": (True, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "allocator, spin 300": (True, {"GOMP_SPINCOUNT": "300"}),
    "allocator, spin 1000 (rgbench)": (True, {"GOMP_SPINCOUNT": "1000"}),
    "allocator, spin 3000": (True, {"GOMP_SPINCOUNT": "3000"}),
}
STEP = """
import sys, time
if sys.argv[1] == "True":
    from rgbench.process import keep_freed_memory
    assert keep_freed_memory()
from rgbench.data import open_source
from rgbench.data.sampler import batch_indices
from rgbench.models import load_models
from rgbench.registry import resolve
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.recipe import load_recipe
import torch
recipe = load_recipe("lcd", [])
trainer = resolve("trainer", "lcd").build(recipe, load_models("benchtop", "cpu", torch.float32))
source, size = open_source(recipe.data), recipe.train.batch_size
seconds = []
for step in range(int(sys.argv[2]) + 2):
    batch = source.load(batch_indices(0, step, size, source.length).tolist())
    start = time.perf_counter()
    losses = trainer.step(batch, StepDraws(0, step, size)).losses["student"]
    torch.stack([v.mean() for v in losses.values()]).sum().backward()
    seconds.append(time.perf_counter() - start)
print("SECONDS", *seconds[2:])
"""
NEIGHBOUR = "import torch\ntorch.set_num_threads(1)\nx = torch.randn(1500, 1500)\nwhile True: x @ x"


def measure(tuned: bool, environment: dict[str, str], steps: int) -> list[float]:
    """Seconds of each step, forward and backward, in a fresh process."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_"))}
    command = [sys.executable, "-c", STEP, str(tuned), str(steps)]
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    return [float(x) for x in done.stdout.split("SECONDS")[1].split()]


def rounds(steps: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each setting, the settings taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(repeats):
        for name, (tuned, environment) in SETTINGS.items():
            seconds[name] += measure(tuned, environment, steps)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/bench/process-tuning.json"))
    arguments = parser.parse_args()
    from rgbench.core.run import provenance

    document = {"schema_version": 1, "unit": "median seconds per LCD step, batch 32", "rows": []}
    idle = rounds(arguments.steps, arguments.rounds)
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        beside = rounds(arguments.steps, arguments.rounds)
    finally:
        neighbour.kill()
        neighbour.wait()
    base = median(idle["default"])
    for name in SETTINGS:
        row = {"setting": name, "idle_sec": median(idle[name]), "busy_sec": median(beside[name])}
        row |= {"idle_gain": base / row["idle_sec"], "busy_cost": row["busy_sec"] / row["idle_sec"]}
        document["rows"].append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(arguments.out, document | {"provenance": provenance()})


if __name__ == "__main__":
    main()
