"""``python -m tools.bench levers``: what each known lever gives, each alone, the work with it and without it in turn.

| lever | without | with |
|---|---|---|
| one teacher pass | prompt and empty prompt in two calls | in one call of twice the batch |
| latents cached | images and captions encoded | the same read from a latents cache |
| decode in thirds | three images of each prompt decoded at once | one third of them at a time |
| reward text kept | the expert's text tower at each of three calls | at the first |
| proxy text kept | a frozen text tower at each of two calls | at the first |
| fused AdamW | parameters one at a time | one kernel over all |
| foreach EMA | parameters one at a time | one call over all |
| channels last | student forward and backward in NCHW | in NHWC |
| bfloat16 | the same in float32 | in bfloat16 autocast; changes the numbers |

Each runs in the recipe's arithmetic, as the plain step does whose share it saves; ``bfloat16`` alone sets its own.
Compilation is measured on whole steps: :mod:`tools.bench.compiled`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rgbench.models.pipeline import decode_images
from rgbench.train.base import autocast
from rgbench.train.cache import encode
from rgbench.train.lcd import ema_update
from rgbench.train.lrm import LRM
from tools.bench.clock import Clock, Spread, alternate, ratio
from tools.bench.fitting import row_of
from tools.bench.plain import PlainDraws, PlainStep
from tools.bench.subject import Subject

Pair = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class Lever:
    """One of them.

    Attributes:
        kept: whether the trainers use it where the recipe says nothing.
        exact: whether it changes no number beyond rounding.
        make: the work without and with it, from the bench's own parts.
    """

    kept: bool
    exact: bool
    make: Callable[[Bench], Pair]


class Bench:
    """Networks and one batch, as the levers' work needs them.

    Args:
        subject: of LRM, which has every part.
    """

    def __init__(self, subject: Subject) -> None:
        assert isinstance(subject.trainer, LRM)
        self.subject, self.trainer = subject, subject.trainer
        self.models = subject.trainer.models
        self.size = subject.loop.recipe.train.batch_size
        self.batch = subject.direct.load(0)[0]
        self.embeds = self.models.encode_prompts(self.batch.prompts)
        draws = PlainDraws(self.size, self.models.device)
        self.latents = draws.normal("noise", self.models.latent_shape)
        self.timesteps = draws.integers("index", 1000)
        dim = subject.trainer.recipe.lcd.time_cond_proj_dim
        self.w_embedding = None if dim is None else draws.normal("w", (dim,))
        self.plain = PlainStep(subject.trainer)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Where networks that do not learn are called: without gradients, in the recipe's arithmetic."""
        with torch.no_grad(), self.subject.loop.updater.autocast():
            yield

    def call(self, unet: nn.Module, latents: Tensor, repeat: int = 1) -> Tensor:
        """A UNet's output; ``repeat`` copies of the batch at once."""
        embedding = self.w_embedding if unet is not self.models.unet else None
        return unet(
            torch.cat([latents] * repeat),
            torch.cat([self.timesteps] * repeat),
            encoder_hidden_states=torch.cat([self.embeds] * repeat),
            timestep_cond=embedding,
            return_dict=False,
        )[0]

    def learn(self, student: nn.Module, latents: Tensor | None = None, dtype: str | None = None) -> None:
        """Forward and backward of a student; in the recipe's arithmetic, unless ``dtype`` names another."""
        latents = self.latents if latents is None else latents
        try:
            with autocast(dtype or self.subject.loop.recipe.train.dtype, self.models.device.type):
                output = self.call(student, latents)
            output.float().square().mean().backward()
        finally:  # a backward pass that does not fit has made some of them
            for parameter in student.parameters():
                parameter.grad = None


def _teacher(b: Bench) -> Pair:
    def twice() -> None:
        with b.frozen():
            b.call(b.models.unet, b.latents)
            b.call(b.models.unet, b.latents)

    def once() -> None:
        with b.frozen():
            b.call(b.models.unet, b.latents, repeat=2)

    return twice, once


def _cached(b: Bench) -> Pair:
    def read() -> None:
        with b.frozen():
            encode(b.models, b.subject.cached.load(0)[0])

    def make() -> None:
        with b.frozen():
            encode(b.models, b.batch)

    return make, read


def _thirds(b: Bench) -> Pair:
    latents = torch.cat([b.latents] * 3)

    def decode(parts: int) -> None:
        with b.frozen():
            for part in latents.chunk(parts):
                decode_images(b.models.vae, part)

    return lambda: decode(1), lambda: decode(3)


def _text(encode_text: Callable[[Tensor], Tensor], tokenizer: Any, b: Bench, calls: int) -> Pair:
    tokens = tokenizer(b.batch.prompts).to(b.models.device)

    def encode_times(number: int) -> None:
        with b.frozen():
            for _ in range(number):
                encode_text(tokens)

    return lambda: encode_times(calls), lambda: encode_times(1)


def _expert_text(b: Bench) -> Pair:
    expert: Any = b.trainer.expert
    return _text(expert.model.encode_text, expert.tokenizer, b, 3)


def _proxy_text(b: Bench) -> Pair:
    proxy: Any = b.trainer.proxy
    return _text(proxy.clip.encode_text, proxy.tokenizer, b, 2)


def _adamw(b: Bench) -> Pair:
    def steps(fused: bool) -> Callable[[], Any]:
        parameters = [nn.Parameter(p.detach().clone()) for p in b.trainer.student.parameters()]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return torch.optim.AdamW(parameters, lr=1e-9, foreach=False, fused=fused).step

    return steps(False), steps(True)


def _ema(b: Bench) -> Pair:
    return b.plain.average, lambda: ema_update(b.trainer.target, b.trainer.student, 0.95)


def _channels_last(b: Bench) -> Pair:
    student = copy.deepcopy(b.trainer.student).to(memory_format=torch.channels_last)
    latents = b.latents.to(memory_format=torch.channels_last)
    return lambda: b.learn(b.trainer.student), lambda: b.learn(student, latents)


def _bfloat16(b: Bench) -> Pair:
    student = b.trainer.student
    return lambda: b.learn(student, dtype="float32"), lambda: b.learn(student, dtype="bfloat16")


LEVERS = {
    "one teacher pass": Lever(True, True, _teacher),
    "latents cached": Lever(True, True, _cached),
    "decode in thirds": Lever(True, True, _thirds),
    "reward text kept": Lever(True, True, _expert_text),
    "proxy text kept": Lever(True, True, _proxy_text),
    "fused AdamW": Lever(True, True, _adamw),
    "foreach EMA": Lever(True, True, _ema),
    "channels last": Lever(False, True, _channels_last),
    "bfloat16": Lever(False, False, _bfloat16),
}


def measure(subject: Subject, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row per lever; ``step_share`` is the time saved as a share of one plain step.

    Args:
        subject: of LRM.
        names: of :data:`LEVERS`.
        rounds: how often each is timed.
    """
    bench, clock = Bench(subject), Clock(subject.trainer.models.device)

    def plain() -> None:
        bench.plain(subject.direct.load(0)[0], PlainDraws(bench.size, bench.models.device))

    steps = alternate({"plain": plain}, max(2, rounds // 2), clock)["plain"]
    rows = []
    for name in names:
        head = {"lever": name, "kept": LEVERS[name].kept, "exact": LEVERS[name].exact}
        rows.append(row_of(head, partial(_row, LEVERS[name], bench, clock, rounds, Spread.of(steps).median)))
    return rows


def _row(lever: Lever, bench: Bench, clock: Clock, rounds: int, plain_sec: float) -> dict[str, Any]:
    without, with_it = lever.make(bench)
    seconds = alternate({"without": without, "with": with_it}, rounds, clock)
    spreads = {key: Spread.of(values) for key, values in seconds.items()}
    return {
        "without_sec": spreads["without"].to_json(),
        "with_sec": spreads["with"].to_json(),
        "gain": ratio(seconds["without"], seconds["with"]).to_json(),
        "step_share": (spreads["without"].median - spreads["with"].median) / plain_sec,
    }
