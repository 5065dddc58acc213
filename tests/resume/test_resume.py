"""12 steps straight against 5 + resume + 7 (and 7 + 5), for each trainer; signals; saving changes nothing."""

from __future__ import annotations

import os
import signal
from functools import cache
from itertools import product

import pytest

from rgbench.core import checkpoint
from rgbench.core.errors import Interrupted, UsageError
from rgbench.core.process import StopRequest
from tests.parity import tiny
from tests.resume.loops import ALL_KINDS, COMMAND, SignallingSource, assert_same, everything, make_loop, run_to_end
from tests.tiny_trainers import SCORED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("resume") / "teacher")


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """Whole runs, each trained once."""

    @cache
    def whole(kind, accumulation):
        return run_to_end(
            make_loop(kind, folder, tmp_path_factory.mktemp("straight"), gradient_accumulation_steps=accumulation)
        )

    return whole


EDGE, INSIDE = 5, 7  # of an epoch of ten images, in steps of four
SHORT = ("lcd", "rg_lcd", "lrm", "lrm_pretrain", "tcd", "mlcm", "weighted", "dollar")
CELLS = [(kind, INSIDE, 1) for kind in SHORT] + [("lrm", EDGE, 1)]
LONG_CELLS = sorted({*product(ALL_KINDS, (EDGE, INSIDE), (1, 2))} - {*CELLS})


@pytest.mark.parametrize(
    ("kind", "stopped_at", "accumulation"),
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.long) for cell in LONG_CELLS)],
)
def test_resume_is_exact(folder, tmp_path, straight, kind, stopped_at, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    whole = straight(kind, accumulation)
    assert whole.step == 12

    # the first load is of the preview's prompts, then one per micro-batch
    signalled = SignallingSource(1 + (stopped_at - 1) * accumulation)
    first = make_loop(kind, folder, tmp_path / "resumed", signalled, **options)
    with pytest.raises(Interrupted) as caught, StopRequest() as stop:
        first.train(stop, COMMAND)
    assert (caught.value.exit_code, caught.value.resume_command) == (75, COMMAND)
    assert first.step == stopped_at, "saved within the step in which the signal came"
    assert first.run.read()["status"] == "interrupted" and first.run.read()["step"] == stopped_at

    second = make_loop(kind, folder, tmp_path / "resumed", **options)
    second.restore()
    assert second.step == stopped_at
    assert_same(everything(second), everything(first))
    run_to_end(second)
    assert_same(everything(second), everything(whole))
    rows = [{k: v for k, v in row.items() if k != "images_per_sec"} for row in second.run.read_log()]
    assert rows == [{k: v for k, v in r.items() if k != "images_per_sec"} for r in whole.run.read_log()]
    cost = second.cost.read()
    assert cost["images"] == 48 and cost["reward_calls"] == 48 * SCORED.get(kind, 0)


def test_saving_sampling_and_logging_change_nothing(folder, tmp_path):
    seldom = run_to_end(make_loop("lrm", folder, tmp_path / "a", save_every=12, sample_every=0, log_every=5))
    often = run_to_end(make_loop("lrm", folder, tmp_path / "b", save_every=1, sample_every=2, log_every=1))
    assert_same(everything(seldom), everything(often))
    assert len(list((tmp_path / "b" / "samples").glob("*.png"))) == 6
    assert [row["step"] for row in seldom.run.read_log()] == [5, 10, 12]
    assert len(checkpoint.checkpoints(often.run.checkpoints)) == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, tmp_path, caplog):
    own = run_to_end(make_loop("lcd", folder, tmp_path / "a", steps=4, save_every=2))
    after_four = everything(own)
    file = own.run.checkpoints / "step-00000004" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = make_loop("lcd", folder, tmp_path / "a", steps=4, save_every=2)
    again.restore()
    assert again.step == 2 and "student.safetensors" in caplog.text
    run_to_end(again)
    assert_same(everything(again), after_four)


def test_ctrl_c_saves_and_exits_130(folder, tmp_path):
    own = make_loop("lcd", folder, tmp_path / "a", SignallingSource(3, signal.SIGINT))
    with pytest.raises(Interrupted) as caught, StopRequest() as stop:
        own.train(stop, COMMAND)
    assert caught.value.exit_code == 130 and own.step == 3
    assert checkpoint.latest(own.run.checkpoints) is not None
    assert COMMAND in str(caught.value)


def test_a_second_ctrl_c_interrupts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_data_of_another_resolution_is_refused(folder, tmp_path):
    class Large(tiny.TinySource):
        def load(self, indices):
            batch = super().load(indices)
            return type(batch)(batch.images_BCHW.repeat(1, 1, 2, 2), batch.prompts, batch.ids)

    with pytest.raises(UsageError, match=r"images of 32×32 pixels, the model takes 16×16"):
        make_loop("lcd", folder, tmp_path / "a", Large()).load_batch(0)
