"""``rgbench bench eval``: how much of an evaluation is not the making of images."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from rgbench.bench.generate import plain_pipeline, untrained_student
from rgbench.evaluation.api import default_metrics, evaluate
from rgbench.evaluation.results import load_results
from rgbench.models import load_models

GUIDANCE = 5.0


def save_student(folder: Path) -> Path:
    """The benchtop's student before its first step, as a pipeline folder."""
    models = load_models("benchtop", "cpu", torch.float32)
    plain_pipeline(untrained_student(models)).save_pretrained(folder)
    return folder


def measure(folder: Path, *, num: int, metrics: list[str] | None, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of a whole evaluation and of the generation within it.

    The first round fills the cache of reference features and is not counted: every later evaluation finds it.

    Args:
        folder: an empty one.
        num: images.
        metrics: names; all that fit by default.
        device: ``cpu`` or ``cuda``.
        rounds: how often it is done.
    """
    student = save_student(folder / "student")
    chosen = metrics or list(default_metrics(own_images=False))
    rows = []
    for number in range(rounds + 1):
        results = folder / f"results-{number}"
        start = time.perf_counter()
        evaluate([str(student)], chosen, num=num, results=results, guidance=GUIDANCE, device=device, keep_images=0)
        whole = time.perf_counter() - start
        rate = next(r.cost["generate_images_per_sec"] for r in load_results(results))
        assert rate is not None  # of a model, not of given images
        rows.append({"seconds": whole, "generation_sec": num / rate})
    counted = sorted(rows[1:], key=lambda row: row["seconds"])[rounds // 2]
    return {
        "images": num,
        "metrics": chosen,
        "steps": 4,
        "rounds": rows,
        **counted,
        "times_generation": counted["seconds"] / counted["generation_sec"],
        "share_outside_generation": 1 - counted["generation_sec"] / counted["seconds"],
    }
