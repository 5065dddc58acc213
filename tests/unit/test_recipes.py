"""Every shipped recipe: validated, explained, and what its launch line says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rgbench.config import packaged_recipes
from rgbench.errors import ConfigError
from rgbench.registry import TABLES
from rgbench.trainers.recipe import LCDRecipe, LCDSection, TrainSection, load_recipe

TRAINED = {"lcd", "rg_lcd", "lrm"}
SHIPPED = sorted(name for name in packaged_recipes() if name in TRAINED)


def test_all_three_are_shipped():
    assert len(SHIPPED) == 3 == len(TRAINED & TABLES["trainer"].keys())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_validates_and_explains_itself(name):
    recipe = load_recipe(name)
    assert (recipe.kind, recipe.name, recipe.seed) == (name, name, 0)
    text = packaged_recipes()[name].read_text()
    head = text.split("\n\n")[0]
    for part in ("First:", f"Launch:    rgbench train recipes/{name}.yaml", "Override:", "Then:      rgbench eval"):
        assert part in head
    override = next(line for line in head.splitlines() if "Override:" in line).split(".yaml", 1)[1].split()
    assert load_recipe(name, override) != recipe


def test_the_three_differ_in_their_method_alone():
    recipes = [load_recipe(name) for name in SHIPPED]
    for section in ("model", "data", "train", "lcd", "sampling"):
        first, *others = [getattr(recipe, section) for recipe in recipes]
        assert all(other == first for other in others), section
    rg_lcd, lrm = load_recipe("rg_lcd"), load_recipe("lrm")
    assert rg_lcd.reward == lrm.reward and lrm.reward.antialias is True  # type: ignore[attr-defined]


def test_defaults_are_the_full_size_method():
    train, lcd = TrainSection(), LCDSection()
    assert (train.steps, train.batch_size, train.lr, train.betas, train.weight_decay) == (
        10_000,
        16,
        1e-6,
        (0.9, 0.999),
        0,
    )
    assert (train.max_grad_norm, train.ema_decay) == (1.0, 0.95)
    assert (lcd.num_ddim_timesteps, lcd.w_min, lcd.w_max, lcd.huber_c, lcd.timestep_scaling) == (50, 5, 15, 0.001, 10)


def test_antialiasing_must_be_said(tmp_path):
    text = packaged_recipes()["rg_lcd"].read_text()
    lines = [line for line in text.splitlines() if "antialias:" not in line]
    file = tmp_path / "silent.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"reward\.antialias: missing"):
        load_recipe(str(file))


def test_a_wrong_value_is_found_by_file_line_and_key(tmp_path):
    text = packaged_recipes()["lcd"].read_text().replace("lr: 2e-4", "lr: -2e-4")
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "lr: -2e-4" in row)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(file))
    assert str(caught.value).startswith(f"{file}:{line}:train.lr")


def test_recipes_are_frozen():
    recipe = load_recipe("lcd")
    assert isinstance(recipe, LCDRecipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_validation_imports_no_torch():
    code = "import sys; from rgbench.trainers.recipe import load_recipe; load_recipe('lrm')"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_training_without_a_reward_imports_no_reward_library():
    """They take seconds; a single process needs accelerate no more than diffusers does."""
    code = "import sys, rgbench.trainers.api, rgbench.trainers.lcd; from rgbench.trainers.captions import CaptionCount"
    code += "; print(*[m for m in ('open_clip', 'timm', 'datasets', 'wandb', 'torch.distributed.launcher') "
    code += "if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=600, capture_output=True, text=True)
    assert done.stdout.split() == []
