"""``rgbench plan``: memory by part and time of a recipe's step before it is launched, from shapes alone.

The loop's own ``train_step`` runs on tensors that have a shape, a type and no values (torch's ``FakeTensorMode``), with
networks of their configurations' shapes. A storage counts from the operation that makes it until it is freed, so that
the peak holds activations with gradient checkpointing, mixed precision and accumulation as the loop has them. FLOPs are
torch's formulae: two per multiply-add of matrix products, convolutions and attention.

Left out: what a GPU takes for itself (context, workspaces, fragmentation), and what is not done at every step: sample
grids, checkpoints, and the measurements of ``monitor``, ``proxy.fidelity`` and ``gradients.every``.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from rgbench.core.errors import UsageError, suggest
from rgbench.core.registry import resolve
from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch, Encoded
from rgbench.data.config import TeacherData
from rgbench.models.folder import read_config
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.rewards.latent_proxy import CONFIG, LatentCLIP
from rgbench.rewards.load import reward_of_shapes
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM, Moments, load_proxy
from rgbench.train.recipe import (
    BaseRecipe,
    FidelitySection,
    LCDRecipe,
    LRMPretrainRecipe,
    LRMRecipe,
    MonitorSection,
    PretrainProxySection,
    RGLCDRecipe,
    VSDRecipe,
    load_recipe,
)

MICRO = 2  # micro-batches that are run: the second meets the gradients of the first, as all others do
STEP, GRADIENTS, OPTIMISER, BATCH = "activations and buffers", "gradients", "optimiser state", "batch"
PARTS = (
    *("teacher", "student", "target", "fake", "VAE", "text encoders", "reward", "proxy"),
    *(OPTIMISER, GRADIENTS, BATCH, STEP),
)
# What autocast computes in float32 on a GPU and not on a CPU (torch's documentation, "CUDA Ops that can autocast to
# float32"), of what networks here keep for the backward pass.
WIDE_ON_GPU = ("group_norm", "layer_norm", "softmax", "log_softmax")
USABLE = 0.9  # of a GPU's memory: the rest is its context, workspaces and fragmentation; assumed, not measured
EFFICIENCY = 0.4  # of the peak rate that training reaches; assumed, not measured


@dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet; dense rates, of bfloat16 with float32 sums.

    Attributes:
        memory_gib: size of the memory.
        bfloat16, float32: FLOP per second.
    """

    memory_gib: int
    bfloat16: float
    float32: float


# NVIDIA's data sheets (H200, H100 and A100 as SXM), for the GeForce cards the white papers of GA102, Ada and Blackwell.
GPUS = {
    "h200": GPU(141, 989e12, 67e12),
    "h100": GPU(80, 989e12, 67e12),
    "a100-80": GPU(80, 312e12, 19.5e12),
    "a100-40": GPU(40, 312e12, 19.5e12),
    "l40s": GPU(48, 362e12, 91.6e12),
    "l4": GPU(24, 121e12, 30.3e12),
    "5090": GPU(32, 209.5e12, 104.8e12),
    "4090": GPU(24, 165.2e12, 82.6e12),
    "3090": GPU(24, 71e12, 35.6e12),
}


@dataclass(frozen=True)
class Plan:
    """What a step takes.

    Attributes:
        parts: name → bytes at the peak, which they sum to.
        flops: of an optimiser step, the mean over those in which the student moves or rests, or a proxy is aligned.
        steps: optimiser steps of the run.
        dtype: of the networks' arithmetic.
        notes: what is not counted as the recipe has it.
    """

    parts: dict[str, int]
    flops: float
    steps: int
    dtype: str
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def seconds(self, gpu: GPU) -> float:
        """Of an optimiser step, at :data:`EFFICIENCY` of the peak rate."""
        return self.flops / (EFFICIENCY * (gpu.float32 if self.dtype == "float32" else gpu.bfloat16))

    def excess(self, gpu: GPU) -> int:
        """Bytes beyond :data:`USABLE` of the memory; negative where it fits."""
        return self.peak - int(USABLE * gpu.memory_gib * 2**30)


def find_gpu(name: str) -> GPU:
    """A GPU by name.

    Raises:
        UsageError: an unknown one; names the nearest.
    """
    if name.lower() not in GPUS:
        raise UsageError(f"--gpu {name[:80]}: unknown; {suggest(name.lower(), GPUS)}")
    return GPUS[name.lower()]


def plan(recipe: str, overrides: Sequence[str] = (), *, on_gpu: bool = True) -> Plan:
    """Plan a recipe's step in one process.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        on_gpu: mixed precision as a GPU's autocast has it, else as a CPU's.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: a configuration is missing; names the command that gets it.
    """
    settings = load_recipe(recipe, overrides)
    planned, notes = _planned(settings)
    often = _how_often(settings)
    share = settings.train.gradient_accumulation_steps / planned.train.gradient_accumulation_steps
    flops: dict[int, int] = {}
    peaks: list[Counter[str]] = []
    with _shapes_alone(on_gpu) as meter:
        loop = _build_loop(planned, meter, notes)
        for step in often:
            meter.restart()
            loop.step = step
            loop.train_step()
            flops[step] = meter.flops
            peaks.append(meter.peak)
    mean = sum(often[step] * flops[step] for step in often) / sum(often.values())
    parts = max(peaks, key=Counter.total)
    return Plan(
        {name: parts[name] for name in PARTS if parts[name]},
        mean * share,
        settings.train.steps,
        settings.train.dtype,
        tuple(notes),
    )


def _how_often(settings: BaseRecipe) -> dict[int, int]:
    """The first step of each kind, from 0, and how many of its kind there are beside one of the others."""
    if isinstance(settings, LRMPretrainRecipe) and (align := settings.proxy.align.steps):
        return {0: settings.train.steps - align, settings.train.steps - 1: align}
    ratio = settings.ratio if isinstance(settings, LCDRecipe) else 1
    return {0: ratio - 1, ratio - 1: 1} if ratio > 1 else {0: 1}


def remedies(recipe: str, overrides: Sequence[str], gpu: GPU) -> Iterator[tuple[list[str], Plan]]:
    """What makes a recipe smaller, each on top of those before, until it fits.

    Yields:
        Settings, and the plan with them.
    """
    settings, added = load_recipe(recipe, overrides), list[str]()
    train = settings.train
    for setting, helps in (
        ("train.gradient_checkpointing=true", isinstance(settings, LCDRecipe) and not train.gradient_checkpointing),
        (f"train.gradient_accumulation_steps={train.batch_size}", train.gradient_accumulation_steps < train.batch_size),
        ("lora={rank: 64}", isinstance(settings, LCDRecipe) and settings.lora is None),
    ):
        if helps:
            added.append(setting)
            found = plan(recipe, [*overrides, *added])
            yield list(added), found
            if found.excess(gpu) <= 0:
                return


def describe(found: Plan, gpu: str | None, helps: Sequence[tuple[list[str], Plan]]) -> list[tuple[str, str]]:
    """Rows of a table: name and description.

    Args:
        found: the plan.
        gpu: a name of :data:`GPUS`; None for no figures of one.
        helps: of :func:`remedies`.
    """
    rows = [(name, _size(size)) for name, size in found.parts.items()]
    rows += [("peak", _size(found.peak)), ("operations", f"{found.flops / 1e12:.3g} TFLOP a step")]
    if gpu is not None:
        card = find_gpu(gpu)
        room, excess = (
            f"{USABLE:.0%} of {card.memory_gib} GiB, the share that is assumed to be usable",
            found.excess(card),
        )
        rows.append((gpu, f"{'fits in' if excess <= 0 else f'does not fit: {_size(excess)} more than'} {room}"))
        for settings, smaller in helps:
            state = "fits" if smaller.excess(card) <= 0 else f"{_size(smaller.excess(card))} too much"
            rows.append(("with", f"{' '.join(settings)}: {_size(smaller.peak)}, {state}"))
        if excess > 0 and not (helps and helps[-1][1].excess(card) <= 0):
            rows.append(("remedy", "a smaller model.resolution with data.resolution, or a larger GPU"))
        seconds = found.seconds(card)
        rate = f"{EFFICIENCY:.0%} of its peak rate is assumed; not measured"
        rows.append(("time", f"{seconds:.3g} s a step, {seconds * found.steps / 3600:.3g} h in all; {rate}"))
    return [*rows, *(("note", note) for note in found.notes)]


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"


def _planned(settings: BaseRecipe) -> tuple[Any, list[str]]:
    """The recipe of the step that is run, and what it leaves out."""
    train = settings.train
    num = min(train.gradient_accumulation_steps, MICRO)
    own: dict[str, Any] = {
        "batch_size": train.batch_size // train.gradient_accumulation_steps * num,
        "gradient_accumulation_steps": num,
        "dtype": "bfloat16" if train.dtype == "float16" else train.dtype,  # as large, without a loss scale
        **{"compile": False, "num_workers": 0, "wandb": None, "trackio": None},
    }
    changes: dict[str, Any] = {"train": train.model_copy(update=own)}
    notes = ["train.compile: counted without"] if train.compile else []
    notes += ["train.shard: counted without; an N-th of the networks is on each of N GPUs"] if train.shard else []
    if isinstance(settings, LCDRecipe):
        changes["monitor"] = MonitorSection()
    if isinstance(settings, LRMRecipe):
        small = {"path": None} if settings.proxy.small else {}
        changes["proxy"] = settings.proxy.model_copy(update={"fidelity": FidelitySection(), **small})
    return settings.model_copy(update=changes), notes


class Meter(TorchDispatchMode):
    """Count live bytes by label, and FLOPs, of everything computed inside; a number read from a tensor is 1.

    Attributes:
        peak: live bytes by label when their sum was largest since :meth:`restart`.
        flops: since :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: Counter[str] = Counter()
        self._labels: dict[int, str] = {}  # by storage
        self.restart()

    def restart(self) -> None:
        """Begin a new peak and count."""
        self.peak, self.flops = Counter(self._live), 0

    def label(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count storages under a name, which they keep until they are freed."""
        for tensor in tensors:
            self._count(tensor, name)

    def _count(self, tensor: Tensor, name: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._labels.get(key)
        if known is None:
            weakref.finalize(storage, self._free, key, size)
        elif name is None:
            return
        else:
            self._live[known] -= size
        self._labels[key] = name or STEP
        self._live[self._labels[key]] += size
        if self._live.total() > self.peak.total():
            self.peak = Counter(self._live)

    def _free(self, key: int, size: int) -> None:
        self._live[self._labels.pop(key)] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else args[0].dtype is torch.bool or 1
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result


def _as_on_gpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One of :data:`WIDE_ON_GPU` under a GPU's autocast, which a CPU's leaves in 16 bits."""

    @wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _wide, (args, kwargs))
        return function(*args, **kwargs)

    return wide


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def _shapes_alone(on_gpu: bool) -> Iterator[Meter]:
    """Everything made inside has shapes and no values."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert))
        for name in WIDE_ON_GPU if on_gpu else ():
            stack.enter_context(mock.patch.object(functional, name, _as_on_gpu(getattr(functional, name))))
        yield stack.enter_context(Meter())


def _convert(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply`` for tensors without values, which torch's own cannot exchange."""
    with torch.no_grad():
        for module in self.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is not None and (new := fn(value)) is not value:
                        is_parameter = isinstance(value, nn.Parameter)
                        table[name] = nn.Parameter(new, value.requires_grad) if is_parameter else new
    return self


def _build_loop(recipe: Any, meter: Meter, notes: list[str]) -> Loop:
    """The loop of a recipe, its optimisers' state as after a first step, all of it labelled."""
    folder = recipe.model.teacher_folder(weights=False)
    models = load_models(folder, "cpu", torch.float32, recipe.model.resolution, weights=False)
    models.family.check_dtype(models, recipe.train.dtype)
    trainer = _build_trainer(recipe, models, notes)
    loop = Loop(trainer, _Shapes(recipe, models, meter), recipe, RunDirectory(Path("unused")))
    for optimiser, group in zip(loop.updater.optimisers.values(), loop.updater.groups.values(), strict=True):
        for parameter in group.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        meter.label(OPTIMISER, (value for value in tree_leaves(dict(optimiser.state)) if isinstance(value, Tensor)))
        for parameter in group.parameters:
            parameter.register_post_accumulate_grad_hook(lambda own: meter.label(GRADIENTS, [own.grad]))
    for name, network in _networks(trainer):
        meter.label(name, [*network.parameters(), *network.buffers()])
    return loop


def _build_trainer(recipe: Any, models: DiffusionModels, notes: list[str]) -> Any:
    """The trainer of a recipe, with parts of any weights."""
    kind, parts, options = resolve("trainer", recipe.kind), list[Any](), dict[str, Any]()
    if isinstance(recipe, LRMRecipe | LRMPretrainRecipe):
        parts.append(_proxy(recipe, models, notes))
    if isinstance(recipe, RGLCDRecipe) or (isinstance(recipe, LRMPretrainRecipe) and recipe.proxy.align.steps):
        assert recipe.reward is not None  # which an alignment needs
        preset = recipe.model.find("reward.path") if recipe.model.preset else None
        folder = preset.reward_folder() if preset and preset.root else None
        expert = reward_of_shapes(recipe.reward, folder, notes)
        parts.insert(0 if isinstance(recipe, RGLCDRecipe) else 1, expert)
    if isinstance(recipe, VSDRecipe) and recipe.vsd.path is not None:
        options["origin"] = load_models(recipe.vsd.path, "cpu", torch.float32, weights=False).unet
    if issubclass(kind, LRM):  # the moments of scores, which are measured on the data, move no byte
        kind = type(kind.__name__, (kind,), {"standardise": lambda self: Moments((0.0, 1.0), (0.0, 1.0))})
    return kind(recipe, models, *parts, **options)


def _proxy(recipe: Any, models: DiffusionModels, notes: list[str]) -> Any:
    """The latent proxy of a recipe, with any weights."""
    pretrain = isinstance(recipe, LRMPretrainRecipe)
    if not pretrain and recipe.proxy.small is not None:
        return load_proxy(recipe, models)
    preset = recipe.model.find("proxy.path") if recipe.model.preset else None
    if not pretrain:
        path = Path(recipe.proxy.path) if recipe.proxy.path else preset and preset.latent_proxy
        if path is not None and (path / CONFIG).is_file():
            proxy = LatentCLIP(read_config(path / CONFIG), path)
            proxy.check_fits(models.latent_shape, models.scaling_factor, path)
            return proxy.requires_grad_(False).eval()
        notes.append(f"proxy.path {path}: not there; counted as rgbench train sd21/lrm_pretrain makes one")
    section = recipe.proxy if pretrain else PretrainProxySection()
    clip = Path(section.clip) if section.clip else preset.reward_folder() if preset and preset.root else None
    channels, height, width = models.latent_shape
    vision = {"image_size": [height, width], **section.vision.model_dump()}
    made = LatentCLIP.of_shapes(clip, vision, latent_channels=channels, latent_scale=models.scaling_factor)
    return made.requires_grad_(False).eval()


class _Shapes:
    """Data of the recipe's shapes.

    Args:
        recipe: of the step.
        models: of the teacher.
        meter: labels the batch.
    """

    name = "shapes"
    length: int | None = None

    def __init__(self, recipe: BaseRecipe, models: DiffusionModels, meter: Meter) -> None:
        self.models, self.meter = models, meter
        self.side = getattr(recipe.data, "resolution", models.resolution)
        cached = isinstance(recipe.data, TeacherData) or recipe.train.latents_cache == "always"
        self.embeds = models.encode_prompts([""]) if cached else None

    def fingerprint(self) -> dict[str, Any]:
        """None."""
        return {}

    def load(self, indices: list[int]) -> Batch:
        """A batch with captions that differ."""
        num, captions = len(indices), [f"a photograph, {i}" for i in indices]
        if self.embeds is None:
            images = torch.zeros(num, 3, self.side, self.side)
            self.meter.label(BATCH, [images])
            return Batch(images, captions, captions)
        mean, std = (torch.zeros(num, *self.models.latent_shape) for _ in range(2))
        encoded = Encoded(mean, std, self.embeds.repeat(num, 1, 1))
        self.meter.label(BATCH, [mean, std, encoded.prompt_embeds])
        return Batch(None, captions, captions, encoded, torch.zeros(num, 2), torch.zeros(num, dtype=torch.int64))


def _networks(trainer: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and network; of storages that two share, the later name counts."""
    models = trainer.models
    for name in ("proxy", "fake", "target", "student"):
        if hasattr(trainer, name):
            yield name, getattr(trainer, name)
    encoders = {"text_encoder": models.text_encoder}
    if models.pipeline is not None:
        encoders = {k: v for k, v in models.pipeline.components.items() if k.startswith("text_encoder")}
    yield from (("text encoders", encoder) for encoder in encoders.values() if encoder is not None)
    yield "VAE", models.vae
    yield "teacher", models.unet
    yield from (("reward", network) for network in _inside(getattr(trainer, "expert", None)))


def _inside(owner: Any) -> Iterator[nn.Module]:
    """Networks of a reward, or of those that it is made of."""
    if isinstance(owner, nn.Module):
        yield owner
    elif isinstance(owner, list):
        for each in owner:
            yield from _inside(each)
    elif type(owner).__module__.startswith("rgbench.rewards"):
        for each in vars(owner).values():
            yield from _inside(each)
