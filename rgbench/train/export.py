"""Export of a student: a plain diffusers folder with a model card; of a LoRA student its adapters as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from diffusers import StableDiffusionPipeline

from rgbench import __version__
from rgbench.core.io import save_safetensors_atomic, write_sums, write_text_atomic
from rgbench.core.run import provenance
from rgbench.diffusion.sampling import flow_grid
from rgbench.diffusion.schedule import Flow
from rgbench.models.folder import quiet_libraries
from rgbench.models.pipeline import DiffusionModels
from rgbench.models.student import ADAPTER, is_lora, lora_state, merged
from rgbench.train.base import Network, StudentTrainer
from rgbench.train.recipe import LCDRecipe

NETWORKS = {"target": "EMA (target)", "student": "online (student)"}
LORA_FOLDER, EMBEDDING_FILE = "lora", "guidance_embedding.safetensors"
EMBEDDING_WEIGHT = "time_embedding.cond_proj.weight"


def export_pipeline(
    trainer: StudentTrainer, meta: dict[str, Any], folder: Path, network: Network | None = None
) -> None:
    """Write the student so that ``DiffusionPipeline.from_pretrained(folder)`` loads it.

    A LoRA student's adapters are merged into the network there, and written to ``lora/`` in diffusers' layout, for
    ``load_lora_weights``.

    Args:
        trainer: with both networks.
        meta: the run's run.json, for the card.
        folder: replaced as a whole.
        network: ``target`` (the EMA) or ``student`` (online); the recipe's ``sampling.network`` by default.
    """
    models, own = trainer.models, trainer.network(network)
    card = Card(trainer.recipe, meta, NETWORKS[network or trainer.recipe.sampling.network], models)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = models.family.pipeline(models, merged(own), trainer.scheduler())
    with quiet_libraries():  # which warn of parts that the teacher leaves out
        pipeline.save_pretrained(temporary, safe_serialization=True)
    for place in temporary.glob("tokenizer*"):  # as it was loaded: calls leave their padding in a fast tokenizer
        shutil.rmtree(place)
        shutil.copytree(models.path / place.name, place)
    if is_lora(own):
        _save_lora(models, own, temporary / LORA_FOLDER)
        write_text_atomic(temporary / LORA_FOLDER / "README.md", lora_card(card))
    write_text_atomic(temporary / "README.md", model_card(card))
    write_sums(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _save_lora(models: DiffusionModels, network: Any, folder: Path) -> None:
    """``pytorch_lora_weights.safetensors`` with rank and α in its header, and the guidance embedding, if any."""
    component = models.family.component
    kind = StableDiffusionPipeline if models.pipeline is None else type(models.pipeline)
    kind.save_lora_weights(
        folder,
        safe_serialization=True,
        **{
            f"{component}_lora_layers": lora_state(network),
            f"{component}_lora_adapter_metadata": network.peft_config[ADAPTER].to_dict(),
        },
    )
    if network.config.get("time_cond_proj_dim") is not None:
        weight = network.time_embedding.cond_proj.weight.detach().cpu().contiguous()
        save_safetensors_atomic({EMBEDDING_WEIGHT: weight}, folder / EMBEDDING_FILE)


@dataclass(frozen=True)
class Card:
    """What the cards say.

    Attributes:
        recipe: of the run.
        meta: the run's run.json.
        weights: which network's, in words.
        models: the teacher.
    """

    recipe: LCDRecipe
    meta: Mapping[str, Any]
    weights: str
    models: DiffusionModels

    @property
    def is_flow(self) -> bool:
        """Whether the path is straight, and the sampler a flow's."""
        return isinstance(self.models.schedule, Flow)

    def left_out(self) -> str:
        """Arguments that leave out what the teacher leaves out, such as SD3's T5."""
        parts = {} if self.models.pipeline is None else self.models.pipeline.components
        names = [name for name, part in parts.items() if part is None and name.startswith(("text_enc", "tokenizer"))]
        return "".join(f", {name}=None" for name in names)

    def options(self) -> str:
        """The pipeline's options: without ``eta``, it would sample a TCD student at 0, whatever its scheduler says."""
        recipe, sampling = self.recipe, self.recipe.sampling
        options = f"num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance_scale}"
        options += "" if recipe.gamma is None else f", eta={recipe.gamma:g}"
        if self.is_flow:  # a pipeline's own timesteps are not all on the training grid
            options += f", sigmas={flow_grid(sampling.steps, recipe.lcd.num_ddim_timesteps)}"
        side = recipe.model.resolution
        return options if side is None else f"{options}, height={side}, width={side}"


def model_card(card: Card) -> str:
    """README.md of an exported pipeline folder: what was trained, from what, on which rewards, and how to sample it."""
    recipe, meta, weights = card.recipe, card.meta, card.weights
    lora = f", adapters of rank {recipe.lora.rank} added to the teacher's weights" if recipe.lora else ""
    return f"""---
{_header(recipe, meta)}
---

# {meta["name"]}

A few-step text-to-image student, distilled by `{recipe.kind}` with rgbench; {weights} weights{lora},
after {meta["step"]} optimiser steps of batch {recipe.train.batch_size}, seed {recipe.seed}.

{_origin(meta)}

## Rewards trained on

{_rewards(meta)}

## Sampling

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{card.left_out()})
image = pipeline("a prompt", {card.options()}).images[0]
```

{_guidance(recipe)}

## Recipe

```yaml
{yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True).strip()}
```
"""


def lora_card(card: Card) -> str:
    """README.md of the adapters' folder."""
    recipe, meta, weights = card.recipe, card.meta, card.weights
    assert recipe.lora is not None
    teacher, lcd = meta["teacher"], recipe.lcd
    source = f'"{teacher["repo"]}", revision="{teacher["revision"]}"' if "repo" in teacher else '"path/to/the/teacher"'
    is_lcm, piped = recipe.gamma is None, card.models.pipeline
    sampler, scaling = (
        ("LCMScheduler", f"timestep_scaling={lcd.timestep_scaling}, ") if is_lcm else ("TCDScheduler", "")
    )
    scheduler = (
        f"{sampler}.from_config(\n    pipeline.scheduler.config, original_inference_steps={lcd.num_ddim_timesteps}, "
        f"{scaling}clip_sample=False, set_alpha_to_one=False\n)"
    )
    if card.is_flow:
        sampler, scheduler = "FlowMatchLCMScheduler", "FlowMatchLCMScheduler.from_config(pipeline.scheduler.config)"
    told = lcd.time_cond_proj_dim is not None and not card.is_flow
    pipeline = "LatentConsistencyModelPipeline" if is_lcm and told else "StableDiffusionPipeline"
    pipeline = pipeline if piped is None else type(piped).__name__
    loading = f"""from diffusers import {", ".join(sorted([sampler, pipeline]))}

pipeline = {pipeline}.from_pretrained({source}{card.left_out()})"""
    if told:
        loading = f"""from diffusers import {", ".join(sorted([sampler, pipeline, "UNet2DConditionModel"]))}
from safetensors.torch import load_file

unet = UNet2DConditionModel.from_pretrained(
    {source}, subfolder="unet", time_cond_proj_dim={lcd.time_cond_proj_dim}, low_cpu_mem_usage=False, device_map=None
)
unet.load_state_dict(load_file("guidance_embedding.safetensors"), strict=False)
pipeline = {pipeline}.from_pretrained({source}, unet=unet)"""
    return f"""---
{_header(recipe, meta, "adapter")}
---

# {meta["name"]}: LoRA

Adapters of rank {recipe.lora.rank} of the student in the folder above; {weights} weights.

{_origin(meta)}

## Rewards trained on

{_rewards(meta)}

## Sampling

In this folder:

```python
{loading}
pipeline.scheduler = {scheduler}
pipeline.load_lora_weights(".")
image = pipeline("a prompt", {card.options()}).images[0]
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
    """Teacher, data, recipe and code, a line each."""
    teacher, git = meta["teacher"], provenance()["git"]
    where = f"`{teacher['repo']}` at `{teacher['revision']}`" if "repo" in teacher else meta["world"]
    data, digest = json.dumps(meta["data"], ensure_ascii=False), meta.get("recipe_sha256")
    code = f"`{git['revision']}`{', with changes' if git['changed'] else ''}" if git else "of a release"
    return f"""- Teacher: {where}, weights sha256 `{teacher["sha256"]}`; its licence holds for this student too
- Data: `{data}`
- Recipe: {f"sha256 `{digest}`, the same for every training seed" if digest else "below"}
- Code: rgbench {__version__}, revision {code}"""


def _rewards(meta: Mapping[str, Any]) -> str:
    """A line a reward, each marked as in-sample."""
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
            f"Guidance for w from {w_min:g} to {w_max:g}, in the LCM form c + w(c − u), is trained in;\n"
            "`guidance_scale` above 1 comes on top of it. Keep it between 1 and 2."
        )
    return (
        f"Guidance was trained for w from {w_min:g} to {w_max:g} in the LCM form c + w(c − u). The pipeline embeds\n"
        f"w = guidance_scale − 1, so `guidance_scale` belongs between {w_min + 1:g} and {w_max + 1:g}."
    )
