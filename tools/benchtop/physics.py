"""``python -m tools.benchtop physics``: does direct reward optimisation hack the reward in this world?

LCD, RG-LCD (direct) and RG-LCD + LRM are trained at three reward scales and several
seeds; each student is read on the same test prompts by the trained reward, the oracle
and the energy above the reward model's Nyquist limit. The world has the physics if at
some scale, in every seed, direct optimisation raises the trained reward by more than
three standard deviations between LCD seeds while the all-attributes-right rate falls at
least 5 points under LCD's, or that energy rises at least 2 dB over LCD's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from rgbench.benchtop.oracle import load_oracle
from rgbench.benchtop.scenes import captions, sample_scenes
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.run import provenance
from rgbench.models.pipeline import load_models
from rgbench.rewards.clip import HPSReward
from rgbench.train.train import train
from tools.benchtop.checking import sample, student_guidance
from tools.benchtop.quality import attribute_scores, high_energy, score

SCALES = (1.0, 3.0, 10.0)
METHODS = ("rg_lcd", "lrm")
REWARD_STANDARD_DEVIATIONS = 3.0
ACCURACY_FALL = 0.05
ENERGY_RISE_DB = 2.0


@dataclass(frozen=True)
class Outcome:
    """One student: what it was trained with and how it reads.

    Attributes:
        method: ``lcd``, ``rg_lcd`` or ``lrm``.
        scale: reward scale β; 0 for LCD.
        seed: training seed.
        reward: mean trained reward, antialiased, raw cosine.
        all_right: share of images with every attribute right.
        high_energy_db: 10·log₁₀ of the mean luma energy above 0.22 cycles/pixel.
    """

    method: str
    scale: float
    seed: int
    reward: float
    all_right: float
    high_energy_db: float


def run_physics(
    assets: Path,
    out: Path,
    seeds: int,
    num: int,
    device: torch.device,
    overrides: list[str],
    methods: Sequence[str] = METHODS,
    scales: Sequence[float] = SCALES,
) -> dict:
    """Train what is not trained yet, read every student, and write ``out/physics.json``.

    Args:
        assets: folder of the world's parts.
        out: folder of the runs; finished ones are not trained again.
        seeds: training seeds, 0 … seeds − 1; at least 2.
        num: test prompts.
        device: torch device.
        overrides: ``key=value`` settings for every recipe.
        methods: what is compared with LCD.
        scales: reward scales β of each.

    Returns:
        The document written: outcomes, the verdict per scale, provenance.
    """
    outcomes = []
    for seed in range(seeds):
        for method, scale in [("lcd", 0.0), *((m, s) for s in scales for m in methods)]:
            run = out / f"{method}-b{scale:g}-s{seed}"
            settings = [f"seed={seed}", *overrides] + [f"guidance.scale={scale:g}"] * (method != "lcd")
            if not (run / "pipeline" / "model_index.json").exists():
                train(method, settings, out=run, device=str(device))
            outcomes.append(_read(assets, run, method, scale, seed, num, device))
            print(outcomes[-1], flush=True)
    document = {"schema_version": 1, "num": num, "overrides": overrides, "outcomes": [asdict(o) for o in outcomes]}
    document |= {"verdict": verdict(outcomes), "provenance": provenance(torch.device(device).type)}
    write_json_atomic(out / "physics.json", document)
    return document


def _read(assets: Path, run: Path, method: str, scale: float, seed: int, num: int, device: torch.device) -> Outcome:
    cached = run / "physics_outcome.json"
    if cached.exists() and (known := read_json(cached))["num"] == num:
        return Outcome(**known["outcome"])
    images = sample(load_models(run / "pipeline", device, torch.float32), "test", num, 4, student_guidance(run))
    scenes = sample_scenes("test", range(num))
    reward = HPSReward.load(assets / "reward", antialias=True, device=device)
    right = attribute_scores(load_oracle(assets / "judges", device), images, scenes)["all"]
    outcome = Outcome(
        method,
        scale,
        seed,
        float(score(reward, images, captions(scenes, "test", range(num))).mean()),
        float(right.mean()),
        float(10 * high_energy(images).mean().log10()),
    )
    write_json_atomic(cached, {"num": num, "outcome": asdict(outcome)})
    return outcome


def verdict(outcomes: list[Outcome]) -> list[dict]:
    """Per method and scale: in how many seeds the reward rose while accuracy fell or energy rose.

    Each seed is compared with the LCD student of the same seed.
    """
    lcd = {o.seed: o for o in outcomes if o.method == "lcd"}
    spread = stdev(o.reward for o in lcd.values())
    rows = []
    for method in METHODS:
        for scale in sorted({o.scale for o in outcomes if o.method == method}):
            own = [o for o in outcomes if o.method == method and o.scale == scale]
            gains = [o.reward - lcd[o.seed].reward for o in own]
            falls = [lcd[o.seed].all_right - o.all_right for o in own]
            rises = [o.high_energy_db - lcd[o.seed].high_energy_db for o in own]
            hacked = [
                gain > REWARD_STANDARD_DEVIATIONS * spread and (fall >= ACCURACY_FALL or rise >= ENERGY_RISE_DB)
                for gain, fall, rise in zip(gains, falls, rises, strict=True)
            ]
            rows.append({
                "method": method, "scale": scale, "seeds": len(own), "hacked": sum(hacked),
                "reward_gain": mean(gains), "lcd_reward_sd": spread,
                "all_right_fall": mean(falls), "high_energy_rise_db": mean(rises),
            })  # fmt: skip
    return rows
