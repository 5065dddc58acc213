"""Several noise seeds of each prompt, and other floating types: more images, the same rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rgbench.core.errors import UsageError
from rgbench.data.prompts import benchtop_prompts
from rgbench.evaluate.config import parse_seeds
from rgbench.evaluate.images import ImageStream, Sampling, noise_seed
from rgbench.evaluate.results import load_results
from rgbench.metrics.statistics import cluster_groups
from rgbench.models.pipeline import load_models
from tests.tiny_models import BENCHTOP, make_context, run_eval, save_run, stored_values


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    save_run(root / "rg_lcd-s0")
    return root


def measured(runs: Path, out: Path, metrics: list[str], **options) -> dict:
    given = {"num": 3, "runs": runs, "results": out, "batch_size": 4, "keep_images": 0}
    run_eval(["rg_lcd-s0"], metrics, **{**given, **options})
    return stored_values(out)


def test_each_seed_gives_the_images_that_it_gives_alone(runs, tmp_path):
    """Rows by prompt and seed; the protocol names prompts and seeds, and one seed's protocol is what it was."""
    whole = {"batch_size": 3}  # batches hold the same images then, which is when bytes are equal on every CPU
    both = measured(runs, tmp_path / "both", ["hps"], seeds="0,5", save_images=True, **whole)["hps"]
    alone = {s: measured(runs, tmp_path / f"{s}", ["hps"], seeds=f"{s}", **whole)["hps"] for s in (0, 5)}
    rows = both.rows.by_image()
    assert len(rows) == both.num_images == 6
    assert rows == {**alone[0].rows.by_image(), **alone[5].rows.by_image()}
    assert all(rows[name, 0] != rows[name, 5] for name, _ in rows), "other noise, another image"
    assert both.protocol.fields["seeds"] == [0, 5]
    assert both.protocol.fields["prompts"] == alone[0].protocol.fields["prompts"]
    assert both.protocol.id != alone[0].protocol.id != alone[5].protocol.id
    (result,), (one,) = load_results(tmp_path / "both"), load_results(tmp_path / "0")
    assert result.head.generation == one.head.generation
    kept = json.loads((result.folder / "images" / "index.json").read_text())
    assert {(entry["prompt_id"], entry["seed"]) for entry in kept} == set(rows)


def test_eight_seeds_are_enough_for_diversity(runs, tmp_path):
    found = measured(runs, tmp_path, ["diversity"], num=2, seeds="0-7")["diversity"]
    assert found.extra["num_prompts"] == 2 and found.protocol.fields["images_per_prompt"] == 8


def test_the_prompt_is_the_unit_of_intervals(tmp_path):
    """Eight copies of one image per prompt hold no more evidence than one."""
    prompts = benchtop_prompts(40)
    one, many = (make_context(prompts.with_seeds(range(num)), tmp_path) for num in (1, 8))
    rows = np.random.default_rng(0).normal(size=40)
    np.testing.assert_allclose(many.over_prompts(np.tile(rows, 8)), rows)
    groups = cluster_groups(many.clusters(320))
    assert np.array_equal(groups, np.tile(cluster_groups(one.clusters(40)), 8)) and len(np.unique(groups)) == 20


@pytest.fixture(scope="module")
def full(runs, tmp_path_factory) -> dict:
    """Values of float32."""
    return measured(runs, tmp_path_factory.mktemp("full"), ["colour", "kid"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_another_generation_of_nearly_the_same_images(runs, tmp_path, full, dtype):
    half = measured(runs, tmp_path, ["colour", "kid"], dtype=dtype)
    (result,) = load_results(tmp_path)
    assert result.head.generation.fields["dtype"] == dtype and f"--dtype {dtype}" in result.runs[0].command
    assert {name: value.protocol.id for name, value in half.items()} == {n: v.protocol.id for n, v in full.items()}
    assert half["saturation"].value == pytest.approx(full["saturation"].value, abs=5)
    assert half["kd_efflite0"].value == pytest.approx(full["kd_efflite0"].value, rel=0.1)


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float16, 0.2), (torch.bfloat16, 2.0)])
def test_half_types_move_images_by_their_rounding_alone(dtype, levels):
    """Mean difference from float32 in 8-bit levels, of the benchtop's teacher."""
    folder, prompts = BENCHTOP.teacher_folder(), benchtop_prompts(2).prompts
    found = []
    for chosen in (torch.float32, dtype):
        stream = ImageStream(load_models(folder, "cpu", chosen), prompts, Sampling("ddim", 4, 3.0), 2)
        found.append(next(iter(stream)).images.float())
    difference = (found[0] - found[1]).abs()
    assert 0 < difference.mean() < levels and difference.max() < 40 * levels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_types_images_are_rounded_once(runs, dtype):
    """× 255 in bfloat16 would round to eight bits before it rounds to levels; diffusers widens first."""
    models = load_models(runs / "rg_lcd-s0" / "pipeline", "cpu", dtype)
    prompts = benchtop_prompts(4).prompts
    images = next(iter(ImageStream(models, prompts, Sampling("lcm", 2, 5.0), 4))).images
    generators = [torch.Generator().manual_seed(noise_seed(prompt.id, 0)) for prompt in prompts]
    with torch.inference_mode():
        made = models.sample([prompt.text for prompt in prompts], generators, num_steps=2, guidance_scale=5.0)
    assert made.dtype == dtype and torch.equal(images, (made.float() * 255).round().byte())


def test_prompts_and_seeds_are_told_apart():
    prompts = benchtop_prompts(3)
    several = prompts.with_seeds([4, 2])
    assert (len(several), several.num_distinct, several.seeds) == (6, 3, [4, 2])
    assert several.sha256 == prompts.sha256 and several.describe().startswith("benchtop: 3 prompts × 2 seeds, sha256")
    assert prompts.describe().startswith("benchtop: 3 prompts, sha256")


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("0,1,7", [0, 1, 7]), ("2-4, 9", [2, 3, 4, 9])])
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "1-2-3", "0,0", "5-2", "1.5"])
def test_other_seeds_are_refused(text):
    with pytest.raises(UsageError, match="--seeds"):
        parse_seeds(text)


def test_a_folder_of_images_has_one_image_of_each_prompt(runs, tmp_path):
    measured(runs, tmp_path / "made", ["hps"], save_images=True)
    (result,) = load_results(tmp_path / "made")
    with pytest.raises(UsageError, match="one image of each prompt; name one of its --seeds"):
        run_eval([str(result.folder / "images")], ["hps"], results=tmp_path / "r", seeds="0,1")
