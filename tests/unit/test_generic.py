"""Pipelines of other families: diffusers' own images, every weight counted, LoRAs, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from rgbench.core.errors import UsageError
from rgbench.data.prompts import Prompt, benchtop_prompts
from rgbench.evaluate.config import EvalConfig
from rgbench.evaluate.evaluate import load_target, sample
from rgbench.evaluate.images import ImageStream, noise_seed, settle_sampling
from rgbench.evaluate.targets import resolve_targets, student_target
from rgbench.judge.measure_headroom import HeadroomOptions, measure_headroom
from rgbench.models.folder import check_pipeline
from rgbench.models.generic import CallOptions, GenericPipeline, load_generic, pipeline_class
from rgbench.models.presets import WEIGHTS
from tests import families, sd_folders
from tests.conftest import Cli
from tests.families import ARGUMENTS, FAMILIES
from tests.tiny_models import save_pipeline

PROMPTS = [replace(prompt, seed=seed) for seed in (0, 1) for prompt in benchtop_prompts(2).prompts]
STEPS = 2
SHORT = ("sdxl", "flux")
FAMILY = [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
GEOMETRY = {  # side, VAE stride, token: in pixels
    **{"sdxl": (32, 2, None), "sd3": (32, 2, 4), "flux": (32, 2, 4), "pixart": (32, 2, 4)},
    **{"sana": (32, 4, 4), "qwen": (32, 4, 8), "kandinsky": (32, 2, None)},
}
GUIDED = {"flux": 1}  # its guidance is an input of the network; all others are called for two rows of each image


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        if not (root / family).is_dir():
            families.save(family, root / family)
        return root / family

    return folder


def load(folder: Path, **options: Any) -> GenericPipeline:
    family = folder.name if folder.name in ARGUMENTS else "sdxl"
    options.setdefault("arguments", ARGUMENTS[family])
    return load_generic(folder, "cpu", torch.float32, CallOptions(**options))


def stream(
    models: GenericPipeline, prompts: list[Prompt] = PROMPTS, batch_size: int = 4, **settings: Any
) -> ImageStream:
    (target,) = resolve_targets([str(models.path)], Path("runs"))
    return ImageStream(
        models, prompts, settle_sampling(target, models, STEPS, **{"guidance": None, **settings}), batch_size
    )


def images(models: GenericPipeline, prompts: list[Prompt] = PROMPTS, batch_size: int = 4) -> torch.Tensor:
    return torch.cat([batch.images for batch in stream(models, prompts, batch_size)])


def by_diffusers(folder: Path, prompts: list[Prompt], arguments: dict[str, Any], **settings: Any) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder, **settings)
    pipeline.set_progress_bar_config(disable=True)
    texts = {key: [value] * len(prompts) for key, value in arguments.items() if key == "negative_prompt"}
    made = pipeline(
        prompt=[prompt.text for prompt in prompts],
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(noise_seed(prompt.id, prompt.seed)) for prompt in prompts],
        output_type="np",
        **arguments | texts,
    ).images
    return torch.from_numpy(made).permute(0, 3, 1, 2) * 255


@pytest.mark.parametrize("family", FAMILY)
def test_images_are_diffusers_own_whatever_their_company(folders, family):
    """At the pipeline's own guidance; to a level of 255 in batches of another size, to the byte in one of the same."""
    models = load(folders(family))
    assert (models.resolution, models.stride, models.token) == GEOMETRY[family]
    source, told = stream(models), []
    assert source.network_evaluations is None
    (batch,) = source.stream(np.arange(len(PROMPTS)), told.append)
    assert sum(told) == pytest.approx(len(PROMPTS)) and len(told) == STEPS
    assert source.network_evaluations == STEPS * GUIDED.get(family, 2)
    theirs = by_diffusers(folders(family), PROMPTS, ARGUMENTS[family])
    assert (batch.images.float() - theirs).abs().max() <= 0.5 + 255e-5
    assert len({image.numpy().tobytes() for image in batch.images}) == len(PROMPTS), "prompt and seed change it"
    turned = images(models, PROMPTS[::-1])
    assert torch.equal(turned.flip(0), batch.images)
    assert (images(models, PROMPTS[1:], 1).int() - batch.images[1:].int()).abs().max() <= 1
    assert set(source.generation.fields["pipeline_kwargs"]) >= set(ARGUMENTS[family])


def test_stable_diffusion_is_called_where_arguments_are_given(tmp_path):
    """Through its own scheduler, with a negative prompt, which rgbench's samplers do not have."""
    folder = sd_folders.save_teacher(tmp_path / "sd15", "sd15")
    config = EvalConfig(targets=[str(folder)], pipeline_kwargs=["negative_prompt=blurred", "guidance_rescale=0.5"])
    (target,) = resolve_targets(config.targets, Path("runs"))
    models = load_target(target, config, torch.device("cpu"))
    assert isinstance(models, GenericPipeline) and models.sampler == "PNDM"
    assert settle_sampling(target, models, None, None).guidance_scale == 3, "of 64 px: as the benchtop's teacher"
    sampling = settle_sampling(target, models, 4, 7.5)
    (batch,) = ImageStream(models, PROMPTS, sampling, 4)
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [prompt.text for prompt in PROMPTS],
        negative_prompt=["blurred"] * 4,
        guidance_rescale=0.5,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(noise_seed(prompt.id, prompt.seed)) for prompt in PROMPTS],
        output_type="np",
    ).images
    assert (batch.images.float() - torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255).abs().max() <= 0.5 + 255e-5
    assert not isinstance(load_target(target, EvalConfig(), torch.device("cpu")), GenericPipeline)
    run = replace(target, sampling={"steps": 3, "guidance_scale": 2.0})
    assert settle_sampling(run, models, None, None) == replace(sampling, steps=3, guidance_scale=2.0)


def test_a_scheduler_that_draws_noise_gets_that_of_the_images(folders):
    """FLUX' pipeline hands its scheduler no generator."""
    models = load(folders("flux"), sampler="lcm")
    assert models.sampler == "FlowMatchLCM"
    whole = images(models)
    assert (images(models, PROMPTS[2:], 1).int() - whole[2:].int()).abs().max() <= 1
    assert not torch.equal(whole, images(load(folders("flux"))))


def test_noise_outside_of_the_images_generators_is_refused(folders):
    models = load(folders("sdxl"))
    step = models.pipeline.scheduler.step
    models.pipeline.scheduler.step = lambda output, *rest, **more: step(torch.randn_like(output), *rest, **more)
    with pytest.raises(UsageError, match="EulerDiscrete draws noise outside of the images' generators.*--sampler"):
        images(models)


def test_all_weights_and_configurations_are_told_apart(folders, tmp_path):
    folder = shutil.copytree(folders("sdxl"), tmp_path / "sdxl")
    before = load(folder)
    assert before.weights_sha256 == load(folders("sdxl")).weights_sha256
    assert before.config_sha256 == load(folders("sdxl")).config_sha256, "wherever it lies"
    seen = {before.weights_sha256}
    for name, weights in check_pipeline(folder).items():
        (file,) = weights.files
        state = load_file(file)
        key = next(key for key, value in state.items() if value.is_floating_point())
        save_file(state | {key: state[key] + 1e-3}, file, {"format": "pt"})
        seen.add(load(folder).weights_sha256)
        assert name in ("unet", "vae", "text_encoder", "text_encoder_2")
    assert len(seen) == 5
    configs = {before.config_sha256}
    for name, change in [
        ("scheduler/scheduler_config.json", {"timestep_spacing": "trailing"}),
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("model_index.json", {"force_zeros_for_empty_prompt": False}),
        ("tokenizer_2/tokenizer_config.json", {"pad_token": "!"}),
    ]:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        configs.add(load(folder).config_sha256)
    assert len(configs) == 5


def index(folder: Path, **changes: Any) -> None:
    file = folder / "model_index.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def pickled(folder: Path) -> None:
    file = folder / "text_encoder_2" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))


def own_code(folder: Path) -> None:
    (folder / "unet" / "mine.py").write_text("raise SystemExit('ran')")
    index(folder, unet=["mine", "UNet"])


def auto_map(folder: Path) -> None:
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "x--modeling.Model"}}))


def own_tokenizer(folder: Path) -> None:
    """transformers would ask on standard input whether to run the file."""
    (folder / "tokenizer" / "own.py").write_text("raise SystemExit('ran')")
    index(folder, tokenizer=["transformers", "AutoTokenizer"])
    file = folder / "tokenizer" / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))


def half(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def fewer_tensors(folder: Path) -> None:
    file = folder / "text_encoder_2" / "model.safetensors"
    save_file(dict(list(load_file(file).items())[2:]), file, {"format": "pt"})


FOLDERS: list[tuple[Callable[[Path], Any], str]] = [
    (
        partial(index, _class_name="StableDiffusionXLInpaintPipeline"),
        "is an inpainting pipeline; give its text-to-image",
    ),
    (partial(index, _class_name="StableDiffusionXLImg2ImgPipeline"), "is an image-to-image pipeline"),
    (partial(index, _class_name="StableDiffusionXLControlNetPipeline"), "is a ControlNet pipeline"),
    (partial(index, _class_name="AnimateDiffSDXLPipeline"), "is a video pipeline"),
    (
        partial(index, _class_name="KandinskyV22Pipeline"),
        "is a decoder of image embeddings; give the combined pipeline",
    ),
    (partial(index, _class_name="DDPMPipeline"), "is a pipeline without prompts"),
    (partial(index, _class_name="NextYearsPipeline"), "has no pipeline 'NextYearsPipeline'; install a newer"),
    (partial(index, _class_name=["mine", "Pipeline"]), "code of a folder is not run"),
    (partial(index, vae=["os.path", "x"]), "'vae': .* names no class"),
    (
        lambda folder: shutil.rmtree(folder / "text_encoder_2"),
        "lacks text_encoder_2, which model_index.json names.*hf auth",
    ),
    (pickled, "pytorch_model.bin is a pickle, which is not opened"),
    (own_code, "unet is code of the folder, which is not run"),
    (auto_map, "text_encoder/config.json: auto_map asks for Python code"),
    (own_tokenizer, "tokenizer_config.json: auto_map asks for Python code"),
    (half, "unet/diffusion_pytorch_model.safetensors: not a readable safetensors file"),
    (partial(index, scheduler=[None, None]), "sdxl: has no scheduler; fetch or write the folder again"),
    (fewer_tensors, "text_encoder_2: 2 tensors missing from the files"),
]


@pytest.mark.parametrize(("spoil", "message"), FOLDERS, ids=[message[:24] for _, message in FOLDERS])
def test_folders_that_are_refused(folders, tmp_path, capfd, spoil, message):
    folder = shutil.copytree(folders("sdxl"), tmp_path / "sdxl")
    spoil(folder)
    with pytest.raises(UsageError, match=message):
        load(folder)
    assert capfd.readouterr() == ("", ""), "no library speaks"


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "sdxl",
            {"arguments": {"hieght": 32}},
            "hieght: StableDiffusionXLPipeline does not take it; did you mean 'height'",
        ),
        ("sdxl", {"arguments": {"num_inference_steps": 4}}, "num_inference_steps: is --steps; leave it out"),
        ("sdxl", {"arguments": {"denoising_end": 0.5}}, "denoising_end: leaves images unfinished; leave it out"),
        ("sdxl", {"arguments": {"kwargs": 1}}, "kwargs: StableDiffusionXLPipeline does not take it"),
        ("sdxl", {"arguments": {"self": 1}}, "self: StableDiffusionXLPipeline does not take it"),
        ("sdxl", {"arguments": {"prompt_2": list("abcd")}}, "prompt_2: give one text, which goes with every prompt"),
        ("sdxl", {"arguments": {"negative_prompt": ["a"]}}, "negative_prompt: give one text, which goes with every"),
        ("sdxl", {"arguments": {"timesteps": 999}}, "timesteps: give a list of numbers, one for each step"),
        ("sdxl", {"arguments": {"sigmas": []}}, "sigmas: give a list of numbers, one for each step"),
        ("sdxl", {"arguments": {"height": 32, "width": 64}}, "images of 32×64 pixels; name one side"),
        ("flux", {"arguments": {}, "sampler": "ddim"}, "--sampler ddim has no form for a flow-matching model; use lcm"),
        ("sdxl", {"offload": True}, "--offload: moves networks between a GPU and the CPU"),
    ],
)
def test_options_that_are_refused(folders, family, options, message):
    with pytest.raises(UsageError, match=message):
        load(folders(family), **options)


def test_a_scheduler_that_cannot_do_few_steps(folders, tmp_path):
    folder = shutil.copytree(folders("sdxl"), tmp_path / "sdxl")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "PNDMScheduler"}))
    index(folder, scheduler=["diffusers", "PNDMScheduler"])
    with pytest.raises(UsageError, match="with PNDM fails in 2 steps .*; try more --steps, another --sampler"):
        images(load(folder))
    assert len(images(load(folder, sampler="lcm"))) == len(PROMPTS)


def test_steps_are_as_many_as_the_arguments_list(folders):
    """The pipeline takes the list and passes over the number, which the result would tell of."""
    models = load(folders("flux"), arguments={**ARGUMENTS["flux"], "sigmas": [1.0, 0.7, 0.3]})
    assert models.settle("x", None, None)[0] == models.settle("x", 3, None)[0] == 3
    with pytest.raises(UsageError, match="x: 2 steps, but --pipeline-kwargs sigmas lists 3; give --steps 3"):
        models.settle("x", 2, None)


def test_guidance_needs_what_the_pipeline_needs(folders):
    """Qwen-Image is guided against a negative prompt alone, and says so in a log line."""
    sdxl = load(folders("sdxl"))
    assert sdxl.settle("x", None, None) == (50, 5.0) and sdxl.settle("x", 3, 2) == (3, 2.0)
    with pytest.raises(UsageError, match="guidance nan"):
        sdxl.settle("x", None, float("nan"))


@pytest.mark.long
def test_qwen_is_guided_against_a_negative_prompt_alone(folders):
    own = dict(ARGUMENTS["qwen"])
    assert load(folders("qwen"), arguments=own).settle("x", None, None) == (50, 4.0)
    models = load(folders("qwen"), arguments={key: value for key, value in own.items() if key != "negative_prompt"})
    assert models.settle("x", None, None) == (50, 1.0), "what its call does without one"
    with pytest.raises(UsageError, match="guided against a negative prompt only; add --pipeline-kwargs 'negative"):
        models.settle("x", None, 4.0)


def test_a_cleaner_of_captions_that_is_not_installed_is_off(folders, monkeypatch, caplog):
    from rgbench.models import generic

    kind = pipeline_class(folders("pixart"))
    monkeypatch.setattr(generic, "find_spec", lambda name: None)
    assert generic.settle_arguments(kind, {})["clean_caption"] is False and "bs4, ftfy" in caplog.text
    with pytest.raises(UsageError, match="clean_caption: needs bs4, ftfy"):
        generic.settle_arguments(kind, {"clean_caption": True})
    monkeypatch.setattr(generic, "find_spec", lambda name: name)
    assert generic.settle_arguments(kind, {})["clean_caption"] is True


# LoRA


def adapters(network: Any, layers: list[str], **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False, **options))
    return {key: value.clone() for key, value in get_peft_model_state_dict(network).items()}


def lora_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Random adapters of a pipeline's networks under peft's names."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = {"unet": ["to_q", "to_out.0"], "transformer": ["to_q", "to_k"], "text_encoder": ["q_proj"]}
    parts |= {"text_encoder_2": ["v_proj"]} if hasattr(pipeline, "unet") else {}
    return {
        part: adapters(getattr(pipeline, part), layers) for part, layers in parts.items() if hasattr(pipeline, part)
    }


def save_lora(place: Path, state: dict[str, torch.Tensor]) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, place)
    return place


def diffusers_names(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}


def kohya_names(parts: dict[str, dict[str, torch.Tensor]], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    out = {}
    for part, state in parts.items():
        for key, value in state.items():
            layer, _, end = key.partition(".lora_")
            stem = rename(prefix[part] + layer.removeprefix("text_model.").replace(".", "_"))
            out[f"{stem}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = value
            out[f"{stem}.alpha"] = torch.tensor(1.0)  # half of the rank
    return out


def sgm(name: str) -> str:
    """A layer of SDXL's UNet as its own code calls it: one residual block and one sampler in each level here."""
    pairs = {
        "down_blocks_1_attentions_0": "input_blocks_3_1",
        "up_blocks_0_attentions_0": "output_blocks_0_1",
        "up_blocks_0_attentions_1": "output_blocks_1_1",
        "mid_block_attentions_0": "middle_block_1",
    }
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


def merged_by_diffusers(folder: Path, file: Path, weight: float) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora(lora_scale=weight)
    pipeline.unload_lora_weights()
    return pipeline


def assert_merged(models: GenericPipeline, theirs: DiffusionPipeline, base: Path, parts: list[str]) -> None:
    plain = DiffusionPipeline.from_pretrained(base)
    for part in parts:
        ours, expected, before = (getattr(each, part).state_dict() for each in (models.pipeline, theirs, plain))
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-5)
        assert any(not torch.equal(value, before[name]) for name, value in ours.items()), part


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "kohya of the original blocks"])
def test_a_lora_on_sdxl_is_merged_as_diffusers_does(folders, tmp_path, layout):
    base, parts = folders("sdxl"), lora_of(folders("sdxl"))
    rename = sgm if "blocks" in layout else str
    state = diffusers_names(parts) if layout == "diffusers" else kohya_names(parts, rename)
    file = save_lora(tmp_path / "mine" / "pytorch_lora_weights.safetensors", state)
    models = load(base, lora=file, lora_weight=0.7)
    plain = save_lora(tmp_path / "plain" / "lora.safetensors", diffusers_names(parts))
    scale = (
        0.7 if layout == "diffusers" else 0.7 / 2
    )  # diffusers does not read Kohya's text encoders here; alpha halves
    assert_merged(models, merged_by_diffusers(base, plain, scale), base, list(parts))
    hashes = {load(base, lora=file, lora_weight=weight).weights_sha256 for weight in (0.7, 1.0)}
    assert models.weights_sha256 in hashes and len(hashes) == 2 and load(base).weights_sha256 not in hashes
    assert models.own_fields()["lora_weight"] == 0.7


def fused(parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Kohya's FLUX file: queries, keys and values are one layer of the original network."""
    torch.manual_seed(0)
    width = parts["transformer"]["transformer_blocks.0.attn.to_q.lora_B.weight"].shape[0]
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.randn(2, width), torch.randn(3 * width, 2)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_lora_on_flux_is_merged_as_diffusers_does(folders, tmp_path, layout):
    base, parts = folders("flux"), lora_of(folders("flux"))
    state = diffusers_names(parts) if layout == "diffusers" else fused(parts)
    file = save_lora(tmp_path / "mine" / "flux.safetensors", state)
    models = load(base, lora=file, lora_weight=1.5)
    assert_merged(models, merged_by_diffusers(base, file, 1.5), base, ["transformer"])


@pytest.mark.parametrize(
    "extra",
    [
        "lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.diff_b",
        "lora_unet_nobody_knows_this.lora_down.weight",
    ],
)
def test_a_lora_of_which_diffusers_drops_a_part_is_refused(folders, tmp_path, capfd, extra):
    """It says so at most in its log, which is off."""
    state = fused(lora_of(folders("flux"))) | {extra: torch.ones(2, 4)}
    file = save_lora(tmp_path / "flux.safetensors", state)
    capfd.readouterr()
    with pytest.raises(
        UsageError, match=r"flux\.safetensors: (diffusers reads a part of it alone|.* tensors are no LoRA)"
    ):
        load(folders("flux"), lora=file)
    assert capfd.readouterr() == ("", "")


def test_a_lora_of_peft_on_a_transformer(folders, tmp_path):
    base, state = folders("flux"), lora_of(folders("flux"))["transformer"]
    named = {f"base_model.model.{key}": value for key, value in state.items()}
    file = save_lora(tmp_path / "peft" / "adapter_model.safetensors", named)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k"]}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    plain = save_lora(tmp_path / "plain.safetensors", {f"transformer.{key}": value for key, value in state.items()})
    ours, twice = load(base, lora=file.parent), load(base, lora=plain, lora_weight=2.0)
    for name, value in twice.pipeline.transformer.state_dict().items():
        torch.testing.assert_close(ours.pipeline.transformer.state_dict()[name], value)


def test_a_lora_of_another_base_says_which_tensors_do_not_fit(folders, tmp_path):
    state = diffusers_names(lora_of(folders("flux")))
    file = save_lora(tmp_path / "flux.safetensors", state)
    with pytest.raises(
        UsageError, match="tensors are no LoRA of the base's text_encoder, text_encoder_2, unet"
    ) as caught:
        load(folders("sdxl"), lora=file)
    assert "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight" in str(caught.value)
    assert "name the base it was trained from" in str(caught.value)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    wide = save_lora(tmp_path / "wide.safetensors", state | {name: torch.zeros(2, 99)})
    with pytest.raises(UsageError, match=r"to_q.lora_A.weight' \(2, 99\) do not fit the base's weight"):
        load(folders("flux"), lora=wide)


# Commands


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\ntwo blue squares\n")
    return file


def test_eval_measures_a_pipeline_and_its_token_grid(folders, prompts, cli: Cli, caplog):
    base = folders("flux")
    (prompts.parent / "call.yaml").write_text("height: 32\nwidth: 32\n")
    how = [
        "--steps",
        2,
        "--device",
        "cpu",
        "--pipeline-kwargs",
        "call.yaml",
        "--pipeline-kwargs",
        "max_sequence_length=8",
    ]
    made = cli("eval", base, "--prompts", prompts, "--metric", "grid", "--seeds", "0-19", *how)
    assert made.returncode == 0, made.stderr
    result = json.loads(Path(made.stdout.strip()).read_text())
    generation = result["generation"]["fields"]
    assert generation["pipeline"] == "FluxPipeline" and generation["guidance_scale"] == 3.5
    assert generation["pipeline_kwargs"] == {"height": 32, "width": 32, "max_sequence_length": 8}
    assert result["world"] == "full-size" and result["cost"]["nfe"] == 2
    fields = {value["metric"]: result["protocols"][value["protocol"]]["fields"] for value in result["figures"]}
    assert fields["grid_vae_db"]["periods_px"]["vae"] == 2 and "token_px" not in fields["grid_vae_db"]
    assert fields["grid_token_db"]["token_px"] == 4
    assert result["runs"][0]["provenance"]["captions"]["cut"].keys() == {"text_encoder", "text_encoder_2"}
    again = cli("eval", base, "--prompts", prompts, "--metric", "grid", "--seeds", "0-19", *how)
    assert "stored already" in again.stderr


def test_the_grid_probe_of_a_unet_is_as_it_was(folders, prompts, cli: Cli):
    """No token, and the protocol of the other two columns has no word of it."""
    made = cli("eval", folders("sdxl"), "--prompts", prompts, "--metric", "grid", "--seeds", "0-19", "--steps", 1)
    result = json.loads(Path(made.stdout.strip()).read_text())
    assert {value["metric"] for value in result["figures"]} == {"grid_vae_db", "grid_patch_db"}


def test_sample_names_the_noise_of_each_image(folders, tmp_path):
    (file,) = sample(str(folders("sdxl")), ["a red circle"], out=tmp_path / "out", steps=2, device="cpu")
    entry = json.loads((tmp_path / "out" / "index.json").read_text())
    assert str(noise_seed("a red circle", 0)) in json.dumps(entry) and file.name in json.dumps(entry)


def test_headroom_picks_among_a_pipelines_images(folders, prompts, tmp_path):
    config = EvalConfig(
        targets=[str(folders("sdxl"))],
        prompts=str(prompts),
        hps=WEIGHTS / "reward",
        judge=[f"clip_score={WEIGHTS / 'clip'}"],
        steps=2,
        device="cpu",
        results=tmp_path / "results",
    )
    (found,) = measure_headroom(config, HeadroomOptions(samples=2, held_out=("clip_score",)))
    assert found.ranges == () and found.gold == "clip_score" and found.groups[0].picks
    with pytest.raises(UsageError, match="leave out --proxy"):
        measure_headroom(config, HeadroomOptions(samples=2, held_out=("clip_score",), proxy=WEIGHTS / "latent_proxy"))


def test_a_lora_on_its_base_by_command(folders, prompts, cli: Cli):
    base = folders("sdxl")
    save_lora(prompts.parent / "style" / "style.safetensors", diffusers_names(lora_of(base)))
    how = ["--base", base, "--lora", "style", "--lora-weight", 0.5, "--prompts", prompts]
    made = cli("eval", *how, "--metric", "grid", "--seeds", "0-19", "--steps", 1, "--device", "cpu")
    assert made.returncode == 0, made.stderr
    result = json.loads(Path(made.stdout.strip()).read_text())
    assert result["model"] == "style" and result["generation"]["fields"]["lora_weight"] == 0.5
    refused = cli(
        "eval", "--base", base, "--unet", "style", "--prompts", prompts, "--metric", "grid", "--device", "cpu"
    )
    assert refused.returncode == 2 and "--unet is for SD 1 and 2" in refused.stderr


def test_a_lora_on_stable_diffusion_has_a_weight(tmp_path):
    base = save_pipeline(tmp_path / "base", student=False)
    state = {f"unet.{key}": value for key, value in lora_of(base)["unet"].items()}
    file = save_lora(tmp_path / "lora.safetensors", state)
    hashes = {}
    for weight in (1.0, 0.5):
        config = EvalConfig(base=str(base), lora=file, lora_weight=weight)
        models = load_target(student_target(str(base), None, file), config, torch.device("cpu"))
        hashes[models.weights_sha256] = models.unet.state_dict()
    plain = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    (one, half_of_it), name = (
        hashes.values(),
        next(iter(state)).removeprefix("unet.").partition(".lora_")[0] + ".weight",
    )
    torch.testing.assert_close(half_of_it[name] - plain[name], (one[name] - plain[name]) / 2, atol=1e-6, rtol=1e-4)


def test_options_without_their_use(folders, prompts, cli: Cli, tmp_path):
    for words, message in [
        (["teacher", "--offload"], "--offload is for pipelines that are called"),
        (["teacher", "--pipeline-kwargs", "nothing.yaml"], "neither KEY=VALUE nor a YAML file"),
        (["teacher", "--lora-weight", "2"], "--lora-weight: is the weight of a LoRA"),
        (["black-forest/FLUX.1-mine"], "hf download black-forest/FLUX.1-mine .of a gated one, accept the licence"),
    ]:
        refused = cli("eval", *words, "--num", 2, "--metric", "hps", "--device", "cpu")
        assert refused.returncode == 2, refused.stderr
        import re

        assert re.search(message, refused.stderr), refused.stderr


def test_no_log_line_of_a_library(folders, caplog):
    with caplog.at_level(logging.INFO):
        images(load(folders("flux"), arguments=ARGUMENTS["flux"] | {"max_sequence_length": 2}))
    assert [record for record in caplog.records if record.name.startswith(("diffusers", "transformers"))] == []


def test_vae_slicing_gives_the_same_images(folders):
    whole, sliced = images(load(folders("sdxl"))), images(load(folders("sdxl"), vae_slicing=True))
    assert (whole.int() - sliced.int()).abs().max() <= 1
    assert load(folders("sdxl"), vae_slicing=True).pipeline.vae.use_slicing
