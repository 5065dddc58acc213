"""A latent proxy that is not there: the error's own command makes it, where the recipe looks for it."""

from __future__ import annotations

import shlex

import pytest

from rgbench.core.errors import UsageError
from rgbench.core.run import RunDirectory
from rgbench.train.recipe import MissingProxy, find_proxy, load_recipe, pretrain_command
from rgbench.train.train import train
from tests import sd_folders

SMALL = ["proxy.vision={patch_size: 4, layers: 1, width: 16, head_width: 8}", "proxy.trainable.text_layers=1"]
SMALL += ["train.steps=1", "train.batch_size=2", "train.num_workers=0", "train.dtype=float32"]


def test_the_command_of_the_error_makes_the_proxy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sd_folders.save_teacher(tmp_path / "sd15", "sd15")
    recipe = str(sd_folders.write_recipe(sd_folders.save_parts(tmp_path), tmp_path, "lrm", "sd15", {}))
    missing = ["proxy.path=runs/mine/latent_proxy"]
    with pytest.raises(MissingProxy, match=r"proxy\.path runs/mine/latent_proxy: no such folder") as caught:
        train(recipe, missing, device="cpu")
    assert caught.value.exit_code == 2 and str(caught.value).endswith(caught.value.command)
    assert not (tmp_path / "runs").exists()
    words = shlex.split(caught.value.command)
    assert words[:3] == ["rgbench", "train", "sd21/lrm_pretrain"] and words[-2:] == ["--out", "runs/mine"]
    train(words[2], [*words[3:-2], *SMALL, "proxy.align.steps=1"], out=tmp_path / words[-1], device="cpu")
    assert RunDirectory.open(train(recipe, missing, device="cpu")).read()["status"] == "finished"


def test_the_command_says_what_differs_from_the_recipe_it_names():
    assert pretrain_command(load_recipe("sd21/lrm", ["model.preset=sd15", "data.path=cc 3m"])) == (
        """rgbench train sd21/lrm_pretrain 'model={"preset": "sd15"}' """
        """'data={"path": "cc 3m", "resolution": 512, "kind": "webdataset"}' --out runs/sd21-lrm_pretrain-s0"""
    )
    assert pretrain_command(load_recipe("lrm", ["proxy.path=a/b"])) == "rgbench train lrm_pretrain"
    small = "rgbench train dollar_pretrain --out runs/dollar_pretrain-s0"
    assert pretrain_command(load_recipe("dollar")) == small
    wide = pretrain_command(load_recipe("dollar", ["proxy.small.width=64", "reward.path=hps"]))
    assert wide.startswith("""rgbench train dollar_pretrain 'proxy.small={"patch_size": 1, "width": 64}' 'reward=""")


def test_a_preset_without_a_proxy(tmp_path):
    with pytest.raises(MissingProxy, match=r"nobody has published.*rgbench train sd21/lrm_pretrain$"):
        find_proxy(load_recipe("sd21/lrm", ["proxy.path=null"]))
    with pytest.raises(UsageError, match=r"proxy\.path: give a path"):
        find_proxy(load_recipe("sd21/lrm", ["proxy.path=null", "model.preset=null", f"model.path={tmp_path}"]))
    assert (find_proxy(load_recipe("lrm")) / "config.json").is_file()
