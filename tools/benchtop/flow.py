"""Benchtop-flow: a second teacher, on the same latents and captions, that predicts the velocity of a straight path.

Stable Diffusion 3's form and classes (arXiv 2403.03206) at small width: a transformer on all 64 latent pixels, two text
encoders, timesteps drawn logit-normally. The first encoder is the teacher's, which has learned the order of objects,
under the CLIP's last layer; the second is the CLIP's text tower as it is. Both stay frozen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rgbench.core.io import read_json, write_json_atomic
from rgbench.diffusion.schedule import FLOW, Flow, add_noise, prediction_of
from rgbench.models.families import SD3
from rgbench.models.folder import quiet_libraries
from tools.benchtop.clip import CLIP_CONFIG
from tools.benchtop.stage import autocast, stage_seed
from tools.benchtop.teacher import text_tower, train_cycles

WIDTH = CLIP_CONFIG["text_cfg"]["width"]
TRANSFORMER_CONFIG = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_projection_dim": 128,
    "joint_attention_dim": 2 * WIDTH,
    "pooled_projection_dim": 2 * CLIP_CONFIG["embed_dim"],
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
SHIFT = 1.0  # of the timesteps: 64 latent pixels are few (arXiv 2403.03206, section 5.3.2)


@dataclass(frozen=True)
class FlowConfig:
    """Hyper-parameters of the flow stage."""

    seed: int = 0
    cycles: tuple[tuple[int, float], ...] = ((3600, 1e-3), (2400, 1e-3))  # steps and peak learning rate of each
    batch_size: int = 64
    drop_prompt: float = 0.1
    average_decay: float = 0.998
    dtype: str = "fp32"


def train_flow(config: FlowConfig, out: Path, device: torch.device) -> None:
    """Train the transformer on the cached latents; write ``out/teacher_flow``, a pipeline folder, in fp16."""
    torch.manual_seed(stage_seed(config.seed, "flow", -1))
    transformer = SD3Transformer2DModel(**TRANSFORMER_CONFIG).to(device).train()
    pipeline = _pipeline(out, transformer, device)
    family, path = SD3(), Flow.shifted(SHIFT).to(device)
    models: Any = SimpleNamespace(path=out, pipeline=pipeline, device=device, schedule=path)  # what the family reads
    denoiser = family.denoiser(models, transformer)

    def loss(latents: Tensor, prompts: list[str]) -> Tensor:
        timesteps = (torch.randn(len(latents), device=device).sigmoid() * len(path)).long().clamp(1, len(path) - 1)
        noise = torch.randn_like(latents)
        noisy = add_noise(latents, noise, timesteps, path)
        with torch.no_grad():
            conditioning = family.encode(models, prompts)
        with autocast(device, config.dtype):
            predicted = denoiser(noisy, timesteps, conditioning)[0]
        wanted = prediction_of(latents, noise, timesteps, path, FLOW)
        return (predicted.float() - wanted).pow(2).mean()

    train_cycles("flow", nn.ModuleDict({"transformer": transformer}), (1.0,), loss, config, out, device)
    transformer.eval()
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        nn.Module.half(part.cpu())
    with quiet_libraries():  # which warn of T5, that is left out
        pipeline.save_pretrained(out / "teacher_flow", safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):  # whose configurations name the dtype that they are loaded in
        file = out / "teacher_flow" / name / "config.json"
        write_json_atomic(file, {**read_json(file), "dtype": "float32"})


def _pipeline(out: Path, transformer: Any, device: torch.device) -> Any:
    """diffusers' pipeline around the transformer, from the parts of earlier stages."""
    clip = json.loads((out / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    state = load_file(out / "clip" / "open_clip_model.safetensors")
    tower = _projected(state, clip)
    tuned = _projected(state, clip)
    learned = CLIPTextModel.from_pretrained(out / "teacher" / "text_encoder", dtype=torch.float32).state_dict()
    names = tuned.state_dict().keys()
    layers = {_named(name, names): value for name, value in learned.items() if "final_layer_norm" not in name}
    tuned.load_state_dict(layers, strict=False)
    vae = AutoencoderKL.from_pretrained(out / "teacher" / "vae")
    vae.register_to_config(_name_or_path="", shift_factor=0.0)  # which the pipeline adds
    tokenizers = [CLIPTokenizer.from_pretrained(out / "clip") for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=tuned.to(device),
        tokenizer=tokenizers[0],
        text_encoder_2=tower.to(device),
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _projected(state: dict[str, Tensor], clip: dict[str, Any]) -> CLIPTextModelWithProjection:
    """An open_clip CLIP's whole text tower with its projection, frozen."""
    config, weights = text_tower(state, clip["text_cfg"], clip["embed_dim"], clip["text_cfg"]["layers"])
    encoder = CLIPTextModelWithProjection(config)
    names = encoder.state_dict().keys()
    named = {_named(name, names): value.float() for name, value in weights.items()}
    named["text_projection.weight"] = state["text_projection"].float().T.contiguous()
    encoder.load_state_dict(named)
    return encoder.eval().requires_grad_(False)


def _named(name: str, names: Any) -> str:
    """A tensor's name in a network that may have the prefix ``text_model.`` or not."""
    bare = name.removeprefix("text_model.")
    return bare if bare in names else f"text_model.{bare}"
