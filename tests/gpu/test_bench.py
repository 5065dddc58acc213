"""The benchmark on a GPU: events, bfloat16, peak memory of each step apart."""

from __future__ import annotations

import pytest
import torch

from rgbench.train.recipe import load_recipe
from tests.unit.test_bench_parts import TINY
from tools.bench.evaluation import measure_full_size
from tools.bench.machine import Machine
from tools.bench.random_models import HeldImages
from tools.bench.subject import make_subject, random_trainer
from tools.bench.train_step import OURS, PLAIN, measure

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]
SETTINGS = ["train.batch_size=2", "train.gradient_checkpointing=false", "train.num_workers=0"]


@pytest.mark.parametrize("method", ["lcd", "rg_lcd", "lrm"])
def test_a_step_is_measured(method, tmp_path):
    cuda = torch.device("cuda")
    trainer = random_trainer(TINY, load_recipe(f"sd21/{method}", [*SETTINGS, "lcd.time_cond_proj_dim=16"]), cuda)
    subject = make_subject(method, trainer, HeldImages(TINY.side, 4), tmp_path, "random")
    row = measure(subject, Machine(cuda, "bfloat16", square=256, copy_bytes=1 << 20), rounds=2)
    assert row["dtype"] == "bfloat16" and row["steps"][OURS]["flops"] < row["steps"][PLAIN]["flops"]
    assert {"teacher", "student", "student backward", "target", "optimiser"} <= set(row["parts"])
    assert all(0 < peak["bytes"] < 1 << 32 for peak in row["peak_memory"].values())


def test_an_evaluation_is_split(tmp_path):
    row = measure_full_size(TINY, tmp_path, num=8, metrics=["fid", "hps"], device="cuda", dtype="bfloat16")
    assert 0 < row["share_outside_generation"] < 1 and row["estimated"]["images"] == 30_000
