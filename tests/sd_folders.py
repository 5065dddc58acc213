"""Stable Diffusion 1.5 and 2.1 in their own file layouts, classes and configurations, at tiny width.

What differs between the two is as on the hub: 1.5 has a heads count in ``attention_head_dim``, convolutions around its
attention and a QuickGELU text encoder; 2.1 has heads per block, linear projections, a GELU text encoder, and predicts v
at its full resolution. Latents are 4×8×8 of images of 64 px, as the VAE's factor is 8.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from rgbench.rewards.latent_proxy import LatentCLIP
from tests.parity import tiny
from tests.tiny_trainers import distillation_of

SCALING_FACTOR = 0.18215  # of both families' VAE
SIDE = 64
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def unet(family: str) -> UNet2DConditionModel:
    own = {"attention_head_dim": 2}
    if family == "sd21":
        own = {"attention_head_dim": [1, 2, 2, 2], "use_linear_projection": True}
    return tiny.unet(block_out_channels=(8, 8, 16, 16), down_block_types=DOWN, up_block_types=UP, **own)


def save_teacher(folder: Path, family: str, prediction_type: str = "epsilon", **options) -> Path:
    """A pipeline folder of ``sd15`` or ``sd21`` with random weights from seed 0.

    ``options`` are of ``save_pretrained``: ``variant``, ``max_shard_size``.
    """
    torch.manual_seed(0)
    if family == "sd15":  # as on the hub: PNDM, no prediction type said where it is epsilon
        scheduler = PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type)
    else:
        sampling = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        scheduler = DDIMScheduler(**NOISE, **sampling, prediction_type=prediction_type)
    pipeline = StableDiffusionPipeline(
        vae=tiny.vae((4, 4, 8, 8), sample_size=SIDE, scaling_factor=SCALING_FACTOR),
        text_encoder=CLIPTextModel(
            tiny.text_config(num_hidden_layers=2, hidden_act="quick_gelu" if family == "sd15" else "gelu")
        ),
        tokenizer=CLIPTokenizer.from_pretrained(tiny.TOKENIZER),
        unet=unet(family),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, **options)
    if family == "sd15" and prediction_type == "epsilon":
        file = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text())
        del config["prediction_type"]
        file.write_text(json.dumps(config))
    return folder


def save_reward(folder: Path) -> Path:
    """An open_clip folder that scores images of any size."""
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.CLIP_FOLDER / file, folder / file)
    vision = {"image_size": 8, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4}
    text = {**tiny.TEXT_CFG, "hf_tokenizer_name": "."}
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tiny.expert().model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_proxy(folder: Path) -> Path:
    """A latent CLIP of the families' latents."""
    proxy: LatentCLIP = tiny.proxy()
    proxy.config["latent_scale"] = SCALING_FACTOR
    proxy.save(folder)
    return folder


def save_images(folder: Path, num: int = 4) -> Path:
    """An image folder with captions."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    for i in range(num):
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(tiny.PROMPTS[i % len(tiny.PROMPTS)])
    return folder


def save_parts(root: Path) -> Path:
    """What a recipe names beside its teacher: reward, proxy, images."""
    save_reward(root / "reward")
    save_proxy(root / "proxy")
    save_images(root / "images")
    return root


UNUSED = {"lcd": ("reward", "guidance", "proxy", "gradients"), "rg_lcd": ("proxy",)}
UNUSED |= {"tcd": UNUSED["lcd"], "mlcm": UNUSED["lcd"], "vsd": UNUSED["lcd"], "rg_tcd": UNUSED["rg_lcd"]}


def write_recipe(parts: Path, folder: Path, kind: str, teacher: str, changes: dict) -> Path:
    """A recipe of one step of two images; ``changes`` sets ``section`` or ``section.key``."""
    values = tiny.recipe(distillation_of(kind)).model_dump(mode="json", exclude_none=True)
    values |= {"kind": kind, "model": {"path": str(parts / teacher)}}
    values["data"] = {"kind": "image_folder", "path": str(parts / "images"), "resolution": SIDE}
    values["train"] |= {"steps": 1, "batch_size": 2, "sample_every": 0}
    values["reward"]["path"] = str(parts / "reward")
    values["proxy"] |= {} if "small" in values["proxy"] else {"path": str(parts / "proxy")}
    values = {key: value for key, value in values.items() if key not in UNUSED.get(kind, ())}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    file = folder / f"{kind}-{teacher}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file
