"""What may differ between two runs without changing their result: micro-batches, checkpointing, threads, precision."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch

from rgbench.core import checkpoint
from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.process import StopRequest
from rgbench.train.base import StepDraws
from rgbench.train.loop import Loop
from rgbench.train.rg_lcd import RGLCD
from tests.faults.disk import FailingDisk
from tests.parity import tiny
from tests.resume.loops import (
    COMMAND,
    KINDS,
    assert_close,
    assert_same,
    everything,
    gradients,
    make_loop,
    run_to_end,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("equivalence") / "teacher")


LONG = [pytest.param(kind, 10, marks=pytest.mark.long) for kind in KINDS]


@pytest.mark.parametrize(("kind", "steps"), [("lrm", 2), *LONG])
def test_one_batch_of_eight_is_eight_of_one(folder, tmp_path, kind, steps):
    assert_close(folder, tmp_path, kind, steps, 1e-3, gradient_accumulation_steps=8)  # as on ranks


@pytest.mark.parametrize(("kind", "steps"), [("rg_lcd", 2), *LONG])
def test_gradient_checkpointing_changes_nothing(folder, tmp_path, kind, steps):
    assert_close(folder, tmp_path, kind, steps, 1e-5, gradient_checkpointing=True)


class DrawnInFloat32(StepDraws):
    """The numbers of a float32 run, given in the run's own dtype."""

    def __init__(self, seed: int, step: int, num: int, first: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(seed, step, num, first, torch.float32)
        self.wanted = dtype

    def normal(self, stream, shape):
        return super().normal(stream, shape).to(self.wanted)

    def uniform(self, stream, low, high):
        return super().uniform(stream, low, high).to(self.wanted)


@pytest.mark.parametrize("kind", ["lcd", pytest.param("rg_lcd", marks=pytest.mark.long)])
def test_a_split_rounds_no_worse_than_float32_itself(folder, tmp_path, monkeypatch, kind):
    """Two float32 gradients of one batch differ as much as each does from float64's, and no more.

    That distance is the method's: it subtracts two predictions that are nearly equal, after a division by α that is
    0.07 at the last timestep, so that rounding of 6e-8 grows to 1e-5 of the whole gradient.
    """
    monkeypatch.setattr("rgbench.train.loop.StepDraws", DrawnInFloat32)
    found = []
    for name, options in (("exact", {"dtype": torch.float64}), ("whole", {}), ("split", {"accumulation": 8})):
        accumulation = options.pop("accumulation", 1)
        path = tmp_path / name
        loop = make_loop(kind, folder, path, batch_size=8, gradient_accumulation_steps=accumulation, **options)
        found.append(torch.cat([gradient.flatten().double() for gradient in gradients(loop)]))
    exact, whole, split = found
    own = [float((gradient - exact).norm() / exact.norm()) for gradient in (whole, split)]
    assert 1e-8 < max(own) < 1e-4
    assert float((whole - split).norm() / exact.norm()) <= 2 * max(own)


def test_threads_that_read_ahead_change_nothing(folder, tmp_path):
    options = {"gradient_accumulation_steps": 2, "steps": 6}
    plain = run_to_end(make_loop("lcd", folder, tmp_path / "a", **options))
    ahead = run_to_end(make_loop("lcd", folder, tmp_path / "b", num_workers=3, **options))
    assert_same(everything(plain), everything(ahead))


class CountingSource(tiny.TinySource):
    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def load(self, indices):
        self.asked.append(indices)
        return super().load(indices)


def test_nothing_is_read_twice_nor_beyond_the_end(folder, tmp_path):
    asked = []
    for workers in (0, 4):
        source = CountingSource()
        run_to_end(make_loop("lcd", folder, tmp_path / str(workers), source, num_workers=workers, steps=5))
        asked.append(sorted(map(tuple, source.asked)))
    assert asked[0] == asked[1] and len(asked[0]) == 6  # the preview's, and five steps


def test_a_reader_that_fails_ends_the_run(folder, tmp_path):
    class Failing(tiny.TinySource):
        def load(self, indices):
            if len(indices) == 4:
                raise UsageError("tar: 12 of 100 samples cannot be used")
            return super().load(indices)

    loop = make_loop("lcd", folder, tmp_path / "a", Failing(), num_workers=2)
    with pytest.raises(UsageError, match="12 of 100 samples"), StopRequest() as stop:
        loop.train(stop, COMMAND)


def test_what_saves_memory_is_switched_on(folder, tmp_path):
    loop = make_loop("lcd", folder, tmp_path / "a", gradient_checkpointing=True)
    assert loop.trainer.student.is_gradient_checkpointing and loop.trainer.models.vae.is_gradient_checkpointing


def test_a_batch_that_cannot_be_split_is_refused(folder, tmp_path):
    with pytest.raises(
        UsageError, match=r"batch_size 4 cannot be split over 1 processes × .*_steps 3; .*multiple of 3"
    ):
        make_loop("lcd", folder, tmp_path / "a", gradient_accumulation_steps=3)


# ---- precision --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_float32_weights(folder, tmp_path, dtype):
    plain = make_loop("lrm", folder, tmp_path / "plain")
    mixed = make_loop("lrm", folder, tmp_path / "mixed", precision=dtype, sample_every=2, steps=3)
    mixed.updater.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=dtype == "float16")
    wanted, found = (torch.cat([g.flatten() for g in gradients(loop)]) for loop in (plain, mixed))
    error = (wanted - found).norm() / wanted.norm()
    assert 1e-5 < error < 0.5, "another arithmetic, and the same gradient; 0.24 without AVX2"
    run_to_end(mixed)
    assert all(value.dtype == torch.float32 for value in mixed.trainer.student.state_dict().values())
    assert (tmp_path / "mixed" / "samples" / "step-00000003.png").is_file()


def test_float16_goes_on_after_an_overflow_and_after_a_resume(folder, tmp_path):
    straight = make_loop("lcd", folder, tmp_path / "a", precision="float16", steps=6)
    straight.updater.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = everything(straight)
    values = straight.train_step()
    assert straight.updater.num_skipped == 1 and values["loss_scale"] == 2.0**39 and "grad_norm/student" not in values
    kept = {name: value for name, value in everything(straight).items() if not name.startswith("batch-")}
    assert kept and all(torch.equal(value, before[name]) for name, value in kept.items())
    while straight.updater.num_skipped == straight.step:
        straight.train_step()
    straight.save()
    resumed = make_loop("lcd", folder, tmp_path / "a", precision="float16", steps=6)
    resumed.restore()
    assert resumed.updater.scaler.get_scale() == straight.updater.scaler.get_scale()
    assert resumed.updater.num_skipped == straight.updater.num_skipped
    for loop in (straight, resumed):
        loop.train_step()
    assert_same(everything(straight), everything(resumed))


def test_what_overflowed_is_left_out_of_the_log(folder, tmp_path):
    """The norms of both gradients at the prediction are measured in the backward pass that overflows."""
    loop = make_loop("rg_lcd", folder, tmp_path / "a", precision="float16", steps=2, log_every=1)
    loop.updater.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    rows = run_to_end(loop).run.read_log()
    assert [row["step"] for row in rows] == [1, 2] and loop.updater.num_skipped == 2
    assert all("loss/reward" in row and "gradient/lcd" in row and "gradient/reward" not in row for row in rows)


class Steep:
    """A finite reward whose gradient is not."""

    name, differentiable = "steep", True

    def fingerprint(self) -> dict[str, str]:
        return {"name": self.name}

    def __call__(self, images, prompts):
        scores = images.float().mean((1, 2, 3))
        return scores + (scores * 0).sqrt()


def test_float16_without_room_stops(folder, tmp_path):
    run = make_loop("lcd", folder, tmp_path / "a", precision="float16").run
    recipe = tiny.recipe(train={"dtype": "float16"})
    loop = Loop(RGLCD(recipe, tiny.models(folder), Steep()), tiny.TinySource(), recipe, run)
    with pytest.raises(RgbenchError, match=r"overflows float16 at any loss scale; .*train\.dtype=bfloat16"):
        for _ in range(20):
            loop.train_step()
    assert loop.step == 16, "two to the sixteenth is where the scale begins"


# ---- saving on a full disk --------------------------------------------------------------


@pytest.mark.parametrize("stride", [97, pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_a_disk_that_fails_at_the_nth_operation_of_a_save(folder, tmp_path, stride):
    """For every n, in the short tier for every 97th (each tensor is a write): the newest checkpoint loads.

    It is the one before where this one is not whole.
    """
    straight = run_to_end(make_loop("lcd", folder, tmp_path / "straight", steps=4))
    loop, again = (make_loop("lcd", folder, tmp_path / name, steps=4) for name in ("full", "again"))
    again.run = loop.run
    for _ in range(2):
        loop.train_step()
    loop.save()
    loop.train_step()
    third, n, survived = checkpoint.path_of(loop.run.checkpoints, 3), 1, False
    while not survived:
        n += stride
        shutil.rmtree(third, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, n)
            with contextlib.suppress(OSError):
                loop.save()
            survived = disk.count < n
        again.restore()
        assert again.step == (3 if third.is_dir() else 2), f"operation {n}"
    assert n > 300 and again.step == 3
    assert_same(everything(run_to_end(again)), everything(straight))
