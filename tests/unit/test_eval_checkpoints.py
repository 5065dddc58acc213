"""A run's checkpoints, evaluated under the run's name, told apart by their step."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rgbench.core import checkpoint
from rgbench.core.config import dump_yaml
from rgbench.core.errors import UsageError
from rgbench.core.io import load_safetensors
from rgbench.core.run import RunDirectory
from rgbench.evaluate.evaluate import CHECKPOINT_IMAGES
from rgbench.evaluate.results import load_results
from rgbench.evaluate.targets import WEIGHTS, checkpoint_targets, resolve_targets
from rgbench.models.folder import weights_sha256
from rgbench.models.pipeline import load_models
from rgbench.train.identity import check_checkpoint
from tests.tiny_models import run_eval, save_pipeline, save_run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A finished run of 3 steps with checkpoints at 1, 2 (damaged) and 3, and one that kept none."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("lcd-s0", "bare-s0"):
        save_run(root / "runs" / name, method="lcd", rewards=[])
        (root / "runs" / name / "config.yaml").write_text(dump_yaml({"sampling": {"network": "target"}}))
    RunDirectory(root / "runs" / "lcd-s0").log({"step": 1, "loss/lcd": 0.5})
    final = load_safetensors(root / "runs" / "lcd-s0" / "pipeline" / "unet" / WEIGHTS)
    for step in (1, 2, 3):
        target = {key: value * (step / 3) for key, value in final.items()}
        tensors = {"target": target, "student": {"x": torch.zeros(2)}}
        checkpoint.commit(root / "runs" / "lcd-s0" / "checkpoints", step, tensors, {"step": step}, keep=9)
    damaged = root / "runs" / "lcd-s0" / "checkpoints" / "step-00000002" / "student.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    save_pipeline(root / "elsewhere", student=False)
    return root


def test_each_intact_checkpoint_is_the_pipeline_with_its_own_weights(root, tmp_path, caplog):
    (run,) = resolve_targets(["lcd-s0"], root / "runs")
    (found,) = checkpoint_targets(run, tmp_path)
    assert (found.name, found.training_seed, dict(found.training)) == ("lcd-s0", 0, {"step": 1, "steps": 3})
    assert "step-00000002" in caplog.text
    early, final = (load_models(place, "cpu", torch.float32) for place in (found.folder, run.folder))
    assert torch.equal(next(early.unet.parameters()), next(final.unet.parameters()) * (1 / 3))
    assert torch.equal(next(early.vae.parameters()), next(final.vae.parameters()))
    assert early.weights_sha256 != final.weights_sha256


def test_no_run_has_no_checkpoints_and_a_run_without_any_says_what_to_set(root, tmp_path):
    assert checkpoint_targets(resolve_targets([str(root / "elsewhere")], root)[0], tmp_path) == []
    with pytest.raises(UsageError, match=r"train\.keep_checkpoints"):
        checkpoint_targets(resolve_targets(["bare-s0"], root / "runs")[0], tmp_path)


def test_a_checkpoint_of_another_network_is_refused(root, tmp_path):
    (run,) = resolve_targets(["lcd-s0"], root / "runs")
    (root / "runs" / "lcd-s0" / "config.yaml").write_text(dump_yaml({"sampling": {"network": "student"}}))
    with pytest.raises(UsageError, match=r"student\.safetensors: .* are not those of"):
        checkpoint_targets(run, tmp_path)
    (root / "runs" / "lcd-s0" / "config.yaml").write_text(dump_yaml({"sampling": {"network": "target"}}))


CONFIG = {"kind": "lcd", "seed": 0, "train": {"steps": 3, "lr": 1e-4}, "sampling": {"network": "target"}}
OTHERS = {
    "seed": {"recipe": CONFIG | {"seed": 1}},
    "train.lr": {"recipe": CONFIG | {"train": {"steps": 3, "lr": 1e-3}}},
    "kind": {"recipe": CONFIG | {"kind": "rg_lcd"}},
    "teacher": {"recipe": CONFIG, "teacher": {"sha256": "1" * 64}},
    "rewards": {"recipe": CONFIG, "rewards": [{"name": "hps"}]},
}


@pytest.mark.parametrize("what", [None, *OTHERS])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, what):
    folder = save_run(tmp_path / "runs" / "lcd-s0", method="lcd", rewards=[])
    (folder / "config.yaml").write_text(dump_yaml(CONFIG))
    teacher = {"path": "elsewhere", "sha256": "0" * 64}
    own = {"recipe": CONFIG | {"train": {"steps": 2, "lr": 1e-4}}, "teacher": teacher, "rewards": []}  # then prolonged
    tensors = {"target": load_safetensors(folder / "pipeline" / "unet" / WEIGHTS)}
    recorded = own if what is None else own | OTHERS[what]
    checkpoint.commit(folder / "checkpoints", 1, tensors, {"step": 1, "run": recorded})
    (run,) = resolve_targets(["lcd-s0"], tmp_path / "runs")
    if what is None:
        assert [found.training["step"] for found in checkpoint_targets(run, tmp_path)] == [1]
        return
    with pytest.raises(UsageError, match=rf"step-00000001: a checkpoint of another run \({what}"):
        checkpoint_targets(run, tmp_path)


@pytest.mark.parametrize("run", ["x", [], {}, {"recipe": "x"}])
def test_a_checkpoint_of_no_run_is_refused(tmp_path, run):
    with pytest.raises(UsageError, match="step-00000001: does not say of which run it is"):
        check_checkpoint(tmp_path / "step-00000001", {"step": 1, "run": run}, CONFIG, {})


def test_a_student_of_another_run_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_run(tmp_path / "runs" / "lcd-s0", method="lcd", rewards=[])
    RunDirectory(folder).update(student_sha256=weights_sha256(folder / "pipeline"))
    run_eval(["lcd-s0"], ["hps"], num=2, batch_size=2)
    shutil.rmtree(folder / "pipeline")
    save_pipeline(folder / "pipeline", student=True, seed=1)
    with pytest.raises(UsageError, match=r"lcd-s0/pipeline: not the student that its run exported"):
        run_eval(["lcd-s0"], ["hps"], num=2, batch_size=2)


def test_results_name_the_step(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"num": 10, "batch_size": 10, "checkpoints": True, "keep_images": 9, "save_images": True}
    found = run_eval(["lcd-s0"], ["hps"], runs=root / "runs", **options)
    results = load_results(Path("results"))
    assert len(found) == len(results) == 2
    assert {result.head.training["step"]: len(result.images) for result in results} == {1: CHECKPOINT_IMAGES, 3: 9}
    assert [result.is_checkpoint for result in found] == [True, False]
    assert all("--checkpoints" in result.runs[0].command for result in results)
    assert [bool(result.training_log) for result in found] == [False, True]
    assert "lcd-s0, step 1 of 3: lcm" in capsys.readouterr().err
