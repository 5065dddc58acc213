"""Real classes at tiny widths: a diffusers folder, rewards, a latent proxy, data; images 16 px, latents 4x8x8."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.distributed.device_mesh import DeviceMesh
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rgbench.core.run import stream_generator
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.models.presets import WEIGHTS
from rgbench.rewards.clip import HPSReward
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.base import StepDraws
from rgbench.train.recipe import DollarRecipe, LRMMLCMRecipe, LRMRecipe, LRMTCDRecipe

TOKENIZER = WEIGHTS / "teacher" / "tokenizer"
CLIP_FOLDER = WEIGHTS / "clip"
VOCABULARY, CONTEXT = 654, 32
TEXT_CFG = {"context_length": CONTEXT, "width": 16, "heads": 2, "layers": 2, "vocab_size": VOCABULARY}
SCALING_FACTOR = 0.37
PROMPTS = [
    "a red circle",
    "two blue squares",
    "a green star",
    "one cross at the top",
    "a ring",
    "small yellow triangle",
]


def unet(**other) -> UNet2DConditionModel:
    sizes = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(sizes | other))


def vae(channels: tuple[int, ...] = (4, 8), **other) -> AutoencoderKL:
    sizes = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": SCALING_FACTOR,
    }
    return AutoencoderKL(**(sizes | other))


def text_config(**other) -> CLIPTextConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 652,
        "eos_token_id": 653,
    }
    return CLIPTextConfig(**(sizes | other))


def save_pipeline(folder: Path, prediction_type: str = "epsilon", **scheduler) -> Path:
    """A StableDiffusionPipeline folder with random weights from seed 0."""
    torch.manual_seed(0)
    options = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **scheduler,
    }
    StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config()),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet(),
        scheduler=DDIMScheduler(prediction_type=prediction_type, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def models(folder: Path, dtype: torch.dtype = torch.float32, mesh: DeviceMesh | None = None) -> DiffusionModels:
    return load_models(folder, "cpu", dtype, mesh=mesh)


def expert(antialias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 1) -> HPSReward:
    """A reward with random weights; its tokenizer is the benchtop's, so prompts matter."""
    torch.manual_seed(seed)
    vision = {"image_size": 8, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4}
    clip = open_clip.CLIP(12, vision, dict(TEXT_CFG))
    _spread_text(clip)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{CLIP_FOLDER}")
    return HPSReward(clip.to(dtype), tokenizer, antialias=antialias, weights_sha256=f"random-{seed}")


def proxy(dtype: torch.dtype = torch.float32, seed: int = 2) -> LatentCLIP:
    torch.manual_seed(seed)
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "layers": 2, "width": 16, "head_width": 8},
        "text_cfg": dict(TEXT_CFG),
        "latent_channels": 4,
        "latent_scale": SCALING_FACTOR,
    }
    latent_clip = LatentCLIP(config, CLIP_FOLDER)
    _spread_text(latent_clip.clip)
    return latent_clip.requires_grad_(False).eval().to(dtype)


def _spread_text(clip: open_clip.CLIP) -> None:
    """Larger embeddings than open_clip's initial ones, so that different prompts get different features."""
    torch.nn.init.normal_(clip.token_embedding.weight, std=1.0)


RECIPES = {"lcd": LRMRecipe, "tcd": LRMTCDRecipe, "mlcm": LRMMLCMRecipe, "vsd": DollarRecipe}  # by distillation
KINDS = {"lcd": "lrm", "vsd": "dollar"}  # of the recipes, where it is not lrm_{distillation}


def recipe(distillation: str = "lcd", **sections) -> LRMRecipe:
    """An LRM recipe; a trainer of less reads less of it."""
    kind = RECIPES[distillation]
    values = {
        "kind": KINDS.get(distillation, f"lrm_{distillation}"),
        "name": "tiny",
        "model": {"path": "unused"},
        "data": {"kind": "scenes"},
        "train": {"steps": 12, "batch_size": 4, "lr": 1e-3, "sample_every": 0},
        "lcd": {"w_min": 2.0, "w_max": 6.0, "time_cond_proj_dim": 16},
        "reward": {"antialias": True},
        "guidance": {"scale": 2.0},
        "proxy": {"lr": 1e-3, "trainable": {"image_layers": 1, "text_layers": 1}},
    }
    if distillation == "mlcm":  # a stage ends in the middle of the tests of resume
        values["mlcm"] = {"stages": [{"segments": 8, "steps": 6}, {"segments": 4}]}
        values["sampling"] = {"steps": 4}
    if distillation == "vsd":  # and so does a cycle of two steps
        values["lcd"] |= {"teacher_steps": 2}
        values["vsd"] = {"ratio": 2, "w": None, "lr": 1e-3}
        values["proxy"] = {"lr": 1e-3, "small": {"patch_size": 2, "width": 16}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return kind.model_validate(values, strict=False)


class TinySource:
    """Ten images, a pure function of their index, so that twelve steps of four cross epochs."""

    name = "tiny"
    length = 10

    def fingerprint(self) -> dict:
        return {"kind": "tiny"}

    def load(self, indices: list[int]) -> Batch:
        images = [torch.rand(3, 16, 16, generator=stream_generator(7, "tiny", i)) for i in indices]
        prompts = [PROMPTS[i % len(PROMPTS)] for i in indices]
        return Batch(torch.stack(images), prompts, [f"tiny/{i}" for i in indices])


def draws(step: int = 0, num: int = 4, dtype: torch.dtype = torch.float32) -> StepDraws:
    return StepDraws(0, step, num, dtype=dtype)
