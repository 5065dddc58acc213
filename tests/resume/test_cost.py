"""What the loop itself costs: next to nothing of a step, and no memory that grows."""

from __future__ import annotations

import gc
import time
import tracemalloc

import pytest
import torch
from torch import nn

from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.models.pipeline import load_models
from rgbench.train.base import CaptionTokenizer, OptimiserGroup, StepDraws, StepResult
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.recipe import TrainSection, load_recipe
from tests.parity import tiny
from tests.resume.loops import run_to_end

MIB = 1 << 20


class Idle:
    """A trainer that computes nothing worth the name: one parameter, one product per sample."""

    def __init__(self, models) -> None:
        self.models = models
        self.student = self.target = nn.Linear(1, 1, bias=False)

    def optimiser_groups(self):
        return {"student": OptimiserGroup(list(self.student.parameters()), 1e-3, TrainSection())}

    def modules(self):
        return {"student": self.student}

    def tokenizers(self):
        tokenizer = self.models.tokenizer
        return {"text_encoder": CaptionTokenizer(tokenizer, tokenizer.model_max_length)}

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        losses = self.student(torch.ones(len(batch.ids), 1))[:, 0]
        return StepResult({"student": {"lcd": losses}}, {"reward": losses.detach()})

    def watch(self, step, columns) -> dict[str, float]:
        return {}

    def after_update(self, moved) -> None:
        pass


class OneBatch:
    """The same images at every step, and a look at the memory at the loads numbered ``looks``."""

    name, length = "one", 10**9

    def __init__(self, batch_size: int, side: int, looks: tuple[int, ...] = ()) -> None:
        self.batch = Batch(torch.zeros(batch_size, 3, side, side), ["a"] * batch_size, ["a"] * batch_size)
        self.looks, self.num_loads, self.seen = looks, 0, []

    def load(self, indices):
        self.num_loads += 1
        if self.num_loads in self.looks:
            gc.collect()
            tensors = sum(o.nbytes for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter))
            self.seen.append((tensors, tracemalloc.get_traced_memory()[0]))
        return self.batch


@pytest.mark.parametrize(("steps", "limit"), [(100, MIB // 10), pytest.param(1000, MIB, marks=pytest.mark.long)])
def test_memory_does_not_grow(tmp_path, steps, limit):
    models = tiny.models(tiny.save_pipeline(tmp_path / "teacher"))
    recipe = tiny.recipe(train={"steps": steps + 51, "save_every": 5000, "log_every": 50})
    run = RunDirectory(tmp_path / "run").create(recipe.model_dump(mode="json"), {"status": "running", "step": 0})
    source = OneBatch(4, 16, looks=(50, 50 + steps))
    tracemalloc.start()
    try:
        run_to_end(Loop(Idle(models), source, recipe, run))  # type: ignore[arg-type]
    finally:
        tracemalloc.stop()
    (tensors, python), (tensors_after, python_after) = source.seen
    assert tensors > 0 and python > 0
    assert tensors_after - tensors <= limit and python_after - python <= limit


@pytest.mark.long
def test_the_loop_takes_little_of_a_step(tmp_path):
    """CPU time, the least of several; the step is the benchtop's LCD step as the recipe has it."""
    recipe = load_recipe("lcd")
    models = load_models(recipe.model.teacher_folder(), "cpu", torch.float32)
    trainer, size = LCD(recipe, models), recipe.train.batch_size
    run = RunDirectory(tmp_path / "run").create(recipe.model_dump(mode="json"), {"status": "running", "step": 0})
    source = OneBatch(size, models.resolution)
    idle = Loop(Idle(models), source, recipe, run)  # type: ignore[arg-type]
    bare = least(lambda: bare_step(trainer, source.batch, recipe), 4)
    assert least(idle.train_step, 200) <= 0.03 * bare


def bare_step(trainer, batch: Batch, recipe) -> None:
    """Loss, backward, clip, AdamW and EMA, and nothing around them."""
    parameters = list(trainer.student.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=recipe.train.lr, fused=True)
    draws = StepDraws(0, 0, len(batch.ids))
    trainer.step(batch, draws).losses["student"]["lcd"].mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    trainer.after_update(["student"])


def least(work, times: int) -> float:
    spent = []
    for _ in range(times):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent)
