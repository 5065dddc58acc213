"""Benchmarks within one process: a training step, generation, an evaluation.

Contenders share networks and run in turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from PIL import Image
from torch import Tensor

from rgbench.core.io import sha256_file
from rgbench.core.launch import Ranks
from rgbench.core.registry import resolve
from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch, BatchLoader, DataSource, batch_indices
from rgbench.data.sources import open_source
from rgbench.evaluate.config import EvalConfig
from rgbench.evaluate.evaluate import evaluate
from rgbench.evaluate.images import noise_seed
from rgbench.evaluate.results import load_results
from rgbench.metrics import networks as metric_networks
from rgbench.metrics.networks import INCEPTION_FILE
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.models.student import make_student
from rgbench.train.base import autocast
from rgbench.train.cache import encode
from rgbench.train.lcd import LCD
from rgbench.train.loop import Loop
from rgbench.train.recipe import LCDRecipe, load_recipe
from tools.bench.networks import (
    CAPTIONS,
    HeldImages,
    Shape,
    random_models,
    random_trainer,
    save_inception,
    save_reward,
)
from tools.bench.plain import PlainDraws, PlainStep
from tools.bench.timing import DTYPES, alternate, count_flops, matmul_rate, peak_bytes, ratio, spread

PLAIN, OURS, CACHED = "plain", "rgbench", "rgbench, latents cached"
DIFFUSERS = "diffusers"
NUM_DDIM_TIMESTEPS, TIMESTEP_SCALING, EMBEDDING = 50, 10.0, 256  # of the recipes
STEPS, BENCHTOP_GUIDANCE, FULL_SIZE_GUIDANCE = 4, 5.0, 8.5  # likewise
FULL_SIZE_METRICS = ("fid", "kid", "hps")  # cost grows in proportion to the number of images
NUM_PAPER = 30_000  # images behind the papers' FID on MS-COCO
NUM_REFERENCE = 512


class EncodedBatch:
    """Source that returns one encoded batch, held in memory, at every step.

    Args:
        models: encode it.
        source: gives its images and captions.
        recipe: batch size and dtype.
    """

    name = "encoded"

    def __init__(self, models: DiffusionModels, source: DataSource, recipe: LCDRecipe) -> None:
        self.length: int | None = recipe.train.batch_size
        batch = source.load(list(range(recipe.train.batch_size)))
        with torch.no_grad(), autocast(recipe.train.dtype, models.device.type):
            self.batch = Batch(None, batch.prompts, batch.ids, encode(models, batch))

    def fingerprint(self) -> dict[str, Any]:
        """Kind alone: it is never cached."""
        return {"kind": self.name}

    def load(self, indices: list[int]) -> Batch:
        """The batch, whatever the indices."""
        return self.batch


class Contenders:
    """Our step from images, our step from cached latents, and the plain reference step, on one set of networks.

    Each has an AdamW of its own. Recomputed activations, where the recipe asks for them, are off in the plain step.

    Args:
        trainer: of LCD, RG-LCD or LRM.
        source: its data.
        folder: an empty one.
    """

    def __init__(self, trainer: LCD, source: DataSource, folder: Path) -> None:
        self.trainer, self.source, self.recipe = trainer, source, trainer.recipe
        self.device = trainer.models.device
        self.loop = Loop(trainer, source, self.recipe, RunDirectory(folder / "run"), Ranks(device=self.device.type))
        size = self.recipe.train.batch_size
        self.size, self.num_plain = size, 0
        self.images = self.loop.loader
        held = EncodedBatch(trainer.models, source, self.recipe)
        self.latents = BatchLoader(
            held, self.recipe.seed, size, range(size), self.recipe.train.gradient_accumulation_steps
        )
        self.plain = PlainStep(trainer)
        self.work: dict[str, Callable[[], Any]] = {
            PLAIN: self.step_plainly,
            OURS: partial(self.step, self.images),
            CACHED: partial(self.step, self.latents),
        }

    def step(self, loader: BatchLoader) -> None:
        """Take the loop's own step on data of a loader."""
        self.loop.loader = loader
        self.loop.train_step()

    def step_plainly(self) -> None:
        """Take the plain step on images of the same source."""
        indices = batch_indices(0, self.num_plain, self.size, self.source.length)
        self.num_plain += 1
        self._recompute_activations(False)
        self.plain(self.source.load(indices.tolist()), PlainDraws(self.size, self.device))
        self._recompute_activations(True)

    def _recompute_activations(self, on: bool) -> None:
        if self.recipe.train.gradient_checkpointing:
            for network in (self.trainer.student, self.trainer.models.vae):
                network.enable_gradient_checkpointing() if on else network.disable_gradient_checkpointing()

    def peak_bytes(self) -> dict[str, int | None]:
        """Peak memory of each step, without AdamW's moments of the other; None on a CPU."""
        found = {}
        for name, step in self.work.items():
            others = self.loop.updater.optimisers if name == PLAIN else self.plain.optimisers
            for optimiser in others.values():
                optimiser.state.clear()
            step()  # makes its own moments
            found[name] = peak_bytes(self.device, step)
        return found


def trainer_of(recipe: LCDRecipe, shape: Shape | None, device: str) -> tuple[LCD, DataSource]:
    """A recipe's trainer and data: random networks of a shape with images in memory, or the recipe's own."""
    if shape is not None:
        return random_trainer(shape, recipe, torch.device(device)), HeldImages(shape.side)
    models = load_models(recipe.model.teacher_folder(), device, torch.float32)
    return resolve("trainer", recipe.kind).build(recipe, models), open_source(recipe.data)


def step(trainer: LCD, source: DataSource, folder: Path, rounds: int) -> dict[str, Any]:
    """Measure an optimiser step of LCD, RG-LCD or LRM beside the plain reference step, in turn.

    Args:
        trainer: of a recipe without ``train.compile``.
        source: its data.
        folder: an empty one.
        rounds: number of timings of each step.

    Returns:
        Of each step: seconds, images per second, FLOPs, and FLOPs per second as a share of the rate of a large matrix
        product, which is measured in turn with the steps; the ratio to the plain step; peak memory.
    """
    contenders = Contenders(trainer, source, folder)
    device, dtype, size = contenders.device, trainer.recipe.train.dtype, contenders.size
    peaks = contenders.peak_bytes()
    flops = {name: count_flops(work) for name, work in contenders.work.items()}
    rates: list[float] = []
    turns = {**contenders.work, "matmul": lambda: rates.append(matmul_rate(device, dtype))}
    seconds = alternate(turns, rounds, device)
    rate = spread(rates[1:])  # without the warm-up's
    steps = {}
    for name in contenders.work:
        time_sec = spread(seconds[name])
        steps[name] = {
            "seconds": time_sec,
            "images_per_sec": size / time_sec["median"],
            "flops": flops[name],
            "share_of_matmul_rate": flops[name] / rate["median"] / time_sec["median"],
            "peak_bytes": peaks[name],
        }
    return {
        "resolution": trainer.models.resolution,
        "matmul_flop_per_sec": rate,
        "steps": steps,
        "ratio_to_plain": {name: ratio(seconds[PLAIN], seconds[name]) for name in (OURS, CACHED)},
    }


def methods(folder: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """Compare the loop's own step of the methods on the benchtop, on one batch of encoded images, in turn.

    VSD and DOLLAR take the step in which all networks move, weighted gets random scores.

    Args:
        folder: an empty one.
        rounds: number of timings of each.
        device: ``cpu`` or ``cuda``.

    Returns:
        Of each method: FLOPs, and FLOPs and seconds as multiples of LCD's; and the FLOPs of DOLLAR's proxy in its step,
        as a multiple of an LRM step's.
    """
    models, work, trainers = load_models("benchtop", device, torch.float32), {}, {}
    held = EncodedBatch(models, open_source(load_recipe("lcd").data), load_recipe("lcd"))
    num = len(held.batch.ids)
    held.batch = replace(held.batch, scores=torch.rand(num, 2).double(), rank=torch.arange(num) % 2)
    for name, recipe in (("lcd", "lcd"), ("tcd", "tcd"), ("mlcm", "mlcm"), ("weighted", "weighted"), ("vsd", "dollar"),
                         ("lrm", "lrm"), ("dollar", "dollar")):  # fmt: skip
        settings = load_recipe(recipe, ["vsd.ratio=1", "proxy.path=null"] if recipe == "dollar" else [])
        kind = resolve("trainer", name)
        trainers[name] = kind(settings, models) if name in ("weighted", "vsd") else kind.build(settings, models)
        run = RunDirectory(folder / name)
        work[name] = Loop(trainers[name], held, settings, run, Ranks(device=device)).train_step
    flops = {name: count_flops(step) for name, step in work.items()}
    seconds = alternate(work, rounds, models.device)
    rows = [
        {
            "method": name,
            "flops": flops[name],
            "flops_to_lcd": flops[name] / flops["lcd"],
            "seconds_to_lcd": ratio(seconds[name], seconds["lcd"]),
        }
        for name in work
    ]
    small = count_flops(partial(_small_proxy_work, trainers["dollar"], held.batch))
    return [*rows, {"method": "small proxy", "flops": small, "flops_to_lrm": small / flops["lrm"]}]


def _small_proxy_work(trainer: Any, batch: Batch) -> None:
    """What a DOLLAR step asks of the proxy: the gradient of its reward, and its own on two candidates."""
    latents = batch.encoded.mean.to(trainer.models.device)  # type: ignore[union-attr]
    trainer.proxy(latents.clone().requires_grad_(), batch.prompts).sum().backward()
    trainer.proxy(torch.cat([latents] * 2), batch.prompts * 2).sum().backward()


def untrained_student(models: DiffusionModels) -> DiffusionModels:
    """The teacher as a student before its first step: training changes no cost of generation."""
    student = make_student(models.unet, EMBEDDING).requires_grad_(False)
    return models.with_student(student, NUM_DDIM_TIMESTEPS, TIMESTEP_SCALING)


def diffusers_pipeline(models: DiffusionModels) -> LatentConsistencyModelPipeline:
    """diffusers' pipeline around a student's networks, with the same schedule."""
    cumprod = cast(Tensor, models.schedule).double().cpu()
    before = torch.cat([torch.ones(1, dtype=torch.float64), cumprod[:-1]])
    scheduler = LCMScheduler(
        trained_betas=(1 - cumprod / before).tolist(),
        prediction_type=models.prediction_type,
        original_inference_steps=NUM_DDIM_TIMESTEPS,
        timestep_scaling=TIMESTEP_SCALING,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = LatentConsistencyModelPipeline(
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        unet=models.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(shape: Shape | None, device: str, dtype: str, batch_size: int, rounds: int) -> dict[str, Any]:
    """Measure our sampler beside diffusers' pipeline, on the same networks, prompts and noise.

    Args:
        shape: of random networks; None for the benchtop's own.
        device: ``cpu`` or ``cuda``.
        dtype: key of :data:`DTYPES`.
        batch_size: images at once.
        rounds: number of timings of each.

    Returns:
        Images per second of both, their ratio, and how far their images differ.
    """
    place = torch.device(device)
    base = random_models(shape, place, DTYPES[dtype]) if shape else load_models("benchtop", place, DTYPES[dtype])
    models, guidance = untrained_student(base), BENCHTOP_GUIDANCE
    pipeline = diffusers_pipeline(models)
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch_size)]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(noise_seed(f"bench/{i}", 0)) for i in range(batch_size)]

    @torch.inference_mode()
    def ours() -> Tensor:
        return models.sample(prompts, generators(), num_steps=STEPS, guidance_scale=guidance)

    def theirs() -> Tensor:
        steps = {"num_inference_steps": STEPS, "original_inference_steps": NUM_DDIM_TIMESTEPS}
        return pipeline(prompts, generator=generators(), guidance_scale=guidance, output_type="pt", **steps).images

    apart = differences(ours(), theirs())
    seconds = alternate({DIFFUSERS: theirs, OURS: ours}, rounds, place)
    return {
        "batch_size": batch_size,
        "dtype": dtype,
        "resolution": models.resolution,
        "images_per_sec": {name: batch_size / spread(values)["median"] for name, values in seconds.items()},
        "ratio": ratio(seconds[DIFFUSERS], seconds[OURS]),
        "difference": apart,
    }


def differences(a: Tensor, b: Tensor) -> dict[str, float]:
    """Differences of two batches of images in [0, 1]: share of values within 2/255, the largest, PSNR in dB."""
    gap = (a.double() - b.double().to(a.device)).abs()
    return {
        "share_within_2_of_255": float((gap <= 2 / 255).double().mean()),
        "largest": float(gap.max()),
        "psnr_db": float(-10 * gap.square().mean().clamp(min=1e-20).log10()),
    }


def evaluation(shape: Shape | None, folder: Path, num: int, metrics: list[str], device: str) -> dict[str, Any]:
    """Measure how much of an evaluation is not generation.

    At full size, the lines through ``num`` images and half of them separate what is done once (loading, solves) from
    the cost of an image, and are drawn on to the papers' 30,000 images. A first evaluation is not counted: it fills
    the cache of reference features.

    Args:
        shape: of a random student, reward and Inception; None for the benchtop's own.
        folder: an empty one; takes 10 GB at full size.
        num: number of images.
        metrics: names; by default all that fit the benchtop, or :data:`FULL_SIZE_METRICS`.
        device: ``cpu`` or ``cuda``.
    """
    base = random_models(shape, torch.device("cpu")) if shape else load_models("benchtop", "cpu", torch.float32)
    diffusers_pipeline(untrained_student(base)).save_pretrained(folder / "student")
    sizes = [num]
    options: dict[str, Any] = {"guidance": BENCHTOP_GUIDANCE}
    if shape is not None:
        metrics, options = metrics or list(FULL_SIZE_METRICS), _full_size_options(shape, folder, num)
        sizes = [num // 2, num]

    def once(size: int) -> dict[str, float]:
        start = time.perf_counter()
        targets, how = [str(folder / "student")], {"steps": STEPS, "device": device, "force": True, "keep_images": 0}
        evaluate(
            EvalConfig(targets=targets, metrics=metrics or (), num=size, results=folder / "results", **how, **options)
        )
        seconds = time.perf_counter() - start
        rate = load_results(folder / "results")[0].head.cost["generate_images_per_sec"]
        assert rate is not None  # a model was evaluated, not a folder of images
        return _split(size, seconds, size / rate)

    once(sizes[0])
    rounds = [once(size) for size in sizes]
    estimated = {"estimated": drawn_on(rounds[0], rounds[1], NUM_PAPER)} if shape else {}
    return {"metrics": metrics or ["all that fit"], "rounds": rounds, **rounds[-1], **estimated}


def _full_size_options(shape: Shape, folder: Path, num: int) -> dict[str, Any]:
    """Options of ``evaluate`` for a full-size student: random reward, Inception and reference images."""
    os.environ["XDG_CACHE_HOME"] = str(folder)  # where the Inception is looked for
    (folder / "rgbench").mkdir()
    inception = save_inception(folder / "rgbench" / INCEPTION_FILE)
    metric_networks.INCEPTION_SHA256 = sha256_file(inception)  # in place of the published weights'
    (folder / "reference").mkdir()
    rng = np.random.default_rng(0)
    for i in range(min(num, NUM_REFERENCE)):
        smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((shape.side, shape.side))
        smooth.save(folder / "reference" / f"{i:06d}.png")
    lines = [f"{CAPTIONS[i % len(CAPTIONS)]}, number {i}" for i in range(num)]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
    return {
        "prompts": str(folder / "prompts.txt"),
        "reference": folder / "reference",
        "hps": save_reward(shape, folder / "reward"),
        "guidance": FULL_SIZE_GUIDANCE,
        "dtype": "bfloat16",
    }


def _split(images: int, seconds: float, generation_sec: float) -> dict[str, float]:
    return {
        "images": images,
        "seconds": seconds,
        "generation_sec": generation_sec,
        "times_generation": seconds / generation_sec,
    }


def drawn_on(half: dict[str, float], whole: dict[str, float], images: int) -> dict[str, float]:
    """Both times at another number of images, on the lines through two sizes."""
    more = (images - whole["images"]) / (whole["images"] - half["images"])
    seconds, generation_sec = (whole[key] + more * (whole[key] - half[key]) for key in ("seconds", "generation_sec"))
    return _split(images, seconds, generation_sec)
