"""``train()`` from a recipe file to an exported pipeline, and everything that can be in its way."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from rgbench.errors import ConfigError, Interrupted, UsageError
from rgbench.models import load_models
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.run import RunDirectory
from rgbench.trainers.api import resume_command, train
from tests.conftest import ROOT
from tests.parity import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a reward, a proxy and an image folder on disk, as a user has them."""
    root = tmp_path_factory.mktemp("world")
    tiny.save_pipeline(root / "teacher")
    tiny.proxy().save(root / "proxy")
    expert = tiny.expert()
    vision = {"image_size": 8, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4}
    text = {**tiny.TEXT_CFG, "hf_tokenizer_name": "."}
    (root / "reward").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.CLIP_FOLDER / file, root / "reward" / file)
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (root / "reward" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(expert.model.state_dict(), root / "reward" / "open_clip_model.safetensors")
    (root / "images").mkdir()
    batch = tiny.TinySource().load(list(range(10)))
    for i, (image, prompt) in enumerate(zip(batch.images_BCHW, batch.prompts, strict=True)):
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(prompt)
    return root


@pytest.fixture
def recipe(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = tiny.recipe().model_dump(mode="json")
    values["model"] = {"path": str(world / "teacher")}
    values["data"] = {"kind": "image_folder", "path": str(world / "images"), "resolution": 16}
    values["reward"]["path"], values["proxy"]["path"] = str(world / "reward"), str(world / "proxy")
    values["train"] |= {"steps": 3, "save_every": 2, "sample_every": 2}
    values["lcd"] |= {"num_ddim_timesteps": 25, "timestep_scaling": 7.0}
    values["sampling"] |= {"guidance_scale": 4.0, "steps": 2}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


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
    with pytest.raises(UsageError, match="use --resume auto"):
        train(str(recipe), ["train.steps=1"], resume="never")
    with pytest.raises(UsageError, match=r"train\.lr"):
        train(str(recipe), ["train.steps=1", "train.lr=0.5"])
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_an_interrupted_run_goes_on_and_ends_the_same(recipe, tmp_path):
    straight = train(str(recipe), ["train.steps=9", "train.sample_every=0"], out=tmp_path / "straight")
    killer = threading.Thread(target=_terminate_when, args=(tmp_path / "stopped" / "log.jsonl",))
    killer.start()
    words = ["train.steps=9", "train.sample_every=0"]
    with pytest.raises(Interrupted) as caught:
        train(str(recipe), [*words, "train.log_every=1"], out=tmp_path / "stopped")
    killer.join()
    assert caught.value.exit_code == 75
    command = shlex.split(caught.value.resume_command)
    assert command[:3] == ["rgbench", "train", str(recipe)] and command[-2:] == ["--out", str(tmp_path / "stopped")]
    meta = RunDirectory.open(tmp_path / "stopped").read()
    assert meta["status"] == "interrupted" and 0 < meta["step"] < 9
    stopped = train(str(recipe), [*words, "train.log_every=1"], out=tmp_path / "stopped")
    name = "unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(straight / "pipeline" / name), load_file(stopped / "pipeline" / name)
    assert all(torch.equal(a[key], b[key]) for key in a)


def _terminate_when(file) -> None:
    """SIGTERM as soon as the first step is logged."""
    for _ in range(60_000):
        if file.is_file() and file.stat().st_size:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.002)


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
    assert train(str(recipe), [*words, "train.gradient_accumulation_steps=2", "train.num_workers=1"]) == path
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
        (["model.preset=benchtop"], ConfigError, "either model.preset or model.path"),
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


def test_the_resume_command_quotes():
    command = resume_command("my recipe.yaml", ["data.path=a b"], None, "cpu")
    assert shlex.split(command) == ["rgbench", "train", "my recipe.yaml", "data.path=a b", "--device", "cpu"]


def test_a_proxy_folder_is_described(world):
    assert LatentCLIP.load(world / "proxy", "cpu").config["latent_scale"] == tiny.SCALING_FACTOR


# ---- several processes ------------------------------------------------------------------

LAUNCHED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def launched(recipe, tmp_path):
    """``rgbench train --launch ddp`` as a user has it: a process of its own that starts the others."""
    started = []

    def start(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "rgbench", "train", str(recipe), "--device", "cpu", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=os.environ | LAUNCHED, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()  # its workers end with it
        process.communicate()


@pytest.mark.timeout(900)
def test_two_processes_train_what_one_trains(recipe, tmp_path, launched):
    words = ["train.steps=4", "train.log_every=1", "train.gradient_accumulation_steps=2"]
    alone = RunDirectory.open(train(str(recipe), words, out=tmp_path / "alone", device="cpu"))
    out = ("--out", str(tmp_path / "both"), "--launch", "ddp", "--nproc", "2")
    done = launched(*words, *out)
    said, complained = done.communicate()
    assert done.returncode == 0, complained
    assert said.split() == [str(tmp_path / "both")], "the main rank alone says where the run is"
    assert complained.count("step 4/4") == 1
    both = RunDirectory.open(tmp_path / "both")
    meta, of_one = both.read(), alone.read()
    assert (meta["status"], meta["step"]) == ("finished", 4)
    assert [meta["cost"][k] for k in ("images", "reward_calls")] == [
        of_one["cost"][k] for k in ("images", "reward_calls")
    ]
    for row, wanted in zip(both.read_log(), alone.read_log(), strict=True):
        for name in row.keys() - {"images_per_sec"}:
            near_zero = 1e-3 if name.startswith("gradient/cosine") else 1e-6  # a cosine is measured against 1
            assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=near_zero), (row["step"], name)
    name = "unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(alone.pipeline / name), load_file(both.pipeline / name)
    assert max(float((a[key] - b[key]).abs().max()) for key in a) <= 1e-3, "at most a step of AdamW's, where g is noise"
    assert sum(float((a[key] - b[key]).abs().sum()) for key in a) <= 1e-5 * sum(v.numel() for v in a.values())


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_saves_on_all_ranks(tmp_path, launched, number, code):
    words = ["train.steps=400", "train.log_every=1", "train.save_every=1000", "train.sample_every=0"]
    out = ("--out", str(tmp_path / "both"), "--launch", "ddp", "--nproc", "2")
    done = launched(*words, *out)
    for _ in range(6000):
        if (tmp_path / "both" / "log.jsonl").is_file() and (tmp_path / "both" / "log.jsonl").stat().st_size:
            break
        time.sleep(0.02)
    done.send_signal(number)
    _, complained = done.communicate()
    assert done.returncode == code, complained
    assert "resume with: rgbench train" in complained and "--launch ddp --nproc 2" in complained
    run = RunDirectory.open(tmp_path / "both")
    meta = run.read()
    assert meta["status"] == "interrupted" and 0 < meta["step"] < 400
    assert [p.name for p in run.checkpoints.iterdir()] == [f"step-{meta['step']:08d}"]
    again = launched(*words[:-1], "train.sample_every=0", *out)
    time.sleep(1)
    again.terminate()
    again.communicate()
    assert again.returncode in (75, -signal.SIGTERM), "a signal at start-up harms nothing"
    assert RunDirectory.open(tmp_path / "both").read()["step"] >= meta["step"]


@pytest.mark.long
def test_workers_end_with_a_launcher_that_is_killed(tmp_path, launched):
    words = ["train.steps=4000", "train.log_every=1", "train.save_every=1000", "train.sample_every=0"]
    done = launched(*words, "--out", str(tmp_path / "both"), "--launch", "ddp", "--nproc", "2")
    log = tmp_path / "both" / "log.jsonl"
    for _ in range(6000):
        if log.is_file() and log.stat().st_size:
            break
        time.sleep(0.02)
    done.kill()
    done.communicate()
    for _ in range(1500):
        if RunDirectory.open(tmp_path / "both").read()["status"] == "interrupted":
            break
        time.sleep(0.02)
    assert RunDirectory.open(tmp_path / "both").read()["status"] == "interrupted", "they saved, and left"


@pytest.mark.long
def test_what_no_split_fits_is_said_once(tmp_path, launched):
    done = launched("--launch", "ddp", "--nproc", "3")
    _, complained = done.communicate()
    assert done.returncode == 2 and complained.count("cannot be split over 3 processes") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_the_slurm_script_runs_on_two_machines(recipe, tmp_path, cli):
    """Slurm's commands are two small scripts here; the machines, two agents that meet at one address."""
    made = cli("train", recipe, "train.steps=2", "--device", "cpu", "--launch", "slurm", "--nproc", "1", "--nodes", "2")
    assert made.returncode == 0
    (tmp_path / "job.slurm").write_text(made.stdout)
    shims = {
        "srun": '#!/bin/bash\nshift\n"$@" & first=$!\n"$@"\ncode=$?\nwait $first\nexit $code\n',
        "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" > requeued\n',
        "rgbench": f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m rgbench "$@"\n',
    }
    for name, text in shims.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "job.slurm"],
        cwd=tmp_path,
        env=os.environ | LAUNCHED | {"PATH": path, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert RunDirectory.open(tmp_path / "runs" / "tiny-s0").read()["status"] == "finished"
    assert not (tmp_path / "requeued").exists()
