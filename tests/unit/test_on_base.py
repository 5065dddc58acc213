"""Students published as a UNet or a LoRA alone: the images of the whole pipeline, or what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rgbench.core.errors import UsageError
from rgbench.data.prompts import benchtop_prompts
from rgbench.evaluate.images import ImageStream, Sampling
from rgbench.evaluate.results import load_results
from rgbench.evaluate.targets import student_target
from rgbench.models.pipeline import load_models
from rgbench.models.student import Student, load_student
from tests.tiny_models import run_eval, save_pipeline

CPU = torch.device("cpu")
PROMPTS = benchtop_prompts(2).prompts
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    save_pipeline(root / "base", student=False)
    save_pipeline(root / "student", student=True)
    unet = UNet2DConditionModel.from_pretrained(root / "base" / "unet")
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(root / "lora", unet_lora_layers=layers)
    return root


def images(models, sampler: str) -> torch.Tensor:
    return torch.cat([batch.images for batch in ImageStream(models, PROMPTS, Sampling(sampler, 2, 5.0), 2)])


@pytest.mark.parametrize("part", ["student/unet", f"student/unet/{WEIGHTS}", "student"])
def test_a_unet_on_its_base_makes_the_images_of_the_whole_pipeline(shared, part):
    whole = load_models(shared / "student", "cpu", torch.float32)
    found = load_student(Student(str(shared / "base"), unet=shared / part), CPU, torch.float32)
    assert found.sampler == "lcm" and found.weights_sha256 != whole.weights_sha256
    assert torch.equal(images(found, "lcm"), images(whole, "lcm"))


@pytest.mark.parametrize("part", ["pipeline/unet", f"pipeline/unet/{WEIGHTS}", "pipeline", "unet", WEIGHTS, "."])
def test_a_students_name_is_its_own(tmp_path, part):
    path = tmp_path / "mine-v1.5" / part
    (path.parent if path.suffix == ".safetensors" else path).mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        path.touch()
    found = student_target("benchtop", path, None)
    assert (found.name, found.folder) == ("mine-v1.5", path.resolve())


def test_a_parts_configuration_is_part_of_what_it_is(shared, tmp_path):
    folder = shutil.copytree(shared / "base" / "unet", tmp_path / "mine")
    first = load_student(Student(str(shared / "base"), unet=folder), CPU, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-3}))
    second = load_student(Student(str(shared / "base"), unet=folder), CPU, torch.float32)
    assert first.weights_sha256 == second.weights_sha256 and first.config_sha256 != second.config_sha256
    assert not torch.equal(images(first, "ddim"), images(second, "ddim"))


def test_a_file_of_ones_own_names_the_student(tmp_path):
    (tmp_path / "my-lora.safetensors").touch()
    assert student_target("benchtop", None, tmp_path / "my-lora.safetensors").name == "my-lora"


def test_a_unet_without_guidance_embedding_keeps_the_bases_sampler(shared):
    found = load_student(Student(str(shared / "base"), unet=shared / "base" / "unet"), CPU, torch.float32)
    base = load_models(shared / "base", "cpu", torch.float32)
    assert found.sampler == "ddim" and torch.equal(images(found, "ddim"), images(base, "ddim"))


def test_a_lora_is_merged_and_sampled_as_an_lcm(shared):
    found = load_student(Student(str(shared / "base"), lora=shared / "lora"), CPU, torch.float32)
    assert (found.sampler, found.original_inference_steps, found.timestep_scaling) == ("lcm", 50, 10.0)
    base = load_file(shared / "base" / "unet" / WEIGHTS)
    changed = {name for name, value in found.unet.state_dict().items() if not torch.equal(value, base[name])}
    assert changed and all(name.endswith(("to_q.weight", "to_v.weight")) for name in changed)


def test_a_unet_in_half_precision_is_the_variant_of_a_folder(shared, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(shared / "base" / "unet")
    unet.half().save_pretrained(tmp_path / "half", variant="fp16")
    found = load_student(Student(str(shared / "base"), unet=tmp_path / "half"), CPU, torch.float32)
    assert found.dtype == torch.float32
    assert all(torch.equal(value, unet.state_dict()[name].float()) for name, value in found.unet.state_dict().items())


def test_the_training_grid_is_that_of_the_scheduler_beside_the_unet(shared, tmp_path):
    shutil.copytree(shared / "student", tmp_path / "student")
    file = tmp_path / "student" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"original_inference_steps": 50', '"original_inference_steps": 25'))
    for part in ("unet", f"unet/{WEIGHTS}", "."):
        found = load_student(Student(str(shared / "base"), unet=tmp_path / "student" / part), CPU, torch.float32)
        assert found.original_inference_steps == 25, part


def test_a_distilled_unet_without_embedding_is_sampled_as_asked(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"base": str(shared / "base"), "unet": shared / "base" / "unet", "guidance": 1.0, "steps": 2}
    for sampler in (None, "lcm"):
        run_eval([], ["kid"], num=2, keep_images=0, sampler=sampler, **options)
    found = {result.head.generation.fields["sampler"]: result for result in load_results(Path("results"))}
    assert set(found) == {"ddim", "lcm"} and found["ddim"].values[0].value != found["lcm"].values[0].value
    assert found["lcm"].head.cost["nfe"] == 2 and "--sampler lcm" in found["lcm"].runs[0].command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unet": "student/unet"}, "--unet and --lora need --base"),
        ({"base": "base"}, "--base takes one of --unet PATH and --lora PATH"),
        ({"base": "base", "unet": "student/unet", "lora": "lora"}, "--base takes one of"),
        ({"base": "nowhere", "unet": "student/unet"}, "'.*nowhere' is neither a folder nor a preset"),
        ({"base": "base", "unet": "absent"}, "absent: no such UNet"),
        (
            {"base": "base", "unet": "base/vae"},
            "vae.config.json: of class AutoencoderKL",
        ),
        (
            {"base": "base", "unet": "wide.safetensors"},
            "1 tensors are not .* 'conv_in.bias' is .17,., not .16",
        ),
        ({"base": "base", "unet": "twice.safetensors"}, "1 tensors occur with and without the prefix 'unet.'"),
        (
            {"base": "base", "unet": "embedding.safetensors"},
            "embedding.safetensors: 'time_embedding.cond_proj",
        ),
        ({"base": "base", "lora": "absent"}, "absent: no such LoRA"),
        ({"base": "base", "lora": "wide.safetensors"}, "wide.safetensors: "),
    ],
)
def test_parts_that_do_not_fit_are_named(shared, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    state = load_file(shared / "student" / "unet" / WEIGHTS)
    save_file({**state, "conv_in.bias": torch.zeros(17)}, shared / "wide.safetensors")
    save_file({**state, "unet.conv_in.bias": torch.zeros(16)}, shared / "twice.safetensors")
    save_file({**state, "time_embedding.cond_proj.weight": torch.zeros(5, 16)}, shared / "embedding.safetensors")
    given = {key: str(shared / value) if key == "base" else shared / value for key, value in options.items()}
    with pytest.raises(UsageError, match=message):
        run_eval([], ["hps"], num=1, guidance=5.0, **given)
    assert not load_results(Path("results"))


def test_a_student_is_a_target_like_others(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shared / "student" / "unet", "my-student/unet")
    options = {"base": str(shared / "base"), "unet": Path("my-student/unet"), "guidance": 5.0, "steps": 2}
    (found,) = run_eval([], ["kid"], num=2, keep_images=0, **options)
    assert (found.head.model, found.head.method, found.head.world) == ("my-student", "external", "benchtop")
    assert "--base" in found.runs[0].command and "--unet my-student/unet" in found.runs[0].command
