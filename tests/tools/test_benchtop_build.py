"""A short build makes every part, restarts where it stopped, and is deterministic."""

from __future__ import annotations

import pytest
import torch

from rgbench.core.errors import UsageError
from rgbench.core.io import read_json, sha256_tree
from tools.benchtop.api import build, install_world
from tools.benchtop.stages import SHIPPED, STAGES, WorldRecipe, run_stages


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return build("benchtop", tmp_path_factory.mktemp("world"), [], device="cpu", quick=True)


def test_every_stage_is_recorded_with_its_outputs(quick):
    stages = read_json(quick / "manifest.json")["stages"]
    assert list(stages) == sorted(stages, key=list(STAGES).index) and set(stages) == set(STAGES)
    assert stages["clip"]["outputs"]["clip"] == sha256_tree(quick / "clip")
    assert stages["teacher"]["inputs"].keys() == {"clip", "latents.safetensors"}


def test_finished_stages_are_skipped_and_a_damaged_one_is_made_again(quick, capsys):
    run_stages(WorldRecipe.quick(), quick, ["reward"], torch.device("cpu"))
    assert "reward: done already" in capsys.readouterr().out
    before = sha256_tree(quick / "reward")
    (quick / "reward" / "open_clip_model.safetensors").write_bytes(b"torn")
    run_stages(WorldRecipe.quick(), quick, ["reward"], torch.device("cpu"))
    assert "reward: running" in capsys.readouterr().out
    assert sha256_tree(quick / "reward") == before  # the same weights, from the same seeds


def test_a_short_build_is_deterministic(quick, tmp_path):
    names = ["clip", "vae", "latents", "teacher"]
    run_stages(WorldRecipe.quick(), tmp_path, names, torch.device("cpu"))
    for part in ("clip", "vae", "unet"):
        assert sha256_tree(tmp_path / part) == sha256_tree(quick / part)


def test_unknown_stage_world_and_missing_input(tmp_path):
    with pytest.raises(UsageError, match="unknown stage"):
        build("benchtop", tmp_path, ["teachers"], device="cpu", quick=True)
    with pytest.raises(UsageError, match="unknown world"):
        build("desktop", tmp_path, [], device="cpu", quick=True)
    with pytest.raises(UsageError, match="needs clip"):
        build("benchtop", tmp_path, ["reward"], device="cpu", quick=True)


def test_install_copies_whole_parts_and_refuses_an_unfinished_build(quick, tmp_path):
    install_world(quick, tmp_path / "assets")
    for name in SHIPPED:
        assert sha256_tree(tmp_path / "assets" / name) == sha256_tree(quick / name)
    with pytest.raises(UsageError, match="not built yet"):
        install_world(tmp_path / "nothing", tmp_path / "assets")
