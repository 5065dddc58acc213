"""Times, FLOPs and rates of this machine, and the JSON files that keep them.

FLOPs are torch's own count (``torch.utils.flop_counter``): two per multiply-add of matrix products, convolutions and
attention, forward and backward, as the step runs. Elementwise work, normalisation and optimisers are not counted.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.process import available_cores, lacks_memory
from rgbench.core.run import provenance

SCHEMA_VERSION = 1
DOES_NOT_FIT = "does_not_fit"  # key of a row without times: the message of a GPU that lacks memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SQUARE = {"cpu": 1536, "cuda": 8192}  # side of the product whose rate is the machine's; larger ones run no faster
LEVEL, NUM_RESAMPLES = 0.95, 2000

Work = Mapping[str, Callable[[], Any]]


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Time one call, from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def alternate(work: Work, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time several pieces of work in turn (A B C, A B C, …), each called once before.

    Args:
        work: name → call.
        rounds: number of timings of each.
        device: on which they run.

    Returns:
        Name → seconds, in the order of the rounds.
    """
    for call in work.values():
        call()
    rows = [{name: seconds_of(call, device) for name, call in work.items()} for _ in range(rounds)]
    return {name: [row[name] for row in rows] for name in work}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median of at least one value, and the 95 % bootstrap interval of the median."""
    draws = np.random.default_rng(0).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    medians = np.median(np.asarray(values, dtype=np.float64)[draws], axis=1)
    low, high = np.quantile(medians, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high), "num": len(values)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """Spread of slow / fast, pair by pair: a machine that slows down slows both of a pair."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def count_flops(work: Callable[[], Any]) -> int:
    """Run ``work`` once and count its FLOPs."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one operator has no formula
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOP per second of one large square product, after one that is not timed."""
    side = SQUARE[device.type]
    a, b = (torch.rand(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / seconds_of(lambda: torch.mm(a, b), device)


def peak_bytes(device: torch.device, work: Callable[[], Any]) -> int | None:
    """Largest number of bytes that torch allocates on a GPU during ``work``; None on a CPU, where nothing counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def row_of(head: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure one row; keep it, without times, where the GPU lacks memory. Frees what the measurement allocated.

    Args:
        head: values that name the row.
        measure: builds what it needs and returns the row's other values.
    """
    try:
        found = measure()
    except (RuntimeError, RgbenchError) as error:
        cause = error.__cause__ if isinstance(error, RgbenchError) else error  # the loop explains a lack of memory
        if not isinstance(cause, RuntimeError) or not lacks_memory(cause):
            raise
        found = {DOES_NOT_FIT: str(cause).partition("\n")[0]}
    gc.collect()  # networks and hooks refer to each other; not inside `except`, whose error holds the step's frames
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    return head | found


def save(out: Path, words: Sequence[str], command: str, device: str, measured: dict[str, Any]) -> Path:
    """Write a measurement as ``out/{words joined by -}.json``.

    Args:
        out: folder; made where it is missing.
        words: parts of the file's name.
        command: command line that repeats the measurement.
        device: ``cpu`` or ``cuda``.
        measured: ``what``, ``preset``, ``rows`` and the settings.

    Returns:
        The file.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{'-'.join(words)}.json"
    origin = provenance(device)
    machine = {
        "device": origin["device"],
        "device_type": device,
        "cores": available_cores(),
        "threads": origin["threads"],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "versions": origin["packages"] | {"python": origin["python"], "torch": torch.__version__},
    }
    head = {"schema_version": SCHEMA_VERSION, "command": command, "git": origin["git"], "time": origin["time"]}
    write_json_atomic(file, head | {"machine": machine} | measured)
    return file


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Read all benchmark results of a folder, by file name.

    Raises:
        UsageError: a damaged file, or one of another schema version.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        content = read_json(file)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise UsageError(f"{file}: schema version {version}, not {SCHEMA_VERSION}; measure it again")
        found.append(content)
    return found
