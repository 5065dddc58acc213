"""12 steps straight against 5 + resume + 7 (and 7 + 5), for each trainer; signals; saving changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
from functools import cache
from itertools import product

import pytest

from rgbench.core import checkpoint
from rgbench.core.errors import Interrupted, RgbenchError, UsageError
from rgbench.core.process import StopRequest
from rgbench.core.run import RunDirectory
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


def test_a_grid_that_a_kill_took_is_made_again(folder, tmp_path):
    """Whether the kill came in the middle of the run or after its last step; a grid that is there stays."""
    options = {"steps": 4, "save_every": 2, "sample_every": 2}
    whole = run_to_end(make_loop("lcd", folder, tmp_path / "a", **options))
    grids = sorted(whole.run.samples.iterdir())
    wanted = {file.name: file.read_bytes() for file in grids}
    assert list(wanted) == ["step-00000002.png", "step-00000004.png"]
    (whole.run.samples / "step-00000004.png").unlink()
    before = grids[0].stat().st_mtime_ns
    again = make_loop("lcd", folder, tmp_path / "a", **options)
    again.restore()
    run_to_end(again)
    shutil.rmtree(whole.run.checkpoints / "step-00000004")
    assert {file.name: file.read_bytes() for file in whole.run.samples.iterdir()} == wanted
    assert grids[0].stat().st_mtime_ns == before
    grids[0].unlink()
    again = make_loop("lcd", folder, tmp_path / "a", **options)
    again.restore()
    assert again.step == 2
    run_to_end(again)
    assert {file.name: file.read_bytes() for file in whole.run.samples.iterdir()} == wanted


class MovingSource(tiny.TinySource):
    """Does something to the run's folder while a given batch is loaded."""

    def __init__(self, at_load, what):
        self.loads, self.at_load, self.what = 0, at_load, what

    def load(self, indices):
        if self.loads == self.at_load:
            self.what()
        self.loads += 1
        return super().load(indices)


@pytest.mark.parametrize("another", [False, True])
def test_a_run_that_is_moved_is_saved_where_it_lies(folder, tmp_path, straight, another):
    """Nothing is lost, nothing is begun at the old place, and another run that was put there is not touched."""
    here, there = tmp_path / "run", tmp_path / "elsewhere" / "moved"

    def move():
        there.parent.mkdir()
        here.rename(there)
        if another:
            RunDirectory(here).create({}, {"status": "running", "step": 0})

    own = make_loop("lcd", folder, here, MovingSource(5, move), log_every=1, save_every=100)
    with pytest.raises(RgbenchError, match=rf"{here}: was moved while it trained; 5 steps are saved in {there}"):
        run_to_end(own)
    assert here.exists() == another and not (here / "log.jsonl").exists() and not [*here.glob("checkpoints/*")]
    assert RunDirectory(there).read()["status"] == "interrupted"
    again = make_loop("lcd", folder, there)
    again.restore()
    assert again.step == 5
    run_to_end(again)
    assert_same(everything(again), everything(straight("lcd", 1)))


def test_a_run_that_is_removed_ends_in_a_sentence(folder, tmp_path):
    """Also where a signal asks for a save, or a grid would be the first thing written."""
    for options in ({"log_every": 1}, {"log_every": 100, "save_every": 100, "sample_every": 3}):
        path = tmp_path / "run"
        own = make_loop("lcd", folder, path, MovingSource(2, lambda path=path: shutil.rmtree(path)), **options)
        with pytest.raises(RgbenchError, match=f"{path}: was removed while it trained"):
            run_to_end(own)
        assert not path.exists()


def test_what_kills_left_behind_is_removed_at_the_next_start(folder, tmp_path):
    own = run_to_end(make_loop("lcd", folder, tmp_path / "a", steps=2, save_every=1))
    leftovers = [own.run.checkpoints / ".tmp-step-00000001-0123abcd" / "student.safetensors"]
    leftovers += [own.run.path / ".run.json.77.0123abcd.tmp", own.run.samples / ".step-00000001.png.7.0123abcd.tmp"]
    for file in leftovers:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
    again = make_loop("lcd", folder, tmp_path / "a", steps=2, save_every=1)
    again.restore()
    assert again.step == 2 and not any(file.parent.glob(f"{file.name}*") and file.exists() for file in leftovers)
    assert not leftovers[0].parent.exists() and len(checkpoint.checkpoints(own.run.checkpoints)) == 2


def test_a_checkpoint_of_another_run_is_refused(folder, tmp_path):
    """Of another seed, another recipe or another teacher, laid into this run by mistake."""

    def loop(name, contents=None, **sections):
        own = make_loop("lcd", folder, tmp_path / name, steps=2)
        own.recipe = own.recipe.model_copy(update=sections)
        own.contents = contents or {"teacher": {"path": str(tmp_path / name), "sha256": "a"}}
        return own

    own = run_to_end(loop("own"))
    here = own.run.checkpoints / "step-00000002"
    shutil.move(here, tmp_path / "kept")
    others = {
        "seed": (None, {"seed": 1}, "seed: 1 → 0"),
        "lr": (None, {"train": own.recipe.train.model_copy(update={"lr": 0.5})}, r"train\.lr: 0\.5 → 0\.001"),
        "teacher": ({"teacher": {"path": "elsewhere", "sha256": "b"}}, {}, r"teacher \(sha256\)"),
    }
    for name, (contents, sections, said) in others.items():
        other = run_to_end(loop(name, contents, **sections))
        shutil.copytree(other.run.checkpoints / here.name, here)
        with pytest.raises(UsageError, match=rf"{here}: a checkpoint of another run \({said}\)"):
            loop("own").restore()
        shutil.rmtree(here)
    moved = {"teacher": {"path": "on another machine", "sha256": "a"}}
    shutil.move(tmp_path / "kept", here)
    again = loop("own", moved)
    again.restore()
    assert again.step == 2
    tensors, meta = checkpoint.load(here)
    del meta["run"]  # as an older version wrote it
    shutil.rmtree(here)
    checkpoint.commit(here.parent, 2, tensors, meta)
    again = loop("own", {"teacher": {"sha256": "c"}})
    again.restore()
    assert again.step == 2
