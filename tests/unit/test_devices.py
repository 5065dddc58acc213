"""Every trainer's step on fake ``cuda`` tensors: mixed devices fail here, on machines without a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rgbench.data.contract import Batch
from rgbench.trainers.draws import StepDraws
from rgbench.trainers.lcd import LCD
from rgbench.trainers.lrm import LRM
from rgbench.trainers.rg_lcd import RGLCD
from tests.parity import tiny

CUDA = torch.device("cuda", 0)
LORA = {"rank": 2}


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
    sections |= {"gradients": {"at_prediction": False}}  # its own backward pass needs a real device
    recipe, models = tiny.recipe(**sections), tiny.models(folder)
    if kind == "lcd":
        return LCD(recipe, models)
    return (
        RGLCD(recipe, models, tiny.expert()) if kind == "rg_lcd" else LRM(recipe, models, tiny.expert(), tiny.proxy())
    )


def moved(trainer, mode: FakeTensorMode):
    """All that the trainer holds, on a GPU that is not there."""
    models = trainer.models
    parts = [models.unet, models.vae, models.text_encoder, trainer.student, trainer.target]
    parts += [trainer.expert.model] if isinstance(trainer, RGLCD) else []
    parts += [trainer.proxy] if isinstance(trainer, LRM) else []
    for part in parts:
        on_fake_cuda(part, mode)
    if isinstance(trainer, LRM):
        trainer.proxy_parameters = [p for p in trainer.proxy.parameters() if p.requires_grad]
    models.alphas_cumprod = fake(models.alphas_cumprod, mode)
    trainer.networks = dataclasses.replace(trainer.networks, alphas_cumprod=models.alphas_cumprod)
    trainer.uncond_embeds = fake(trainer.uncond_embeds, mode)
    return trainer


def fake_batch(mode: FakeTensorMode) -> Batch:
    """As the loader gives it: on the CPU."""
    batch = tiny.TinySource().load([3, 1, 4, 8])
    return dataclasses.replace(batch, images_BCHW=mode.from_tensor(batch.images_BCHW))


@pytest.mark.parametrize("sections", [{}, {"lora": LORA}], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["lcd", "rg_lcd", "lrm"])
def test_a_step_stays_on_its_device(folder, kind, sections):
    trainer, mode = make(kind, folder, **sections), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        moved(trainer, mode)
        result = trainer.step(fake_batch(mode), StepDraws(0, 0, 4))
        values = [value for terms in result.losses.values() for value in terms.values()]
        assert {value.device for value in (*values, *result.stats.values())} == {CUDA}
        for learner in trainer.learners().values():
            assert {parameter.device for parameter in learner.parameters} == {CUDA}
        assert all(value.shape == (4,) and value.requires_grad for value in values)
        trainer.after_update()


def test_mixed_devices_are_seen(folder):
    """What these tests are for: a part left on the CPU."""
    trainer, mode = make("lcd", folder), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        moved(trainer, mode)
        trainer.networks = dataclasses.replace(trainer.networks, alphas_cumprod=trainer.models.alphas_cumprod.cpu())
        with pytest.raises(RuntimeError, match="device"):
            trainer.step(fake_batch(mode), StepDraws(0, 0, 4))


def test_sampling_stays_on_its_device(folder):
    trainer, mode = make("lcd", folder), FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        moved(trainer, mode)
        student = trainer.models.with_student(trainer.target, 50, 10.0)
        for models in (student, trainer.models):
            images = models.sample(["a", "b"], [torch.Generator(), torch.Generator()], num_steps=2, guidance_scale=3.0)
            assert images.device == CUDA and images.shape == (2, 3, 16, 16)
