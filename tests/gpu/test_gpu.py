"""What a GPU must do: every trainer on it, its first losses those of the CPU, its students sampled there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rgbench.models import load_models
from rgbench.run import RunDirectory
from rgbench.trainers.api import train
from tests import sd_folders
from tests.parity import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    sd_folders.save_teacher(root / "sd15", "sd15")
    sd_folders.save_teacher(root / "sd21", "sd21", "v_prediction")
    return sd_folders.save_parts(root)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize("teacher", ["sd15", "sd21"])
@pytest.mark.parametrize("kind", ["lcd", "rg_lcd", "lrm"])
def test_a_run_on_the_gpu_begins_as_one_on_the_cpu(parts, tmp_path, kind, teacher, lora):
    """Noise, timesteps and adapters are drawn on the CPU: the first losses differ by rounding alone."""
    recipe = str(sd_folders.write_recipe(parts, tmp_path, kind, teacher, {"lora": lora} if lora else {}))
    first = {}
    for device in ("cpu", "cuda"):
        words = ["train.steps=2", "train.log_every=1"]
        run = RunDirectory.open(train(recipe, words, out=tmp_path / device, device=device))
        assert run.read()["status"] == "finished"
        first[device] = {k: v for k, v in run.read_log()[0].items() if k.startswith("loss/")}
    assert first["cpu"].keys() == first["cuda"].keys()
    for name, value in first["cpu"].items():
        assert first["cuda"][name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


def test_a_student_is_sampled_on_the_gpu_as_on_the_cpu(parts):
    images = []
    for device in ("cpu", "cuda"):
        models = load_models(parts / "sd15", device, torch.float32)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        images.append(models.sample(tiny.PROMPTS[:2], generators, num_steps=3, guidance_scale=3.0).cpu())
    assert (images[0] - images[1]).abs().max() <= 2e-2  # convolutions in TF32


def test_the_doctor_names_the_gpu():
    from rgbench.doctor import checks

    device = next(check for check in checks() if check.name == "device")
    assert device.status == "ok" and re.search(r"\d+ GiB", device.detail)
