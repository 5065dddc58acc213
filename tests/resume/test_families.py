"""SD1.5- and SD2.1-layout teachers through every trainer: a step, save, load, export, and plain diffusers after it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from rgbench.core.errors import UsageError
from rgbench.core.run import RunDirectory
from rgbench.data.sources import open_source
from rgbench.models.folder import config_hashes
from rgbench.models.pipeline import load_models
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.recipe import load_recipe
from rgbench.train.train import export_run, train
from tests import sd_folders
from tests.parity import tiny
from tests.tiny_trainers import SCORED, distillation_of

TEACHERS = {
    "sd15": ("sd15", "epsilon", {}),
    "sd15-fp16": ("sd15", "epsilon", {"variant": "fp16"}),
    "sd21-base": ("sd21", "epsilon", {"max_shard_size": "40KB"}),
    "sd21": ("sd21", "v_prediction", {}),
    "sample": ("sd21", "sample", {}),
}
LORA = {"rank": 2, "alpha": 4.0}
UNTOLD = {"lcd.time_cond_proj_dim": None, "sampling.guidance_scale": 1.0}  # as LCM-LoRA
TWO_SEGMENTS = {"mlcm.stages": [{"segments": 2}], "sampling.steps": 2}
CASES = [
    ("lcd", "sd15", {}),
    ("rg_lcd", "sd15-fp16", {"lora": LORA}),
    ("lrm", "sd21", {}),
    ("tcd", "sd21", {"sampling.gamma": 0.6}),
    ("rg_tcd", "sd15", {"lora": LORA}),
    ("mlcm", "sd15", {"lora": LORA, **UNTOLD, **TWO_SEGMENTS}),
    ("dollar", "sd15", {"lora": LORA, **UNTOLD, "vsd.ratio": 1, "vsd.lora": {**LORA}}),
    pytest.param("vsd", "sd21", {"vsd.ratio": 1, "vsd.w": None}, marks=pytest.mark.long),
    pytest.param("lrm_mlcm", "sd21", {**TWO_SEGMENTS}, marks=pytest.mark.long),
    pytest.param("lrm_tcd", "sd21-base", {"lora": LORA, **UNTOLD}, marks=pytest.mark.long),
    pytest.param("lcd", "sd21", {"lora": LORA, **UNTOLD}, marks=pytest.mark.long),
    pytest.param("rg_lcd", "sd21-base", {}, marks=pytest.mark.long),
    pytest.param("lrm", "sample", {"lora": LORA, **UNTOLD}, marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Teachers, a reward, a proxy and images on disk, as a user has them."""
    root = tmp_path_factory.mktemp("families")
    for name, (family, kind, options) in TEACHERS.items():
        sd_folders.save_teacher(root / name, family, kind, **options)
    return sd_folders.save_parts(root)


def generators(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(num)]


def images_of(pipeline: DiffusionPipeline, guidance: float, eta: str | None) -> torch.Tensor:
    """Images as the card says, with its ``eta``."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "pt"}
    options |= {} if eta is None else {"eta": float(eta)}
    return pipeline(tiny.PROMPTS[:2], generator=generators(2), **options).images


@pytest.mark.parametrize(("kind", "teacher", "changes"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_one_step_from_recipe_to_plain_diffusers(parts, tmp_path, monkeypatch, kind, teacher, changes):
    monkeypatch.chdir(tmp_path)
    faster = ["train.lr=0.03"] if "lora" in changes else []  # so that each adapter shows after one step
    path = train(str(sd_folders.write_recipe(parts, tmp_path, kind, teacher, changes)), faster)
    run = RunDirectory.open(path)
    saved = load_file(run.checkpoints / "step-00000001" / "student.safetensors")
    teacher_names = load_models(parts / teacher, "cpu", torch.float32).unet.state_dict().keys()
    if "lora" in changes:
        assert not saved.keys() & teacher_names, "a LoRA checkpoint holds none of the teacher's weights"
    else:
        assert saved.keys() - teacher_names == {"time_embedding.cond_proj.weight"}
    told = "lcd.time_cond_proj_dim" not in changes
    guidance = 4.0 if told else 1.5
    pipeline, card = DiffusionPipeline.from_pretrained(run.pipeline), (run.pipeline / "README.md").read_text()
    is_lcm = distillation_of(kind) in ("lcd", "vsd")
    assert isinstance(pipeline, LatentConsistencyModelPipeline if told and is_lcm else StableDiffusionPipeline)
    eta = next(iter(re.findall(r"\beta=([\d.]+)", card)), None)
    assert (eta is None) == is_lcm
    theirs = images_of(pipeline, guidance, eta)
    models = load_models(run.pipeline, "cpu", torch.float32)
    assert models.sampler == run.read()["sampling"]["sampler"]
    assert eta is None or models.gamma == float(eta), "the folder says it, without run.json"
    assert models.segments == (2 if "mlcm" in kind else None)
    ours = models.sample(tiny.PROMPTS[:2], generators(2), num_steps=2, guidance_scale=guidance)
    assert (ours - theirs).abs().max() <= 1e-5
    assert run.read()["teacher"]["sha256"] in card and kind in card
    assert ("**in-sample**" in card) == (kind in SCORED)
    if "lora" in changes:
        check_lora(run, parts / teacher, guidance, eta, theirs)


def check_lora(run: RunDirectory, teacher: Path, guidance: float, eta: str | None, expected: torch.Tensor) -> None:
    """The adapters' own card, followed to the letter, gives the same images on top of the teacher."""
    card = (run.pipeline / "lora" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace("path/to/the/teacher", str(teacher))
    code = code.rsplit("image = ", 1)[0]
    if (teacher / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists():
        code = code.replace(f'from_pretrained("{teacher}"', f'from_pretrained("{teacher}", variant="fp16"')
        code = code.replace(f'    "{teacher}"', f'    "{teacher}", variant="fp16"')
    lora = str(run.pipeline / "lora")
    code = code.replace('load_file("', f'load_file("{lora}/').replace(
        'load_lora_weights(".")', f'load_lora_weights("{lora}")'
    )
    names: dict = {}
    exec(code, names)  # noqa: S102  (our own card, which is what is tested)
    pipeline = names["pipeline"]
    assert (images_of(pipeline, guidance, eta) - expected).abs().max() <= 1e-3
    loaded = {name for name, _ in pipeline.unet.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(load_file(f"{lora}/pytorch_lora_weights.safetensors")), "adapters were left out"


def test_a_lora_run_goes_on_as_if_it_had_not_stopped(parts, tmp_path):
    file = sd_folders.write_recipe(parts, tmp_path, "lcd", "sd15", {"lora": LORA})
    recipe = load_recipe(str(file), ["train.steps=3"])

    def loop(folder: Path) -> Loop:
        trainer = LCD(recipe, load_models(parts / "sd15", "cpu", torch.float32))
        return Loop(trainer, open_source(recipe.data), recipe, RunDirectory(folder).create({}, {}))

    straight, stopped = loop(tmp_path / "straight"), loop(tmp_path / "stopped")
    for _ in range(3):
        straight.train_step()
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    resumed = loop(tmp_path / "stopped")
    resumed.restore()
    assert resumed.step == 2
    resumed.train_step()
    for stem, module in straight.trainer.modules().items():
        a, b = module.state_dict(), resumed.trainer.modules()[stem].state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), stem


def test_a_students_identity_does_not_depend_on_what_was_sampled(parts, tmp_path, monkeypatch):
    """A call leaves its padding in a fast tokenizer, and a tokenizer's file is part of what a generation is of."""
    monkeypatch.chdir(tmp_path)
    recipe = str(sd_folders.write_recipe(parts, tmp_path, "lcd", "sd15", {}))
    silent, sampled = (train(recipe, [f"train.sample_every={n}", f"name=every-{n}"]) for n in (0, 1))
    for path in (silent, sampled):
        assert config_hashes(path / "pipeline")["tokenizer"] == config_hashes(parts / "sd15")["tokenizer"]


def test_either_network_is_exported_on_demand(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = train(str(sd_folders.write_recipe(parts, tmp_path, "rg_lcd", "sd15", {})), [])
    folder = export_run(path, "student")
    assert folder.name == f"{path.name}-student" and "online (student)" in (folder / "README.md").read_text()
    exported = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_file(path / "checkpoints" / "step-00000001" / "student.safetensors")
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    with pytest.raises(UsageError, match=r"scheduler_config\.json: missing or not the file of .*rgbench\.sha256"):
        load_models(folder, "cpu", torch.float32)
    again = load_file(export_run(path, "target", tmp_path / "ema") / "unet" / "diffusion_pytorch_model.safetensors")
    usual = load_file(path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], usual[name]) for name in usual)
    with pytest.raises(UsageError, match="exists already"):
        export_run(path, "student")
    with pytest.raises(UsageError, match="not a run"):
        export_run(tmp_path / "none", "student")
