"""``python -m tools.bench eval``: how much of an evaluation is not the making of images."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rgbench.evaluate.evaluate import default_metrics, evaluate, evaluate_target
from rgbench.evaluate.results import load_results
from tools.bench.jobs import BENCHTOP_GUIDANCE, STEPS, full_size_job, save_student, shorter
from tools.bench.random_models import Shape

NUM_PAPER = 30_000  # images of the papers' Fréchet distances on MS-COCO
LINEAR = ("fid", "kid", "hps")  # their cost grows with the images and no faster


def measure(folder: Path, *, num: int, metrics: list[str] | None, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of a whole evaluation on the benchtop and of the generation within it.

    The first round fills the results' cache of what the real images read and is not counted: every later evaluation
    of any model finds it there.

    Args:
        folder: an empty one.
        num: images.
        metrics: names; all that fit by default.
        device: ``cpu`` or ``cuda``.
        rounds: how often it is done.
    """
    student = save_student(folder / "student")
    chosen = metrics or list(default_metrics(own_images=False))

    def once(results: Path) -> None:
        how: Any = {"guidance": BENCHTOP_GUIDANCE, "device": device, "keep_images": 0, "force": True}
        evaluate([str(student)], chosen, num=num, results=results, **how)

    found = [_timed(once, folder / "results", num) for _ in range(rounds + 1)]
    counted = sorted(found[1:], key=lambda row: row["seconds"])[rounds // 2]
    return {"metrics": chosen, "steps": 4, "rounds": found, **counted}


def measure_full_size(
    shape: Shape, folder: Path, *, num: int, metrics: list[str] | None, device: str, dtype: str
) -> dict[str, Any]:
    """The same of a full-size student with random weights, at ``num`` images and at half of them, and for 30,000.

    What an evaluation costs once (loading, the solves) is told from what it costs by image by the line through both
    sizes, which is drawn on to 30,000.

    Args:
        shape: of the networks.
        folder: an empty one; takes 10 GB at full size.
        num: images.
        metrics: names, of metrics whose cost grows with the images and no faster.
        device: ``cpu`` or ``cuda``.
        dtype: of the networks that make images.
    """
    chosen = metrics or list(LINEAR)
    with full_size_job(shape, folder, num=num, metrics=chosen, device=device, dtype=dtype) as (target, job):

        def once(results: Path, size: int) -> None:
            evaluate_target(target, shorter(job, size, results))

        once(folder / "warm-up", num // 2)
        sizes = (num // 2, num)
        half, whole = (_timed(partial(once, size=size), folder / f"results-{size}", size) for size in sizes)
    return {
        "metrics": chosen,
        "steps": STEPS,
        "dtype": dtype,
        "resolution": shape.side,
        "rounds": [half, whole],
        **whole,
        "estimated": _drawn_on(half, whole, NUM_PAPER),
    }


def _timed(once: Callable[[Path], None], results: Path, num: int) -> dict[str, Any]:
    """One evaluation, and the making of images within it."""
    start = time.perf_counter()
    once(results)
    whole = time.perf_counter() - start
    rate = next(r.cost["generate_images_per_sec"] for r in load_results(results))
    assert rate is not None  # of a model, not of given images
    return _split(num, whole, num / rate)


def _drawn_on(half: dict[str, Any], whole: dict[str, Any], num: int) -> dict[str, Any]:
    """Both times at ``num`` images, on the lines through two sizes."""
    more = (num - whole["images"]) / (whole["images"] - half["images"])
    seconds, generation = (whole[key] + more * (whole[key] - half[key]) for key in ("seconds", "generation_sec"))
    return _split(num, seconds, generation)


def _split(num: int, seconds: float, generation: float) -> dict[str, Any]:
    return {
        "images": num,
        "seconds": seconds,
        "generation_sec": generation,
        "times_generation": seconds / generation,
        "share_outside_generation": 1 - generation / seconds,
    }
