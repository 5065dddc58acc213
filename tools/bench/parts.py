"""Where a step's time goes: one timeline, every instant of it in one named part.

Forward: hooks on the networks and wrappers around what is no network switch the part on entry and back on exit, the
innermost winning. Backward: gradient hooks on the outputs of the same parts; when a gradient arrives at a part's
output, its backward begins and lasts until another part's does. Stamps are CUDA events on a GPU, so nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM
from rgbench.train.rg_lcd import RGLCD
from tools.bench.clock import Clock

OTHER = "other"


class Timeline:
    """Stamps with the part that begins at each.

    Args:
        clock: of the device.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._stack = [OTHER]
        self._stamps: list[tuple[str, Any]] = []

    def switch(self, part: str) -> None:
        """From now on, time belongs to ``part``."""
        self._stack[-1] = part
        self._stamps.append((part, self.clock.stamp()))

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Time in here belongs to ``part``, but for what is inside another."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def enter(self, part: str) -> None:
        """Begin a part within the one that runs."""
        self._stack.append(part)
        self.switch(part)

    def leave(self) -> None:
        """Go back to the part that ran before."""
        self._stack.pop()
        self.switch(self._stack[-1])

    def watch_backward(self, output: Any, part: str) -> None:
        """Have ``part`` begin when a gradient arrives at one of these tensors."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.switch(part))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, from the first stamp to the last."""
        self.clock.wait()
        total: dict[str, float] = {}
        ends = [stamp for _, stamp in self._stamps[1:]]
        for (part, start), end in zip(self._stamps, ends, strict=False):
            total[part] = total.get(part, 0.0) + self.clock.between(start, end)
        return total


class _Watched:
    """A callable, timed; everything else of it is reached through it."""

    def __init__(self, inner: Any, call: Callable[..., Any]) -> None:
        self._inner, self._call = inner, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _timed(timeline: Timeline, part: str, call: Callable[..., Any], backward: bool = False) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with timeline.inside(part):
            out = call(*args, **kwargs)
        if backward:
            timeline.watch_backward(out, f"{part} backward")
        return out

    return run


def _hook(timeline: Timeline, module: nn.Module, part: str) -> list[Any]:
    def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
        timeline.leave()
        if torch.is_grad_enabled():
            timeline.watch_backward(output, f"{part} backward")

    return [module.register_forward_pre_hook(lambda *_: timeline.enter(part)), module.register_forward_hook(after)]


def _networks(trainer: LCD) -> list[tuple[nn.Module, str]]:
    models = trainer.models
    found: list[tuple[Any, str]] = [
        (models.unet, "teacher"),
        (trainer.student, "student"),
        (trainer.target, "target"),
        (models.vae.encoder, "encode"),
        (models.vae.decoder, "decode"),
        (models.text_encoder, "text"),
    ]
    if isinstance(trainer, LRM):
        clip = trainer.proxy.clip  # type: ignore[attr-defined]
        found += [(clip.visual, "proxy"), (clip.transformer, "proxy")]
    return found


@contextmanager
def _watched(loop: Loop, timeline: Timeline) -> Iterator[None]:
    """Hooks and wrappers, for one step and no longer."""
    trainer, updater, loader = loop.trainer, loop.updater, loop.loader
    assert isinstance(trainer, LCD)
    handles = [handle for module, part in _networks(trainer) for handle in _hook(timeline, module, part)]
    owners: list[tuple[Any, str, Callable[..., Any]]] = [
        (loader, "load", _timed(timeline, "data", loader.load)),
        (trainer, "prepare", _timed(timeline, "draws", trainer.prepare)),
        (updater, "backward", _timed(timeline, "loss backward", updater.backward)),
        (updater, "reduce", _timed(timeline, "optimiser", updater.reduce)),
        (updater, "step", _timed(timeline, "optimiser", updater.step)),
        (trainer, "after_update", _timed(timeline, "ema", trainer.after_update)),
    ]
    if isinstance(trainer, RGLCD):
        call = _timed(timeline, "reward", trainer.expert, backward=True)
        owners.append((trainer, "expert", _Watched(trainer.expert, call)))
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in owners]
    for owner, name, value in owners:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            if value is None:  # a method: the class has it
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        for handle in handles:
            handle.remove()


def time_parts(loop: Loop, clock: Clock) -> dict[str, float]:
    """Seconds of each part of one optimiser step.

    Args:
        loop: of LCD, RG-LCD or LRM; takes one step.
        clock: of the device.
    """
    timeline = Timeline(clock)
    with _watched(loop, timeline), timeline.inside(OTHER):
        loop.train_step()
    return timeline.seconds()
