"""SDXL, SD3 and FLUX teachers through lcd, rg_lcd and lrm: golden steps, nesting, resume, export, refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors.torch import load_file
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.launch import Ranks
from rgbench.core.run import RunDirectory
from rgbench.models.generic import CallOptions, load_generic
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.train.cache import cache
from rgbench.train.lcd import LCD
from rgbench.train.recipe import load_recipe
from rgbench.train.train import build_loop, train
from tests import families, sd_folders
from tests.parity import tiny
from tests.resume.test_families import generators
from tests.tiny_trainers import assert_equal, batch, loop, make, state

TEACHERS = ("sdxl", "sd3", "flux", "schnell")
TOLD = ("sdxl", "flux")  # whose students are told w
SIDE = 16  # of the images, latents 8
LORA = {"rank": 2, "alpha": 4.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Teachers, a reward and images on disk."""
    root = tmp_path_factory.mktemp("teachers")
    for name in TEACHERS:
        families.save(name, root / name)
    return sd_folders.save_parts(root)


def models_of(parts: Path, name: str, dtype: torch.dtype = torch.float32) -> DiffusionModels:
    return load_models(parts / name, "cpu", dtype, SIDE)


def sections(name: str) -> dict[str, Any]:
    return {"lcd": {"time_cond_proj_dim": 16 if name in TOLD else None}, "sampling": {"guidance_scale": 1.0}}


# ---- golden steps -----------------------------------------------------------------------


class Plain:
    """The step by hand: diffusers' own networks and prompts, one call each, the published formulae in float64."""

    def __init__(self, models: DiffusionModels, name: str) -> None:
        self.models, self.name, self.pipeline = models, name, models.pipeline
        self.flow = name != "sdxl"
        self.shift = {"sd3": 3.0, "schnell": 1.0}.get(name)
        if name == "flux":  # resolution-dependent: 16 tokens
            self.shift = math.exp(0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256))

    def path(self, t: int) -> tuple[float, float]:
        """α_t and σ_t."""
        if not self.flow:
            value = float(self.models.schedule[t])
            return value**0.5, (1 - value) ** 0.5
        u = (t + 1) / 1000
        sigma = 0.0 if t == 0 else self.shift * u / (1 + (self.shift - 1) * u)
        return 1 - sigma, sigma

    def call(self, network: Any, z: Tensor, t: int, prompt: str, told: float | None) -> Tensor:
        """The network's output for one latent (1, 4, 8, 8)."""
        if self.name == "sdxl":
            states, _, pooled, _ = self.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
            if prompt == "":
                states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
            extra = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).double()}
            w = None if told is None else self.embedded(told)
            return network(z, t, encoder_hidden_states=states, added_cond_kwargs=extra, timestep_cond=w).sample
        time = torch.tensor([1000 * self.path(t)[1]], dtype=torch.float64)
        if self.name == "sd3":
            states, _, pooled, _ = self.pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
            options = {"encoder_hidden_states": states, "pooled_projections": pooled}
            return network(hidden_states=z, timestep=time, **options).sample
        states, pooled, text_ids = self.pipeline.encode_prompt(prompt, None)
        tokens = FluxPipeline._pack_latents(z, 1, 4, 8, 8)
        output = network(
            hidden_states=tokens,
            timestep=time / 1000,
            guidance=None if told is None else torch.tensor([told + 1], dtype=torch.float64),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float64),
        ).sample
        return FluxPipeline._unpack_latents(output, 16, 16, 2)

    def embedded(self, w: float) -> Tensor:
        rates = torch.exp(-torch.arange(8, dtype=torch.float64) * torch.log(torch.tensor(1e4).double()) / 7)
        return torch.cat([torch.sin(1000 * w * rates), torch.cos(1000 * w * rates)])[None]

    def consistency(self, network: Any, z: Tensor, t: int, prompt: str, told: float | None) -> Tensor:
        alpha, sigma = self.path(t)
        output = self.call(network, z, t, prompt, told)
        if self.flow:
            return z - sigma * output
        x0, scaled = (z - sigma * output) / alpha, 10.0 * t
        return 0.25 / (scaled**2 + 0.25) * z + scaled / (scaled**2 + 0.25) ** 0.5 * x0

    def losses(self, trainer: LCD, inputs: Any, prompts: list[str]) -> Tensor:
        """Per-sample losses of the LCD step."""
        found = []
        for i, prompt in enumerate(prompts):
            t, w = 20 * (int(inputs.index[i]) + 1) - 1, float(inputs.guidance_scale[i])
            told, below = w if self.name in TOLD else None, max(t - 20, 0)
            (alpha, sigma), (alpha_n, sigma_n) = self.path(t), self.path(below)
            z = alpha * inputs.latents[i : i + 1] + sigma * inputs.noise[i : i + 1]
            prediction = self.consistency(trainer.student, z, t, prompt, told)
            with torch.no_grad():
                if self.name == "flux":  # guided by itself
                    guided = self.call(self.models.unet, z, t, prompt, w)
                else:
                    cond, uncond = (self.call(self.models.unet, z, t, text, None) for text in (prompt, ""))
                    guided = cond + w * (cond - uncond)
                if self.flow:
                    z_n = z + (sigma_n - sigma) * guided
                else:
                    z_n = alpha_n * (z - sigma * guided) / alpha + sigma_n * guided
                target = self.consistency(trainer.target, z_n, below, prompt, told)
            found.append((((prediction - target) ** 2 + 0.001**2).sqrt() - 0.001).mean())
        return torch.stack(found)


@pytest.mark.parametrize("name", TEACHERS)
def test_a_step_is_the_plain_steps(parts, name):
    models = models_of(parts, name, torch.float64)
    trainer = make("lcd", models, **sections(name))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for network in (trainer.student, trainer.target):
            for parameter in network.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    given, draws = batch(), tiny.draws(dtype=torch.float64)
    inputs = trainer.prepare(given, draws)
    encoded = models.vae.encode(given.images_BCHW.double() * 2 - 1).latent_dist
    noise = tiny.draws(dtype=torch.float64).normal("vae", (4, 8, 8))
    shift = models.vae.config.shift_factor or 0.0
    wanted = (encoded.mean + encoded.std * noise - shift) * models.vae.config.scaling_factor
    assert (inputs.latents - wanted).abs().max() <= 1e-12
    ours = trainer.step(given, draws).losses["student"]["lcd"]
    theirs = Plain(models, name).losses(trainer, inputs, given.prompts)
    assert (ours - theirs).abs().max() <= 1e-10 and ours.min() > 1e-3
    gradients = [
        torch.autograd.grad(losses.mean(), list(trainer.student.parameters()), allow_unused=True)
        for losses in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or (a - b).abs().max() <= 1e-10


# ---- nesting and resume -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_without_its_reward_it_is_lcd(parts, tmp_path, name):
    models, own = models_of(parts, name), sections(name)
    plain, guided = make("lcd", models, **own), make("rg_lcd", models, guidance={"scale": 0.0}, **own)
    teacher = state(models.unet)
    for trainer in (plain, guided):
        running = loop(trainer, tmp_path)
        for _ in range(3):
            running.train_step()
    assert_equal(state(plain.student), state(guided.student))
    assert_equal(state(plain.target), state(guided.target))
    assert_equal(state(models.unet), teacher)
    assert not torch.equal(*(next(iter(network.parameters())) for network in (plain.student, models.unet)))


@pytest.mark.parametrize(
    ("kind", "name", "lora"), [("lrm", "sd3", None), ("lcd", "flux", LORA), ("rg_lcd", "sdxl", None)]
)
def test_a_run_goes_on_as_if_it_had_not_stopped(parts, tmp_path, kind, name, lora):
    def running(folder: Path):
        trainer = make(kind, models_of(parts, name), lora=lora, **sections(name))
        own = loop(trainer, folder)
        own.run.create({}, {})
        return own

    straight, stopped = running(tmp_path / "straight"), running(tmp_path / "stopped")
    for _ in range(3):
        straight.train_step()
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    resumed = running(tmp_path / "stopped")
    resumed.restore()
    assert resumed.step == 2
    resumed.train_step()
    for stem, module in straight.trainer.modules().items():
        assert_equal(module.state_dict(), resumed.trainer.modules()[stem].state_dict())


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_run_reads_what_was_cached(parts, tmp_path, name):
    """Pooled states and shifted latents come back from the cache as they are computed."""
    settings = {"train": {"latents_cache_root": str(tmp_path / "cache")}}
    file = str(write_recipe(parts, tmp_path, "lcd", name, settings))
    cache(file, [])
    steps = []
    for wanted in ("never", "always"):
        recipe = load_recipe(file, [f"train.latents_cache={wanted}"])
        running, _ = build_loop(recipe, RunDirectory(tmp_path / wanted), Ranks())
        assert (running.load_batch(0).encoded is not None) == (wanted == "always")
        steps.append(running.train_step()["loss/lcd"])
    assert steps[0] == pytest.approx(steps[1], rel=1e-4) and steps[0] > 1e-3


# ---- from a recipe to plain diffusers ---------------------------------------------------


def write_recipe(parts: Path, folder: Path, kind: str, name: str, changes: dict[str, Any]) -> Path:
    told = name in TOLD
    values: dict[str, Any] = {
        "kind": kind,
        "name": f"{kind}-{name}",
        "model": {"path": str(parts / name), "resolution": 32},
        "data": {"kind": "image_folder", "path": str(parts / "images"), "resolution": 32},
        "train": {"steps": 1, "batch_size": 2, "lr": 0.01, "sample_every": 0},
        "lcd": {"time_cond_proj_dim": 16 if told else None, "num_ddim_timesteps": 50},
        "sampling": {"steps": 2, "guidance_scale": 4.0 if told else 1.0},
    }
    if kind != "lcd":
        values["reward"] = {"kind": "hps", "path": str(parts / "reward"), "antialias": True}
    if kind == "lrm":
        values["proxy"] = {"small": {"width": 16}, "loss": "regression"}
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    file = folder / f"{kind}-{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def call(pipeline: Any, guidance: float, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": guidance, "height": 32, "width": 32, **options}
    return pipeline(tiny.PROMPTS[:2], generator=generators(2), output_type="pt", **given).images


@pytest.mark.parametrize(
    ("kind", "name", "lora"),
    [
        ("lrm", "sdxl", None),
        ("lcd", "sdxl", LORA),
        ("lcd", "sd3", None),
        ("rg_lcd", "sd3", LORA),
        ("lrm", "flux", None),
    ],
)
def test_one_step_from_recipe_to_plain_diffusers(parts, tmp_path, monkeypatch, kind, name, lora):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.open(train(str(write_recipe(parts, tmp_path, kind, name, {"lora": lora})), []))
    card, guidance = (run.pipeline / "README.md").read_text(), run.read()["sampling"]["guidance_scale"]
    assert run.read()["teacher"]["sha256"] in card and ("**in-sample**" in card) == (kind != "lcd")
    assert "height=32, width=32" in card and ("sigmas=[1.0, 0.5]" in card) == (name != "sdxl")
    pipeline: Any = DiffusionPipeline.from_pretrained(run.pipeline)
    teacher: Any = DiffusionPipeline.from_pretrained(parts / name)
    assert type(pipeline) is type(teacher)
    models = load_models(run.pipeline, "cpu", torch.float32, 32)
    assert models.sampler == "lcm" and models.original_inference_steps == 50
    ours = models.sample(tiny.PROMPTS[:2], generators(2), num_steps=2, guidance_scale=guidance)
    # as `rgbench sample` and `rgbench eval` call it, each image with its own generator
    called = load_generic(run.pipeline, "cpu", torch.float32, CallOptions({"height": 32, "width": 32}))
    theirs = called.sample(tiny.PROMPTS[:2], generators(2), num_steps=2, guidance_scale=guidance)
    assert (ours - theirs).abs().max() <= 1e-5
    if name == "sdxl":
        theirs = call(pipeline, guidance)
    else:  # whose pipelines give a sampler's noise no generator: one that draws none
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        theirs = call(pipeline, guidance, sigmas=[1.0, 0.5])
        ours = replace(models, sampler="euler").sample(
            tiny.PROMPTS[:2], generators(2), num_steps=2, guidance_scale=guidance
        )
    assert (ours - theirs).abs().max() <= 1e-5
    assert (
        ours - called.sample(tiny.PROMPTS[1:3], generators(2), num_steps=2, guidance_scale=guidance)
    ).abs().max() > 1e-3
    if lora:
        check_lora(run, parts / name, guidance, theirs)


def check_lora(run: RunDirectory, teacher: Path, guidance: float, expected: Tensor) -> None:
    """The adapters' own card, followed to the letter, gives the same images on top of the teacher."""
    lora = str(run.pipeline / "lora")
    card = (run.pipeline / "lora" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace("path/to/the/teacher", str(teacher))
    code = code.rsplit("image = ", 1)[0].replace('load_file("', f'load_file("{lora}/')
    names: dict[str, Any] = {}
    exec(code.replace('load_lora_weights(".")', f'load_lora_weights("{lora}")'), names)  # noqa: S102  (our own card)
    pipeline = names["pipeline"]
    options = {}
    if hasattr(pipeline, "transformer"):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
        options = {"sigmas": [1.0, 0.5]}
    assert (call(pipeline, guidance, **options) - expected).abs().max() <= 1e-3
    network = getattr(pipeline, "transformer", None) or pipeline.unet
    loaded = {name for name, _ in network.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(load_file(f"{lora}/pytorch_lora_weights.safetensors")), "adapters were left out"


# ---- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd3", {"lcd": {"time_cond_proj_dim": 256}}, "cannot be told its guidance; give null"),
        ("flux", {"lcd": {"time_cond_proj_dim": None}, "sampling": {"guidance_scale": 1.0}}, "is told its guidance"),
        ("sd3", {"train": {"dtype": "float16"}}, "T5 and this transformer overflow in it; use bfloat16"),
        ("sdxl", {"train": {"dtype": "float16"}}, "force_upcast.*madebyollin/sdxl-vae-fp16-fix"),
        ("sd3", {"lcd": {"num_ddim_timesteps": 1000}}, "num_ddim_timesteps 1000.*use 500 at most"),
        ("sd3", {"kind": "tcd"}, "kind tcd: is not trained along a flow; use one of lcd, rg_lcd, lrm"),
        ("flux", {"model": {"resolution": 30}}, "makes no images of 30 px; use a multiple of 4"),
    ],
)
def test_what_a_teacher_cannot_do_is_refused(parts, tmp_path, name, changes, message):
    recipe = load_recipe(str(write_recipe(parts, tmp_path, "lcd", name, changes)))
    with pytest.raises(UsageError, match=message):
        build_loop(recipe, RunDirectory(tmp_path / "run"), Ranks())


def test_a_fill_transformer_is_no_teacher(parts, tmp_path):
    copied = shutil.copytree(parts / "flux", tmp_path / "fill")
    file = copied / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"in_channels": 96}))
    with pytest.raises(UsageError, match="in_channels 96, the VAE's latents have 4: not a text-to-image model"):
        load_models(copied, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("FluxInpaintPipeline", "a FluxInpaintPipeline, which is not trained here; give a text-to-image pipeline"),
        ("WanPipeline", "a WanPipeline, which is not trained here"),
        (None, "lacks text_encoder_2"),
    ],
)
def test_other_pipelines_are_refused(parts, tmp_path, pipeline, message):
    copied = shutil.copytree(parts / "flux", tmp_path / "flux")
    if pipeline is None:
        shutil.rmtree(copied / "text_encoder_2")
    else:
        index = copied / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": pipeline}))
    with pytest.raises(UsageError, match=message):
        load_models(copied, "cpu", torch.float32)


def test_bfloat16_trains_what_float16_may_not(parts, tmp_path):
    trainer = make("rg_lcd", models_of(parts, "sd3"), train={"dtype": "bfloat16"}, **sections("sd3"))
    values = loop(trainer, tmp_path).train_step()
    assert all(torch.isfinite(torch.tensor(value)) for value in values.values())
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
