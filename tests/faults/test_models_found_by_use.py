"""Model folders whose figures would not be theirs: refused by name, or loaded as diffusers loads them."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, T5Config, T5EncoderModel

from rgbench.core.errors import UsageError
from rgbench.core.io import SUMS
from rgbench.core.run import RunDirectory
from rgbench.models.lora import DIFFUSERS_FILE, HEADER_KEY, KOHYA_KEYS, PEFT_CONFIG, PEFT_FILE, merge_lora
from rgbench.models.pipeline import load_models
from rgbench.models.presets import WEIGHTS as SHIPPED
from rgbench.models.student import Student, load_student
from rgbench.rewards.base import fingerprint_id
from rgbench.rewards.clip import HPSReward
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.identity import check_contents
from tests import families, sd_folders
from tests.tiny_models import save_pipeline

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    save_pipeline(root / "base", student=False)
    save_pipeline(root / "student", student=True, seed=1)
    return root


@pytest.fixture
def base(shared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared / "base", tmp_path / "base"))


def edit(file: Path, **values: Any) -> None:
    """Change keys of a configuration; None removes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edits(name: str, **values: Any) -> Change:
    return lambda folder: edit(folder / name, **values)


def more_tokens(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(folder / "tokenizer")


REFUSED: dict[str, Change] = {
    "timestep_spacing 'linspace'": edits(SCHEDULER, timestep_spacing="linspace"),
    "model_max_length 100": edits(TOKENIZER, model_max_length=100),
    "model_max_length 1e+30": edits(TOKENIZER, model_max_length=None),
    "model_max_length 0": edits(TOKENIZER, model_max_length=0),
    "has 655 tokens, the text encoder knows 654": more_tokens,
    "quantization_config asks": edits("text_encoder/config.json", quantization_config={"quant_method": "fp8"}),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_no_prompt_survives_or_is_not_sampled_is_refused(base: Path, says: str) -> None:
    REFUSED[says](base)
    with pytest.raises(UsageError, match=re.escape(says)):
        load_models(base, CPU, torch.float32)


@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_schedule_that_is_not_said_is_that_of_its_own_class(base: Path, name: str) -> None:
    (base / SCHEDULER).write_text(json.dumps({"_class_name": name}))
    found = load_models(base, CPU, torch.float32).schedule
    assert torch.equal(found, getattr(diffusers, name)().alphas_cumprod)


def sharded(folder: Path, other: Path | None = None, leave_out: str = "") -> None:
    """The UNet in two shards, the second perhaps another model's; a tensor may lack in the index."""
    file = folder / "unet" / WEIGHTS
    state, rest = load_file(file), load_file((other or folder) / "unet" / WEIGHTS)
    names = sorted(state)
    parts = {"a.safetensors": (state, names[:50]), "b.safetensors": (rest, names[50:])}
    file.unlink()
    for name, (tensors, own) in parts.items():
        save_file({key: tensors[key] for key in own}, file.with_name(name), {"format": "pt"})
    places = {key: name for name, (_, own) in parts.items() for key in own if key != leave_out}
    file.with_name(f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_are_known_by_their_contents(shared: Path, base: Path, tmp_path: Path) -> None:
    whole = load_models(base, CPU, torch.float32)
    mixed = Path(shutil.copytree(base, tmp_path / "mixed"))
    sharded(base)
    sharded(mixed, save_pipeline(tmp_path / "other", student=False, seed=2))
    own, others = load_models(base, CPU, torch.float32), load_models(mixed, CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(own.unet.parameters(), whole.unet.parameters(), strict=True))
    assert own.weights_sha256 != others.weights_sha256
    shutil.rmtree(base)
    shutil.copytree(shared / "base", base)
    sharded(base, leave_out="conv_norm_out.weight")
    with pytest.raises(UsageError, match=r"1 tensors missing from the files, first 'conv_norm_out\.weight'"):
        load_models(base, CPU, torch.float32)


# Parts on a base


def image(part: Path, base: Path) -> torch.Tensor:
    models = load_student(Student(str(base), unet=part), CPU, torch.float32)
    generators = [torch.Generator().manual_seed(0)]
    return models.sample(["a red circle"], generators, num_steps=1, guidance_scale=3.0)


def test_a_weight_file_is_the_network_of_the_folder_that_it_lies_in(shared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shared / "student" / "unet", tmp_path / "mine"))
    before = image(folder, shared / "base")
    edit(folder / "config.json", attention_head_dim=4)
    assert not torch.equal(image(folder, shared / "base"), before)
    assert torch.equal(image(folder, shared / "base"), image(folder / WEIGHTS, shared / "base"))
    edit(folder / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(UsageError, match=r"config\.json: of class AutoencoderKL"):
        image(folder / WEIGHTS, shared / "base")


PARTS: dict[str, Change] = {
    "sample_size 16, the base's is 8": edits("unet/config.json", sample_size=16),
    "its prediction_type v_prediction is not the base's": edits(SCHEDULER, prediction_type="v_prediction"),
    "its noise schedule is not the base's": edits(SCHEDULER, beta_end=0.02),
    "original_inference_steps -5 is not a positive number": edits(SCHEDULER, original_inference_steps=-5),
    "timestep_scaling 'x' is not a positive number": edits(SCHEDULER, timestep_scaling="x"),
}


@pytest.mark.parametrize("says", PARTS)
def test_a_part_of_another_base_is_refused(shared: Path, tmp_path: Path, says: str) -> None:
    folder = Path(shutil.copytree(shared / "student", tmp_path / "mine"))
    image(folder / "unet", shared / "base")
    PARTS[says](folder)
    with pytest.raises(UsageError, match=re.escape(says)):
        image(folder / "unet", shared / "base")


# LoRAs


# Teachers of other families


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for family in ("sdxl", "sd3", "flux"):
        families.save(family, root / family)
    sd_folders.save_teacher(root / "sd15", "sd15")
    return root


def clip_of(width: int, name: str = "text_encoder") -> Change:
    return lambda folder: families.clip(name != "text_encoder", width).save_pretrained(folder / name)


def t5_of(width: int) -> Change:
    sizes = {"d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 64}
    return lambda folder: T5EncoderModel(T5Config(d_model=width, **sizes)).save_pretrained(folder / "text_encoder_2")


NORMALISED = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0] * 4}  # as of Playground v2.5
FITS = "its text encoders give states of width {}, its network reads {}; fetch all parts from one model"


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        ("sdxl", edits("vae/config.json", **NORMALISED), "latents_mean is set, which is not decoded with here"),
        ("sd15", edits("vae/config.json", **NORMALISED), "latents_mean is set, which is not decoded with here"),
        ("sdxl", edits("vae/config.json", shift_factor=0.5), "shift_factor 0.5, which this family's pipeline passes"),
        ("sd15", edits("vae/config.json", shift_factor=0.5), "shift_factor 0.5, which this family's pipeline passes"),
        ("sd3", edits("vae/config.json", shift_factor=None), "shift_factor None is not a number"),
        ("flux", edits("vae/config.json", shift_factor="0.1"), "shift_factor '0.1' is not a number"),
        ("sd3", edits("vae/config.json", scaling_factor=0), "scaling_factor 0 is not a positive number"),
        ("sdxl", edits("vae/config.json", scaling_factor="0.1"), "scaling_factor '0.1' is not a positive number"),
        ("sdxl", clip_of(48), FITS.format("80 and 32", "64 and 32")),
        ("sdxl", clip_of(16), FITS.format("48 and 32", "64 and 32")),
        ("sdxl", clip_of(48, "text_encoder_2"), FITS.format("80 and 48", "64 and 32")),
        ("flux", clip_of(16), FITS.format("32 and 16", "32 and 32")),
        ("flux", t5_of(48), FITS.format("48 and 32", "32 and 32")),
        ("sdxl", edits("model_index.json", tokenizer=[None, None]), "leaves this tokenizer out"),
        ("sdxl", edits("tokenizer_2/tokenizer_config.json", model_max_length=10**6), "model_max_length 1e+06"),
        ("sdxl", edits(TOKENIZER, model_max_length=5), "model_max_length differs between tokenizer, tokenizer_2"),
        ("sd3", edits(SCHEDULER, shift=0), "shift 0 is not a positive number"),
        ("sd3", edits(SCHEDULER, shift=-3.0), "shift -3.0 is not a positive number"),
        ("sd3", edits(SCHEDULER, shift=1e308), "leaves few steps of a flow alike"),
        ("sd3", edits(SCHEDULER, num_train_timesteps=500), "num_train_timesteps 500; flows are trained here with 1000"),
        ("flux", edits(SCHEDULER, base_image_seq_len=4096), "max_image_seq_len 4096 is not above base_image_seq_len"),
        ("flux", edits(SCHEDULER, base_shift="x"), "base_shift 'x' is not a positive number"),
        ("flux", edits(SCHEDULER, max_shift=1e6), "leaves few steps of a flow alike"),
        ("sdxl", edits("unet/config.json", sample_size=[16, 16]), "sample_size [16, 16]; use a model of square images"),
        ("sd3", edits("transformer/config.json", sample_size=-16), "sample_size -16; use a model of square images"),
        ("sd15", edits("unet/config.json", sample_size=-8), "sample_size -8; use a model of square images"),
    ],
)
def test_a_teacher_that_would_be_another_is_refused(
    teachers: Path, tmp_path: Path, family: str, change: Change, says: str
) -> None:
    folder = Path(shutil.copytree(teachers / family, tmp_path / family))
    change(folder)
    with pytest.raises(UsageError, match=re.escape(says)):
        load_models(folder, CPU, torch.float32, None if "sample_size" in says else 32).encode_prompts(["a"])


@pytest.mark.parametrize(("family", "side"), [("sdxl", 32), ("sd3", 32), ("flux", 256)])
def test_the_side_of_a_teacher_is_its_pipelines(teachers: Path, family: str, side: int) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(teachers / family)
    models = load_models(teachers / family, CPU, torch.float32)
    assert models.resolution == pipeline.default_sample_size * pipeline.vae_scale_factor == side
    assert models.encode_prompts(["a", "b"]).isfinite().all()


@pytest.fixture(scope="module")
def unet(shared: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(shared / "base" / "unet")


@pytest.fixture
def lora(unet: UNet2DConditionModel, tmp_path: Path) -> Path:
    """A folder of peft, of rank 4 and α 8."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k"], "init_lora_weights": False}
    get_peft_model(copy.deepcopy(unet), LoraConfig(**options)).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def merge(path: Path, unet: UNet2DConditionModel) -> None:
    merge_lora(path, {"unet": copy.deepcopy(unet)})


@pytest.mark.parametrize("key", ["alora_invocation_tokens", "use_bdlora", "kasa_config", "a_later_field"])
def test_an_adapter_that_is_more_than_a_product_is_refused(lora: Path, unet: UNet2DConditionModel, key: str) -> None:
    merge(lora, unet)
    edit(lora / PEFT_CONFIG, **{key: [1]})
    with pytest.raises(UsageError, match=rf"not a plain LoRA \({key}\)"):
        merge(lora, unet)


def test_a_quantised_lora_is_refused(lora: Path, unet: UNet2DConditionModel) -> None:
    state = load_file(lora / PEFT_FILE)
    save_file({key: (10 * value).to(torch.int8) for key, value in state.items()}, lora / PEFT_FILE)
    with pytest.raises(UsageError, match=r"lora_A\.weight' is of torch\.int8: quantised"):
        merge(lora, unet)


def renamed(lora: Path, file: Path, prefix: str, header: dict[str, str] | None = None) -> Path:
    state = load_file(lora / PEFT_FILE)
    save_file({key.replace("base_model.model.", prefix): value for key, value in state.items()}, file, header)
    return file


def test_a_scale_that_would_not_be_read_is_refused(lora: Path, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    file = renamed(lora, lora / DIFFUSERS_FILE, "unet.")
    (lora / PEFT_FILE).rename(tmp_path / PEFT_FILE)
    with pytest.raises(UsageError, match=rf"{PEFT_CONFIG} is beside it"):
        merge(file, unet)
    (lora / PEFT_CONFIG).unlink()
    merge(file, unet)
    for rank, fits in (("4", False), ("8.0", True)):
        save_file(load_file(file), file, dict(zip(KOHYA_KEYS, ("8", rank), strict=True)))
        if fits:
            merge(file, unet)
            continue
        with pytest.raises(UsageError, match="ss_network_alpha 8 in its header, and no tensor has it"):
            merge(file, unet)
    save_file(load_file(file), file, {HEADER_KEY: '{"unet.r": 4, "unet.lora_alpha": ' + "9" * 400 + "}"})
    with pytest.raises(UsageError, match="lora_adapter_metadata is damaged"):
        merge(file, unet)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.unet.", "text_encoder_2.", "unet.unet."])
def test_names_of_another_family_are_refused(
    lora: Path, unet: UNet2DConditionModel, tmp_path: Path, prefix: str
) -> None:
    with pytest.raises(UsageError, match=rf"32 of 32 tensors are no LoRA of the base's unet, first '{prefix}"):
        merge(renamed(lora, tmp_path / "x.safetensors", prefix), unet)


# Rewards


def score(folder: Path) -> tuple[float, dict[str, Any]]:
    reward = HPSReward.load(folder, antialias=True, device="cpu")
    return float(reward(torch.ones(1, 3, 32, 32) / 3, ["a red circle"])), reward.fingerprint()


OTHER_SCORES: dict[str, Change] = {
    "heads": lambda folder: edit_text(folder, heads=1),
    "tokenizer": lambda folder: edit(folder / "tokenizer_config.json", eos_token="a"),
}


def edit_text(folder: Path, **values: Any) -> None:
    file = folder / "open_clip_config.json"
    content = json.loads(file.read_text())
    content["model_cfg"]["text_cfg"] |= values
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("what", OTHER_SCORES)
def test_what_scores_otherwise_has_another_fingerprint(tmp_path: Path, what: str) -> None:
    sd_folders.save_reward(tmp_path / "reward")
    before, fingerprint = score(tmp_path / "reward")
    OTHER_SCORES[what](tmp_path / "reward")
    after, other = score(tmp_path / "reward")
    assert after != before and other != fingerprint
    assert {key for key in other if other[key] != fingerprint[key]} == {"config_sha256"}


def test_the_shipped_rewards_keep_their_fingerprints(tmp_path: Path) -> None:
    for name in ("reward", "clip"):
        shutil.copytree(SHIPPED / name, tmp_path / name)
        (tmp_path / name / "README.md").touch()
        assert "config_sha256" not in score(tmp_path / name)[1]


@pytest.mark.parametrize("name", [None, "absent"])
def test_a_reward_whose_tokenizer_does_not_fit_is_named(tmp_path: Path, name: str | None) -> None:
    sd_folders.save_reward(tmp_path / "reward")
    edit_text(tmp_path / "reward", hf_tokenizer_name=name)
    if name:
        edit(tmp_path / "reward" / "tokenizer_config.json", pad_token=False)
    with pytest.raises(UsageError, match="reward: cannot be loaded"):
        score(tmp_path / "reward")


@pytest.mark.parametrize("scale", [None, "x", -1])
def test_a_proxy_says_its_scale(tmp_path: Path, scale: Any) -> None:
    sd_folders.save_proxy(tmp_path / "proxy")
    (tmp_path / "proxy" / SUMS).unlink()
    edit(tmp_path / "proxy" / "config.json", latent_scale=scale)
    with pytest.raises(UsageError, match=r"config\.json: (lacks latent_scale|latent_scale .* is not a positive)"):
        LatentCLIP.load(tmp_path / "proxy", "cpu")


def test_a_run_goes_on_with_a_reward_whose_fingerprint_says_more(tmp_path: Path) -> None:
    older = {"name": "hps", "weights_sha256": "4", "antialias": True}
    run = RunDirectory(tmp_path / "run").create({}, {"rewards": reward_of(older), "step": 1})
    check_contents(run, {"rewards": reward_of(older | {"config_sha256": "5"})})
    for other in ({"antialias": False}, {"weights_sha256": "6", "config_sha256": "5"}):
        with pytest.raises(UsageError, match="its rewards changed"):
            check_contents(run, {"rewards": reward_of(older | other)})
    with pytest.raises(UsageError, match="its rewards changed"):
        check_contents(run, {"rewards": []})


def reward_of(fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "hps", "fingerprint": fingerprint, "fingerprint_id": fingerprint_id(fingerprint)}]
