"""The trained student as a plain diffusers folder with a model card; of a LoRA student its adapters as well."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from rgbench.files import read_json, save_safetensors_atomic, write_text_atomic
from rgbench.students import ADAPTER, is_lora, lora_state, merged
from rgbench.trainers.card import lora_card, model_card
from rgbench.trainers.contract import Trainer
from rgbench.trainers.recipe import LCDRecipe

Network = Literal["target", "student"]
LORA_FOLDER, EMBEDDING_FILE = "lora", "guidance_embedding.safetensors"
EMBEDDING_WEIGHT = "time_embedding.cond_proj.weight"

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
        save_safetensors_atomic({EMBEDDING_WEIGHT: weight}, folder / EMBEDDING_FILE)
