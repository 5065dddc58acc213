"""Steps counted on shapes alone count what steps that run do, and hold what they hold."""

from __future__ import annotations

import pytest

from rgbench.train.recipe import load_recipe
from tests.unit.test_bench_parts import TINY, subject
from tools.bench.counted import count_step
from tools.bench.counting import count
from tools.bench.train_step import OURS, PLAIN, Contenders

SETTINGS = ["train.batch_size=2", "train.dtype=float32", "lcd.time_cond_proj_dim=16", "train.num_workers=0",
            "train.gradient_checkpointing=false"]  # fmt: skip


@pytest.mark.long
def test_fake_steps_count_as_real_ones(tmp_path):
    row = count_step(TINY, load_recipe("sd21/lcd", SETTINGS))
    real = {name: count(step).flops for name, step in Contenders(subject("lcd", tmp_path)).work().items()}
    for name in (PLAIN, OURS):
        assert row["steps"][name]["flops"] == pytest.approx(real[name], rel=0.01)


@pytest.mark.long
def test_what_is_held_is_counted_once(tmp_path):
    row = count_step(TINY, load_recipe("sd21/rg_lcd", [*SETTINGS, "gradients.at_prediction=false"]))
    found = subject("rg_lcd", tmp_path)
    real = count(Contenders(found).work()[PLAIN]).flops  # ours measures gradients beside, which fakes cannot
    assert row["steps"][PLAIN]["flops"] == pytest.approx(real, rel=0.01)
    trainer = found.trainer
    student = sum(p.numel() for p in trainer.student.parameters())
    frozen = [trainer.models.unet, trainer.models.vae, trainer.models.text_encoder, trainer.expert.model]
    others = sum(t.numel() * t.element_size() for n in frozen for t in (*n.parameters(), *n.buffers()))
    assert row["held_bytes"] == {"networks": 2 * 4 * student + others, "learning": 3 * 4 * student}
    assert row["student_parameters"] == student
