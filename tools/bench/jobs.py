"""Evaluations to be timed: of the benchtop's student before its first step, and of a full-size one.

What an evaluation costs does not depend on what the weights say. The full-size student, HPS and Inception have random
weights in the published layouts; the reference is a folder of smooth random images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import save_file

from rgbench.core.process import StopRequest
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.evaluate.evaluate import Job
from rgbench.evaluate.targets import Target, resolve_targets
from rgbench.metrics.context import OWN_FOLDER, SetComparison
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.networks import INCEPTION_FILE, EffLite0Network, InceptionNetwork
from rgbench.metrics.reference import ReferenceFolder, ReferenceScenes
from rgbench.models.pipeline import load_models
from rgbench.rewards.clip import CONFIG, FOLDER_WEIGHTS
from tools.bench.fid import save_inception, write_images
from tools.bench.generate import plain_pipeline, untrained_student
from tools.bench.random_models import CAPTIONS, Shape, random_expert, random_models

CPU = torch.device("cpu")
STEPS, BENCHTOP_GUIDANCE, GUIDANCE = 4, 5.0, 8.5  # of the recipes
NUM_REFERENCE = 512


def save_student(folder: Path) -> Path:
    """The benchtop's student before its first step, as a pipeline folder."""
    models = load_models("benchtop", "cpu", torch.float32)
    plain_pipeline(untrained_student(models)).save_pretrained(folder)
    return folder


def save_expert(shape: Shape, folder: Path) -> Path:
    """A random reward as an open_clip folder."""
    expert = random_expert(shape, CPU)
    folder.mkdir()
    settings = {"interpolation": "bicubic", "resize_mode": "longest"}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": shape.clip, "preprocess_cfg": settings}))
    save_file(expert.model.state_dict(), folder / FOLDER_WEIGHTS[0])
    return folder


def captions(num: int) -> PromptSet:
    """Different prompts of usual length, by their number."""
    texts = [f"{CAPTIONS[i % len(CAPTIONS)]}, number {i}" for i in range(num)]
    return PromptSet("bench", tuple(Prompt(f"bench/{i}", text) for i, text in enumerate(texts)))


@contextmanager
def full_size_job(
    shape: Shape, folder: Path, *, num: int, metrics: Sequence[str], device: str, dtype: str
) -> Iterator[tuple[Target, Job]]:
    """A student and what is asked of it, ready for :func:`rgbench.evaluate.evaluate.evaluate_target`.

    Args:
        shape: of the networks.
        folder: an empty one; takes 10 GB at full size.
        num: images.
        metrics: names.
        device: ``cpu`` or ``cuda``.
        dtype: of the networks that make images.
    """
    torch.manual_seed(0)
    plain_pipeline(untrained_student(random_models(shape, CPU))).save_pretrained(folder / "student")
    reward, inception = save_expert(shape, folder / "reward"), save_inception(folder / INCEPTION_FILE)
    (folder / "reference").mkdir()
    write_images(folder / "reference", min(num, NUM_REFERENCE), shape.side)
    prompts, cache = captions(num), folder / "results" / ".cache"
    network = InceptionNetwork(inception, "square256", torch.device(device))
    compared = SetComparison(FeatureSet(ReferenceFolder(folder / "reference", cache), network), OWN_FOLDER)
    with _job(prompts, compared, folder, metrics, device, dtype) as job:
        yield resolve_targets([str(folder / "student")], folder)[0], replace(job, hps=reward, guidance=GUIDANCE)


@contextmanager
def benchtop_job(folder: Path, *, num: int, metrics: Sequence[str], device: str) -> Iterator[tuple[Target, Job]]:
    """The same of the benchtop's untrained student in ``folder``, compared with its scenes.

    Args:
        folder: an empty one.
        num: images.
        metrics: names.
        device: ``cpu`` or ``cuda``.
    """
    student = save_student(folder / "student")
    prompts = benchtop_prompts(num)
    features = FeatureSet(
        ReferenceScenes(prompts, folder / "results" / ".cache"), EffLite0Network(torch.device(device))
    )
    with _job(prompts, SetComparison(features), folder, metrics, device, "float32") as job:
        yield resolve_targets([str(student)], folder)[0], job


@contextmanager
def _job(
    prompts: PromptSet, compared: SetComparison, folder: Path, metrics: Sequence[str], device: str, dtype: str
) -> Iterator[Job]:
    """What ``rgbench eval`` asks for, in silence."""
    scenes = ReferenceScenes(prompts, folder / "results" / ".cache")
    with StopRequest() as stop, Progress(disable=True) as progress:
        yield Job(
            metrics=tuple(metrics),
            prompts=prompts,
            known=prompts,
            scenes=scenes,
            compared=compared,
            results=folder / "results",
            steps=STEPS,
            guidance=BENCHTOP_GUIDANCE,
            batch_size=None,
            device=torch.device(device),
            dtype=getattr(torch, dtype),
            hps=None,
            judges={},
            force=False,
            keep_images=0,
            command="python -m tools.bench eval",
            stop=stop,
            progress=progress,
        )


def shorter(job: Job, num: int, results: Path) -> Job:
    """The same of the first prompts, into a folder of its own."""
    prompts = job.prompts.first(num)
    return replace(job, prompts=prompts, known=prompts, results=results)
