"""Pre-training of a latent proxy on (latent, caption) pairs, which LRM starts from.

Nobody has published latent CLIPs. The text tower starts from a CLIP's, the image tower from random weights.

    loss = ½ · (cross-entropy of latents over captions + of captions over latents)     (CLIP, arXiv 2103.00020)

In the last ``proxy.align.steps`` it learns an expert's scores of what a student will show it: latents that the teacher
predicts in one step, and ground truths, each with its own caption and with another.

    loss = Σ over the four of ½ (ẑ − z)²

| symbol | meaning |
|---|---|
| z | score of the expert, standardised over all scores of the micro-batch |
| ẑ | cosine of the proxy, likewise; of a small network its score as it is |

A small network (``proxy.small``) has no towers and learns the scores alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgbench.core.run import RunDirectory, stream_seed
from rgbench.data.batches import Batch
from rgbench.diffusion.schedule import add_noise, predicted_x0
from rgbench.models.pipeline import DiffusionModels, decode_images
from rgbench.rewards.base import Reward, float32_at_least, score
from rgbench.rewards.latent_proxy import LatentCLIP, contrastive_losses
from rgbench.train.base import CaptionTokenizer, OptimiserGroup, Stateful, StepDraws, StepResult, lr_factor
from rgbench.train.cache import encode, encode_latents
from rgbench.train.lcd import call
from rgbench.train.lrm import Proxy, correlation, small_proxy
from rgbench.train.recipe import PROXY_FOLDER, BaseRecipe, LRMPretrainRecipe, find_clip
from rgbench.train.rg_lcd import TINY, crop_offsets, expert_fingerprints, expert_modules, expert_tokenizers, load_expert


class LRMPretrain:
    """The pre-training of a latent proxy.

    Args:
        recipe: validated.
        models: of which the autoencoder is used, and to align the teacher, frozen.
        proxy: what learns.
        expert: whose scores it learns in the end; None where the recipe does not align it.
    """

    def __init__(
        self, recipe: LRMPretrainRecipe, models: DiffusionModels, proxy: Proxy, expert: Reward | None = None
    ) -> None:
        self.recipe, self.models, self.proxy, self.expert = recipe, models, proxy, expert
        self.teacher = models.denoiser(models.unet)
        if isinstance(proxy, LatentCLIP):
            trainable = recipe.proxy.trainable
            self.parameters = proxy.unfreeze(trainable.image_layers, trainable.text_layers)
        else:
            self.parameters = list(proxy.parameters())

    @classmethod
    def build(cls, recipe: BaseRecipe, models: DiffusionModels) -> LRMPretrain:
        """The trainer of a recipe, with a fresh image tower or small network drawn from the recipe's seed.

        Raises:
            UsageError: no CLIP or no expert there, or latents that the patches do not divide.
        """
        assert isinstance(recipe, LRMPretrainRecipe)
        small = recipe.proxy.small
        proxy = fresh_clip(recipe, models) if small is None else small_proxy(recipe.seed, small, models)
        expert = load_expert(recipe, models) if recipe.proxy.align.steps else None
        return cls(recipe, models, proxy, expert)

    def optimiser_groups(self) -> dict[str, OptimiserGroup]:
        """The proxy's trainable part."""
        train = self.recipe.train
        return {
            "proxy": OptimiserGroup(
                self.parameters, train.lr, train, lr_factor(self.recipe.proxy.optimiser, train.steps)
            )
        }

    def modules(self) -> dict[str, Stateful]:
        """The proxy, and what is kept of the expert."""
        return {"proxy": self.proxy, **(expert_modules(self.expert) if self.expert is not None else {})}

    def reward_fingerprints(self) -> list[dict[str, Any]]:
        """The expert's."""
        return expert_fingerprints(self.expert) if self.expert is not None else []

    def tokenizers(self) -> dict[str, CaptionTokenizer]:
        """The proxy's; and where it is aligned those of the teacher's text encoders and of the expert."""
        found = {}
        if isinstance(self.proxy, LatentCLIP):
            found["proxy"] = CaptionTokenizer(self.proxy.tokenizer, int(self.proxy.clip.context_length))
        if self.expert is not None:
            found |= {name: CaptionTokenizer(*limits) for name, limits in self.models.text_limits().items()}
            found |= expert_tokenizers(self.expert)
        return found

    def step(self, batch: Batch, rng: StepDraws) -> StepResult:
        """One contrastive step, whose negatives are the captions of a micro-batch; or one of the alignment."""
        # 1. z = vae.encode(image).sample(), unscaled
        mean, std = encode_latents(self.models, batch)
        latents = mean + std * rng.normal("vae", self.models.latent_shape).to(self.models.device)
        if self.expert is not None and rng.step >= self.recipe.train.steps - self.recipe.proxy.align.steps:
            return self.align(self.expert, latents, batch, rng)

        # 2. unit features of latents and captions
        assert isinstance(self.proxy, LatentCLIP), "a small network is aligned all along"
        images, texts = self.proxy.encode_latents(latents), self.proxy.encode_texts(batch.prompts)

        # 3. InfoNCE in both directions
        losses, found = contrastive_losses(images, texts, self.proxy.logit_scale(), batch.prompts)
        scale = self.proxy.logit_scale().detach().expand(len(losses))
        return StepResult({"proxy": {"contrastive": losses}}, {"retrieval": found, "logit_scale": scale})

    def align(self, expert: Reward, latents: Tensor, batch: Batch, rng: StepDraws) -> StepResult:
        """One step towards the expert's scores; ``latents`` are the unscaled ground truths."""
        # 2. x̂0 of the teacher at z_t = α z + σ ε, t uniform
        with torch.no_grad():
            candidates = torch.cat([self.predict(latents, batch, rng), latents])

            # 3. the expert's scores with each image's own caption and with its neighbour's
            images, offsets = decode_images(self.models.vae, candidates), crop_offsets(expert, rng)
            offsets = None if offsets is None else offsets.repeat(2, 1)
            captions = batch.prompts, [*batch.prompts[1:], batch.prompts[0]]
            scores = torch.cat([score(expert, images, texts * 2, offsets).view(2, -1) for texts in captions])

        # 4. the proxy's; 5. Σ ½ (ẑ − z)²
        found = self.scores(candidates, captions)
        own = standardised(found) if isinstance(self.proxy, LatentCLIP) else found
        losses = 0.5 * (own - standardised(scores)).square().sum(0)
        found = found.detach()
        agree = ((found[0] > found[1]) == (scores[0] > scores[1])).to(scores.dtype)
        stats = {"reward": scores[0], "proxy_reward": found[0], "pair_accuracy": agree}
        return StepResult({"proxy": {"align": losses}}, stats, reward_calls=scores.numel())

    def scores(self, candidates: Tensor, captions: tuple[list[str], list[str]]) -> Tensor:
        """The proxy's, (4, B), of unscaled candidates (2B, C, h, w) with their own captions and their neighbours'."""
        if not isinstance(self.proxy, LatentCLIP):
            return torch.cat([self.proxy(candidates, texts * 2).view(2, -1) for texts in captions])
        features, texts = self.proxy.encode_latents(candidates), self.proxy.encode_texts(captions[0])
        pairs = [float32_at_least(features.unflatten(0, (2, -1)) * own).sum(-1) for own in (texts, texts.roll(-1, 0))]
        return torch.cat(pairs)

    def predict(self, latents: Tensor, batch: Batch, rng: StepDraws) -> Tensor:
        """What the teacher predicts in one step, from noise of all strengths, unscaled (B, C, h, w)."""
        models, embeds = self.models, encode(self.models, batch).prompt_embeds
        noise = rng.normal("align_noise", models.latent_shape).to(latents)
        t = rng.integers("align_t", len(models.schedule)).to(latents.device)
        noisy = add_noise(latents * models.scaling_factor, noise, t, models.schedule)
        output = call(self.teacher, noisy, t, embeds, None)
        return predicted_x0(output, noisy, t, models.schedule, models.prediction_type) / models.scaling_factor

    def watch(self, step: int, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """The correlation of proxy and expert over a batch's predictions, once they are aligned."""
        if "proxy_reward" not in columns:
            return {}
        return {"proxy_correlation": correlation(columns["proxy_reward"], columns["reward"])}

    def after_update(self, moved: Collection[str]) -> None:
        """The bound on a CLIP's logit scale."""
        if isinstance(self.proxy, LatentCLIP):
            self.proxy.clamp_logit_scale()

    def export(self, run: RunDirectory) -> Path:
        """Write the proxy that ``proxy.path`` of a recipe takes; returns its folder."""
        folder = run.path / PROXY_FOLDER
        self.proxy.save(folder)
        return folder


def fresh_clip(recipe: LRMPretrainRecipe, models: DiffusionModels) -> LatentCLIP:
    """A CLIP's text tower with a fresh image tower of a recipe's seed.

    Raises:
        UsageError: no CLIP there, or latents that the patches do not divide.
    """
    clip = find_clip(recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(recipe.seed, "proxy", 0))
        channels, height, width = models.latent_shape
        vision = {"image_size": height if height == width else [height, width], **recipe.proxy.vision.model_dump()}
        proxy = LatentCLIP.from_clip(clip, vision, latent_channels=channels, latent_scale=models.scaling_factor)
    return proxy.to(models.device, models.dtype)


def standardised(scores: Tensor) -> Tensor:
    """Scores of any shape, their mean taken away, over their standard deviation."""
    return (scores - scores.mean()) / scores.std().clamp(min=TINY)
