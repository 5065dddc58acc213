"""``rgbench train --launch``: several processes, their signals, and Slurm's script."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from rgbench.core.run import RunDirectory
from rgbench.train.train import train
from tests.conftest import ROOT

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
@pytest.mark.parametrize("shard", ["false", pytest.param("true", marks=pytest.mark.long)])
def test_two_processes_train_what_one_trains(recipe, tmp_path, launched, shard):
    words = ["train.steps=4", "train.log_every=1", "train.gradient_accumulation_steps=2", f"train.shard={shard}"]
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
    names = [
        {str(file.relative_to(run.path)) for file in run.path.rglob("*") if "tfevents" not in file.name}
        for run in (alone, both)
    ]
    assert names[0] == names[1], "of sample grids, checkpoints and the pipeline too"


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code", "shard"),
    [(signal.SIGTERM, 75, "false"), (signal.SIGINT, 130, "false"), (signal.SIGTERM, 75, "true")],
)
def test_a_signal_to_the_launcher_saves_on_all_ranks(tmp_path, launched, number, code, shard):
    words = ["train.steps=400", "train.log_every=1", "train.save_every=1000", "train.sample_every=0"]
    out = (f"train.shard={shard}", "--out", str(tmp_path / "both"), "--launch", "ddp", "--nproc", "2")
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
