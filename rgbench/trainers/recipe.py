"""What a training recipe may say: one pydantic model per section, defaults with their source.

Defaults are those of the full-size method (docs/method.md, "Defaults at full scale"); the benchtop's numbers stand
in its recipe files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rgbench.config import Section, apply_overrides, find_recipe, load_yaml, validate
from rgbench.data.config import DataConfig
from rgbench.rewards.config import Process, RewardConfig, Sum
from rgbench.trainers.model_config import LoRASection, ModelSection
from rgbench.trainers.proxy_config import PretrainProxySection, ProxySection

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# What a run may be gone on with changed: how it computes and what it keeps, and where things lie, since the contents of
# a teacher, reward and data set are compared by their hashes.
FREE_KEYS = frozenset(
    {f"train.{key}" for key in ("gradient_accumulation_steps", "gradient_checkpointing", "compile", "num_workers")}
    | {f"train.{key}" for key in ("save_every", "keep_checkpoints", "sample_every", "log_every")}
    | {"train.wandb", "train.latents_cache", "train.latents_cache_root"}
    | {f"{section}.path" for section in ("model", "data", "reward", "proxy", "reward.terms.*")}
    | {f"{reward}.{key}" for reward in ("reward", "reward.terms.*") for key in ("head_path", "version")}
    | {f"{reward}.{key}" for reward in ("reward", "reward.terms.*") for key in ("python", "device", "timeout")}
)


class TrainSection(Section):
    """Optimisation and bookkeeping.

    Attributes:
        steps: optimiser steps (LCM: 10,000).
        batch_size: images per optimiser step, over all processes and micro-batches (16 per GPU).
        gradient_accumulation_steps: micro-batches per optimiser step in each process; more take less memory.
        gradient_checkpointing: compute activations twice instead of keeping them.
        compile: ``torch.compile`` the UNets; minutes at the start, faster steps on a GPU.
        lr: AdamW's learning rate of the student, constant.
        betas: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this L2 norm.
        ema_decay: of the target network, every step.
        save_every: steps between checkpoints.
        keep_checkpoints: how many of the newest stay.
        sample_every: steps between sample grids; 0 for none.
        log_every: steps between log lines.
        dtype: of the networks' arithmetic. ``bfloat16`` and ``float16`` are mixed precision: autocast over float32
            weights, ``float16`` with a loss scale.
        latents_cache: ``auto`` takes VAE moments and text states from the cache of this data and model where one was
            made (``rgbench cache``), ``always`` insists on it, ``never`` encodes in every step.
        latents_cache_root: folder of caches; null for ``$XDG_CACHE_HOME/rgbench/latents``.
        wandb: project at Weights & Biases that is told what TensorBoard is told; null for none.
        num_workers: threads that read data ahead; 0 reads between steps.
    """

    steps: Count = 10_000
    batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    lr: Positive = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    ema_decay: Decay = 0.95
    save_every: Count = 500
    keep_checkpoints: Count = 2
    sample_every: Annotated[int, Field(ge=0)] = 500
    log_every: Count = 10
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    wandb: str | None = None
    latents_cache: Literal["auto", "always", "never"] = "auto"
    latents_cache_root: str | None = None
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0


class LCDSection(Section):
    """Consistency distillation (docs/method.md, "LCD, one step").

    Attributes:
        num_ddim_timesteps: N, points of the solver's grid.
        w_min: lower end of the guidance drawn, LCM form.
        w_max: upper end.
        loss: ``huber`` or ``l2``.
        huber_c: c of the pseudo-Huber loss.
        timestep_scaling: s of the boundary scalings.
        time_cond_proj_dim: d of the guidance embedding; null for a student that is not told w, as LCM-LoRA
            (arXiv 2311.05556): it is then sampled at guidance 1 to 2.
    """

    num_ddim_timesteps: Annotated[int, Field(ge=1, le=1000)] = 50
    w_min: NonNegative = 5.0
    w_max: NonNegative = 15.0
    loss: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 0.001
    timestep_scaling: Positive = 10.0
    time_cond_proj_dim: Annotated[int, Field(ge=4)] | None = 256

    @model_validator(mode="after")
    def _ordered(self) -> LCDSection:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is above w_max {self.w_max}")
        return self


class GradientsSection(Section):
    """Accounting of the distillation's and the reward's gradient; logged, never part of the training.

    Attributes:
        at_prediction: norms and angle at the student's prediction, every step, per timestep bin; costs no backward
            pass.
        bins: ranges of timesteps that are told apart.
        every: steps between measurements over all of the student's parameters, which take two more backward passes
            and the memory of two gradients; 0 for none.
    """

    at_prediction: bool = True
    bins: Annotated[int, Field(ge=1, le=50)] = 4
    every: Annotated[int, Field(ge=0)] = 0


class SamplingSection(Section):
    """How the student is sampled, in the sample grids and by default in evaluation.

    Attributes:
        steps: network evaluations per image.
        guidance_scale: in the pipelines' form; the student is given w = guidance_scale − 1.
        network: ``target``, the EMA, or ``student``, the online network; what is sampled and exported.
    """

    steps: Count = 4
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 8.5
    network: Literal["target", "student"] = "target"


def check_logged(key: str, every: int, log_every: int) -> None:
    """Refuse measurements at steps that are not logged.

    Raises:
        ValueError: ``every`` is no multiple of ``log_every``.
    """
    if every % log_every:
        raise ValueError(f"{key} {every} is no multiple of train.log_every {log_every}: it would not be logged")


class BaseRecipe(Section):
    """What every recipe has. Attributes are the sections of the file."""

    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSection
    data: DataConfig
    train: TrainSection = TrainSection()


class LCDRecipe(BaseRecipe):
    """``kind: lcd``."""

    kind: Literal["lcd"]  # type: ignore[assignment]
    lcd: LCDSection = LCDSection()
    lora: LoRASection | None = None
    sampling: SamplingSection = SamplingSection()

    @model_validator(mode="after")
    def _steps_on_grid(self) -> LCDRecipe:
        if self.sampling.steps > self.lcd.num_ddim_timesteps:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} exceeds lcd.num_ddim_timesteps {self.lcd.num_ddim_timesteps}"
            )
        if self.lcd.time_cond_proj_dim is None and self.sampling.guidance_scale > 2:
            raise ValueError(
                f"sampling.guidance_scale {self.sampling.guidance_scale} guides a student that is guided already: "
                "without lcd.time_cond_proj_dim it belongs between 1 and 2"
            )
        return self


class RGLCDRecipe(LCDRecipe):
    """``kind: rg_lcd``: LCD and a reward on the decoded prediction."""

    kind: Literal["rg_lcd"]  # type: ignore[assignment]
    reward: RewardConfig
    gradients: GradientsSection = GradientsSection()

    @model_validator(mode="after")
    def _measurements_are_logged(self) -> RGLCDRecipe:
        check_logged("gradients.every", self.gradients.every, self.train.log_every)
        self.refuse_float16("gradients.every", self.gradients.every)
        self.refuse_float16("reward.balance", isinstance(self.reward, Sum) and self.reward.balance == "gradient")
        if self.kind == "rg_lcd" and self.reward.logit_scale is not None:
            raise ValueError("reward.logit_scale: rg_lcd takes the raw score; it is for lrm")
        terms = self.reward.terms if isinstance(self.reward, Sum) else [self.reward]
        if self.kind == "rg_lcd" and any(isinstance(term, Process) for term in terms):
            raise ValueError(
                "reward.kind: a process gives no gradient, and rg_lcd needs it; lrm learns from its scores alone"
            )
        return self

    def refuse_float16(self, key: str, asked: int | bool) -> None:
        """Gradients that are taken apart from the losses' own know no loss scale: float16 would round them to zero."""
        if asked and self.train.dtype == "float16":
            raise ValueError(f"{key}: takes gradients that float16 may round to zero; use train.dtype: bfloat16")


class LRMRecipe(RGLCDRecipe):
    """``kind: lrm``: the reward reaches the student through the latent proxy."""

    kind: Literal["lrm"]  # type: ignore[assignment]
    proxy: ProxySection = ProxySection()

    @model_validator(mode="after")
    def _fidelity_is_logged(self) -> LRMRecipe:
        check_logged("proxy.fidelity.every", self.proxy.fidelity.every, self.train.log_every)
        self.refuse_float16("proxy.fidelity.every", self.proxy.fidelity.every)
        if isinstance(self.reward, Sum) and self.reward.balance == "gradient":
            raise ValueError("reward.balance: lrm takes labels from the sum, not its gradient; use none")
        return self


class PretrainTrainSection(TrainSection):
    """As for students, whose sample grids, EMA and UNet a proxy has not."""

    sample_every: Literal[0] = 0  # type: ignore[assignment]
    ema_decay: Annotated[float, Field(ge=0, le=0)] = 0.0
    gradient_checkpointing: Literal[False] = False  # type: ignore[assignment]
    compile: Literal[False] = False  # type: ignore[assignment]


class LRMPretrainRecipe(BaseRecipe):
    """``kind: lrm_pretrain``: the latent proxy's contrastive pre-training on (latent, caption) pairs."""

    kind: Literal["lrm_pretrain"]  # type: ignore[assignment]
    train: PretrainTrainSection = PretrainTrainSection()
    proxy: PretrainProxySection = PretrainProxySection()


Recipe = Annotated[LCDRecipe | RGLCDRecipe | LRMRecipe | LRMPretrainRecipe, Field(discriminator="kind")]


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Any:
    """Read, override and validate a recipe.

    Args:
        name_or_path: a YAML file, or the name of a packaged recipe.
        overrides: ``key.path=value`` settings.

    Returns:
        The recipe of its ``kind``.

    Raises:
        ConfigError: names the file, the line and the key at fault.
        UsageError: no such recipe.
    """
    path = find_recipe(name_or_path)
    values, lines = load_yaml(path)
    given = overrides or []
    return validate(Recipe, apply_overrides(values, given), lines, path, given)
