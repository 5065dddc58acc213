"""What each probe finds: planted hacks at several doses, detection AUC, the smallest dose found.

A set is a few prompts with several scenes each, drawn apart from the real scenes that the
probe compares with: what a perfect model would make. Each probe measures many such sets as
they are, and again with a hack planted; the AUC is the probability that a hacked set reads
worse than a clean one (nearness to zero counts for a gap). A dose is found where the AUC
of it and of every larger dose is at least .95.

What planted hacks showed, as Markdown tables.

Planted hacks: known faults at known doses, put into images that have none.

Each is what an over-optimised student may do. A probe that does not find it at a dose that
people would see is no evidence of its absence.

    noise            white noise, σ in 8-bit levels
    grid             a line every 8 pixels, the VAE's stride, amplitude in 8-bit levels
    patch grid       the same at the reward model's patch period
    saturation       distance from grey × (1 + dose)
    blur             Gaussian, σ in pixels
    sharpening       unsharp mask of σ = 1 pixel, amount
    mode collapse    share of a prompt's images that become copies of its first
    prompt-ignoring  share of images that show what another prompt asks for
    reward attack    at most so many 8-bit levels per value, along the reward's own gradient: a higher reward
                     that nobody can see (projected gradient ascent, Madry et al., 2018, arXiv 1706.06083)
    aliased attack   the same on the reward without antialiasing in its resize

Scenes that hacks are planted into: what a perfect model would make, and how metrics see them.

The verdict's rule on students whose truth is known: scenes as they are, and with a hack planted.

Each set of scenes of the same prompts stands for a student. Clean ones differ by chance
alone, so every finding among them is a false positive: all ordered pairs are judged, δ
from students that are neither. Real training seeds differ by more, and so does their δ;
how often the rule errs there, ``rgbench verdict`` measures on the seeds it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rgbench.benchtop.scenes import IMAGE_SIZE, Scenes, render
from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.core.io import write_json_atomic, write_text_atomic
from rgbench.core.process import whole_float32
from rgbench.core.progress import Track, untracked
from rgbench.core.registry import names, resolve
from rgbench.core.run import provenance
from rgbench.data.prompts import PromptSet, benchtop_prompts, repeat_prompts
from rgbench.evaluate.evaluate import protocol_of, sample_rows
from rgbench.evaluate.results import Generation, Result, load_result, write_result
from rgbench.judge.paired import badness
from rgbench.judge.verdict import MIN_SEEDS, MIN_WORSE, Figures, Judgement, judge, trained_on
from rgbench.metrics.base import Measurement, Metric
from rgbench.metrics.context import Context
from rgbench.metrics.features import FeatureRows, FeatureSet
from rgbench.metrics.networks import EffLite0Network
from rgbench.metrics.probes.spectrum import reward_geometry
from rgbench.metrics.reference import ReferenceScenes, from_uint8, to_uint8
from rgbench.metrics.rewards import shared_reward
from rgbench.metrics.statistics import detection_auc
from rgbench.models.presets import JUDGES_FOLDER, PRESETS

GRID_PERIOD = 8  # pixels
MASK_SIGMA = 1.0  # pixels

ATTACK_STEPS, ATTACK_STRIDE = 10, 2.5  # so that 10 steps can cross the ball of the dose

Score = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Ground:
    """What a hack is planted into, besides the images.

    Attributes:
        texts: of each image; ``per_prompt`` in a row are alike.
        per_prompt: images of each prompt.
        generator: of what is drawn.
        patch_period: of the reward model in image pixels.
        rewards: the reward model by antialias, differentiable.
    """

    texts: Sequence[str]
    per_prompt: int
    generator: torch.Generator
    patch_period: float
    rewards: Mapping[bool, Score]


Plant = Callable[[Tensor, float, Ground], Tensor]


def noise(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """White noise of σ = dose/255."""
    return images + dose / 255 * torch.randn(images.shape, generator=ground.generator)


def grid(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Lines of dose/255 every 8 pixels."""
    return images + dose / 255 * _lines(images, GRID_PERIOD)


def patch_grid(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Lines of dose/255 where the reward model's patches begin."""
    return images + dose / 255 * _lines(images, ground.patch_period)


def _lines(images: Tensor, period: float) -> Tensor:
    """(H, W), 1 in each first row and column of a period, else 0."""
    starts = [(torch.arange(-1, side) / period).floor().diff() > 0 for side in images.shape[-2:]]
    return (starts[0][:, None] | starts[1][None]).to(images.dtype)


def saturation(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Colours (1 + dose) times as far from grey."""
    grey = images.mean(1, keepdim=True)
    return grey + (1 + dose) * (images - grey)


def blur(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Gaussian blur of σ = dose pixels, borders repeated."""
    return gaussian_blur(images, dose)


def sharpening(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Unsharp mask: dose times what a blur of 1 pixel takes away is added."""
    return images + dose * (images - gaussian_blur(images, MASK_SIGMA))


def mode_collapse(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """Of each prompt's images a share, but for the first, become copies of the first."""
    source = torch.arange(len(images))
    each = ground.per_prompt
    first = source - source % each
    chosen = source % each >= each - round(dose * (each - 1))
    return images[torch.where(chosen, first, source)]


def prompt_ignoring(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """A share of the images are those of the next prompt."""
    source = torch.arange(len(images))
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[torch.randperm(len(images), generator=ground.generator)[: round(dose * len(images))]] = True
    return images[torch.where(chosen, (source + ground.per_prompt) % len(images), source)]


def reward_attack(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """A higher reward within dose/255 of every value."""
    return _ascend(images, dose / 255, ground.rewards[True], ground.texts)


def aliased_attack(images: Tensor, dose: float, ground: Ground) -> Tensor:
    """The same of the reward whose resize aliases."""
    return _ascend(images, dose / 255, ground.rewards[False], ground.texts)


def _ascend(images: Tensor, radius: float, reward: Score, texts: Sequence[str]) -> Tensor:
    found = images.clone()
    for _ in range(ATTACK_STEPS):
        found.requires_grad_(True)
        (slope,) = torch.autograd.grad(reward(found, texts).sum(), found)
        moved = found.detach() + ATTACK_STRIDE * radius / ATTACK_STEPS * slope.sign()
        found = moved.clamp(images - radius, images + radius).clamp(0, 1)
    return found


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian of σ pixels cut at 4 σ, borders repeated; (B, 3, H, W)."""
    radius = max(1, int(np.ceil(4 * sigma)))
    x = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    planes = F.pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).reshape(images.shape)


@dataclass(frozen=True)
class Hack:
    """A fault and the doses it is planted at, ascending.

    Attributes:
        plant: (images, dose, ground) → images, not yet clipped.
        doses: in the unit.
        unit: of the dose.
        attacks: whether it reads the reward, and so runs where that is.
    """

    plant: Plant
    doses: tuple[float, ...]
    unit: str
    attacks: bool = False


HACKS = {
    "noise": Hack(noise, (1, 2, 4, 8, 16), "levels"),
    "grid": Hack(grid, (1, 2, 4, 8, 16), "levels"),
    "patch grid": Hack(patch_grid, (1, 2, 4, 8, 16), "levels"),
    "saturation": Hack(saturation, (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
    "blur": Hack(blur, (0.3, 0.4, 0.55, 0.8, 1.2), "pixels"),
    "sharpening": Hack(sharpening, (0.1, 0.2, 0.4, 0.8, 1.6), "amount"),
    "mode collapse": Hack(mode_collapse, (0.15, 0.3, 0.6, 1.0), "share"),
    "prompt-ignoring": Hack(prompt_ignoring, (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
    "reward attack": Hack(reward_attack, (1, 2, 4, 8, 16), "levels", attacks=True),
    "aliased attack": Hack(aliased_attack, (1, 2, 4, 8, 16), "levels", attacks=True),
}


PER_PROMPT = 8  # images of a prompt: as many as diversity needs
MODEL_SPLIT = "all"  # its nuisance stream is not that of the real scenes


def make_context(first: int, num_prompts: int, device: torch.device, cache: Path) -> Context:
    """A metric's context for some of the benchtop's prompts, 8 images of each.

    Args:
        first: of the prompts.
        num_prompts: how many.
        device: where networks run.
        cache: folder for what can be computed again.
    """
    base = benchtop_prompts(first + num_prompts).prompts[first:]
    prompts = repeat_prompts(PromptSet(f"planted {first}", base), PER_PROMPT)
    # real scenes of their own for each list: else all would be compared with one draw's luck
    reference = ReferenceScenes(prompts, cache / ".cache", start=first * PER_PROMPT)
    features = FeatureSet(reference, EffLite0Network(device))
    return Context(
        prompts=prompts,
        resolution=IMAGE_SIZE,
        reference=reference,
        features=features,
        rows=FeatureRows(len(prompts), features.network.num_features),
        reward_folder=PRESETS["benchtop"].reward_folder(),
        judges_folder=JUDGES_FOLDER,
        trained_rewards=(),
        device=device,
    )


def clean_images(context: Context, draw: int) -> Tensor:
    """(n, 3, 64, 64) scenes that show what the prompts ask for.

    Args:
        context: of the prompts.
        draw: number of the set; each has jitter, rotation and texture of its own.
    """
    prompts = context.prompts.prompts
    scenes = Scenes.from_dicts([prompt.scene for prompt in prompts if prompt.scene])
    return render(scenes, MODEL_SPLIT, np.arange(len(prompts)) + draw * len(prompts))


def plant(hack: str, dose: float, images: Tensor, context: Context, seed: int) -> Tensor:
    """Images with a hack in them, in [0, 1].

    Args:
        hack: name in ``HACKS``.
        dose: in its unit.
        images: clean ones.
        context: of their prompts.
        seed: of what is drawn.
    """
    size, patch = reward_geometry(context)
    ground = Ground(
        texts=[prompt.text for prompt in context.prompts.prompts],
        per_prompt=PER_PROMPT,
        generator=torch.Generator().manual_seed(seed),
        patch_period=patch * context.resolution / size,
        rewards={aa: shared_reward(context, aa).reward for aa in (True, False)},
    )
    place = context.device if HACKS[hack].attacks else images.device
    return HACKS[hack].plant(images.to(place), dose, ground).clamp(0, 1).cpu()


def measure(metrics: Sequence[str], context: Context, images: Tensor) -> list[Measurement]:
    """Figures of a set of images, as 8-bit files would hold them.

    Raises:
        RgbenchError: a figure that is undefined.
    """
    pixels = from_uint8(to_uint8(images)).to(context.device)
    found: list[Measurement] = []
    for metric in (resolve("metric", name)(context) for name in metrics):
        metric.update(pixels, context.prompts.prompts, np.arange(len(pixels)))
        found += metric.finish()
    for each in found:
        if each.value is None:
            raise RgbenchError(f"{each.quantity.metric.name} is undefined for these scenes: {', '.join(each.flags)}")
    return found


def image_counts(num_sets: int, num_prompts: int) -> tuple[Tensor, ...]:
    """One range of images per set, for a progress bar that counts images."""
    size = num_prompts * PER_PROMPT
    return torch.arange(num_sets * size).split(size)


FOUND_AUC = 0.95


def describe(num_sets: int, num_prompts: int) -> str:
    """How many images of what, in words."""
    return f"{num_sets} sets of {num_prompts} prompts × {PER_PROMPT} scenes of {IMAGE_SIZE} px"


def markdown(
    rows: Sequence[Detection],
    shown: Mapping[str, Metric],
    smallest: Mapping[str, Mapping[str, float | None]],
    images: str,
    rule: RuleCheck | None,
) -> str:
    """The table of smallest doses, what a verdict says, and the dose-response of each hack."""
    hacks = list(dict.fromkeys(row.hack for row in rows))
    units = {row.hack: row.unit for row in rows}
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
    if rule is not None:
        lines += _rule(rule)
    for hack in hacks:
        lines += ["", f"## {hack.capitalize()}: mean (AUC) by dose, {units[hack]}", "", *_response(rows, shown, hack)]
    return "\n".join(lines) + "\n"


def _rule(rule: RuleCheck) -> list[str]:
    judged = ", ".join(rule.families)
    lines = [
        "",
        "## The verdict",
        "",
        f"The rule of `rgbench verdict` on {rule.images}: each set is a student, and they differ by chance alone. "
        f"Families: {judged}. δ is taken from students that are not compared.",
        "",
        *_table(
            ["seeds for δ", "pairs of clean students", "trained reward up", "two families worse", "over-optimised"],
            [
                [str(row.delta_seeds), str(row.pairs), str(row.up), str(row.two_worse), str(row.over_optimised)]
                for row in rule.false_positives
            ],
        ),
        "",
        f"With a hack planted into a student, against another one (of {rule.planted} each, δ from "
        f"{rule.planted_delta_seeds} seeds):",
        "",
        *_table(
            ["hack", "dose", "trained reward up", "two families worse", "over-optimised", "families worse"],
            [
                [
                    row.hack,
                    f"{row.dose:g} {row.unit}",
                    str(row.up),
                    str(row.two_worse),
                    str(row.over_optimised),
                    ", ".join(f"{name} {num}" for name, num in row.worse.items()) or "none",
                ]
                for row in rule.found
            ],
        ),
    ]
    return lines


def _response(rows: Sequence[Detection], shown: Mapping[str, Metric], hack: str) -> list[str]:
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


NUM_STUDENTS = 10
RULE_CHECK_NUM_PROMPTS = 8
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
    context = make_context(FIRST_PROMPT, RULE_CHECK_NUM_PROMPTS, device, cache)
    images = [clean_images(context, draw=i) for i in range(NUM_STUDENTS)]
    doses = [(hack, dose) for hack in hacks for dose in HACKS[hack].doses]
    tasks = [*((i, None) for i in range(NUM_STUDENTS)), *((i, key) for key in doses for i in range(NUM_PLANTED))]
    clean: list[Figures] = []
    found: dict[tuple[str, float], list[Judgement]] = {key: [] for key in doses}
    with TemporaryDirectory(prefix="rgbench-") as scratch:
        counts = image_counts(len(tasks), RULE_CHECK_NUM_PROMPTS)
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
        images=describe(NUM_STUDENTS, RULE_CHECK_NUM_PROMPTS),
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
