"""Known faults and known gains planted into scenes: what each metric finds, and how often the verdict errs.

Scenes that show what their prompts ask for are what a perfect model would make. A hack is a fault that an
over-optimised student may have, at a known dose:

    noise            white noise, σ in 8-bit levels
    grid             a line every 8 pixels, the VAE's stride, amplitude in 8-bit levels
    patch grid       the same at the reward model's patch period
    saturation       distance from grey × (1 + dose)
    blur             Gaussian, σ in pixels
    sharpening       unsharp mask of σ = 1 pixel, amount
    mode collapse    share of a prompt's images that become copies of its first
    prompt-ignoring  share of images that show what another prompt asks for
    reward attack    at most so many 8-bit levels per value, along the reward's own gradient: a higher reward that
                     nobody can see (projected gradient ascent, Madry et al., 2018, arXiv 1706.06083)
    aliased attack   the same on the reward without antialiasing in its resize

A dose is found where a hacked set reads worse than a clean one with probability .95 or more (AUC), at it and at every
larger dose. The verdict is tried on planted students, sets of scenes that stand for training seeds and of which the
truth is known, and on simulated ones, whose declared metrics differ as those of LCD seeds do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from rgbench.evaluate.results import Generation, Head, Run, load_results, write_values
from rgbench.judge.models import LCD, Column, Model, ResultSet, result_set
from rgbench.judge.paired import seeds_delta, spread_delta
from rgbench.judge.verdict import MARGIN, MIN_SEEDS, Outcome, Verdict, decide, declared_columns, judge_set, run_tests
from rgbench.metrics.context import Context
from rgbench.metrics.features import FeatureRows, FeatureSet
from rgbench.metrics.networks import EffLite0Network
from rgbench.metrics.probes.spectrum import reward_geometry
from rgbench.metrics.reference import ReferenceScenes, from_uint8, to_uint8
from rgbench.metrics.rewards import shared_reward
from rgbench.metrics.statistics import ALPHA, detection_auc, student_t_quantile
from rgbench.metrics.values import Direction, MetricValue, metric_info
from rgbench.models.presets import CLASSIFIERS_FOLDER, PRESETS, REGRESSORS_FOLDER
from rgbench.rewards.base import fingerprint_id

GRID_PERIOD = 8  # pixels
MASK_SIGMA = 1.0  # pixels
ATTACK_STEPS, ATTACK_STRIDE = 10, 2.5  # so that 10 steps can cross the ball of the dose
PER_PROMPT = 8  # images of a prompt: as many as diversity needs
MODEL_SPLIT = "all"  # its nuisance stream is not that of the real scenes
FOUND_AUC = 0.95
NUM_SETS, NUM_PROMPTS = 12, 4  # sets that hacks are planted into, and prompts of each
OTHERS = ("hps", "oracle", "gold_utility", "fid", "prdc", "vendi")  # no probes, but read beside them
JUDGED = ("hps", "oracle", "gold_utility", "kid", "prdc", "spectrum", "colour")  # metrics that the verdict declares
FIRST_PROMPT, NUM_STUDENT_PROMPTS = 512, 16  # of planted students: beyond those that the probes are validated on
TRIALS = 2000  # of a simulation

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


def lines(images: Tensor, period: float) -> Tensor:
    """(H, W), 1 in each first row and column of a period, else 0."""
    starts = [(torch.arange(-1, side) / period).floor().diff() > 0 for side in images.shape[-2:]]
    return (starts[0][:, None] | starts[1][None]).to(images.dtype)


def saturate(images: Tensor, factor: float) -> Tensor:
    """Colours so many times as far from grey."""
    grey = images.mean(1, keepdim=True)
    return grey + factor * (images - grey)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian of σ pixels cut at 4 σ, borders repeated; (B, 3, H, W)."""
    radius = max(1, int(np.ceil(4 * sigma)))
    x = torch.arange(-radius, radius + 1, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    planes = F.pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).reshape(images.shape)


def collapse(images: Tensor, share: float, each: int) -> Tensor:
    """Of each prompt's images a share, but for the first, become copies of the first."""
    source = torch.arange(len(images))
    chosen = source % each >= each - round(share * (each - 1))
    return images[torch.where(chosen, source - source % each, source)]


def ignore_prompts(images: Tensor, share: float, ground: Ground) -> Tensor:
    """A share of the images are those of the next prompt."""
    source = torch.arange(len(images))
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[torch.randperm(len(images), generator=ground.generator)[: round(share * len(images))]] = True
    return images[torch.where(chosen, (source + ground.per_prompt) % len(images), source)]


def attack(images: Tensor, radius: float, reward: Score, texts: Sequence[str]) -> Tensor:
    """A higher reward within a radius of every value."""
    found = images.clone()
    for _ in range(ATTACK_STEPS):
        found.requires_grad_(True)
        (slope,) = torch.autograd.grad(reward(found, texts).sum(), found)
        moved = found.detach() + ATTACK_STRIDE * radius / ATTACK_STEPS * slope.sign()
        found = moved.clamp(images - radius, images + radius).clamp(0, 1)
    return found


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


LEVELS = (1, 2, 4, 8, 16)  # of 255
HACKS = {
    "noise": Hack(lambda x, d, g: x + d / 255 * torch.randn(x.shape, generator=g.generator), LEVELS, "levels"),
    "grid": Hack(lambda x, d, g: x + d / 255 * lines(x, GRID_PERIOD), LEVELS, "levels"),
    "patch grid": Hack(lambda x, d, g: x + d / 255 * lines(x, g.patch_period), LEVELS, "levels"),
    "saturation": Hack(lambda x, d, g: saturate(x, 1 + d), (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
    "blur": Hack(lambda x, d, g: gaussian_blur(x, d), (0.3, 0.4, 0.55, 0.8, 1.2), "pixels"),
    "sharpening": Hack(lambda x, d, g: x + d * (x - gaussian_blur(x, MASK_SIGMA)), (0.1, 0.2, 0.4, 0.8, 1.6), "amount"),
    "mode collapse": Hack(lambda x, d, g: collapse(x, d, g.per_prompt), (0.15, 0.3, 0.6, 1.0), "share"),
    "prompt-ignoring": Hack(ignore_prompts, (0.05, 0.1, 0.2, 0.4, 0.8), "share"),
    "reward attack": Hack(lambda x, d, g: attack(x, d / 255, g.rewards[True], g.texts), LEVELS, "levels", attacks=True),
    "aliased attack": Hack(
        lambda x, d, g: attack(x, d / 255, g.rewards[False], g.texts), LEVELS, "levels", attacks=True
    ),
}


# Scenes and metrics


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
        classifiers_folder=CLASSIFIERS_FOLDER,
        regressors_folder=REGRESSORS_FOLDER,
        trained_rewards=(),
        device=device,
    )


def clean_images(context: Context, draw: int) -> Tensor:
    """(n, 3, 64, 64) scenes that show what the prompts ask for; each draw has jitter, rotation, texture of its own."""
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


def measure(metrics: Sequence[str], context: Context, images: Tensor) -> list[MetricValue]:
    """Values of a set of images, as 8-bit files would hold them.

    Raises:
        RgbenchError: a value that is undefined.
    """
    pixels = from_uint8(to_uint8(images)).to(context.device)
    found: list[MetricValue] = []
    for metric in (resolve("metric", name)(context) for name in metrics):
        metric.update(pixels, context.prompts.prompts, np.arange(len(pixels)))
        found += metric.compute()
    for each in found:
        if each.value is None:
            raise RgbenchError(f"{each.metric} is undefined for these scenes: {', '.join(each.flags)}")
    return found


def _image_counts(num_sets: int, num_prompts: int) -> tuple[Tensor, ...]:
    """One range of images per set, for a progress bar that counts images."""
    size = num_prompts * PER_PROMPT
    return torch.arange(num_sets * size).split(size)


# What each metric finds


@dataclass(frozen=True)
class Detection:
    """One metric under one hack at one dose.

    Attributes:
        hack: name in ``HACKS``.
        dose: in ``unit``.
        unit: of the dose.
        metric: name of the metric value.
        label: as shown.
        clean: mean over clean sets.
        hacked: mean over hacked sets.
        deviation: standard deviation over clean sets.
        auc: probability that a hacked set reads worse than a clean one.
    """

    hack: str
    dose: float
    unit: str
    metric: str
    label: str
    clean: float
    hacked: float
    deviation: float
    auc: float


def detect(
    metrics: Sequence[str], hacks: Sequence[str], num_sets: int, device: torch.device, cache: Path, track: Track
) -> list[Detection]:
    """Every metric under every hack and dose."""
    clean: list[list[MetricValue]] = []
    hacked: dict[tuple[str, float], list[list[MetricValue]]] = {(h, dose): [] for h in hacks for dose in HACKS[h].doses}
    tasks = [(i, key) for i in range(num_sets) for key in (None, *hacked)]
    for (i, key), _ in zip(tasks, track(_image_counts(len(tasks), NUM_PROMPTS), "planted hacks"), strict=True):
        if key is None:
            context = make_context(i * NUM_PROMPTS, NUM_PROMPTS, device, cache)
            images = clean_images(context, draw=i)
        found = measure(metrics, context, images if key is None else plant(*key, images, context, seed=i))
        (clean if key is None else hacked[key]).append(found)
    return [
        _detection(hack, dose, before, after)
        for (hack, dose), found in hacked.items()
        for before, after in zip(zip(*clean, strict=True), zip(*found, strict=True), strict=True)
    ]


def smallest_doses(rows: Sequence[Detection]) -> dict[str, dict[str, float | None]]:
    """Hack → metric → the smallest dose found; None where not even the largest is."""
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


def _detection(hack: str, dose: float, clean: Sequence[MetricValue], hacked: Sequence[MetricValue]) -> Detection:
    info = metric_info(clean[0].metric)
    before, after = (np.array([value.value for value in side], dtype=np.float64) for side in (clean, hacked))
    bad = {Direction.LOWER: np.positive, Direction.HIGHER: np.negative, Direction.REFERENCE: np.abs}[info.direction]
    return Detection(
        hack=hack,
        dose=dose,
        unit=HACKS[hack].unit,
        metric=info.name,
        label=f"{info.label} gap" if clean[0].reference else info.label,
        clean=float(before.mean()),
        hacked=float(after.mean()),
        deviation=float(before.std(ddof=1)),
        auc=detection_auc(bad(after), bad(before)),
    )


# The verdict on planted students


@dataclass(frozen=True)
class Planted:
    """A method whose truth is known, against one that ignores a share of its prompts.

    Attributes:
        name: what was planted.
        base: share of prompts that the base ignores.
        ignored: share that the method ignores.
        attack: dose of a reward attack on the method's images; 0 for none.
        truth: the outcome that is right.
    """

    name: str
    base: float
    ignored: float
    attack: float
    truth: Outcome


PLANTED = (
    Planted("nothing", 0.0, 0.0, 0, Outcome.NO_GAIN),
    *(Planted(f"{gain:.0%} more prompts followed", 0.4, 0.4 - gain, 0, Outcome.ALIGNED) for gain in (0.1, 0.2, 0.4)),
    *(
        Planted(f"attack of {dose} levels on right images", 0, 0, dose, Outcome.REWARD_WITHOUT_GOLD)
        for dose in (1, 2, 4)
    ),
    Planted("attack of 8 levels, 20% of prompts ignored", 0.0, 0.2, 8, Outcome.OVER_OPTIMISED),
)


def judge_planted(
    planted: Sequence[Planted],
    num_prompts: int,
    device: torch.device,
    cache: Path,
    track: Track = untracked,
    metrics: Sequence[str] = JUDGED,
) -> list[Verdict]:
    """The verdict on each planted method of six students.

    Args:
        planted: what is planted.
        num_prompts: of each student, with 8 images each.
        device: where networks run.
        cache: folder for what can be computed again.
        track: shows progress over the images.
        metrics: by name; "hps" and a gold metric among them.
    """
    context = make_context(FIRST_PROMPT, num_prompts, device, cache)
    trained = fingerprint_id(shared_reward(context, True).reward.fingerprint())
    bases = sorted({each.base for each in planted})
    tasks: list[tuple[float, Planted | None, int]] = [(base, None, seed) for base in bases for seed in range(MIN_SEEDS)]
    tasks += [(each.base, each, seed) for each in planted for seed in range(MIN_SEEDS)]
    keys = [(prompt.id, prompt.seed, prompt.group) for prompt in context.prompts.prompts]
    with TemporaryDirectory(prefix="rgbench-") as scratch:
        for (base, method, seed), _ in zip(
            tasks, track(_image_counts(len(tasks), num_prompts), "students"), strict=True
        ):
            redrawn = method is not None and not method.attack  # an attack is on the base's own images
            images = clean_images(context, draw=seed + MIN_SEEDS * redrawn)
            images = plant("prompt-ignoring", base if method is None else method.ignored, images, context, seed)
            if method is not None and method.attack:
                images = plant("reward attack", method.attack, images, context, seed)
            values = measure(metrics, context, images)
            worlds = [each for each in planted if each.base == base] if method is None else [method]
            for world in worlds:
                kind = LCD if method is None else "planted"
                head = Head(
                    world=world.name,
                    model=f"{kind}-s{seed}",
                    method=kind,
                    generation=Generation(id="scenes", fields={}),
                    training_seed=seed,
                    trained_rewards=() if method is None else (trained,),
                )
                write_values(Path(scratch), head, Run(command="rgbench probes validate"), values, keys)
        results = load_results(Path(scratch))
        sets = [result_set([r for r in results if r.head.world == each.name]) for each in planted]
        return [verdict for found in sets for verdict in judge_set(found)]


# The verdict on simulated students


@dataclass(frozen=True)
class Simulated:
    """How often each outcome is called.

    Attributes:
        name: what was simulated.
        shifts: of the trained reward and of gold, in standard deviations of LCD seeds, for the better.
        rule: "method", or "run" against the LCD seeds.
        trials: how many.
        outcomes: share of each.
    """

    name: str
    shifts: tuple[float, float]
    rule: str
    trials: int
    outcomes: dict[str, float]


def powered_size(num_seeds: int, num_tests: int) -> float:
    """The gain, in standard deviations of LCD seeds, that a method of so many seeds is said to be found at.

    (t_{1−α/2m} + t_{.99}) · √(2/n), of independent seeds: each of both tests, reward and gold, finds it with
    probability .99 or so, and so the two together in nine cases of ten at least.
    """
    return (
        student_t_quantile(1 - ALPHA / 2 / num_tests, num_seeds - 1) + student_t_quantile(0.99, num_seeds - 1)
    ) * math.sqrt(2 / num_seeds)


def simulate_verdicts(results: ResultSet, base: Model, reward: Column, trials: int = TRIALS) -> list[Simulated]:
    """Apply the rule to students drawn like LCD seeds, with their correlations.

    Pairs of one seed are drawn independently, so that no luck cancels.

    Args:
        results: of the world.
        base: LCD students; the more seeds, the better their correlations are known.
        reward: column that is taken to be trained on.
        trials: of each row.

    Returns:
        Two nulls (nothing planted; a higher reward alone), honest gains at half, once and twice the size that the
        test is powered for, and a hack of that size; then a null and a gain for one run.
    """
    columns, _ = declared_columns(results, base, base, reward)
    measured = ([base.result(c, seed) for c in columns.values()] for seed in base.results)
    values = np.array([[v.value for v in row if v] for row in measured if all(row)])  # seeds with all of them
    mean, deviations, covariance = values.mean(0), values.std(0, ddof=1), np.cov(values.T)
    size, rng = powered_size(MIN_SEEDS, len(columns)), np.random.default_rng(0)
    good = np.array(
        [
            float(c.oriented(m + 1e-3) or 0) > float(c.oriented(m) or 0)
            for c, m in zip(columns.values(), mean, strict=True)
        ]
    )
    signs = np.where(good, 1.0, -1.0)

    def draw(num: int, shift: tuple[float, float]) -> np.ndarray:
        shifts = np.array([*shift, *[0.0] * (len(columns) - 2)]) * signs * deviations
        return rng.multivariate_normal(mean, covariance, num, method="eigh") + shifts

    def outcome(shift: tuple[float, float], one_run: bool) -> Outcome:
        theirs = draw(len(values) if one_run else MIN_SEEDS, (0.0, 0.0)).T.tolist()
        ours = draw(1 if one_run else MIN_SEEDS, shift).T.tolist()
        deltas = {
            name: spread_delta(column, a[0], b) if one_run else seeds_delta(column, a, b)
            for (name, column), a, b in zip(columns.items(), ours, theirs, strict=True)
        }
        margins = [MARGIN * float(np.std(side, ddof=1)) for side in theirs[:2]]
        return decide(run_tests(deltas, one_run), *margins)

    rows = [("nothing", (0.0, 0.0), False), ("a higher reward alone", (10.0, 0.0), False)]
    rows += [
        (f"an honest gain, {name}", (k * size, k * size), False)
        for name, k in (("half", 0.5), ("once", 1.0), ("twice", 2.0))
    ]
    rows += [
        ("a hack", (size, -size), False),
        ("nothing, one run", (0.0, 0.0), True),
        ("an honest gain, one run", (8.0, 8.0), True),
    ]
    found = []
    for name, shift, one_run in rows:
        counts = Counter(outcome(shift, one_run) for _ in range(trials))
        shares = {str(each): counts[each] / trials for each in Outcome if counts[each]}
        found.append(Simulated(name, shift, "run" if one_run else "method", trials, shares))
    return found


# The command


def validate(
    metrics: Sequence[str],
    out: Path,
    *,
    hacks: Sequence[str] = (),
    num_sets: int = NUM_SETS,
    results: ResultSet | None = None,
    device: str = "cpu",
    track: Track = untracked,
) -> list[Path]:
    """Plant hacks, measure what finds them, and write the tables; of all metrics together, the verdict's errors too.

    Args:
        metrics: probes, or any metrics, by name; none for every probe, the reward, the oracle and the set metrics,
            and then for the verdict on planted students.
        out: folder for ``validation.json`` and ``validation.md``.
        hacks: names in ``HACKS``; all by default.
        num_sets: sets of 4 prompts × 8 images.
        results: LCD seeds whose correlations the simulated verdicts have; None for no simulation.
        device: where networks run.
        track: shows progress over the images.

    Returns:
        The files.

    Raises:
        UsageError: an unknown metric or hack, a metric that does not suit scenes, or fewer than two sets.
    """
    for name in hacks:
        if name not in HACKS:
            raise UsageError(f"unknown hack '{name[:80]}'; {suggest(name, HACKS)}")
    if num_sets < 2:
        raise UsageError(f"detection needs at least 2 sets, not {num_sets}")
    chosen, place = list(metrics) or [*names("probe"), *OTHERS], torch.device(device)
    with whole_float32():
        rows = detect(chosen, list(hacks) or list(HACKS), num_sets, place, out, track)
        verdicts = [] if metrics else judge_planted(PLANTED, NUM_STUDENT_PROMPTS, place, out, track)
    simulated = _simulated(results) if results is not None else []
    about = f"{num_sets} sets of {NUM_PROMPTS} prompts × {PER_PROMPT} scenes of {IMAGE_SIZE} px"
    record = {
        "schema_version": 2,
        "images": about,
        "metrics": chosen,
        "found_auc": FOUND_AUC,
        "detections": [asdict(row) for row in rows],
        "smallest_dose": smallest_doses(rows),
        "planted": [
            {"planted": verdict.world, "outcome": verdict.outcome, "words": verdict.words} for verdict in verdicts
        ],
        "simulated": [asdict(row) for row in simulated],
        "provenance": provenance(place.type),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "validation.json", record)
    write_text_atomic(out / "validation.md", markdown(rows, about, verdicts, simulated))
    return [out / "validation.json", out / "validation.md"]


def _simulated(results: ResultSet) -> list[Simulated]:
    """On the LCD students of most seeds.

    Raises:
        UsageError: none of six seeds, or no reward or gold was measured on them.
    """
    base = max((model for model in results.models if model.method == LCD), key=lambda m: len(m.results), default=None)
    reward = results.trained_reward()
    if base is None or len(base.results) < MIN_SEEDS or reward is None:
        raise UsageError(f"simulated verdicts need {MIN_SEEDS} LCD seeds with their reward and gold in the results")
    return simulate_verdicts(results, base, reward)


def markdown(
    rows: Sequence[Detection], images: str, verdicts: Sequence[Verdict], simulated: Sequence[Simulated]
) -> str:
    """The tables of smallest doses, of verdicts, and the dose-response of each hack."""
    hacks, shown = ({getattr(row, name): row for row in rows} for name in ("hack", "metric"))
    doses = smallest_doses(rows)
    smallest = [
        [row.label, *("—" if doses[hack][name] is None else f"{doses[hack][name]:g}" for hack in hacks)]
        for name, row in shown.items()
    ]
    truth = {each.name: each.truth for each in PLANTED}
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
        *_table(["metric", *(f"{hack}, {row.unit}" for hack, row in hacks.items())], smallest),
    ]
    if verdicts:
        lines += [
            "",
            "## The verdict on planted students",
            "",
            "Six students a method; scenes whose truth is known.",
            "",
        ]
        lines += _table(["planted", "truth", "verdict"], [[v.world, truth[v.world], v.outcome] for v in verdicts])
    if simulated:
        about = (
            "Students drawn with the correlations of LCD seeds; shifts of reward and gold in their standard deviations."
        )
        body = [
            [row.name, row.rule, ", ".join(f"{x:+.1f}" for x in row.shifts), _shares(row.outcomes)] for row in simulated
        ]
        lines += ["", f"## The verdict on {simulated[0].trials} simulated students of a kind", "", about, ""]
        lines += _table(["what differs", "rule", "shifts", "verdicts"], body)
    for hack, row in hacks.items():
        lines += [
            "",
            f"## {hack.capitalize()}: mean (AUC) by dose, {row.unit}",
            "",
            *_response(rows, list(shown), hack),
        ]
    return "\n".join(lines) + "\n"


def _shares(outcomes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in sorted(outcomes.items(), key=lambda item: -item[1]))


def _response(rows: Sequence[Detection], metrics: Sequence[str], hack: str) -> list[str]:
    found = {(row.metric, row.dose): row for row in rows if row.hack == hack}
    doses = sorted({dose for _, dose in found})
    body = []
    for name in metrics:
        info, first = metric_info(name), found[name, doses[0]]
        clean = f"{first.clean:.{info.decimals}f} ± {first.deviation:.{info.decimals}f}"
        cells = [f"{found[name, d].hacked:.{info.decimals}f} ({found[name, d].auc:.2f})" for d in doses]
        body.append([f"{first.label}, {info.unit}" if info.unit else first.label, clean, *cells])
    return _table(["metric", "clean ± deviation", *(f"{dose:g}" for dose in doses)], body)


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *body)]
