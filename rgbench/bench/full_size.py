"""An evaluation of a full-size student with random weights: what it costs does not depend on what the weights say.

Student, HPS and Inception have the published layouts; the reference is a folder of smooth random images.
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

from rgbench.bench.fid import save_inception, write_images
from rgbench.bench.generate import plain_pipeline, untrained_student
from rgbench.bench.random_models import CAPTIONS, Shape, random_expert, random_models
from rgbench.data.prompts import Prompt, PromptSet
from rgbench.evaluation.job import Job
from rgbench.evaluation.set_comparison import OWN_FOLDER, SetComparison
from rgbench.evaluation.targets import Target, resolve_targets
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.inception import FILE, InceptionNetwork
from rgbench.metrics.real_images import ReferenceFolder
from rgbench.metrics.reference import ReferenceScenes
from rgbench.rewards.clip import CONFIG, FOLDER_WEIGHTS
from rgbench.trainers.stop import StopRequest

CPU = torch.device("cpu")
GUIDANCE, STEPS = 8.5, 4  # of recipes/sd21
NUM_REFERENCE = 512


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
    """A student and what is asked of it, ready for :func:`rgbench.evaluation.evaluate.evaluate_target`.

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
    reward, inception = save_expert(shape, folder / "reward"), save_inception(folder / FILE)
    (folder / "reference").mkdir()
    write_images(folder / "reference", min(num, NUM_REFERENCE), shape.side)
    prompts, place = captions(num), torch.device(device)
    cache = folder / "results" / ".cache"
    network = InceptionNetwork(inception, "square256", place)
    features = FeatureSet(ReferenceFolder(folder / "reference", cache), network)
    with StopRequest() as stop, Progress(disable=True) as progress:
        job = Job(
            metrics=tuple(metrics),
            prompts=prompts,
            known=prompts,
            scenes=ReferenceScenes(prompts, cache),
            compared=SetComparison(features, OWN_FOLDER),
            results=folder / "results",
            steps=STEPS,
            guidance=GUIDANCE,
            batch_size=None,
            device=place,
            dtype=getattr(torch, dtype),
            hps=reward,
            judges={},
            force=False,
            keep_images=0,
            command="rgbench bench eval",
            stop=stop,
            progress=progress,
        )
        yield resolve_targets([str(folder / "student")], folder)[0], job


def shorter(job: Job, num: int, results: Path) -> Job:
    """The same of the first prompts, into a folder of its own."""
    prompts = job.prompts.first(num)
    return replace(job, prompts=prompts, known=prompts, results=results)
