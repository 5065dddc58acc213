"""Gold along training: what it says of images, what it leaves alone, and where it goes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rgbench.benchtop.scenes import Scenes, render
from rgbench.core.errors import ConfigError, UsageError
from rgbench.core.run import RunDirectory
from rgbench.data.prompts import benchtop_prompts
from rgbench.train.gold import NUM_IMAGES, GoldMonitor
from rgbench.train.recipe import load_recipe
from rgbench.train.train import train
from tests.resume.conftest import recipe, world  # noqa: F401  (fixtures)


def monitor_of(images, expert=None) -> GoldMonitor:
    """Of a student that makes these images."""
    models = SimpleNamespace(resolution=64, device=torch.device("cpu"))
    made = SimpleNamespace(models=models, recipe=load_recipe("lcd"), sample=lambda prompts, generators: images)
    return GoldMonitor(made if expert is None else SimpleNamespace(**vars(made), expert=expert))


def test_right_images_are_right_and_others_are_not():
    scenes = Scenes.from_dicts([prompt.scene for prompt in benchtop_prompts(NUM_IMAGES).prompts])
    right = render(scenes, "test", np.arange(NUM_IMAGES))
    brightness = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    found = monitor_of(right, brightness).measure()
    assert found["gold/right"] > 0.9 and found["gold/reward"] == pytest.approx(float(right.mean()), rel=1e-5)
    other = monitor_of(right.roll(1, 0)).measure()
    assert other["gold/right"] < 0.2 and "gold/reward" not in other
    lost = monitor_of(0.5 * right + 0.5 * right.mean()).measure()  # half of the contrast: as right, but degraded
    assert lost["gold/degradation"] > found["gold/degradation"] + 0.1
    assert lost["gold/utility"] < found["gold/utility"] - 0.08 and other["gold/utility"] < found["gold/utility"] - 0.3


def test_a_world_without_an_oracle_is_refused(recipe):  # noqa: F811
    with pytest.raises(UsageError, match=r"monitor\.oracle_every: .*64 px, this model makes 16 px; set it to 0"):
        train(str(recipe), ["monitor.oracle_every=1", "train.log_every=1"])
    with pytest.raises(ConfigError, match=r"monitor\.oracle_every 3 is no multiple of train\.log_every 2"):
        load_recipe("lcd", ["monitor.oracle_every=3", "train.log_every=2"])


class Looks:
    """Stands in for the oracle, which reads larger images: it makes the images all the same."""

    def __init__(self, trainer):
        self.trainer = trainer

    def measure(self):
        images = self.trainer.sample(["a"], [torch.Generator().manual_seed(0)])
        return {"gold/utility": float(images.mean()), "gold/reward": float(images.std())}


TRACKIO = """
import json
from pathlib import Path
class Image:
    def __init__(self, pixels): self.shape = pixels.shape
class Run:
    def log(self, values, step): rows.append([step, {k: getattr(v, "shape", v) for k, v in values.items()}])
    def finish(self):
        print("* Run finished.")
        Path("tracked.json").write_text(json.dumps([options, rows]))
rows, options = [], {}
def init(**given):
    options.update(given)
    print("* Created new run.")
    return Run()
"""


def test_looks_are_logged_drawn_and_tracked_and_change_nothing(recipe, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("rgbench.train.gold.GoldMonitor", Looks)
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["train.log_every=1", "train.sample_every=0"]
    plain = RunDirectory.open(train(str(recipe), words, out=tmp_path / "plain"))
    watched = ["monitor.oracle_every=2", "train.trackio=mine"]
    run = RunDirectory.open(train(str(recipe), [*words, *watched], out=tmp_path / "watched"))
    shown = capsys.readouterr()
    assert "step 2  gold/utility" in shown.err and shown.err.count("* ") == 2 and shown.out == "", (
        "a path alone goes there"
    )
    assert [row["step"] for row in run.read_log() if "gold/utility" in row] == [2, 3], "where it is due, and at the end"
    assert Image.open(run.path / "gold.png").size == (600, 400)
    name = "unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(plain.pipeline / name), load_file(run.pipeline / name)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert plain.read()["recipe_sha256"] == run.read()["recipe_sha256"]
    options, rows = json.loads((tmp_path / "tracked.json").read_text())
    assert (
        options["project"] == "mine" and options["name"].startswith("watched-") and options["config"]["kind"] == "lrm"
    )
    assert [row for row in rows if "gold" in row[1]] == [[2, {"gold": [400, 600, 3]}], [3, {"gold": [400, 600, 3]}]]
    assert [step for step, values in rows if "loss/lcd" in values] == [1, 2, 3]
    sys.modules.pop("trackio")


def test_a_tracker_that_is_not_installed_is_named(recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("rgbench.train.log.find_spec", lambda name: None)
    for library in ("trackio", "wandb"):
        with pytest.raises(UsageError, match=rf"train\.{library} needs .*pip install 'rgbench\[{library}\]'"):
            train(str(recipe), [f"train.{library}=mine"])
    assert not (tmp_path / "runs").exists()
