"""Contrastive pre-training of a latent proxy on (latent, caption) pairs, which LRM starts from.

Nobody has published latent CLIPs. The text tower starts from a CLIP's, the image tower from random weights.

    loss = ½ · (cross-entropy of latents over captions + of captions over latents)     (CLIP, arXiv 2103.00020)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.core.run import RunDirectory, stream_seed
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels
from rgbench.rewards.latent_proxy import LatentCLIP, contrastive_losses
from rgbench.train.base import CaptionTokenizer, OptimiserGroup, Stateful, StepDraws, StepResult, lr_factor
from rgbench.train.cache import encode_latents
from rgbench.train.recipe import PROXY_FOLDER, BaseRecipe, LRMPretrainRecipe, find_clip


class LRMPretrain:
    """The pre-training of a latent proxy.

    Args:
        recipe: validated.
        models: of which the autoencoder is used, frozen.
        proxy: what learns.
    """

    def __init__(self, recipe: LRMPretrainRecipe, models: DiffusionModels, proxy: LatentCLIP) -> None:
        self.recipe, self.models, self.proxy = recipe, models, proxy
        trainable = recipe.proxy.trainable
        self.parameters = proxy.unfreeze(trainable.image_layers, trainable.text_layers)

    @classmethod
    def build(cls, recipe: BaseRecipe, models: DiffusionModels) -> LRMPretrain:
        """The trainer of a recipe, with a fresh image tower drawn from the recipe's seed.

        Raises:
            UsageError: no CLIP there, or latents that the patches do not divide.
        """
        assert isinstance(recipe, LRMPretrainRecipe)
        clip = find_clip(recipe)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(recipe.seed, "proxy", 0))
            channels, height, width = models.latent_shape
            vision = {"image_size": height if height == width else [height, width], **recipe.proxy.vision.model_dump()}
            proxy = LatentCLIP.from_clip(clip, vision, latent_channels=channels, latent_scale=models.scaling_factor)
        return cls(recipe, models, proxy.to(models.device, models.dtype))

    def optimiser_groups(self) -> dict[str, OptimiserGroup]:
        """The proxy's trainable part."""
        train = self.recipe.train
        return {
            "proxy": OptimiserGroup(
                self.parameters, train.lr, train, lr_factor(self.recipe.proxy.optimiser, train.steps)
            )
        }

    def modules(self) -> dict[str, Stateful]:
        """The proxy."""
        return {"proxy": self.proxy}

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """No reward."""
        return []

    def tokenizers(self) -> dict[str, CaptionTokenizer]:
        """The proxy's."""
        return {"proxy": CaptionTokenizer(self.proxy.tokenizer, int(self.proxy.clip.context_length))}

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """One contrastive step; the captions of a micro-batch are its negatives."""
        # 1. z = vae.encode(image).sample(), unscaled
        mean, std = encode_latents(self.models, batch)
        latents = mean + std * rng.normal("vae", self.models.latent_shape).to(self.models.device)

        # 2. unit features of latents and captions
        images, texts = self.proxy.encode_latents(latents), self.proxy.encode_texts(batch.prompts)

        # 3. InfoNCE in both directions
        losses, found = contrastive_losses(images, texts, self.proxy.logit_scale(), batch.prompts)
        scale = self.proxy.logit_scale().detach().expand(len(losses))
        return StepResult({"proxy": {"contrastive": losses}}, {"retrieval": found, "logit_scale": scale})

    def watch(self, step: int, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Nothing."""
        return {}

    def after_update(self, moved: Collection[str]) -> None:
        """The bound on the logit scale."""
        self.proxy.clamp_logit_scale()

    def export(self, run: RunDirectory) -> Path:
        """Write the latent CLIP that ``proxy.path`` of an LRM recipe takes; returns its folder."""
        folder = run.path / PROXY_FOLDER
        self.proxy.save(folder)
        return folder
