"""Latents, teacher and pipeline of the benchtop: Stable Diffusion 2.1's layout at 1/8 scale, trained from scratch.

Epsilon prediction on Stable Diffusion's noise schedule, 10 % empty prompts, min-SNR weighting (Hang et al. 2023,
γ = 5), an average of the weights at the end. The text encoder starts as the CLIP's text tower without its last layer,
as in Stable Diffusion 2, and learns along, as in the first latent diffusion models (Rombach et al. 2022, section 4.3):
a frozen one leaves the order of two objects to chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rgbench.benchtop.scenes import captions
from rgbench.benchtop.web import WEB, WebConfig, described_scenes, training_batch
from rgbench.core.io import (
    read_json,
    read_safetensors_metadata,
    save_safetensors_atomic,
    sha256_file,
    sha256_tree,
    write_json_atomic,
)
from tools.benchtop.clip import CLIP_CONFIG, tokenize
from tools.benchtop.stage import LATENTS_SPLIT, StageLog, autocast, digest, linear_decay, stage_seed

SAVE_EVERY = 200  # steps; an interrupted stage continues from there
SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
UNET_CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": CLIP_CONFIG["text_cfg"]["width"],
    "attention_head_dim": (2, 4),  # heads, as diffusers names them for SD 2.x
    "use_linear_projection": True,
    "norm_num_groups": 16,
}


@dataclass(frozen=True)
class LatentsConfig:
    """Parameters of the latents stage."""

    num_latents: int = 49152
    dtype: str = "fp32"
    web: WebConfig = WEB


@dataclass(frozen=True)
class TeacherConfig:
    """Hyper-parameters of the teacher stage."""

    seed: int = 0
    cycles: tuple[tuple[int, float], ...] = ((3600, 1e-3), (2400, 1e-3))  # steps and peak learning rate of each
    text_encoder_lr_share: float = 0.3
    batch_size: int = 64
    drop_prompt: float = 0.1
    min_snr_gamma: float = 5.0
    average_decay: float = 0.998
    dtype: str = "fp32"


@torch.no_grad()
def encode_latents(config: LatentsConfig, out: Path, device: torch.device) -> None:
    """Cache the VAE's posterior moments of the first pictures of the web.

    Writes ``out/latents.safetensors``: ``mean`` and ``std``, each (N, 4, 8, 8) float16, unscaled.
    """
    vae = AutoencoderKL.from_pretrained(out / "vae").eval().to(device)
    means, stds = [], []
    for start in range(0, config.num_latents, 128):
        images, _, _ = training_batch(LATENTS_SPLIT, range(start, min(start + 128, config.num_latents)))
        with autocast(device, config.dtype):
            posterior = vae.encode(2 * images.to(device) - 1).latent_dist
        means.append(posterior.mean.half().cpu())
        stds.append(posterior.std.half().cpu())
    save_file({"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}, out / "latents.safetensors")


def train_teacher(config: TeacherConfig, out: Path, device: torch.device) -> None:
    """Train UNet and text encoder on the cached latents; write their averages to ``out`` in fp16."""
    clip = json.loads((out / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    state = load_file(out / "clip" / "open_clip_model.safetensors")
    text_encoder = to_transformers(state, clip["text_cfg"], clip["embed_dim"]).to(device)
    torch.manual_seed(stage_seed(config.seed, "teacher", -1))
    unet = UNet2DConditionModel(**UNET_CONFIG).to(device)
    networks = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    alphas_cumprod = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod.to(device)

    def loss(latents: Tensor, prompts: list[str]) -> Tensor:
        with autocast(device, config.dtype):
            embeds = text_encoder(tokenize(tokenizer, prompts).to(device)).last_hidden_state
        return _loss(unet, latents, embeds, alphas_cumprod, config)

    train_cycles("teacher", networks, (1.0, config.text_encoder_lr_share), loss, config, out, device)
    unet.eval().half().cpu().save_pretrained(out / "unet")
    text_encoder.eval().half().cpu().save_pretrained(out / "text_encoder")


class CycleConfig(Protocol):
    """What :func:`train_cycles` reads of a stage's hyper-parameters, a dataclass."""

    @property
    def seed(self) -> int:
        """Of all draws."""
        ...

    @property
    def cycles(self) -> tuple[tuple[int, float], ...]:
        """Steps and peak learning rate of each."""
        ...

    @property
    def batch_size(self) -> int:
        """Latents a step."""
        ...

    @property
    def drop_prompt(self) -> float:
        """Share of empty prompts."""
        ...

    @property
    def average_decay(self) -> float:
        """Of the average of the weights."""
        ...


def train_cycles(
    name: str,
    networks: nn.ModuleDict,
    rates: Sequence[float],
    loss: Callable[[Tensor, list[str]], Tensor],
    config: CycleConfig,
    out: Path,
    device: torch.device,
) -> None:
    """Train networks on the cached latents, in cycles; they end as the average of their weights.

    Each cycle starts from the average of the one before, which is kept in ``out`` under the digest of its inputs: an
    interrupted stage continues with the next cycle.

    Args:
        name: of the stage: of its files and its streams of random numbers.
        networks: what learns.
        rates: factor of the learning rate of each network.
        loss: of scaled latents (B, 4, 8, 8) and B prompts, a scalar.
        config: of the stage.
        out: with ``clip``, ``vae`` and ``latents.safetensors``.
        device: where they train.
    """
    inputs = [sha256_tree(out / "clip"), sha256_file(out / "latents.safetensors")]
    for cycle in range(len(config.cycles)):
        settings = {**asdict(cast(Any, config)), "cycles": config.cycles[: cycle + 1]}
        path = out / f"{name}-{digest(inputs, settings)}.safetensors"
        if not path.exists():
            save_file(_train_cycle(name, networks, rates, loss, cycle, config, path, device), path)
        networks.load_state_dict(load_file(path))


def _train_cycle(
    name: str,
    networks: nn.ModuleDict,
    rates: Sequence[float],
    loss_of: Callable[[Tensor, list[str]], Tensor],
    cycle: int,
    config: CycleConfig,
    path: Path,
    device: torch.device,
) -> dict[str, Tensor]:
    """One warm-up and decay of the learning rate; returns the average of the weights, which ``path`` will hold."""
    out, state = path.parent, path.with_suffix(".unfinished.safetensors")
    scaling_factor = float(AutoencoderKL.load_config(out / "vae")["scaling_factor"])
    cache = load_file(out / "latents.safetensors")
    steps, lr = config.cycles[cycle]
    first = sum(n for n, _ in config.cycles[:cycle])
    average = {k: v.detach().clone() for k, v in networks.state_dict().items()}
    groups = [{"params": network.parameters()} for network in networks.values()]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    log = StageLog(out / f"{name}.jsonl")
    begun = _restore(state, networks, average, optimiser) if state.exists() else 0
    for step in range(begun, steps):
        torch.manual_seed(stage_seed(config.seed, name, first + step))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * lr * linear_decay(step, steps)
        latents, prompts = _batch(cache, scaling_factor, name, first + step, config)
        loss = loss_of(latents.to(device), prompts)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimiser.step()
        _update_average(average, networks, min(config.average_decay, (1 + step) / (10 + step)))
        log(first + step, loss=loss, grad_norm=norm)
        if (step + 1) % SAVE_EVERY == 0:
            _save(state, networks, average, optimiser, step + 1)
    state.unlink(missing_ok=True)
    return average


def _save(
    path: Path, networks: nn.Module, average: dict[str, Tensor], optimiser: torch.optim.Optimizer, step: int
) -> None:
    """Keep what a cycle needs to continue after a step; its randomness is a function of the step."""
    tensors = {f"network.{name}": value for name, value in networks.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for number, entry in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{name}": value for name, value in entry.items()}
    whole = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_safetensors_atomic(whole, path, {"step": str(step)})


def _restore(path: Path, networks: nn.Module, average: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> int:
    """Load what :func:`_save` kept; the step to continue from."""
    tensors, step = load_file(path), int(read_safetensors_metadata(path)["step"])
    networks.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
    for name in average:
        average[name].copy_(tensors[f"average.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, number, name = key.split(".")
            moments.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": moments, "param_groups": optimiser.state_dict()["param_groups"]})
    return step


@torch.no_grad()
def _update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Update the exponential moving average of a model's state in place."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _batch(
    cache: dict[str, Tensor], scaling_factor: float, name: str, step: int, config: CycleConfig
) -> tuple[Tensor, list[str]]:
    n = len(cache["mean"])
    rng = np.random.default_rng(stage_seed(config.seed, f"{name}_batch", step))
    index = rng.integers(n, size=config.batch_size)
    moments = [cache[k][torch.from_numpy(index)].float() for k in ("mean", "std")]
    latents = (moments[0] + moments[1] * torch.randn(moments[0].shape)) * scaling_factor
    # The wording is drawn afresh at each visit of a scene.
    prompts = captions(described_scenes(LATENTS_SPLIT, index), LATENTS_SPLIT, index + n * (1 + step))
    dropped = rng.random(config.batch_size) < config.drop_prompt
    return latents, ["" if d else p for p, d in zip(prompts, dropped, strict=True)]


def _loss(
    unet: UNet2DConditionModel, latents: Tensor, embeds: Tensor, alphas_cumprod: Tensor, config: TeacherConfig
) -> Tensor:
    timesteps = torch.randint(len(alphas_cumprod), (len(latents),), device=latents.device)
    noise = torch.randn_like(latents)
    signal = alphas_cumprod[timesteps]
    noisy = signal.sqrt()[:, None, None, None] * latents + (1 - signal).sqrt()[:, None, None, None] * noise
    with autocast(latents.device, config.dtype):
        predicted = unet(noisy, timesteps, encoder_hidden_states=embeds).sample
    snr = signal / (1 - signal)
    weight = snr.clamp(max=config.min_snr_gamma) / snr
    return (weight * (predicted.float() - noise).pow(2).mean((1, 2, 3))).mean()


def assemble_pipeline(config: TeacherConfig, out: Path, device: torch.device) -> None:
    """Write ``out/teacher`` as a diffusers pipeline folder from the parts of earlier stages."""
    vae = AutoencoderKL.from_pretrained(out / "vae_texture")
    unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float16)
    for network in (vae, unet):
        network.register_to_config(_name_or_path="")  # diffusers records where they were loaded from
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float16),
        tokenizer=CLIPTokenizer.from_pretrained(out / "clip"),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out / "teacher", safe_serialization=True)
    # transformers loads the text encoder in the dtype its config names, diffusers the rest in float32
    file = out / "teacher" / "text_encoder" / "config.json"
    write_json_atomic(file, {**read_json(file), "dtype": "float32"})


def to_transformers(state: dict[str, Tensor], text_cfg: dict, embed_dim: int) -> CLIPTextModel:
    """Convert an open_clip CLIP's text tower, dropping its last layer.

    Args:
        state: state dict of ``open_clip.CLIP``.
        text_cfg: ``context_length``, ``vocab_size``, ``width``, ``heads``, ``layers``.
        embed_dim: width of the joint space.

    Returns:
        The text encoder in eval mode; last hidden state (B, L, width).
    """
    config, mapped = text_tower(state, text_cfg, embed_dim, text_cfg["layers"] - 1)
    encoder = CLIPTextModel(config)
    prefix = "text_model." if any(k.startswith("text_model.") for k in encoder.state_dict()) else ""
    missing, unexpected = encoder.load_state_dict({prefix + k: v.float() for k, v in mapped.items()}, strict=False)
    if unexpected or [k for k in missing if "position_ids" not in k]:
        raise ValueError(f"text tower does not fit CLIPTextModel: missing {missing}, unexpected {unexpected}")
    return encoder.eval()


def text_tower(
    state: dict[str, Tensor], text_cfg: dict, embed_dim: int, layers: int
) -> tuple[CLIPTextConfig, dict[str, Tensor]]:
    """Configuration and weights of the first layers of an open_clip CLIP's text tower, under transformers' names."""
    config = CLIPTextConfig(
        vocab_size=text_cfg["vocab_size"],
        hidden_size=text_cfg["width"],
        intermediate_size=4 * text_cfg["width"],
        projection_dim=embed_dim,
        num_hidden_layers=layers,
        num_attention_heads=text_cfg["heads"],
        max_position_embeddings=text_cfg["context_length"],
        hidden_act="gelu",
        bos_token_id=text_cfg["vocab_size"] - 2,
        eos_token_id=text_cfg["vocab_size"] - 1,
        pad_token_id=0,
    )
    return config, _mapped(state, layers)


def _mapped(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    out = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for i in range(layers):
        source, target = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            for ours, theirs in names.items():
                out[f"{target}.{theirs}.{leaf}"] = state[f"{source}.{ours}.{leaf}"]
            for part, value in zip("qkv", torch.chunk(state[f"{source}.attn.in_proj_{leaf}"], 3), strict=True):
                out[f"{target}.self_attn.{part}_proj.{leaf}"] = value
    return out
