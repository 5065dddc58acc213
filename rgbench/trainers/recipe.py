"""What a training recipe may say: one pydantic model per section, defaults with their source.

Defaults are those of the full-size method (docs/method.md, "Defaults at full scale"); the benchtop's numbers stand
in its recipe files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rgbench.config import Section, apply_overrides, find_recipe, load_yaml, validate
from rgbench.data.config import DataConfig
from rgbench.errors import UsageError
from rgbench.worlds.presets import Preset, find_preset

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Layers = Annotated[int, Field(ge=0)] | Literal["all"]


class ModelSection(Section):
    """The teacher: a preset by name or any local ``StableDiffusionPipeline`` folder; exactly one of the two."""

    preset: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSection:
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either model.preset or model.path")
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
            raise UsageError(f"model.path {self.path}: no such folder; give a diffusers pipeline folder")
        return Path(self.path)

    @property
    def world(self) -> str:
        """Name under which results are kept: the preset's or the folder's."""
        return self.preset or Path(str(self.path)).resolve().name


class TrainSection(Section):
    """Optimisation and bookkeeping.

    Attributes:
        steps: optimiser steps (LCM: 10,000).
        batch_size: images per optimiser step (16 per GPU).
        lr: AdamW's learning rate of the student, constant.
        betas: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this L2 norm.
        ema_decay: of the target network, every step.
        save_every: steps between checkpoints.
        keep_checkpoints: how many of the newest stay.
        sample_every: steps between sample grids; 0 for none.
        log_every: steps between log lines.
        dtype: of weights and arithmetic.
    """

    steps: Count = 10_000
    batch_size: Count = 16
    lr: Positive = 1e-6
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    ema_decay: Decay = 0.95
    save_every: Count = 500
    keep_checkpoints: Count = 2
    sample_every: Annotated[int, Field(ge=0)] = 500
    log_every: Count = 10
    dtype: Literal["float32"] = "float32"


class LCDSection(Section):
    """Consistency distillation (docs/method.md, "LCD, one step").

    Attributes:
        num_ddim_timesteps: N, points of the solver's grid.
        w_min: lower end of the guidance drawn, LCM form.
        w_max: upper end.
        loss: ``huber`` or ``l2``.
        huber_c: c of the pseudo-Huber loss.
        timestep_scaling: s of the boundary scalings.
        time_cond_proj_dim: d of the guidance embedding.
    """

    num_ddim_timesteps: Annotated[int, Field(ge=1, le=1000)] = 50
    w_min: NonNegative = 5.0
    w_max: NonNegative = 15.0
    loss: Literal["huber", "l2"] = "huber"
    huber_c: Positive = 0.001
    timestep_scaling: Positive = 10.0
    time_cond_proj_dim: Annotated[int, Field(ge=4)] = 256

    @model_validator(mode="after")
    def _ordered(self) -> LCDSection:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min {self.w_min} is above w_max {self.w_max}")
        return self


class RewardSection(Section):
    """The reward the student is trained on.

    Attributes:
        kind: name of the reward in the registry.
        path: its weights; null for the preset's.
        antialias: whether its image resize filters before it subsamples. No default: it changes the result.
        scale: β, weight of the reward against the distillation loss.
    """

    kind: Literal["hps"] = "hps"
    path: str | None = None
    antialias: bool
    scale: NonNegative = 1.0


class TrainableSection(Section):
    """What of the latent proxy learns; its logit scale always does.

    Attributes:
        image_layers: the last n image blocks with the final norm and the projection; 0 for none, ``all`` for the
            whole tower with its embeddings.
        text_layers: the same of the text tower.
    """

    image_layers: Layers = 1
    text_layers: Layers = 5


class ProxySection(Section):
    """The latent proxy and how it learns from its expert (docs/method.md, "RG-LCD + LRM").

    Attributes:
        path: a latent CLIP folder; null for the preset's.
        lr: AdamW's learning rate of the proxy.
        loss: ``kl``, ``smooth`` or ``cross_entropy`` over pairs.
        trainable: what of it learns.
    """

    path: str | None = None
    lr: Positive = 3.3e-6
    loss: Literal["kl", "smooth", "cross_entropy"] = "kl"
    trainable: TrainableSection = TrainableSection()


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


class LCDRecipe(Section):
    """``kind: lcd``. Attributes are the sections of the file."""

    kind: Literal["lcd"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSection
    data: DataConfig
    train: TrainSection = TrainSection()
    lcd: LCDSection = LCDSection()
    sampling: SamplingSection = SamplingSection()

    @model_validator(mode="after")
    def _steps_on_grid(self) -> LCDRecipe:
        if self.sampling.steps > self.lcd.num_ddim_timesteps:
            raise ValueError(
                f"sampling.steps {self.sampling.steps} exceeds lcd.num_ddim_timesteps {self.lcd.num_ddim_timesteps}"
            )
        return self


class RGLCDRecipe(LCDRecipe):
    """``kind: rg_lcd``: LCD and a reward on the decoded prediction."""

    kind: Literal["rg_lcd"]  # type: ignore[assignment]
    reward: RewardSection


class LRMRecipe(RGLCDRecipe):
    """``kind: lrm``: the reward reaches the student through the latent proxy."""

    kind: Literal["lrm"]  # type: ignore[assignment]
    proxy: ProxySection = ProxySection()


Recipe = Annotated[LCDRecipe | RGLCDRecipe | LRMRecipe, Field(discriminator="kind")]


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> LCDRecipe:
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
