"""``python -m tools.bench compile``: whole steps with ``torch.compile`` beside the same steps without, in turn.

| networks | what is compiled |
|---|---|
| recipe | what ``train.compile`` compiles: teacher, student, target |
| all | these, the autoencoder's two halves, the text encoder, the image towers of the reward and of the proxy |

Compilation begins with an empty cache, as the first start on a machine does. Student and target begin equal, where the
loss is all rounding, so gradients differ by more than a compiler's own error would: how far the same step's lie apart
when its UNets take NHWC instead of NCHW, the same sums in another order, is measured beside.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.train.base import StepDraws
from rgbench.train.lcd import LCD
from rgbench.train.lrm import LRM
from rgbench.train.rg_lcd import RGLCD
from tools.bench.clock import Clock, Spread, alternate, ratio
from tools.bench.subject import Subject

CHOICES = ("recipe", "all")
EAGER = "eager"
WARM_UP = 2  # the second call may compile once more: what the first made depends on what it saw


def networks(trainer: LCD, choice: str) -> list[nn.Module]:
    """What is compiled.

    Args:
        trainer: of LCD, RG-LCD or LRM.
        choice: ``recipe`` or ``all``.
    """
    models: Any = trainer.models
    found = [models.unet, trainer.student, trainer.target]
    if choice == "all":
        found += [models.vae.encoder, models.vae.decoder, models.text_encoder]
        experts: list[Any] = [trainer.expert] if isinstance(trainer, RGLCD) else []
        found += [expert.model.visual for expert in experts]
        proxies: list[Any] = [trainer.proxy] if isinstance(trainer, LRM) else []
        found += [proxy.clip.visual for proxy in proxies]
    return found


class Switch:
    """Turns the compiled form of networks on and off.

    Args:
        trainer: whose networks are compiled, once each, when they are first called.
    """

    def __init__(self, trainer: LCD) -> None:
        self.trainer = trainer
        self._all = networks(trainer, "all")
        for network in self._all:
            network.compile()
        self._calls = {id(network): network._compiled_call_impl for network in self._all}
        self.to(EAGER)

    def to(self, choice: str) -> None:
        """From now on ``eager``, ``recipe`` or ``all``."""
        on = [] if choice == EAGER else [id(network) for network in networks(self.trainer, choice)]
        for network in self._all:
            network._compiled_call_impl = self._calls[id(network)] if id(network) in on else None


def check_compiler(device: str) -> None:
    """See that ``torch.compile`` finds the compiler that it calls.

    Args:
        device: ``cpu``, whose kernels are C++, or ``cuda``, where Triton builds its launchers in C.

    Raises:
        UsageError: there is none.
    """
    if device == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UsageError("compile: Triton needs a C compiler for a GPU's kernels; install gcc, or name one in CC")
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise UsageError("compile: torch.compile needs a C++ compiler on the CPU; install g++")


def measure(subject: Subject, choices: Sequence[str], rounds: int, cache: Path) -> dict[str, Any]:
    """One method's step without compilation and with it.

    Args:
        subject: a method whose recipe does not compile.
        choices: of :data:`CHOICES`.
        rounds: how often each is timed.
        cache: an empty folder for what the compiler keeps.

    Raises:
        UsageError: a recipe that compiles already.
    """
    device = subject.trainer.models.device
    if subject.loop.recipe.train.compile:
        raise UsageError("compile: is measured beside the step without it; leave train.compile out")
    rounding = difference(reordered(subject), gradients(subject))
    with nothing_compiled(cache):
        switch, clock = Switch(subject.trainer), Clock(device)
        plain, found = gradients(subject), {}
        for choice in choices:
            switch.to(choice)
            first = [clock.seconds(lambda: gradients(subject))]
            apart = difference(gradients(subject), plain)
            first += [clock.seconds(subject.loop.train_step) for _ in range(WARM_UP)]
            found[choice] = {"first_sec": first, "gradient_difference": apart}
            switch.to(EAGER)
            plain = gradients(subject)
        seconds = alternate({name: _step(subject, switch, name) for name in (EAGER, *choices)}, rounds, clock)
    return {
        "method": subject.method,
        "batch_size": subject.loop.recipe.train.batch_size,
        "dtype": subject.loop.recipe.train.dtype,
        "rounding_difference": rounding,
        "eager_sec": Spread.of(seconds[EAGER]).to_json(),
        "compiled": {name: _compared(seconds[EAGER], seconds[name], found[name]) for name in choices},
    }


def _step(subject: Subject, switch: Switch, choice: str) -> Callable[[], None]:
    def step() -> None:
        switch.to(choice)
        subject.loop.train_step()

    return step


def _compared(eager: Sequence[float], compiled: Sequence[float], found: dict[str, Any]) -> dict[str, Any]:
    """Gain, what compiling took, and after how many steps it has paid for itself."""
    usual, spread = Spread.of(eager).median, Spread.of(compiled)
    compile_sec = sum(max(0.0, first - spread.median) for first in found["first_sec"])
    saved = usual - spread.median
    return {
        "seconds": spread.to_json(),
        "gain": ratio(eager, compiled).to_json(),
        "compile_sec": compile_sec,
        "steps_to_pay": None if saved <= 0 else compile_sec / saved,
        "gradient_difference": found["gradient_difference"],
    }


def gradients(subject: Subject) -> dict[str, list[Tensor]]:
    """Of the first batch with the draws of step 0, by learner; nothing is updated."""
    trainer, loop = subject.trainer, subject.loop
    batch = subject.direct.load(0)[0]
    with loop.updater.autocast():
        result = trainer.step(batch, StepDraws(0, 0, len(batch.prompts), dtype=trainer.models.dtype))
    loop.updater.backward(result, 1)
    found = {
        name: [p.grad.clone() for p in learner.parameters if p.grad is not None]
        for name, learner in loop.updater.groups.items()
    }
    loop.updater.drop()
    return found


def reordered(subject: Subject) -> dict[str, list[Tensor]]:
    """The same gradients with the UNets in NHWC: equal but for the order of sums."""
    unets = networks(subject.trainer, "recipe")
    for unet in unets:
        unet.to(memory_format=torch.channels_last)
    found = gradients(subject)
    for unet in unets:
        unet.to(memory_format=torch.contiguous_format)
    return found


def difference(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]]) -> dict[str, float]:
    """|a − b| / |b| over all elements, by learner."""
    found = {}
    for name, theirs in b.items():
        gap = torch.stack([(x - y).norm() for x, y in zip(a[name], theirs, strict=True)]).norm()
        found[name] = float(gap / torch.stack([y.norm() for y in theirs]).norm())
    return found


@contextmanager
def nothing_compiled(folder: Path) -> Iterator[None]:
    """What was compiled before is forgotten, in the process as on the disk, and so is afterwards what was within.

    Args:
        folder: made if missing; what Inductor and Triton keep comes under it.
    """
    from torch._inductor.utils import fresh_cache  # here: takes seconds, which no other verb should pay

    folder.mkdir(exist_ok=True)
    torch._dynamo.reset()  # its code is kept by function, so another method's networks would find it
    try:
        with fresh_cache(dir=str(folder), delete=False):
            yield
    finally:
        torch._dynamo.reset()
