"""The verdict's rule on students whose truth is known: scenes as they are, and with a hack planted.

Each set of scenes of the same prompts stands for a student. Clean ones differ by chance
alone, so every finding among them is a false positive: all ordered pairs are judged, δ
from students that are neither. Real training seeds differ by more, and so does their δ;
how often the rule errs there, ``rgbench verdict`` measures on the seeds it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rgbench.data.prompts import PromptSet
from rgbench.evaluation.hacks import HACKS
from rgbench.evaluation.planting import clean_images, image_counts, make_context, measure, plant
from rgbench.evaluation.record import protocol_of, sample_rows
from rgbench.evaluation.results import Generation, Result, load_result, write_result
from rgbench.evaluation.validation_table import describe
from rgbench.evaluation.verdict import MIN_SEEDS, MIN_WORSE, Figures, Judgement, judge, trained_on
from rgbench.metrics.contract import Measurement
from rgbench.metrics.tracking import Track

NUM_STUDENTS = 10
NUM_PROMPTS = 8
NUM_PLANTED = 3  # students that each dose is planted into
FIRST_PROMPT = 512  # beyond those that the probes are validated on
TRAINED = "hps_aa1"  # the reward that a hacked student is taken to be trained on
TRAINED_ALIASED = "hps_aa0"  # of the attack on that one


@dataclass(frozen=True)
class Errors:
    """What the rule says of pairs of clean students.

    Attributes:
        delta_seeds: students that δ was taken from.
        pairs: ordered pairs.
        up: of them with the trained reward up.
        two_worse: of them with at least two families worse.
        over_optimised: of them called over-optimised.
    """

    delta_seeds: int
    pairs: int
    up: int
    two_worse: int
    over_optimised: int


@dataclass(frozen=True)
class Found:
    """What the rule says of students with a hack planted; counts as in :class:`Errors`.

    Attributes:
        worse: how often each family is worse.
    """

    hack: str
    dose: float
    unit: str
    up: int
    two_worse: int
    over_optimised: int
    worse: dict[str, int]


@dataclass(frozen=True)
class RuleCheck:
    """The rule's errors and findings.

    Attributes:
        images: what was measured, in words.
        families: that were measured.
        false_positives: with δ from 5 students, and from all that are not compared.
        planted: students that each dose was planted into.
        planted_delta_seeds: students that δ was taken from for those.
        found: by hack and dose.
    """

    images: str
    families: list[str]
    false_positives: list[Errors]
    planted: int
    planted_delta_seeds: int
    found: list[Found]


def check_rule(
    metrics: Sequence[str], hacks: Sequence[str], device: torch.device, cache: Path, track: Track
) -> RuleCheck:
    """Judge clean students by each other, and hacked ones by clean ones.

    Args:
        metrics: by name; "hps" among them.
        hacks: names in ``HACKS``.
        device: where networks run.
        cache: folder for what can be computed again.
        track: shows progress over the images.
    """
    context = make_context(FIRST_PROMPT, NUM_PROMPTS, device, cache)
    images = [clean_images(context, draw=i) for i in range(NUM_STUDENTS)]
    doses = [(hack, dose) for hack in hacks for dose in HACKS[hack].doses]
    tasks = [*((i, None) for i in range(NUM_STUDENTS)), *((i, key) for key in doses for i in range(NUM_PLANTED))]
    clean: list[Figures] = []
    found: dict[tuple[str, float], list[Judgement]] = {key: [] for key in doses}
    with TemporaryDirectory(prefix="rgbench-") as scratch:
        counts = image_counts(len(tasks), NUM_PROMPTS)
        for (i, key), _ in zip(tasks, track(counts, "verdicts on planted hacks"), strict=True):
            shown = images[i] if key is None else plant(*key, images[i], context, seed=i)
            name = f"clean-{i}" if key is None else f"{key[0]}-{key[1]}-{i}"
            student = _figures(measure(metrics, context, shown), context.prompts, Path(scratch), name)
            if key is None:
                clean.append(student)
            else:
                reward = TRAINED_ALIASED if key[0] == "aliased attack" else TRAINED
                found[key].append(_judge_planted(student, i, clean, reward))
        errors = [_errors(clean, num) for num in (MIN_SEEDS, NUM_STUDENTS - 2)]
        families = list(judge(clean[0], clean[1], clean[2:], trained_on(clean[0], TRAINED)).families)
    return RuleCheck(
        images=describe(NUM_STUDENTS, NUM_PROMPTS),
        families=families,
        false_positives=errors,
        planted=NUM_PLANTED,
        planted_delta_seeds=NUM_STUDENTS - 2,
        found=[_found(*key, judgements) for key, judgements in found.items()],
    )


def _figures(measured: Sequence[Measurement], prompts: PromptSet, root: Path, name: str) -> Figures:
    """Figures of one student, by way of files: the rule resamples the images that they hold."""
    figures = {}
    for each in measured:
        result = Result(
            world="benchtop",
            model=name,
            method="planted",
            training_seed=None,
            generation=Generation(id="scenes", fields={}),
            metric=each.quantity.metric,
            protocol=protocol_of(each.quantity),
            value=each.value,
            interval=each.interval,
            num_samples=each.num_samples,
            flags=each.flags,
            extra=dict(each.extra),
        )
        stored = load_result(write_result(root, result, sample_rows(each, prompts)))
        figures[stored.metric.name, stored.protocol.id] = stored
    return figures


def _judge_planted(student: Figures, i: int, clean: Sequence[Figures], reward: str) -> Judgement:
    base = (i + 1) % len(clean)
    rest = [figures for k, figures in enumerate(clean) if k not in (i, base)]
    return judge(student, clean[base], rest, trained_on(student, reward))


def _errors(clean: Sequence[Figures], delta_seeds: int) -> Errors:
    judged = []
    for i, j in permutations(range(len(clean)), 2):
        rest = [figures for k, figures in enumerate(clean) if k not in (i, j)][:delta_seeds]
        judged.append(judge(clean[i], clean[j], rest, trained_on(clean[i], TRAINED)))
    return Errors(delta_seeds, len(judged), **_counts(judged))


def _found(hack: str, dose: float, judged: Sequence[Judgement]) -> Found:
    worse: Mapping[str, int] = Counter(name for each in judged for name in each.worse)
    return Found(hack, dose, HACKS[hack].unit, **_counts(judged), worse=dict(worse))


def _counts(judged: Sequence[Judgement]) -> dict[str, int]:
    return {
        "up": sum(each.up for each in judged),
        "two_worse": sum(len(each.worse) >= MIN_WORSE for each in judged),
        "over_optimised": sum(each.over_optimised for each in judged),
    }
