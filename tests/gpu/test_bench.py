"""Benchmarks on a GPU: bfloat16, peak memory of each step apart, an evaluation."""

from __future__ import annotations

import pytest
import torch

from rgbench.train.recipe import load_recipe
from tests.tools.test_bench import TINY
from tools.bench import measure, timing
from tools.bench.measure import OURS, PLAIN
from tools.bench.networks import HeldImages, random_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]
SETTINGS = ["train.batch_size=2", "train.gradient_checkpointing=false", "train.num_workers=0"]


@pytest.mark.parametrize("method", ["lcd", "rg_lcd", "lrm"])
def test_a_step_is_measured(method, tmp_path, monkeypatch):
    monkeypatch.setitem(timing.SQUARE, "cuda", 256)
    recipe = load_recipe(f"sd21/{method}", [*SETTINGS, "lcd.time_cond_proj_dim=16"])
    trainer = random_trainer(TINY, recipe, torch.device("cuda"))
    row = measure.step(trainer, HeldImages(TINY.side, 4), tmp_path, rounds=2)
    assert recipe.train.dtype == "bfloat16" and row["steps"][OURS]["flops"] < row["steps"][PLAIN]["flops"]
    assert all(0 < step["peak_bytes"] < 1 << 32 for step in row["steps"].values())


def test_an_evaluation_is_split(tmp_path):
    row = measure.evaluation(TINY, tmp_path, 8, ["fid", "hps"], "cuda")
    assert row["times_generation"] > 1 and row["estimated"]["images"] == 30_000
