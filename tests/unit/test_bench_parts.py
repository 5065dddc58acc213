"""Counting, timing by part, and the random full-size layouts at tiny width."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from rgbench.core.errors import UsageError
from rgbench.train.recipe import load_recipe
from tools.bench import api, document
from tools.bench.clock import Clock, Spread, alternate, ratio
from tools.bench.counting import Product, count
from tools.bench.machine import Machine, describe
from tools.bench.parts import time_parts
from tools.bench.random_models import HeldImages, Shape, random_expert, random_models, random_proxy
from tools.bench.subject import make_subject, random_trainer
from tools.bench.train_step import CACHED, OURS, PLAIN, Contenders, measure

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TINY = Shape(
    unet={
        "sample_size": 8,
        "block_out_channels": (8, 8),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": [1, 2],
        "use_linear_projection": True,
    },
    vae={
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.18215,
    },
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
    },
    clip={
        "embed_dim": 12,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": TEXT,
    },
    proxy={"image_size": 8, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8},
)
CPU = torch.device("cpu")
SMALL = Machine(CPU, "float32", square=64, copy_bytes=1 << 16, product_sec=1e-5)


def test_matrix_products_are_counted_as_written_down():
    linear, attention = nn.Linear(5, 7), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(2, 4, 8)
    # forward 2·3·5·7; backward the same for the input and again for the weight
    assert count(lambda: linear(x).sum().backward()).flops == 3 * (2 * 3 * 5 * 7)
    with torch.no_grad():  # where evaluation mode would fuse everything into one operator without a formula
        found = count(lambda: attention(y, y, y, need_weights=False)).flops
    projections, scores = 4 * (2 * 8 * 8 * 8), 2 * (2 * 2 * 2 * 4 * 4 * 4)
    assert found == projections + scores
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_convolution_is_the_product_it_implies():
    conv = nn.Conv2d(6, 10, 3, padding=1, bias=False)
    counted = count(lambda: conv(torch.zeros(2, 6, 4, 5)))
    assert counted.products == {Product(1, 2 * 4 * 5, 6 * 9, 10): 1}
    assert counted.flops == Product(1, 40, 54, 10).flops
    assert counted.heaviest(0.9) == [(Product(1, 40, 54, 10), 1.0)]


def test_bytes_are_inputs_and_outputs_once_each():
    a, b = torch.zeros(100), torch.zeros(100)
    assert count(lambda: a + b).bytes == 3 * 400
    assert count(lambda: a + a).bytes == 2 * 400
    assert count(lambda: a.add_(b)).bytes == 2 * 400
    assert count(lambda: a.view(10, 10)).bytes == 0


def test_contenders_take_turns():
    order: list[str] = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, Clock(CPU))
    assert "".join(order) == "ab" + "ababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_pair_by_pair():
    found = ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0])
    assert found.median == 2.0 and found.low <= 2.0 <= found.high and found.high <= 4.0 and found.num == 3
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0, 1)


def test_the_machines_rates_are_positive_and_bounded():
    for rate in (SMALL.large_rate(), SMALL.copy_rate(), SMALL.product_rate(Product(4, 8, 8, 8))):
        assert 1e3 < rate < 1e15
    assert describe(CPU)["device_type"] == "cpu" and describe(CPU)["threads"] >= 1


def subject(method: str, folder, **train):
    overrides = ["train.batch_size=2", "train.dtype=float32", "lcd.time_cond_proj_dim=16"]
    overrides += [f"train.{key}={value}" for key, value in train.items()]
    if method == "lrm":
        overrides += ["proxy.trainable.text_layers=1"]
    recipe = load_recipe(f"sd21/{method}", [*overrides, "train.gradient_checkpointing=false", "train.num_workers=0"])
    torch.manual_seed(0)
    trainer = random_trainer(TINY, recipe, CPU)
    return make_subject(method, trainer, HeldImages(TINY.side, 4), folder, "random")


@pytest.mark.parametrize("method", [pytest.param("lcd", marks=pytest.mark.long), "rg_lcd", "lrm"])
def test_a_step_is_measured(method, tmp_path):
    found = subject(method, tmp_path)
    row = measure(found, SMALL, rounds=1)
    json.dumps(row, allow_nan=False)
    assert set(row["steps"]) == {PLAIN, OURS, CACHED}
    plain, ours, cached = (row["steps"][name] for name in (PLAIN, OURS, CACHED))
    assert ours["flops"] < plain["flops"] and cached["flops"] < ours["flops"]
    assert ours["operators"] < plain["operators"] and row["ratio_to_plain"][OURS]["median"] > 0
    expected = {
        "data",
        "draws",
        "encode",
        "text",
        "teacher",
        "student",
        "student backward",
        "target",
        "optimiser",
        "ema",
    }
    expected |= {"rg_lcd": {"decode", "decode backward", "reward", "reward backward"}}.get(method, set())
    expected |= {"lrm": {"decode", "reward", "proxy", "proxy backward"}}.get(method, set())
    assert expected <= set(row["parts"]), expected - set(row["parts"])
    assert ("decode backward" in row["parts"]) == (method == "rg_lcd")
    assert all(seconds >= 0 for seconds in row["parts"].values())


class Ticking(Clock):
    """One second from each stamp to the next, whatever else the machine does."""

    now = 0

    def stamp(self) -> float:
        self.now += 1
        return self.now


def test_parts_add_up_and_leave_nothing_behind(tmp_path):
    found = subject("rg_lcd", tmp_path)
    found.loop.train_step()
    before = dict(vars(found.trainer)), found.trainer.expert
    clock = Ticking(CPU)
    parts = time_parts(found.loop, clock)
    assert sum(parts.values()) == clock.now - 1 >= len(parts), "every instant from the first stamp to the last"
    assert (dict(vars(found.trainer)), found.trainer.expert) == before
    assert not found.trainer.student._forward_hooks and not found.trainer.models.vae.decoder._forward_hooks
    assert "backward" not in vars(found.loop.updater)


def test_low_memory_settings_are_off_in_the_plain_step(tmp_path):
    """The plain step is the same whatever the recipe switches on in the networks that both use."""
    usual = subject("lcd", tmp_path)
    train = usual.trainer.recipe.train.model_copy(update={"gradient_checkpointing": True})
    recipe = usual.trainer.recipe.model_copy(update={"train": train})
    before = {name: count(step).flops for name, step in Contenders(usual).work().items()}
    usual.trainer.recipe = recipe
    saving = make_subject("lcd", usual.trainer, usual.source, tmp_path, "random")
    after = {name: count(step).flops for name, step in Contenders(saving).work().items()}
    assert after[PLAIN] == before[PLAIN] and after[OURS] > before[OURS]


def test_random_parts_read_each_other():
    models, expert, proxy = random_models(TINY, CPU), random_expert(TINY, CPU), random_proxy(TINY, CPU)
    images = models.decode(torch.randn(2, *models.latent_shape))
    assert images.shape == (2, 3, TINY.side, TINY.side)
    assert expert(images, ["a", "b"]).shape == (2,)
    proxy.check_fits(models.latent_shape, models.scaling_factor, "random")
    assert models.encode_prompts(["a red circle"]).shape == (1, 77, 16)
    tokens = models.tokenizer(["A red circle"], padding="max_length", max_length=77)["input_ids"][0]
    assert tokens[:5] == [49406, 320, 736, 7117, 49407] and set(tokens[5:]) == {0}


def test_result_files_name_what_made_them(tmp_path):
    file = api.save(tmp_path, ["rgbench", "bench", "x"], "cpu", "low", {"what": "train-step", "preset": "benchtop"})
    assert file.name == "train-step-benchtop-cpu-low.json"
    kept = document.read_all(tmp_path)["train-step-benchtop-cpu-low"]
    assert kept["command"] == "rgbench bench x" and kept["machine"]["versions"]["torch"] == torch.__version__
    file.write_text('{"schema_version": 99}')
    with pytest.raises(UsageError, match="schema version 99"):
        document.read_all(tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="did you mean 'benchtop'"):
        api.train_step(preset="benchtp", methods=["lcd"], device="cpu", overrides=[], rounds=1, say=print)
    with pytest.raises(UsageError, match="--method"):
        api.train_step(preset="benchtop", methods=["ldc"], device="cpu", overrides=[], rounds=1, say=print)
