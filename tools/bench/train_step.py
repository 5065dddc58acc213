"""``python -m tools.bench train-step``: an optimiser step, the plain reference step, the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from rgbench.data.batches import batch_indices
from tools.bench.clock import Clock, Spread, alternate, ratio
from tools.bench.counting import Count, count
from tools.bench.machine import Machine, peak_memory
from tools.bench.neighbour import beside
from tools.bench.parts import time_parts
from tools.bench.plain import PlainDraws, PlainStep
from tools.bench.subject import Subject

OURS, CACHED, PLAIN = "rgbench", "rgbench, latents cached", "plain"
SHARE_OF_SHAPES = 0.9
NUM_SHAPES_KEPT = 5
PARTS_REPEATS = 3


class Contenders:
    """The steps that are compared, on one set of networks.

    Student, target and proxy are shared, so that a large model is held once; each step has its own AdamW. What a
    recipe switches on in the networks (recomputed activations, compilation) is off while the plain step runs.

    Args:
        subject: what is measured.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject, self.plain = subject, PlainStep(subject.trainer)
        self.device = subject.trainer.models.device
        self.num_plain = 0
        train = subject.loop.recipe.train
        self.size = train.batch_size
        trainer = subject.trainer
        self._switched = [trainer.student, trainer.models.vae] if train.gradient_checkpointing else []
        self._compiled = [trainer.models.unet, trainer.student, trainer.target] if train.compile else []
        self._calls = [network._compiled_call_impl for network in self._compiled]

    def work(self) -> dict[str, Callable[[], Any]]:
        """Name → one step."""
        return {PLAIN: self.run_plain, OURS: self.run_ours, CACHED: self.run_cached}

    def run_ours(self) -> None:
        """The loop's own step, from images."""
        self.subject.loop.loader = self.subject.direct
        self.subject.loop.train_step()

    def run_cached(self) -> None:
        """The loop's own step, from a latents cache."""
        self.subject.loop.loader = self.subject.cached
        self.subject.loop.train_step()

    def run_plain(self) -> None:
        """The plain step on images of the same source."""
        self._levers(False)
        indices = batch_indices(0, self.num_plain, self.size, self.subject.source.length)
        self.num_plain += 1
        self.plain(self.subject.source.load(indices.tolist()), PlainDraws(self.size, self.device))
        self._levers(True)

    def _levers(self, on: bool) -> None:
        for network in self._switched:
            network.enable_gradient_checkpointing() if on else network.disable_gradient_checkpointing()
        for network, call in zip(self._compiled, self._calls, strict=True):
            network._compiled_call_impl = call if on else None

    def held_by(self, name: str) -> int:
        """Bytes that one contender holds between steps and the others do not: its optimisers' moments."""
        optimisers = self.plain.optimisers if name == PLAIN else self.subject.loop.updater.optimisers
        states = (value for o in optimisers.values() for state in o.state.values() for value in state.values())
        return sum(v.nbytes for v in states if isinstance(v, torch.Tensor) and v.device.type == self.device.type)


def measure(subject: Subject, machine: Machine, rounds: int, *, neighbour: bool = False) -> dict[str, Any]:
    """One row of the result: a method on a machine.

    Args:
        subject: what is measured.
        machine: of the same device and arithmetic.
        rounds: how often each step is timed.
        neighbour: whether to time it beside a busy process too.
    """
    contenders, clock = Contenders(subject), Clock(subject.trainer.models.device)
    work = contenders.work()
    counts = {name: count(step) for name, step in work.items()}
    rates: list[float] = []
    copies: list[float] = []

    def probe() -> None:
        rates.append(machine.large_rate())
        copies.append(machine.copy_rate())

    seconds = alternate({**work, "machine": probe}, rounds, clock)
    del seconds["machine"], rates[0], copies[0]  # the warm-up's
    shapes = _shapes(machine, counts[OURS])
    size = contenders.size
    return {
        "method": subject.method,
        "weights": subject.weights,
        "batch_size": size,
        "dtype": subject.loop.recipe.train.dtype,
        "resolution": subject.trainer.models.resolution,
        "matmul_flop_per_sec": Spread.of(rates).to_json(),
        "copy_bytes_per_sec": Spread.of(copies).to_json(),
        "square": machine.square,
        "shapes": shapes,
        "steps": {name: _step(counts[name], seconds[name], size, median(rates), median(copies)) for name in work},
        "ratio_to_plain": {name: ratio(seconds[PLAIN], seconds[name]).to_json() for name in (OURS, CACHED)},
        "peak_memory": peaks(contenders),
        "beside_busy_process": beside(contenders.run_ours, rounds, clock) if neighbour else None,
        "parts": None if subject.loop.recipe.train.compile else parts(subject, clock),
    }


def _step(counted: Count, seconds: list[float], size: int, rate: float, bandwidth: float) -> dict[str, Any]:
    """What was counted and timed of one contender, and its floor."""
    spread = Spread.of(seconds)
    arithmetic, traffic = counted.flops / rate, counted.bytes / bandwidth
    return {
        "seconds": spread.to_json(),
        "images_per_sec": size / spread.median,
        "flops": counted.flops,
        "bytes": counted.bytes,
        "operators": counted.operators,
        "floor_arithmetic_sec": arithmetic,
        "floor_traffic_sec": traffic,
        "share_of_matmul_rate": arithmetic / spread.median,
        "share_of_floor": max(arithmetic, traffic) / spread.median,
    }


def _shapes(machine: Machine, counted: Count) -> dict[str, Any]:
    """The rate at the step's own forward shapes, together and for the heaviest of them."""
    rows, time_share = [], 0.0
    chosen = counted.heaviest(SHARE_OF_SHAPES)
    for shape, share in chosen:
        rate = machine.product_rate(shape)
        time_share += share / rate
        rows.append({"batch": shape.batch, "m": shape.m, "k": shape.k, "n": shape.n, "share": share,
                     "flop_per_sec": rate})  # fmt: skip
    covered = sum(share for _, share in chosen)
    return {"flop_per_sec": covered / time_share, "share_covered": covered, "num": len(rows),
            "heaviest": rows[:NUM_SHAPES_KEPT]}  # fmt: skip


def peaks(contenders: Contenders) -> dict[str, Any]:
    """Peak memory of each step, without the moments that the other's AdamW holds meanwhile."""
    found = {}
    for name, step in contenders.work().items():
        peak = peak_memory(contenders.device, step)
        if contenders.device.type == "cuda":
            peak["bytes"] -= contenders.held_by(OURS if name == PLAIN else PLAIN)
        found[name] = peak
    return found


def parts(subject: Subject, clock: Clock) -> dict[str, float]:
    """Median seconds of each part of a step from images."""
    subject.loop.loader = subject.direct
    runs = [time_parts(subject.loop, clock) for _ in range(PARTS_REPEATS)]
    names = sorted({name for run in runs for name in run})
    return {name: median(run.get(name, 0.0) for run in runs) for name in names}
