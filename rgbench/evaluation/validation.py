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
from torch import Tensor

from rgbench.data.prompts import PromptSet, benchtop_prompts
from rgbench.errors import RgbenchError, UsageError, suggest
from rgbench.evaluation.hacks import HACKS
from rgbench.evaluation.paired import badness
from rgbench.evaluation.repeats import repeat_prompts
from rgbench.evaluation.statistics import detection_auc
from rgbench.files import write_json_atomic, write_text_atomic
from rgbench.metrics.contract import Context, Metric
from rgbench.metrics.efflite0 import EffLite0Network
from rgbench.metrics.features import FeatureRows, FeatureSet
from rgbench.metrics.reference import ReferenceScenes, Track, from_uint8, to_uint8, untracked
from rgbench.registry import names, resolve
from rgbench.run import provenance
from rgbench.worlds.presets import JUDGES_FOLDER, PRESETS
from rgbench.worlds.scenes import IMAGE_SIZE, Scenes, render

NUM_SETS = 12
NUM_PROMPTS = 4  # of a set
PER_PROMPT = 8  # images of a prompt: as many as diversity needs
FOUND_AUC = 0.95
MODEL_SPLIT = "all"  # its nuisance stream is not that of the real scenes
SEED = 0
JUDGES = ("hps", "oracle")  # what prompt-ignoring is found by

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
    """Plant hacks, measure what finds them, and write the table.

    Args:
        metrics: probes, or any metrics, by name; none for every probe, the reward and the oracle.
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
    chosen = list(metrics) or [*names("probe"), *JUDGES]
    for name in hacks:
        if name not in HACKS:
            raise UsageError(f"unknown hack '{name[:80]}'; {suggest(name, HACKS)}")
    if num_sets < 2:
        raise UsageError(f"detection needs at least 2 sets, not {num_sets}")
    rows, shown = detect(chosen, list(hacks) or list(HACKS), num_sets, torch.device(device), out, track)
    record = {
        "schema_version": 1,
        "images": f"{num_sets} sets of {NUM_PROMPTS} prompts × {PER_PROMPT} scenes, {IMAGE_SIZE} px",
        "metrics": chosen,
        "found_auc": FOUND_AUC,
        "detections": [asdict(row) for row in rows],
        "smallest_dose": smallest_doses(rows),
        "provenance": provenance(),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "validation.json", record)
    write_text_atomic(out / "validation.md", markdown(rows, shown, num_sets))
    return [out / "validation.json", out / "validation.md"]


def detect(
    metrics: Sequence[str], hacks: Sequence[str], num_sets: int, device: torch.device, cache: Path, track: Track
) -> tuple[list[Detection], dict[str, Metric]]:
    """Every figure under every hack and dose, and how the figures are named."""
    clean: list[Values] = []
    hacked: dict[tuple[str, float], list[Values]] = {(h, dose): [] for h in hacks for dose in HACKS[h].doses}
    shown: dict[str, Metric] = {}
    order = torch.arange(num_sets).split(1)
    for i in (int(at) for at in track(order, "planted hacks")):
        context, images = _set(i, device, cache)
        clean.append(_figures(metrics, context, images, shown))
        for hack, dose in hacked:
            generator = torch.Generator().manual_seed(1000 * i + SEED)
            planted = HACKS[hack].plant(images, dose, PER_PROMPT, generator).clamp(0, 1)
            hacked[hack, dose].append(_figures(metrics, context, planted, shown))
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


def _set(index: int, device: torch.device, cache: Path) -> tuple[Context, Tensor]:
    """A context of 4 prompts × 8, and clean model images for it."""
    base = benchtop_prompts((index + 1) * NUM_PROMPTS).prompts[-NUM_PROMPTS:]
    chosen = repeat_prompts(PromptSet(f"planted {index}", base), PER_PROMPT)
    prompts = chosen.prompts
    reference = ReferenceScenes(chosen, cache / ".cache")
    preset = PRESETS["benchtop"]
    context = Context(
        prompts=chosen,
        seed=SEED,
        resolution=IMAGE_SIZE,
        reference=reference,
        features=(features := FeatureSet(reference, EffLite0Network(device))),
        rows=FeatureRows(len(chosen), features.network.num_features),
        reward_folder=preset.reward_folder(),
        judges_folder=JUDGES_FOLDER,
        trained_rewards=(),
        device=device,
    )
    scenes = Scenes.from_dicts([prompt.scene for prompt in prompts if prompt.scene])
    stream = np.arange(len(prompts)) + index * len(prompts)
    return context, render(scenes, MODEL_SPLIT, stream)


def _figures(metrics: Sequence[str], context: Context, images: Tensor, shown: dict[str, Metric]) -> Values:
    pixels = from_uint8(to_uint8(images)).to(context.device)
    found: Values = {}
    for metric in (resolve("metric", name)(context) for name in metrics):
        metric.update(pixels, context.prompts.prompts, np.arange(len(pixels)))
        for measured in metric.finish():
            name = measured.quantity.metric.name
            if measured.value is None:
                raise RgbenchError(f"{name} is undefined for these scenes: {', '.join(measured.flags)}")
            shown[name], found[name] = measured.quantity.metric, measured.value
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


def markdown(rows: Sequence[Detection], shown: dict[str, Metric], num_sets: int) -> str:
    """The table of smallest doses, and the dose-response of each hack."""
    smallest, hacks = smallest_doses(rows), list(dict.fromkeys(row.hack for row in rows))
    units = {row.hack: row.unit for row in rows}
    images = f"{num_sets} sets of {NUM_PROMPTS} prompts × {PER_PROMPT} scenes of {IMAGE_SIZE} px"
    lines = [
        "# Planted hacks",
        "",
        f"Made by `rgbench probes validate`: {images}, clean and with a hack planted.",
        "",
        "## Smallest dose found",
        "",
        f"A dose is found where a hacked set reads worse than a clean one with probability {FOUND_AUC:g} or more, "
        "at it and at every larger dose; — where not even the largest is.",
        "",
        *_table(
            ["figure", *(f"{hack}, {units[hack]}" for hack in hacks)],
            [[metric.label, *(_dose(smallest[hack][name]) for hack in hacks)] for name, metric in shown.items()],
        ),
    ]
    for hack in hacks:
        lines += ["", f"## {hack.capitalize()}: mean (AUC) by dose, {units[hack]}", "", *_response(rows, shown, hack)]
    return "\n".join(lines) + "\n"


def _response(rows: Sequence[Detection], shown: dict[str, Metric], hack: str) -> list[str]:
    doses = sorted({row.dose for row in rows if row.hack == hack})
    found = {(row.metric, row.dose): row for row in rows if row.hack == hack}
    body = []
    for name, metric in shown.items():
        first = found[name, doses[0]]
        unit = f", {metric.unit}" if metric.unit else ""
        clean = f"{first.clean:.{metric.decimals}f} ± {first.deviation:.{metric.decimals}f}"
        cells = [f"{found[name, d].hacked:.{metric.decimals}f} ({found[name, d].auc:.2f})" for d in doses]
        body.append([f"{metric.label}{unit}", clean, *cells])
    return _table(["figure", "clean ± deviation", *(f"{dose:g}" for dose in doses)], body)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(header), line(["---"] * len(header)), *map(line, body)]


def _dose(dose: float | None) -> str:
    return "—" if dose is None else f"{dose:g}"
