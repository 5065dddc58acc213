"""Families of teachers behind one contract: what trainers and samplers ask of a model without knowing which it is.

| family | network | conditioning | path | a student is told |
|---|---|---|---|---|
| Stable Diffusion 1, 2 | UNet | CLIP's states | variance-preserving | w, by ``time_cond_proj_dim`` |
| SDXL | UNet | states of two CLIPs, pooled, image sizes | variance-preserving | the same |
| SD3, SD3.5 | transformer | states of two CLIPs and T5, pooled | flow | nothing: guidance is trained in |
| FLUX.1 | transformer | T5's states, pooled CLIP | flow | w, by its own embedding (dev), or nothing (schnell) |

Every denoiser is called as a UNet of Stable Diffusion: latents (B, C, h, w), timesteps (B,) int64, conditioning and
what it is told of w. Conditioning is one tensor (B, L, D), cached and joined as text states are; a pooled state is
its last row, filled up with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchLCMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rgbench.core.errors import UsageError
from rgbench.diffusion.schedule import Flow, Schedule
from rgbench.models.folder import quiet_libraries, read_number

# LCM-LoRA's layers (arXiv 2311.05556), as in diffusers' examples/consistency_distillation.
LCM_LORA_MODULES = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
# Attention and feed-forward of both streams, and of FLUX's joined blocks.
TRANSFORMER_LORA_MODULES = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"),
)
SDXL_FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"
SIZES = 6  # numbers of SDXL's micro-conditioning
FLOW_TIMES = 1000
LARGEST = 700.0  # whose exponential is a float
REMEDY = "fetch or write the folder again"
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
# What a flow's scheduler may do to its timesteps besides the shift; none of the families' published ones does.
_OTHER_GRIDS = ("shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


class Denoiser(Protocol):
    """A network in the form of Stable Diffusion's UNet.

    Attributes:
        config: with ``time_cond_proj_dim``: d of what it is told of w; 1 for w itself; None for nothing.
    """

    config: Any

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        *,
        return_dict: bool = False,
    ) -> tuple[Tensor, ...]:
        """Prediction (B, C, h, w) for noisy latents, as the first of a tuple."""
        ...


class Parts(Protocol):
    """What a family reads of :class:`rgbench.models.pipeline.DiffusionModels`."""

    path: Path
    vae: Any
    text_encoder: Any
    tokenizer: Any
    pipeline: Any
    schedule: Schedule
    resolution: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...


class StableDiffusion:
    """Stable Diffusion 1 and 2.

    Attributes:
        component: name of the network in a pipeline folder.
        packing: latent pixels that the network reads as one.
        lora_modules: ends of the names of the layers that adapters go on.
    """

    component, packing = "unet", 1
    lora_modules: tuple[str, ...] = LCM_LORA_MODULES

    def denoiser(self, models: Parts, network: Any) -> Denoiser:
        """A network of the family in the common form."""
        return network

    def encode(self, models: Parts, prompts: Sequence[str]) -> Tensor:
        """Conditioning of prompts, (B, L, D)."""
        tokenizer, encoder = models.tokenizer, models.text_encoder
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(models.device)
        masked = getattr(encoder.config, "use_attention_mask", False)
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[0]

    def encode_empty(self, models: Parts) -> Tensor:
        """Conditioning that guidance subtracts, (1, L, D)."""
        return self.encode(models, [""])

    def text_limits(self, models: Parts) -> dict[str, tuple[Any, int]]:
        """Tokenizer of each text encoder, and how many tokens it reads."""
        return {"text_encoder": (models.tokenizer, models.tokenizer.model_max_length)}

    def patch(self, network: Any) -> int | None:
        """Side of a transformer's tokens in latent pixels; None for a UNet."""
        return None

    def check_dtype(self, models: Parts, dtype: str) -> None:
        """Refuse arithmetic in which the family's networks overflow.

        Args:
            models: the model.
            dtype: ``float32``, ``bfloat16`` or ``float16``.

        Raises:
            UsageError: names the network and another type.
        """

    def pipeline(self, models: Parts, network: Any, scheduler: Any) -> DiffusionPipeline:
        """diffusers' pipeline of a student; both embed w where it has a guidance embedding, one takes TCD's ``eta``."""
        told, is_lcm = network.config.time_cond_proj_dim is not None, isinstance(scheduler, LCMScheduler)
        return (LatentConsistencyModelPipeline if told and is_lcm else StableDiffusionPipeline)(
            vae=models.vae,
            text_encoder=models.text_encoder,
            tokenizer=models.tokenizer,
            unet=network,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class Piped(StableDiffusion):
    """A family whose prompts are encoded by diffusers' own pipeline, ``models.pipeline``."""

    def encode(self, models: Parts, prompts: Sequence[str]) -> Tensor:
        """Conditioning of prompts, the pooled state as its last row, (B, L + 1, D).

        Raises:
            UsageError: text encoders of another width than the network reads.
        """
        with quiet_libraries():  # which say at each call that a long caption is cut
            states, pooled = self.states(models, list(prompts))
        found = states.shape[-1], pooled.shape[-1]
        if found != (wanted := self.widths(getattr(models.pipeline, self.component).config)):
            raise UsageError(
                f"{models.path}: its text encoders give states of width {found[0]} and {found[1]}, its network reads "
                f"{wanted[0]} and {wanted[1]}; fetch all parts from one model"
            )
        width = max(states.shape[-1], pooled.shape[-1])
        rows = [states, pooled[:, None].to(states)]
        return torch.cat([nn.functional.pad(row, (0, width - row.shape[-1])) for row in rows], dim=1)

    def widths(self, config: Any) -> tuple[int, int]:
        """D of the text states and P of the pooled state that a network of this configuration reads."""
        return config.joint_attention_dim, config.pooled_projection_dim

    def states(self, models: Parts, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Text states (B, L, D) and pooled state (B, P)."""
        states, _, pooled, _ = models.pipeline.encode_prompt(
            prompts, *[None] * (self.num_encoders - 1), device=models.device, do_classifier_free_guidance=False
        )
        return states, pooled

    num_encoders = 2
    max_tokens = 0  # of T5, where there is one, as the pipeline's call cuts by default

    def text_limits(self, models: Parts) -> dict[str, tuple[Any, int]]:
        """Tokenizer of each text encoder, and how many tokens it reads."""
        found = {}
        for name, part in models.pipeline.components.items():
            if name.startswith("tokenizer") and part is not None:
                limit = part.model_max_length if "CLIP" in type(part).__name__ else self.max_tokens
                found[name.replace("tokenizer", "text_encoder")] = (part, limit)
        return found

    def pipeline(self, models: Parts, network: Any, scheduler: Any) -> DiffusionPipeline:
        """diffusers' pipeline of a student, of the teacher's class."""
        teacher = models.pipeline
        settings = {key: value for key, value in teacher.config.items() if isinstance(value, bool)}
        parts = {**teacher.components, self.component: network, "scheduler": scheduler}
        return type(teacher)(**parts, **settings)


def _parted(conditioning: Tensor, widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Text states (B, L, D) and pooled state (B, P) of :meth:`Piped.encode`, for ``widths`` D and P."""
    return conditioning[:, :-1, : widths[0]], conditioning[:, -1, : widths[1]]


class SDXL(Piped):
    """Stable Diffusion XL; an image counts as whole and of the model's size in its micro-conditioning."""

    def denoiser(self, models: Parts, network: Any) -> Denoiser:
        """The UNet with pooled state and sizes of the image."""
        return SDXLDenoiser(network, models.resolution, self.widths(network.config))

    def widths(self, config: Any) -> tuple[int, int]:
        """D of the text states and P of the pooled state that a network of this configuration reads."""
        pooled = config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim
        return config.cross_attention_dim, pooled

    def encode_empty(self, models: Parts) -> Tensor:
        """Zeros, where the pipeline says so."""
        empty = self.encode(models, [""])
        return torch.zeros_like(empty) if models.pipeline.config.force_zeros_for_empty_prompt else empty

    def check_dtype(self, models: Parts, dtype: str) -> None:
        """Refuse float16 where the VAE's configuration asks for float32."""
        if dtype == "float16" and models.vae.config.force_upcast:
            raise UsageError(
                f"train.dtype float16: this VAE overflows in it (force_upcast); use bfloat16, or put the weights and "
                f"config.json of {SDXL_FP16_VAE} in the model's vae/"
            )


class Adapted:
    """A network in the common form, which subclasses call as it wants to be called.

    Attributes:
        config: as of :class:`Denoiser`.
    """

    config: Any

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        *,
        return_dict: bool = False,
    ) -> tuple[Tensor, ...]:
        """As :class:`Denoiser`."""
        return (self.predict(sample, timestep, encoder_hidden_states, timestep_cond),)

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Tensor, told: Tensor | None) -> Tensor:
        """Prediction (B, C, h, w)."""
        raise NotImplementedError


class SDXLDenoiser(Adapted):
    """SDXL's UNet in the common form.

    Args:
        network: the UNet.
        side: of the images in pixels.
        widths: of text and pooled states.
    """

    def __init__(self, network: Any, side: int, widths: tuple[int, int]) -> None:
        self.network, self.config, self.side, self.widths = network, network.config, side, widths

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Tensor, told: Tensor | None) -> Tensor:
        """Prediction (B, C, h, w)."""
        states, pooled = _parted(conditioning, self.widths)
        sizes = states.new_tensor([self.side, self.side, 0, 0, self.side, self.side]).expand(len(sample), SIZES)
        return self.network(
            sample,
            timestep,
            encoder_hidden_states=states,
            timestep_cond=told,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            return_dict=False,
        )[0]


class FlowTransformer(Piped):
    """What transformers of flows have in common."""

    component, lora_modules = "transformer", TRANSFORMER_LORA_MODULES

    def check_dtype(self, models: Parts, dtype: str) -> None:
        """Refuse float16, beyond whose range T5's activations go."""
        if dtype == "float16":
            raise UsageError("train.dtype float16: T5 and this transformer overflow in it; use bfloat16")


class SD3(FlowTransformer):
    """Stable Diffusion 3 and 3.5."""

    num_encoders, max_tokens = 3, 256

    def denoiser(self, models: Parts, network: Any) -> Denoiser:
        """The transformer, told 1000 σ."""
        assert isinstance(models.schedule, Flow)
        num_zeros = self.max_tokens if models.pipeline.text_encoder_3 is None else 0
        return SD3Denoiser(network, models.schedule, self.widths(network.config), num_zeros)

    def patch(self, network: Any) -> int:
        """As the transformer's configuration says."""
        return network.config.patch_size


class SD3Denoiser(Adapted):
    """SD3's transformer in the common form.

    Where T5 is left out, diffusers' pipeline gives rows of zeros in its place. The transformer tells text rows apart by
    nothing but their content, so these stay equal in all layers. On a CPU they are computed once, as often as they
    count; a GPU's fast attention takes no such weights.

    Args:
        network: the transformer.
        schedule: of the times that it is told.
        widths: of text and pooled states.
        num_zeros: rows of zeros at the end of the text states.
    """

    def __init__(self, network: Any, schedule: Flow, widths: tuple[int, int], num_zeros: int) -> None:
        self.network, self.schedule, self.widths, self.num_zeros = network, schedule, widths, num_zeros
        self.config = SimpleNamespace(time_cond_proj_dim=None)

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Tensor, told: Tensor | None) -> Tensor:
        """Prediction (B, C, h, w)."""
        states, pooled = _parted(conditioning, self.widths)
        once = self.num_zeros > 1 and sample.is_cpu and self._runs_as_written()
        states = states[:, : 1 - self.num_zeros] if once else states
        num_keys = states.shape[1] + sample[0, 0].numel() // self.network.config.patch_size**2
        with LastKeyCounts(num_keys, self.num_zeros) if once else nullcontext():
            return self.network(
                hidden_states=sample,
                timestep=self.schedule.times(timestep.expand(len(sample))).to(sample.dtype),
                encoder_hidden_states=states,
                pooled_projections=pooled,
                return_dict=False,
            )[0]

    def _runs_as_written(self) -> bool:
        """Whether the forward pass is neither compiled nor repeated later, outside of this call."""
        return self.network._compiled_call_impl is None and not self.network.is_gradient_checkpointing


class LastKeyCounts(TorchFunctionMode):
    """Within it, the last key of each attention to image and text counts as several equal ones.

    Args:
        num_keys: of such an attention; SD3.5 has others, to the image alone.
        copies: how many.
    """

    def __init__(self, num_keys: int, copies: int) -> None:
        super().__init__()
        self.num_keys, self.copies = num_keys, copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add ln(copies) to the last key's logits."""
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention and args[1].shape[2] == self.num_keys:
            bias = args[1].new_zeros(self.num_keys)
            bias[-1] = math.log(self.copies)
            kwargs["attn_mask"] = bias.expand(args[0].shape[2], -1)
        return func(*args, **kwargs)


class Flux(FlowTransformer):
    """FLUX.1: dev, which is told its guidance, or schnell."""

    packing, max_tokens = 4, 512

    def states(self, models: Parts, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Text states (B, L, D) and pooled state (B, P)."""
        states, pooled, _ = models.pipeline.encode_prompt(prompts, None, device=models.device)
        return states, pooled

    def denoiser(self, models: Parts, network: Any) -> Denoiser:
        """The transformer on packed latents, told 1000 σ and, of dev, the guidance."""
        assert isinstance(models.schedule, Flow)
        return FluxDenoiser(network, models.schedule, self.widths(network.config))

    def patch(self, network: Any) -> int:
        """Two: latents are packed before they reach the transformer."""
        return 2


class FluxDenoiser(Adapted):
    """FLUX's transformer in the common form.

    Args:
        network: the transformer, on latents in 2×2 patches.
        schedule: of the times that it is told.
        widths: of text and pooled states.
    """

    def __init__(self, network: Any, schedule: Flow, widths: tuple[int, int]) -> None:
        self.network, self.schedule, self.widths = network, schedule, widths
        self.config = SimpleNamespace(time_cond_proj_dim=1 if network.config.guidance_embeds else None)

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Tensor, told: Tensor | None) -> Tensor:
        """Prediction (B, C, h, w)."""
        rows, columns = (side // 2 for side in sample.shape[2:])
        states, pooled = _parted(conditioning, self.widths)
        places = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(rows)), torch.arange(float(columns)))
        output = self.network(
            hidden_states=pack(sample),
            timestep=self.schedule.times(timestep.expand(len(sample))).to(sample.dtype) / 1000,
            guidance=None if told is None else told[:, 0] + 1,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=places.to(states),
            return_dict=False,
        )[0]
        return unpack(output, rows, columns)

    def arranged(self, noise: Tensor) -> Tensor:
        """Noise (B, C, h, w) in the order in which a scheduler of the pipeline draws it, for packed latents."""
        packed = pack(noise)
        return unpack(noise.reshape(packed.shape), noise.shape[2] // 2, noise.shape[3] // 2)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens of 2×2 patches, (B, h/2 · w/2, 4C)."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`pack`: (B, rows · columns, 4C) as (B, C, 2 · rows, 2 · columns)."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, columns)), 2)


STABLE_DIFFUSION = StableDiffusion()
FAMILIES: Mapping[str, Piped] = {
    "StableDiffusionXLPipeline": SDXL(),
    "StableDiffusion3Pipeline": SD3(),
    "FluxPipeline": Flux(),
}


def read_flow(config: Mapping[str, Any], file: Path, tokens: int) -> Flow:
    """The schedule of a flow's scheduler.

    Args:
        config: of the scheduler.
        file: for messages.
        tokens: of an image in the transformer, which a dynamic shift depends on.

    Raises:
        UsageError: another scheduler, one with a grid that few steps are not trained on, or no number where one is due.
    """
    name = config.get("_class_name")
    if name not in FLOW_SCHEDULERS:
        raise UsageError(f"{file}: scheduler {name!r} cannot do few steps of a flow; use {FLOW_SCHEDULERS[0]}")
    if on := [key for key in _OTHER_GRIDS if config.get(key)]:
        raise UsageError(f"{file}: {on[0]} is on, which is not trained with here; set it to null or false")
    if (num := config.get("num_train_timesteps", FLOW_TIMES)) != FLOW_TIMES:
        raise UsageError(f"{file}: num_train_timesteps {num!r:.80}; flows are trained here with {FLOW_TIMES}")
    if not config.get("use_dynamic_shifting"):
        return _ascending(Flow.shifted(float(read_number(config, "shift", 1.0, file))), file)
    numbers = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    first, last, low, high = (read_number(config, key, default, file) for key, default in numbers.items())
    if not first < last:
        raise UsageError(f"{file}: max_image_seq_len {last} is not above base_image_seq_len {first}; {REMEDY}")
    shift = low + (tokens - first) * (high - low) / (last - first)
    if config.get("time_shift_type") != "linear":
        shift = math.exp(min(shift, LARGEST))
    return _ascending(Flow.shifted(shift), file)


def _ascending(flow: Flow, file: Path) -> Flow:
    """The flow itself, where each of its times is noisier than the one before."""
    if not (flow.sigmas.diff() > 0).all():
        raise UsageError(f"{file}: a shift so far from 1 leaves few steps of a flow alike; {REMEDY}")
    return flow


def flow_scheduler(config: Mapping[str, Any]) -> FlowMatchLCMScheduler:
    """diffusers' few-step sampler on the path of a teacher's scheduler."""
    keys = (
        *("num_train_timesteps", "shift", "use_dynamic_shifting", "time_shift_type"),
        *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    )
    return FlowMatchLCMScheduler(**{key: config[key] for key in keys if config.get(key) is not None})
