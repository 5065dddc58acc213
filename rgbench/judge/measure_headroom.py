"""Measures headroom: several images of each prompt, scored by the trained reward, gold, held-out rewards and a proxy.

images → scores (P, n) → picks and agreement (:mod:`rgbench.judge.headroom`)
images → latents → noised to a timestep → one prediction of the model → scores → agreement
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rgbench.benchtop.scenes import Scenes
from rgbench.core.errors import UsageError
from rgbench.core.progress import bar
from rgbench.data.prompts import Prompt
from rgbench.diffusion.consistency import consistency_function
from rgbench.diffusion.sampling import draw_noise, told_model
from rgbench.diffusion.schedule import add_noise, predicted_x0
from rgbench.evaluate.config import EvalConfig
from rgbench.evaluate.evaluate import Session, metric_context, open_session, open_source
from rgbench.evaluate.images import ImageStream, noise_seed
from rgbench.evaluate.results import generation_folder
from rgbench.evaluate.targets import Target
from rgbench.judge.headroom import (
    RANDOM,
    Group,
    Headroom,
    Range,
    explain,
    has_spread,
    link,
    picks,
    write_headroom,
)
from rgbench.judge.verdict import GOLD
from rgbench.metrics.base import Metric
from rgbench.metrics.features import FeatureRows
from rgbench.metrics.fid import Moments, reference_gaussian
from rgbench.metrics.reference import ReferenceScenes, from_uint8
from rgbench.metrics.rewards import find_metric
from rgbench.models.pipeline import DiffusionModels
from rgbench.rewards.latent_proxy import LatentCLIP

PROXY = "latent_proxy"
GOLDS = ("gold_utility", "oracle")  # metrics; the first that fits is gold, as in verdicts
RIGHT = "oracle_all"
SHOWN = ("gold_utility", "degradation", RIGHT, "oracle_mean")  # values of these metrics that picks report
NUM_PROMPTS, SAMPLES = 64, 8
BATCH = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadroomOptions:
    """What is measured besides the images.

    Attributes:
        samples: images of each prompt, n.
        reward: metric of the trained reward.
        held_out: metrics of rewards that no student is trained on; they stand for gold where no oracle fits.
        proxy: folder of a latent proxy; the preset's by default.
        ranges: timestep ranges of single-step predictions; 0 for none.
    """

    samples: int = SAMPLES
    reward: str = "hps"
    held_out: tuple[str, ...] = ()
    proxy: Path | None = None
    ranges: int = 4

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError(f"--samples {self.samples}: to pick one, take at least 2 images of each prompt")


def measure_headroom(config: EvalConfig, options: HeadroomOptions) -> list[Headroom]:
    """Make images of each target, score and pick them, and store ``headroom.json`` beside each target's results.

    Args:
        config: of the images; its seeds and metrics are replaced.
        options: see there.

    Raises:
        UsageError: an unknown target or metric, a proxy of other latents, or nothing that stands for gold.
    """
    metrics = (options.reward, *options.held_out)
    settled = {"seeds": f"0-{options.samples - 1}", "metrics": metrics, "num": config.num}
    if config.num is None and config.prompts in (None, "benchtop"):
        settled["num"] = NUM_PROMPTS
    config = EvalConfig(**{**dict(config), **settled})
    found = []
    with open_session(config) as (session, targets):
        for target in targets:
            bench = _Bench(target, session, options)
            measured = bench.headroom()
            place = generation_folder(config.results, target.world, target.name, bench.source.generation)
            place.mkdir(parents=True, exist_ok=True)
            write_headroom(place, measured)
            found.append(measured)
    return found


class _Bench:
    """One target with what scores its images.

    Args:
        target: the model.
        session: of the evaluation.
        options: what is measured.
    """

    def __init__(self, target: Target, session: Session, options: HeadroomOptions) -> None:
        self.target, self.session, self.options = target, session, options
        source = open_source(target, session)
        assert isinstance(source, ImageStream), "several seeds of a folder of images were refused"
        self.source = source
        self.models = source.models if isinstance(source.models, DiffusionModels) else None
        self.num_ranges = options.ranges if self.models is not None else 0
        if self.models is None and options.proxy is not None:
            raise UsageError(f"{target.name}: a latent proxy reads latents of Stable Diffusion 1, 2; leave out --proxy")
        if options.ranges and not self.num_ranges:
            log.warning("left out: one-step predictions, which a pipeline that is called does not give")
        num = len(session.prompts)
        rows = FeatureRows(num, session.compared.features.network.num_features)
        self.context = metric_context(target, source, rows, session)
        self.metrics = [find_metric(name, session.judges)(self.context) for name in session.config.metrics]
        self.oracles = [metric for name in GOLDS if (metric := self._fitting(name)) is not None]
        if not self.oracles and not options.held_out:
            raise UsageError(
                f"{target.name}: nothing stands for gold: give prompts with scenes, or a held-out reward: --held-out "
                "pickscore --judge pickscore=PATH"
            )
        self.with_features = self._fitting("fid") is not None
        self.proxy = self._load_proxy()
        self.num_prompts = num // options.samples

    def _fitting(self, name: str) -> Metric | None:
        try:
            return find_metric(name, self.session.judges)(self.context)
        except UsageError as error:
            log.info("left out: %s: %s", name, error)
            return None

    def _load_proxy(self) -> LatentCLIP | None:
        """The proxy that was named, which must fit; else the world's, where it does."""
        preset, folder = self.target.preset, self.options.proxy
        own = preset.latent_proxy_folder() if preset is not None and preset.latent_proxy is not None else None
        source = folder or own
        if source is None or self.models is None:
            return None
        proxy = LatentCLIP.load(source, self.session.device)
        try:
            proxy.check_fits(self.models.latent_shape, self.models.scaling_factor, source)
        except UsageError as error:
            if folder is not None:
                raise
            log.info("left out: the world's latent proxy: %s", error)
            return None
        return proxy

    def headroom(self) -> Headroom:
        """All that is measured of the target."""
        scores, latents = self._score_images()
        rewards = self._names(self.metrics)
        gold = next(name for name in (*GOLD.metrics, *rewards[1:]) if name in scores)
        pickers = [rewards[0], *([PROXY] if self.proxy else []), gold]
        for name in pickers:
            if not has_spread(scores[name]).any():
                log.warning("%s scores all images of each prompt alike: it cannot pick one", name)
        distances = {by: self._distance(scores.get(by)) for by in (RANDOM, *pickers)} if self.with_features else {}
        ranges = tuple(self._range(i, latents, rewards[0], gold) for i in range(self.num_ranges))
        reward = self.metrics[0]
        found = Headroom(
            world=self.target.world,
            model=self.target.name,
            generation=self.source.generation.id,
            prompts=self.session.prompts.sha256,
            num_prompts=self.num_prompts,
            samples=self.options.samples,
            reward=rewards[0],
            reward_fields=reward.planned[0][1].fields.get("reward"),
            gold=gold,
            groups=tuple(_groups(self.session.prompts.prompts[: self.num_prompts], scores, pickers, gold, distances)),
            ranges=ranges,
            real_gain=self._real_gain(reward, float(scores[rewards[0]].mean())),
            provenance=self.session.provenance,
        )
        return found.model_copy(update={"words": explain(found)})

    def _names(self, metrics: Sequence[Metric]) -> list[str]:
        """The first value of each reward."""
        return [metric.planned[0][0] for metric in metrics]

    def _score_images(self) -> tuple[dict[str, np.ndarray], Tensor]:
        """(P, n) of each metric, and the (P · n, C, h, w) latents of the images, scaled; none of a called pipeline."""
        every, latents, proxied = [*self.metrics, *self.oracles], [], []
        title = f"{self.target.name}: {self.source.label}"
        with bar(self.session.progress, title, len(self.session.prompts)) as task:
            advance = partial(self.session.progress.advance, task)
            for batch in self.source.stream(np.arange(len(self.session.prompts)), advance):
                self.session.check_stop("results")
                images, texts = from_uint8(batch.images), [prompt.text for prompt in batch.prompts]
                for metric in every:
                    metric.update(images, batch.prompts, batch.positions)
                if self.with_features:
                    self.context.see(images, batch.positions)
                if self.models is None:
                    continue
                mean, _ = self.models.encode_images(images)
                latents.append((mean * self.models.scaling_factor).cpu())
                if self.proxy is not None:
                    proxied.append(self._proxy_scores(mean, texts))
        scores = self._rows(every)
        if proxied:
            scores[PROXY] = self._by_prompt(np.concatenate(proxied))
        return scores, torch.cat(latents) if latents else torch.empty(0)

    @torch.inference_mode()
    def _proxy_scores(self, latents: Tensor, texts: Sequence[str]) -> np.ndarray:
        assert self.proxy is not None
        return self.proxy(latents.float(), texts).double().cpu().numpy()

    def _rows(self, metrics: Sequence[Metric]) -> dict[str, np.ndarray]:
        """(P, n) of each metric's values of the images that it was shown last."""
        wanted = (*self._names(self.metrics), *SHOWN)
        values = [value for metric in metrics for value in metric.compute() if value.metric in wanted]
        return {value.metric: self._by_prompt(value.rows) for value in values if value.rows is not None}

    def _by_prompt(self, rows: np.ndarray) -> np.ndarray:
        """(P, n) of (n · P,): the prompts come in order under one seed after another."""
        return rows.reshape(self.options.samples, self.num_prompts).T.copy()

    def _distance(self, scores: np.ndarray | None) -> float:
        """Fréchet distance of one image of each prompt: the best, the first of equal ones; the first without scores."""
        best = np.zeros(self.num_prompts, dtype=np.int64) if scores is None else scores.argmax(1)
        positions = best * self.num_prompts + np.arange(self.num_prompts)
        return reference_gaussian(self.context).distance(Moments.of(self.context.rows.take(np.sort(positions))))

    def _real_gain(self, reward: Metric, generated: float) -> float | None:
        """What real scenes of the prompts score above the model's images."""
        if not self.oracles or not isinstance(self.session.compared.features.reference, ReferenceScenes):
            return None
        for at in np.array_split(np.arange(self.num_prompts), -(-self.num_prompts // BATCH)):
            images = from_uint8(self.session.scenes.images[at]).to(self.session.device)
            reward.update(images, [self.session.prompts.prompts[i] for i in at], at)
        rows = reward.compute()[0].rows
        assert rows is not None, "a reward has one value for each image"
        return float(rows[: self.num_prompts].mean()) - generated

    # Single-step predictions

    def _range(self, number: int, latents: Tensor, reward: str, gold: str) -> Range:
        """Agreement on predictions from the images' own latents, noised to the middle of one range of timesteps."""
        models = self.models
        assert models is not None, "no range is asked for then"
        edges = np.linspace(0, len(models.schedule), self.options.ranges + 1).astype(int)
        low, high = int(edges[number]), int(edges[number + 1])
        t, prompts = (low + high) // 2, self.session.prompts.prompts
        metrics = [self.metrics[0], *(self.oracles or self.metrics[1:])]
        proxied = []
        for at in np.array_split(np.arange(len(prompts)), -(-len(prompts) // BATCH)):
            self.session.check_stop("results")
            batch = [prompts[i] for i in at]
            predicted = self._predict(models, latents[at].to(self.session.device), t, batch)
            images = models.decode(predicted).float()
            for metric in metrics:
                metric.update(images, batch, at)
            if self.proxy is not None:
                texts = [prompt.text for prompt in batch]
                proxied.append(self._proxy_scores(predicted / models.scaling_factor, texts))
        scores = self._rows(metrics)
        if proxied:
            scores[PROXY] = self._by_prompt(np.concatenate(proxied))
        by = [reward, *([PROXY] if proxied else [])]
        links = tuple(link(name, scores[name], scores[gold], scores.get(RIGHT)) for name in by)
        return Range(low=low, high=high, timestep=t, links=links)

    @torch.inference_mode()
    def _predict(self, models: DiffusionModels, latents: Tensor, timestep: int, prompts: Sequence[Prompt]) -> Tensor:
        """The model's x̂0 of latents (B, C, h, w) noised to a timestep."""
        draws = [torch.Generator().manual_seed(noise_seed(prompt.id, prompt.seed)) for prompt in prompts]
        noise = draw_noise(draws, models.latent_shape, latents)
        t_B = torch.full((len(latents),), timestep, device=latents.device)
        noisy = add_noise(latents, noise, t_B, models.schedule)
        return predict_clean(
            models, noisy, t_B, [prompt.text for prompt in prompts], self.source.sampling.guidance_scale
        )


def predict_clean(
    models: DiffusionModels, noisy: Tensor, timesteps: Tensor, texts: Sequence[str], guidance: float
) -> Tensor:
    """The clean latents that a model predicts in one step: a student's consistency function, or a teacher's x̂0.

    Args:
        models: the model.
        noisy: scaled latents, (B, C, h, w).
        timesteps: (B,), all alike.
        texts: B prompts.
        guidance: scale in the pipelines' form.
    """
    embeds = models.encode_prompts(texts)
    uncond = models.encode_empty().expand_as(embeds)
    output = told_model(models.denoiser(models.unet), embeds, uncond, guidance)(noisy, timesteps[0])
    if models.sampler == "lcm":
        schedule = (models.schedule, models.prediction_type, models.timestep_scaling)
        return consistency_function(output, noisy, timesteps, *schedule)
    return predicted_x0(output, noisy, timesteps, models.schedule, models.prediction_type)


def _groups(
    prompts: Sequence[Prompt],
    scores: Mapping[str, np.ndarray],
    pickers: Sequence[str],
    gold: str,
    distances: Mapping[str, float | None],
) -> Iterator[Group]:
    """All prompts, then those of each group and of each number of objects, where there are several."""
    labels = [(prompt.group, _objects(prompt)) for prompt in prompts]
    names = ["", *sorted({name for pair in labels for name in pair if name})]
    for name in names:
        at = np.array([not name or name in pair for pair in labels])
        if name and at.all():
            continue
        own = {metric: rows[at] for metric, rows in scores.items()}
        links = tuple(link(by, own[by], own[gold], own.get(RIGHT)) for by in pickers if by != gold)
        found = picks(own, pickers, {} if name else distances)
        yield Group(name=name, num_prompts=int(at.sum()), picks=found, links=links)


def _objects(prompt: Prompt) -> str:
    """How many objects a prompt's scene has, in words; "" without a scene."""
    if not prompt.scene:
        return ""
    return "two objects" if Scenes.from_dicts([prompt.scene]).count[0] == 2 else "one object"
