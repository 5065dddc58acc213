"""What a training recipe may say: one pydantic model per section, defaults with their source.

Defaults are those of the full-size method (docs/method.md, "Defaults at full scale"); the benchtop's numbers stand
in its recipe files.

What a recipe may say of its teacher, and of what of the student learns.

What a recipe may say of the latent proxy: what learns, how, how it is checked, and how it is pre-trained.

Where an LRM's latent proxy lies, what its pre-training starts from, and the command that makes one.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rgbench.core.config import Section, apply_overrides, find_recipe, load_yaml, validate
from rgbench.core.errors import UsageError, suggest
from rgbench.data.config import DataConfig
from rgbench.models.presets import PRESETS, HubFiles, Preset, find_preset
from rgbench.rewards.config import HPS, Process, RewardConfig, Sum, find_published

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class ModelSection(Section):
    """The teacher; exactly one of the two.

    Attributes:
        preset: ``benchtop``, ``sd15``, ``sd21-base`` or ``sd21``.
        path: any local ``StableDiffusionPipeline`` folder that predicts epsilon, v or the sample.
    """

    preset: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSection:
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either model.preset or model.path")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset[:80]!r}; {suggest(self.preset, PRESETS)}")
        return self

    def find(self, key: str) -> Preset:
        """The preset, for a part whose own ``key`` is null.

        Raises:
            UsageError: the model is a folder, so ``key`` must be given.
        """
        if self.preset is None:
            raise UsageError(f"{key}: give a path; only a model.preset brings one with it")
        return find_preset(self.preset)

    def teacher_folder(self) -> Path:
        """The teacher's folder.

        Raises:
            UsageError: it is not there.
        """
        if self.path is None:
            return self.find("model.path").teacher_folder()
        if not Path(self.path).is_dir():
            presets = ", ".join(PRESETS)
            raise UsageError(
                f"model.path {self.path}: no such folder; give a diffusers pipeline folder, or model.preset ({presets})"
            )
        return Path(self.path)

    def published(self) -> dict[str, str]:
        """Repository and revision of a preset on the hub; empty for others."""
        teacher = PRESETS[self.preset].teacher if self.preset else None
        return {"repo": teacher.repo, "revision": teacher.revision} if isinstance(teacher, HubFiles) else {}

    @property
    def world(self) -> str:
        """Name under which results are kept: the preset's or the folder's."""
        return self.preset or Path(str(self.path)).resolve().name


class LoRASection(Section):
    """Low-rank adapters in place of full fine-tuning (LoRA, arXiv 2106.09685): W + (α/r)·B·A, of which A and B learn.

    Attributes:
        rank: r (LCM-LoRA: 64).
        alpha: α; null for the rank, so that the factor is 1.
        modules: ends of the names of the layers that are adapted; null for LCM-LoRA's: attention, feed-forward,
            convolutions and time embedding projections.
    """

    rank: Count = 64
    alpha: Positive | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


Layers = Annotated[int, Field(ge=0)] | Literal["all"]


class TrainableSection(Section):
    """What of the latent proxy learns; its logit scale always does.

    Attributes:
        image_layers: the last n image blocks with the final norm and the projection; 0 for none, ``all`` for the
            whole tower with its embeddings.
        text_layers: the same of the text tower.
    """

    image_layers: Layers = 1
    text_layers: Layers = 5


class ScheduleSection(Section):
    """How a learning rate changes over the run.

    Attributes:
        schedule: after the warm-up: ``constant``, or ``linear`` or ``cosine`` down to nothing at the last step.
        warmup: steps of linear rise from nothing.
    """

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0


class OptimiserSection(ScheduleSection):
    """The proxy's own AdamW, beside the student's.

    Attributes:
        betas: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: the proxy's gradient is clipped to this L2 norm.
    """

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


class FidelitySection(Section):
    """How well the proxy stands for its expert, on samples of the student that it does not learn from.

    Attributes:
        every: steps between measurements; 0 for none.
        prompts: prompts looked at, the first of ``data``.
        samples: student samples for each prompt and timestep bin, which are ranked among themselves.
        bins: ranges of timesteps.
        data: where prompts and ground truths come from; null: the training data, with noise of its own.
        gate: hold the reward back while Kendall's τ is under this; null: never.
    """

    every: Annotated[int, Field(ge=0)] = 0
    prompts: Count = 8
    samples: Annotated[int, Field(ge=2)] = 4
    bins: Annotated[int, Field(ge=1, le=20)] = 4
    data: DataConfig | None = None
    gate: Annotated[float, Field(gt=-1, lt=1)] | None = None

    @model_validator(mode="after")
    def _measured(self) -> FidelitySection:
        if self.gate is not None and not self.every:
            raise ValueError("a gate needs every, the steps between measurements")
        return self


class ProxySection(Section):
    """The latent proxy and how it learns from its expert (docs/method.md, "RG-LCD + LRM").

    Attributes:
        path: a latent CLIP folder; null for the preset's.
        lr: AdamW's learning rate of the proxy.
        loss: ``kl``, ``smooth`` or ``cross_entropy`` over pairs.
        trainable: what of it learns.
        optimiser: the rest of its AdamW.
        fidelity: how it is checked.
    """

    path: str | None = None
    lr: Positive = 3.3e-6
    loss: Literal["kl", "smooth", "cross_entropy"] = "kl"
    trainable: TrainableSection = TrainableSection()
    optimiser: OptimiserSection = OptimiserSection()
    fidelity: FidelitySection = FidelitySection()


class VisionSection(Section):
    """A fresh image tower: ViT on latents. Defaults are the full-size proxy's.

    Attributes:
        patch_size: in latent pixels.
        layers: transformer blocks.
        width: of the residual stream.
        head_width: of one attention head.
    """

    patch_size: Count = 4
    layers: Count = 12
    width: Count = 512
    head_width: Count = 64

    @model_validator(mode="after")
    def _whole_heads(self) -> VisionSection:
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is no multiple of head_width {self.head_width}")
        return self


class PretrainProxySection(Section):
    """The latent proxy that is pre-trained: the text tower of a CLIP, an image tower of its own.

    Attributes:
        clip: an open_clip folder, or a file of ViT-H-14 weights such as an HPS checkpoint; null for the preset's
            reward, which is one.
        vision: the image tower.
        trainable: what learns.
        optimiser: the schedule of ``train.lr``.
    """

    clip: str | None = None
    vision: VisionSection = VisionSection()
    trainable: TrainableSection = TrainableSection(image_layers="all", text_layers=5)
    optimiser: ScheduleSection = ScheduleSection(schedule="cosine")


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


PROXY_FOLDER = "latent_proxy"  # in the run of a pre-training


class MissingProxy(UsageError):
    """A latent proxy that has to be pre-trained first.

    Args:
        what: names the key and the folder.
        command: makes it.
    """

    def __init__(self, what: str, command: str) -> None:
        self.what, self.command = what, command
        super().__init__(f"{what}; pre-train one with: {command}")


def find_proxy(recipe: LRMRecipe) -> Path:
    """The latent CLIP folder that a recipe names, or the preset's.

    Raises:
        MissingProxy: it is not there.
        UsageError: neither is named.
    """
    if recipe.proxy.path is not None:
        folder = Path(recipe.proxy.path)
        if not folder.is_dir():
            raise MissingProxy(f"proxy.path {folder}: no such folder", pretrain_command(recipe))
        return folder
    preset = recipe.model.find("proxy.path")
    if preset.latent_proxy is None:
        what = f"proxy.path: nobody has published a latent CLIP for {preset.name}; name one, of your own training"
        raise MissingProxy(what, pretrain_command(recipe))
    return preset.latent_proxy_folder()


def pretrain_command(recipe: LRMRecipe) -> str:
    """The command that pre-trains a proxy for a recipe: its model and data, written where the recipe looks."""
    base = "lrm_pretrain" if recipe.model.preset == "benchtop" else "sd21/lrm_pretrain"
    wanted = load_recipe(base)
    words = ["rgbench", "train", base]
    if recipe.model != wanted.model:
        words += [f"model={_flow(recipe.model.model_dump(exclude_none=True))}"]
    if isinstance(recipe.reward, HPS) and recipe.reward.path is not None:
        words += [f"proxy.clip={recipe.reward.path}"]
    if recipe.data != wanted.data:
        words += [f"data={_flow(recipe.data.model_dump(exclude_defaults=True) | {'kind': recipe.data.kind})}"]
    path = Path(recipe.proxy.path or "")
    if path.name == PROXY_FOLDER:
        words += ["--out", str(path.parent)]
    return shlex.join(words)


def _flow(section: dict[str, object]) -> str:
    """A section as the value of an override, which is YAML."""
    return json.dumps(section, ensure_ascii=False)


def find_clip(recipe: LRMPretrainRecipe) -> Path:
    """The CLIP whose text tower a pre-training starts from: the recipe's, the preset's reward, or HPSv2.1.

    Raises:
        UsageError: it is not there; says how to get it.
    """
    if recipe.proxy.clip is not None:
        return Path(recipe.proxy.clip)
    if recipe.model.preset is not None:
        return recipe.model.find("proxy.clip").reward_folder()
    return find_published("hps 2.1", "proxy.clip")
