"""The trained student as a plain diffusers folder with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from diffusers import LatentConsistencyModelPipeline, LCMScheduler

from rgbench.files import read_json, write_text_atomic
from rgbench.trainers.contract import Trainer
from rgbench.trainers.recipe import LCDRecipe

# What of the teacher's scheduler belongs to the noise schedule, not to its sampler.
SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def make_scheduler(trainer: Trainer, recipe: LCDRecipe) -> LCMScheduler:
    """The sampler a student of this recipe needs: on its training grid and with its timestep scaling."""
    config = read_json(trainer.models.path / "scheduler" / "scheduler_config.json")
    return LCMScheduler(
        **{key: config[key] for key in SCHEDULE_KEYS if key in config},
        original_inference_steps=recipe.lcd.num_ddim_timesteps,
        timestep_scaling=recipe.lcd.timestep_scaling,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def export_pipeline(trainer: Trainer, recipe: LCDRecipe, meta: dict[str, Any], folder: Path) -> None:
    """Write the student so that ``DiffusionPipeline.from_pretrained(folder)`` loads it.

    Args:
        trainer: its target (EMA) network is written, or its student where the recipe says so.
        recipe: of the run.
        meta: the run's run.json, for the card.
        folder: replaced as a whole.
    """
    models = trainer.models
    pipeline = LatentConsistencyModelPipeline(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=trainer.target if recipe.sampling.network == "target" else trainer.student,
        scheduler=make_scheduler(trainer, recipe),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    write_text_atomic(temporary / "README.md", model_card(recipe, meta))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def model_card(recipe: LCDRecipe, meta: dict[str, Any]) -> str:
    """README.md of the exported folder: what it is, what it was trained on, how to sample it."""
    rewards = [
        f"- `{r['name']}` (fingerprint `{r['fingerprint_id']}`, weights `{r['fingerprint']['weights_sha256'][:12]}…`, "
        f"antialias {str(r['fingerprint']['antialias']).lower()}): **in-sample**, the student was trained on it; its "
        "score says how well the student pleases it, not how good the images are"
        for r in meta["rewards"]
    ]
    network = "EMA (target)" if recipe.sampling.network == "target" else "online (student)"
    sampling, w_min, w_max = recipe.sampling, recipe.lcd.w_min, recipe.lcd.w_max
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [latent-consistency-model, rgbench]
---

# {meta["name"]}

A few-step text-to-image student, distilled by `{recipe.kind}` with rgbench; {network} weights
after {meta["step"]} optimiser steps of batch {recipe.train.batch_size}, seed {recipe.seed}.

- Teacher: {meta["world"]}, weights sha256 `{meta["teacher"]["sha256"]}`
- Data: {meta["data"]["kind"]}

## Rewards trained on

{chr(10).join(rewards) or "None."}

## Sampling

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipeline("a prompt", num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance_scale}).images[0]
```

Guidance was trained for w from {w_min:g} to {w_max:g} in the LCM form c + w(c − u). The pipeline embeds
w = guidance_scale − 1, so `guidance_scale` belongs between {w_min + 1:g} and {w_max + 1:g}.

## Recipe

```yaml
{yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True).strip()}
```
"""
