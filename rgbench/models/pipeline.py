"""Text-to-image models from diffusers folders, teachers and exported students: load, encode, decode, sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import isclass, signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from rgbench.core.errors import UsageError
from rgbench.core.io import open_safetensors, read_json
from rgbench.core.shard import shard
from rgbench.diffusion.sampling import ddim_sample, euler_sample, lcm_sample, tcd_sample
from rgbench.diffusion.schedule import FLOW, Schedule
from rgbench.models.families import FAMILIES, STABLE_DIFFUSION, Denoiser, FlowTransformer, StableDiffusion, read_flow
from rgbench.models.folder import (
    CONSTANT,
    INDEX,
    PIPELINES,
    Weights,
    check_class,
    check_folder,
    check_loaded,
    check_pipeline,
    check_vae,
    config_sha256,
    explained,
    hash_weights,
    image_side,
    is_stable_diffusion,
    left_out,
    model_index,
    read_config,
    read_number,
)
from rgbench.models.presets import find_preset

# Their DDIM grid is their own. Of the others only the noise schedule is taken: they are sampled with Stable
# Diffusion's DDIM settings, so that teachers compare whatever sampler a folder happens to name.
DDIM_FAMILY = ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
OTHER_SAMPLERS = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "UniPCMultistepScheduler"),
)
TEACHER_SAMPLERS = ("ddim", "euler")
STUDENT_SAMPLERS = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}
GAMMA = 0.3  # TCDScheduler's default
# Of an exported scheduler: diffusers keeps private keys, and reads none; its pipelines take eta with each call.
GAMMA_KEY, SEGMENTS_KEY, STEPS_KEY = "_eta", "_segments", "_original_inference_steps"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing")  # of DDIM's timesteps
NOISE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
DECODED_PIXELS = 8 * 512**2  # at once; the decoder's widest layer holds 1 KiB a pixel

_NETWORKS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


def decode_images(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images of unscaled latents: (decode(z)/2 + ½).clamp(0, 1).

    Args:
        vae: diffusers' autoencoder, whose ``shift_factor``, if any, is added.
        latents: already divided by ``scaling_factor``, (B, C, h, w).

    Returns:
        (B, 3, H, W) in [0, 1], differentiable.
    """
    shift = vae.config.get("shift_factor")
    shifted = latents if shift is None else latents + shift
    return (vae.decode(shifted, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)


@dataclass
class DiffusionModels:
    """The parts of a text-to-image model, frozen, in evaluation mode.

    Attributes:
        unet: the denoising network, a UNet or a transformer; predicts ``prediction_type``.
        vae, text_encoder, tokenizer: as in the folder; of several encoders the first.
        schedule: ᾱ of diffusers' scheduler, (T,) float32, or a flow.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``.
        scaling_factor: latents × this have unit variance.
        resolution: image side in pixels.
        latent_shape: (C, h, w).
        sampler: ``ddim``, ``euler``, ``lcm`` or ``tcd``, from the folder's scheduler.
        ddim: timestep spacing, offset and last ᾱ of the folder's scheduler, as ``ddim_sample`` takes them.
        original_inference_steps: N of a student's training grid, else None.
        timestep_scaling: s of an LCM student.
        weights_sha256: over the names and contents of the weight files.
        config_sha256: over configurations, noise schedule and tokenizer.
        path: the folder.
        gamma: γ of the TCD sampler: the folder's, under :data:`GAMMA_KEY`, else :data:`GAMMA`.
        segments: of an MLCM student, which is sampled in as many steps where γ is 0; None for others.
        family: how the network is called, and what it is conditioned on.
        pipeline: diffusers' own, which encodes prompts; None for Stable Diffusion 1 and 2.
    """

    unet: Any
    vae: AutoencoderKL
    text_encoder: Any
    tokenizer: Any
    schedule: Schedule
    prediction_type: str
    scaling_factor: float
    resolution: int
    latent_shape: tuple[int, int, int]
    sampler: str
    ddim: dict[str, Any]
    original_inference_steps: int | None
    timestep_scaling: float
    weights_sha256: str
    config_sha256: str
    path: Path
    gamma: float = GAMMA
    segments: int | None = None
    family: StableDiffusion = STABLE_DIFFUSION
    pipeline: Any = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unet.device

    @property
    def stride(self) -> int:
        """Pixels that a latent stands for."""
        return self.resolution // self.latent_shape[-1]

    @property
    def token(self) -> None:
        """A UNet has no tokens."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.unet.dtype

    def denoiser(self, network: Any) -> Denoiser:
        """A network of this family, such as :attr:`unet` or a student, as samplers and trainers call it."""
        return self.family.denoiser(self, network)

    def with_student(
        self,
        student: Any,
        original_inference_steps: int,
        timestep_scaling: float,
        gamma: float | None = None,
    ) -> DiffusionModels:
        """Put a distilled network, sampled by TCD with γ or else as an LCM, in place of the UNet; the hashes stay."""
        return replace(
            self,
            unet=student,
            sampler="lcm" if gamma is None else "tcd",
            original_inference_steps=original_inference_steps,
            timestep_scaling=timestep_scaling,
            gamma=GAMMA if gamma is None else gamma,
        )

    def own_fields(self) -> dict[str, Any]:
        """What decides an image besides sampler settings, resolution and hashes."""
        if self.sampler in TEACHER_SAMPLERS:
            return {}
        fields: dict[str, Any] = {"original_inference_steps": self.original_inference_steps}
        return fields | ({"timestep_scaling": self.timestep_scaling} if self.sampler == "lcm" else {})

    def network_evaluations(self, steps: int, guidance_scale: float) -> int:
        """Network evaluations of each image: two a step under classifier-free guidance.

        A student with a guidance embedding reads its scale and needs one.
        """
        embedded = self.denoiser(self.unet).config.time_cond_proj_dim
        return steps * (2 if guidance_scale > 1 and not embedded else 1)

    def text_limits(self) -> dict[str, tuple[Any, int]]:
        """Tokenizer of each text encoder, and how many tokens it reads."""
        return self.family.text_limits(self)

    @contextmanager
    def counted(self, advance: Callable[[], None]) -> Iterator[None]:
        """Call ``advance`` after each sampling step: all samplers call the network once."""
        handle = self.unet.register_forward_hook(lambda *_: advance())
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts as the family's conditioning, (B, L, D), cut to L tokens as in diffusers' pipelines."""
        return self.family.encode(self, prompts)

    @torch.no_grad()
    def encode_empty(self) -> Tensor:
        """Encode what guidance subtracts, (1, L, D)."""
        return self.family.encode_empty(self)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) in [0, 1] as mean and deviation of their posterior, unscaled, (B, C, h, w).

        A ``shift_factor`` of the autoencoder is subtracted from the mean.
        """
        posterior = self.vae.encode(images.to(self.device, self.dtype) * 2 - 1).latent_dist
        shift = self.vae.config.get("shift_factor")
        return posterior.mean if shift is None else posterior.mean - shift, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W) in [0, 1], ``DECODED_PIXELS`` at once."""
        parts = latents.split(max(1, DECODED_PIXELS // self.resolution**2))
        return torch.cat([decode_images(self.vae, part / self.scaling_factor) for part in parts])

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Decoded :meth:`sample_latents`, (B, 3, H, W) in [0, 1]; takes and raises the same."""
        return self.decode(self.sample_latents(prompts, generators, num_steps=num_steps, guidance_scale=guidance_scale))

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_steps: int,
        guidance_scale: float,
    ) -> Tensor:
        """Sample latents of prompts as diffusers' pipeline of the folder does with the same generators.

        Args:
            prompts: B texts.
            generators: B CPU generators, one per image.
            num_steps: sampling steps.
            guidance_scale: g in the pipelines' form: a network without a guidance embedding is guided, u + g(c − u),
                where g > 1; one with an embedding is given w = g − 1.

        Returns:
            Latents × ``scaling_factor``, (B, C, h, w).

        Raises:
            UsageError: a student whose scheduler does not name its training grid.
            ValueError: more steps than the grid has.
        """
        embeds = self.encode_prompts(prompts)
        uncond, network = self.encode_empty().expand_as(embeds), self.denoiser(self.unet)
        common: tuple[Any, ...] = (network, self.schedule, self.prediction_type, embeds, uncond, generators)
        settings: dict[str, Any] = {
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "latent_shape": self.latent_shape,
        }
        if self.sampler == "ddim":
            return ddim_sample(*common, **(settings | self.ddim))
        if self.sampler == "euler":
            return euler_sample(*common, **settings)
        if self.original_inference_steps is None:
            raise UsageError(f"{self.path}: its sampler needs original_inference_steps in the scheduler's config")
        settings["original_steps"] = self.original_inference_steps
        if self.sampler == "tcd":
            return tcd_sample(*common, **settings, gamma=self.gamma)
        return lcm_sample(*common, **settings, timestep_scaling=self.timestep_scaling)


def load_models(
    path_or_preset: str | Path,
    device: str | torch.device,
    dtype: torch.dtype,
    resolution: int | None = None,
    *,
    weights: bool = True,
    mesh: DeviceMesh | None = None,
) -> DiffusionModels:
    """Load a diffusers folder, or a preset's teacher by name; from the disk alone.

    Weights are plain, of a variant (fp16) or sharded, always safetensors; see :mod:`rgbench.models.folder`.

    Args:
        path_or_preset: a pipeline folder, or a preset.
        device: where to put the weights.
        dtype: one floating type for all networks.
        resolution: image side in pixels; None for the model's own.
        weights: False for networks of the configurations' shapes and any values; no weight file is read or needed.
        mesh: of the ranks that the denoising network is sharded over; None for a whole one.

    Raises:
        UsageError: no such folder or preset, a missing or truncated file, tensors that do not fit the configuration,
            another family of models, a scheduler with an unknown noise schedule, or a side that the model cannot make.
    """
    path = Path(path_or_preset)
    if not path.is_dir():
        path = find_preset(str(path_or_preset)).teacher_folder()
    if not is_stable_diffusion(path):
        return _load_piped(path, device, dtype, resolution, weights, mesh)
    found = check_folder(path, weights)
    parts = {name: load_network(each, dtype) for name, each in found.items()}
    scheduler = read_scheduler(path / "scheduler" / "scheduler_config.json", device)
    for name, network in parts.items():
        _place(network.requires_grad_(False).eval(), device, mesh if name == "unet" else None)
    unet, vae = parts["unet"], parts["vae"]
    tokenizer = _load_tokenizer(path / "tokenizer", parts["text_encoder"].config)
    side = unet.config.sample_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if resolution is not None:
        side = _latent_side(resolution, factor, path)
    return DiffusionModels(
        **parts,
        tokenizer=tokenizer,
        scaling_factor=vae.config.scaling_factor,
        resolution=side * factor,
        latent_shape=(unet.config.in_channels, side, side),
        weights_sha256=hash_weights(found),
        config_sha256=config_sha256(path),
        path=path,
        **scheduler,
    )


def _place(network: Any, device: str | torch.device, mesh: DeviceMesh | None) -> Any:
    """Put a network on a device, or its shards on those of a mesh; returns it."""
    if mesh is None:
        return network.to(device)
    shard(network, mesh)
    return network


def _load_piped(
    path: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    resolution: int | None,
    weights: bool,
    mesh: DeviceMesh | None,
) -> DiffusionModels:
    """A model of SDXL's, SD3's or FLUX's family."""
    kind = str(model_index(path)["_class_name"])
    family = FAMILIES.get(kind)
    if family is None:
        known = ", ".join((*PIPELINES, *FAMILIES))
        raise UsageError(
            f"{path / INDEX}: a {kind}, which is not trained here; give a text-to-image pipeline of {known}"
        )
    found = check_pipeline(path, weights)
    wanted = (family.component, "vae", *(f"text_encoder{end}" for end in ("", "_2")))
    if absent := [name for name in wanted if name not in found]:
        raise UsageError(f"{path}: lacks {', '.join(absent)}; fetch or write the whole folder again")
    file = path / family.component / "config.json"
    inputs, channels = (
        read_config(f).get(key, 4)
        for f, key in ((file, "in_channels"), (path / "vae" / "config.json", "latent_channels"))
    )
    if inputs != family.packing * channels:
        raise UsageError(f"{file}: in_channels {inputs}, the VAE's latents have {channels}: not a text-to-image model")
    check_vae(path / "vae" / "config.json", shifted=isinstance(family, FlowTransformer))
    parts = {
        name: _place(load_part(path, each, dtype), device, mesh if name == family.component else None)
        for name, each in found.items()
    }
    for part in parts.values():
        if isinstance(part, diffusers.ModelMixin):
            part.register_to_config(_name_or_path="")
    with explained(path):
        pipeline: Any = getattr(diffusers, kind).from_pretrained(path, local_files_only=True, **parts, **left_out(path))
    lengths = {}
    for name in (name for name in parts if name.startswith("text_encoder")):
        place, config = name.replace("text_encoder", "tokenizer"), parts[name].config
        _check_tokenizer(path / place, getattr(pipeline, place), config)
        if hasattr(config, "max_position_embeddings"):  # of the CLIPs, whose states lie side by side
            lengths[place] = getattr(pipeline, place).model_max_length
    if len(set(lengths.values())) > 1:
        raise UsageError(f"{path}: model_max_length differs between {', '.join(lengths)}; fetch all from one model")
    network, vae = parts[family.component], parts["vae"]
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = _latent_side(resolution or image_side(path), factor, path)
    file, patch = path / "scheduler" / "scheduler_config.json", family.patch(network)
    settings = read_scheduler(file, device) if patch is None else _flow_fields(file, (side // patch) ** 2, device)
    return DiffusionModels(
        unet=network,
        vae=vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scaling_factor=vae.config.scaling_factor,
        resolution=side * factor,
        latent_shape=(vae.config.latent_channels, side, side),
        weights_sha256=hash_weights(found),
        config_sha256=config_sha256(path),
        path=path,
        family=family,
        pipeline=pipeline,
        **settings,
    )


def _flow_fields(file: Path, tokens: int, device: str | torch.device) -> dict[str, Any]:
    """Fields of :class:`DiffusionModels` that come from a flow's scheduler."""
    config = read_config(file)
    steps = read_number(config, STEPS_KEY, None, file)
    return {
        "schedule": read_flow(config, file, tokens).to(device),
        "prediction_type": FLOW,
        "sampler": "euler" if steps is None else "lcm",
        "ddim": {},
        "original_inference_steps": steps,
        "timestep_scaling": 10.0,
    }


def _latent_side(resolution: int, factor: int, path: Path) -> int:
    """Side of the latents of images.

    Raises:
        UsageError: not a whole, even number.
    """
    if resolution % (2 * factor):
        raise UsageError(f"{path}: makes no images of {resolution} px; use a multiple of {2 * factor}")
    return resolution // factor


def load_part(path: Path, weights: Weights, dtype: torch.dtype) -> Any:
    """Load a network of a pipeline folder by the class that its index names, frozen.

    Raises:
        UsageError: a class that the libraries lack; or as :func:`load_component`.
    """
    library, name = model_index(path)[weights.component]
    home = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(
        diffusers.pipelines, library, None
    )
    kind = getattr(home, name, None)
    if not (isclass(kind) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained")):
        raise UsageError(f"{path / weights.component}: {library} has no network {name!r}; install a newer {library}")
    return load_component(weights, kind, dtype).requires_grad_(False).eval()


def load_network(weights: Weights, dtype: torch.dtype) -> Any:
    """Load a UNet, VAE or text encoder, after accounting for every tensor.

    Args:
        weights: the component's files.
        dtype: floating type of the weights.

    Raises:
        UsageError: another class, a truncated file; or a tensor of the network that is in no file, of the files that
            goes nowhere, or of another shape: names how many and the first.
    """
    check_class(weights.folder, weights.component)
    network = load_component(weights, _NETWORKS[weights.component], dtype)
    if not weights.files:
        return network
    # transformers passes over the constant position_ids of older files; renamed tensors still count as one each
    names = [name for file in weights.files for name in open_safetensors(file)]
    num_used = sum(not name.endswith(CONSTANT) for name in names)
    if num_used != len(network.state_dict()):
        raise UsageError(
            f"{weights.folder}: the files hold {num_used} tensors, the network {len(network.state_dict())}; fetch or "
            "write the folder again"
        )
    if isinstance(network, (UNet2DConditionModel, AutoencoderKL)):
        network.register_to_config(_name_or_path="")  # diffusers would write this machine's path into every export
    return network


def load_component(weights: Weights, network_class: Any, dtype: torch.dtype) -> Any:
    """Load a network of diffusers or transformers, whose every tensor comes from the files, and all of theirs go in.

    Args:
        weights: the component's files; without any, the network is of its configuration's shapes and any values.
        network_class: has ``from_pretrained``.
        dtype: floating type of the weights.

    Raises:
        UsageError: as :func:`load_network`, or a quantised tensor.
    """
    folder, names = weights.folder, []
    config = folder / "config.json"
    if config.is_file() and read_config(config).get("quantization_config"):
        raise UsageError(f"{config}: quantization_config asks for a quantised network; give plain weights")
    for file in weights.files:
        for name, tensor in open_safetensors(file).items():
            names.append(name)
            if "F" not in tensor.get_dtype() and not name.endswith(CONSTANT):
                raise UsageError(f"{file}: {name!r} is of type {tensor.get_dtype()}: quantised; give plain weights")
    if len(names) > len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{folder}: two files hold {twice!r}; fetch or write the folder again")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if not weights.files:
        with explained(folder):
            if issubclass(network_class, PreTrainedModel):
                return network_class(network_class.config_class.from_pretrained(folder)).to(dtype)
            return network_class.from_config(read_config(config)).to(dtype)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if issubclass(network_class, PreTrainedModel):
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}  # named below; transformers would name none
    else:
        options["torch_dtype"] = dtype
    with explained(folder):
        network, info = network_class.from_pretrained(folder, variant=weights.variant, **options)
    check_loaded(folder, info)
    return network


def _load_tokenizer(folder: Path, text_encoder: Any) -> CLIPTokenizer:
    """The tokenizer of a text encoder, given that one's configuration."""
    for file in sorted(folder.glob("*.json")):
        read_json(file)  # the tokenizers library raises a bare Exception on damaged JSON
    with explained(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    _check_tokenizer(folder, tokenizer, text_encoder)
    return tokenizer


def _check_tokenizer(folder: Path, tokenizer: Any, text_encoder: Any) -> None:
    """Check a tokenizer against its text encoder's configuration; T5's reads texts of any length.

    Raises:
        UsageError: it is missing, or its texts are longer, or its tokens more, than the encoder knows.
    """
    if tokenizer is None:
        raise UsageError(f"{folder}: {INDEX} leaves this tokenizer out, whose text encoder is there; fetch it as well")
    length, most = tokenizer.model_max_length, getattr(text_encoder, "max_position_embeddings", math.inf)
    if not 2 < length <= most or tokenizer.pad_token_id is None:  # begin, text, end
        raise UsageError(
            f"{folder}: model_max_length {length:.6g}, pad_token {tokenizer.pad_token!r:.80}; the text encoder reads "
            f"{most} tokens, and short texts are padded: correct tokenizer_config.json"
        )
    if len(tokenizer) > text_encoder.vocab_size:
        raise UsageError(
            f"{folder}: has {len(tokenizer):,} tokens, the text encoder knows {text_encoder.vocab_size:,}; fetch both "
            "from one model"
        )


def read_scheduler(file: Path, device: str | torch.device) -> dict[str, Any]:
    """Read the fields of :class:`DiffusionModels` that come from the scheduler's configuration.

    Raises:
        UsageError: a scheduler, a noise schedule or a grid that is not sampled with here; no number where one is due.
    """
    config = read_config(file)
    name = config.get("_class_name")
    if name not in (*STUDENT_SAMPLERS, *DDIM_FAMILY, *OTHER_SAMPLERS):
        known = ", ".join((*DDIM_FAMILY, *STUDENT_SAMPLERS, *OTHER_SAMPLERS))
        raise UsageError(f"{file}: scheduler {name!r} has no noise schedule that is known here; use one of {known}")
    for option in ("thresholding", "rescale_betas_zero_snr"):
        if config.get(option):
            raise UsageError(f"{file}: {option} is on, which is not sampled with here; set it to false")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise UsageError(f"{file}: prediction_type {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}")
    own_grid = name in DDIM_FAMILY
    spacing = config.get("timestep_spacing", "leading") if own_grid else "leading"
    if spacing not in SPACINGS:
        raise UsageError(f"{file}: timestep_spacing {spacing!r:.80}; use one of {', '.join(SPACINGS)}")
    options = signature(getattr(diffusers, name).__init__).parameters  # another class has other defaults than DDIM's
    own = {key: options[key].default for key in NOISE_KEYS if key in options}
    with explained(file):
        alphas_cumprod = DDIMScheduler.from_config({**own, **config}).alphas_cumprod
    return {
        "schedule": alphas_cumprod.to(device),
        "prediction_type": prediction_type,
        "sampler": STUDENT_SAMPLERS.get(name, "ddim"),
        "ddim": {
            "timestep_spacing": spacing,
            "steps_offset": 1,  # StableDiffusionPipeline sets this, and clip_sample off, whatever the file says
            "set_alpha_to_one": config.get("set_alpha_to_one", name == "DDIMScheduler") if own_grid else False,
        },
        "original_inference_steps": read_number(config, "original_inference_steps", None, file),
        "timestep_scaling": read_number(config, "timestep_scaling", 10.0, file),
        "gamma": read_gamma(config, file),
        "segments": read_number(config, SEGMENTS_KEY, None, file),
    }


def read_gamma(config: Mapping[str, Any], file: Path) -> float:
    """γ of a scheduler's configuration, or TCD's own.

    Raises:
        UsageError: it is not in [0, 1].
    """
    value = config.get(GAMMA_KEY, GAMMA)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise UsageError(f"{file}: {GAMMA_KEY} {value!r:.80} is not in [0, 1]; fetch or write the folder again")
    return float(value)
