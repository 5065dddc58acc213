"""``train()`` from a recipe file to an exported pipeline, and everything that can be in its way."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline
from safetensors.torch import load_file, save_file

from rgbench.core.errors import ConfigError, Interrupted, UsageError
from rgbench.core.run import RunDirectory
from rgbench.models.pipeline import load_models
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train import cache as cache_module
from rgbench.train import train as train_module
from rgbench.train.cache import cache_samples
from rgbench.train.train import dry_run, resume_command, train
from tests.parity import tiny


def generators(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(num)]


def test_from_recipe_to_pipeline(recipe, world, tmp_path):
    path = train(str(recipe), [])
    assert path.name == "tiny-s0"
    run = RunDirectory.open(path)
    meta = run.read()
    assert (meta["status"], meta["step"], meta["method"], meta["world"]) == ("finished", 3, "lrm", "teacher")
    assert meta["cost"]["images"] == 12 and meta["cost"]["reward_calls"] == 36 and meta["cost"]["wall_sec"] > 0
    assert meta["rewards"][0]["fingerprint"]["antialias"] is True
    assert meta["sampling"] == {"sampler": "lcm", "steps": 2, "guidance_scale": 4.0}
    assert [row["step"] for row in run.read_log()] == [3]
    assert any(run.tensorboard.iterdir()) and (run.samples / "step-00000002.png").is_file()
    card = (run.pipeline / "README.md").read_text()
    for file in run.pipeline.rglob("*.json"):  # what people publish names no folder of theirs
        assert str(tmp_path) not in file.read_text() and str(world.parent) not in file.read_text(), file
    assert "in-sample" in card and meta["teacher"]["sha256"] in card and "guidance_scale=4.0" in card

    pipeline = DiffusionPipeline.from_pretrained(run.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, LatentConsistencyModelPipeline)
    scheduler = pipeline.scheduler.config
    assert (scheduler.original_inference_steps, scheduler.timestep_scaling) == (25, 7.0)
    assert not scheduler.clip_sample and not scheduler.set_alpha_to_one
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt"}
    theirs = pipeline(tiny.PROMPTS[:3], generator=generators(3), **options).images
    models = load_models(run.pipeline, "cpu", torch.float32)
    ours = models.sample(tiny.PROMPTS[:3], generators(3), num_steps=4, guidance_scale=4.0)
    assert (ours - theirs).abs().max() <= 1e-5
    assert not any(p.name.startswith(".pipeline") for p in path.iterdir())

    exported = load_file(run.pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_file(run.checkpoints / "step-00000003" / "target.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in saved.items())


def test_the_online_network_on_demand(recipe):
    run = RunDirectory.open(train(str(recipe), ["sampling.network=student", "train.sample_every=0"]))
    exported = load_file(run.pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_file(run.checkpoints / "step-00000003" / "student.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in saved.items())


def test_a_finished_run_is_left_alone(recipe, capsys):
    path = train(str(recipe), ["train.steps=1"])
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert train(str(recipe), ["train.steps=1"]) == path
    assert "finished already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    with pytest.raises(UsageError, match="--resume auto"):
        train(str(recipe), ["train.steps=1"], resume="never")
    with pytest.raises(UsageError, match=r"train\.lr"):
        train(str(recipe), ["train.steps=1", "train.lr=0.5"])
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_an_interrupted_run_goes_on_and_ends_the_same(recipe, tmp_path, monkeypatch):
    straight = train(str(recipe), ["train.steps=9", "train.sample_every=0"], out=tmp_path / "straight")
    words, log = ["train.steps=9", "train.sample_every=0"], RunDirectory.log

    def log_and_terminate(run, row) -> None:
        log(run, row)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(Interrupted) as caught:
        patched.setattr(RunDirectory, "log", log_and_terminate)
        train(str(recipe), [*words, "train.log_every=1"], out=tmp_path / "stopped")
    assert caught.value.exit_code == 75
    command = shlex.split(caught.value.resume_command)
    assert command[:3] == ["rgbench", "train", str(recipe)] and command[-2:] == ["--out", str(tmp_path / "stopped")]
    meta = RunDirectory.open(tmp_path / "stopped").read()
    assert (meta["status"], meta["step"]) == ("interrupted", 1)
    stopped = train(str(recipe), [*words, "train.log_every=1"], out=tmp_path / "stopped")
    name = "unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(straight / "pipeline" / name), load_file(stopped / "pipeline" / name)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_moves_to_other_paths_and_another_split(recipe, world, tmp_path):
    """What lies elsewhere on another machine, and how a batch is computed, are free; what is computed is not."""
    words = ["train.steps=2", "train.save_every=1", "train.sample_every=0"]
    path = train(str(recipe), words)
    run = RunDirectory.open(path)
    shutil.rmtree(run.checkpoints / "step-00000002")
    run.update(status="interrupted", step=1)
    shutil.copytree(world, tmp_path / "elsewhere")
    parts = {"model.path": "teacher", "data.path": "images", "reward.path": "reward", "proxy.path": "proxy"}
    words += [f"{key}={tmp_path / 'elsewhere' / part}" for key, part in parts.items()]
    with pytest.raises(UsageError, match=r"another config \(train\.dtype: float32 → bfloat16\)"):
        train(str(recipe), [*words, "train.dtype=bfloat16"])
    words += ["train.gradient_accumulation_steps=2", "train.num_workers=1", "train.shard=true"]
    assert train(str(recipe), words) == path
    assert run.read()["status"] == "finished" and [row["step"] for row in run.read_log()] == [2]


def test_wandb_is_an_extra(recipe, tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UsageError, match=r"train\.wandb needs the wandb library: pip install 'rgbench\[wandb\]'"):
            train(str(recipe), ["train.wandb=mine"])
        assert not (tmp_path / "runs").exists()
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = train(str(recipe), ["train.wandb=mine", "train.steps=2"])
    kept = list((path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 1 and b"loss/pairs" in kept[0].read_bytes()


def test_another_teacher_is_noticed(recipe, world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    words = [f"model.path={tmp_path / 'teacher'}", "train.steps=1", "train.sample_every=0"]
    train(str(recipe), words)
    file = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    save_file(weights, file)
    with pytest.raises(UsageError, match="its teacher changed"):
        train(str(recipe), words)


def test_wrong_input_writes_nothing(recipe, world, tmp_path):
    other = tiny.proxy()
    other.config["latent_scale"] = 0.5
    other.save(tmp_path / "other")
    cases = [
        (["train.lrr=1"], ConfigError, "did you mean"),
        (["kind=lmr"], ConfigError, "did you mean 'lrm'"),
        ([f"model.path={tmp_path / 'none'}"], UsageError, "no such folder"),
        (["model.preset=benchtop", "model.path=x"], ConfigError, "either model.preset or model.path"),
        (["reward.path=null"], UsageError, r"reward\.path: give a path"),
        (["proxy.path=null"], UsageError, r"proxy\.path: give a path"),
        ([f"proxy.path={tmp_path / 'other'}"], UsageError, "scaling factor"),
        (["data.resolution=24"], UsageError, "24×24 pixels, the model takes 16×16"),
        (["lcd.w_min=9"], ConfigError, "is above w_max"),
        (["sampling.steps=26"], ConfigError, "exceeds lcd.num_ddim_timesteps"),
    ]
    for overrides, error, message in cases:
        with pytest.raises(error, match=message):
            train(str(recipe), overrides)
    with pytest.raises(UsageError, match="use auto or never"):
        train(str(recipe), [], resume="always")
    with pytest.raises(UsageError, match="no recipe 'lrmm'"):
        train("lrmm", [])
    assert not (tmp_path / "runs").exists()


def test_a_closed_pipe_ends_no_training(recipe, tmp_path, fork_server):
    words = f"train {recipe} train.steps=2 train.sample_every=0 --device cpu"
    forked, own = fork_server.folder / "rgbench", f"{sys.executable} -m rgbench"  # no stream to hand over: its own
    cases = ((forked, "2>&1 | head -n 1"), (forked, "2>&1 >/dev/null | true"), (own, ">&- 2>&-"))
    for number, (program, pipe) in enumerate(cases):
        command = f"set -o pipefail; {program} {words} --out {number} {pipe}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert RunDirectory.open(tmp_path / str(number)).read()["status"] == "finished"
        assert len(done.stdout.splitlines()) == (number == 0) and "Traceback" not in done.stderr


def test_float32_is_whole_while_a_run_trains(tmp_path, monkeypatch):
    """As the recipes say of train.dtype: float32; the setting of whoever calls is put back."""
    seen: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_module, "_train", lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision))
    before = torch.backends.cudnn.conv.fp32_precision
    train("lcd", [])
    assert (seen, torch.backends.cudnn.conv.fp32_precision) == (["ieee"], before) and before != "ieee"
    for module, work in ((cache_module, cache_module.cache), (cache_module, cache_samples), (train_module, dry_run)):

        def load(*_: object) -> None:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            raise ZeroDivisionError

        monkeypatch.setattr(module, "load_recipe", load)
        with pytest.raises(ZeroDivisionError):
            work("lcd", [])
    assert seen == ["ieee"] * 4


@pytest.mark.parametrize("where", ["file/run", "file", "link", "locked/run", "n" * 300, "a\0b"])
def test_a_place_that_cannot_hold_a_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "locked").mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    monkeypatch.setattr(train_module, "build_loop", lambda *_: 1 / 0)
    for work in (train, dry_run):
        with pytest.raises(UsageError, match="in the way|is not a folder|no permission|too long|null") as error:
            work("lcd", [], out=Path(where))
        assert str(error.value).startswith(where)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "locked"] and not os.listdir("locked")


def test_a_place_that_refuses_at_last_is_a_wrong_place(tmp_path):
    """As a file system does that says yes and then no."""
    with pytest.raises(UsageError, match="/proc/run: .*choose another place with --out"):
        RunDirectory("/proc/run").create({}, {})


def test_the_resume_command_quotes():
    command = resume_command("my recipe.yaml", ["data.path=a b"], None, "cpu")
    assert shlex.split(command) == ["rgbench", "train", "my recipe.yaml", "data.path=a b", "--device", "cpu"]


def test_a_proxy_folder_is_described(world):
    assert LatentCLIP.load(world / "proxy", "cpu").config["latent_scale"] == tiny.SCALING_FACTOR
