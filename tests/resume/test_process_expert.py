"""An LRM whose expert scores in another process: the same training to the last bit, straight through or resumed."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.run import RunDirectory
from rgbench.train.train import train
from tests.process_workers import CHECKSUM, HPS, SIMPLE, scorer

STEPS = 3


def section(worker: str, **fields) -> str:
    return "reward=" + json.dumps({"kind": "process", "python": sys.executable, "worker": worker, **fields})


def weights(path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = RunDirectory.open(path).checkpoints / f"step-{step:08d}"
    files = sorted(folder.glob("*.safetensors"))
    assert {"student", "target", "proxy"} <= {file.stem for file in files}
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_same_expert_in_another_process_trains_the_same_student(recipe, world, tmp_path):
    """The tiny world's HPS, written once more in a scorer that knows nothing of rgbench; float images arrive whole."""
    here = train(str(recipe), ["train.sample_every=0"], out=tmp_path / "here")
    there = section(scorer(tmp_path, HPS), path=str(world / "reward"), options={"antialias": True})
    other = train(str(recipe), [there, "train.sample_every=0"], out=tmp_path / "there")
    assert_equal(weights(here), weights(other))
    first, second = (RunDirectory.open(path).read()["rewards"][0]["fingerprint"] for path in (here, other))
    assert first["weights_sha256"] == second["weights_sha256"] and second["kind"] == "process"
    assert "in-sample" in (other / "pipeline" / "README.md").read_text()


def test_stopped_and_gone_on_with(recipe, tmp_path, monkeypatch):
    """As if it had never stopped; and not at all once the scorer is another."""
    worker = scorer(tmp_path, CHECKSUM.format(takes="uint8"))
    options = [section(worker), "proxy.logit_scale=1e-3", "train.sample_every=0", "train.save_every=1"]
    straight = train(str(recipe), options, out=tmp_path / "straight")

    # Ctrl-C reaches rgbench alone, in a step that the worker is busy with
    text = CHECKSUM.format(takes="uint8").replace("def __call__(self, images, prompts):", CALLED)
    monkeypatch.setenv("RGBENCH_TEST_PARENT", str(os.getpid()))
    stopping = scorer(tmp_path, text, "stopping")
    run = tmp_path / "stopped"
    with pytest.raises(RgbenchError, match="1 of 3 steps are saved"):
        train(str(recipe), [section(stopping), *options[1:]], out=run)
    monkeypatch.delenv("RGBENCH_TEST_PARENT")
    train(str(recipe), [section(stopping, timeout=99, device="cpu"), *options[1:]], out=run)
    assert_equal(weights(straight), weights(run))

    scorer(tmp_path, text + "\n# another\n", "stopping")
    meta = RunDirectory.open(run)
    meta.update(status="interrupted")
    with pytest.raises(UsageError, match="its rewards changed since the run began"):
        train(str(recipe), [section(stopping), *options[1:]], out=run)


CALLED = """def __call__(self, images, prompts):
        import os, signal
        if "RGBENCH_TEST_PARENT" in os.environ:
            os.kill(int(os.environ["RGBENCH_TEST_PARENT"]), signal.SIGINT)
"""


def test_a_worker_that_dies_in_training_leaves_the_last_checkpoint(recipe, tmp_path):
    dying = "(self.__dict__.setdefault('n', []).append(1), len(self.n) == 3 and os.kill(os.getpid(), 9))"
    worker = scorer(tmp_path, SIMPLE % dying)
    options = [section(worker), "proxy.logit_scale=1", "train.sample_every=0", "train.save_every=1"]
    with pytest.raises(RgbenchError, match="mine: the worker was killed by SIGKILL while scoring"):
        train(str(recipe), options, out=tmp_path / "run")
    assert RunDirectory.open(tmp_path / "run").read()["step"] == 2
    assert weights(tmp_path / "run", 2)


def test_scores_that_are_not_finite_stop_the_run(recipe, tmp_path):
    worker = scorer(tmp_path, SIMPLE % "return [float('nan')] * len(prompts)")
    with pytest.raises(RgbenchError, match=r"step 0: .*not finite for .*png"):
        train(str(recipe), [section(worker), "proxy.logit_scale=1"], out=tmp_path / "run")


def test_a_scale_is_asked_for(recipe, tmp_path):
    with pytest.raises(UsageError, match=r"proxy\.logit_scale: mine has none"):
        train(str(recipe), [section(scorer(tmp_path, SIMPLE % "pass"))], out=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
