"""``rgbench plan``: memory by part and time of a recipe's step before it is launched, from shapes alone.

The loop's own ``train_step`` runs on tensors that have a shape, a type and no values (torch's ``FakeTensorMode``), with
networks of their configurations' shapes. A storage counts from the operation that makes it until it is freed, so that
the peak holds activations with gradient checkpointing, mixed precision and accumulation as the loop has them. FLOPs are
torch's formulae: two per multiply-add of matrix products, convolutions and attention.

Of several GPUs the first is planned; torch's "fake" process group stands for the others and sends nothing. With
``train.shard`` the networks, their gradients and optimiser states are its shards. "gathered blocks" are the parameters
of the blocks that are whole at the peak, with the buffers in which they arrive. A block's whole gradients, and the
buffers in which gradients are averaged, are among "activations and buffers".

Left out: what a GPU takes for itself (context, workspaces, fragmentation), the time of messages between GPUs, and what
is not done at every step: sample grids, checkpoints, and the measurements of ``monitor``, ``proxy.fidelity`` and
``gradients.every``.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from rgbench.core.errors import ConfigError, UsageError, suggest
from rgbench.core.launch import Ranks
from rgbench.core.registry import resolve
from rgbench.core.run import RunDirectory
from rgbench.core.shard import mesh_of
from rgbench.data.batches import Batch, Encoded
from rgbench.data.config import TeacherData
from rgbench.models.folder import read_config
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.rewards.latent_proxy import CONFIG, LatentCLIP
from rgbench.rewards.load import reward_of_shapes
from rgbench.train.loop import Loop, check_split
from rgbench.train.lrm import LRM, Moments, small_proxy
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
GATHERED = "gathered blocks"  # of networks in shards
PARTS = (
    *("teacher", "student", "target", "fake", "VAE", "text encoders", "reward", "proxy"),
    *(OPTIMISER, GRADIENTS, BATCH, GATHERED, STEP),
)
# FSDP's operations whose outputs are gathered: a block in one buffer, then its parameters.
GATHERING = (torch.ops.fsdp.all_gather_copy_in.default, torch.ops.fsdp.split_with_sizes_copy.default)
# What autocast computes in float32 on a GPU and not on a CPU (torch's documentation, "CUDA Ops that can autocast to
# float32"), of what networks here keep for the backward pass.
WIDE_ON_GPU = ("group_norm", "layer_norm", "softmax", "log_softmax")
USABLE = 0.9  # of a GPU's memory: the rest is its context, workspaces and fragmentation; assumed, not measured
EFFICIENCY = 0.4  # of the peak rate that training reaches; assumed, not measured
SHARD = "train.shard=true"

# DTensor finds the shapes of an operation's results on whole tensors, which no GPU holds.
SHAPES_OF = "_propagate_tensor_meta_non_cached"
T = TypeVar("T")


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
    """What a step takes on each GPU.

    Attributes:
        parts: name → bytes at the peak, which they sum to.
        flops: of an optimiser step, the mean over those in which the student moves or rests, or a proxy is aligned.
        steps: optimiser steps of the run.
        dtype: of the networks' arithmetic.
        notes: what is not counted as the recipe has it.
        gpus: that train together.
    """

    parts: dict[str, int]
    flops: float
    steps: int
    dtype: str
    notes: tuple[str, ...]
    gpus: int = 1

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


def plan(recipe: str, overrides: Sequence[str] = (), *, on_gpu: bool = True, gpus: int = 1) -> Plan:
    """Plan a recipe's step on one of the GPUs that train together.

    Args:
        recipe: a YAML file, or a packaged recipe by name.
        overrides: ``key.path=value`` settings.
        on_gpu: mixed precision as a GPU's autocast has it, else as a CPU's.
        gpus: their number, one process each.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: no GPU, or the batch cannot be split evenly; or a configuration is missing: names the command that
            gets it.
    """
    if gpus < 1:
        raise UsageError(f"--gpus {gpus}: at least 1")
    settings = load_recipe(recipe, overrides)
    check_split(settings.train, gpus)
    planned, notes = _planned(settings, gpus)
    often = _how_often(settings)
    share = settings.train.gradient_accumulation_steps / planned.train.gradient_accumulation_steps
    flops: dict[int, int] = {}
    peaks: list[Counter[str]] = []
    with _first_of(gpus) as ranks:
        mesh = ranks.mesh() if settings.train.shard else None  # needs values
        with _shapes_alone(on_gpu) as meter:
            loop = _build_loop(planned, ranks, mesh, meter, notes)
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
        gpus,
    )


def _how_often(settings: BaseRecipe) -> dict[int, int]:
    """The first step of each kind, from 0, and how many of its kind there are beside one of the others."""
    if isinstance(settings, LRMPretrainRecipe) and (align := settings.proxy.align.steps):
        return {0: settings.train.steps - align, settings.train.steps - 1: align}
    ratio = settings.ratio if isinstance(settings, LCDRecipe) else 1
    return {0: ratio - 1, ratio - 1: 1} if ratio > 1 else {0: 1}


def remedies(recipe: str, overrides: Sequence[str], gpu: GPU, gpus: int = 1) -> Iterator[tuple[list[str], Plan]]:
    """What makes a recipe smaller, each on top of those before, until it fits.

    Args:
        recipe: as of :func:`plan`.
        overrides: as of :func:`plan`.
        gpu: that it shall fit.
        gpus: as of :func:`plan`.

    Yields:
        Settings, and the plan with them.
    """
    settings, added = load_recipe(recipe, overrides), list[str]()
    train, most = settings.train, settings.train.batch_size // gpus
    for setting, helps in (
        ("train.gradient_checkpointing=true", isinstance(settings, LCDRecipe) and not train.gradient_checkpointing),
        (f"train.gradient_accumulation_steps={most}", train.gradient_accumulation_steps < most),
        (SHARD, gpus > 1 and not train.shard and _is_recipe(recipe, [*overrides, SHARD])),
        ("lora={rank: 64}", isinstance(settings, LCDRecipe) and settings.lora is None),
    ):
        if helps:
            added.append(setting)
            found = plan(recipe, [*overrides, *added], gpus=gpus)
            yield list(added), found
            if found.excess(gpu) <= 0:
                return


def _is_recipe(recipe: str, overrides: Sequence[str]) -> bool:
    try:
        load_recipe(recipe, overrides)
    except ConfigError:
        return False
    return True


def describe(found: Plan, gpu: str | None, helps: Sequence[tuple[list[str], Plan]]) -> list[tuple[str, str]]:
    """Rows of a table: name and description.

    Args:
        found: the plan.
        gpu: a name of :data:`GPUS`; None for no figures of one.
        helps: of :func:`remedies`.
    """
    rows = [(name, _size(size)) for name, size in found.parts.items()]
    each = "" if found.gpus == 1 else f", on each of {found.gpus} GPUs"
    rows += [(f"peak{each}", _size(found.peak)), (f"operations{each}", f"{found.flops / 1e12:.3g} TFLOP a step")]
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
        rate += "; messages between GPUs come on top" if each else ""
        rows.append(("time", f"{seconds:.3g} s a step, {seconds * found.steps / 3600:.3g} h in all; {rate}"))
    return [*rows, *(("note", note) for note in found.notes)]


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"


def _planned(settings: BaseRecipe, gpus: int) -> tuple[Any, list[str]]:
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
    notes += ["train.shard: of no effect on one GPU; give --gpus"] if train.shard and gpus == 1 else []
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
        self._sizes: dict[int, int] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new peak and count."""
        self.peak, self.flops = Counter(self._live), 0

    def label(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Count storages under a name, which they keep until they are freed; of a tensor in shards, this rank's."""
        for tensor in tensors:
            self._count(tensor.to_local() if isinstance(tensor, DTensor) else tensor, name)

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Count a storage again whose size was changed."""
        if (name := self._labels.get(storage._cdata)) is not None:
            self._set(storage._cdata, name, storage.nbytes())

    def _count(self, tensor: Tensor, name: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key, known = storage._cdata, storage._cdata in self._labels
        if not known:
            weakref.finalize(storage, self._free, key)
        if name is not None or not known:
            self._set(key, name or STEP, storage.nbytes())

    def _set(self, key: int, name: str, size: int) -> None:
        if key in self._labels:
            self._live[self._labels[key]] -= self._sizes[key]
        self._labels[key], self._sizes[key] = name, size
        self._live[name] += size
        if self._live.total() >= self.peak.total():
            self.peak = Counter(self._live)

    def _free(self, key: int) -> None:
        self._live[self._labels.pop(key)] -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # it comes back with this rank's part
            return NotImplemented
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else args[0].dtype is torch.bool or 1
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for value in tree_leaves((result, (kwargs or {}).get("out"))):
            if isinstance(value, Tensor):
                self._count(value, GATHERED if func in GATHERING else None)
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


class _First(Ranks):
    """The first of several ranks; the others send nothing."""

    def largest(self, *values: int) -> list[int]:
        """This rank's."""
        return list(values)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """This rank's (B/R, …) in place of all ranks', (B, …)."""
        return torch.cat([rows] * self.size)

    def gather_lists(self, values: Sequence[T]) -> list[T]:
        """This rank's."""
        return list(values)


@contextmanager
def _first_of(gpus: int) -> Iterator[Ranks]:
    """The first of the ranks that train together; torch's "fake" process group stands for the others."""
    if gpus == 1:
        yield Ranks()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        with mock.patch.object(ShardingPropagator, SHAPES_OF, _outside(getattr(ShardingPropagator, SHAPES_OF))):
            yield _First(0, gpus)
    finally:
        torch.distributed.destroy_process_group()


def _outside(function: Callable[..., T]) -> Callable[..., T]:
    """A function that no mode sees."""

    @wraps(function)
    def unseen(*args: Any) -> T:
        with _disable_current_modes():
            return function(*args)

    return unseen


@contextmanager
def _shapes_alone(on_gpu: bool) -> Iterator[Meter]:
    """Everything made inside has shapes and no values."""
    meter, resize = Meter(), torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> None:  # FSDP frees a block so, which no mode sees
        resize(storage, size)
        meter.resize(storage)

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        for name in WIDE_ON_GPU if on_gpu else ():
            stack.enter_context(mock.patch.object(functional, name, _as_on_gpu(getattr(functional, name))))
        yield stack.enter_context(meter)


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


def _build_loop(recipe: Any, ranks: Ranks, mesh: DeviceMesh | None, meter: Meter, notes: list[str]) -> Loop:
    """The loop of a recipe, its optimisers' state as after a first step, all of it labelled."""
    folder = recipe.model.teacher_folder(weights=False)
    models = load_models(folder, "cpu", torch.float32, recipe.model.resolution, weights=False, mesh=mesh)
    models.family.check_dtype(models, recipe.train.dtype)
    trainer = _build_trainer(recipe, models, notes)
    loop = Loop(trainer, _Shapes(recipe, models, meter), recipe, RunDirectory(Path("unused")), ranks)
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
        mesh = mesh_of(models.unet)
        options["origin"] = load_models(recipe.vsd.path, "cpu", torch.float32, weights=False, mesh=mesh).unet
    if issubclass(kind, LRM):  # the moments of scores, which are measured on the data, move no byte
        kind = type(kind.__name__, (kind,), {"standardise": lambda self: Moments((0.0, 1.0), (0.0, 1.0))})
    return kind(recipe, models, *parts, **options)


def _proxy(recipe: Any, models: DiffusionModels, notes: list[str]) -> Any:
    """The latent proxy of a recipe, with any weights."""
    pretrain = isinstance(recipe, LRMPretrainRecipe)
    if recipe.proxy.small is not None:
        return small_proxy(recipe.seed, recipe.proxy.small, models)
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
