"""``train.compile``: the same training, and files that know nothing of it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from rgbench.core.run import RunDirectory
from rgbench.train.loop import Loop
from rgbench.train.recipe import TrainSection
from rgbench.train.train import train
from tests import sd_folders
from tests.parity import tiny
from tests.resume.loops import assert_close, assert_same, everything, make_loop

COMPILES = [pytest.mark.long, pytest.mark.timeout(3600)]  # a minute of compiling for each network


class Sinusoids(nn.Module):
    """diffusers' embedding of timesteps, which it computes in float32 whatever the network's dtype, in float64."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timesteps: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000) * torch.arange(self.dim // 2, dtype=torch.float64) / (self.dim // 2))
        angles = timesteps[:, None].double() * rates
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def in_float64_throughout(loop: Loop) -> None:
    """Before the first call, which compiles: what is left of float32 rounds as the compiler pleases."""
    for network in (loop.trainer.models.unet, loop.trainer.student, loop.trainer.target):
        network.time_proj = Sinusoids(network.time_proj.num_channels)


def test_it_is_off_unless_asked_for():
    assert TrainSection().compile is False


@pytest.mark.parametrize("kind", [pytest.param("lrm", marks=COMPILES)])
def test_compiled_networks_train_the_same(tmp_path, kind):
    folder = tiny.save_pipeline(tmp_path / "teacher")
    assert_close(folder, tmp_path, kind, 10, 1e-4, in_float64_throughout, compile=True)


@pytest.mark.parametrize("kind", [pytest.param("lcd", marks=COMPILES)])
def test_a_compiled_run_is_saved_and_resumed_under_plain_names(tmp_path, kind):
    folder = tiny.save_pipeline(tmp_path / "teacher")
    straight = make_loop(kind, folder, tmp_path / "run", compile=True)
    straight.train_step()
    straight.save()
    names = make_loop(kind, folder, tmp_path / "plain").trainer.student.state_dict().keys()
    for stem in ("student", "target"):
        assert load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / f"{stem}.safetensors").keys() == names
    resumed = make_loop(kind, folder, tmp_path / "run", compile=True)
    resumed.restore()
    for loop in (straight, resumed):
        assert loop.train_step()["grad_norm/student"] > 0
    assert_same(everything(straight), everything(resumed))


@pytest.mark.parametrize("lora", [pytest.param({"rank": 2}, marks=COMPILES)])
def test_a_compiled_run_of_adapters_is_exported_as_any_other(tmp_path, monkeypatch, lora):
    monkeypatch.chdir(tmp_path)
    sd_folders.save_teacher(tmp_path / "sd15", "sd15")
    parts = sd_folders.save_parts(tmp_path)
    recipe = str(sd_folders.write_recipe(parts, tmp_path, "lcd", "sd15", {"lora": lora, "train.sample_every": 1}))
    files = []
    for how in ("true", "false"):
        run = RunDirectory.open(train(recipe, [f"train.compile={how}"], out=tmp_path / how))
        DiffusionPipeline.from_pretrained(run.pipeline)
        pipeline = load_file(run.pipeline / "unet" / "diffusion_pytorch_model.safetensors")
        files.append((pipeline, load_file(run.pipeline / "lora" / "pytorch_lora_weights.safetensors")))
    for made, wanted in zip(*files, strict=True):
        assert made.keys() == wanted.keys() and not any("_orig_mod" in name for name in made)
        assert all((made[name] - wanted[name]).abs().max() <= 2e-3 for name in wanted), (
            "a step of AdamW's, where g is noise"
        )
