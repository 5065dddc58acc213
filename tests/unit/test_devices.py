"""Every trainer's step on fake ``cuda`` tensors: mixed devices fail here, on machines without a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rgbench.data.batches import Batch, Encoded
from rgbench.train.base import StepDraws
from rgbench.train.lcd import LCD
from rgbench.train.lrm import LRM
from rgbench.train.pretrain import LRMPretrain
from rgbench.train.recipe import LRMPretrainRecipe
from rgbench.train.rg_lcd import RGLCD
from tests.parity import tiny

CUDA = torch.device("cuda", 0)
LORA = {"rank": 2}
KINDS = ("lcd", "rg_lcd", "lrm", "lrm_pretrain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("devices") / "teacher")


def on_fake_cuda(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same module with fake parameters and buffers on a GPU that is not there."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(fake(value, mode), requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = fake(value, mode)
    return module


def fake(value: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    return mode.from_tensor(value).detach().to(CUDA)


def make(kind: str, folder, **sections):
    """A real trainer on the CPU; built before the fake mode begins."""
    models = tiny.models(folder)
    if kind == "lrm_pretrain":
        values = {"kind": kind, "name": "tiny", "model": {"path": str(folder)}, "data": {"kind": "scenes"}}
        return LRMPretrain(LRMPretrainRecipe.model_validate(values, strict=False), models, tiny.proxy())
    sections |= {"gradients": {"at_prediction": False}}  # its own backward pass needs a real device
    recipe = tiny.recipe(**sections)
    if kind == "lcd":
        return LCD(recipe, models)
    return (
        RGLCD(recipe, models, tiny.expert()) if kind == "rg_lcd" else LRM(recipe, models, tiny.expert(), tiny.proxy())
    )


def moved(trainer, mode: FakeTensorMode):
    """All that the trainer holds, on a GPU that is not there."""
    models = trainer.models
    parts = [models.unet, models.vae, models.text_encoder]
    parts += [trainer.student, trainer.target] if isinstance(trainer, LCD) else []
    parts += [trainer.expert.model] if isinstance(trainer, RGLCD) else []
    parts += [trainer.proxy] if isinstance(trainer, (LRM, LRMPretrain)) else []
    for part in parts:
        on_fake_cuda(part, mode)
    models.schedule = fake(models.schedule, mode)
    if isinstance(trainer, LRMPretrain):
        trainer.parameters = [p for p in trainer.proxy.parameters() if p.requires_grad]
        return trainer
    if isinstance(trainer, LRM):
        trainer.proxy_parameters = [p for p in trainer.proxy.parameters() if p.requires_grad]
    trainer.networks = dataclasses.replace(trainer.networks, schedule=models.schedule)
    trainer.uncond_embeds = fake(trainer.uncond_embeds, mode)
    return trainer


def fake_batch(mode: FakeTensorMode, cached: bool = False) -> Batch:
    """As the loader gives it: on the CPU, images or what a latents cache holds."""
    batch = tiny.TinySource().load([3, 1, 4, 8])
    if not cached:
        return dataclasses.replace(batch, images_BCHW=mode.from_tensor(batch.images_BCHW))
    moments, states = torch.rand(4, 4, 8, 8), torch.rand(4, tiny.CONTEXT, 16)
    encoded = Encoded(mode.from_tensor(moments), mode.from_tensor(moments.clone()), mode.from_tensor(states))
    return Batch(None, batch.prompts, batch.ids, encoded)


@contextlib.contextmanager
def autocast_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """What ``torch.autocast("cuda")`` sets; itself it refuses where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(True)


def assert_on_cuda(trainer, batch: Batch) -> None:
    """One step whose losses, statistics and parameters all lie there."""
    result = trainer.step(batch, StepDraws(0, 0, 4))
    values = [value for terms in result.losses.values() for value in terms.values()]
    assert {value.device for value in (*values, *result.stats.values())} == {CUDA}
    for learner in trainer.optimiser_groups().values():
        assert learner.parameters and {parameter.device for parameter in learner.parameters} == {CUDA}
    assert all(value.shape == (4,) and value.requires_grad for value in values)
    trainer.after_update(trainer.optimiser_groups())


def cells(*short: str) -> list:
    """All trainers; those not named run in the long tier, since LRM's step holds the others'."""
    return [kind if kind in short else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]


@pytest.mark.parametrize("kind", cells("rg_lcd", "lrm", "lrm_pretrain"))
def test_a_step_stays_on_its_device(folder, kind):
    trainer, mode = make(kind, folder), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        assert_on_cuda(moved(trainer, mode), fake_batch(mode))


@pytest.mark.parametrize("kind", cells("lrm", "lrm_pretrain"))
def test_a_step_from_a_latents_cache_stays_on_its_device(folder, kind):
    trainer, mode = make(kind, folder), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        assert_on_cuda(moved(trainer, mode), fake_batch(mode, cached=True))


@pytest.mark.parametrize("kind", cells("lrm")[:3])
def test_a_step_of_adapters_stays_on_its_device(folder, kind):
    trainer, mode = make(kind, folder, lora=LORA), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        assert_on_cuda(moved(trainer, mode), fake_batch(mode))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", cells("lrm", "lrm_pretrain"))
def test_a_step_in_mixed_precision_stays_on_its_device(folder, kind, dtype):
    """Kernels refuse mixed dtypes as they do mixed devices; the networks do compute in ``dtype``."""
    trainer, mode = make(kind, folder), FakeTensorMode(allow_non_fake_inputs=False)
    seen = set()
    network = trainer.proxy.clip.visual if kind == "lrm_pretrain" else trainer.student.conv_in
    layer = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    layer.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    with mode, autocast_on_cuda(dtype):
        assert_on_cuda(moved(trainer, mode), fake_batch(mode))
    assert seen == {dtype}


@contextlib.contextmanager
def left_on_the_cpu(module: nn.Module) -> Iterator[None]:
    """One parameter of a module, for a while."""
    path, value = next(iter(module.named_parameters()))
    owner, _, name = path.rpartition(".")
    parameters = module.get_submodule(owner)._parameters
    parameters[name] = nn.Parameter(value.detach().cpu(), value.requires_grad)
    yield
    parameters[name] = value


def test_each_part_left_on_the_cpu_is_seen(folder):
    """What these tests are for."""
    trainer, mode = make("lrm", folder), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        batch, models = fake_batch(mode), moved(trainer, mode).models
        parts = [models.unet, models.vae.encoder, models.vae.decoder, models.text_encoder]
        for part in (*parts, trainer.student, trainer.target, trainer.expert.model, trainer.proxy):
            with left_on_the_cpu(part), pytest.raises(RuntimeError, match="device"):
                trainer.step(batch, StepDraws(0, 0, 4))
        on_cuda = trainer.networks
        trainer.networks = dataclasses.replace(on_cuda, schedule=models.schedule.cpu())
        with pytest.raises(RuntimeError, match="device"):
            trainer.step(batch, StepDraws(0, 0, 4))
        trainer.networks, trainer.uncond_embeds = on_cuda, trainer.uncond_embeds.cpu()
        with pytest.raises(RuntimeError, match="device"):
            trainer.step(batch, StepDraws(0, 0, 4))


def test_a_pre_training_with_its_proxy_on_the_cpu_is_seen(folder):
    trainer, mode = make("lrm_pretrain", folder), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        moved(trainer, mode)
        for part in (trainer.proxy.clip.visual, trainer.proxy.clip.transformer, trainer.models.vae.encoder):
            with left_on_the_cpu(part), pytest.raises(RuntimeError, match="device"):
                trainer.step(fake_batch(mode), StepDraws(0, 0, 4))


def test_sampling_stays_on_its_device(folder):
    trainer, mode = make("lcd", folder), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        moved(trainer, mode)
        student = trainer.models.with_student(trainer.target, 50, 10.0)
        for models in (student, trainer.models):
            images = models.sample(["a", "b"], [torch.Generator(), torch.Generator()], num_steps=2, guidance_scale=3.0)
            assert images.device == CUDA and images.shape == (2, 3, 16, 16)
