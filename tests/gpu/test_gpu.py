"""What a GPU must do: every trainer on it, its first losses those of the CPU, its students sampled there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from rgbench.core.process import whole_float32
from rgbench.core.run import RunDirectory
from rgbench.models.pipeline import load_models
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.cache import cache
from rgbench.train.train import train
from tests import sd_folders
from tests.parity import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """What is compared with a CPU is computed as there."""
    with whole_float32():
        yield


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
        assert (run.read()["cost"].get("gpu_sec", 0.0) > 0) == (device == "cuda")
        first[device] = {k: v for k, v in run.read_log()[0].items() if k.startswith("loss/")}
    assert first["cpu"].keys() == first["cuda"].keys()
    for name, value in first["cpu"].items():
        assert first["cuda"][name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["lcd", "rg_lcd", "lrm"])
def test_mixed_precision_begins_as_float32(parts, tmp_path, kind, dtype):
    recipe = str(sd_folders.write_recipe(parts, tmp_path, kind, "sd15", {"train.steps": 2, "train.log_every": 1}))
    exact, mixed = (
        RunDirectory.open(train(recipe, words, out=tmp_path / name, device="cuda")).read_log()[0]
        for name, words in (("exact", []), ("mixed", [f"train.dtype={dtype}"]))
    )
    for name in (name for name in exact if name.startswith("loss/")):
        assert mixed[name] == pytest.approx(exact[name], rel=0.1, abs=1e-2), name


def test_a_run_from_a_cache_made_on_the_gpu(parts, tmp_path):
    """Encoded there, read back from disk, and sent there again: the losses are those of the images."""
    changes = {"train.steps": 2, "train.log_every": 1, "train.latents_cache_root": str(tmp_path / "cache")}
    recipe = str(sd_folders.write_recipe(parts, tmp_path, "lrm", "sd21", changes))
    rows = []
    for wanted in ("never", "always"):
        if wanted == "always":
            cache(recipe, [], device="cuda")
        run = train(recipe, [f"train.latents_cache={wanted}"], out=tmp_path / wanted, device="cuda")
        rows.append(RunDirectory.open(run).read_log()[0])
    for name in (name for name in rows[0] if name.startswith("loss/")):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-2, abs=1e-4), name


def test_compiled_networks_begin_as_those_that_are_not(parts, tmp_path):
    recipe = str(sd_folders.write_recipe(parts, tmp_path, "rg_lcd", "sd15", {"train.steps": 2, "train.log_every": 1}))
    rows = [
        RunDirectory.open(train(recipe, [f"train.compile={how}"], out=tmp_path / how, device="cuda")).read_log()[0]
        for how in ("false", "true")
    ]
    for name in (name for name in rows[0] if name.startswith("loss/")):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-2, abs=1e-4), name


def test_a_proxy_is_pre_trained_on_the_gpu_as_on_the_cpu(parts, tmp_path):
    vision = {"patch_size": 2, "layers": 2, "width": 16, "head_width": 8}
    values = {"kind": "lrm_pretrain", "name": "tiny", "model": {"path": str(parts / "sd15")}}
    values |= {"data": {"kind": "image_folder", "path": str(parts / "images"), "resolution": sd_folders.SIDE}}
    values |= {"train": {"steps": 2, "batch_size": 4, "lr": 1e-3, "log_every": 1}}
    values |= {"proxy": {"clip": str(parts / "reward"), "vision": vision}}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(values))
    rows = []
    for device in ("cpu", "cuda"):
        run = train(str(tmp_path / "pretrain.yaml"), [], out=tmp_path / device, device=device)
        LatentCLIP.load(run / "latent_proxy", device)
        rows.append(RunDirectory.open(run).read_log()[0])
    assert rows[1]["loss/contrastive"] == pytest.approx(rows[0]["loss/contrastive"], rel=1e-2)


def test_a_student_is_sampled_on_the_gpu_as_on_the_cpu(parts):
    images = []
    for device in ("cpu", "cuda"):
        models = load_models(parts / "sd15", device, torch.float32)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        images.append(models.sample(tiny.PROMPTS[:2], generators, num_steps=3, guidance_scale=3.0).cpu())
    assert (images[0] - images[1]).abs().max() <= 2e-2  # convolutions in TF32


def test_the_doctor_names_the_gpu():
    from rgbench.cli.doctor import checks

    device = next(check for check in checks() if check.name == "device")
    assert device.status == "ok" and re.search(r"\d+ GiB", device.detail)
