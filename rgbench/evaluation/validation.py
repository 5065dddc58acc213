"""What each probe finds: planted hacks at several doses, detection AUC, the smallest dose found.

A set is a few prompts with several scenes each, drawn apart from the real scenes that the
probe compares with: what a perfect model would make. Each probe measures many such sets as
they are, and again with a hack planted; the AUC is the probability that a hacked set reads
worse than a clean one (nearness to zero counts for a gap). A dose is found where the AUC
of it and of every larger dose is at least .95.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from rgbench.errors import UsageError, suggest
from rgbench.evaluation.hacks import HACKS
from rgbench.evaluation.paired import badness
from rgbench.evaluation.planting import clean_images, image_counts, make_context, measure, plant
from rgbench.evaluation.rule_check import check_rule
from rgbench.evaluation.statistics import detection_auc
from rgbench.evaluation.validation_table import FOUND_AUC, describe, markdown
from rgbench.files import write_json_atomic, write_text_atomic
from rgbench.metrics.contract import Metric
from rgbench.metrics.tracking import Track, untracked
from rgbench.process import whole_float32
from rgbench.registry import names
from rgbench.run import provenance

NUM_SETS = 12
NUM_PROMPTS = 4  # of a set
OTHERS = ("hps", "oracle", "fid", "prdc", "vendi")  # no probes, but a verdict reads them

Values = dict[str, float]


@dataclass(frozen=True)
class Detection:
    """One figure under one hack at one dose.

    Attributes:
        hack: name in ``HACKS``.
        dose: in ``unit``.
        unit: of the dose.
        metric: the figure's name.
        clean: mean over clean sets.
        hacked: mean over hacked sets.
        deviation: standard deviation over clean sets.
        auc: probability that a hacked set reads worse than a clean one.
    """

    hack: str
    dose: float
    unit: str
    metric: str
    clean: float
    hacked: float
    deviation: float
    auc: float


def validate(
    metrics: Sequence[str],
    out: Path,
    *,
    hacks: Sequence[str] = (),
    num_sets: int = NUM_SETS,
    device: str = "cpu",
    track: Track = untracked,
) -> list[Path]:
    """Plant hacks, measure what finds them, and write the table; of all metrics together, the verdict's rule too.

    Args:
        metrics: probes, or any metrics, by name; none for every probe, the reward, the oracle and the set metrics,
            and then for what a verdict says of them.
        out: folder for ``validation.json`` and ``validation.md``.
        hacks: names in ``HACKS``; all by default.
        num_sets: sets of 4 prompts × 8 images.
        device: where networks run.
        track: shows progress over the sets.

    Returns:
        The files.

    Raises:
        UsageError: an unknown metric or hack, a metric that does not suit scenes, or fewer than two sets.
    """
    chosen = list(metrics) or [*names("probe"), *OTHERS]
    for name in hacks:
        if name not in HACKS:
            raise UsageError(f"unknown hack '{name[:80]}'; {suggest(name, HACKS)}")
    if num_sets < 2:
        raise UsageError(f"detection needs at least 2 sets, not {num_sets}")
    planted, place = list(hacks) or list(HACKS), torch.device(device)
    with whole_float32():
        rows, shown = detect(chosen, planted, num_sets, place, out, track)
        rule = None if metrics else check_rule(chosen, planted, place, out, track)
    about = describe(num_sets, NUM_PROMPTS)
    record = {
        "schema_version": 1,
        "images": about,
        "metrics": chosen,
        "found_auc": FOUND_AUC,
        "detections": [asdict(row) for row in rows],
        "smallest_dose": smallest_doses(rows),
        "verdict": asdict(rule) if rule else None,
        "provenance": provenance(place.type),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "validation.json", record)
    write_text_atomic(out / "validation.md", markdown(rows, shown, smallest_doses(rows), about, rule))
    return [out / "validation.json", out / "validation.md"]


def detect(
    metrics: Sequence[str], hacks: Sequence[str], num_sets: int, device: torch.device, cache: Path, track: Track
) -> tuple[list[Detection], dict[str, Metric]]:
    """Every figure under every hack and dose, and how the figures are named."""
    clean: list[Values] = []
    hacked: dict[tuple[str, float], list[Values]] = {(h, dose): [] for h in hacks for dose in HACKS[h].doses}
    shown: dict[str, Metric] = {}
    tasks = [(i, key) for i in range(num_sets) for key in (None, *hacked)]
    for (i, key), _ in zip(tasks, track(image_counts(len(tasks), NUM_PROMPTS), "planted hacks"), strict=True):
        if key is None:
            context = make_context(i * NUM_PROMPTS, NUM_PROMPTS, device, cache)
            images = clean_images(context, draw=i)
        found = measure(metrics, context, images if key is None else plant(*key, images, context, seed=i))
        shown |= {each.quantity.metric.name: each.quantity.metric for each in found}
        values = {each.quantity.metric.name: each.value for each in found if each.value is not None}
        (clean if key is None else hacked[key]).append(values)
    rows = [
        _detection(hack, dose, shown[name], clean, found) for (hack, dose), found in hacked.items() for name in shown
    ]
    return rows, shown


def smallest_doses(rows: Sequence[Detection]) -> dict[str, dict[str, float | None]]:
    """Hack → figure → the smallest dose found; None where not even the largest is."""
    found: dict[str, dict[str, float | None]] = {}
    lost = set()
    for row in sorted(rows, key=lambda row: -row.dose):
        doses = found.setdefault(row.hack, {})
        doses.setdefault(row.metric, None)
        if row.auc < FOUND_AUC:
            lost.add((row.hack, row.metric))
        elif (row.hack, row.metric) not in lost:
            doses[row.metric] = row.dose
    return found


def _detection(hack: str, dose: float, metric: Metric, clean: list[Values], hacked: list[Values]) -> Detection:
    before, after = (np.array([values[metric.name] for values in side]) for side in (clean, hacked))
    return Detection(
        hack=hack,
        dose=dose,
        unit=HACKS[hack].unit,
        metric=metric.name,
        clean=float(before.mean()),
        hacked=float(after.mean()),
        deviation=float(before.std(ddof=1)),
        auc=detection_auc(np.asarray(badness(metric, after)), np.asarray(badness(metric, before))),
    )
