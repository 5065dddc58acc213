"""The trained student as a plain diffusers folder with a model card; of a LoRA student its adapters as well.

Model cards of exported students: what was trained, from what, on which rewards, and how to sample it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from rgbench import __version__
from rgbench.core.io import read_json, save_safetensors_atomic, write_text_atomic
from rgbench.core.run import provenance
from rgbench.models.lora import EMBEDDING_FILE
from rgbench.models.student import ADAPTER, COND_PROJ, is_lora, lora_state, merged
from rgbench.train.base import Trainer
from rgbench.train.recipe import LCDRecipe

NETWORKS = {"target": "EMA (target)", "student": "online (student)"}


def model_card(recipe: LCDRecipe, meta: Mapping[str, Any], network: str) -> str:
    """README.md of an exported pipeline folder.

    Args:
        recipe: of the run.
        meta: the run's run.json.
        network: ``target`` or ``student``, whose weights are in the folder.
    """
    sampling = recipe.sampling
    lora = f", adapters of rank {recipe.lora.rank} added to the teacher's weights" if recipe.lora else ""
    return f"""---
{_header(recipe, meta)}
---

# {meta["name"]}

A few-step text-to-image student, distilled by `{recipe.kind}` with rgbench; {NETWORKS[network]} weights{lora},
after {meta["step"]} optimiser steps of batch {recipe.train.batch_size}, seed {recipe.seed}.

{_origin(meta)}

## Rewards trained on

{_rewards(meta)}

## Sampling

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipeline("a prompt", num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance_scale}).images[0]
```

{_guidance(recipe)}

## Recipe

```yaml
{yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True).strip()}
```
"""


def lora_card(recipe: LCDRecipe, meta: Mapping[str, Any], network: str) -> str:
    """README.md of the adapters' folder; arguments as of :func:`model_card`."""
    assert recipe.lora is not None
    teacher, sampling, lcd = meta["teacher"], recipe.sampling, recipe.lcd
    source = f'"{teacher["repo"]}", revision="{teacher["revision"]}"' if "repo" in teacher else '"path/to/the/teacher"'
    scheduler = (
        f"LCMScheduler.from_config(\n    pipeline.scheduler.config, original_inference_steps={lcd.num_ddim_timesteps}, "
        f"timestep_scaling={lcd.timestep_scaling}, clip_sample=False, set_alpha_to_one=False\n)"
    )
    loading = f"""from diffusers import LCMScheduler, StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({source})"""
    if lcd.time_cond_proj_dim is not None:
        loading = f"""from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

unet = UNet2DConditionModel.from_pretrained(
    {source}, subfolder="unet", time_cond_proj_dim={lcd.time_cond_proj_dim}, low_cpu_mem_usage=False, device_map=None
)
unet.load_state_dict(load_file("guidance_embedding.safetensors"), strict=False)
pipeline = LatentConsistencyModelPipeline.from_pretrained({source}, unet=unet)"""
    return f"""---
{_header(recipe, meta, "adapter")}
---

# {meta["name"]}: LoRA

Adapters of rank {recipe.lora.rank} of the student in the folder above; {NETWORKS[network]} weights.

{_origin(meta)}

## Rewards trained on

{_rewards(meta)}

## Sampling

In this folder:

```python
{loading}
pipeline.scheduler = {scheduler}
pipeline.load_lora_weights(".")
image = pipeline("a prompt", num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance_scale}).images[0]
```

{_guidance(recipe)}
"""


def _header(recipe: LCDRecipe, meta: Mapping[str, Any], relation: str = "finetune") -> str:
    """The card's metadata, without the fences."""
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    fields["tags"] = ["latent-consistency-model", "rgbench", *(["lora"] if recipe.lora else [])]
    if "repo" in meta["teacher"]:
        fields |= {"base_model": meta["teacher"]["repo"], "base_model_relation": relation}
    return yaml.safe_dump(fields, sort_keys=False, default_flow_style=None).strip()


def _origin(meta: Mapping[str, Any]) -> str:
    """Teacher, data and code, a line each."""
    teacher, git = meta["teacher"], provenance()["git"]
    where = f"`{teacher['repo']}` at `{teacher['revision']}`" if "repo" in teacher else meta["world"]
    data = json.dumps(meta["data"], ensure_ascii=False)
    code = f"`{git['revision']}`{', with changes' if git['changed'] else ''}" if git else "of a release"
    return f"""- Teacher: {where}, weights sha256 `{teacher["sha256"]}`; its licence holds for this student too
- Data: `{data}`
- Code: rgbench {__version__}, revision {code}"""


def _rewards(meta: Mapping[str, Any]) -> str:
    """One line a reward, each marked as in-sample."""
    lines = []
    for reward in meta["rewards"]:
        fingerprint = reward["fingerprint"]
        parts = [f"fingerprint `{reward['fingerprint_id']}`"]
        if fingerprint.get("weights_sha256"):
            parts.append(f"weights `{fingerprint['weights_sha256'][:12]}…`")
        if "antialias" in fingerprint:
            parts.append(f"antialias {str(fingerprint['antialias']).lower()}")
        lines.append(
            f"- `{reward['name']}` ({', '.join(parts)}): **in-sample**, the student was trained on it; its score says "
            "how well the student pleases it, not how good the images are"
        )
    return "\n".join(lines) or "None."


def _guidance(recipe: LCDRecipe) -> str:
    w_min, w_max = recipe.lcd.w_min, recipe.lcd.w_max
    if recipe.lcd.time_cond_proj_dim is None:
        return (
            f"Guidance for w from {w_min:g} to {w_max:g}, in the LCM form c + w(c − u), is trained in: the student is "
            "not told w, and\n`guidance_scale` above 1 comes on top of it. Keep it between 1 and 2."
        )
    return (
        f"Guidance was trained for w from {w_min:g} to {w_max:g} in the LCM form c + w(c − u). The pipeline embeds\n"
        f"w = guidance_scale − 1, so `guidance_scale` belongs between {w_min + 1:g} and {w_max + 1:g}."
    )


Network = Literal["target", "student"]
LORA_FOLDER = "lora"

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
        steps_offset=1,  # read by nobody here; StableDiffusionPipeline warns of any other value
    )


def export_pipeline(
    trainer: Trainer, recipe: LCDRecipe, meta: dict[str, Any], folder: Path, network: Network | None = None
) -> None:
    """Write the student so that ``DiffusionPipeline.from_pretrained(folder)`` loads it.

    A LoRA student's adapters are added to the UNet's weights there, and lie beside it in ``lora/`` in diffusers'
    layout, for ``load_lora_weights``.

    Args:
        trainer: with both networks.
        recipe: of the run.
        meta: the run's run.json, for the card.
        folder: replaced as a whole.
        network: ``target`` (the EMA) or ``student`` (online); the recipe's ``sampling.network`` by default.
    """
    network = network or recipe.sampling.network
    unet = trainer.target if network == "target" else trainer.student
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    _pipeline(trainer, recipe, merged(unet)).save_pretrained(temporary, safe_serialization=True)
    if is_lora(unet):
        _save_lora(unet, temporary / LORA_FOLDER)
        make_scheduler(trainer, recipe).save_pretrained(temporary / LORA_FOLDER)  # its grid, for rgbench eval --lora
        write_text_atomic(temporary / LORA_FOLDER / "README.md", lora_card(recipe, meta, network))
    write_text_atomic(temporary / "README.md", model_card(recipe, meta, network))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _pipeline(trainer: Trainer, recipe: LCDRecipe, unet: UNet2DConditionModel) -> DiffusionPipeline:
    """diffusers' pipeline for the student: one that embeds w where the student is told it."""
    models = trainer.models
    told = unet.config.time_cond_proj_dim is not None
    return (LatentConsistencyModelPipeline if told else StableDiffusionPipeline)(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=unet,
        scheduler=make_scheduler(trainer, recipe),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """``pytorch_lora_weights.safetensors`` with rank and α in its header, and the guidance embedding, if any."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=lora_state(unet),
        unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
        safe_serialization=True,
    )
    if unet.config.time_cond_proj_dim is not None:
        weight = unet.time_embedding.cond_proj.weight.detach().cpu().contiguous()
        save_safetensors_atomic({COND_PROJ: weight}, folder / EMBEDDING_FILE)
