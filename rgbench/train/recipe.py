"""Training recipes: one pydantic model a section, defaults with their source.

Defaults are those of the full-size method (docs/method.md, "Defaults at full scale"); the benchtop's recipes carry
their own numbers.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rgbench.core.config import Section, apply_overrides, find_recipe, load_yaml, validate
from rgbench.core.errors import ConfigError, UsageError, suggest
from rgbench.data.config import DataConfig, TeacherData
from rgbench.models.presets import BENCHTOPS, PRESETS, HubFiles, Preset, find_preset
from rgbench.rewards.config import HPS, Process, RewardConfig, Sum, find_published

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Interval = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Timestep = Annotated[int, Field(ge=0, le=999)]
Layers = Annotated[int, Field(ge=0)] | Literal["all"]

# Keys of which one takes the place of the other.
RIVALS = (("model.preset", "model.path"), ("guidance.scale", "guidance.share"))
PROXY_FOLDER = "latent_proxy"  # in the run of a pre-training


class ModelSection(Section):
    """The teacher: a preset or a folder.

    Attributes:
        preset: ``benchtop``, ``benchtop-flow``, ``sd15``, ``sd21-base``, ``sd21``, ``sdxl``, ``sd35-medium`` or
            ``flux-dev``.
        path: a local pipeline folder of Stable Diffusion 1 to 3.5, SDXL or FLUX.1.
        resolution: image side in pixels; null for the model's own.
    """

    preset: str | None = None
    path: str | None = None
    resolution: Count | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSection:
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either model.preset or model.path")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset[:80]!r}; {suggest(self.preset, PRESETS)}")
        return self

    def find(self, key: str) -> Preset:
        """The preset, which brings the part whose recipe ``key`` is null.

        Raises:
            UsageError: the model is a folder, so ``key`` must be given.
        """
        if self.preset is None:
            raise UsageError(f"{key}: give a path; only a model.preset brings one with it")
        return find_preset(self.preset)

    def teacher_folder(self, weights: bool = True) -> Path:
        """The teacher's folder.

        Args:
            weights: False where its configurations and tokenizers are enough.

        Raises:
            UsageError: it is missing.
        """
        if self.path is None:
            return self.find("model.path").teacher_folder(weights)
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
        """Name under which results are stored: the preset's or the folder's."""
        return self.preset or Path(str(self.path)).resolve().name


class LoRASection(Section):
    """Low-rank adapters in place of full fine-tuning (LoRA, arXiv 2106.09685): W + (α/r)·B·A, of which A and B learn.

    Attributes:
        rank: r (LCM-LoRA: 64).
        alpha: α; null for the rank, so that the factor is 1.
        modules: name endings of the adapted layers; null for LCM-LoRA's: attention, feed-forward, convolutions and
            time embedding projections.
    """

    rank: Count = 64
    alpha: Positive | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None


class TrainSection(Section):
    """Optimisation, logging and saving.

    Attributes:
        steps: optimiser steps (LCM: 10,000).
        batch_size: images per optimiser step, over all processes and micro-batches (16 per GPU).
        gradient_accumulation_steps: micro-batches per optimiser step in each process; more take less memory.
        gradient_checkpointing: recompute activations instead of keeping them.
        compile: ``torch.compile`` the UNets: minutes at the start, faster steps on a GPU.
        shard: each process holds a part of teacher, student, target, gradients and optimiser state (torch's FSDP2), and
            gathers a block while it runs; of no effect on a single process.
        lr: the student's constant learning rate.
        betas: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this L2 norm.
        ema_decay: of the target network, every step.
        save_every: steps between checkpoints.
        keep_checkpoints: how many of the newest stay.
        sample_every: steps between sample grids; 0 for none.
        log_every: steps between log rows.
        dtype: of the networks' arithmetic. ``bfloat16`` and ``float16`` are mixed precision: autocast over float32
            weights, ``float16`` with a loss scale.
        latents_cache: ``auto`` reads VAE moments and text states from the cache of this data and model where
            ``rgbench cache`` made one, ``always`` requires it, ``never`` encodes in every step.
        latents_cache_root: folder of caches; null for ``$XDG_CACHE_HOME/rgbench/latents``.
        wandb: project at Weights & Biases that gets what TensorBoard gets; null for none.
        trackio: project of trackio that gets the same; null for none.
        num_workers: threads that read data ahead; 0 reads between steps.
    """

    steps: Count = 10_000
    batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    lr: Positive = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    ema_decay: Decay = 0.95
    save_every: Count = 500
    keep_checkpoints: Count = 2
    sample_every: Interval = 500
    log_every: Count = 10
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    wandb: str | None = None
    trackio: str | None = None
    latents_cache: Literal["auto", "always", "never"] = "auto"
    latents_cache_root: str | None = None
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0

    @model_validator(mode="after")
    def _shardable(self) -> TrainSection:
        if self.shard and self.dtype == "float16":
            raise ValueError("shard: float16's loss scale is of one process; use dtype: bfloat16")
        if self.shard and self.compile:
            raise ValueError("compile: networks in shards are not compiled; use shard: false, or compile: false")
        return self


class MonitorSection(Section):
    """What is measured of the student while it trains; logged, never part of the training.

    Attributes:
        oracle_every: steps between measurements of gold and the trained reward on images of the student, where the
            world has an oracle; 0 for none.
    """

    oracle_every: Interval = 0


class LCDSection(Section):
    """Consistency distillation (docs/method.md, "LCD, one step").

    Attributes:
        num_ddim_timesteps: N, points of the solver's grid.
        w_min: lower end of the guidance drawn, LCM form.
        w_max: upper end.
        loss: ``huber`` or ``l2``.
        huber_c: c of the pseudo-Huber loss.
        timestep_scaling: s of the boundary scalings.
        time_cond_proj_dim: d of the guidance embedding; null for a student without one, as LCM-LoRA
            (arXiv 2311.05556), which is sampled at guidance 1 to 2.
        teacher_steps: p, DDIM steps of the teacher from one grid point to the next (LCM: 1; DOLLAR, arXiv 2412.15689:
            5; each further one costs two network calls).
    """

    num_ddim_timesteps: Annotated[int, Field(ge=1, le=1000)] = 50
    w_min: NonNegative = 5.0
    w_max: NonNegative = 15.0
    loss: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 0.001
    timestep_scaling: Positive = 10.0
    time_cond_proj_dim: Annotated[int, Field(ge=4)] | None = 256
    teacher_steps: Count = 1

    @model_validator(mode="after")
    def _ordered(self) -> LCDSection:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is above w_max {self.w_max}")
        shortest = max(1000 // self.num_ddim_timesteps - 1, 1)  # from the lowest grid point to 0
        if self.teacher_steps > shortest:
            raise ValueError(
                f"teacher_steps {self.teacher_steps}: the grid of {self.num_ddim_timesteps} leaves {shortest} timesteps"
            )
        return self


class TCDSolverSection(LCDSection):
    """As for LCD, with TCD's numbers; a jump has no boundary scalings, so ``timestep_scaling`` cannot be set.

    Attributes:
        num_ddim_timesteps: at most 500, so that no grid point is 0.
        w_min, w_max: TCD: 2 to 14.
        loss: TCD: the squared error.
    """

    num_ddim_timesteps: Annotated[int, Field(ge=1, le=500)] = 50
    w_min: NonNegative = 2.0
    w_max: NonNegative = 14.0
    loss: Literal["huber", "l2"] = "l2"
    timestep_scaling: Annotated[float, Field(ge=10, le=10)] = 10.0


class TCDSection(Section):
    """Trajectory consistency distillation (docs/method.md, "TCD, one step").

    Attributes:
        s: where the student jumps: ``uniform`` on the grid points at or below t_n and 0; ``zero``, LCD without its
            boundary scalings; ``next``, t_n alone, regression on the teacher's step.
    """

    s: Literal["uniform", "zero", "next"] = "uniform"


class MLCMSolverSection(TCDSolverSection):
    """As for TCD, with TLCM's guidance (arXiv 2406.05768, v6): fixed, of which the student is not told.

    Attributes:
        w_min, w_max: TLCM: 8 in the pipelines' form.
        time_cond_proj_dim: null, as TLCM.
    """

    w_min: NonNegative = 7.0
    w_max: NonNegative = 7.0
    time_cond_proj_dim: Annotated[int, Field(ge=4)] | None = None


class StageSection(Section):
    """A stage of MLCM.

    Attributes:
        segments: M, into which the sampler's M timesteps cut the trajectory.
        steps: optimiser steps of the stage; null for the last, which lasts to the end.
    """

    segments: Count
    steps: Count | None = None


class MLCMSection(Section):
    """Multistep consistency distillation (docs/method.md, "MLCM, one step").

    Attributes:
        stages: one after another; networks and optimiser carry over (TLCM: 8 segments alone; Hyper-SD: 8, 4, 2, 1).
        target: the network that is followed: ``student``, the online network without gradient (TLCM, PCM), or
            ``ema``, its average (LCM, multistep consistency models).
        space: of the distance: at the segment's ``edge`` (TLCM, PCM), or of the ``x0`` that leads there (multistep
            consistency models, arXiv 2403.06807).
        weight: of the distance in x0: ``one``, or ``snr``: SNR + 1 (multistep consistency models).
    """

    stages: Annotated[tuple[StageSection, ...], Field(min_length=1, strict=False)] = (StageSection(segments=8),)
    target: Literal["ema", "student"] = "student"
    space: Literal["edge", "x0"] = "edge"
    weight: Literal["one", "snr"] = "one"

    @model_validator(mode="after")
    def _one_end(self) -> MLCMSection:
        *before, last = self.stages
        if last.steps is not None or any(stage.steps is None for stage in before):
            raise ValueError("stages: give each its steps, but not the last, which lasts to the end")
        if self.weight != "one" and self.space != "x0":
            raise ValueError("weight: is of the distance in x0; use space: x0, or weight: one")
        return self

    def segments(self, step: int) -> int:
        """M at an optimiser step, from 0."""
        for stage in self.stages[:-1]:
            assert stage.steps is not None
            if step < stage.steps:
                return stage.segments
            step -= stage.steps
        return self.stages[-1].segments


class WeightedSolverSection(LCDSection):
    """As for LCD; the guidance of the teacher's samples is trained in, and w is that of its jumps alone.

    Attributes:
        time_cond_proj_dim: null while ``weighted.share`` is above 0.
    """

    time_cond_proj_dim: Annotated[int, Field(ge=4)] | None = None


class WeightedSection(Section):
    """Advantage-weighted consistency training (docs/method.md, "Weighted consistency training").

    Attributes:
        weights: of the n samples of a prompt, mean 1: ``softmax`` of advantage / temperature, all on the ``best``,
            ``positive`` advantages alone, or ``none``.
        temperature: τ of the softmax.
        advantage: score minus the mean over the prompt's samples, divided by their standard deviation
            (``standardised``) or not (``centred``, which keeps prompts of near-equal scores quiet).
        share: of the samples whose z_n is noised data; the others take the teacher's jump, whose optimum no weight
            moves. 0 is LCD.
    """

    weights: Literal["softmax", "best", "positive", "none"] = "softmax"
    temperature: Positive = 1.0
    advantage: Literal["standardised", "centred"] = "standardised"
    share: Annotated[float, Field(ge=0, le=1)] = 1.0


class SamplingSection(Section):
    """How the student is sampled, in the sample grids and by default in evaluation.

    Attributes:
        steps: network evaluations per image.
        guidance_scale: g in the pipelines' form; the student gets w = g − 1.
        network: ``target``, the EMA, or ``student``, the online network; what is sampled and exported.
    """

    steps: Count = 4
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 8.5
    network: Literal["target", "student"] = "target"


class UntoldSamplingSection(SamplingSection):
    """As for LCD, without guidance.

    Attributes:
        guidance_scale: 1 where the guidance is trained in.
    """

    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0


class TCDSamplingSection(SamplingSection):
    """As for LCD, by TCD's sampler.

    Attributes:
        gamma: γ, diffusers' ``eta``: 0 is deterministic, 1 adds as much noise as LCM's sampler (TCD: 0.3).
    """

    gamma: Annotated[float, Field(ge=0, le=1)] = 0.3


class MLCMSamplingSection(TCDSamplingSection):
    """As for TCD, from edge to edge.

    Attributes:
        steps: as many as segments.
        guidance_scale: 1 where the guidance is trained in.
        gamma: 0, without noise.
    """

    steps: Count = 8
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0


class GuidanceSection(Section):
    """How the reward guides the student (docs/method.md, "RG-LCD"): by ``scale`` or by ``share``.

    Attributes:
        scale: β, weight of the reward against the distillation loss (RG-LCD: 1); null with a share.
        share: s in (0, 1), share of the reward in the gradient at the student's prediction. Each sample's β is
            s/(1 − s) · ‖∂L_LCD/∂f‖ / ‖∂R/∂f‖ (Esser et al. 2021, eq. 7, taken per sample, so that batch splits and
            ranks cannot change it).
        max_scale: upper bound of β under a share, for samples on which the reward is flat (Esser et al.: 10⁴).
        window: first and last timestep at which the reward guides; null: all.
        warmup: steps at which guidance begins and reaches its strength, with a linear rise between; null: full
            strength from the start.
        ceiling: reward above which a sample gets no guidance; null: none.
    """

    scale: NonNegative | None = 1.0
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_scale: Positive = 1e4
    window: Annotated[tuple[Timestep, Timestep], Field(strict=False)] | None = None  # not strict: a list for a tuple
    warmup: Annotated[tuple[Interval, Interval], Field(strict=False)] | None = None
    ceiling: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _share_alone(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("share") is not None:
            return {"scale": None, **values}
        return values

    @model_validator(mode="after")
    def _one_of_both(self) -> GuidanceSection:
        if (self.scale is None) == (self.share is None):
            raise ValueError("give scale with share: null, or share with scale: null")
        for name in ("window", "warmup"):
            ends = getattr(self, name)
            if ends and ends[0] > ends[1]:
                raise ValueError(f"{name} {list(ends)} ends before it begins")
        return self

    def ramp(self, step: int) -> float:
        """Factor of the guidance at an optimiser step, from 0, in [0, 1]."""
        if self.warmup is None:
            return 1.0
        begin, full = self.warmup
        return 1.0 if step >= full else max((step - begin) / (full - begin), 0.0)


class GradientsSection(Section):
    """Accounting of the distillation's and the reward's gradient; logged, never part of the training.

    Attributes:
        at_prediction: norms and angle at the student's prediction, every step, per timestep bin; costs no backward
            pass.
        bins: number of timestep bins.
        every: steps between measurements over all of the student's parameters, which take two more backward passes
            and the memory of two gradients; 0 for none.
    """

    at_prediction: bool = True
    bins: Annotated[int, Field(ge=1, le=50)] = 4
    every: Interval = 0


class TrainableSection(Section):
    """The part of the latent proxy that learns; its logit scale always does.

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
        schedule: after the warm-up: ``constant``, or ``linear`` or ``cosine`` down to zero at the last step.
        warmup: steps of linear rise from zero.
    """

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Interval = 0


class OptimiserSection(ScheduleSection):
    """The proxy's AdamW.

    Attributes:
        betas: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: the proxy's gradient is clipped to this L2 norm.
    """

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


class VSDSolverSection(LCDSection):
    """As for LCD, with DOLLAR's guidance: fixed, of which the student is not told.

    Attributes:
        w_min, w_max: DOLLAR: 7.5, as printed.
        time_cond_proj_dim: null, as DOLLAR.
        teacher_steps: DOLLAR: 5.
    """

    w_min: NonNegative = 7.5
    w_max: NonNegative = 7.5
    time_cond_proj_dim: Annotated[int, Field(ge=4)] | None = None
    teacher_steps: Count = 5


class FakeOptimiserSection(OptimiserSection):
    """The fake score's AdamW, with DMD2's numbers (arXiv 2405.14867).

    Attributes:
        weight_decay: DMD2: 0.01.
        max_grad_norm: DMD2: 10.
    """

    weight_decay: NonNegative = 0.01
    max_grad_norm: Positive = 10.0


class VSDSection(Section):
    """Variational score distillation beside consistency (docs/method.md, "DOLLAR, one step").

    Attributes:
        scale: weight of VSD (DOLLAR: 1).
        consistency: weight of the consistency term (DOLLAR: 0.5).
        ratio: optimiser steps of the fake score for one of the student, which moves at the last of them (DOLLAR: 5,
            DMD2 for SD1.5: 10).
        w: guidance of the real score, LCM form (DOLLAR: 3.5, as printed); null: each sample's own w, as a student that
            is told w needs it.
        path: pipeline folder whose UNet the fake score starts from, such as the teacher tuned on the student's images;
            null: the teacher.
        lora: adapters as the fake score, on the weights it starts from; null: a whole UNet.
        lr: the fake score's (DMD2 for SD1.5: 1e-5).
        optimiser: the rest of its AdamW.
    """

    scale: NonNegative = 1.0
    consistency: NonNegative = 0.5
    ratio: Count = 5
    w: NonNegative | None = 3.5
    path: str | None = None
    lora: LoRASection | None = None
    lr: Positive = 1e-5
    optimiser: FakeOptimiserSection = FakeOptimiserSection()


class FidelitySection(Section):
    """How well the proxy agrees with its expert, on samples of the student that it does not learn from.

    Attributes:
        every: steps between measurements; 0 for none.
        prompts: number of prompts, the first of ``data``.
        samples: student samples per prompt and timestep bin, which are ranked among themselves.
        bins: number of timestep bins.
        data: source of prompts and ground truths; null: the training data, with noise of its own.
        gate: switch the reward off while Kendall's τ is under this; null: never.
    """

    every: Interval = 0
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


class SmallSection(Section):
    """A fresh small proxy without CLIP, of 0.2 to 0.8 M parameters (DOLLAR, arXiv 2412.15689).

    Attributes:
        patch_size: side of the first convolution's patches, in latent pixels (DOLLAR: 4).
        width: of image and text tokens (DOLLAR: 128).
    """

    patch_size: Count = 4
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 128


class ProxySection(Section):
    """The latent proxy, and how it learns from its expert (docs/method.md, "RG-LCD + LRM").

    Attributes:
        path: a latent CLIP folder; null for the preset's. Of a small proxy, the folder of another run's; null for a
            fresh one.
        small: a small network in place of the latent CLIP, which learns whole by ``regression``; null: none.
        lr: the proxy's learning rate (RG-LCD: 3.3e-6).
        loss: ``kl``, ``smooth`` or ``cross_entropy`` over pairs; or ``regression`` of standardised scores, which
            keeps their level and takes an expert without a logit scale.
        labels: the ``expert``'s scores; or ``shuffled`` among the three images of a prompt, anew for each sample and
            step: a control whose proxy learns as fast, from nothing.
        truth: score the ground truth as the autoencoder decodes it (``decoded``, RG-LCD) or as the data's own
            ``image``, which saves a third of the decoding.
        logit_scale: factor from the expert's score to the logit of a preference; null: the expert's own (HPS: 100).
        trainable: which part learns.
        optimiser: the rest of its AdamW.
        fidelity: how its agreement with the expert is measured.
        min_correlation: stop the run where the correlation of proxy and expert over the predictions of a batch, the
            mean of 50 guided steps, is under this; null: never.
        ratio: optimiser steps of the proxy for one of the student, which moves at the last of them (RG-LCD: 1).
    """

    path: str | None = None
    small: SmallSection | None = None
    lr: Positive = 3.3e-6
    loss: Literal["kl", "smooth", "cross_entropy", "regression"] = "kl"
    labels: Literal["expert", "shuffled"] = "expert"
    truth: Literal["decoded", "image"] = "decoded"
    logit_scale: Positive | None = None
    trainable: TrainableSection = TrainableSection()
    optimiser: OptimiserSection = OptimiserSection()
    fidelity: FidelitySection = FidelitySection()
    min_correlation: Annotated[float, Field(gt=-1, lt=1)] | None = None
    ratio: Count = 1

    @model_validator(mode="after")
    def _small_regresses(self) -> ProxySection:
        if self.small is not None and self.loss != "regression":
            raise ValueError(f"loss {self.loss}: a small proxy has no logit scale; use loss: regression")
        if self.small is not None and self.trainable != TrainableSection():
            raise ValueError("trainable: a small proxy learns whole; leave it out")
        return self


class DollarProxySection(ProxySection):
    """As for LRM, small by default.

    Attributes:
        lr: a choice, since DOLLAR's is not known.
        loss: DOLLAR: regression.
        ratio: ``vsd.ratio`` says when the student moves.
    """

    small: SmallSection | None = SmallSection()
    lr: Positive = 1e-4
    loss: Literal["regression"] = "regression"  # type: ignore[assignment]
    ratio: Literal[1] = 1


class VisionSection(Section):
    """A fresh image tower: a ViT on latents. Defaults are the full-size proxy's.

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


class AlignSection(Section):
    """How a proxy learns its expert's scores before it guides anything (docs/method.md, "Pre-training").

    Attributes:
        steps: the last of ``train.steps``; 0: none.
    """

    steps: Interval = 0


class PretrainProxySection(Section):
    """The latent proxy in pre-training: the text tower of a CLIP, and a fresh image tower.

    Attributes:
        clip: an open_clip folder, or a file of ViT-H-14 weights such as an HPS checkpoint; null for the preset's
            reward.
        vision: the image tower.
        trainable: which part learns.
        optimiser: the schedule of ``train.lr``.
        align: the end of the training, in which it learns the scores of ``reward``.
        small: a small network in place of the latent CLIP, which learns the scores alone, all along; null: none.
    """

    clip: str | None = None
    vision: VisionSection = VisionSection()
    trainable: TrainableSection = TrainableSection(image_layers="all", text_layers=5)
    optimiser: ScheduleSection = ScheduleSection(schedule="cosine")
    align: AlignSection = AlignSection()
    small: SmallSection | None = None

    @model_validator(mode="after")
    def _small_has_no_towers(self) -> PretrainProxySection:
        towers = sorted({"clip", "vision", "trainable"} & self.model_fields_set)
        if self.small is not None and towers:
            raise ValueError(f"{', '.join(towers)}: a small proxy has no towers; leave it out")
        return self


class PretrainTrainSection(TrainSection):
    """As for students, but a proxy has no sample grids, EMA or UNet."""

    sample_every: Literal[0] = 0  # type: ignore[assignment]
    ema_decay: Annotated[float, Field(ge=0, le=0)] = 0.0
    gradient_checkpointing: Literal[False] = False  # type: ignore[assignment]
    compile: Literal[False] = False  # type: ignore[assignment]
    shard: Literal[False] = False  # type: ignore[assignment]


class BaseRecipe(Section):
    """What every recipe has; attributes are the sections of the file."""

    kind: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSection
    data: DataConfig
    train: TrainSection = TrainSection()

    @property
    def trial_steps(self) -> tuple[int, ...]:
        """The first step of each kind, from 0."""
        return (0,)

    def check_logged(self, key: str, every: int) -> None:
        """Refuse measurements at steps that are not logged."""
        if every % self.train.log_every:
            raise ValueError(f"{key} {every} is no multiple of train.log_every {self.train.log_every}")


class LCDRecipe(BaseRecipe):
    """``kind: lcd``."""

    kind: Literal["lcd"]  # type: ignore[assignment]
    lcd: LCDSection = LCDSection()
    lora: LoRASection | None = None
    sampling: SamplingSection = SamplingSection()
    monitor: MonitorSection = MonitorSection()
    plain: ClassVar[str] = "lcd"  # the kind without a reward
    ratio_key: ClassVar[str] = ""  # of the recipe, that sets the ratio

    @property
    def ratio(self) -> int:
        """Optimiser steps from one of the student's to the next."""
        return 1

    @property
    def trial_steps(self) -> tuple[int, ...]:
        """The first step in which all optimisers move."""
        return (self.ratio - 1,)

    @property
    def gamma(self) -> float | None:
        """γ of the TCD sampler; None for LCM's."""
        return self.sampling.gamma if isinstance(self.sampling, TCDSamplingSection) else None

    @model_validator(mode="after")
    def _steps_on_grid(self) -> LCDRecipe:
        self.check_logged("monitor.oracle_every", self.monitor.oracle_every)
        if self.train.log_every != 1 and self.train.log_every % self.ratio:
            raise ValueError(
                f"train.log_every {self.train.log_every}: the student moves at multiples of {self.ratio_key} "
                f"{self.ratio}; log at some of them, or at each step"
            )
        if self.train.steps < self.ratio:
            raise ValueError(
                f"train.steps {self.train.steps}: the student first moves at step {self.ratio}, {self.ratio_key}"
            )
        if self.sampling.steps > self.lcd.num_ddim_timesteps:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} exceeds lcd.num_ddim_timesteps {self.lcd.num_ddim_timesteps}"
            )
        if self.lcd.time_cond_proj_dim is None and self.sampling.guidance_scale > 2:
            raise ValueError(
                f"sampling.guidance_scale {self.sampling.guidance_scale}: without lcd.time_cond_proj_dim, guidance is "
                "trained in; use 1 to 2"
            )
        return self


class RGLCDRecipe(LCDRecipe):
    """``kind: rg_lcd``: LCD and a reward on the decoded prediction."""

    kind: Literal["rg_lcd"]  # type: ignore[assignment]
    reward: RewardConfig
    guidance: GuidanceSection = GuidanceSection()
    gradients: GradientsSection = GradientsSection()

    @model_validator(mode="after")
    def _differentiable(self) -> RGLCDRecipe:
        self.check_logged("gradients.every", self.gradients.every)
        if self.gradients.every % self.ratio:
            raise ValueError(f"gradients.every {self.gradients.every} is no multiple of {self.ratio_key} {self.ratio}")
        if self.gradients.every and self.train.shard:
            raise ValueError("gradients.every: needs whole gradients; use 0, or train.shard: false")
        self.refuse_float16("gradients.every", self.gradients.every)
        self.refuse_float16("reward.balance", isinstance(self.reward, Sum) and self.reward.balance == "gradient")
        self.refuse_latents(
            "reward.standardise", isinstance(self.reward, Sum) and self.reward.standardise == "calibrated"
        )
        terms = self.reward.terms if isinstance(self.reward, Sum) else [self.reward]
        if not isinstance(self, LRMRecipe) and any(isinstance(term, Process) for term in terms):
            raise ValueError(f"reward.kind: a process gives no gradient, which {self.kind} needs; use kind: lrm")
        return self

    def refuse_latents(self, key: str, asked: int | bool) -> None:
        """Refuse what looks at the data's images where the data are a teacher's latents."""
        if asked and isinstance(self.data, TeacherData):
            raise ValueError(f"{key}: needs images, and data of kind teacher are latents alone")

    def refuse_float16(self, key: str, asked: int | bool) -> None:
        """Refuse gradients that are taken without the loss scale: float16 would round them to zero."""
        if asked and self.train.dtype == "float16":
            raise ValueError(f"{key}: takes gradients that float16 may round to zero; use train.dtype: bfloat16")


class LRMRecipe(RGLCDRecipe):
    """``kind: lrm``: the reward reaches the student through the latent proxy."""

    kind: Literal["lrm"]  # type: ignore[assignment]
    proxy: ProxySection = ProxySection()
    ratio_key: ClassVar[str] = "proxy.ratio"

    @property
    def ratio(self) -> int:
        """Optimiser steps from one of the student's to the next."""
        return self.proxy.ratio

    @model_validator(mode="after")
    def _proxy_learns_from_labels(self) -> LRMRecipe:
        self.check_logged("proxy.fidelity.every", self.proxy.fidelity.every)
        self.refuse_float16("proxy.fidelity.every", self.proxy.fidelity.every)
        self.refuse_latents("proxy.fidelity.every", self.proxy.fidelity.every and self.proxy.fidelity.data is None)
        self.refuse_latents("proxy.loss", self.proxy.loss == "regression")
        self.refuse_latents("proxy.truth", self.proxy.truth == "image")
        if self.proxy.truth == "image" and self.train.latents_cache != "never":
            raise ValueError("proxy.truth: image needs the data's images; use it with train.latents_cache: never")
        if isinstance(self.reward, Sum) and self.reward.balance == "gradient":
            raise ValueError("reward.balance: lrm takes labels from the sum, not its gradient; use none")
        return self


class TCDRecipe(LCDRecipe):
    """``kind: tcd``."""

    kind: Literal["tcd"]  # type: ignore[assignment]
    lcd: TCDSolverSection = TCDSolverSection()
    tcd: TCDSection = TCDSection()
    sampling: TCDSamplingSection = TCDSamplingSection()
    plain: ClassVar[str] = "tcd"


class RGTCDRecipe(TCDRecipe, RGLCDRecipe):
    """``kind: rg_tcd``: TCD and a reward on the decoded prediction at 0."""

    kind: Literal["rg_tcd"]  # type: ignore[assignment]


class LRMTCDRecipe(TCDRecipe, LRMRecipe):
    """``kind: lrm_tcd``: TCD, and the reward through the latent proxy."""

    kind: Literal["lrm_tcd"]  # type: ignore[assignment]


class MLCMRecipe(LCDRecipe):
    """``kind: mlcm``."""

    kind: Literal["mlcm"]  # type: ignore[assignment]
    lcd: MLCMSolverSection = MLCMSolverSection()
    mlcm: MLCMSection = MLCMSection()
    sampling: MLCMSamplingSection = MLCMSamplingSection()
    plain: ClassVar[str] = "mlcm"

    @model_validator(mode="after")
    def _on_edges(self) -> MLCMRecipe:
        last, begun = self.mlcm.stages[-1].segments, sum(stage.steps or 0 for stage in self.mlcm.stages)
        most = max(stage.segments for stage in self.mlcm.stages)
        if most > self.lcd.num_ddim_timesteps:
            raise ValueError(f"mlcm.stages: {most} segments of a grid of {self.lcd.num_ddim_timesteps} points")
        if begun >= self.train.steps:
            raise ValueError(f"mlcm.stages: the last begins at step {begun}, train.steps is {self.train.steps}")
        if self.sampling.gamma == 0 and self.sampling.steps != last:
            raise ValueError(
                f"sampling.steps {self.sampling.steps}: at gamma 0 the {last} segments of the last of mlcm.stages are "
                f"sampled in {last} steps, whose ends the student learned; or give a sampling.gamma above 0"
            )
        return self


class RGMLCMRecipe(MLCMRecipe, RGLCDRecipe):
    """``kind: rg_mlcm``: MLCM and a reward on the decoded prediction at 0."""

    kind: Literal["rg_mlcm"]  # type: ignore[assignment]


class LRMMLCMRecipe(MLCMRecipe, LRMRecipe):
    """``kind: lrm_mlcm``: MLCM, and the reward through the latent proxy."""

    kind: Literal["lrm_mlcm"]  # type: ignore[assignment]


class WeightedRecipe(LCDRecipe):
    """``kind: weighted``."""

    kind: Literal["weighted"]  # type: ignore[assignment]
    data: TeacherData
    lcd: WeightedSolverSection = WeightedSolverSection()
    weighted: WeightedSection = WeightedSection()
    sampling: UntoldSamplingSection = UntoldSamplingSection()

    @model_validator(mode="after")
    def _untold(self) -> WeightedRecipe:
        if self.weighted.share > 0 and self.lcd.time_cond_proj_dim is not None:
            raise ValueError(
                "lcd.time_cond_proj_dim: the guidance of the teacher's samples is trained in; use null, or "
                "weighted.share: 0"
            )
        return self


class VSDRecipe(LCDRecipe):
    """``kind: vsd``."""

    kind: Literal["vsd"]  # type: ignore[assignment]
    lcd: VSDSolverSection = VSDSolverSection()
    vsd: VSDSection = VSDSection()
    sampling: UntoldSamplingSection = UntoldSamplingSection()
    ratio_key: ClassVar[str] = "vsd.ratio"

    @property
    def ratio(self) -> int:
        """Optimiser steps from one of the student's to the next."""
        return self.vsd.ratio

    @model_validator(mode="after")
    def _told_alike(self) -> VSDRecipe:
        if self.lcd.time_cond_proj_dim is not None and self.vsd.w is not None:
            raise ValueError(
                "vsd.w: the student is told w, and the real score must have the same; use null, or "
                "lcd.time_cond_proj_dim: null"
            )
        return self


class DollarRecipe(VSDRecipe, LRMRecipe):
    """``kind: dollar``: VSD, and the reward through a latent proxy."""

    kind: Literal["dollar"]  # type: ignore[assignment]
    proxy: DollarProxySection = DollarProxySection()


class LRMPretrainRecipe(BaseRecipe):
    """``kind: lrm_pretrain``: the latent proxy's pre-training on (latent, caption) pairs, and on an expert's scores."""

    kind: Literal["lrm_pretrain"]  # type: ignore[assignment]
    train: PretrainTrainSection = PretrainTrainSection()
    proxy: PretrainProxySection = PretrainProxySection()
    reward: RewardConfig | None = None  # the expert

    @property
    def trial_steps(self) -> tuple[int, ...]:
        """The first and, where it is another kind of step, the last."""
        return (0, self.train.steps - 1) if 0 < self.proxy.align.steps < self.train.steps else (0,)

    @model_validator(mode="after")
    def _has_an_expert(self) -> LRMPretrainRecipe:
        steps = self.proxy.align.steps
        if steps and self.reward is None:
            raise ValueError("proxy.align: needs the expert whose scores are learned; give a section reward")
        if steps > self.train.steps:
            raise ValueError(f"proxy.align.steps {steps}: are the last of train.steps, which is {self.train.steps}")
        if self.proxy.small is not None and steps != self.train.steps:
            raise ValueError(
                f"proxy.align.steps {steps}: a small proxy learns scores alone; give all {self.train.steps}"
            )
        return self


Recipe = Annotated[
    LCDRecipe
    | RGLCDRecipe
    | LRMRecipe
    | LRMPretrainRecipe
    | TCDRecipe
    | RGTCDRecipe
    | LRMTCDRecipe
    | MLCMRecipe
    | RGMLCMRecipe
    | LRMMLCMRecipe
    | WeightedRecipe
    | VSDRecipe
    | DollarRecipe,
    Field(discriminator="kind"),
]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Any:
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
    written, lines = load_yaml(path)
    values = apply_overrides(written, overrides, RIVALS)
    _refuse_moved_keys(values, lines, path, overrides)
    return validate(Recipe, values, lines, path, overrides)


MOVED = {"scale": "guidance.scale", "window": "guidance.window", "logit_scale": "proxy.logit_scale"}  # from reward


def _refuse_moved_keys(
    values: Mapping[str, Any], lines: Mapping[str, int], path: Path, overrides: Sequence[str]
) -> None:
    """Name the new place of keys that older recipes have under ``reward``."""
    kind, reward = values.get("kind"), values.get("reward")
    given = [override.partition("=")[0] for override in overrides]
    for name, new in MOVED.items():
        if kind not in ("rg_lcd", "lrm") or not isinstance(reward, dict) or name not in reward:
            continue
        key, what = f"reward.{name}", f"moved to {'guidance.share' if isinstance(reward[name], dict) else new}"
        if kind == "rg_lcd" and name == "logit_scale":
            what = "is gone: rg_lcd takes the raw score; remove it"
        if any(f"{key}.".startswith(f"{own}.") or own.startswith(f"{key}.") for own in given):
            raise ConfigError(what, path="command line", key=key)
        raise ConfigError(what, path=path, line=lines.get(key), key=key)


class MissingProxy(UsageError):
    """A latent proxy that has to be pre-trained first.

    Args:
        what: names the key and the folder.
        command: makes it.
    """

    def __init__(self, what: str, command: str) -> None:
        self.what, self.command = what, command
        super().__init__(f"{what}; pre-train one with: {command}")


def find_proxy(recipe: LRMRecipe) -> Path | None:
    """The proxy's folder of a recipe, or the preset's; None for a small proxy that starts afresh.

    Raises:
        MissingProxy: it is not there.
        UsageError: neither is named.
    """
    if recipe.proxy.path is not None:
        folder = Path(recipe.proxy.path)
        if not folder.is_dir():
            raise MissingProxy(f"proxy.path {folder}: no such folder", pretrain_command(recipe))
        return folder
    if recipe.proxy.small is not None:
        return None
    preset = recipe.model.find("proxy.path")
    if preset.latent_proxy is None:
        what = f"proxy.path: nobody has published a latent CLIP for {preset.name}; give one of your own"
        raise MissingProxy(what, pretrain_command(recipe))
    return preset.latent_proxy_folder()


def pretrain_command(recipe: LRMRecipe) -> str:
    """The command that pre-trains a proxy on a recipe's model and data, into the folder that the recipe names."""
    small = recipe.proxy.small
    base = "lrm_pretrain" if recipe.model.preset in BENCHTOPS else "sd21/lrm_pretrain"
    base = base if small is None else "dollar_pretrain"
    packaged = load_recipe(base)
    words = ["rgbench", "train", base]
    if small is not None and small != packaged.proxy.small:
        words += [f"proxy.small={_flow(small.model_dump())}"]
    if recipe.model != packaged.model:
        words += [f"model={_flow(recipe.model.model_dump(exclude_none=True))}"]
    if small is None and isinstance(recipe.reward, HPS) and recipe.reward.path is not None:
        words += [f"proxy.clip={recipe.reward.path}"]
    if recipe.reward != packaged.reward:
        words += [f"reward={_flow(recipe.reward.model_dump(exclude_none=True))}"]
    if recipe.data != packaged.data:
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
        UsageError: it is not there; with the command that fetches it.
    """
    if recipe.proxy.clip is not None:
        return Path(recipe.proxy.clip)
    if recipe.model.preset is not None:
        return recipe.model.find("proxy.clip").reward_folder()
    return find_published("hps 2.1", "proxy.clip")
