"""Plain reference step: each method as a textbook writes it, without the trainers' optimisations.

Written from the papers and from the shape of diffusers' ``examples/consistency_distillation``, and from none of the
code of :mod:`rgbench.train` and :mod:`rgbench.diffusion`, so that parity tests and benchmarks compare with one
independent implementation. Other than the trainers,

- it encodes images and captions of every batch, even where a cache holds them;
- it calls the teacher twice, for the prompt and for the empty prompt;
- it decodes and scores prediction, target and data one after another, each with its own text features;
- AdamW and the EMA go through the parameters one at a time, and the loss is read back every step.

| symbol | name | meaning, shape |
|---|---|---|
| z | ``latents`` | VAE latents × ``scaling_factor``, (B, C, h, w) |
| t_{n+k}, t_n | ``start``, ``end`` | drawn point of the DDIM grid, and the point k below it, (B,) int64 |
| f_θ, f_θ⁻ | ``prediction``, ``target`` | of the student and of its EMA, scaled latents |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.data.batches import Batch
from rgbench.models.student import is_lora
from rgbench.rewards.clip import HPSReward
from rgbench.train.base import StepDraws
from rgbench.train.lcd import LCD
from rgbench.train.lrm import LRM
from rgbench.train.mlcm import MLCM
from rgbench.train.recipe import LRMRecipe, RGLCDRecipe
from rgbench.train.rg_lcd import RGLCD
from rgbench.train.tcd import TCD
from rgbench.train.vsd import VSD
from rgbench.train.weighted import Weighted
from tools.bench.timing import DTYPES

SIGMA_DATA = 0.5
SOFTMAX = ("softmax", "standardised")  # weights and advantages of the plain weighted step


class PlainDraws:
    """Draws of a whole batch from the device's global generator.

    Args:
        num: B.
        device: where they are drawn.
    """

    def __init__(self, num: int, device: torch.device) -> None:
        self.num, self.device = num, device

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, (B, *shape)."""
        return torch.randn(self.num, *shape, device=self.device)

    def uniform(self, stream: str, low: float, high: float) -> Tensor:
        """Uniform on [low, high), (B,)."""
        return torch.rand(self.num, device=self.device) * (high - low) + low

    def integers(self, stream: str, high: int) -> Tensor:
        """Uniform on 0 … high − 1, (B,) int64."""
        return torch.randint(high, (self.num,), device=self.device)


class PlainStep:
    """One step of a method on a trainer's own networks, which it updates.

    Of the neighbours it has TCD, MLCM at the edge, weighted consistency training with softmax weights, and the steps of
    VSD and DOLLAR in which all networks move.

    Args:
        trainer: gives networks, settings and frozen parts; none of its methods is called.

    Raises:
        UsageError: a setting that the plain step lacks, such as LoRA, a reward other than HPS, or a reward scale by
            gradient share.
    """

    def __init__(self, trainer: LCD) -> None:
        self.trainer, self.recipe, self.models = trainer, trainer.recipe, trainer.models
        _check(trainer)
        train = self.recipe.train
        student = list(trainer.student.parameters())
        self.parameters: dict[str, list[nn.Parameter]] = {"student": student}
        self.max_norms = {"student": train.max_grad_norm}
        self.optimisers = {"student": _adamw(student, train.lr, train.betas, train.weight_decay)}
        if isinstance(trainer, LRM):
            proxy, own = trainer.recipe.proxy, trainer.recipe.proxy.optimiser
            self.parameters["proxy"] = trainer.proxy_parameters
            self.max_norms["proxy"] = own.max_grad_norm
            self.optimisers["proxy"] = _adamw(trainer.proxy_parameters, proxy.lr, own.betas, own.weight_decay)
        if isinstance(trainer, VSD):
            vsd, parameters = trainer.recipe.vsd, list(trainer.fake.parameters())
            self.parameters["fake"], self.max_norms["fake"] = parameters, vsd.optimiser.max_grad_norm
            self.optimisers["fake"] = _adamw(parameters, vsd.lr, vsd.optimiser.betas, vsd.optimiser.weight_decay)

    def __call__(self, batch: Batch, draws: StepDraws | PlainDraws) -> dict[str, float]:
        """Take a whole step: losses, backward, clip, AdamW, EMA.

        Args:
            batch: B images with captions, (B, 3, H, W) in [0, 1].
            draws: B rows.

        Returns:
            The loss of each optimiser.
        """
        with self._autocast():
            losses = self.losses(batch, draws)
        for loss in losses.values():
            loss.backward()
        for name, optimiser in self.optimisers.items():
            nn.utils.clip_grad_norm_(self.parameters[name], self.max_norms[name])
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._average()
        if isinstance(self.trainer, LRM) and self.recipe.proxy.small is None:  # type: ignore[attr-defined]
            self.trainer.proxy.clip.logit_scale.data.clamp_(max=math.log(100))  # type: ignore[attr-defined]
        return {name: loss.item() for name, loss in losses.items()}

    def losses(self, batch: Batch, draws: StepDraws | PlainDraws) -> dict[str, Tensor]:
        """Scalar losses with gradient, one for each optimiser."""
        settings, networks = self.recipe.lcd, self.trainer.networks
        latents, embeds = self._encode(batch, draws)
        noise = draws.normal("noise", self.models.latent_shape).to(latents.device)
        index = draws.integers("index", settings.num_ddim_timesteps).to(latents.device)
        w = draws.uniform("w", settings.w_min, settings.w_max).to(latents.device)
        num_timesteps = len(networks.schedule)
        skip = num_timesteps // settings.num_ddim_timesteps
        start = skip * (index + 1) - 1
        end = (start - skip).clamp(min=0)
        alphas, sigmas = self._alphas_sigmas(start, latents)
        noisy = alphas * latents + sigmas * noise
        embedding = self._embed_guidance(w)
        output = self._unet(networks.student, noisy, start, embeds, embedding)
        with torch.no_grad():
            uncond_embeds = self._encode_texts([""] * len(batch.prompts))
            previous = noisy
            here, num = start, settings.teacher_steps
            for i in range(1, num + 1):
                there = start - torch.round((start - end) * i / num).long()
                previous = self._jump(*self._guided(previous, here, embeds, uncond_embeds, w), there)
                here = there
            if isinstance(self.trainer, Weighted):
                alphas, sigmas = self._alphas_sigmas(end, latents)
                chosen = draws.uniform("source", 0.0, 1.0).to(latents.device) < self._own("weighted").share
                previous = torch.where(chosen.view(-1, 1, 1, 1), alphas * latents + sigmas * noise, previous)
            follow = networks.target
            if isinstance(self.trainer, MLCM) and self._own("mlcm").target == "student":
                follow = networks.student
            followed = self._unet(follow, previous, end, embeds, embedding)
        if isinstance(self.trainer, (TCD, MLCM)):
            goal = self._goal(index, start, end, skip, draws)
            left, right = self._x0_eps(output, noisy, start), self._x0_eps(followed, previous, end)
            zero = torch.zeros_like(end)
            prediction, target = self._jump(*left, zero), self._jump(*right, zero)
            same = (goal == end).view(-1, 1, 1, 1)
            loss = self._distances(self._jump(*left, goal), torch.where(same, previous, self._jump(*right, goal)))
        else:
            prediction, target = self._consistency(output, noisy, start), self._consistency(followed, previous, end)
            loss = self._distances(prediction, target)
        if isinstance(self.trainer, Weighted):
            assert batch.scores is not None and batch.rank is not None
            advantages = (batch.scores - batch.scores.mean(1, keepdim=True)).to(loss)
            advantages = advantages / (batch.scores.std(1, keepdim=True, correction=0) + 1e-6)
            weights = torch.softmax(advantages / self._own("weighted").temperature, dim=1) * batch.scores.shape[1]
            loss = loss * weights[torch.arange(len(loss)), batch.rank].to(loss)
        if isinstance(self.trainer, VSD):
            return self._with_fake(loss.mean(), prediction, latents, embeds, uncond_embeds, embedding, w, batch, draws)
        return self._with_reward(loss.mean(), prediction, target, latents, batch.prompts)

    def _distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean of each sample, (B,)."""
        settings, gap = self.recipe.lcd, prediction - target
        if settings.loss == "l2":
            return gap.pow(2).mean((1, 2, 3))
        return (torch.sqrt(gap**2 + settings.huber_c**2) - settings.huber_c).mean((1, 2, 3))

    def _goal(self, index: Tensor, start: Tensor, end: Tensor, skip: int, draws: StepDraws | PlainDraws) -> Tensor:
        """Where TCD's and MLCM's jumps end, (B,) int64."""
        if isinstance(self.trainer, TCD):
            places = (draws.uniform("s", 0.0, 1.0).to(index.device) * (index + 1)).floor().long()
            return (skip * (torch.minimum(places, index) + 1) - 1 - skip).clamp(min=0)
        grid = [skip * (n + 1) - 1 for n in range(self.recipe.lcd.num_ddim_timesteps)][::-1]
        (stage,) = self._own("mlcm").stages
        edges = [grid[i * len(grid) // stage.segments] for i in range(stage.segments)]
        below = [max([0, *(edge for edge in edges if edge < t)]) for t in start.tolist()]
        return torch.tensor(below, device=start.device)

    def _guided(
        self, latents: Tensor, timesteps: Tensor, embeds: Tensor, uncond_embeds: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x̂0 and ε̂ of the guided teacher, in two calls."""
        teacher = self.trainer.networks.teacher
        conditional, unconditional = (
            self._x0_eps(self._unet(teacher, latents, timesteps, each), latents, timesteps)
            for each in (embeds, uncond_embeds)
        )
        scale = w.view(-1, 1, 1, 1)
        x0, eps = (c + scale * (c - u) for c, u in zip(conditional, unconditional, strict=True))
        return x0, eps

    def _jump(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        alphas, sigmas = self._alphas_sigmas(timesteps, x0)
        return alphas * x0 + sigmas * eps

    def _own(self, section: str) -> Any:
        return getattr(self.recipe, section)

    def _with_fake(
        self,
        loss: Tensor,
        x: Tensor,
        latents: Tensor,
        embeds: Tensor,
        uncond_embeds: Tensor,
        embedding: Tensor | None,
        w: Tensor,
        batch: Batch,
        draws: StepDraws | PlainDraws,
    ) -> dict[str, Tensor]:
        """Losses of VSD, as DMD2 writes them, of its fake score, and of DOLLAR's reward and proxy."""
        trainer: Any = self.trainer
        own, factor = self._own("vsd"), self.models.scaling_factor
        with torch.no_grad():
            t = 20 + draws.integers("vsd_t", 961).to(x.device)
            alphas, sigmas = self._alphas_sigmas(t, x)
            z = alphas * x + sigmas * draws.normal("vsd_noise", x.shape[1:]).to(x.device)
            real, _ = self._guided(z, t, embeds, uncond_embeds, w if own.w is None else torch.full_like(w, own.w))
            fake, _ = self._x0_eps(self._unet(trainer.fake, z, t, embeds, embedding), z, t)
            gradient = ((x - real) - (x - fake)) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        losses = {"student": own.consistency * loss + own.scale * 0.5 * F.mse_loss(x, (x - gradient).detach())}
        t = draws.integers("fake_t", 1000).to(x.device)
        alphas, sigmas = self._alphas_sigmas(t, x)
        noise, images = draws.normal("fake_noise", x.shape[1:]).to(x.device), x.detach()
        wanted = {"epsilon": noise, "v_prediction": alphas * noise - sigmas * images, "sample": images}
        found = self._unet(trainer.fake, alphas * images + sigmas * noise, t, embeds, embedding)
        losses["fake"] = F.mse_loss(found, wanted[trainer.networks.prediction_type])
        if isinstance(trainer, LRM):
            assert trainer.moments is not None
            proxy, (mean, std) = copy.deepcopy(trainer.proxy).requires_grad_(False), trainer.moments.expert
            losses["student"] = losses["student"] - _scale(trainer) * proxy(x / factor, batch.prompts).mean()
            losses["proxy"] = torch.zeros((), device=x.device)
            for each in (images / factor, latents / factor):
                with torch.no_grad():
                    score = (self._expert(self._decode(each), batch.prompts) - mean) / std
                losses["proxy"] = losses["proxy"] + 0.5 * F.mse_loss(trainer.proxy(each, batch.prompts), score)
        return losses

    def _with_reward(
        self, loss: Tensor, prediction: Tensor, target: Tensor, latents: Tensor, prompts: list[str]
    ) -> dict[str, Tensor]:
        """Losses of the method: L_LCD, minus β · R of the decoded prediction or by the proxy; and the proxy's own."""
        trainer, factor = self.trainer, self.models.scaling_factor
        if not isinstance(trainer, RGLCD):
            return {"student": loss}
        scale = _scale(trainer)
        if not isinstance(trainer, LRM):
            reward = self._expert(self._decode(prediction / factor), prompts)
            return {"student": loss - scale * reward.mean()}
        for parameter in trainer.proxy_parameters:
            parameter.requires_grad_(False)
        reward = self._proxy(prediction / factor, prompts)
        for parameter in trainer.proxy_parameters:
            parameter.requires_grad_(True)
        candidates = [prediction.detach() / factor, target / factor, latents / factor]
        with torch.no_grad():
            experts = [self._expert(self._decode(c), prompts) * trainer.logit_scale for c in candidates]
        proxies = [self._proxy(c, prompts) * trainer.proxy.logit_scale() for c in candidates]
        pairs = torch.zeros((), device=latents.device)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            label = torch.softmax(torch.stack([experts[i], experts[j]], dim=1), dim=1)
            guess = torch.log_softmax(torch.stack([proxies[i], proxies[j]], dim=1), dim=1)
            pairs = pairs + F.kl_div(guess, label, reduction="batchmean")
        return {"student": loss - scale * reward.mean(), "proxy": pairs}

    def _autocast(self) -> Any:
        dtype = DTYPES[self.recipe.train.dtype]
        return torch.autocast(self.models.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def _encode(self, batch: Batch, draws: StepDraws | PlainDraws) -> tuple[Tensor, Tensor]:
        """Scaled latents (B, C, h, w) and text states (B, L, D)."""
        models = self.models
        assert batch.images_BCHW is not None  # of a source that is not cached
        posterior = models.vae.encode(batch.images_BCHW.to(models.device, models.dtype) * 2 - 1).latent_dist
        noise = draws.normal("vae", models.latent_shape).to(models.device)
        return (posterior.mean + posterior.std * noise) * models.scaling_factor, self._encode_texts(batch.prompts)

    @torch.no_grad()
    def _encode_texts(self, prompts: list[str]) -> Tensor:
        tokenizer = self.models.tokenizer
        length = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.models.text_encoder(tokens.input_ids.to(self.models.device))[0]

    def _decode(self, latents: Tensor) -> Tensor:
        return (self.models.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    def _expert(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosines (B,) of images and prompts, both encoded at every call."""
        expert: Any = self.trainer.expert  # type: ignore[attr-defined]
        image = F.normalize(expert.model.encode_image(expert.preprocess(images.to(expert.dtype))), dim=-1)
        tokens = expert.tokenizer(prompts).to(images.device)
        text = F.normalize(expert.model.encode_text(tokens), dim=-1)
        return (image * text).sum(-1)

    def _proxy(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """Cosines (B,) of latents and prompts, both encoded at every call."""
        proxy: Any = self.trainer.proxy  # type: ignore[attr-defined]
        image = F.normalize(proxy.clip.encode_image(latents * proxy.config["latent_scale"]), dim=-1)
        text = F.normalize(proxy.clip.encode_text(proxy.tokenizer(prompts).to(latents.device)), dim=-1)
        return (image * text).sum(-1)

    @staticmethod
    def _unet(unet: Any, latents: Tensor, timesteps: Tensor, embeds: Tensor, embedding: Tensor | None = None) -> Tensor:
        return unet(latents, timesteps, timestep_cond=embedding, encoder_hidden_states=embeds).sample

    def _alphas_sigmas(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        cumprod = cast(Tensor, self.trainer.networks.schedule)[timesteps].to(like.dtype).view(-1, 1, 1, 1)
        return torch.sqrt(cumprod), torch.sqrt(1 - cumprod)

    def _x0_eps(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """x̂0 and ε̂ of a network's output."""
        alphas, sigmas = self._alphas_sigmas(timesteps, latents)
        kind = self.trainer.networks.prediction_type
        if kind == "epsilon":
            return (latents - sigmas * output) / alphas, output
        if kind == "v_prediction":
            return alphas * latents - sigmas * output, alphas * output + sigmas * latents
        return output, (latents - alphas * output) / sigmas

    def _consistency(self, output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        scaled = (timesteps.to(latents.dtype) * self.recipe.lcd.timestep_scaling).view(-1, 1, 1, 1)
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / torch.sqrt(scaled**2 + SIGMA_DATA**2)
        return c_skip * latents + c_out * self._x0_eps(output, latents, timesteps)[0]

    def _embed_guidance(self, w: Tensor) -> Tensor | None:
        dim = self.recipe.lcd.time_cond_proj_dim
        if dim is None:
            return None
        rate = torch.log(torch.tensor(10000.0, dtype=w.dtype, device=w.device)) / (dim // 2 - 1)
        frequencies = torch.exp(torch.arange(dim // 2, dtype=w.dtype, device=w.device) * -rate)
        angles = (w * 1000.0)[:, None] * frequencies[None]
        return F.pad(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1), (0, dim % 2))

    @torch.no_grad()
    def _average(self) -> None:
        """θ⁻ ← μ θ⁻ + (1 − μ) θ, one parameter at a time."""
        decay = self.recipe.train.ema_decay
        pairs = zip(self.trainer.target.parameters(), self.trainer.student.parameters(), strict=True)
        for average, value in pairs:
            average.mul_(decay).add_(value, alpha=1 - decay)


def _adamw(
    parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], decay: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=decay, foreach=False, fused=False)


def _scale(trainer: RGLCD) -> float:
    scale = trainer.recipe.guidance.scale
    if scale is None:
        raise UsageError("bench: the plain step takes guidance.scale, no guidance.share")
    return scale


def _check(trainer: LCD) -> None:
    recipe = trainer.recipe
    lacking = ["lora"] if is_lora(trainer.student) else []
    if isinstance(recipe, RGLCDRecipe) and isinstance(trainer, RGLCD):
        _scale(trainer)
        lacking += ["guidance.window"] if recipe.guidance.window else []
        lacking += ["reward but hps"] if type(trainer.expert) is not HPSReward else []
    loss = "regression" if isinstance(trainer, VSD) else "kl"
    if isinstance(recipe, LRMRecipe) and recipe.proxy.loss != loss:
        lacking.append(f"proxy.loss {recipe.proxy.loss}")
    if isinstance(trainer, TCD) and recipe.tcd.s != "uniform":  # type: ignore[attr-defined]
        lacking.append(f"tcd.s {recipe.tcd.s}")  # type: ignore[attr-defined]
    if isinstance(trainer, MLCM) and (len(recipe.mlcm.stages) > 1 or recipe.mlcm.space != "edge"):  # type: ignore[attr-defined]
        lacking.append("mlcm.stages of more than one, mlcm.space x0")
    if isinstance(trainer, VSD) and recipe.ratio > 1:
        lacking.append("vsd.ratio above 1")
    if isinstance(trainer, Weighted) and (recipe.weighted.weights, recipe.weighted.advantage) != SOFTMAX:  # type: ignore[attr-defined]
        lacking.append("weights but the softmax of standardised advantages")
    if lacking:
        raise UsageError(f"bench: the plain step has no {', '.join(lacking)}; use the packaged recipe's settings")
