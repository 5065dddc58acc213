"""Latent consistency distillation (LCD): LCM, arXiv 2310.04378, algorithm 1; docs/method.md, "LCD, one step".

| symbol | name | meaning, shape |
|---|---|---|
| z | ``latents`` | VAE latents × ``scaling_factor``, (B, C, h, w) |
| t_{n+k}, t_n | ``start_timesteps``, ``timesteps`` | the DDIM grid point drawn and the one k below it, (B,) int64 |
| w | ``guidance_scale`` | LCM-form guidance, (B,) |
| f_θ, f_θ⁻, ψ | ``student``, ``target``, ``teacher`` | online network, its EMA, frozen teacher |
| c, ∅ | ``prompt_embeds``, ``uncond_embeds`` | text-encoder states of the prompt, of the empty prompt, (B, L, D) |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler, TCDScheduler
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.core.io import read_json
from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.diffusion.consistency import consistency_function, guidance_embedding, pseudo_huber, squared_error
from rgbench.diffusion.ddim import grid_timesteps, guided_ddim_step
from rgbench.diffusion.schedule import Flow, Schedule, add_noise
from rgbench.models.families import Denoiser, flow_scheduler
from rgbench.models.pipeline import GAMMA_KEY, STEPS_KEY, DiffusionModels
from rgbench.models.student import Learned, is_lora, make_lora_student, make_student, present, trainable
from rgbench.train.base import CaptionTokenizer, Network, OptimiserGroup, Stateful, StepDraws, StepResult, autocast
from rgbench.train.cache import encode
from rgbench.train.export import export_pipeline
from rgbench.train.recipe import LCDRecipe, LCDSection, LoRASection

FLOW_KINDS = ("lcd", "rg_lcd", "lrm")
FINEST_FLOW = 500  # N whose lowest grid point is above 0
# The part of a teacher's scheduler configuration that is the noise schedule, not its sampler.
SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


@dataclass(frozen=True)
class Networks:
    """ψ, f_θ and f_θ⁻ as :meth:`DiffusionModels.denoiser` calls them, with the noise schedule they share."""

    teacher: Denoiser
    student: Denoiser
    target: Denoiser
    schedule: Schedule
    prediction_type: str


@dataclass(frozen=True)
class Inputs:
    """One batch with its draws, from which lines 2–8 start.

    Attributes:
        latents, noise: (B, C, h, w).
        prompt_embeds, uncond_embeds: (B, L, D).
        index: into the ascending DDIM grid, (B,) int64.
        guidance_scale: w, (B,).
    """

    latents: Tensor
    noise: Tensor
    prompt_embeds: Tensor
    uncond_embeds: Tensor
    index: Tensor
    guidance_scale: Tensor


@dataclass(frozen=True)
class Distillation:
    """Results of lines 2–8; only ``prediction`` and ``losses`` carry gradient.

    Attributes:
        start_timesteps, timesteps: (B,) int64.
        noisy: z_{n+k}.
        w_embedding: what the student is told of w, (B, d); None for one without guidance embedding.
        prediction: f_θ(z_{n+k}), scaled latents.
        previous: z_n of the solver.
        target: f_θ⁻(z_n).
        losses: (B,).
    """

    start_timesteps: Tensor
    timesteps: Tensor
    noisy: Tensor
    w_embedding: Tensor | None
    prediction: Tensor
    previous: Tensor
    target: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Start:
    """Results of lines 2–4.

    Attributes:
        timesteps, lower: t_{n+k} and t_n, (B,) int64.
        noisy: z_{n+k}.
        w_embedding: (B, d); None for a student without guidance embedding.
    """

    timesteps: Tensor
    lower: Tensor
    noisy: Tensor
    w_embedding: Tensor | None


def start(networks: Networks, settings: LCDSection, inputs: Inputs) -> Start:
    """Lines 2–4 of the LCD step."""
    schedule = networks.schedule

    # 2. t_{n+k} from the N-point DDIM grid, and t_n = max(t_{n+k} − k, 0)
    timesteps, lower = grid_timesteps(inputs.index, len(schedule), settings.num_ddim_timesteps)

    # 3. z_{n+k} = α z + σ ε
    noisy = add_noise(inputs.latents, inputs.noise, timesteps, schedule)

    # 4. embedding of w, where the student has one
    dim = networks.student.config.time_cond_proj_dim
    return Start(timesteps, lower, noisy, guidance_embedding(inputs.guidance_scale, dim) if dim else None)


@torch.no_grad()
def solve(networks: Networks, settings: LCDSection, inputs: Inputs, begin: Start) -> Tensor:
    """Line 6 of the LCD step: z_n, by ``teacher_steps`` guided DDIM jumps; prompt and empty prompt in one call."""
    schedule, kind, num = networks.schedule, networks.prediction_type, settings.teacher_steps
    latents, timesteps = begin.noisy, begin.timesteps
    for i in range(1, num + 1):
        lower = begin.timesteps - ((begin.timesteps - begin.lower) * (i / num)).round().long()
        cond, uncond = teacher_outputs(networks.teacher, inputs, latents, timesteps, inputs.guidance_scale)
        latents = guided_ddim_step(cond, uncond, latents, timesteps, lower, inputs.guidance_scale, schedule, kind)
        timesteps = lower
    return latents


def distances(settings: LCDSection, prediction: Tensor, target: Tensor) -> Tensor:
    """Line 8 of the LCD step: pseudo-Huber or squared distance, the mean of each sample, (B,)."""
    if settings.loss == "huber":
        return pseudo_huber(prediction, target, settings.huber_c)
    return squared_error(prediction, target)


def predict(networks: Networks, settings: LCDSection, inputs: Inputs) -> tuple[Start, Tensor]:
    """Lines 2–5 of the LCD step: where it starts, and f_θ(z_{n+k}), (B, C, h, w)."""
    # 2–4. timesteps, noise, embedding of w
    begin = start(networks, settings, inputs)

    # 5. f_θ(z_{n+k}, w, c, t_{n+k}) = c_skip z_{n+k} + c_out x̂0
    output = call(networks.student, begin.noisy, begin.timesteps, inputs.prompt_embeds, begin.w_embedding)
    origin = (output, begin.noisy, begin.timesteps, networks.schedule, networks.prediction_type)
    return begin, consistency_function(*origin, settings.timestep_scaling)


def distil(
    networks: Networks,
    settings: LCDSection,
    inputs: Inputs,
    solver: Callable[[Start], Tensor] | None = None,
) -> Distillation:
    """Lines 2–8 of the LCD step.

    Args:
        networks: of the step.
        settings: of the recipe.
        inputs: the batch with its draws.
        solver: line 6, z_n of what lines 2–4 give; None for the teacher.
    """
    schedule, kind, scaling = networks.schedule, networks.prediction_type, settings.timestep_scaling
    # 2–5. timesteps, noise, embedding of w, and the student
    begin, prediction = predict(networks, settings, inputs)

    # 6. one guided DDIM jump of the teacher, or several
    previous = solve(networks, settings, inputs, begin) if solver is None else solver(begin)

    with torch.no_grad():
        # 7. f_θ⁻(z_n, w, c, t_n) with its own boundary scalings
        output = call(networks.target, previous, begin.lower, inputs.prompt_embeds, begin.w_embedding)
        target = consistency_function(output, previous, begin.lower, schedule, kind, scaling)

    # 8. pseudo-Huber or squared distance, the mean of each sample
    losses = distances(settings, prediction, target)
    return Distillation(
        begin.timesteps, begin.lower, begin.noisy, begin.w_embedding, prediction, previous, target, losses
    )


def teacher_outputs(
    teacher: Denoiser, inputs: Inputs, latents: Tensor, timesteps: Tensor, guidance_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs on the prompt and on the empty prompt, (B, C, h, w) each, of one call.

    A teacher that is told w is guided by itself: its one output stands for both, so that c + w(c − u) is c.

    Args:
        teacher: of the step.
        inputs: with text states.
        latents: z_t, (B, C, h, w).
        timesteps: t, (B,) int64.
        guidance_scale: w, (B,).
    """
    if dim := teacher.config.time_cond_proj_dim:
        output = call(teacher, latents, timesteps, inputs.prompt_embeds, guidance_embedding(guidance_scale, dim))
        return output, output
    embeds = torch.cat([inputs.prompt_embeds, inputs.uncond_embeds])
    cond, uncond = call(teacher, torch.cat([latents] * 2), torch.cat([timesteps] * 2), embeds).chunk(2)
    return cond, uncond


def call(
    unet: Denoiser, latents: Tensor, timesteps: Tensor, embeds: Tensor, w_embedding: Tensor | None = None
) -> Tensor:
    """Model output (B, C, h, w) in the latents' dtype: what follows an autocast network is not rounded again."""
    output = unet(latents, timesteps, encoder_hidden_states=embeds, timestep_cond=w_embedding, return_dict=False)[0]
    return output.to(latents.dtype)


@torch.no_grad()
def ema_update(target: nn.Module, student: nn.Module, decay: float) -> None:
    """θ⁻ ← μ θ⁻ + (1 − μ) θ over the parameters that learn, in place, μ = ``decay``."""
    pairs = zip(target.parameters(), student.parameters(), strict=True)
    averages, values = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
    torch._foreach_lerp_(averages, values, 1 - decay)


def new_student(recipe: LCDRecipe, models: DiffusionModels, lora: LoRASection | None, teacher: Any = None) -> Any:
    """What learns from a teacher's network, or another one of its shape: a copy of it, or adapters on it."""
    dim, teacher = recipe.lcd.time_cond_proj_dim, teacher or models.unet
    if lora is None:
        return make_student(teacher, dim)
    modules = lora.modules or present(teacher, models.family.lora_modules)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return make_lora_student(teacher, dim, rank=lora.rank, alpha=alpha, modules=modules, seed=recipe.seed)


def check_flow(recipe: LCDRecipe) -> None:
    """Refuse what is not trained along a flow.

    Raises:
        UsageError: another method, or a grid with t = 0.
    """
    if recipe.kind not in FLOW_KINDS:
        raise UsageError(f"kind {recipe.kind}: is not trained along a flow; use one of {', '.join(FLOW_KINDS)}")
    if recipe.lcd.num_ddim_timesteps > FINEST_FLOW:
        raise UsageError(
            f"lcd.num_ddim_timesteps {recipe.lcd.num_ddim_timesteps}: t = 0 is the end of a flow; use {FINEST_FLOW} at "
            "most"
        )


class LCD:
    """The LCD trainer, and what other distillation methods share with it.

    Args:
        recipe: validated.
        models: the teacher's parts, frozen.
    """

    def __init__(self, recipe: LCDRecipe, models: DiffusionModels) -> None:
        self.recipe, self.models = recipe, models
        if isinstance(models.schedule, Flow):
            check_flow(recipe)
        self.student, self.target = (new_student(recipe, models, recipe.lora) for _ in range(2))  # equal at first
        self.target.requires_grad_(False)
        teacher, student, target = map(models.denoiser, (models.unet, self.student, self.target))
        self.networks = Networks(teacher, student, target, models.schedule, models.prediction_type)
        with autocast(recipe.train.dtype, models.device.type):  # as the prompts, from which guidance subtracts it
            self.uncond_embeds = models.encode_empty()

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> LCD:
        """The trainer of a recipe; subclasses load their rewards here."""
        return cls(recipe, models)

    def optimiser_groups(self) -> dict[str, OptimiserGroup]:
        """The student."""
        train = self.recipe.train
        return {"student": OptimiserGroup(trainable(self.student), train.lr, train)}

    def modules(self) -> dict[str, Stateful]:
        """Student and target; of a LoRA student the adapters."""
        networks = {"student": self.student, "target": self.target}
        return {k: Learned(v, self.student) for k, v in networks.items()} if is_lora(self.student) else networks

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """No reward."""
        return []

    def tokenizers(self) -> dict[str, CaptionTokenizer]:
        """Those of the text encoders."""
        return {name: CaptionTokenizer(*limits) for name, limits in self.models.text_limits().items()}

    def prepare(self, batch: Batch, rng: StepDraws) -> Inputs:
        """Line 1 and the draws of lines 2–4, the same for every method at one seed."""
        models, settings = self.models, self.recipe.lcd
        device, shape = models.device, models.latent_shape
        # 1. latents = vae.encode(image).sample() · scaling_factor
        encoded = encode(models, batch)
        latents = (encoded.mean + encoded.std * rng.normal("vae", shape).to(device)) * models.scaling_factor
        return Inputs(
            latents=latents,
            noise=rng.normal("noise", shape).to(device),
            prompt_embeds=encoded.prompt_embeds,
            uncond_embeds=self.uncond_embeds.expand_as(encoded.prompt_embeds),
            index=rng.integers("index", settings.num_ddim_timesteps).to(device),
            guidance_scale=rng.uniform("w", settings.w_min, settings.w_max).to(device),
        )

    def distil(self, inputs: Inputs) -> Distillation:
        """Lines 2–8, which other distillation methods replace."""
        return distil(self.networks, self.recipe.lcd, inputs)

    def moves(self, step: int) -> bool:
        """Whether the student moves at an optimiser step, from 0."""
        return (step + 1) % self.recipe.ratio == 0

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """Lines 1–8."""
        return StepResult({"student": {"lcd": self.distil(self.prepare(batch, rng)).losses}})

    def watch(self, step: int, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Nothing."""
        return {}

    def after_update(self, moved: Collection[str]) -> None:
        """Line 9, whose AdamW and clipping are the loop's: θ⁻ ← μ θ⁻ + (1 − μ) θ."""
        if "student" in moved:
            ema_update(self.target, self.student, self.recipe.train.ema_decay)

    def network(self, name: Network | None = None) -> Any:
        """The EMA or the online network; the recipe's ``sampling.network`` by default."""
        return self.target if (name or self.recipe.sampling.network) == "target" else self.student

    def scheduler(self) -> LCMScheduler | TCDScheduler | FlowMatchLCMScheduler:
        """diffusers' sampler on the training grid: TCD's where the recipe has a γ, else LCM's with its scaling."""
        config = read_json(self.models.path / "scheduler" / "scheduler_config.json")
        if isinstance(self.models.schedule, Flow):
            flow = flow_scheduler(config)
            flow.register_to_config(**{STEPS_KEY: self.recipe.lcd.num_ddim_timesteps})  # to diffusers, say sigmas
            return flow
        options = {key: config[key] for key in SCHEDULE_KEYS if key in config}
        options |= {"original_inference_steps": self.recipe.lcd.num_ddim_timesteps}
        options |= {"clip_sample": False, "set_alpha_to_one": False}
        options |= {"steps_offset": 1}  # unused here; StableDiffusionPipeline warns of any other value
        if self.recipe.gamma is not None:
            scheduler = TCDScheduler(**options)
            scheduler.register_to_config(**{GAMMA_KEY: self.recipe.gamma})  # for rgbench; to diffusers, say eta
            return scheduler
        return LCMScheduler(**options, timestep_scaling=self.recipe.lcd.timestep_scaling)

    def sample(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of the network that is exported, sampled as the recipe says."""
        settings, lcd = self.recipe.sampling, self.recipe.lcd
        models = self.models.with_student(
            self.network(), lcd.num_ddim_timesteps, lcd.timestep_scaling, self.recipe.gamma
        )
        return models.sample(prompts, generators, num_steps=settings.steps, guidance_scale=settings.guidance_scale)

    def export(self, run: RunDirectory) -> Path:
        """Write the student as a diffusers pipeline; returns its folder."""
        export_pipeline(self, run.read(), run.pipeline)
        return run.pipeline
