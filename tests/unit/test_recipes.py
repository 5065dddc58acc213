"""Every shipped recipe: validated, explained, and what its launch line says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rgbench.core.config import packaged_recipes
from rgbench.core.errors import ConfigError
from rgbench.core.registry import TABLES
from rgbench.train.recipe import LCDRecipe, LCDSection, TrainSection, load_recipe

OF_ONE_METHOD = {"lcd", "rg_lcd", "lrm"}
TRAINED = OF_ONE_METHOD | {"tcd", "mlcm", "weighted", "vsd", "dollar"}
OF_FLOW = "benchtop-flow/lcd"
SHIPPED = sorted(name for name in packaged_recipes() if name in TRAINED | {OF_FLOW})


def test_all_are_shipped():
    assert len(SHIPPED) - 1 == len(TRAINED) == len(TRAINED & TABLES["trainer"].keys())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_validates_and_explains_itself(name):
    recipe = load_recipe(name)
    assert (recipe.kind, recipe.name, recipe.seed) == (name.split("/")[-1], name.replace("/", "-"), 0)
    text = packaged_recipes()[name].read_text()
    head = text.split("\n\n")[0]
    for part in ("First:", f"Launch:    rgbench train recipes/{name}.yaml", "Override:", "Then:      rgbench eval"):
        assert part in head
    override = next(line for line in head.splitlines() if "Override:" in line).split(".yaml", 1)[1].split()
    assert load_recipe(name, override) != recipe


FULL_SIZE = {
    "sd21/lcd": "lcd",
    "sd21/rg_lcd": "rg_lcd",
    "sd21/lrm": "lrm",
    "sd21/lrm_pretrain": "lrm_pretrain",
    "sd21/tcd": "tcd",
    "sd21/mlcm": "mlcm",
    "sd21/dollar": "dollar",
    "sd15/lcd_lora": "lcd",
    "sdxl/lcd_lora": "lcd",
    "sd35/lcd_lora": "lcd",
    "flux/lcd_lora": "lcd",
}
OF_1024 = ("sdxl/", "sd35/", "flux/")


def test_all_full_size_recipes_are_listed():
    assert {name for name in packaged_recipes() if name.startswith(("sd15/", "sd21/", *OF_1024))} == FULL_SIZE.keys()


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_a_full_size_recipe_validates_and_explains_itself(name):
    recipe = load_recipe(name)
    assert (recipe.kind, recipe.name) == (FULL_SIZE[name], name.replace("/", "-"))
    side = 1024 if name.startswith(OF_1024) else 512
    assert recipe.model.find("model").resolution == recipe.data.resolution == side  # type: ignore[union-attr]
    head, *rest = packaged_recipes()[name].read_text().split("\n\n")
    for part in ("First:", f"Launch:    rgbench train recipes/{name}.yaml", "Override:", "Then:"):
        assert part in head
    override = next(line for line in head.splitlines() if "Override:" in line).split(".yaml", 1)[1].split()
    assert load_recipe(name, override) != recipe
    unexplained = [line for line in "\n".join(rest).splitlines() if line.startswith("  ") and "#" not in line]
    assert len(unexplained) < 14, unexplained


def test_full_size_recipes_are_the_papers_defaults():
    """Every key that the recipes for SD2.1 say is the default of the method, which docs/method.md lists."""
    for name in ("sd21/lcd", "sd21/rg_lcd", "sd21/lrm"):
        recipe = load_recipe(name)
        how = {"dtype": "float32", "gradient_checkpointing": False, "num_workers": 0}  # it computes, not what
        assert recipe.train.model_copy(update=how) == TrainSection()
        assert recipe.lcd == LCDSection() and recipe.lora is None
        assert recipe.sampling == type(recipe.sampling)()
    lrm = load_recipe("sd21/lrm")
    assert lrm.guidance.scale == 1.0 and lrm.reward.antialias is True  # type: ignore[attr-defined]
    assert lrm.proxy == type(lrm.proxy)(path=lrm.proxy.path)  # type: ignore[attr-defined]


def test_the_three_differ_in_their_method_alone():
    recipes = [load_recipe(name) for name in OF_ONE_METHOD]
    for section in ("model", "data", "train", "lcd", "sampling"):
        first, *others = [getattr(recipe, section) for recipe in recipes]
        assert all(other == first for other in others), section
    assert load_recipe(OF_FLOW).train == load_recipe("lcd").train
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
    code = "import sys; from rgbench.train.recipe import load_recipe; load_recipe('lrm')"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_training_without_a_reward_imports_no_reward_library():
    """They take seconds; a single process needs accelerate no more than diffusers does."""
    code = "import sys, rgbench.train.train, rgbench.train.lcd; from rgbench.train.log import CaptionCount"
    code += "; print(*[m for m in ('open_clip', 'timm', 'datasets', 'wandb', 'torch.distributed.launcher') "
    code += "if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=600, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(("recipe", "setting"), [("rg_lcd", "gradients.every=10"), ("lrm", "proxy.fidelity.every=10")])
def test_gradients_without_a_loss_scale_are_not_taken_in_float16(recipe, setting):
    load_recipe(recipe, [setting, "train.dtype=bfloat16"])
    with pytest.raises(
        ConfigError, match=f"{setting.partition('=')[0]}: takes gradients that float16 may round to zero"
    ):
        load_recipe(recipe, [setting, "train.dtype=float16"])


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("lcd", "train.dtype=float16"),
        ("lcd", "train.compile=true"),
        ("rg_lcd", "gradients.every=10"),
        ("lrm_pretrain", "seed=1"),
    ],
)
def test_what_does_not_go_with_shards_is_said(name, setting):
    load_recipe(name, [setting])
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, [setting, "train.shard=true"])
    for key in ("shard", *([] if name == "lrm_pretrain" else [setting.partition("=")[0].rpartition(".")[2]])):
        assert key in str(caught.value)


def test_another_teacher_data_or_strength_takes_one_override():
    recipe = load_recipe(
        "rg_lcd",
        ["model.path=mine", "data.kind=image_folder", "data.path=images", "data.resolution=64", "guidance.scale=2.0"],
    )
    assert (recipe.model.path, recipe.model.preset) == ("mine", None)
    assert (recipe.data.kind, recipe.data.path) == ("image_folder", "images")
    assert (recipe.guidance.scale, recipe.guidance.share) == (2.0, None)
    assert load_recipe("rg_lcd", ["guidance.share=0.6"]).guidance.scale is None
    with pytest.raises(
        ConfigError, match=r"data\.path: unknown key 'path'; set kind to one that has it \(.*image_folder"
    ):
        load_recipe("rg_lcd", ["data.path=images"])
    with pytest.raises(ConfigError, match="command line:data.resolution: missing"):
        load_recipe("sd21/lcd", ["data.kind=image_folder", "data.path=images"])
