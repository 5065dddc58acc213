"""Variational score distillation (VSD) beside consistency: the first half of docs/method.md, "DOLLAR, one step".

    student:  loss = β_CD · L_LCD + β_VSD · ½ mean (x − sg(x − g))²,  g = (x̂0_fake − x̂0_real) / mean |x − x̂0_real|
    fake:     loss = mean (fake(z_t, t) − its prediction target)²  on the student's images x, without gradient to them

so that ∂L_VSD/∂x = β_VSD · g / n. The fake score learns the student's own distribution, by denoising, and the
difference of both denoised latents is the gradient of the reverse KL divergence to the teacher (ProlificDreamer, arXiv
2305.16213; Diff-Instruct, 2305.18455; normalisation and two time scales: DMD2, 2405.14867).

| symbol | name | meaning, shape |
|---|---|---|
| x | ``prediction`` | f_θ(z_{n+k}) of the LCD step, (B, C, h, w) |
| fake | ``fake`` | score network of the student's images; told w where the student is, never guided |
| real | – | the teacher, guided by ``vsd.w`` or the sample's w |
| t | – | uniform on [20, 980] for VSD, on [0, 999] for the fake, (B,) int64 |

The fake learns at every step, the student at every ``vsd.ratio``-th.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.shard import mesh_of
from rgbench.data.batches import Batch
from rgbench.diffusion.consistency import squared_error
from rgbench.diffusion.schedule import add_noise, is_same, per_sample, predicted_x0, prediction_of
from rgbench.models.families import Denoiser
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.models.student import Learned, is_lora, trainable
from rgbench.train.base import OptimiserGroup, Stateful, StepDraws, StepResult, lr_factor
from rgbench.train.lcd import LCD, Distillation, Inputs, Networks, Start, call, new_student, predict, teacher_outputs
from rgbench.train.recipe import LCDRecipe, VSDRecipe

FIRST, LAST = 20, 980  # timesteps of VSD (DMD2: 2 % and 98 % of 1,000)
TINY = 1e-12  # below any mean distance of latents


class VSD(LCD):
    """The VSD trainer.

    Args:
        recipe: validated.
        models: the teacher's parts, frozen.
        parts: of a reward's trainer behind this one.
        origin: UNet that the fake score starts from; None for the teacher's.
    """

    recipe: VSDRecipe

    def __init__(
        self, recipe: VSDRecipe, models: DiffusionModels, *parts: Any, origin: UNet2DConditionModel | None = None
    ) -> None:
        super().__init__(recipe, models, *parts)
        self.fake = new_student(recipe, models, recipe.vsd.lora, origin)

    @property
    def scorer(self) -> Denoiser:
        """The fake score as it is called."""
        return self.models.denoiser(self.fake)

    @classmethod
    def build(cls, recipe: LCDRecipe, models: DiffusionModels) -> VSD:
        """The trainer of a recipe.

        Raises:
            UsageError: a fake score that does not fit the teacher.
        """
        assert isinstance(recipe, VSDRecipe)
        return cls(recipe, models, origin=load_origin(recipe, models))

    def optimiser_groups(self) -> dict[str, OptimiserGroup]:
        """The student and the fake score."""
        own, steps = self.recipe.vsd, self.recipe.train.steps
        fake = OptimiserGroup(trainable(self.fake), own.lr, own.optimiser, lr_factor(own.optimiser, steps))
        return {**super().optimiser_groups(), "fake": fake}

    def modules(self) -> dict[str, Stateful]:
        """Student, target and fake score; of adapters those alone."""
        fake = Learned(self.fake, self.fake) if is_lora(self.fake) else self.fake
        return {**super().modules(), "fake": fake}

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """The fake score's step and, at the last of a cycle, the student's; both of predictions before any update."""
        inputs = self.prepare(batch, rng)
        if not self.moves(rng.step):
            begin, prediction = self.predict(inputs)
            return StepResult({"fake": self.denoise(inputs, begin, prediction, rng)})
        # 1–8. as LCD
        distilled = self.distil(inputs)
        # 9, 10, 12. VSD, and the fake score on the same predictions
        student = self.match(inputs, distilled, rng)
        return StepResult({"student": student, "fake": self.denoise(inputs, distilled, distilled.prediction, rng)})

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> tuple[Start, Tensor]:
        """Lines 2–5 of LCD, for the fake score alone."""
        return predict(self.networks, self.recipe.lcd, inputs)

    def match(self, inputs: Inputs, distilled: Distillation, rng: StepDraws) -> dict[str, Tensor]:
        """Lines 9 and 10: the student's terms ``lcd`` and ``vsd``, weighted, (B,) each."""
        own, x = self.recipe.vsd, distilled.prediction
        # 9. z_t = α x + σ ε, t uniform on [20, 980]
        t = FIRST + rng.integers("vsd_t", LAST - FIRST + 1).to(x.device)
        noise = rng.normal("vsd_noise", x.shape[1:]).to(x)
        w = inputs.guidance_scale if own.w is None else torch.full_like(inputs.guidance_scale, own.w)
        fake, real = denoised(self.networks, self.scorer, inputs, distilled.w_embedding, x.detach(), noise, t, w)
        # 10. ½ mean (x − sg(x − g))², whose gradient at x is g/n
        losses = matching_losses(x, fake, real)
        return {"lcd": own.consistency * distilled.losses, "vsd": own.scale * losses}

    def denoise(
        self, inputs: Inputs, begin: Start | Distillation, prediction: Tensor, rng: StepDraws
    ) -> dict[str, Tensor]:
        """Line 12: the fake score's term ``fake``, (B,)."""
        x, schedule, kind = prediction.detach(), self.networks.schedule, self.networks.prediction_type
        t = rng.integers("fake_t", len(schedule)).to(x.device)
        noise = rng.normal("fake_noise", x.shape[1:]).to(x)
        output = call(
            self.scorer,
            add_noise(x, noise, t, schedule),
            t,
            inputs.prompt_embeds,
            begin.w_embedding,
        )
        return {"fake": squared_error(output, prediction_of(x, noise, t, schedule, kind))}


@torch.no_grad()
def denoised(
    networks: Networks,
    fake: Denoiser,
    inputs: Inputs,
    w_embedding: Tensor | None,
    x: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    guidance_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """x̂0 of the fake score and of the guided teacher at z_t = α x + σ ε, (B, C, h, w) each.

    Args:
        networks: of the step.
        fake: without guidance.
        inputs: with text states.
        w_embedding: what the fake is told, (B, d) or None.
        x: the student's images, (B, C, h, w).
        noise: ε, same shape.
        timesteps: t, (B,) int64.
        guidance_scale: w of the teacher, (B,).
    """
    schedule, kind = networks.schedule, networks.prediction_type
    z = add_noise(x, noise, timesteps, schedule)
    outputs = teacher_outputs(networks.teacher, inputs, z, timesteps, guidance_scale)
    cond, uncond = (predicted_x0(output, z, timesteps, schedule, kind) for output in outputs)
    real = cond + per_sample(guidance_scale.to(z.dtype), z) * (cond - uncond)
    output = call(fake, z, timesteps, inputs.prompt_embeds, w_embedding)
    return predicted_x0(output, z, timesteps, schedule, kind), real


def matching_losses(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """½ g² + (a term that is 0, whose gradient at x is g), the mean of each sample, (B,); g normalised as DMD2's."""
    scale = (x.detach() - real).abs().flatten(1).mean(1).clamp(min=TINY)
    gradient = (fake - real) / per_sample(scale, x)
    return 0.5 * squared_error(x - x.detach(), -gradient)


def load_origin(recipe: VSDRecipe, models: DiffusionModels) -> UNet2DConditionModel | None:
    """The UNet that a recipe's fake score starts from; None for the teacher's.

    Raises:
        UsageError: it predicts something else than the teacher, at other noise, or has another shape.
    """
    if recipe.vsd.path is None:
        return None
    path = Path(recipe.vsd.path)
    if not path.is_dir():
        raise UsageError(f"vsd.path {path}: no such folder; give a diffusers pipeline folder, or null for the teacher")
    other = load_models(path, models.device, models.dtype, mesh=mesh_of(models.unet))
    if other.prediction_type != models.prediction_type:
        raise UsageError(
            f"vsd.path {path}: predicts {other.prediction_type}, the teacher {models.prediction_type}; the fake score "
            "and the teacher must predict the same"
        )
    if not is_same(models.schedule, other.schedule):
        raise UsageError(f"vsd.path {path}: has another noise schedule than the teacher")
    shapes, fitting = ({k: value.shape for k, value in each.unet.state_dict().items()} for each in (other, models))
    wrong = sorted(name for name in shapes | fitting if shapes.get(name) != fitting.get(name))
    if wrong:
        raise UsageError(f"vsd.path {path}: {len(wrong)} tensors are not the teacher's in shape, first {wrong[0]!r}")
    return other.unet
