"""``rgbench train --dry-run``: everything checked and said, nothing trained, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rgbench.core.errors import RgbenchError
from rgbench.core.run import RunDirectory
from rgbench.train.train import dry_run, train
from tests import sd_folders
from tests.conftest import Cli


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    sd_folders.save_teacher(root / "sd21", "sd21", "v_prediction")
    return sd_folders.save_parts(root)


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_plan_says_what_would_be_trained(parts, tmp_path, cli: Cli):
    recipe = sd_folders.write_recipe(parts, tmp_path, "lrm", "sd21", {"lora": {"rank": 2}})
    before = files(tmp_path), files(parts)
    done = cli("train", recipe, "train.steps=6", "train.save_every=4", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert (files(tmp_path), files(parts)) == before, "something was written"
    rows = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert rows["run"].endswith("tiny-s0, new")
    assert "v_prediction, 64 px, latents 4×8×8" in rows["teacher"]
    assert rows["student"] == "LoRA of rank 2, guidance embedding 16"
    learned, total = map(float, re.findall(r"([0-9.]+) M", rows["student learns"]))
    assert 0 < learned < total
    assert {"proxy learns", "reward", "data", "checkpoints"} <= rows.keys()
    assert rows["steps"] == "6 of 2 images: 12 images, 3 epochs"
    assert re.fullmatch(r"lcd \S+, reward \S+, pairs \S+", rows["first step"])


def test_counts_are_those_of_the_networks(parts, tmp_path):
    recipe = sd_folders.write_recipe(parts, tmp_path, "lcd", "sd21", {})
    rows = dict(dry_run(str(recipe), []))
    number = sum(parameter.numel() for parameter in sd_folders.unet("sd21").parameters())
    embedding = 16 * 8  # d of the embedding × channels of the first block
    assert f"{number / 1e6:,.2f} M" in rows["teacher"]
    total = f"{(number + embedding) / 1e6:,.2f} M"
    assert rows["student learns"].startswith(f"{total} of {total} parameters; AdamW, lr 0.001")
    networks_and_moments = 4 * (number + embedding) * 4
    assert f"{networks_and_moments / 1e6:.3g} MB each" in rows["checkpoints"]


def test_a_loss_that_is_not_finite_is_found(parts, tmp_path):
    recipe = sd_folders.write_recipe(parts, tmp_path, "lcd", "sd21", {})
    with pytest.raises(RgbenchError, match="loss term lcd is not finite"):
        dry_run(str(recipe), ["lcd.w_min=1e38", "lcd.w_max=1e38"])
    with pytest.raises(RgbenchError, match="loss term lcd of the student is not finite"):
        train(str(recipe), ["lcd.w_min=1e38", "lcd.w_max=1e38"], out=tmp_path / "run", device="cpu")
    assert RunDirectory(tmp_path / "run").read()["status"] == "failed"
