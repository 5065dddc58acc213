"""Diffusion models from plain diffusers folders: ``StableDiffusionPipeline`` teachers and exported students."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from rgbench.diffusion.sampling import ddim_sample, lcm_sample
from rgbench.errors import UsageError
from rgbench.files import read_json, sha256_file
from rgbench.worlds.presets import find_preset

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
DDIM_FAMILY = ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")


def decode_images(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images of unscaled latents: (decode(z)/2 + ½).clamp(0, 1).

    Args:
        vae: diffusers' autoencoder.
        latents: already divided by ``scaling_factor``, (B, C, h, w).

    Returns:
        (B, 3, H, W) in [0, 1], differentiable.
    """
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


@dataclass
class DiffusionModels:
    """The parts of a text-to-image model, frozen, in evaluation mode.

    Attributes:
        unet: predicts ``prediction_type``; a student has ``time_cond_proj_dim``.
        vae, text_encoder, tokenizer: as in the folder.
        alphas_cumprod: ᾱ of diffusers' scheduler, (T,) float32.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        scaling_factor: latents × this have unit variance.
        resolution: image side in pixels.
        latent_shape: (C, h, w).
        sampler: ``ddim`` or ``lcm``, from the folder's scheduler.
        ddim: timestep spacing, offset and last ᾱ of the folder's scheduler, as ``ddim_sample`` takes them.
        original_inference_steps: N of an LCM student's training grid, else None.
        timestep_scaling: s of an LCM student.
        weights_sha256: over the names and contents of the weight files.
        path: the folder.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    alphas_cumprod: Tensor
    prediction_type: str
    scaling_factor: float
    resolution: int
    latent_shape: tuple[int, int, int]
    sampler: str
    ddim: dict[str, Any]
    original_inference_steps: int | None
    timestep_scaling: float
    weights_sha256: str
    path: Path

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.unet.dtype

    def with_student(
        self, student: UNet2DConditionModel, original_inference_steps: int, timestep_scaling: float
    ) -> DiffusionModels:
        """The same parts around a distilled network, sampled as an LCM; the teacher's weights hash stays."""
        return replace(
            self,
            unet=student,
            sampler="lcm",
            original_inference_steps=original_inference_steps,
            timestep_scaling=timestep_scaling,
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text-encoder states, (B, L, D); longer prompts are cut to L tokens, as in diffusers' pipelines."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images (B, 3, H, W) in [0, 1]; unscaled, (B, C, h, w)."""
        posterior = self.vae.encode(images.to(self.device, self.dtype) * 2 - 1).latent_dist
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of scaled latents (B, C, h, w)."""
        return decode_images(self.vae, latents / self.scaling_factor)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Images of prompts with the folder's sampler, equal to diffusers' pipeline with the same generators.

        Args:
            prompts: B texts.
            generators: B CPU generators, one per image.
            num_steps: sampling steps.
            guidance_scale: g in the pipelines' form: DDIM guides u + g(c − u), an LCM student is given w = g − 1.

        Returns:
            (B, 3, H, W) in [0, 1].
        """
        embeds = self.encode_prompts(prompts)
        common = (self.unet, self.alphas_cumprod, self.prediction_type, embeds)
        if self.sampler == "lcm":
            if self.original_inference_steps is None:
                raise UsageError(f"{self.path}: an LCM sampler needs original_inference_steps in its scheduler config")
            latents = lcm_sample(
                *common,
                generators,
                num_steps=num_steps,
                w=guidance_scale - 1,
                latent_shape=self.latent_shape,
                original_steps=self.original_inference_steps,
                timestep_scaling=self.timestep_scaling,
            )
        else:
            uncond = self.encode_prompts([""]).expand_as(embeds)
            latents = ddim_sample(
                *common,
                uncond,
                generators,
                num_steps=num_steps,
                guidance_scale=guidance_scale,
                latent_shape=self.latent_shape,
                **self.ddim,
            )
        return self.decode(latents)


def load_models(path_or_preset: str | Path, device: str | torch.device, dtype: torch.dtype) -> DiffusionModels:
    """Load a diffusers folder, or a preset's teacher by name.

    Args:
        path_or_preset: a pipeline folder, or a preset.
        device: where to put the weights.
        dtype: one floating type for all networks.

    Raises:
        UsageError: no such folder or preset, a missing file, or a scheduler this project does not sample with.
    """
    disable_progress_bar()  # transformers draws one per text encoder
    path = Path(path_or_preset)
    if not path.is_dir():
        path = find_preset(str(path_or_preset)).teacher_folder()
    for name, file in WEIGHTS.items():
        if not (path / name / file).is_file():
            raise UsageError(f"{path / name / file}: missing; a diffusers folder with safetensors weights is needed")
    unet = UNet2DConditionModel.from_pretrained(path / "unet", use_safetensors=True, torch_dtype=dtype)
    vae = AutoencoderKL.from_pretrained(path / "vae", use_safetensors=True, torch_dtype=dtype)
    text_encoder = CLIPTextModel.from_pretrained(path / "text_encoder", use_safetensors=True, dtype=dtype)
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False).eval().to(device)
    side = unet.config.sample_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return DiffusionModels(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        scaling_factor=vae.config.scaling_factor,
        resolution=side * factor,
        latent_shape=(unet.config.in_channels, side, side),
        weights_sha256=weights_sha256(path),
        path=path,
        **_read_scheduler(path / "scheduler" / "scheduler_config.json", device),
    )


def _read_scheduler(file: Path, device: str | torch.device) -> dict[str, Any]:
    """The fields of :class:`DiffusionModels` that the scheduler's configuration settles."""
    if not file.is_file():
        raise UsageError(f"{file}: missing; a diffusers folder keeps its noise schedule there")
    config = read_json(file)
    name = config.get("_class_name")
    if name != "LCMScheduler" and name not in DDIM_FAMILY:
        raise UsageError(f"{file}: scheduler {name!r}; use one of {', '.join((*DDIM_FAMILY, 'LCMScheduler'))}")
    for option in ("thresholding", "rescale_betas_zero_snr"):
        if config.get(option):
            raise UsageError(f"{file}: {option} is on, which is not sampled with here; set it to false")
    return {
        "alphas_cumprod": DDIMScheduler.from_config(config).alphas_cumprod.to(device),
        "prediction_type": config.get("prediction_type", "epsilon"),
        "sampler": "lcm" if name == "LCMScheduler" else "ddim",
        "ddim": {
            "timestep_spacing": config.get("timestep_spacing", "leading"),
            "steps_offset": 1,  # StableDiffusionPipeline sets this, and clip_sample off, whatever the file says
            "set_alpha_to_one": config.get("set_alpha_to_one", name == "DDIMScheduler"),
        },
        "original_inference_steps": config.get("original_inference_steps"),
        "timestep_scaling": config.get("timestep_scaling", 10.0),
    }


def weights_sha256(path: Path) -> str:
    """One hash over the names and contents of a folder's weight files; a changed README changes nothing."""
    digest = hashlib.sha256()
    for name, file in WEIGHTS.items():
        digest.update(f"{name}/{file} {sha256_file(path / name / file)}\n".encode())
    return digest.hexdigest()


def make_student(teacher: UNet2DConditionModel, time_cond_proj_dim: int) -> UNet2DConditionModel:
    """The teacher's copy with a guidance embedding that starts as no guidance at all.

    The weights are the teacher's; the new ``cond_proj`` starts at zero, so that the student begins as exactly the
    teacher, whatever w it is given.

    Args:
        teacher: without ``time_cond_proj_dim``.
        time_cond_proj_dim: d of the guidance embedding.

    Returns:
        A trainable network on the teacher's device and of its dtype.

    Raises:
        UsageError: the teacher already has a guidance embedding (it is a student itself).
    """
    if teacher.config.time_cond_proj_dim is not None:
        raise UsageError("the teacher has time_cond_proj_dim: it is a distilled student; name an undistilled model")
    student = UNet2DConditionModel.from_config(dict(teacher.config), time_cond_proj_dim=time_cond_proj_dim)
    weights = teacher.state_dict()
    cond_proj = student.time_embedding.cond_proj.weight
    student.load_state_dict(weights | {"time_embedding.cond_proj.weight": torch.zeros_like(cond_proj)})
    # Evaluation mode: dropout, where a teacher has any, would draw outside the step's named streams.
    torch.nn.Module.to(student, teacher.device, teacher.dtype)  # diffusers' own `to` warns about every change of dtype
    return student.requires_grad_(True).eval()
